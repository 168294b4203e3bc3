"""Fits of graphs: the same however a graph is written, traced or named, and against fits of pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_mixture

import coupled_gmm as cg
from coupled_gmm.fits import coupled as fit_module
from coupled_gmm.transport import solvers

STEPS = {"em_steps": 6, "m_steps": 8, "fidelity": False}
KINKED = {"edge_weights": 0.3, "epsilon": 0.05}  # where a balanced pair's masses must be solved for with its plan


def clouds(n=80):
    rng = np.random.RandomState(0)
    left, right = rng.randn(n, 2) - [2, 0], 0.6 * rng.randn(n, 2) + [2, 1]
    one, other = (np.where(rng.rand(n, 1) < share, left, right) for share in (0.7, 0.4))
    return [one, np.array([0.5, -0.5]) + other, 0.8 * left + [0.2, 0.3]]


GMMS = [random_mixture(k, size, 2) for k, size in enumerate((2, 3, 2))]


def fit(given, graph, **options):
    return cg.fit_graph(given, graph, **STEPS, **options)


def same(one, other):
    """Bit by bit."""
    assert one.penalized_log_likelihood == other.penalized_log_likelihood and one.status == other.status
    jax.tree.map(np.testing.assert_array_equal, one.gmms, other.gmms)
    np.testing.assert_array_equal(one.history.objective, other.history.objective)


def there_and_back(**options):
    return (cg.MixtureGraph.from_mixtures(GMMS[:2], [edge], **options, **KINKED) for edge in ((0, 1), (1, 0)))


@pytest.mark.parametrize("tau", [1.0, pytest.param(0.8, marks=pytest.mark.slow)])
def test_an_edge_has_no_direction(tau):
    """(1, 0) is (0, 1), to the last bit, with the plan the other way round."""
    one, other = (fit(clouds()[:2], graph) for graph in there_and_back(tau=tau))
    same(one, other)
    np.testing.assert_array_equal(one.plans.cost[0], other.plans.cost[0].T)
    for mine, theirs in zip(one.plans.potentials, other.plans.potentials[::-1]):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_a_traced_graph_takes_the_same_algorithm():
    """Inside jit as outside, in either direction, and both as `fit_pair`."""
    x, (there, back) = clouds()[:2], there_and_back()
    inside = jax.jit(lambda graph: fit(x, graph))
    same(inside(there), inside(back))
    pair = cg.GaussianMixturePair(*GMMS[:2], KINKED["epsilon"])
    expected = cg.fit_pair(*x, pair, transport_weight=KINKED["edge_weights"], **STEPS).penalized_log_likelihood
    for got in (fit(x, there), inside(there)):
        np.testing.assert_allclose(got.penalized_log_likelihood, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("gmms", "order"),
    [(GMMS, [2, 1, 0]), pytest.param([random_mixture(k, 2, 2) for k in range(3)], [2, 0, 1], marks=pytest.mark.slow)],
)
def test_nodes_have_no_names(gmms, order):
    """Nodes in another order: the same fit up to rounding, where no kinks amplify it."""
    x, edges = clouds(), [(0, 1), (1, 2)]
    options = {"edge_weights": [0.1, 0.3], "epsilon": [0.5, 0.8], "tau": 0.8}
    mine = fit(x, cg.MixtureGraph.from_mixtures(gmms, edges, **options))
    named = [(order.index(j), order.index(i)) for i, j in edges]
    theirs = fit([x[i] for i in order], cg.MixtureGraph.from_mixtures([gmms[i] for i in order], named, **options))
    np.testing.assert_allclose(mine.penalized_log_likelihood, theirs.penalized_log_likelihood, rtol=3e-6)
    for i, node in enumerate(order):
        np.testing.assert_allclose(theirs.gmms[i].means, mine.gmms[node].means, atol=2e-3)
    np.testing.assert_allclose(mine.history.transport_terms, theirs.history.transport_terms, rtol=1e-3)


@pytest.mark.slow
def test_the_order_of_edges_and_the_kind_of_integers_do_not_matter():
    x = clouds()
    edges, weights = [(0, 1), (1, 2), (2, 0)], np.array([0.1, 0.2, 0.3])
    first = fit(x, cg.MixtureGraph.from_mixtures(GMMS, edges, edge_weights=weights))
    order = [2, 0, 1]
    written = np.array([edges[e] for e in order], np.int16)
    again = fit(x, cg.MixtureGraph.from_mixtures(GMMS, written, edge_weights=weights[order]))
    same(first, again)
    np.testing.assert_array_equal(again.history.transport_terms, first.history.transport_terms[:, order])
    np.testing.assert_array_equal(again.plans.cost, first.plans.cost[jnp.asarray(order)])


def cloudless():
    graph = cg.MixtureGraph.from_mixtures(GMMS, [(0, 1), (2, 1)], edge_weights=0.2, epsilon=0.5, tau=0.8, frozen=[0])
    x = clouds()
    return graph, lambda given: fit([x[0], None, x[2]], given).penalized_log_likelihood


@pytest.mark.slow
def test_traced_graphs_with_cloudless_nodes():
    graph, value = cloudless()
    np.testing.assert_allclose(jax.jit(value)(graph), value(graph), rtol=1e-5)
    jax.eval_shape(
        lambda weight: value(dataclasses.replace(graph, edge_weights=weight)), graph.edge_weights
    )  # known in part


@pytest.mark.slow
def test_batches_of_graphs():
    graph, value = cloudless()
    graphs = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), graph)
    np.testing.assert_allclose(jax.vmap(value)(graphs), [value(graph)] * 2, rtol=1e-5)


def test_a_batch_of_graphs_is_no_graph():
    graph, value = cloudless()
    with pytest.raises(ValueError, match=r"^graph: is a batch of 2 graphs; .*jax.vmap"):
        value(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), graph))


@pytest.mark.slow
def test_sinkhorn_on_unbalanced_graphs():
    """Another M-step, by another solver's plans, in the end to the same mixtures."""
    x, options = clouds(), {"em_steps": 60, "m_steps": 8}
    graph = cg.MixtureGraph.from_mixtures(GMMS, [(0, 1), (2, 1)], edge_weights=0.2, tau=0.8)
    assert graph.rho[0] != graph.rho[1], "an epsilon, and so a rho, for each edge"
    ours, theirs = cg.fit_graph(x, graph, **options), cg.fit_graph(x, graph, method="sinkhorn", **options)
    np.testing.assert_allclose(ours.penalized_log_likelihood, theirs.penalized_log_likelihood, atol=1e-4)


