"""Densities of Gaussian mixtures at points, chunk by chunk: memory does not grow with the points times the components."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coupled_gmm import chunks, matrices
from coupled_gmm.programs import program

LOG_2PI = math.log(2 * math.pi)


def log_weights(weights: Float[Array, "*b K"]) -> Float[Array, "*b K"]:
    """Logarithms: -inf, with zero gradient, where a weight is zero."""
    present = weights > 0
    return jnp.where(present, jnp.log(jnp.where(present, weights, 1)), -jnp.inf)


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
    factor, present = matrices.cholesky(covariances), weights > 0
    regular = jnp.all(jnp.diagonal(factor, axis1=-2, axis2=-1) > 0, axis=-1)
    # In place of a singular factor, which only an absent component may have: its logarithm's derivative is infinite.
    factor = jnp.where(regular[:, None, None], factor, jnp.eye(means.shape[1], dtype=means.dtype))
    whitening = matrices.invert_triangular(factor)
    log_norm = matrices.log_diagonal_sum(factor) + 0.5 * means.shape[1] * LOG_2PI

    def of_chunk(x: Float[Array, "d B"]) -> Array:
        whitened = jnp.einsum("kij,kjb->kib", whitening, x - means[:, :, None])
        log_prob = -0.5 * jnp.sum(whitened**2, axis=1) - log_norm[:, None]
        if what == "components":
            return jnp.where(regular[:, None], log_prob, jnp.nan).T
        log_prob = jnp.where(present[:, None], log_prob, 0)
        joint = jnp.where(present[:, None], log_prob + log_weights(weights)[:, None], -jnp.inf)
        if what == "label":
            return jnp.argmax(joint, axis=0)
        total = jax.nn.logsumexp(joint, axis=0)
        if what == "mixture":
            return total
        return (joint - total).T if what == "posterior" else values @ jnp.exp(joint - total)

    return chunks.each(of_chunk, points, count)
