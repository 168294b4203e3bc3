"""The simplex method against SciPy's and POT's linear programmes: degenerate, scaled, absent and tied; warm starts; batches."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from problems import LAPACK, names_in
from scipy.optimize import linprog

import coupled_gmm as cg
from coupled_gmm.transport import exact, network_simplex

SHAPES = [(1, 1), (1, 5), (5, 1), (4, 4), (7, 5), (20, 16)]
LIMIT = 10_000


@jax.jit
def solve(cost, a, b):
    return exact.solve(cost, a, b, LIMIT)


@jax.jit
def solve_on_host(cost, a, b):
    return network_simplex.solve(cost, a, b, LIMIT)


@jax.jit
def solve_from(cost, a, b, start):
    return exact.solve(cost, a, b, LIMIT, start)


def masses_of(kind, rng, k):
    weights = rng.dirichlet(np.ones(k))
    if kind == "uniform":
        weights = np.ones(k)
    if kind == "wide":
        weights = 10.0 ** rng.uniform(-12, 0, k)
    if kind == "first and last":
        weights[[0, -1]] = 0 if k > 2 else weights[[0, -1]]
    if kind == "absent":
        weights[rng.permutation(k)[: k // 2]] = 0
    return weights / weights.sum()


def problems(k0, k1):
    """Names, costs and masses of all that may trouble a simplex method."""
    rng = np.random.RandomState(k0 + 100 * k1)
    for kind in ("random", "uniform", "wide", "first and last", "absent"):
        a, b = masses_of(kind, rng, k0), masses_of(kind, rng, k1)
        cost = rng.rand(k0, k1)
        yield kind, cost, a, b
        yield f"{kind}, integers", rng.randint(0, 3, (k0, k1)).astype(float), a, b
        yield f"{kind}, equal rows", np.repeat(cost[:1], k0, axis=0), a, b
        yield f"{kind}, all equal", np.ones((k0, k1)), a, b
        yield f"{kind}, negative", cost - 0.5, a, b
    a, b = masses_of("random", rng, k0), masses_of("random", rng, k1)
    for scale in (1e-12, 1e12):
        yield f"scale {scale}", scale * cost, a, b
    if k0 > 1:
        a[k0 // 2], cost[k0 // 2] = 0, 1e10
        yield "far and absent", cost, a / a.sum(), b
    if k0 == k1:
        yield "equal masses", (np.arange(k0)[:, None] - np.arange(k1)) ** 2.0, masses_of("wide", rng, k0), None


def optimum(cost, a, b):
    """By SciPy's HiGHS on the masses that are there, in units of the largest cost."""
    rows, columns = np.flatnonzero(a), np.flatnonzero(b)
    inner, a, b = cost[np.ix_(rows, columns)], a[rows], b[columns]
    scale = max(np.abs(inner).max(), 1e-300)
    k0, k1 = inner.shape
    equations = np.r_[np.kron(np.eye(k0), np.ones(k1)), np.kron(np.ones(k0), np.eye(k1))]
    strict = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(inner.ravel() / scale, A_eq=equations[:-1], b_eq=np.r_[a, b][:-1], method="highs", options=strict)
    assert found.status == 0
    return scale * found.fun


def check(name, vertex, cost, a, b, eps):
    """A legal plan, feasible potentials, and no gap between them."""
    matrix, f, g = (np.asarray(v, np.float64) for v in (vertex.matrix, vertex.f, vertex.g))
    assert bool(vertex.optimal), name
    assert (matrix >= 0).all() and np.count_nonzero(matrix) <= len(a) + len(b) - 1, name
    np.testing.assert_allclose(matrix.sum(1), a, rtol=0, atol=20 * eps, err_msg=name)
    np.testing.assert_allclose(matrix.sum(0), b, rtol=0, atol=20 * eps, err_msg=name)
    present = np.outer(a > 0, b > 0)
    scale = np.abs(cost[present]).max()
    reduced = cost - f[:, None] - g
    assert (reduced[present] >= -50 * eps * scale).all(), name
    # Components without mass see potentials that are feasible against those that have mass.
    assert (reduced[(a > 0)[:, None] | (b > 0)] >= -50 * eps * max(scale, np.abs(cost).max())).all(), name
    assert abs(np.sum(matrix * cost) - f @ a - g @ b) <= 100 * eps * scale, name


