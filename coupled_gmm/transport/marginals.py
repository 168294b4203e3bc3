"""Marginals of a plan: how far it is from them, and a plan near it that has them."""

import jax.numpy as jnp
from jaxtyping import Array

from coupled_gmm.transport.pair import GaussianMixturePair


def distance(matrix: Array, a: Array, b: Array) -> Array:
    """L1 distance of a plan's marginals from given ones."""
    return jnp.sum(jnp.abs(matrix.sum(1) - a)) + jnp.sum(jnp.abs(matrix.sum(0) - b))


def feasible(matrix: Array, a: Array, b: Array, pair: GaussianMixturePair) -> Array:
    """A plan of about the same cost with the marginals that are kept."""
    if pair.balanced:
        return _rounded(matrix, a, b)
    kept0, kept1 = jnp.isinf(pair.rho0), jnp.isinf(pair.rho1)
    rows, columns = matrix.sum(1), matrix.sum(0)
    rows, columns = a / jnp.where(rows > 0, rows, 1), b / jnp.where(columns > 0, columns, 1)
    one_side = matrix * jnp.where(kept0, rows, 1)[:, None] * jnp.where(kept1, columns, 1)
    return jnp.where(kept0 & kept1, _rounded(matrix, a, b), one_side)


def _rounded(matrix: Array, a: Array, b: Array) -> Array:
    def shrink(flow: Array, mass: Array) -> Array:
        return jnp.minimum(1, jnp.where(flow > 0, mass / jnp.where(flow > 0, flow, 1), 1))

    matrix = matrix * shrink(matrix.sum(1), a)[:, None]
    matrix = matrix * shrink(matrix.sum(0), b)
    rows, columns = jnp.maximum(a - matrix.sum(1), 0), jnp.maximum(b - matrix.sum(0), 0)
    missing = jnp.sum(rows)
    return matrix + rows[:, None] * columns / jnp.where(missing > 0, missing, 1)
