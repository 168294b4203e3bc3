"""Masses and plan solved for together, against the value of the joint problem by a plain Sinkhorn in NumPy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import DATA

from coupled_gmm.transport import entropic, masses
from coupled_gmm.transport.masses import Joins, Response
from coupled_gmm.transport.problem import TransportProblem


def solve_pair(problem, init, tol, limit, targets, rates, free=(True, True)):
    """Of the graph of two nodes and one edge: a rate is the edge's weight over the node's; none is an edge that weighs nothing."""
    sizes = problem.cost.shape
    k = max(sizes)
    padded = lambda x, value: jnp.pad(x, (0, k - len(x)), constant_values=value)  # noqa: E731
    log_masses = jnp.stack([padded(x, -jnp.inf) for x in (problem.log_a, problem.log_b)])
    cost = jnp.pad(problem.cost, [(0, k - size) for size in sizes])
    stacked = balanced(cost[None], *log_masses[:, None], problem.epsilon[None])
    rates = jnp.stack(rates)
    none = jnp.all(rates == 0)
    response = Response(
        targets=jnp.stack([padded(x, 0) for x in targets]), weights=jnp.where(none, 1, 1 / rates), free=jnp.stack(free)
    )
    joins = Joins(jnp.array([[0], [1]]), jnp.where(none, 0, 1)[None].astype(cost.dtype))
    init = tuple(padded(x, 0)[None] for x in init)
    found, _ = masses.solve(stacked, joins, log_masses, init, tol, limit, response)
    found = jax.tree.map(lambda leaf: leaf[0], found)
    k0, k1 = sizes
    rests = found.rests[0][:k0], found.rests[1][:k1]
    sides = {"f": found.f[:k0], "g": found.g[:k1], "log_a": found.log_a[:k0], "log_b": found.log_b[:k1]}
    return dataclasses.replace(found, **sides, rests=rests)


solve = jax.jit(solve_pair, static_argnums=3)


def balanced(cost, log_a, log_b, epsilon):
    return TransportProblem.of_log_masses(cost, log_a, log_b, epsilon=epsilon)


def log_sum_exp(x, axis):
    peak = x.max(axis=axis, keepdims=True)
    return np.squeeze(peak, axis) + np.log(np.exp(x - peak).sum(axis))


def transport(cost, a, b, a0, b0, epsilon):
    """min <P, C> + epsilon KL(P | a0 b0^T) over plans between a and b."""
    reference = np.log(a0)[:, None] + np.log(b0) - cost / epsilon
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(20_000):
        f = np.log(a) - log_sum_exp(reference + g, 1)
        step = np.log(b) - log_sum_exp(reference + f[:, None], 0) - g
        g = g + step
        if np.abs(step).max() < 1e-14:
            break
    plan, product = np.exp(reference + f[:, None] + g), a0[:, None] * b0
    return np.sum(plan * cost) + epsilon * np.sum(plan * np.log(plan / product) - plan + product)


def objective(a, b, problem):
    cost, (n, m), (c0, c1), (a0, b0), epsilon = problem
    return n @ np.log(a) / c0 + m @ np.log(b) / c1 - transport(cost, a, b, a0, b0, epsilon)


def make(seed, k0, k1, share, rates):
    rng = np.random.RandomState(seed)
    x, y = rng.randn(k0, 2), rng.randn(k1, 2)
    cost = ((x[:, None] - y) ** 2).sum(-1)
    targets, present = ([rng.dirichlet(np.full(k, 3.0)) for k in (k0, k1)] for _ in range(2))
    return cost, targets, rates, present, share * cost.mean()


def solved(problem, free=(True, True), tol=1e-10, limit=500):
    cost, targets, rates, present, epsilon = problem
    with np.errstate(divide="ignore"):
        logs = [jnp.asarray(np.log(p)) for p in present]
    pair = [tuple(jnp.asarray(v) for v in values) for values in (targets, rates, free)]
    zeros = tuple(jnp.zeros(k) for k in cost.shape)
    arrays = balanced(jnp.asarray(cost), *logs, jnp.asarray(epsilon))
    return solve(arrays, zeros, jnp.asarray(tol), limit, *pair)


@pytest.mark.parametrize(("k0", "k1"), [(1, 3), (3, 4)])
def test_masses_maximise_the_joint_objective(x64, k0, k1):
    rng = np.random.RandomState(0)
    for seed, (share, rates) in enumerate(
        [(1.0, (0.1, 0.1)), (0.3, (1.0, 0.2)), (0.1, (0.05, 0.02)), (0.2, (1e-6, 0.3))]
    ):
        problem = make(seed, k0, k1, share, rates)
        found = solved(problem)
        assert found.converged, (seed, found.marginal_error)
        a, b = np.exp(found.log_a), np.exp(found.log_b)
        np.testing.assert_allclose([a.sum(), b.sum()], 1, atol=1e-9)
        # The plan is optimal for the new masses, in its own right.
        cost, epsilon = problem[0], problem[-1]
        plan = np.outer(a, b) * np.exp((np.asarray(found.f)[:, None] + np.asarray(found.g) - cost) / epsilon)
        np.testing.assert_allclose(plan.sum(1), a, atol=1e-9)
        np.testing.assert_allclose(plan.sum(0), b, atol=1e-9)
        best = objective(a / a.sum(), b / b.sum(), problem)
        assert best >= objective(*problem[3], problem) - 1e-12
        for size in (1e-3, 1e-1):
            for _ in range(4):
                other = [w * np.exp(size * rng.randn(len(w))) for w in (a, b)]
                other = [w / w.sum() for w in other]
                value = objective(*other, problem)
                assert value <= best + 1e-12
                # Nothing of first order is left to gain.
                curvature = sum(1 / c for c in problem[2]) + cost.max() / epsilon * cost.max()
                assert best - value <= 10 * size**2 * curvature


def test_sides_that_are_not_free_keep_their_masses(x64):
    problem = make(1, 3, 4, 0.3, (0.1, 0.1))
    for free in ((False, True), (True, False), (False, False)):
        found = solved(problem, free)
        assert found.converged
        for side, log_mass in enumerate((found.log_a, found.log_b)):
            if not free[side]:
                np.testing.assert_allclose(np.exp(log_mass), problem[3][side], rtol=1e-12)
            else:
                assert np.abs(np.exp(log_mass) - problem[3][side]).max() > 1e-3


def test_without_a_price_masses_are_what_the_clouds_ask_for(x64):
    for rates in ((0.0, 0.0), (1e-12, 1e-12)):
        problem = make(2, 3, 4, 0.1, rates)
        found = solved(problem)
        assert found.converged
        np.testing.assert_allclose(np.exp(found.log_a), problem[1][0], rtol=1e-9)
        np.testing.assert_allclose(np.exp(found.log_b), problem[1][1], rtol=1e-9)


def test_absent_components_may_be_anywhere(precision):
    """Padding far from all mass, on either side or both, changes neither masses nor certificates."""
    tol = 1e-4 if precision > 1e-8 else 1e-9
    cost, targets, rates, present, epsilon = make(3, 3, 4, 0.05, (0.05, 0.05))
    for side, k in enumerate((3, 4)):
        for weights in (targets[side], present[side]):
            weights[k - 1] = 0
            weights /= weights.sum()
    plain = solved((cost, targets, rates, present, epsilon), tol=tol)
    assert plain.converged
    for far in (1e4, 1e8):
        for both in (0.0, far):
            moved = cost.copy()
            moved[2], moved[:, 3], moved[2, 3] = far, far, both
            found = solved((moved, targets, rates, present, epsilon), tol=tol)
            assert found.converged, (far, both, found.marginal_error, found.n_iterations)
            np.testing.assert_allclose(np.exp(found.log_a), np.exp(plain.log_a), atol=100 * tol)
            np.testing.assert_allclose(np.exp(found.log_b), np.exp(plain.log_b), atol=100 * tol)
            assert all(np.isfinite(np.asarray(p)).all() for p in (found.f, found.g))


def test_nearly_equal_masses_converge(x64):
    """Where transport has its kinks: the same components, the same masses or nearly, and a small epsilon."""
    rng = np.random.RandomState(0)
    for imbalance in (0.0, 1e-8, 1e-3):
        x = 3 * rng.randn(4, 2)
        cost = ((x[:, None] - x - 1e-3 * rng.randn(4, 4, 2)) ** 2).sum(-1)
        ask = [np.full(4, 0.25) * (1 + imbalance * rng.uniform(-1, 1, 4)) for _ in range(2)]
        ask = [w / w.sum() for w in ask]
        for share in (1e-2, 1e-3):
            found = solved((cost, ask, (0.05, 0.05), [w.copy() for w in ask], share * cost.mean()), tol=1e-8)
            assert found.converged, (imbalance, share, found.marginal_error)
            np.testing.assert_allclose(np.exp(found.log_a), np.exp(found.log_b), atol=2 * imbalance + 1e-6)


@pytest.mark.parametrize("precision_bits", [32, 64])
def test_masses_that_must_move_far_are_found(precision_bits):
    """Eight components of the photographs' pixels, whose clouds ask for quite other masses than the pooled start's.

    Here the residual of the log-marginals alone leads round in circles.
    """
    data = np.load(DATA / "photograph_masses.npz")
    with jax.enable_x64(precision_bits == 64):
        cost, a, n, m = (jnp.asarray(data[name], jnp.result_type(float)) for name in ("cost", "a", "n", "m"))
        zeros, yes = jnp.zeros(8), jnp.asarray(True)
        for epsilon in (1e-3, 6e-3, 1e-2, 0.1):
            for rate in (0.003, 0.03, 0.1, 0.3, 1.0, 3.0):
                log_a = jnp.log(a)
                problem = balanced(cost, log_a, log_a, jnp.asarray(epsilon))
                end = solve(
                    problem, (zeros, zeros), jnp.asarray(1e-4), 200, (n, m), (jnp.asarray(rate),) * 2, (yes, yes)
                )
                assert bool(end.converged), (epsilon, rate, end.marginal_error, end.n_iterations)


def test_components_that_no_cloud_asks_for_give_up_their_mass(x64):
    """A target of exactly zero beside a tiny one, in a batch: fused arithmetic must not round a least height below zero."""
    data = np.load(DATA / "photograph_masses.npz")
    cost, a, n, m = (jnp.asarray(data[name], jnp.float32) for name in ("cost", "a", "n", "m"))
    m = m.at[jnp.array([1, 7])].set(0).at[5].set(8e-9)
    m, zeros, yes = m / m.sum(), jnp.zeros(8, jnp.float32), jnp.asarray(True)
    asked = (n, m), (jnp.float32(0.1),) * 2, (yes, yes)

    def one(log_a, epsilon):
        problem = balanced(cost, log_a, log_a, epsilon)
        return solve(problem, (zeros, zeros), jnp.float32(1e-4), 200, *asked)

    ends = jax.jit(jax.vmap(one))(jnp.log(jnp.stack([a, n])), jnp.asarray([6e-3, 1e-2], jnp.float32))
    assert ends.converged.all()
    np.testing.assert_array_equal(np.exp(ends.log_b[:, [1, 7]]), 0)
    np.testing.assert_allclose(np.exp(ends.log_b).sum(1), 1, rtol=1e-5)


def test_levels_of_tiny_targets_are_finite(precision):
    """The last level may be another component's, of a target whose reciprocal has no square."""
    response = Response(jnp.asarray([[0.98, 0.02, 2e-29]]), jnp.ones(1), jnp.ones(1, bool))

    @jax.jit
    def answer(response, potential, level):  # an argument, as in a fit: no constants for the compiler to divide by
        return masses._Nodes(response, jnp.zeros((1, 3))).answer(0.1 * potential[None], level[None, None], 40)

    for potential in ([0.0, 3.0, 5.0], [5.0, 0.0, 0.0], [1.0, 2.0, 0.0]):
        for level in (2e-29, 1e-10, 1.0):
            log_mass, slope, _ = answer(response, jnp.asarray(potential), jnp.asarray(level))
            assert np.isfinite(np.asarray(slope)).all()
            np.testing.assert_allclose(np.exp(log_mass).sum(), 1, rtol=1e-4, err_msg=f"{potential} {level}")