@pytest.mark.parametrize(("k0", "k1"), SHAPES)
def test_optimal_whatever_the_problem(precision, k0, k1):
    dtype = np.float64 if precision < 1e-8 else np.float32
    for name, cost, a, b in problems(k0, k1):
        cost, a, b = cost.astype(dtype), a.astype(dtype), (a if b is None else b).astype(dtype)
        vertex, basis = solve(cost, a, b)
        cost, a, b = (v.astype(np.float64) for v in (cost, a, b))
        check(name, vertex, cost, a, b, precision)
        assert vertex.n_iterations <= 5 * (k0 + k1), name
        assert set(np.unique(basis.inverse)) <= {-1, 0, 1}, name
        incidence = np.zeros((k0 + k1, k0 + k1 - 1))
        incidence[np.asarray(basis.rows), np.arange(k0 + k1 - 1)] = 1
        incidence[k0 + np.asarray(basis.columns), np.arange(k0 + k1 - 1)] += 1
        np.testing.assert_array_equal(np.asarray(basis.inverse) @ incidence, np.eye(k0 + k1 - 1), err_msg=name)
        if precision < 1e-8:
            scale = np.abs(cost[np.outer(a > 0, b > 0)]).max()
            value = np.sum(np.asarray(vertex.matrix) * cost)
            np.testing.assert_allclose(value, optimum(cost, a, b), rtol=0, atol=1e-9 * scale, err_msg=name)
            scale = scale or 1.0
            theirs = scale * ot.emd2(a, b / b.sum() * a.sum(), cost / scale)  # its tolerances are absolute
            np.testing.assert_allclose(value, theirs, rtol=0, atol=1e-9 * scale, err_msg=name)


@pytest.mark.parametrize(("k0", "k1"), [(1, 5), (7, 5)])
def test_the_host_finds_the_same(precision, k0, k1):
    dtype = np.float64 if precision < 1e-8 else np.float32
    for name, cost, a, b in problems(k0, k1):
        cost, a, b = (v.astype(dtype) for v in (cost, a, b))
        vertex = solve_on_host(cost, a, b)
        check(name, vertex, *(v.astype(np.float64) for v in (cost, a, b)), precision)


def random_problem(seed=0, k0=20, k1=16):
    rng = np.random.RandomState(seed)
    return rng.rand(k0, k1), rng.dirichlet(np.ones(k0)), rng.dirichlet(np.ones(k1))


def test_both_precisions_find_one_vertex():
    """Where it is unique, and by more than the costs' rounding."""
    problem = random_problem()
    single = jax.tree.map(np.asarray, solve(*(v.astype(np.float32) for v in problem))[0])
    with jax.enable_x64(True):
        double = jax.tree.map(np.asarray, solve(*problem)[0])
    assert single.matrix.dtype == np.float32 and double.matrix.dtype == np.float64
    np.testing.assert_array_equal(single.matrix > 0, double.matrix > 0)
    np.testing.assert_allclose(single.matrix, double.matrix, atol=1e-6)
    shift = np.mean(single.f - double.f)
    np.testing.assert_allclose(single.f - shift, double.f, atol=1e-5)
    np.testing.assert_allclose(single.g + shift, double.g, atol=1e-5)


def test_warm_starts(x64):
    """From the optimum nothing is left to do, from a nearby one little; from that of other masses, no less than from none."""
    rng = np.random.RandomState(1)
    cost, a, b = random_problem()
    _, basis = solve(cost, a, b)
    assert solve_from(cost, a, b, basis)[0].n_iterations == 0
    moved = cost + 0.1 * rng.rand(*cost.shape)
    warm, fresh = solve_from(moved, a, b, basis)[0], solve(moved, a, b)[0]
    assert 0 < warm.n_iterations < fresh.n_iterations / 2
    np.testing.assert_allclose(warm.matrix, fresh.matrix, atol=1e-12)
    check("moved", warm, moved, a, b, 2e-16)
    heavier = a + 1e-6 * (rng.rand(20) - 0.5)
    again, _ = solve_from(cost, heavier / heavier.sum(), b, basis)
    assert again.n_iterations == 0, "masses that move by less than any flow leave the vertex optimal"
    other = random_problem(7)[1]
    far, _ = solve_from(cost, other, b, basis)
    corner, _ = solve(cost, other, b)
    assert far.n_iterations == corner.n_iterations > 0, "an infeasible start is not one"
    np.testing.assert_array_equal(far.matrix, corner.matrix)
    check("other masses", far, cost, other, b, 2e-16)