def test_sinkhorn_takes_one_tau():
    """OTT branches on it, and one program solves all edges."""
    edges = [(0, 1), (2, 1)]
    for tau in (1.0, 0.8):
        graph = cg.MixtureGraph.from_mixtures(GMMS, edges, tau=tau)
        solver = fit_module._edge_solver("sinkhorn", graph)
        np.testing.assert_allclose([solver.tau0, solver.tau1], tau, rtol=1e-6)
    graph = cg.MixtureGraph.from_mixtures(GMMS, edges, epsilon=0.1, rho=[(0.1, 0.3), (0.1, 0.3)])
    with pytest.raises(ValueError, match=r"^method: .*have \[0.5 +0.75\], \[0.75 +0.5 *\]"):  # in node order: (1, 2)
        fit_module._edge_solver("sinkhorn", graph)
    graph = cg.MixtureGraph.from_mixtures(GMMS, edges, epsilon=0.1, rho=[0.1, 0.3])
    assert fit_module._edge_solver("entropic", graph) is solvers.ENTROPIC
    with pytest.raises(ValueError, match=r"^method: 'sinkhorn' needs one tau .*have 0.5, 0.75; use 'entropic', or"):
        fit(clouds(), graph, method="sinkhorn")


def test_one_node():
    """Its progress and history have one column of q, and no other is made up."""
    x = clouds()[0]
    graph = cg.MixtureGraph.from_mixtures(GMMS[:1], [])
    rows = []
    end = fit([x], graph, progress=rows.append)
    assert "q0" in rows[0] and "q1" not in rows[0] and end.history.q.shape == (6, 1)
    np.testing.assert_allclose([row["q0"] for row in rows], end.history.q0, rtol=1e-6)
    with pytest.raises(AttributeError, match=r"^history.q1: the graph has one node.*read history.q0"):
        end.history.q1  # noqa: B018
    np.testing.assert_allclose(
        end.penalized_log_likelihood, cg.fit_gmm(x, GMMS[0], max_steps=6, tol=0).penalized_log_likelihood
    )


