"""Numbers far larger than those that matter: components far away, features of other units. Twins: HiGHS on the near part, NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

import coupled_gmm as cg
from coupled_gmm.core import expansions
from coupled_gmm.gaussians import bures
from coupled_gmm.transport import exact


def mixture(means, weights=None, variance=0.01, dtype=np.float32):
    means = np.asarray(means, dtype).reshape(len(means), -1)
    k, d = means.shape
    weights = np.full(k, 1 / k) if weights is None else weights
    return cg.GaussianMixture.from_moments(
        means, np.tile(variance * np.eye(d, dtype=dtype), (k, 1, 1)), weights.astype(dtype)
    )


def test_the_issues_pair():
    """Means (0, 1, 3000) against (1, 0, 3000): nothing has to move."""
    one, other = mixture([0, 1, 3000]), mixture([1, 0, 3000])
    assert cg.mw2_squared(one, other) == 0
    plan = cg.solve_plan(cg.GaussianMixturePair(one, other), method="exact")
    assert plan.converged and plan.duality_gap < 1e-9
    fit = cg.barycenter([one, other], one)
    assert fit.converged and fit.objective == 0
    np.testing.assert_allclose(cg.map_points(plan, [[0.0], [1.0], [3000.0]]), [[0], [1], [3000]], atol=1e-3)
    np.testing.assert_allclose(cg.flow(one, other, steps=3).loss, 0, atol=1e-6)


def shuffled(seed, k, distance, dtype):
    """A mixture with weight 0.02 far away, and the same in another order."""
    rng = np.random.RandomState(seed)
    means, weights, order = (
        2 * rng.randn(k, 2),
        np.append(0.98 * rng.dirichlet(np.full(k - 1, 2.0)), 0.02),
        rng.permutation(k),
    )
    means[-1] = distance, 0
    return mixture(means, weights, 0.3, dtype), mixture(means[order], weights[order], 0.3, dtype)


@pytest.mark.parametrize("k", [8, 70])
@pytest.mark.parametrize(("dtype", "distance"), [(np.float32, 9999.0), (np.float32, 1e6), (np.float64, 1e8)])
def test_a_mixture_against_itself(k, dtype, distance):
    with jax.enable_x64(dtype == np.float64):
        for seed in range(5):
            plan = cg.solve_plan(cg.GaussianMixturePair(*shuffled(seed, k, distance, dtype)), method="exact")
            assert plan.converged and plan.transport_cost < 1e-9, (seed, plan.message)


def test_mixtures_with_one_component_far_away():
    """Its mass stays with its counterpart; what the rest costs is the rest's own linear programme."""
    for seed in range(40):
        rng = np.random.RandomState(seed)
        near, weights = 2 * rng.randn(2, 7, 2), 0.9 * rng.dirichlet(np.full(7, 2.0), 2)
        far = rng.uniform(3e3, 3e4) * np.array([[1.0, 0.5]])
        gmms = [mixture(np.r_[m, far], np.append(w, 0.1), 0.3) for m, w in zip(near, weights)]
        plan = cg.solve_plan(cg.GaussianMixturePair(*gmms), method="exact")
        cost = ((near[0][:, None] - near[1]) ** 2).sum(-1)
        right = 0.9 * ot.emd2(weights[0] / 0.9, weights[1] / 0.9, cost)
        np.testing.assert_allclose(plan.transport_cost, right, rtol=1e-4, err_msg=str(seed))
        assert plan.converged and plan.duality_gap <= 1e-4 * right


def test_gradients_in_the_weights_of_near_components():
    """Against differences of the near part's linear programme, whose weights change between two near components."""
    rng = np.random.RandomState(3)
    near, weights = 2 * rng.randn(2, 5, 2), 0.9 * rng.dirichlet(np.full(5, 2.0), 2)
    gmms = [mixture(np.r_[m, [[9999.0, 0]]], np.append(w, 0.1), 0.3) for m, w in zip(near, weights)]

    def value(weights):
        return cg.mw2_squared(cg.GaussianMixture(gmms[0].means, gmms[0].covariances, weights), gmms[1])

    gradient = np.asarray(jax.jit(jax.grad(value))(gmms[0].weights))
    cost = ((near[0][:, None] - near[1]) ** 2).sum(-1)
    for k in range(1, 5):
        step = 1e-6 * (np.eye(5)[k] - np.eye(5)[0])
        sides = [0.9 * ot.emd2((weights[0] + s * step) / 0.9, weights[1] / 0.9, cost) for s in (1, -1)]
        np.testing.assert_allclose(gradient[k] - gradient[0], (sides[0] - sides[1]) / 2e-6, rtol=1e-3, atol=1e-3)


