r"""The Bures-Wasserstein geometry of Gaussians, from matrix products only.

Between two Gaussians

.. math:: W_2^2 = |m_0 - m_1|^2 + tr S_0 + tr S_1 - 2 tr (S_0^{1/2} S_1 S_0^{1/2})^{1/2} .

With :math:`S = L L^T` the last trace is the nuclear norm of :math:`M = L_0^T L_1`, and with the orthogonal polar factor U of M
the distance of the covariances is :math:`|L_0 - L_1 U^T|^2`. So neither a matrix square root nor its derivative (a Schur
decomposition, which JAX lacks on GPU) is needed, and singular covariances are valid. U comes from a Newton-Schulz
iteration; in one and two dimensions from closed forms.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import checks, matrices
from coupled_gmm.core.programs import program
from coupled_gmm.gaussians.mixture import GaussianMixture, about_one_point, check_features

# What the pairs of one block of a cost matrix may occupy: a core's cache, or enough to fill a GPU.
_CPU_BLOCK_BYTES, _GPU_BLOCK_BYTES = 2**20, 2**28
_BARYCENTER_STEPS = 100
_KEPT_BYTES = 2**26  # what all may, for their polar factors to be kept for the gradient, not computed again
_LOW = 0.05  # no step of the polar iteration makes a large singular value less than twice this


def polar(m: Float[Array, "*b d d"], smallest: Float[Array, "*b"]) -> Float[Array, "*b d d"]:
    r"""The orthogonal U closest to M, that is :math:`M (M^T M)^{-1/2}`; zero on the null space of M.

    Newton-Schulz steps :math:`X \leftarrow \frac{a}{2} X (3 - a^2 X^T X)`, each scaled so that the interval [l, 1] that holds
    the singular values maps into the narrowest one (Chen & Chow 2014): :math:`a^2 = 3 / (1 + l + l^2)`. A start at l grows by
    2.6 a step and then squares its distance to one. The largest land on what the least do, where their directions would be
    lost in rounding: l counts as 0.05 at least. Singular values under rounding error of the largest are left small:
    they change the nuclear norm by no more than themselves.
    """
    eps = jnp.finfo(m.dtype).eps
    m, peak = matrices.of_size_one(m)
    smallest = smallest / jnp.where(peak > 0, peak, 1)
    # X X^T first: XLA's batched products on CPU are up to 40 times slower where the left factor is the transposed one.
    largest = jnp.sqrt(jnp.max(jnp.sum(jnp.abs(m @ matrices.transpose(m)), axis=-1), axis=-1))
    scale = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 0)
    lower = jnp.clip(smallest * scale, 8 * eps, 1)

    def unfinished(carry):
        return jnp.any(carry[1] < 1 - 3 * eps)

    def step(carry):
        x, low = carry
        least = jnp.maximum(low, _LOW)
        a = jnp.sqrt(3 / (1 + least + least**2))
        scaled = a[..., None, None] * x
        x = 1.5 * scaled - 0.5 * (scaled @ matrices.transpose(scaled)) @ scaled
        low = a * low
        return x, jnp.minimum(0.5 * low * (3 - low**2), 1)

    return jax.lax.while_loop(unfinished, step, (m * scale[..., None, None], lower))[0]


def _rotation(m: Float[Array, "*b 2 2"]) -> Float[Array, "*b 2 2"]:
    """The rotation closest to a 2 x 2 matrix of determinant at least 0 (as L0^T L1 has): M + cof M, normalised."""
    m, _ = matrices.of_size_one(m)
    cosine = m[..., 0, 0] + m[..., 1, 1]
    sine = m[..., 1, 0] - m[..., 0, 1]
    square = cosine**2 + sine**2
    scale = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    cosine, sine = jnp.where(square > 0, cosine * scale, 1), sine * scale
    return jnp.stack([jnp.stack([cosine, -sine], -1), jnp.stack([sine, cosine], -1)], -2)


def widened(factor: Float[Array, "*b d d"]) -> Float[Array, "*b D D"]:
    """With zeros to the next multiple of 8, where XLA's batched products on CPU are up to 6 times quicker for it."""
    d = factor.shape[-1]
    missing = -d % 8
    wide = missing if 4 <= d < 8 or (d > 8 and missing <= 2) else 0
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 2) + [(0, wide)] * 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _turned_cost(
    factor0: Float[Array, "D D"], factors1: Float[Array, "n D D"], smallest: Float[Array, " n"], d: int
) -> Float[Array, " n"]:
    r"""The squared distance as :math:`|L_0 - L_1 U^T|^2`, which does not cancel where the two are close.

    Where U is no rotation, because a factor is singular, :math:`tr L_1 (1 - U^T U) L_1^T` is missing from it. Differentiable: by
    the envelope theorem U counts as fixed.
    """
    return _turned(factor0, factors1, smallest, d)[0]


