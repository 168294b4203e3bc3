"""Sums that cancel, against exact fractions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coupled_gmm.core import expansions


@pytest.mark.parametrize("size", [1, 3, 50])
def test_a_dot_is_rounded_to_its_own_size(precision, size):
    rng, dtype = np.random.RandomState(size), np.float32 if precision > 1e-10 else np.float64
    dot = jax.jit(expansions.dot)
    for _ in range(20):
        x = rng.rand(2 * size).astype(dtype)
        high = (rng.randn(2 * size) * 10.0 ** rng.uniform(-3, 6)).astype(dtype)
        x[size:], high[size:] = x[:size], -high[:size] * (1 + 100 * precision)  # all but a little of it cancels
        rest = (high * precision * rng.uniform(-0.5, 0.5, 2 * size)).astype(dtype)
        exact = sum(Fraction(float(a)) * (Fraction(float(b)) + Fraction(float(c))) for a, b, c in zip(x, high, rest))
        terms = np.abs(x * high).sum()
        assert (
            abs(Fraction(float(dot(x, (high, rest)))) - exact)
            <= precision * abs(exact) + 4 * size * precision**2 * terms
        )


def test_derivatives_of_a_dot_are_those_of_a_plain_one(x64):
    rng = np.random.RandomState(0)
    x, y = jnp.asarray(rng.randn(4)), jnp.asarray(rng.randn(4))
    ours = lambda x, y: expansions.dot(x**2, (jnp.sin(y), 1e-17 * y))  # noqa: E731
    plain = lambda x, y: x**2 @ jnp.sin(y)  # noqa: E731
    for derive in (jax.grad, jax.hessian):
        for one, other in zip(derive(ours, (0, 1))(x, y), derive(plain, (0, 1))(x, y), strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), one, other)
    np.testing.assert_allclose(
        jax.vmap(ours)(jnp.stack([x, y]), jnp.stack([y, x])), [plain(x, y), plain(y, x)], rtol=1e-14
    )
