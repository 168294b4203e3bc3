"""Bootstrap against moments by NumPy, the fits that it stands for, and intervals that cover what they should."""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coupled_gmm as cg
from coupled_gmm.core import chunks
from coupled_gmm.core.status import Status
from coupled_gmm.selection import bootstrap as module
from coupled_gmm.selection import replicates

KEY = jax.random.key(0)
TOL = 1e-6


def clouds(n=300, seed=0, shift=0.0, dtype=np.float64):
    """Two of two clusters each, the second moved and of other masses."""
    rng = np.random.RandomState(seed)
    x, y = (np.where(rng.rand(n, 1) < part, 0.0, 6.0) + rng.randn(n, 1) for part in (0.5, 0.3))
    return [(x + shift).astype(dtype), (y + 0.5 + shift).astype(dtype)]


def start(shift=0.0):
    return cg.GaussianMixture.from_moments([[shift], [6.0 + shift]], np.ones((2, 1, 1)), [0.5, 0.5])


def fitted(x, weight=0.01, rho=None, **options):
    pair = cg.GaussianMixturePair(start(), start(), epsilon=0.1, rho=rho)
    return cg.fit_pair(*x, pair, transport_weight=weight, **{"tol": TOL, "em_steps": 100, "fidelity": False} | options)


def weights_of(key, number, x):
    """The weights of a replicate, by points."""
    packed = chunks.pack(x, [None] * len(x), 256, jnp.result_type(float))
    drawn = replicates.reweighted(jax.random.fold_in(key, number), packed, jnp.asarray(True))
    ends = np.asarray(drawn.ends)
    rows = zip([0, *ends[:-1]], ends, x)
    return [np.asarray(drawn.weights)[first:last].reshape(-1)[: len(cloud)] for first, last, cloud in rows]


def test_weights_are_exponentials_of_the_point_alone():
    x = clouds(900)
    packed = [chunks.pack(x, [np.arange(900.0), None], size, jnp.float32) for size in (256, 1024)]
    drawn = [replicates.reweighted(KEY, one, jnp.asarray(True)) for one in packed]
    rows = [
        [np.asarray(one.weights)[first:last].reshape(-1)[:900] for first, last in ((0, one.ends[0]), one.ends)]
        for one in drawn
    ]
    for short, long in zip(*rows):
        np.testing.assert_allclose(short, long, rtol=1e-5)
        np.testing.assert_allclose(np.sum(short, dtype=np.float64), 1, rtol=1e-5)
    assert rows[0][0][0] == 0 and (rows[0][0][1:] > 0).all(), "a point of weight 0 keeps it"
    other = 900 * rows[0][1]  # exponentials: a mean of 1, a variance of 1, a third above ln 3
    assert abs(other.var() - 1) < 0.3 and abs((other > np.log(3)).mean() - 1 / 3) < 0.06
    assert abs(np.corrcoef(rows[0][0] / np.arange(1.0, 901), rows[0][1])[0, 1]) < 0.15, "clouds are drawn apart"
    same = replicates.reweighted(KEY, packed[0], jnp.asarray(False))
    np.testing.assert_allclose(same.weights, packed[0].weights, rtol=1e-5)


@pytest.mark.slow
def test_one_component_is_weighted_moments():
    """d = 1, fitted apart: means and variances by NumPy, and the distance in closed form; a component of weight 0 stays that."""
    x = clouds()
    one = cg.GaussianMixture.from_moments([[0.0], [9.0]], np.ones((2, 1, 1)), [1.0, 0.0])
    pair = cg.GaussianMixturePair(one, one, epsilon=0.1)
    fit = cg.fit_pair(*x, pair, transport_weight=0.0, tol=1e-7, em_steps=100, ridge=0)
    sure = cg.bootstrap(KEY, fit, x, n_replicates=5, ridge=0, tol=1e-7)
    for replicate in range(5):
        (m0, s0), (m1, s1) = (
            (w @ c[:, 0], np.sqrt(w @ (c[:, 0] - w @ c[:, 0]) ** 2)) for w, c in zip(weights_of(KEY, replicate, x), x)
        )
        np.testing.assert_allclose(sure.distance.samples[replicate], (m0 - m1) ** 2 + (s0 - s1) ** 2, rtol=2e-3)
    np.testing.assert_allclose(sure.masses.samples, np.broadcast_to([1.0, 0.0], (5, 2, 2)), atol=1e-6)