def _turned(factor0: Array, factors1: Array, smallest: Array, d: int) -> tuple[Array, Array, Array]:
    """`coupled_cost` of the best couplings."""
    return coupled_cost(factor0, factors1, polar(matrices.transpose(factor0) @ factors1, smallest), d)


@_turned_cost.defjvp
@matrices.precise
def _turned_cost_jvp(d, primals, tangents):
    factor0, factors1, smallest = primals
    cost, in0, in1 = _turned(factor0, factors1, smallest, d)
    change = jnp.sum(in0 * tangents[0], axis=(-2, -1))
    change += jnp.sum(in1 * tangents[1], axis=(-2, -1))
    return cost, 2 * change


def factor_cost(
    factor0: Float[Array, "d d"], factors1: Float[Array, "n d d"], inverse_norms: Float[Array, " n"]
) -> Float[Array, " n"]:
    r"""Squared Bures distances of :math:`L_0 L_0^T` to each :math:`L_1 L_1^T`, from lower triangular factors.

    `inverse_norms`, products of norms of the factors' inverses, tell the iteration how small singular values get; up to two
    dimensions a closed form does without.
    """
    d = factor0.shape[-1]
    if d == 1:
        return ((factor0 - factors1) ** 2)[..., 0, 0]
    if d == 2:
        turned = factors1 @ matrices.transpose(_rotation(matrices.transpose(factor0) @ factors1))
        return jnp.sum((factor0 - turned) ** 2, axis=(-2, -1))
    smallest = jax.lax.stop_gradient(1 / inverse_norms)
    return _turned_cost(widened(factor0), widened(factors1), smallest, d)


def inverse_norm(factor: Float[Array, "*b d d"]) -> Float[Array, "*b"]:
    r"""An upper bound of the norm of a factor's inverse, at most :math:`d^{1/16}` too large; infinite where it is singular.

    :math:`(tr A^8)^{1/16}` with :math:`A = L^{-1} L^{-T}`.
    """
    inverse = matrices.invert_triangular(jax.lax.stop_gradient(factor))
    singular = jnp.any(jnp.diagonal(factor, axis1=-2, axis2=-1) == 0, axis=-1)
    return jnp.where(singular, jnp.inf, jnp.sqrt(matrices.norm_bound(inverse @ matrices.transpose(inverse))))


