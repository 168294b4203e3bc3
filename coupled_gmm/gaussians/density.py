"""Densities of Gaussian mixtures at points, chunk by chunk: memory does not grow with the points times the components."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import chunks, matrices
from coupled_gmm.core.programs import program

LOG_2PI = math.log(2 * math.pi)


def log_weights(weights: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """Logarithms: -inf, with zero gradient, where a weight is zero."""
    present = weights > 0
    return jnp.where(present, jnp.log(jnp.where(present, weights, 1)), -jnp.inf)


def whitenings(
    covariances: Float[Array, "K d d"],
) -> tuple[Float[Array, "K d d"], Float[Array, " K"], Bool[Array, " K"]]:
    """Inverses of the covariances' factors, the logarithms of the densities' norms, and which covariances are regular.

    In place of a singular one, which only an absent component may have, stands the identity: the derivative of its factor's
    logarithm is infinite.
    """
    factor, d = matrices.cholesky(covariances), covariances.shape[-1]
    regular = jnp.all(jnp.diagonal(factor, axis1=-2, axis2=-1) > 0, axis=-1)
    factor = jnp.where(regular[:, None, None], factor, jnp.eye(d, dtype=factor.dtype))
    return matrices.invert_triangular(factor), matrices.log_diagonal_sum(factor) + 0.5 * d * LOG_2PI, regular


def log_normal(whitened: Float[Array, "K d B"], log_norm: Float[Array, " K"]) -> Float[Array, "K B"]:
    return -0.5 * jnp.sum(whitened**2, axis=1) - log_norm[:, None]


def log_joint(
    whitened: Float[Array, "K d B"], log_norm: Float[Array, " K"], weights: Float[Array, " K"]
) -> Float[Array, "K B"]:
    """Log-densities with the weights in; -inf where a component is absent."""
    present = (weights > 0)[:, None]
    log_prob = jnp.where(present, log_normal(whitened, log_norm), 0)
    return jnp.where(present, log_prob + log_weights(weights)[:, None], -jnp.inf)


@program("what")
def densities(
    points: Float[Array, "C d B"],
    count: Int[Array, ""],
    parameters: tuple[Float[Array, "K d"], Float[Array, "K d d"], Float[Array, " K"]],
    values: Any,
    what: str,
) -> Array:
    """Of points in chunks: log-densities of "components" (C, B, K) or of the "mixture" (C, B), or the logarithm of the "posterior"
    (C, B, K), or its mean of `values` (K,), or the most probable "label" (both (C, B))."""
    means, covariances, weights = parameters
    whitening, log_norm, regular = whitenings(covariances)

    def of_chunk(x: Float[Array, "d B"]) -> Array:
        whitened = jnp.einsum("kij,kjb->kib", whitening, x - means[:, :, None])
        if what == "components":
            return jnp.where(regular[:, None], log_normal(whitened, log_norm), jnp.nan).T
        joint = log_joint(whitened, log_norm, weights)
        if what == "label":
            return jnp.argmax(joint, axis=0)
        total = jax.nn.logsumexp(joint, axis=0)
        if what == "mixture":
            return total
        return (joint - total).T if what == "posterior" else values @ jnp.exp(joint - total)

    return chunks.each(of_chunk, points, count)
