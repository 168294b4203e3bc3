"""Plans in float32 at an epsilon that is a tiny part of the costs, against the same sums in NumPy float64."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coupled_gmm as cg
from coupled_gmm.core import expansions
from coupled_gmm.transport.problem import TransportProblem
from coupled_gmm.transport.solvers import ENTROPIC

SIZES = ((40, 40), (12, 40), (25, 25), (5, 7))
ASKED = {1e-3: 1e-5, 1e-4: 1e-5, 1e-5: 1e-4}  # marginal errors, by epsilon over the mean cost


def masses(rng, k0, k1):
    kind = rng.randint(4)
    if kind == 0:
        a, b = np.ones(k0), np.ones(k1)
    elif kind == 1:
        a = rng.dirichlet(np.full(k0, 2.0))
        b = a * (1 + 1e-6 * rng.randn(k0)) if k0 == k1 else rng.dirichlet(np.full(k1, 2.0))
    elif kind == 2:
        a, b = (1 + 1e-5 * rng.randn(k) for k in (k0, k1))
    else:
        a, b = (rng.dirichlet(np.full(k, 0.3)) + 1e-6 for k in (k0, k1))
    return np.float32(a / a.sum()), np.float32(b / b.sum())


def problem(seed, sizes=SIZES):
    rng = np.random.RandomState(seed)
    k0, k1 = sizes[seed % len(sizes)]
    d = rng.choice([1, 2, 5])
    x, y = rng.randn(k0, d), rng.randn(k1, d) + rng.randn(d) * rng.choice([0, 1, 30])
    cost = ((x[:, None] - y) ** 2).sum(-1) + 0.1 * rng.rand(k0, k1)
    return np.float32(cost * rng.choice([1, 2650.0, 1e-4])), *masses(rng, k0, k1)


@jax.jit
def solve(cost, a, b, epsilon, rho, tol):
    arrays = TransportProblem.of_masses(cost, a, b, epsilon=epsilon, rho=rho)
    return ENTROPIC(arrays, (jnp.zeros_like(a), jnp.zeros_like(b)), tol, 500)


def error_in_float64(found, cost, a, b, epsilon, rho):
    """Of the plan of these potentials, as a part of the mass that moves."""
    f, g = (np.float64(high) + np.float64(rest) for high, rest in found.words)
    cost, a, b = (np.float64(v) for v in (cost, a, b))
    plan = a[:, None] * b * np.exp((f[:, None] + g - cost) / np.float64(epsilon))
    missed = np.abs(plan.sum(1) - a * np.exp(-f / rho)).sum() + np.abs(plan.sum(0) - b * np.exp(-g / rho)).sum()
    return missed / (1 if np.isinf(rho) else plan.sum())


def check(seed, balanced=True):
    cost, a, b = problem(seed)
    for share, tol in ASKED.items():
        epsilon = np.float32(share * cost.mean())
        rho = np.float32(np.inf if balanced else 0.1 * cost.mean())
        found = solve(cost, a, b, epsilon, rho, np.float32(tol))
        assert found.converged, (seed, share, float(found.marginal_error))
        assert error_in_float64(found, cost, a, b, epsilon, rho) <= 1.5 * tol, (seed, share)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_marginals_are_met(seed, balanced):
    check(seed, balanced)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_marginals_of_many_are_met():
    for seed in range(200):
        check(seed)
        check(seed, balanced=False)


def test_what_is_read_off_a_plan_is_that_of_its_whole_potentials():
    rng = np.random.RandomState(0)
    gmm0, gmm1 = (
        cg.GaussianMixture.from_moments(
            np.float32(50 * rng.randn(k, 2)), np.float32(np.tile(np.eye(2), (k, 1, 1))), np.float32(np.full(k, 1 / k))
        )
        for k in (8, 5)
    )
    plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1), tol=1e-5)
    f, g = (np.float64(high) + np.float64(rest) for high, rest in zip(plan.potentials, plan.rests))
    right = np.exp((f[:, None] + g - np.float64(plan.cost)) / np.float64(plan.pair.epsilon)) / 40
    assert plan.converged and plan.marginal_error <= 1e-5
    np.testing.assert_allclose(plan.matrix, right, atol=1e-7)
    np.testing.assert_allclose(plan.normalized_matrix, right / right.sum(), atol=1e-6)
    np.testing.assert_allclose(plan.conditionals()[0], right / right.sum(1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(plan.reverse().matrix, right.T, atol=1e-7)
    parts = np.sum(right * plan.cost) + 0.1 * np.sum(right * np.log(right * 40, where=right > 0, out=0 * right))
    np.testing.assert_allclose(plan.regularized_cost, parts, rtol=1e-6)
    rounded = np.exp(np.subtract(np.add.outer(*map(np.asarray, plan.potentials)), plan.cost) / 0.1) / 40
    assert np.abs(rounded - right).sum() > 1e-5  # what the rests are for


def test_two_words_are_not_rounded(precision):
    rng = np.random.RandomState(0)
    dtype = np.float64 if precision < 1e-10 else np.float32
    steps = [(10.0 ** rng.randint(-6, 3) * rng.randn(9)).astype(dtype) for _ in range(20)]
    x = np.zeros(9, dtype), np.zeros(9, dtype)
    for step in steps:
        x = expansions.moved(x, step)
    right = [sum(map(Fraction, map(float, column))) for column in zip(*steps)]
    left = [float(Fraction(float(high)) + Fraction(float(rest)) - total) for high, rest, total in zip(*x, right)]
    np.testing.assert_allclose(left, 0, atol=1e4 * precision**2)
    assert np.all(np.abs(x[1]) <= precision * np.abs(x[0]))


@pytest.mark.slow
def test_ott_s_tutorial_on_barycenters_converges():
    """The mixtures, start and epsilon of OTT's notebook on barycenters of mixtures, whose costs are some 2,650."""
    from ott.tools.gaussian_mixture import gaussian_mixture

    def mixture(drawn, weights=None):
        return cg.GaussianMixture.from_moments(
            drawn.loc, drawn.covariance, drawn.component_weights if weights is None else weights
        )

    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    coefficients = jax.random.dirichlet(keys[0], alpha=jnp.full(3, 50.0))
    centres = jnp.array([[-20, -15], [60, -15], [50, 65]])
    seeds = jax.random.randint(keys[1], (3,), 0, 100)
    fixed = [
        gaussian_mixture.GaussianMixture.from_random(
            jax.random.PRNGKey(seed), k, 2, stdev_mean=0.1 * centre.mean(), stdev_cov=stdev, ridge=centre
        )
        for seed, k, stdev, centre in zip(seeds, (2, 3, 5), (4, 3, 5), centres)
    ]
    start = gaussian_mixture.GaussianMixture.from_random(keys[2], n_components=6, n_dimensions=2)
    options = {"coefficients": coefficients, "method": "entropic", "epsilon": 0.1}
    fit = cg.barycenter([mixture(g) for g in fixed], mixture(start, jnp.full(6, 1 / 6)), **options)
    assert fit.converged
    np.testing.assert_allclose(fit.objective, 2650.94, atol=0.1)