def chain_problem():
    """Costs of a chain's edge whose masses agree badly, with the potentials of the step before."""
    cost = [[0.053, 66.146, 152.085], [62.381, 0.086, 21.817], [168.296, 27.346, 0.831]]
    a, b = np.array([0.38164, 0.27109, 0.34727]), np.array([0.22096, 0.34571, 0.43333])
    return np.array(cost), a / a.sum(), b / b.sum(), np.array([62.656, -76.157, -103.875])


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e5])
def test_warm_starts_are_as_good_as_cold_ones_in_float32(shift):
    """Neither a common shift of the potentials nor a distance that bounded steps would have to crawl is carried on."""
    cost, a, b, warm = chain_problem()
    problem = balanced(*(jnp.asarray(v, jnp.float32) for v in (cost, np.log(a), np.log(b), 0.1)))
    run = jax.jit(entropic.solve, static_argnums=3)
    ends = [run(problem, jnp.asarray(init, jnp.float32), jnp.float32(7e-5), 200) for init in (0 * warm, warm + shift)]
    for end in ends:
        assert end.marginal_error < 2e-4, end.marginal_error
        assert end.n_iterations < 100
        # The certificate, in NumPy float64 from the potentials as they are.
        f, g = np.asarray(end.f, float), np.asarray(end.g, float)
        plan = np.outer(a, b) * np.exp((f[:, None] + g - cost) / 0.1)
        assert abs(plan.sum(1) - a).sum() + abs(plan.sum(0) - b).sum() < 3e-4


