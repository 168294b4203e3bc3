"""Numbers as sums of two or three floats of falling size, for differences that cancel (Dekker 1971, Shewchuk 1997).

Only sums and differences, each with its rounding error: exact on every device, since neither XLA nor NumPy reassociates them.
All functions take NumPy arrays as well as JAX's.
"""

from typing import Any

import jax.numpy as jnp

Array = Any  # of either library
Expansion = tuple[Array, ...]  # of three, the largest first
Words = tuple[Array, Array]  # of two


def two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """The rounded sum, and what rounding took from it."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def added(x: Expansion, y: Expansion) -> Expansion:
    """Exact to a cube of the rounding unit of the larger one; where high parts cancel, the middle one may be the largest."""
    high, rest = two_sum(x[0], y[0])
    middle, low0 = two_sum(x[1], y[1])
    middle, low1 = two_sum(middle, rest)
    return high, middle, x[2] + y[2] + (low0 + low1)


def rounded(x: Expansion) -> Array:
    high, middle = two_sum(x[0], x[1])
    return high + (middle + x[2])


def scaled(x: Expansion, sign: Array) -> Expansion:
    """Times 0, 1 or -1."""
    return sign * x[0], sign * x[1], sign * x[2]


def reduced(cost: Array, f: Expansion, g: Expansion) -> Array:
    """cost - f - g, of which only the result is rounded: to its own size, and to a cube of the rounding unit of f and g."""
    high, rest0 = two_sum(cost, -f[0])
    high, rest1 = two_sum(high, -g[0])
    middle, low0 = two_sum(rest0, rest1)
    middle, low1 = two_sum(middle, -f[1])
    middle, low2 = two_sum(middle, -g[1])
    high, middle = two_sum(high, middle)
    return high + (middle + (low0 + low1 + low2 - f[2] - g[2]))


def zeros(size: int, dtype: Any) -> Expansion:
    zero = jnp.zeros(size, dtype)
    return zero, zero, zero


def words(x: Array | Words) -> Words:
    """A number that may be of one float as one of two."""
    return x if isinstance(x, tuple) else (x, jnp.zeros_like(x))


def moved(x: Words, by: Array) -> Words:
    """x + by, rounded to two floats."""
    high, rest = two_sum(x[0], by)
    return two_sum(high, x[1] + rest)