def test_one_node_draws_its_bar(capsys):
    end = fit([clouds()[0]], cg.MixtureGraph.from_mixtures(GMMS[:1], []), progress=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    header = next(line for line in lines if "q0" in line)
    assert "q1" not in header and float(lines[-1][1]) == pytest.approx(float(end.history.q0[-1]), abs=1e-4)


def test_all_frozen():
    """Nothing moves, and J is that of the start: as `penalized_log_likelihood` has it, the third node weighing nothing."""
    x = clouds()
    options = {"epsilon": KINKED["epsilon"], "edge_weights": [KINKED["edge_weights"], 0], "node_weights": [1, 1, 0]}
    graph = cg.MixtureGraph.from_mixtures(GMMS, [(1, 0), (1, 2)], tau=0.8, frozen=np.arange(3), **options)
    end = fit(x, graph)
    jax.tree.map(np.testing.assert_array_equal, end.gmms, GMMS)
    pair = cg.GaussianMixturePair(*GMMS[:2], KINKED["epsilon"], 0.8)
    expected = cg.penalized_log_likelihood(pair, *x[:2], transport_weight=KINKED["edge_weights"])
    np.testing.assert_allclose(end.penalized_log_likelihood, expected, rtol=1e-5)


@pytest.mark.slow
def test_what_no_edge_pulls_is_plain_em():
    """An isolated node, an edge of weight zero, and no edge at all."""
    x = clouds()
    gmms = [cg.init_gmm(jax.random.key(0), cloud, 2) for cloud in x]
    alone = [cg.fit_gmm(cloud, gmm, max_steps=40, tol=0).penalized_log_likelihood for cloud, gmm in zip(x, gmms)]
    options = {"em_steps": 40, "m_steps": 20}
    isolated = cg.MixtureGraph.from_mixtures(gmms, [(0, 1)], edge_weights=0.0)
    for graph in (isolated, cg.MixtureGraph.from_mixtures(gmms, [])):
        end = cg.fit_graph(x, graph, **options)
        np.testing.assert_allclose(end.penalized_log_likelihood, np.sum(alone), atol=2e-3)


@pytest.mark.slow
def test_a_node_of_weight_zero_is_a_node_without_a_cloud():
    x = clouds()[:2]
    weightless = cg.MixtureGraph.from_mixtures(GMMS[:2], [(0, 1)], node_weights=[0, 1], frozen=[0], **KINKED)
    without = cg.MixtureGraph.from_mixtures(GMMS[:2], [(0, 1)], frozen=[0], **KINKED)
    values = [
        float(fit(x, weightless).penalized_log_likelihood),
        float(fit([None, x[1]], without).penalized_log_likelihood),
    ]
    np.testing.assert_allclose(values[0], values[1], atol=2e-2)  # one solves for masses with the plan, one searches


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([(0, 1), (0, 1)], r"^edges: \(0, 1\) joins two nodes that are joined already; keep one edge"),
        ([(0, 1), (1, 0)], r"^edges: \(1, 0\) joins two nodes that are joined already; keep one edge"),
    ],
)
def test_refused_edges(edges, message):
    with pytest.raises(ValueError, match=message):
        cg.MixtureGraph.from_mixtures(GMMS, edges)


def two_price_pair(rho):
    return cg.GaussianMixturePair(*GMMS[:2], 0.05, rho=rho)