def test_a_plan_of_nan_meets_no_bound():
    zeros, one = jnp.zeros(2), jnp.asarray(1.0)
    cost = jnp.asarray([[0.0, jnp.nan], [1.0, 0.0]])
    end = jax.jit(entropic.solve, static_argnums=3)(balanced(cost, zeros - 0.7, zeros - 0.7, one), zeros, one, 10)
    assert np.isinf(end.marginal_error)
    assert not end.converged


SHAPES = {"chain": [(0, 1), (1, 2)], "star": [(0, 1), (0, 2), (0, 3)], "ring": [(0, 1), (1, 2), (0, 2)]}


def make_graph(shape, seed=0, k=3):
    """Costs, targets, present masses, weights and epsilons of a graph, by NumPy."""
    rng, edges = np.random.RandomState(seed), np.array(SHAPES[shape])
    n_nodes = edges.max() + 1
    x = rng.randn(n_nodes, k, 2)
    cost = np.stack([((x[i][:, None] - x[j]) ** 2).sum(-1) for i, j in edges])
    targets, present = rng.dirichlet(np.full(k, 3.0), n_nodes), rng.dirichlet(np.full(k, 3.0), n_nodes)
    return (
        edges,
        cost,
        targets,
        present,
        rng.uniform(0.5, 2, len(edges)),
        0.1 * cost.mean((1, 2)),
        rng.uniform(0.5, 2, n_nodes),
    )


