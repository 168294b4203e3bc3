"""Numbers as sums of two or three floats of falling size, for differences that cancel (Dekker 1971, Shewchuk 1997).

Only sums and differences, each with its rounding error: exact on every device, since neither XLA nor NumPy reassociates them;
and products of halves, which don't round, whether or not they are fused with a sum. All functions but `dot` take NumPy arrays as
well as JAX's.
"""

from typing import Any

import jax
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


@jax.custom_jvp
def dot(x: Array, y: Words) -> Array:
    """The sum of products, rounded to its own size, not to that of its terms."""
    high, rest = _product(x, y[0])
    rest = rest + x * y[1]

    def add(one: Words, other: Words) -> Words:
        total, lost = two_sum(one[0], other[0])
        return total, lost + (one[1] + other[1])

    zero = jnp.zeros((), high.dtype)
    return sum(jax.lax.reduce((high, rest), (zero, zero), add, (0,)))


@dot.defjvp
def _dot_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    return dot(x, y), jnp.sum(dx * (y[0] + y[1])) + jnp.sum(x * (dy[0] + dy[1]))


def _product(x: Array, y: Array) -> Words:
    """The rounded product, and what rounding took from it; of exact products, since x * y may be fused with what follows."""
    (x0, x1), (y0, y1) = _halves(x), _halves(y)
    total, rest0 = two_sum(x0 * y0, x0 * y1)
    total, rest1 = two_sum(total, x1 * y0)
    total, rest2 = two_sum(total, x1 * y1)
    return total, rest0 + (rest1 + rest2)


def _halves(x: Array) -> Words:
    """Of half as many digits each, so that products of them are exact."""
    digits = jnp.finfo(x.dtype).nmant // 2 + 1
    bits = jax.lax.bitcast_convert_type(x, jnp.uint64 if x.dtype.itemsize == 8 else jnp.uint32)
    high = jax.lax.bitcast_convert_type((bits >> digits) << digits, x.dtype)
    return high, x - high
