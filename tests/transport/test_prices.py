"""Two prices of mass, and masses of which little moves: a NumPy Sinkhorn, closed forms, OTT and finite differences."""

import jax
import numpy as np
import pytest
from problems import random_mixture
from twins import kl, log_sum_exp

import coupled_gmm as cg

READ = (
    "matrix", "regularized_cost", "duality_gap", "cost_bound", "total_mass", "normalized_cost", "mass_penalty", "marginal_error"
)  # fmt: skip
read = jax.jit(lambda plan: {name: getattr(plan, name) for name in READ})
RHOS = [(1.0, 5.0), (np.inf, 2.0), (0.3, np.inf), (0.05, 50.0)]


def sinkhorn(cost, a, b, epsilon, rhos):
    """The plan, by plain log-domain iterations with a price for each side."""
    log_a, log_b = np.log(a), np.log(b)
    taus = [1 / (1 + epsilon / rho) for rho in rhos]
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(100_000):
        last = g
        f = -epsilon * taus[0] * log_sum_exp(log_b + (g - cost) / epsilon, axis=1)
        g = -epsilon * taus[1] * log_sum_exp(log_a[:, None] + (f[:, None] - cost) / epsilon, axis=0)
        if np.abs(g - last).max() <= 1e-13 * epsilon:
            return np.exp(log_a[:, None] + log_b + (f[:, None] + g - cost) / epsilon)
    raise AssertionError("the twin did not converge")


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("sizes", [(3, 4), pytest.param((4, 3), marks=pytest.mark.slow)])
def test_two_prices_against_plain_sinkhorn(x64, rho, sizes):
    pair = cg.GaussianMixturePair(random_mixture(0, sizes[0], 2), random_mixture(1, sizes[1], 2), 0.5, rho=rho)
    plans = [cg.solve_plan(pair, method=method, tol=1e-10) for method in ("entropic", "sinkhorn")]
    cost, a, b = (np.asarray(v) for v in (plans[0].cost, pair.gmm0.weights, pair.gmm1.weights))
    right = sinkhorn(cost, a, b, 0.5, rho)
    prices = [0 if np.isinf(r) else r for r in rho]
    primal = np.sum(right * cost) + 0.5 * kl(right, np.outer(a, b))
    primal += prices[0] * kl(right.sum(1), a) + prices[1] * kl(right.sum(0), b)
    assert not pair.balanced and (float(pair.rho0), float(pair.rho1)) == rho
    for plan in plans:
        said = {name: np.asarray(number) for name, number in read(plan).items()}
        assert plan.converged and said["marginal_error"] < 1e-9
        np.testing.assert_allclose(said["matrix"], right, atol=1e-9)
        np.testing.assert_allclose(said["regularized_cost"], primal, rtol=1e-8)
        assert abs(said["duality_gap"]) < 1e-7 and said["cost_bound"] == 0.5 + sum(rho)
        if np.isfinite(rho).all():
            whole = said["total_mass"] * said["normalized_cost"] + said["mass_penalty"]
            np.testing.assert_allclose(whole, said["regularized_cost"], rtol=1e-10)
        else:
            assert said["mass_penalty"] == 0
            np.testing.assert_allclose(said["total_mass"], 1, rtol=1e-9)


def derivatives(value, x, rho):
    """A value and its slope in x; its slopes in rho and its curvature in x, by reverse mode over reverse mode."""

    def slope(x):
        found, slopes = jax.value_and_grad(value, (0, 1))(x, rho)
        return slopes[0], (found, slopes[1])

    (first, (found, in_rho)), second = jax.value_and_grad(slope, has_aux=True)(x)
    return (found, first), (in_rho, second)