@pytest.mark.slow
def test_two_equal_prices_are_one():
    """To the last bit; and two that differ make a plan that is certified, of the edge written either way."""
    x, weight = clouds()[:2], KINKED["edge_weights"]
    one, two, other = (
        cg.fit_pair(*x, two_price_pair(rho), transport_weight=weight, **STEPS) for rho in (0.5, (0.5, 0.5), (0.5, 5.0))
    )
    assert one.penalized_log_likelihood == two.penalized_log_likelihood
    jax.tree.map(np.testing.assert_array_equal, (one.pair.gmm0, one.plan.cost), (two.pair.gmm0, two.plan.cost))
    assert other.plan.marginal_error < 1e-3 and other.plan.duality_gap < 1e-4
    expected = cg.solve_plan(other.pair)
    np.testing.assert_allclose(other.plan.matrix, expected.matrix, atol=1e-4)
    graphs = [
        cg.MixtureGraph.from_mixtures(GMMS[:2], [edge], rho=[rho], **KINKED)
        for edge, rho in (((0, 1), (0.5, 5.0)), ((1, 0), (5.0, 0.5)))
    ]
    there, back = (fit(x, graph) for graph in graphs)
    same(there, back)
    np.testing.assert_allclose(there.penalized_log_likelihood, other.penalized_log_likelihood, atol=1e-4)
    np.testing.assert_array_equal(back.plans.pair.rho, [[5.0, 0.5]])


@pytest.mark.slow
@pytest.mark.parametrize("rho", [(0.5, 5.0), (np.inf, 0.5)])
def test_derivatives_of_j_with_two_prices(x64, rho):
    x = clouds()[:2]
    gmm0, gmm1 = (random_mixture(k, 2, 2) for k in (0, 1))

    def value(shift, rho):
        moved = dataclasses.replace(gmm0, means=gmm0.means + shift)
        pair = cg.GaussianMixturePair(moved, gmm1, 0.5, rho=rho)
        return cg.penalized_log_likelihood(pair, *x, transport_weight=0.3)

    value = jax.jit(value)
    step = 1e-5
    direction = jnp.asarray([[0.3, -1.0], [0.5, 0.2]])
    for argument, slope in ((0, direction), (1, jnp.asarray([1.0, 0.0])), (1, jnp.asarray([0.0, 1.0]))):
        at = [jnp.zeros((2, 2)), jnp.asarray(rho)]
        if np.isinf(at[argument][slope != 0]).any():
            continue
        got = jnp.sum(jnp.where(slope != 0, jax.grad(value, argument)(*at) * slope, 0))
        ends = [value(*(a + sign * step * slope if i == argument else a for i, a in enumerate(at))) for sign in (1, -1)]
        np.testing.assert_allclose(got, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8)


def test_a_node_without_a_cloud_is_drawn_to_its_neighbours():
    x, middle = clouds(), GMMS[1]
    graph = cg.MixtureGraph.from_mixtures(GMMS, [(0, 1), (1, 2)], edge_weights=0.5, epsilon=0.1, tau=0.8)
    end = fit([x[0], None, x[2]], graph)
    values = np.append(end.history.penalized_log_likelihood, end.penalized_log_likelihood)
    assert (np.diff(values) >= -1e-6 * (1 + np.abs(values[:-1]))).all() and values[-1] > values[0]
    assert [gmm.n_components for gmm in end.gmms] == [2, 3, 2]
    centre = 0.5 * (x[0].mean(0) + x[2].mean(0))
    assert np.linalg.norm(end.gmms[1].mean() - centre) < np.linalg.norm(middle.mean() - centre)


def read_outs(plan):
    names = ("matrix", "normalized_matrix", "transport_cost", "regularized_cost", "marginal_error", "total_mass")
    return {name: np.asarray(getattr(plan, name)) for name in names}