def test_a_replicate_is_a_fit_under_its_weights(tmp_path):
    x = clouds()
    fit = fitted(x)
    sure = cg.bootstrap(KEY, fit, x, n_replicates=4, tol=TOL)
    assert sure.n_used == 4 and set(np.asarray(sure.status).tolist()) <= {Status.CONVERGED, Status.STALLED}
    for replicate in (0, 3):
        w0, w1 = weights_of(KEY, replicate, x)
        again = fitted(x, point_weights0=w0, point_weights1=w1)
        expected = np.stack([again.pair.gmm0.weights, again.pair.gmm1.weights])
        np.testing.assert_allclose(sure.masses.samples[replicate], expected, atol=5e-4)
        np.testing.assert_allclose(sure.plan.samples[replicate], again.plan.matrix, atol=5e-4)
        np.testing.assert_allclose(sure.distance.samples[replicate], again.plan.transport_cost, rtol=0.03)
    low, high = np.quantile(np.asarray(sure.plan.samples), [0.05, 0.95], axis=0)
    np.testing.assert_allclose(sure.plan.low, low, rtol=1e-5)
    np.testing.assert_allclose(sure.plan.high, high, rtol=1e-5)
    np.testing.assert_array_equal(sure.plan.estimate, fit.plan.matrix)
    ends = np.quantile(np.asarray(sure.distance.samples), [0.95, 0.05])
    mirrored = 2 * float(fit.plan.transport_cost) - ends
    np.testing.assert_allclose([sure.distance.low, sure.distance.high], mirrored, rtol=1e-4)
    np.testing.assert_array_equal(sure.mass_change.samples, 1)
    np.testing.assert_array_equal(sure.growth.high, 0)
    assert sure.plan.samples.shape == (4, 2, 2) and sure.masses.low.shape == (2, 2)
    assert "4 of 4 replicates" in repr(sure) and sure.message in sure.summary()
    cg.save(tmp_path / "sure.npz", sure)
    again = cg.load(tmp_path / "sure.npz")
    jax.tree.map(np.testing.assert_array_equal, again, sure)


@pytest.mark.slow
def test_offsets_and_threads_change_nothing(x64, monkeypatch):
    x, far = clouds(), clouds(shift=1e6)
    sure = cg.bootstrap(KEY, fitted(x), x, n_replicates=3)
    pair = cg.GaussianMixturePair(start(1e6), start(1e6), epsilon=0.1)
    fit = cg.fit_pair(*far, pair, transport_weight=0.01, tol=TOL, em_steps=100)
    monkeypatch.setattr(replicates.executors, "threads", lambda: 1)
    alone = cg.bootstrap(KEY, fit, far, n_replicates=3)
    np.testing.assert_allclose(alone.masses.samples, sure.masses.samples, atol=1e-6)
    np.testing.assert_allclose(alone.distance.samples, sure.distance.samples, rtol=1e-5)


def test_mass_that_changes_has_a_growth_rate():
    x = clouds()
    fit = fitted(x, rho=1.0)
    sure = cg.bootstrap(KEY, fit, x, n_replicates=20)
    np.testing.assert_allclose(sure.mass_change.estimate, fit.plan.mass_change(), rtol=1e-6)
    np.testing.assert_allclose(np.exp(sure.growth.samples), sure.mass_change.samples, rtol=1e-5)
    assert (np.asarray(sure.growth.low) < sure.growth.high).all()
    assert sure.growth.low[1] > 0 > sure.growth.high[0], "of these clouds the second component grows"


def test_a_fit_that_had_not_ended_is_called_that():
    x = clouds()
    far = cg.GaussianMixture.from_moments([[0.0], [6.0]], np.full((2, 1, 1), 4.0), [0.9, 0.1])
    short = cg.fit_pair(*x, cg.GaussianMixturePair(far, far, epsilon=0.1), transport_weight=0.01, em_steps=1)
    sure = cg.bootstrap(KEY, short, x, n_replicates=4)
    assert float(sure.drift) > 0.5 and "the fit had not ended" in sure.message
    assert "had not ended" not in cg.bootstrap(KEY, fitted(x), x, n_replicates=4).message


def graph_of(fit, **options):
    return cg.MixtureGraph.from_mixtures(
        [fit.pair.gmm0, fit.pair.gmm1], [(1, 0)], edge_weights=0.01, epsilon=0.1, **options
    )


