"""Splines as weights: against SciPy's, and by what their ends are defined by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from coupled_gmm.courses import splines

weights = jax.jit(splines.weights, static_argnums=(2, 3))
ULPS = 200  # of the weights, which are of order 1


def problem(n, eps):
    rng = np.random.RandomState(n)
    knots = np.cumsum(rng.uniform(0.2, 2, n)).astype(np.finfo(np.float32 if eps > 1e-10 else np.float64).dtype)
    return (
        knots,
        rng.randn(n, 3),
        np.unique(np.concatenate([knots, np.linspace(knots[0], knots[-1], 40, dtype=knots.dtype)])),
    )


@pytest.mark.parametrize("n", [3, 4, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ends", ["natural", "not-a-knot"])
def test_scipys_splines(ends, n, precision):
    knots, y, t = problem(n, precision)
    got = weights(jnp.asarray(knots), jnp.asarray(t), "spline", ends)
    expected = CubicSpline(knots.astype(float), y, bc_type=ends)(t.astype(float))
    np.testing.assert_allclose(np.asarray(got, float) @ y, expected, atol=ULPS * precision)
    np.testing.assert_allclose(got.sum(1), 1, atol=ULPS * precision)
    np.testing.assert_array_equal(got[np.isin(t, knots)], np.eye(n))


@pytest.mark.parametrize("n", [3, pytest.param(4, marks=pytest.mark.slow), 7])
def test_parabolic_ends(n, x64):
    """Parabolas in the first and the last stretch, and SciPy's spline of their second derivatives."""
    knots, y, t = problem(n, 1e-16)
    stretches = [np.linspace(*knots[:2], 4), np.linspace(*knots[-2:], 4)]
    all_times = np.concatenate([*stretches, t])
    found = np.asarray(weights(jnp.asarray(knots), jnp.asarray(all_times), "spline", "parabolic")) @ y
    bends = []
    for stretch, values in zip(stretches, (found[:4], found[4:8])):
        np.testing.assert_allclose(np.diff(values, 3, axis=0), 0, atol=1e-12)
        bends.append(np.diff(values[:3], 2, axis=0)[0] / np.diff(stretch)[0] ** 2)
    expected = CubicSpline(knots, y, bc_type=((2, bends[0]), (2, bends[1])))
    np.testing.assert_allclose(found, expected(all_times), atol=1e-10)


def test_straight_lines(precision):
    knots, y, t = problem(5, precision)
    line = np.stack([np.interp(t.astype(float), knots.astype(float), column) for column in y.T], 1)
    for method, n in (("geodesic", 5), ("spline", 2)):
        inside = t[t <= knots[n - 1]]
        got = weights(jnp.asarray(knots[:n]), jnp.asarray(inside), method, "natural")
        np.testing.assert_allclose(np.asarray(got) @ y[:n], line[: len(inside)], atol=ULPS * precision)