def solved_graph(graph, free, rho=None, init=None, present=None):
    edges, cost, targets, given, weights, epsilon, v = graph
    present = given if present is None else present
    logs = jnp.log(jnp.asarray(present))
    one, other = logs[edges[:, 0]], logs[edges[:, 1]]
    rho = None if rho is None else jnp.full(len(edges), rho)
    problems = TransportProblem.of_log_masses(jnp.asarray(cost), one, other, epsilon=jnp.asarray(epsilon), rho=rho)
    response = Response(jnp.asarray(targets), jnp.asarray(v), jnp.asarray(free))
    joins = Joins(jnp.asarray(edges.T), jnp.asarray(weights))
    init = (jnp.zeros(cost.shape[:2]),) * 2 if init is None else init
    return jax.jit(masses.solve, static_argnums=5)(problems, joins, logs, init, jnp.asarray(1e-10), 500, response)


def graph_objective(masses_, graph):
    edges, cost, targets, present, weights, epsilon, v = graph
    moved = zip(edges, cost, weights, epsilon)
    price = sum(w * transport(c, masses_[i], masses_[j], present[i], present[j], e) for (i, j), c, w, e in moved)
    return np.sum(v[:, None] * targets * np.log(masses_)) - price


@pytest.mark.parametrize(("shape", "held"), [("chain", 0), ("star", None), ("ring", 2)])
def test_masses_of_a_graph_maximise_the_joint_objective(x64, shape, held):
    """Every plan has its nodes' new masses, and no other masses are worth more, by a plain Sinkhorn."""
    graph = make_graph(shape)
    edges, cost, _, present, _, epsilon, v = graph
    free = np.arange(len(v)) != (-1 if held is None else held)
    found, logs = solved_graph(graph, free)
    assert found.converged.all(), found.marginal_error
    best = np.exp(np.asarray(logs))
    np.testing.assert_allclose(best.sum(1), 1, atol=1e-9)
    if held is not None:
        np.testing.assert_allclose(best[held], present[held], rtol=1e-12)
    for (i, j), c, e, f, g in zip(edges, cost, epsilon, np.asarray(found.f), np.asarray(found.g)):
        plan = np.outer(best[i], best[j]) * np.exp((f[:, None] + g - c) / e)
        np.testing.assert_allclose(plan.sum(1), best[i], atol=1e-8)
        np.testing.assert_allclose(plan.sum(0), best[j], atol=1e-8)
    rng, value = np.random.RandomState(1), graph_objective(best, graph)
    assert value >= graph_objective(present, graph)
    for size in (1e-3, 1e-1):
        for _ in range(4):
            other = best * np.exp(size * rng.randn(*best.shape) * free[:, None])
            assert graph_objective(other / other.sum(1, keepdims=True), graph) <= value + 1e-9


