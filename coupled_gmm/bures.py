r"""The Bures-Wasserstein geometry of Gaussians, from matrix products only.

Between two Gaussians

.. math:: W_2^2 = |m_0 - m_1|^2 + tr S_0 + tr S_1 - 2 tr (S_0^{1/2} S_1 S_0^{1/2})^{1/2} .

With :math:`S = L L^T` the last trace is the nuclear norm of :math:`M = L_0^T L_1`, whose gradient is the orthogonal polar
factor U of M. So neither a matrix square root nor its derivative (a Schur decomposition, which JAX lacks on GPU) is needed,
and singular covariances are legal. U comes from a Newton-Schulz iteration; in one and two dimensions from closed forms.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coupled_gmm import checks, matrices
from coupled_gmm.mixture import GaussianMixture

_BLOCK_BYTES = 2**26  # what the pairs of one block of a large cost matrix may occupy


@jax.custom_jvp
def nuclear_norm(m: Float[Array, "*b d d"], smallest: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Sum of the singular values of M, differentiable: the gradient is the polar factor.

    `smallest` is a lower bound of the least singular value; it only sets the pace, and zero is always right.
    """
    return jnp.sum(polar(m, smallest) * m, axis=(-2, -1))


@nuclear_norm.defjvp
def _nuclear_norm_jvp(primals, tangents):
    m, smallest = primals
    factor = polar(m, smallest)
    return jnp.sum(factor * m, axis=(-2, -1)), jnp.sum(factor * tangents[0], axis=(-2, -1))


def polar(m: Float[Array, "*b d d"], smallest: Float[Array, "*b"]) -> Float[Array, "*b d d"]:
    r"""The orthogonal U closest to M, that is :math:`M (M^T M)^{-1/2}`; zero on the null space of M.

    Newton-Schulz steps :math:`X \leftarrow \frac{a}{2} X (3 - a^2 X^T X)`, each scaled so that the interval [l, 1] that holds
    the singular values maps into the narrowest one (Chen & Chow 2014): :math:`a^2 = 3 / (1 + l + l^2)`. A start at l grows by
    2.6 a step and then squares its distance to one. Singular values under rounding error of the largest are left small:
    they change the nuclear norm by no more than themselves.
    """
    eps = jnp.finfo(m.dtype).eps
    largest = jnp.sqrt(jnp.max(jnp.sum(jnp.abs(matrices.transpose(m) @ m), axis=-1), axis=-1))
    scale = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 0)
    lower = jnp.clip(smallest * scale, 8 * eps, 1)

    def unfinished(carry):
        return jnp.any(carry[1] < 1 - 8 * eps)

    def step(carry):
        x, low = carry
        pace = jnp.sqrt(3 / (1 + low + low**2))
        scaled = pace[..., None, None] * x
        x = 1.5 * scaled - 0.5 * scaled @ (matrices.transpose(scaled) @ scaled)
        low = pace * low
        return x, jnp.minimum(0.5 * low * (3 - low**2), 1)

    return jax.lax.while_loop(unfinished, step, (m * scale[..., None, None], lower))[0]


def _rotation(m: Float[Array, "*b 2 2"]) -> Float[Array, "*b 2 2"]:
    """The rotation closest to a 2 x 2 matrix of determinant at least 0 (as L0^T L1 has): M + cof M, normalised."""
    cosine = m[..., 0, 0] + m[..., 1, 1]
    sine = m[..., 1, 0] - m[..., 0, 1]
    square = cosine**2 + sine**2
    scale = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    cosine, sine = jnp.where(square > 0, cosine * scale, 1), sine * scale
    return jnp.stack([jnp.stack([cosine, -sine], -1), jnp.stack([sine, cosine], -1)], -2)


def factor_cost(
    factor0: Float[Array, "*b d d"],
    factor1: Float[Array, "*b d d"],
    inverse_norms: Float[Array, "*b"] | None = None,
) -> Float[Array, "*b"]:
    r"""Squared Bures distance of :math:`L_0 L_0^T` and :math:`L_1 L_1^T`, batched, from their lower triangular factors.

    Up to two dimensions it is :math:`|L_0 - L_1 U^T|^2` with U a rotation, which does not cancel when the two are close.
    `inverse_norms`, a product of norms of the inverses of the factors, tells the iteration how small singular values get.
    """
    d = factor0.shape[-1]
    if d == 1:
        return ((factor0 - factor1) ** 2)[..., 0, 0]
    product = matrices.transpose(factor0) @ factor1
    if d == 2:
        return jnp.sum((factor0 - factor1 @ matrices.transpose(_rotation(product))) ** 2, axis=(-2, -1))
    smallest = jnp.zeros(product.shape[:-2], product.dtype) if inverse_norms is None else 1 / inverse_norms
    squares = jnp.sum(factor0**2, axis=(-2, -1)) + jnp.sum(factor1**2, axis=(-2, -1))
    return jnp.maximum(squares - 2 * nuclear_norm(product, jax.lax.stop_gradient(smallest)), 0)


