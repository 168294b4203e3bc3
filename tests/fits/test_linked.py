"""Fits with links: forbidden ones carry nothing, pinned ones all that they are told to, and J never falls."""

import functools

import jax
import numpy as np
import optax
import pytest
from problems import points, random_mixture

import coupled_gmm as cg
from coupled_gmm.fits.linked import started_graph
from coupled_gmm.transport.links import shortage

# What coupling has cost is told in test_fidelity, and compiled there.
fit_pair = functools.partial(cg.fit_pair, fidelity=False)
fit_graph = functools.partial(cg.fit_graph, fidelity=False)

CENTRES = np.array([[0, 0], [4, 0], [0, 4], [4, 4]], float)
DIAGONAL = np.eye(4, dtype=bool)
PINNED = cg.links((4, 4), pinned=[(0, 0), (1, 1)])


def cloud(seed, counts, shift):
    rng = np.random.RandomState(seed)
    return np.concatenate([c + shift + 0.5 * rng.randn(n, 2) for n, c in zip(counts, CENTRES)])


CLOUDS = cloud(0, (80, 60, 40, 20), 0), cloud(1, (20, 60, 40, 80), 0.3)


def pair_of(links, weights=(0.1, 0.3, 0.2, 0.4), **kwargs):
    covariances = [0.3 * np.eye(2)] * 4
    gmm0 = cg.GaussianMixture.from_moments(CENTRES, covariances, [0.25] * 4)
    gmm1 = cg.GaussianMixture.from_moments(CENTRES + 0.4, covariances, weights)
    return cg.GaussianMixturePair(gmm0, gmm1, 0.05, links=links, **kwargs)


def check(fit, allowed):
    matrix, history = np.asarray(fit.plan.matrix), np.asarray(fit.history.penalized_log_likelihood)
    assert fit.status_name in ("converged", "steps done") and fit.plan.status_name == "converged", fit.message
    assert (matrix[~allowed] == 0).all() and abs(matrix.sum() - float(fit.plan.total_mass)) < 1e-6
    assert np.diff(history[: int(fit.n_steps)]).min(initial=0) > -1e-5
    value = cg.penalized_log_likelihood(fit.pair, *CLOUDS, transport_weight=0.1)
    np.testing.assert_allclose(float(fit.penalized_log_likelihood), float(value), atol=2e-5)


@pytest.mark.parametrize("rho", [np.inf, 0.5])
def test_a_fit_keeps_to_its_links(rho):
    """Balanced too, where the masses that it starts from are none that the links can carry."""
    for allowed in (DIAGONAL, np.triu(np.ones((4, 4), bool)), PINNED):
        fit = fit_pair(*CLOUDS, pair_of(allowed, rho=rho), transport_weight=0.1)
        check(fit, allowed)
        matrix = np.asarray(fit.plan.matrix)
        if allowed is DIAGONAL and np.isinf(rho):
            np.testing.assert_allclose(np.asarray(fit.pair.gmm0.weights), np.asarray(fit.pair.gmm1.weights), atol=2e-6)
        if allowed is PINNED:
            np.testing.assert_allclose(matrix[[0, 1], [0, 1]], matrix[:2].sum(1))


def test_masses_that_links_tie_are_those_that_both_clouds_ask_for():
    """One to one, at next to no weight: the mean of what each cloud asks for, whose potentials are 1e6 times epsilon."""
    fit = fit_pair(*CLOUDS, pair_of(DIAGONAL), transport_weight=1e-5, tol=1e-6)
    assert fit.status_name == "converged"
    for gmm in (fit.pair.gmm0, fit.pair.gmm1):
        np.testing.assert_allclose(np.asarray(gmm.weights), [0.25, 0.3, 0.2, 0.25], atol=2e-5)
    beyond = fit_pair(*CLOUDS, pair_of(DIAGONAL), transport_weight=1e-9, tol=1e-6)
    assert beyond.status_name == "plan not converged"  # and does not say that it has


def test_components_that_may_not_mix_are_not_merged():
    """At a weight at which all mixtures would be one Gaussian, what has no links stays apart and pays for it."""
    bound = fit_pair(*CLOUDS, pair_of(DIAGONAL, [0.25] * 4), transport_weight=1e3)
    assert np.ptp(np.asarray(bound.pair.gmm0.means), axis=0).max() > 2


@pytest.mark.slow
@pytest.mark.parametrize("rho", [np.inf, 0.5])
def test_what_links_take_and_leave(rho):
    """None of them gain over all of them, and all of them are none."""
    free, every, bound = (
        fit_pair(*CLOUDS, pair_of(links, rho=rho), transport_weight=0.1)
        for links in (None, np.ones((4, 4), bool), PINNED)
    )
    ends = [float(fit.penalized_log_likelihood) for fit in (free, every, bound)]
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-5)
    assert ends[2] <= ends[0] + 1e-5
    merged = fit_pair(*CLOUDS, pair_of(None, [0.25] * 4), transport_weight=1e3)
    assert np.ptp(np.asarray(merged.pair.gmm0.means), axis=0).max() < 0.1  # where `DIAGONAL` stays apart