def pair_of(k0, k1, seed=0):
    """Mixtures with one feature."""
    rng = np.random.RandomState(seed)
    gmms = [
        cg.GaussianMixture(*map(jnp.asarray, (3 * rng.randn(k, 1), 1 + rng.rand(k, 1, 1), rng.dirichlet(np.ones(k)))))
        for k in (k0, k1)
    ]
    return cg.GaussianMixturePair(*gmms, 1.0)


@pytest.mark.filterwarnings("ignore:numItermax reached")
@pytest.mark.parametrize("k", [20, 70])
def test_what_went_wrong_is_said(x64, k):
    """Steps that run out, costs that are not finite: on either side of the host."""
    pair = pair_of(k, k)
    done = cg.solve_plan(pair, method="exact")
    assert int(done.status) == cg.Status.CONVERGED and (done.n_iterations > 0) == (k == 20)
    stopped = cg.solve_plan(pair, method="exact", max_iterations=1)
    assert int(stopped.status) == cg.Status.NOT_CONVERGED and not stopped.converged
    for leaf in ("means", "covariances"):
        leaves = {"means": pair.gmm0.means, "covariances": pair.gmm0.covariances, "weights": pair.gmm0.weights}
        leaves[leaf] = np.array(leaves[leaf])
        leaves[leaf][3] = np.nan
        broken = cg.solve_plan(pair.replace(cg.GaussianMixture(**leaves), pair.gmm1), method="exact")
        assert int(broken.status) == cg.Status.NOT_FINITE and not broken.converged


@pytest.mark.parametrize("one", [solve, solve_on_host])
def test_a_batch_equals_a_loop(x64, one):
    """Of problems that take from none to many iterations."""
    cases = [random_problem(seed, 7, 5) for seed in range(3)]
    cases += [(np.ones((7, 5)), *cases[0][1:]), (cases[0][0], np.eye(7)[2], np.eye(5)[4])]
    batched = jax.jit(jax.vmap(one))(*map(np.stack, zip(*cases)))
    for i, case in enumerate(cases):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), batched, one(*case))


def test_large_plans_come_from_the_host(x64):
    """Beyond 64 components a side: under jit, vmap and grad; up to there nothing calls the host, or LAPACK."""
    pairs = [pair_of(70, 65, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *pairs)

    def value(pair):
        plan = cg.solve_plan(pair, method="exact")
        return plan.transport_cost, plan

    batched = jax.jit(jax.vmap(jax.value_and_grad(value, has_aux=True)))
    (costs, plans), gradient = batched(stacked)
    assert "pure_callback" in names_in(value, pairs[0])
    for i, pair in enumerate(pairs):
        a, b, cost = (np.asarray(v) for v in (pair.gmm0.weights, pair.gmm1.weights, pair.cost_matrix()))
        np.testing.assert_allclose(costs[i], ot.emd2(a, b, cost), rtol=1e-10)
        assert int(plans.status[i]) == cg.Status.CONVERGED
        alone = cg.solve_plan(pair, method="exact")
        np.testing.assert_allclose(plans.vertex[i], alone.matrix, atol=1e-12)
        np.testing.assert_allclose(
            gradient.gmm0.means[i][:, 0],
            2 * np.sum(np.asarray(alone.matrix) * (pair.gmm0.means - pair.gmm1.means.T), axis=1),
        )
    found = names_in(jax.value_and_grad(value, has_aux=True), pair_of(64, 64))
    assert "while" in found and not found & LAPACK