def test_expansions_do_not_round(precision):
    """Sums that cancel down to a cube of the rounding unit, against integers of any size."""
    rng = np.random.RandomState(0)
    digits = 23 if precision > 1e-8 else 52
    dtype = np.float32 if precision > 1e-8 else np.float64
    for _ in range(100):
        parts = [
            [int(v) << shift for v, shift in zip(rng.randint(-1000, 1000, 3), (2 * digits, digits, 0))]
            for _ in range(2)
        ]
        f, g = (tuple(np.asarray([p], dtype) for p in side) for side in parts)
        cost = np.asarray([float(sum(parts[0]) + sum(parts[1]))], dtype)
        right = int(cost[0]) - sum(parts[0]) - sum(parts[1])
        np.testing.assert_allclose(jax.jit(expansions.reduced)(cost, f, g)[0], right, rtol=2 * precision)
        total = expansions.added(f, g)
        assert sum(int(p[0]) for p in total) == sum(parts[0]) + sum(parts[1])


def test_the_certificate_sees_a_plan_that_is_not_optimal(x64):
    """The corner's plan of a problem whose best one costs nothing, stopped before its first step."""
    far = 1e16 * np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 1]])
    cost, masses = far + np.array([[5.0, 0, 9], [0, 5, 9], [9, 9, 0]]), np.ones(3) / 3
    stopped, _ = jax.jit(exact.solve)(cost, masses, masses, 0)
    assert not stopped.done and not stopped.optimal and stopped.gap >= np.sum(stopped.matrix * cost) - 20


def test_by_feature_not_by_the_largest(x64):
    """A feature of scale 1e-4 beside one of 1e4: indefinite blocks are seen, posteriors and barycenters are right."""
    small = np.array([[1.0, 2.0], [2.0, 1.0]]) * 1e-12
    covariance = np.zeros((3, 3))
    covariance[:2, :2], covariance[2, 2] = small, 1e8
    with pytest.raises(ValueError, match="indefinite"):
        cg.GaussianMixture.from_moments(np.zeros((1, 3)), covariance[None], [1.0])
    units = np.array([1e-4, 1e4])
    base = cg.GaussianMixture.from_moments([[0.0, 0], [3.0, 0]], [np.diag([1.0, 0]), np.diag([1.0, 1])], [0.5, 0.5])
    moved = cg.GaussianMixture.from_moments([[5.0, 1], [9.0, 2]], [np.eye(2), 2 * np.eye(2)], [0.5, 0.5])

    def in_units(gmm):
        return cg.GaussianMixture.from_moments(gmm.means * units, gmm.covariances * np.outer(units, units), gmm.weights)

    x = np.random.RandomState(0).randn(20, 2) + np.array([1.5, 0])
    images = []
    for scale, make in ((np.ones(2), lambda gmm: gmm), (units, in_units)):
        pair = cg.GaussianMixturePair(make(base), make(moved), 1.0)
        plan = cg.solve_plan(cg.GaussianMixturePair(make(base), make(moved)), method="exact")
        vertex = jnp.asarray(np.diag([0.5, 0.5]))
        plan = cg.Plan(pair, plan.cost, plan.potentials, plan.status, plan.n_iterations, vertex, plan.gap)
        images.append(np.asarray(cg.map_points(plan, x * scale)) / scale)
    np.testing.assert_allclose(images[0], images[1], rtol=1e-5, atol=1e-5)
    rng = np.random.RandomState(1)
    factors = np.linalg.cholesky(np.einsum("nij,nkj->nik", *2 * [rng.randn(4, 3, 3)]))
    scale = np.array([1e-2, 1.0, 1e2])
    shares, group, barycenter = np.full(4, 0.25), np.zeros(4, np.int32), jax.jit(bures.barycenter)
    found = [
        np.asarray(barycenter(s * factors[:1], s * factors, group, shares)[0][0]) / s
        for s in (np.ones((3, 1)), scale[:, None])
    ]
    second = found[1] @ found[1].T
    start = scale[:, None] * found[1]
    again = np.asarray(barycenter(start[None], scale[:, None] * factors, group, shares)[0][0]) / scale[:, None]
    np.testing.assert_allclose(again @ again.T, second, rtol=1e-8, atol=1e-8)