def test_plans_of_edges():
    """Of one edge and of several, stacked and one by one: what `fit_pair` has, and what sums over their matrices say."""
    x = clouds()
    end = fit(x, cg.MixtureGraph.from_mixtures(GMMS, [(2, 1), (0, 1)], edge_weights=0.2, epsilon=0.5, tau=0.8))
    stacked = read_outs(end.plans)
    for index, (i, j) in enumerate([(2, 1), (0, 1)]):
        plan = end.plan(index)
        assert plan.matrix.shape == (end.gmms[i].n_components, end.gmms[j].n_components)
        jax.tree.map(np.testing.assert_array_equal, (plan.pair.gmm0, plan.pair.gmm1), (end.gmms[i], end.gmms[j]))
        for name, value in read_outs(plan).items():
            whole = stacked[name][index]
            whole = whole[: plan.matrix.shape[0], : plan.matrix.shape[1]] if whole.ndim else whole
            np.testing.assert_allclose(value, whole, rtol=1e-5, atol=1e-7)
        # The equations of an unbalanced plan, in NumPy: its marginals are a e^(-f / rho) and b e^(-g / rho).
        (f, g), rho, matrix = (np.asarray(p, np.float64) for p in plan.potentials), float(plan.pair.rho), plan.matrix
        np.testing.assert_allclose(matrix.sum(1), np.exp(-f / rho) * end.gmms[i].weights, atol=1e-4)
        np.testing.assert_allclose(matrix.sum(0), np.exp(-g / rho) * end.gmms[j].weights, atol=1e-4)
        np.testing.assert_allclose(plan.transport_cost, np.sum(np.asarray(matrix) * plan.cost), rtol=1e-5)
        np.testing.assert_array_equal(end.plan((i, j)).matrix, matrix)
        np.testing.assert_allclose(end.plan((j, i)).matrix, np.asarray(matrix).T, rtol=1e-6)
    for edge, message in (
        ((0, 2), "no edge joins nodes 0 and 2"),
        (2, "there is no edge 2"),
        (-1, "must be at least 0"),
    ):
        with pytest.raises(ValueError, match=f"^edge: {message}"):
            end.plan(edge)
    with pytest.raises(TypeError, match=r"^edge: expected an integer"):
        end.plan("0")
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), end)
    with pytest.raises(ValueError, match=r"^plan: this GraphFit holds several, .*\[i\]"):
        batch.plan(0)
    np.testing.assert_array_equal(batch[1].plan(0).matrix, end.plan(0).matrix)


def test_the_plan_of_a_pair_is_that_of_its_graph():
    x, pair = clouds()[:2], cg.GaussianMixturePair(*GMMS[:2], KINKED["epsilon"])
    expected = cg.fit_pair(*x, pair, transport_weight=KINKED["edge_weights"], **STEPS).plan
    (graph, _) = there_and_back()
    end = fit(x, graph)
    assert len(end.plans) == 1
    for name, value in read_outs(expected).items():
        tolerance = {"rtol": 1e-3, "atol": 2e-3} if name.endswith("matrix") else {"rtol": 1e-2, "atol": 1e-3}
        np.testing.assert_allclose(read_outs(end.plan(0))[name], value, **tolerance)
        stacked = read_outs(end.plans)[name][0]
        np.testing.assert_allclose(stacked[:2] if stacked.ndim else stacked, value, **tolerance)  # node 0 is padded


@pytest.mark.slow
def test_plans_of_a_batch_of_fits_are_those_of_a_loop():
    x0, x1, x2 = clouds()
    pair = cg.GaussianMixturePair(*GMMS[:2], 0.5, 0.8)

    def one(x):
        return cg.fit_pair(x, x1, pair, transport_weight=0.2, **STEPS)

    batch = jax.vmap(one)(jnp.stack([x0, x2]))
    assert len(batch) == len(batch.plan) == 2
    for i, x in enumerate((x0, x2)):
        expected = read_outs(one(x).plan)
        for got in (read_outs(batch[i].plan), {name: value[i] for name, value in read_outs(batch.plan).items()}):
            for name, value in expected.items():
                np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_star_of_frozen_mixtures_is_a_barycenter():
    """Its centre is as near to them, by exact distances, as the barycenter with learnt weights from the same start."""
    gmms, start = [random_mixture(seed, 3, 2, condition=10) for seed in range(3)], random_mixture(5, 3, 2, condition=10)
    expected = float(cg.barycenter(gmms, start, learn_weights=True, max_steps=300, tol=1e-9).objective)
    star = cg.star(start, gmms, frozen=[1, 2, 3], epsilon=0.01, edge_weights=1 / 3)
    centre = cg.fit_graph([None, clouds()[0], None, None], star, em_steps=30).gmms[0]
    assert np.mean([float(cg.mw2_squared(centre, gmm)) for gmm in gmms]) < expected * (1 + 1e-5)