def refit_of(fit, n, k=2):
    """Replicates as the program leaves them, made up: of a graph of two nodes and one edge."""
    rng = np.random.RandomState(0)
    masses, plans = rng.dirichlet(np.ones(k), (n, 2)), rng.dirichlet(np.ones(k * k), (n, 1)).reshape(n, 1, k, k)
    nodes = cg.GaussianMixture(jnp.zeros((n, 2, k, 1)), jnp.ones((n, 2, k, 1, 1)), masses)
    apart = np.broadcast_to(1 - np.eye(k), (n, 2, k, k)).copy()
    changes, distances = rng.rand(n, 1, k) + 0.5, rng.rand(n, 1)
    return replicates.Refit(nodes, plans, changes, distances, apart, np.zeros(n, int), np.ones(n, int))


def problem_of(fit):
    return module._problem(fit, None, (), None)


def test_components_are_put_in_the_order_of_the_fit():
    fit = fitted(clouds(), rho=1.0)
    problem, found = problem_of(fit), refit_of(fit, 6)
    plain = module._read(fit, problem, jax.tree.map(lambda leaf: leaf[0], found), found, 0.9)
    swapped = {name: np.array(leaf) for name, leaf in found._asdict().items() if name != "nodes"}
    weights = np.array(found.nodes.weights)
    for replicate in (1, 4):  # of the first node; of both
        weights[replicate, 0] = weights[replicate, 0, ::-1].copy()
        swapped["apart"][replicate, 0] = swapped["apart"][replicate, 0, :, ::-1].copy()
        swapped["plans"][replicate, 0] = swapped["plans"][replicate, 0, ::-1].copy()
        swapped["mass_changes"][replicate, 0] = swapped["mass_changes"][replicate, 0, ::-1].copy()
    weights[4, 1] = weights[4, 1, ::-1].copy()
    swapped["apart"][4, 1] = swapped["apart"][4, 1, :, ::-1].copy()
    swapped["plans"][4, 0] = swapped["plans"][4, 0, :, ::-1].copy()
    other = replicates.Refit(dataclasses.replace(found.nodes, weights=weights), **swapped)
    assert not np.array_equal(other.plans, found.plans)
    read = module._read(fit, problem, jax.tree.map(lambda leaf: leaf[0], found), other, 0.9)
    jax.tree.map(np.testing.assert_array_equal, read, plain)


def test_the_assignment_is_the_least_of_all():
    rng = np.random.RandomState(1)
    apart = rng.rand(5, 2, 4, 4)
    orders = module._orders(apart, (4, 3))
    for replicate in range(5):
        for node, k in enumerate((4, 3)):
            costs, order = apart[replicate, node, :k, :k], orders[replicate, node]
            best = min(sum(costs[range(k), list(p)]) for p in itertools.permutations(range(k)))
            np.testing.assert_allclose(costs[range(k), order[:k]].sum(), best)
            np.testing.assert_array_equal(order[k:], range(k, 4))


def test_replicates_that_failed_are_left_out_and_said():
    fit = fitted(clouds())
    problem, found = problem_of(fit), refit_of(fit, 6)
    settled = jax.tree.map(lambda leaf: leaf[0], found)
    status, distances = found.status.copy(), found.distances.copy()
    status[2], distances[2], distances[3] = Status.NOT_FINITE, np.nan, np.inf
    broken = found._replace(status=status, distances=distances)
    read = module._read(fit, problem, settled, broken, 0.9)
    assert read.n_used == 4 and "2 of 6 replicates are left out" in read.message
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(read))
    np.testing.assert_array_equal(read.distance.samples, np.float32(distances[[0, 1, 4, 5], 0]))
    status[:5] = Status.NOT_FINITE
    with pytest.raises(cg.FitError, match="1 of 6 replicates have a usable result"):
        module._read(fit, problem, settled, broken, 0.9)


@pytest.mark.slow
def test_the_pair_is_a_graph_of_two_nodes():
    x = clouds()
    fit = fitted(x)
    graph = graph_of(fit)
    of_graph = cg.bootstrap(KEY, cg.fit_graph(x, graph, tol=TOL, em_steps=100), x, n_replicates=6)
    of_pair = cg.bootstrap(KEY, fit, x, n_replicates=6)
    np.testing.assert_allclose(of_graph.masses.samples, of_pair.masses.samples, atol=2e-4)
    turned = np.asarray(of_graph.plan.samples)[:, 0].swapaxes(1, 2)
    np.testing.assert_allclose(turned, of_pair.plan.samples, atol=2e-4)
    assert of_graph.distance.low.shape == (1,)


