"""Links: a forbidden one carries exactly nothing, a pinned one all that it is told to, whichever solver is asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from problems import random_mixture
from scipy.optimize import linprog

import coupled_gmm as cg
from coupled_gmm.transport import exact, network_simplex
from coupled_gmm.transport.links import shortage

K0, K1 = 6, 5


def masked(seed, k0=K0, k1=K1, density=0.5):
    """A mask in which every component has a link, and masses that a plan inside it has."""
    rng = np.random.RandomState(seed)
    allowed = rng.rand(k0, k1) < density
    allowed[np.arange(k0), rng.randint(k1, size=k0)] = True
    allowed[rng.randint(k0, size=k1), np.arange(k1)] = True
    plan = rng.gamma(1.0, size=(k0, k1)) * allowed
    plan /= plan.sum()
    return allowed, plan.sum(1), plan.sum(0)


def reweighted(gmm, weights):
    return cg.GaussianMixture.from_moments(gmm.means, gmm.covariances, weights)


def pair_of(seed, epsilon=0.3, k0=K0, k1=K1, d=2, **kwargs):
    allowed, a, b = masked(seed, k0, k1)
    gmm0, gmm1 = reweighted(random_mixture(seed, k0, d), a), reweighted(random_mixture(seed + 99, k1, d), b)
    return cg.GaussianMixturePair(gmm0, gmm1, epsilon, links=allowed, **kwargs), allowed


def programme(cost, a, b, allowed):
    """The dense linear programme, in which forbidden cells are held at 0."""
    k0, k1 = cost.shape
    sums = np.r_[np.kron(np.eye(k0), np.ones(k1)), np.kron(np.ones(k0), np.eye(k1))[:-1]]
    bounds = [(0, None if free else 0) for free in allowed.ravel()]
    found = linprog(cost.ravel(), A_eq=sums, b_eq=np.r_[a, b[:-1]], bounds=bounds, method="highs")
    assert found.status == 0
    return found.fun


@jax.jit
def by_simplex(cost, a, b, allowed):
    return exact.solve(cost, a, b, 10_000, links=allowed)[0]


@jax.jit
def by_pot(cost, a, b, allowed):
    return network_simplex.solve(cost, a, b, 10_000, allowed)


@pytest.mark.parametrize("one", [by_simplex, by_pot])
def test_exact_plans_are_those_of_the_linear_programme_with_the_cells_left_out(precision, one):
    dtype = np.float64 if precision < 1e-8 else np.float32
    for seed in range(8):
        rng, (allowed, a, b) = np.random.RandomState(seed), masked(seed, density=0.2 + 0.08 * seed)
        cost = rng.rand(K0, K1) * np.where(
            allowed, 1, 10.0 ** rng.uniform(-3, 6, (K0, K1))
        )  # what is forbidden may be cheap, or dear
        cost, a, b = (x.astype(dtype) for x in (cost, a, b))
        vertex = one(cost, a, b, allowed)
        matrix, f, g = (np.asarray(x, np.float64) for x in (vertex.matrix, vertex.f, vertex.g))
        assert bool(vertex.optimal) and (matrix[~allowed] == 0).all() and (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(1), a, atol=20 * precision)
        np.testing.assert_allclose(matrix.sum(0), b, atol=20 * precision)
        best = programme(cost.astype(np.float64), a, b / b.sum() * a.sum(), allowed)
        np.testing.assert_allclose(np.sum(matrix * cost), best, atol=1e-9 if precision < 1e-8 else 3e-6)
        assert ((cost - f[:, None] - g)[allowed] >= -100 * precision).all()


def test_entropic_plans_are_those_of_sinkhorns_iteration_with_a_kernel_of_zeros(precision):
    epsilon, bound = 2.0, max(1e-9, 200 * precision)
    for seed, rho in ((0, np.inf), (1, 0.7), (2, np.inf), (3, 2.0)):
        pair, allowed = pair_of(seed, epsilon, rho=rho)
        plan = cg.solve_plan(pair, tol=max(1e-11, 30 * precision))
        matrix = np.asarray(plan.matrix, np.float64)
        cost = np.where(allowed, np.asarray(plan.cost, np.float64), np.inf)
        a, b = (np.asarray(gmm.weights, np.float64) for gmm in (pair.gmm0, pair.gmm1))
        theirs = twins.sinkhorn(cost, a, b, epsilon, rho, tol=max(1e-11, precision))
        assert plan.status_name == "converged" and (matrix[~allowed] == 0).all()
        np.testing.assert_allclose(matrix, theirs, atol=bound)
        finite = np.where(allowed, cost, 0)
        primal = twins.primal(theirs, finite, a, b, epsilon, rho)
        np.testing.assert_allclose(float(plan.regularized_cost), primal, rtol=bound)
        assert -bound <= float(plan.duality_gap) <= 10 * bound
        np.testing.assert_allclose(np.asarray(plan.reverse().matrix), matrix.T, atol=precision)


@pytest.mark.parametrize("rho", [np.inf, 1.5])
def test_otts_sinkhorn_finds_the_same(rho):
    pair, allowed = pair_of(4, rho=rho)
    ours, theirs = cg.solve_plan(pair, tol=1e-6), cg.solve_plan(pair, method="sinkhorn", tol=1e-5)
    assert theirs.status_name == "converged"
    assert (np.asarray(theirs.matrix)[~allowed] == 0).all()
    np.testing.assert_allclose(np.asarray(theirs.matrix), np.asarray(ours.matrix), atol=2e-5)


@pytest.mark.slow
def test_links_that_forbid_nothing_change_nothing():
    gmm0, gmm1 = random_mixture(0, K0, 2), random_mixture(1, K1, 2)
    free, linked = (cg.GaussianMixturePair(gmm0, gmm1, 0.3, links=m) for m in (None, np.ones((K0, K1), bool)))
    for method in ("entropic", "exact"):
        plans = [cg.solve_plan(pair, method=method) for pair in (free, linked)]
        np.testing.assert_allclose(*(np.asarray(plan.matrix) for plan in plans), atol=1e-6)
        np.testing.assert_allclose(*(float(plan.regularized_cost) for plan in plans), rtol=1e-5)


def test_a_plan_whose_links_leave_it_no_choice():
    """Triangular links and equal masses: mass on the diagonal alone, at potentials that have no limit."""
    gmm = random_mixture(3, 4, 2)
    for allowed in (np.triu(np.ones((4, 4), bool)), np.eye(4, dtype=bool)):
        pair = cg.GaussianMixturePair(gmm, gmm, 0.1, links=allowed)
        for method in ("entropic", "exact"):
            plan = cg.solve_plan(pair, method=method)
            assert plan.status_name == "converged", (method, plan.message)
            np.testing.assert_allclose(np.asarray(plan.matrix), np.diag(gmm.weights), atol=1e-4)


@pytest.mark.slow
def test_derivatives_are_those_of_finite_differences():
    with jax.enable_x64(True):
        pair, _ = pair_of(5)
        direction = np.random.RandomState(0).randn(K0, 2)

        def moved(t, s, method):
            gmm0 = cg.GaussianMixture.from_moments(
                pair.gmm0.means + t * direction, pair.gmm0.covariances, pair.gmm0.weights
            )
            one = cg.GaussianMixturePair(gmm0, pair.gmm1, 0.3 + s, links=pair.links)
            plan = cg.solve_plan(one, method=method, tol=1e-13)
            return plan.transport_cost + (plan.regularized_cost if method == "entropic" else 0)

        for method in ("entropic", "exact"):
            slopes = jax.grad(moved, (0, 1))(0.0, 0.0, method)
            for i, slope in enumerate(slopes if method == "entropic" else slopes[:1]):
                ends = [float(moved(*(sign * 1e-5 * (j == i) for j in (0, 1)), method)) for sign in (1, -1)]
                np.testing.assert_allclose(float(slope), (ends[0] - ends[1]) / 2e-5, rtol=1e-5)

        # Masses along a change that the blocks of links allow: of two components that have a partner in common.
        eye = cg.links((4, 4), pinned=[(0, 0), (1, 1)], one_to_one=True)
        gmm = random_mixture(3, 4, 2)

        def weighed(t):
            tilt = jnp.array([0, 0, 1.0, -1.0]) * t
            other = gmm.means + 0.5
            sides = (
                cg.GaussianMixture.from_moments(means, gmm.covariances, gmm.weights + by)
                for means, by in ((gmm.means, tilt), (other, 0))
            )
            return cg.solve_plan(cg.GaussianMixturePair(*sides, 0.3, links=eye), tol=1e-13).transport_cost

        slope, ends = float(jax.grad(weighed)(0.0)), [float(weighed(t)) for t in (1e-5, -1e-5)]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5)


def test_masses_that_links_cannot_carry_are_refused_by_name():
    gmm0 = reweighted(random_mixture(0, 3, 2), [0.5, 0.3, 0.2])
    gmm1 = reweighted(random_mixture(1, 3, 2), [0.2, 0.3, 0.5])
    pair = cg.GaussianMixturePair(gmm0, gmm1, 0.3, links=cg.links((3, 3), pinned=[(0, 0)]))
    for method in ("entropic", "exact", "sinkhorn"):
        with pytest.raises(ValueError, match=r"component 0 of gmm0 hold 0\.5.* component 0, 0\.2"):
            cg.solve_plan(pair, method=method)
    with pytest.raises(ValueError, match="links can't carry"):
        cg.mw2_squared(gmm0, gmm1, links=pair.links)
    for method in ("entropic", "exact"):  # where it is not known, the status says it
        plan = jax.jit(lambda pair, method=method: cg.solve_plan(pair, method=method))(pair)
        assert not bool(plan.converged)
        assert float(plan.marginal_error) > 0.3 and (np.asarray(plan.matrix)[~pair.links] == 0).all()
    plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 0.3, rho=1.0, links=pair.links))
    assert plan.status_name == "converged"
    matrix = np.asarray(plan.matrix)
    assert (matrix[0, 1:] == 0).all() and matrix[0, 0] > 0


def test_shortage_is_what_a_linear_programme_finds():
    for seed in range(20):
        rng = np.random.RandomState(seed)
        allowed, a, b = rng.rand(4, 5) < 0.4, rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(5))
        sums = np.r_[np.kron(np.eye(4), np.ones(5)), np.kron(np.ones(4), np.eye(5))]
        bounds = [(0, 1 if free else 0) for free in allowed.ravel()]
        most = -linprog(-np.ones(20), A_ub=sums, b_ub=np.r_[a, b], bounds=bounds, method="highs").fun
        missing, (rows, columns) = shortage(allowed, a, b)
        np.testing.assert_allclose(missing, 1 - most, atol=1e-7)
        if missing > 1e-6:
            assert set(np.flatnonzero(allowed[rows].any(0))) == set(columns)
            np.testing.assert_allclose(a[rows].sum() - b[columns].sum(), missing, atol=1e-7)


def test_points_go_along_links_alone():
    """One to one, a point's image is that of its own component's map; and nothing of a mixture on the way is elsewhere."""
    pair, allowed = pair_of(6)
    gmm = random_mixture(3, 3, 2)
    other = cg.GaussianMixture.from_moments(gmm.means[::-1] + 3, gmm.covariances[::-1], gmm.weights)
    x = np.asarray(gmm.means) + 0.1
    for method in ("entropic", "exact"):
        plan = cg.solve_plan(cg.GaussianMixturePair(gmm, other, 0.3, links=np.eye(3, dtype=bool)), method=method)
        posterior = np.exp(np.asarray(gmm.log_posterior(x), np.float64))
        sides = [[np.asarray(leaf, np.float64) for leaf in (g.means, g.covariances)] for g in (gmm, other)]
        images = [twins.gaussian_map(x, *(leaf[k] for side in sides for leaf in side)) for k in range(3)]
        expected = np.einsum("nk,knd->nd", posterior, np.stack(images))
        np.testing.assert_allclose(np.asarray(cg.map_points(plan, x)), expected, atol=2e-4)
    plan = cg.solve_plan(pair)
    weights = np.asarray(cg.interpolate(plan, 0.5).weights).reshape(K0, K1)
    assert (weights[~allowed] == 0).all() and weights[allowed].sum() > 0.999
    forward, backward = plan.conditionals()
    assert (np.asarray(forward)[~allowed] == 0).all() and (np.asarray(backward)[~allowed] == 0).all()


def test_a_component_without_mass_may_be_without_links():
    gmm0 = reweighted(random_mixture(0, 3, 2), [0.5, 0.0, 0.5])
    gmm1 = reweighted(random_mixture(1, 3, 2), [0.3, 0.7, 0.0])
    allowed = np.array([[1, 1, 1], [0, 0, 1], [1, 1, 0]], bool)
    pair = cg.GaussianMixturePair(gmm0, gmm1, 0.3, links=allowed)

    def cost(means, method):
        moved = cg.GaussianMixture.from_moments(means, gmm0.covariances, gmm0.weights)
        return cg.solve_plan(cg.GaussianMixturePair(moved, gmm1, 0.3, links=allowed), method=method).transport_cost

    for method in ("entropic", "exact", "sinkhorn"):
        plan = cg.solve_plan(pair, method=method)
        assert plan.status_name == "converged"
        for side in plan.conditionals():
            assert np.isfinite(np.asarray(side)).all()
    for method in ("entropic", "exact"):
        assert np.isfinite(np.asarray(jax.grad(cost)(gmm0.means, method))).all()


@pytest.mark.slow
def test_they_batch_and_are_saved(tmp_path):
    pairs = [pair_of(seed)[0] for seed in (7, 8)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    for method in ("entropic", "exact"):
        plans = jax.vmap(lambda pair, method=method: cg.solve_plan(pair, method=method))(stacked)
        for i, pair in enumerate(pairs):
            alone = cg.solve_plan(pair, method=method)
            np.testing.assert_allclose(np.asarray(plans[i].matrix), np.asarray(alone.matrix), atol=2e-6)
    cg.save(tmp_path / "plan.npz", alone)
    loaded = cg.load(tmp_path / "plan.npz")
    np.testing.assert_array_equal(np.asarray(loaded.pair.links), np.asarray(alone.pair.links))
    np.testing.assert_array_equal(np.asarray(loaded.matrix), np.asarray(alone.matrix))


def test_the_helper_and_what_it_refuses():
    np.testing.assert_array_equal(cg.links((2, 2), forbidden=[(0, 1)]), [[True, False], [True, True]])
    np.testing.assert_array_equal(cg.links((2, 3), pinned=[(0, 1), (0, 2)]), [[False, True, True], [True] * 3])
    np.testing.assert_array_equal(cg.links((2, 2), pinned=[(0, 0)], one_to_one=True), np.eye(2, dtype=bool))
    for match, kwargs in (
        ("forbidden.*no pair", {"forbidden": [(0, 2)]}),
        ("pinned.*no pair", {"pinned": [(-1, 0)]}),
        ("forbidden too", {"pinned": [(0, 0)], "forbidden": [(0, 0)]}),
        ("component 0 of gmm0 has no link", {"forbidden": [(0, 0), (0, 1)]}),
        ("component 1 of gmm1 has no link", {"pinned": [(0, 0), (1, 0)]}),
    ):
        with pytest.raises(ValueError, match=match):
            cg.links((2, 2), **kwargs)
    gmm = random_mixture(0, 3, 2)
    for match, given in (
        ("mask of bools", np.ones((3, 3))),
        (r"expected shape \(3, 3\)", np.ones((2, 3), bool)),
        ("component 1 of gmm0 has no link", np.array([[1, 1, 1], [0, 0, 0], [1, 1, 1]], bool)),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            cg.GaussianMixturePair(gmm, gmm, links=given)


@pytest.mark.slow
@pytest.mark.parametrize("exactly", [False, True])
def test_plans_of_many_components(exactly):
    """More than XLA's simplex method takes: POT's, on the host, in either precision."""
    with jax.enable_x64(exactly):
        pair, allowed = pair_of(9, k0=70, k1=66)
        plan = cg.solve_plan(pair, method="exact", tol=1e-4)
        cost, a, b = (np.asarray(x, np.float64) for x in (plan.cost, pair.gmm0.weights, pair.gmm1.weights))
        assert plan.status_name == "converged" and (np.asarray(plan.matrix)[~allowed] == 0).all()
        best = programme(cost, a, b / b.sum() * a.sum(), allowed)
        np.testing.assert_allclose(float(plan.transport_cost), best, rtol=1e-10 if exactly else 2e-5)
        entropic = cg.solve_plan(pair)
        assert entropic.status_name == "converged" and (np.asarray(entropic.matrix)[~allowed] == 0).all()
        assert float(entropic.transport_cost) > best - 1e-3
        np.testing.assert_allclose(float(cg.mw2_squared(pair.gmm0, pair.gmm1, links=allowed)), best, rtol=2e-5)


@pytest.mark.slow
def test_a_sweep_of_prices_and_densities(precision):
    """Epsilon from 1e-4 of the mean cost, masses held on one side, both or none, sparse links: each plan converges."""
    for seed in range(60):
        rng, (k0, k1) = np.random.RandomState(seed), [(1, 4), (3, 3), (6, 5), (12, 9)][seed % 4]
        allowed, a, b = masked(seed, k0, k1, density=rng.choice([0.1, 0.3, 0.6]))
        gmm0, gmm1 = reweighted(random_mixture(seed, k0, 2), a), reweighted(random_mixture(seed + 99, k1, 2), b)
        scale = float(np.mean(np.asarray(cg.bures_cost_matrix(gmm0, gmm1))))
        rho = [np.inf, scale * 10 ** rng.uniform(-3, 1), [np.inf, scale], [scale, np.inf]][rng.randint(4)]
        pair = cg.GaussianMixturePair(gmm0, gmm1, scale * 10 ** rng.uniform(-4, 0), rho=rho, links=allowed)
        plan = cg.solve_plan(pair)
        matrix = np.asarray(plan.matrix)
        assert plan.status_name == "converged" and int(plan.n_iterations) < 150, (seed, plan.message)
        assert np.isfinite(matrix).all() and (matrix[~allowed] == 0).all()
        assert float(plan.duality_gap) > -1e-4 * scale