@pytest.mark.slow
def test_masses_of_an_unbalanced_graph_rise_to_a_stationary_point(x64):
    """Solved for again and again, each time from the plans between the last ones: J rises, and nothing of first order is left."""
    graph, rho, free = make_graph("chain"), 0.5, [True, True, True]
    edges, cost, targets, present, weights, epsilon, v = graph

    def held(present):
        found, _ = solved_graph(graph, [False] * 3, rho, present=present)
        problems = [
            TransportProblem.of_masses(
                *map(jnp.asarray, (c, present[i], present[j])),
                epsilon=jnp.asarray(e),
                rho=jnp.asarray(rho),
            )
            for (i, j), c, e in zip(edges, cost, epsilon)
        ]
        price = [float(p.dual_objective(f, g)) for p, f, g in zip(problems, found.f, found.g)]
        return np.sum(v[:, None] * targets * np.log(present)) - np.dot(weights, price), (found.f, found.g)

    values, now = [], present
    for _ in range(60):
        value, plans = held(now)
        values.append(value)
        _, logs = solved_graph(graph, free, rho, plans, now)
        now = np.exp(np.asarray(logs))
    assert (np.diff(values) > -1e-10).all() and values[-1] - values[0] > 1e-3
    assert values[-1] - values[-2] < 1e-8
    rng = np.random.RandomState(1)
    for _ in range(4):
        other = now * np.exp(1e-3 * rng.randn(*now.shape))
        assert held(other / other.sum(1, keepdims=True))[0] <= values[-1] + 1e-9
