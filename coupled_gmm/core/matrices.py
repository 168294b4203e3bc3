"""Small dense matrices in plain XLA operations: Cholesky factors, triangular inverses, dominant systems.

jaxlib's batched LAPACK kernels share one thread pool with the program that calls them; on two cores two of them side by
side can wait for each other for ever. Nothing here calls LAPACK. A loop over d columns updates the whole batch at once,
which for the small d of mixtures is also as quick, and runs unchanged on GPU.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

F = TypeVar("F", bound=Callable)
_UNROLL = 4  # below this size the column loop is laid out flat, and XLA fuses it


def precise(function: F) -> F:
    """The function with all its matrix products, and those of its derivatives, in the full precision of their factors.

    GPUs otherwise round the factors of float32 products to 10 bits, which no iteration here would survive. Nor are shapes and
    types here those of a caller who has JAX refuse that it brings them together.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with (
            jax.default_matmul_precision("highest"),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            return function(*args, **kwargs)

    return cast(F, wrapped)


def _column_loop(d: int, body, init):
    return jax.lax.fori_loop(0, d, body, init, unroll=d if d <= _UNROLL else 1)


def transpose(a: Float[Array, "*b m n"]) -> Float[Array, "*b n m"]:
    return jnp.swapaxes(a, -1, -2)


def _lower_half(a: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    """The lower triangle with a halved diagonal: the F with F + F^T = A for symmetric A."""
    return jnp.tril(a) - 0.5 * a * jnp.eye(a.shape[-1], dtype=a.dtype)


@jax.custom_jvp
def cholesky(s: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    """The lower triangular L with S = L L^T, for positive semi-definite S.

    A pivot within rounding of zero (four units of its own diagonal entry) gives a zero column, so a singular S has a
    singular L and no NaN. An indefinite S is not detected here: constructors refuse it.
    """
    d = s.shape[-1]
    index = jnp.arange(d)
    floor = 4 * jnp.finfo(s.dtype).eps * jnp.diagonal(s, axis1=-2, axis2=-1)

    def eliminate(j, carry):
        rest, factor = carry
        column = jnp.take(rest, j, axis=-1)
        pivot = jnp.take(column, j, axis=-1)[..., None]
        regular = pivot > jnp.take(floor, j, axis=-1)[..., None]
        scale = jnp.where(regular, jax.lax.rsqrt(jnp.where(regular, pivot, 1)), 0)
        # Of a pivot that is rounding the column is too, and might be far larger: no semi-definite matrix has one so large.
        most = jnp.sqrt(jnp.maximum(jnp.diagonal(rest, axis1=-2, axis2=-1), 0))
        column = jnp.clip(jnp.where(index >= j, column * scale, 0), -most, most)
        rest = rest - column[..., :, None] * column[..., None, :]
        return rest, jnp.where(index == j, column[..., :, None], factor)

    return _column_loop(d, eliminate, (s, jnp.zeros_like(s)))[1]


@cholesky.defjvp
@precise
def _cholesky_jvp(primals, tangents):
    # dL = L F(L^-1 dS L^-T); see Murray (2016), "Differentiation of the Cholesky decomposition".
    (s,), (ds,) = primals, tangents
    factor = cholesky(s)
    inverse = invert_triangular(factor)
    inner = inverse @ (0.5 * (ds + transpose(ds))) @ transpose(inverse)
    return factor, factor @ _lower_half(inner)


@jax.custom_jvp
@precise
def invert_triangular(factor: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    """The inverse of a lower triangular matrix; a zero on the diagonal gives a zero row (and no NaN)."""
    d = factor.shape[-1]
    identity = jnp.eye(d, dtype=factor.dtype)
    diagonal = jnp.diagonal(factor, axis1=-2, axis2=-1)
    scale = jnp.where(diagonal == 0, 0, 1 / jnp.where(diagonal == 0, 1, diagonal))
    index = jnp.arange(d)

    def substitute(j, inverse):
        row = jnp.take(factor, j, axis=-2)
        done = jnp.where(index < j, row, 0)
        solved = jnp.take(identity, j, axis=0) - (done[..., None, :] @ inverse)[..., 0, :]
        solved = solved * jnp.take(scale, j, axis=-1)[..., None]
        return jnp.where(index[:, None] == j, solved[..., None, :], inverse)

    return _column_loop(d, substitute, jnp.zeros_like(factor))


@invert_triangular.defjvp
@precise
def _invert_triangular_jvp(primals, tangents):
    (factor,), (dfactor,) = primals, tangents
    inverse = invert_triangular(factor)
    return inverse, -inverse @ jnp.tril(dfactor) @ inverse


def solve_dominant(a: Float[Array, "k k"], b: Float[Array, " k"]) -> Float[Array, " k"]:
    """The x with A x = b, by Gauss-Jordan elimination, for a row-diagonally dominant A.

    Such matrices need no pivoting, so the elimination is k rank-one updates of a k x (k + 1) array.
    """
    k = a.shape[-1]
    index = jnp.arange(k)

    def eliminate(j, system):
        row = system[j] / system[j, j]
        column = jnp.where(index == j, 0, system[:, j])
        return jnp.where(index[:, None] == j, row, system - column[:, None] * row)

    return _column_loop(k, eliminate, jnp.concatenate([a, b[:, None]], axis=1))[:, -1]


def invert_dominant(a: Float[Array, "*b k k"]) -> Float[Array, "*b k k"]:
    """The inverse of row-diagonally dominant matrices, in place, as `solve_dominant` eliminates."""
    k = a.shape[-1]
    index = jnp.arange(k)

    def eliminate(j, a):
        pivot = 1 / a[..., j, j][..., None]
        row, column = a[..., j, :] * pivot, a[..., :, j]
        rest = (
            jnp.where(index == j, 0, a)
            - jnp.where(index == j, 0, column)[..., :, None] * jnp.where(index == j, pivot, row)[..., None, :]
        )
        return jnp.where(index[:, None] == j, jnp.where(index == j, pivot, row)[..., None, :], rest)

    return _column_loop(k, eliminate, a)


def log_diagonal_sum(factor: Float[Array, "*b d d"]) -> Float[Array, "*b"]:
    """Half the log-determinant of L L^T; -inf where L is singular."""
    return jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)


def of_size_one(a: Float[Array, "*b m n"]) -> tuple[Float[Array, "*b m n"], Float[Array, "*b"]]:
    """A matrix over its largest entry, and that entry's size: in units of 1e18, squares leave the range of a float."""
    largest = jnp.max(jnp.abs(a), axis=(-2, -1))
    return a / jnp.where(largest > 0, largest, 1)[..., None, None], largest


def norm_bound(a: Float[Array, "*b d d"]) -> Float[Array, "*b"]:
    r"""An upper bound of the largest eigenvalue of a positive semi-definite A, at most :math:`d^{1/8}` too large: tr(A^8)^(1/8)."""
    power, largest = of_size_one(a)
    size = jnp.sqrt(jnp.sum(power**2, axis=(-2, -1)))
    power = power / jnp.where(size > 0, size, 1)[..., None, None]
    for _ in range(2):
        power = power @ power
    return largest * size * jnp.sum(power**2, axis=(-2, -1)) ** (1 / 8)


def gram(factor: Float[Array, "*b d r"]) -> Float[Array, "*b d d"]:
    """L L^T, symmetric to the last bit."""
    product = factor @ transpose(factor)
    return 0.5 * (product + transpose(product))