def test_frozen_masses_that_links_cannot_carry_are_refused():
    with pytest.raises(ValueError, match="links can't carry"):
        fit_pair(*CLOUDS, pair_of(DIAGONAL), transport_weight=0.1, freeze=("gmm0", "gmm1"))
    pair = pair_of(DIAGONAL)
    fit = fit_pair(*CLOUDS, pair, transport_weight=0.1, freeze=("gmm1",))
    for gmm in (fit.pair.gmm0, fit.pair.gmm1):
        np.testing.assert_allclose(np.asarray(gmm.weights), np.asarray(pair.gmm1.weights), atol=2e-6)
    with pytest.raises(ValueError, match="n_init"):
        fit_pair(*CLOUDS, pair, transport_weight=0.1, n_init=2, key=jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [15, 58, *range(20, 30)])
def test_whatever_the_links_and_masses(seed):
    """Links in which masses fit at one point only, weights from 1e-3 to 10 over the costs: float32 ends as well as float64."""
    rng, k0, k1, d = np.random.RandomState(seed), 6 - 3 * (seed % 2 == 0), 5 - 2 * (seed % 2 == 0), 2 + seed // 2 % 2
    allowed = rng.rand(k0, k1) < 0.2
    allowed[np.arange(k0), rng.randint(k1, size=k0)] = True
    allowed[rng.randint(k0, size=k1), np.arange(k1)] = True
    gmms = [random_mixture(seed + 9 * i, k, d) for i, k in enumerate((k0, k1))]
    clouds = [points(random_mixture(seed + 5 + i, k, d), 300, i) for i, k in enumerate((k0, k1))]
    scale = float(np.mean(np.asarray(cg.bures_cost_matrix(*gmms))))
    epsilon, weight = scale * 10 ** rng.uniform(-3, -0.5), 10 ** rng.uniform(-3, 1) / scale
    ends = []
    for exactly in (False, True):
        with jax.enable_x64(exactly):
            sides = [
                cg.GaussianMixture.from_moments(*map(np.asarray, (g.means, g.covariances, g.weights))) for g in gmms
            ]
            fit = fit_pair(
                *clouds, cg.GaussianMixturePair(*sides, epsilon, links=allowed), transport_weight=weight, em_steps=25
            )
            assert fit.status_name == "steps done" and fit.plan.status_name == "converged"
            assert (np.asarray(fit.plan.matrix)[~allowed] == 0).all()
            ends.append(float(fit.penalized_log_likelihood))
    assert abs(ends[0] - ends[1]) < 0.05 * (1 + abs(ends[1])), ends


@pytest.mark.slow
def test_other_optimisers_keep_to_them_too():
    for kwargs in ({"optimizer": optax.adam, "learning_rate": 1e-2}, {"method": "sinkhorn"}):
        fit = fit_pair(*CLOUDS, pair_of(PINNED, rho=0.5), transport_weight=0.1, **kwargs)
        assert (np.asarray(fit.plan.matrix)[~PINNED] == 0).all()
        assert fit.status_name == "steps done" and fit.plan.status_name == "converged"


@pytest.mark.slow
def test_graphs_and_batches_keep_to_them_too():
    """Of mixtures of unequal size, with edges written either way, and beside edges without links."""
    three = cg.GaussianMixture.from_moments(CENTRES[:3], [0.3 * np.eye(2)] * 3, [0.4, 0.3, 0.3])
    pair = pair_of(PINNED, rho=0.5)
    allowed = cg.links((3, 4), forbidden=[(0, 0), (1, 2)])
    alone = fit_pair(*CLOUDS, pair, transport_weight=0.1)
    one = cg.MixtureGraph.from_mixtures(
        [pair.gmm0, pair.gmm1], [(1, 0)], edge_weights=0.1, epsilon=0.05, rho=0.5, links=[PINNED.T]
    )
    fit = fit_graph(CLOUDS, one)
    np.testing.assert_allclose(float(fit.penalized_log_likelihood), float(alone.penalized_log_likelihood), atol=1e-5)
    np.testing.assert_allclose(np.asarray(fit.plan((0, 1)).matrix), np.asarray(alone.plan.matrix), atol=1e-4)
    graph = cg.MixtureGraph.from_mixtures(
        [pair.gmm0, three, pair.gmm1],
        [(2, 1), (0, 2)],
        edge_weights=0.1,
        epsilon=0.05,
        rho=0.5,
        links=[allowed.T, None],
    )
    fit = fit_graph([CLOUDS[0], CLOUDS[1], CLOUDS[1]], graph)
    matrix = np.asarray(fit.plan((1, 2)).matrix)
    assert matrix.shape == (3, 4) and (matrix[~allowed] == 0).all() and matrix.sum() > 0.1
    assert np.asarray(fit.plan((0, 2)).matrix).min() >= 0
    other = cg.GaussianMixturePair(three, pair.gmm1, 0.05, rho=0.5, links=allowed)
    fits = cg.fit_pairs([CLOUDS[0]] * 3, [CLOUDS[1]] * 3, [pair, other, pair_of(None, rho=0.5)], transport_weight=0.1)
    assert (np.asarray(fits[0].plan.matrix)[~PINNED] == 0).all() and fits[2].pair.links is None
    assert (np.asarray(fits[1].plan.matrix)[~allowed] == 0).all()
    for fit, start in zip(fits, (pair, other), strict=False):
        by_itself = fit_pair(*CLOUDS, start, transport_weight=0.1)
        np.testing.assert_allclose(
            float(fit.penalized_log_likelihood), float(by_itself.penalized_log_likelihood), atol=1e-5
        )