@pytest.mark.parametrize("rho", [pytest.param((1.0, 5.0), marks=pytest.mark.slow), (np.inf, 2.0)])
@pytest.mark.parametrize("name", ["regularized_cost", pytest.param("transport_cost", marks=pytest.mark.slow)])
def test_derivatives_with_two_prices(x64, rho, name):
    """In a mean and in the prices, of first and second order, against differences."""
    gmm0, gmm1 = random_mixture(0, 3, 2), random_mixture(1, 4, 2)

    def value(x, rho):
        moved = cg.GaussianMixture(gmm0.means + x, gmm0.covariances, gmm0.weights)
        return getattr(cg.solve_plan(cg.GaussianMixturePair(moved, gmm1, 0.5, rho=rho), tol=1e-12), name)

    prices, h = np.asarray(rho), 1e-3
    (middle, first), (in_rho, second) = jax.jit(lambda x, rho: derivatives(value, x, rho))(0.0, prices)
    value = jax.jit(value)
    low, high = (float(value(x, prices)) for x in (-h, h))
    np.testing.assert_allclose(first, (high - low) / (2 * h), rtol=1e-4)
    np.testing.assert_allclose(second, (high - 2 * float(middle) + low) / h**2, rtol=1e-3)
    for side in range(2):
        step = 1e-4 * np.eye(2)[side]
        slope = 0 if np.isinf(rho[side]) else (value(0.0, prices + step) - value(0.0, prices - step)) / 2e-4
        np.testing.assert_allclose(in_rho[side], slope, rtol=1e-4, atol=1e-7)


def test_what_is_given_twice_or_in_another_shape():
    gmm = random_mixture(0, 2, 2)
    for name in ("tau", "rho"):
        with pytest.raises(ValueError, match=rf"^{name}: .*two.*shape \(3,\).*jax\.vmap"):
            cg.GaussianMixturePair(gmm, gmm, 1.0, **{name: (0.1, 0.2, 0.3)})
    with pytest.raises(ValueError, match="rho: given beside tau"):
        cg.GaussianMixturePair(gmm, gmm, 1.0, 1.0, rho=2.0)
    both = (
        cg.GaussianMixturePair(gmm, gmm, 1.0, (1, 0.5)),
        cg.GaussianMixturePair.from_rho(gmm, gmm, 1.0, (np.inf, 1.0)),
    )
    for pair in both:
        np.testing.assert_array_equal(pair.rho, [np.inf, 1])
        np.testing.assert_allclose(pair.tau, [1, 0.5])
    assert cg.GaussianMixturePair(gmm, gmm, 1.0, (1, 1)).balanced
    traced = jax.jit(lambda rho: cg.solve_plan(cg.GaussianMixturePair(gmm, gmm, 1.0, rho=rho)).total_mass)
    for rho in (2.0, (2.0, 3.0)):
        plan = cg.solve_plan(cg.GaussianMixturePair(gmm, gmm, 1.0, rho=rho))
        np.testing.assert_allclose(traced(rho), read(plan)["total_mass"])


@pytest.mark.parametrize("mean", [2.0, 4.0, 4.5])
def test_little_mass_moves(precision, mean):
    """One Gaussian each: the mass that moves is exp(-C / (epsilon + 2 rho)), here down to 5e-30."""
    one, other = (cg.GaussianMixture.from_moments([[m]], [[[1.0]]], [1.0]) for m in (0.0, mean))
    plan = cg.solve_plan(cg.GaussianMixturePair(one, other, 0.1, 0.5))
    assert plan.converged
    np.testing.assert_allclose(read(plan)["total_mass"], np.exp(-(mean**2) / 0.3), rtol=1e-4)


def test_nothing_moves():
    one, other = (cg.GaussianMixture.from_moments([[m]], [[[1.0]]], [1.0]) for m in (0.0, 100.0))
    plan = cg.solve_plan(cg.GaussianMixturePair(one, other, 0.1, 0.5))
    assert read(plan)["total_mass"] == 0 and not plan.converged and "float64" in plan.message


def test_read_outs_of_a_component_without_mass_to_speak_of():
    gmm0 = cg.GaussianMixture.from_moments([[0.0], [1.0], [50.0]], np.ones((3, 1, 1)), [0.5, 0.5, 1e-9])
    gmm1 = cg.GaussianMixture.from_moments([[0.5], [1.5], [-50.0]], np.ones((3, 1, 1)), [0.5, 0.5, 1e-30])
    plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0, 0.5))
    for read in (*plan.reweighting(), plan.point_reweighting([[0.0], [1.0], [50.0]])):
        assert np.isfinite(read).all()
    assert plan.reweighting()[0][2] == 1 and plan.reweighting()[1][2] == 1