@pytest.mark.slow
def test_frozen_and_empty_nodes_of_a_graph():
    """A frozen mixture does not vary, and what has a cloud does; mixtures differ in size, and one has no points."""
    x = clouds()
    three = cg.GaussianMixture.from_moments([[0.0], [5.0], [7.0]], np.ones((3, 1, 1)), [0.4, 0.3, 0.3])
    graph = cg.MixtureGraph.from_mixtures(
        [start(), start(), three], [(0, 1), (1, 2)], edge_weights=0.1, epsilon=0.1, frozen=[0]
    )
    given = [x[0], None, x[1]]
    sure = cg.bootstrap(KEY, cg.fit_graph(given, graph, tol=TOL, em_steps=200), given, n_replicates=10, graph=graph)
    spread = np.asarray(sure.masses.standard_error)
    np.testing.assert_allclose(spread[0], 0, atol=1e-7)
    assert (spread[2, 1:] > 1e-4).all() and (np.asarray(sure.distance.standard_error) > 1e-4).all()
    assert sure.plan.samples.shape == (10, 2, 3, 3)
    np.testing.assert_array_equal(sure.masses.samples[:, :2, 2], 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_replicates_cost_less_than_twenty_fits():
    """Of the tutorial's two clouds, 10,000 points each, with the fit's 30 steps from its start."""
    from coupled_gmm.data.clouds import tutorial_clouds

    x = [np.asarray(cloud) for cloud in tutorial_clouds(KEY, 10_000)]
    pooled = cg.fit_gmm(np.concatenate(x), 3, key=KEY).gmm
    pair = cg.GaussianMixturePair(pooled, pooled, epsilon=0.01)
    fit = cg.fit_pair(*x, pair, transport_weight=0.01)

    def seconds(call):
        began = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - began

    calls = (
        lambda: [cg.fit_pair(*x, pair, transport_weight=0.01) for _ in range(20)],
        lambda: cg.bootstrap(KEY, fit, x),
    )
    turns = [[seconds(call) for call in calls] for _ in range(10)][1:]
    twenty, hundred = np.min(turns, axis=0)
    assert hundred < twenty, (hundred, twenty)


PLANTED = [(0.5, 0.3, 0.2), (0.3, 0.4, 0.3)], [[0.0, 0], [4, 0], [0, 4]], [[0.5, 0], [4.5, 0.5], [0, 4.5]]


def planted(n, rng):
    """Points of two mixtures of three components, between which a seventh of the mass has to move."""
    masses, *means = PLANTED
    clouds = []
    for weights, centres, scale in zip(masses, means, (1, 1.1)):
        labels = rng.choice(3, n, p=weights)
        clouds.append((np.array(centres)[labels] + scale * rng.standard_normal((n, 2))).astype(np.float32))
    return clouds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_intervals_cover_the_population_s_plan():
    """Over 100 samples of 1,000 points, the fit of 500,000 being the population's: each in 80 to 97 % of intervals of 90 %."""
    means = np.array(PLANTED[1])
    pooled = cg.GaussianMixture.from_moments(means, np.stack([np.eye(2)] * 3), [0.4, 0.3, 0.3])
    pair = cg.GaussianMixturePair(pooled, pooled, epsilon=0.05)
    options = {"transport_weight": 0.005, "tol": 1e-6, "em_steps": 500}
    truth = cg.fit_pair(*planted(500_000, np.random.default_rng(0)), pair, **options)
    covered = []
    for seed in range(100):
        x = planted(1000, np.random.default_rng(1000 + seed))
        sure = cg.bootstrap(jax.random.key(seed), cg.fit_pair(*x, pair, **options), x)
        covered.append((sure.plan.low <= truth.plan.matrix) & (truth.plan.matrix <= sure.plan.high))
    rate, moves = np.mean(covered, axis=0), np.asarray(truth.plan.matrix) > 0.01
    assert moves.sum() == 5, "the diagonal, and two flows"
    assert ((rate[moves] >= 0.8) & (rate[moves] <= 0.97)).all(), rate