def test_graphs_start_from_masses_that_links_can_carry():
    """On a tree, of nodes of unequal size; a frozen node keeps its own; circles are refused."""
    rng = np.random.RandomState(0)
    gmms = [random_mixture(seed, k, 1) for seed, k in enumerate((3, 4, 2, 3, 3))]
    edges = [(1, 0), (1, 2), (2, 3), (3, 4)]
    masks = [rng.rand(gmms[i].n_components, gmms[j].n_components) < 0.4 for i, j in edges]
    for mask in masks:
        mask[np.arange(len(mask)), rng.randint(mask.shape[1], size=len(mask))] = True
        mask[rng.randint(len(mask), size=mask.shape[1]), np.arange(mask.shape[1])] = True
    given = [np.asarray(gmm.weights) for gmm in gmms]
    assert max(shortage(mask, given[i], given[j])[0] for (i, j), mask in zip(edges, masks)) > 0.1
    for frozen in ((), (1,), (4,)):
        graph = cg.MixtureGraph.from_mixtures(gmms, edges, links=masks, frozen=frozen)
        found = [np.asarray(gmm.weights) for gmm in graph.split(started_graph(graph).nodes)]
        for (i, j), mask in zip(edges, masks, strict=True):
            assert shortage(mask, found[i], found[j])[0] < 1e-6
        for node, weights in enumerate(found):
            assert (weights >= 0).all() and abs(weights.sum() - 1) < 1e-6
            if node in frozen:
                np.testing.assert_array_equal(weights, given[node])
    for kwargs, more in (({"frozen": (0, 4)}, []), ({}, [(0, 4)])):
        links = [*masks, *([None] if more else [])]
        graph = cg.MixtureGraph.from_mixtures(gmms, [*edges, *more], links=links, **kwargs)
        with pytest.raises(ValueError, match=r"graph: the links of edge .* can't carry"):
            fit_graph([np.zeros((2, 1))] * 5, graph)
    tie = cg.MixtureGraph.from_mixtures(
        [gmms[0], gmms[3]], [(0, 1)], links=[np.eye(3, dtype=bool)], rho=[[1.0, np.inf]]
    )
    assert started_graph(tie) is tie  # one side's masses may change


@pytest.mark.slow
def test_a_chain_with_links_starts_and_climbs():
    middle = cg.GaussianMixture.from_moments(CENTRES + 0.2, [0.3 * np.eye(2)] * 4, [0.1, 0.2, 0.3, 0.4])
    pair = pair_of(DIAGONAL)
    graph = cg.MixtureGraph.from_mixtures(
        [pair.gmm0, middle, pair.gmm1], [(0, 1), (2, 1)], edge_weights=0.1, epsilon=0.05, links=[DIAGONAL, PINNED]
    )
    fit = fit_graph([CLOUDS[0], None, CLOUDS[1]], graph)
    assert fit.status_name == "steps done" and set(np.asarray(fit.plans.status).tolist()) == {0}
    assert (np.asarray(fit.plan(0).matrix)[~DIAGONAL] == 0).all()
    assert (np.asarray(fit.plan((2, 1)).matrix)[~PINNED] == 0).all()
    assert np.diff(np.asarray(fit.history.penalized_log_likelihood)).min() > -1e-5


@pytest.mark.slow
def test_what_goes_on_from_fits_keeps_to_their_links():
    graph = cg.MixtureGraph.from_mixtures(
        [pair_of(None).gmm0, pair_of(None).gmm1], [(0, 1)], edge_weights=0.1, epsilon=0.05, links=[DIAGONAL]
    )
    fit = fit_graph(CLOUDS, graph)
    sure = cg.bootstrap(jax.random.key(0), fit, CLOUDS, graph=graph, n_replicates=4)
    assert (np.asarray(sure.plan.samples)[..., ~DIAGONAL] == 0).all()
    np.testing.assert_allclose(np.asarray(sure.plan.samples).sum((-1, -2)), 1, atol=1e-5)
    chosen = cg.choose(CLOUDS, graph, relative_weights=[0.0, 0.1], folds=2).fit
    assert (np.asarray(chosen.plans.matrix)[:, ~DIAGONAL] == 0).all()
    for name, call in (
        ("n_components", lambda key: cg.choose(CLOUDS, graph, n_components=2, key=key)),
        ("n_init", lambda key: fit_graph(CLOUDS, graph, n_init=2, key=key)),
    ):
        with pytest.raises(ValueError, match=f"{name}: draws components in no order"):
            call(jax.random.key(0))