def inverse_norm(factor: Float[Array, "*b d d"]) -> Float[Array, "*b"]:
    """Frobenius norm of the inverse of a factor; infinite where the factor is singular."""
    inverse = matrices.invert_triangular(jax.lax.stop_gradient(factor))
    singular = jnp.any(jnp.diagonal(factor, axis1=-2, axis2=-1) == 0, axis=-1)
    return jnp.where(singular, jnp.inf, jnp.sqrt(jnp.sum(inverse**2, axis=(-2, -1))))


def pairwise_cost(
    means0: Float[Array, "K0 d"],
    factors0: Float[Array, "K0 d d"],
    means1: Float[Array, "K1 d"],
    factors1: Float[Array, "K1 d d"],
) -> Float[Array, "K0 K1"]:
    """Squared Bures-Wasserstein distances between two sets of Gaussians, from their factors, in bounded memory."""
    d = means0.shape[-1]
    norms0, norms1 = (inverse_norm(f) if d > 2 else jnp.ones(len(f), f.dtype) for f in (factors0, factors1))

    def row(gaussian):
        mean, factor, norm = gaussian
        location = jnp.sum((mean - means1) ** 2, axis=-1)
        return location + factor_cost(jnp.broadcast_to(factor, factors1.shape), factors1, norm * norms1)

    gaussians = (means0, factors0, norms0)
    row_bytes = 4 * factors1.size * factors1.dtype.itemsize
    if row_bytes * len(means0) <= _BLOCK_BYTES:
        location = jnp.sum((means0[:, None] - means1) ** 2, axis=-1)
        shape = (len(means0), len(means1), d, d)
        scale = factor_cost(
            jnp.broadcast_to(factors0[:, None], shape),
            jnp.broadcast_to(factors1, shape),
            norms0[:, None] * norms1,
        )
        return location + scale
    rows = max(1, _BLOCK_BYTES // row_bytes)
    return jax.lax.map(jax.checkpoint(row), gaussians, batch_size=rows)


def coupling(factors0: Float[Array, "n d d"], factors1: Float[Array, "n d d"]) -> Float[Array, "n d d"]:
    r"""The U of the optimal coupling of n pairs of centred Gaussians: :math:`L_0 z` goes with :math:`L_1 U^T z`, z standard.

    Their covariance is :math:`L_0 U L_1^T`. U is the polar factor of :math:`L_0^T L_1`; where that is singular,
    :math:`L_1 U^T z` is the mean of what :math:`L_0 z` goes with, and :math:`L_1 (1 - U^T U) L_1^T` its covariance. In
    bounded memory.
    """
    d = factors0.shape[-1]
    if d == 1:
        return jnp.ones_like(factors0)
    if d == 2:
        return _rotation(matrices.transpose(factors0) @ factors1)

    def one(pair):
        factor0, factor1, smallest = pair
        return polar(matrices.transpose(factor0) @ factor1, smallest)

    pairs = factors0, factors1, 1 / (inverse_norm(factors0) * inverse_norm(factors1))
    pair_bytes = 4 * d * d * factors0.dtype.itemsize
    return jax.lax.map(one, pairs, batch_size=max(1, min(len(factors0), _BLOCK_BYTES // pair_bytes)))


_pairwise_cost = jax.jit(pairwise_cost)  # called outside of jit, its loop is compiled anew at every call


def bures_cost_matrix(gmm0: GaussianMixture, gmm1: GaussianMixture) -> Float[Array, "K0 K1"]:
    """Squared Bures-Wasserstein distances between the components of two mixtures, in squared data units.

    Differentiable in means, and in covariances that are definite. Raises ValueError where the features disagree.
    """
    checks.instance("gmm0", gmm0, GaussianMixture)
    checks.instance("gmm1", gmm1, GaussianMixture)
    same_features(gmm0, gmm1)
    return _pairwise_cost(gmm0.means, gmm0.cholesky, gmm1.means, gmm1.cholesky)


def same_features(gmm0: GaussianMixture, gmm1: GaussianMixture) -> None:
    if gmm0.n_features != gmm1.n_features:
        raise ValueError(
            f"gmm1: has {gmm1.n_features} features and gmm0 has {gmm0.n_features}; "
            "mixtures are compared in one space: take a marginal of one"
        )


def pack(gmm: GaussianMixture) -> Float[Array, "K d+d*d"]:
    """Means and flattened covariances side by side, as `BuresCost` and OTT take Gaussians."""
    return jnp.concatenate([gmm.means, gmm.covariances.reshape(gmm.n_components, -1)], axis=-1)