@matrices.precise
def pairwise_cost(
    means0: Float[Array, "K0 d"],
    factors0: Float[Array, "K0 d d"],
    means1: Float[Array, "K1 d"],
    factors1: Float[Array, "K1 d d"],
) -> Float[Array, "K0 K1"]:
    """Squared Bures-Wasserstein distances between two sets of Gaussians, from their factors, in bounded memory."""
    d = means0.shape[-1]
    norms0, norms1 = (inverse_norm(f) if d > 2 else jnp.ones(len(f), f.dtype) for f in (factors0, factors1))

    def row(gaussian: tuple[Array, Array, Array]) -> Float[Array, " K1"]:
        mean, factor, norm = gaussian
        return jnp.sum((mean - means1) ** 2, axis=-1) + factor_cost(factor, factors1, norm * norms1)

    gaussians = (means0, factors0, norms0)
    row_bytes = 4 * factors1.size * factors1.dtype.itemsize
    total = row_bytes * len(means0)
    if total <= block_bytes():
        return jax.vmap(row)(gaussians)
    rows = _divisor(len(means0), block_bytes() // row_bytes)
    return jax.lax.map(row if total <= _KEPT_BYTES else jax.checkpoint(row), gaussians, batch_size=rows)


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to a limit: blocks of one size are compiled once."""
    return next((size for size in range(min(n, limit), 1, -1) if n % size == 0), 1)


def block_bytes() -> int:
    return _CPU_BLOCK_BYTES if jax.default_backend() == "cpu" else _GPU_BLOCK_BYTES


def coupling(factors0: Float[Array, "n d d"], factors1: Float[Array, "n d d"]) -> Float[Array, "n d d"]:
    r"""The U of the optimal coupling of n pairs of centred Gaussians: :math:`L_0 z` goes with :math:`L_1 U^T z`, z standard.

    Their covariance is :math:`L_0 U L_1^T`. U is the polar factor of :math:`L_0^T L_1`; where that is singular,
    :math:`L_1 U^T z` is the mean of what :math:`L_0 z` goes with, and :math:`L_1 (1 - U^T U) L_1^T` its covariance. In
    bounded memory.
    """
    d = factors0.shape[-1]
    if d <= 2:
        return rotations(factors0, factors1, jnp.ones(len(factors0), factors0.dtype))

    def one(pair: tuple[Array, Array, Array]) -> Float[Array, "d d"]:
        factor0, factor1, smallest = pair
        return polar(matrices.transpose(factor0) @ factor1, smallest)[:d, :d]

    pairs = widened(factors0), widened(factors1), 1 / (inverse_norm(factors0) * inverse_norm(factors1))
    size = _divisor(len(factors0), block_bytes() // (4 * d * d * factors0.dtype.itemsize))
    return jax.lax.map(one, pairs, batch_size=size)


def rotations(
    factors0: Float[Array, "n d d"], factors1: Float[Array, "n d d"], inverse_norms: Float[Array, " n"]
) -> Float[Array, "n D D"]:
    """`coupling` of pairs whose products of inverse norms are known, all at once, as wide as `widened` makes the factors."""
    d = factors0.shape[-1]
    if d == 1:
        return jnp.ones_like(factors0)
    if d == 2:
        return _rotation(matrices.transpose(factors0) @ factors1)
    return polar(matrices.transpose(widened(factors0)) @ widened(factors1), 1 / inverse_norms)


def coupled_cost(
    factors0: Float[Array, "*#n D D"], factors1: Float[Array, "n D D"], rotations: Float[Array, "n D D"], d: int
) -> tuple[Float[Array, " n"], Float[Array, "n D D"], Float[Array, "n D D"]]:
    r"""What n pairs of centred Gaussians pay for these couplings, and the halves of its derivatives in the factors.

    It is :math:`|L_0 - L_1 U^T|^2`, and :math:`tr L_1 (1 - U^T U) L_1^T` where U is no rotation: never less than the distance.
    """
    turned = factors1 @ matrices.transpose(rotations)
    in0, in1 = factors0 - turned, factors1 - factors0 @ rotations
    missing = jnp.sum(factors1**2, axis=(-2, -1)) - jnp.sum(turned**2, axis=(-2, -1))
    singular = d - jnp.sum(rotations**2, axis=(-2, -1)) > 8 * d * jnp.finfo(rotations.dtype).eps
    cost = jnp.sum(in0**2, axis=(-2, -1)) + jnp.where(singular, jnp.maximum(missing, 0), 0)
    return cost, in0, in1


def least_cost(
    means0: Float[Array, "K0 d"],
    factors0: Float[Array, "K0 d d"],
    means1: Float[Array, "K1 d"],
    factors1: Float[Array, "K1 d d"],
) -> Float[Array, "K0 K1"]:
    r"""A lower bound of `pairwise_cost` that needs no coupling: :math:`|m_0 - m_1|^2 + (|L_0| - |L_1|)^2`."""
    sizes0, sizes1 = (jnp.sqrt(jnp.sum(f**2, axis=(-2, -1))) for f in (factors0, factors1))
    means = jnp.sum((means0[:, None] - means1) ** 2, axis=-1)
    return means + (sizes0[:, None] - sizes1) ** 2


def averaged(
    start: Float[Array, "G d d"],
    factors: Float[Array, "n d d"],
    group: Int[Array, " n"],
    shares: Float[Array, " n"],
) -> Float[Array, "G d d"]:
    r"""Where G centred Gaussians go on average: :math:`\sum_j \alpha_j L_j U_j^T` over the Gaussians j of each one's group.

    A square root of :math:`T S T` with T the mean of the optimal maps. Shares of a group sum to 1.
    """
    aligned = factors @ matrices.transpose(coupling(start[group], factors))
    return jax.ops.segment_sum(shares[:, None, None] * aligned, group, len(start))


def barycenter(
    start: Float[Array, "G d d"],
    factors: Float[Array, "n d d"],
    group: Int[Array, " n"],
    shares: Float[Array, " n"],
) -> tuple[Float[Array, "G d d"], Bool[Array, ""]]:
    r"""Cholesky factors of the Bures barycenters of G groups of centred Gaussians, all at once, and whether they have settled.

    :math:`S \leftarrow T S T`, the fixed point of Alvarez-Esteban, del Barrio, Cuesta-Albertos & Matran (2016), which no step
    leads away from: until no S moves by more than rounding, each entry in units of its own features, or for 100 steps. They
    have settled where the last one moved none by more than the root of rounding: costs are of second order in that. A singular
    start stays singular: begin with the mean covariance.
    """
    eps = jnp.finfo(start.dtype).eps
    tol = 10 * eps

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[1] > tol) & (carry[2] < _BARYCENTER_STEPS)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        factor, _, count = carry
        moved = matrices.gram(averaged(factor, factors, group, shares))
        scale = jnp.sqrt(jnp.diagonal(moved, axis1=-2, axis2=-1))
        size = scale[..., :, None] * scale[..., None, :]
        change = jnp.abs(moved - matrices.gram(factor)) / jnp.where(size > 0, size, 1)
        return matrices.cholesky(moved), jnp.max(change), count + 1

    first = start, jnp.asarray(jnp.inf, start.dtype), jnp.zeros((), jnp.int32)
    factor, change, _ = jax.lax.while_loop(unfinished, step, first)
    return factor, change <= jnp.sqrt(eps)


_pairwise_cost = program()(pairwise_cost)  # called outside of jit, its loop is compiled anew at every call


def bures_cost_matrix(gmm0: GaussianMixture, gmm1: GaussianMixture) -> Float[Array, "K0 K1"]:
    """Squared Bures-Wasserstein distances between the components of two mixtures, in squared data units.

    Differentiable in means, and in covariances that are definite. Raises ValueError where the features disagree.
    """
    checks.instance("gmm0", gmm0, GaussianMixture)
    checks.instance("gmm1", gmm1, GaussianMixture)
    check_features("gmm1", gmm1, " and gmm0 has", gmm0.n_features)
    (gmm0, gmm1), _ = about_one_point(gmm0, gmm1)
    return _pairwise_cost(gmm0.means, gmm0.cholesky, gmm1.means, gmm1.cholesky)


def pack(gmm: GaussianMixture) -> Float[Array, "K p"]:
    """Means and flattened covariances side by side, as `BuresCost` and OTT take Gaussians."""
    return jnp.concatenate([gmm.means, gmm.covariances.reshape(gmm.n_components, -1)], axis=-1)