@pytest.mark.slow
def test_a_cycle():
    """J never falls, and the plan of each edge is that of its ends; K differ along it."""
    graph = cg.MixtureGraph.from_mixtures(GMMS, [(0, 1), (1, 2), (2, 0)], edge_weights=0.1, epsilon=0.5, tau=0.8)
    end = fit(clouds(), graph)
    values = np.append(end.history.penalized_log_likelihood, end.penalized_log_likelihood)
    assert (np.diff(values) >= -1e-6 * (1 + np.abs(values[:-1]))).all() and values[-1] > values[0]
    for e, (i, j) in enumerate([(0, 1), (1, 2), (2, 0)]):
        expected = cg.solve_plan(cg.GaussianMixturePair(end.gmms[i], end.gmms[j], 0.5, 0.8)).matrix
        np.testing.assert_allclose(end.plan(e).matrix, expected, atol=1e-3)


@pytest.mark.slow
def test_parts_that_nothing_joins_are_fits_of_their_own():
    """Two pairs in one graph, and a node that has neither points nor edges: it stays as it is."""
    x = clouds()
    options = {"edge_weights": 0.1, "epsilon": 0.5, "tau": 0.8}
    pairs = [[0, 1], [2, 0]]
    both = cg.MixtureGraph.from_mixtures(
        [*(GMMS[i] for pair in pairs for i in pair), GMMS[1]], [(0, 1), (2, 3)], **options
    )
    end = fit([*(x[i] for pair in pairs for i in pair), None], both)
    alone = [
        fit([x[i] for i in pair], cg.MixtureGraph.from_mixtures([GMMS[i] for i in pair], [(0, 1)], **options))
        for pair in pairs
    ]
    total = sum(float(one.penalized_log_likelihood) for one in alone)
    np.testing.assert_allclose(end.penalized_log_likelihood, total, rtol=1e-5)
    for name in ("means", "covariances", "weights"):
        np.testing.assert_allclose(getattr(end.gmms[4], name), getattr(GMMS[1], name), atol=1e-5)


def test_mixtures_alone_and_a_star_of_frozen_ones_is_a_barycenter():
    """No node has a cloud: J is the price of transport, and a free centre goes where `barycenter` does."""

    def mixture(seed):
        rng = np.random.RandomState(seed)
        roots = rng.randn(3, 2, 2)
        covariances = roots @ roots.transpose(0, 2, 1) + 0.3 * np.eye(2)
        return cg.GaussianMixture.from_moments(3 * rng.randn(3, 2) + 100, covariances, rng.dirichlet([5.0] * 3))

    gmms, shares = [mixture(seed) for seed in range(3)], [0.5, 0.3, 0.2]
    known = cg.barycenter(gmms, gmms[2], coefficients=shares, learn_weights=True)
    start = cg.barycenter(gmms, gmms[2], coefficients=shares).gmm  # of weights that are kept
    star = cg.star(start, gmms, edge_weights=shares, frozen=[1, 2, 3], epsilon=1e-2)
    fit = cg.fit_graph([None] * 4, star, em_steps=100, tol=1e-6)
    cost = sum(w * float(cg.mw2_squared(fit.gmms[0], gmm)) for w, gmm in zip(shares, gmms, strict=True))
    np.testing.assert_allclose(cost, known.objective, rtol=1e-5)
    assert fit.fidelity is None and fit.relative_weights is None and np.isfinite(fit.penalized_log_likelihood)
    for wrong, name in (
        ({"relative_weight": 1.0}, "relative_weight"),
        ({"n_init": 2, "key": jax.random.key(0)}, "n_init"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: no node has a cloud"):
            cg.fit_graph([None] * 4, star, **wrong)
