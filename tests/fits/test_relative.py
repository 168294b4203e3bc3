"""Weights without a unit: the same fit in metres and in millimetres, whatever the origin and the order of the features."""

import jax
import numpy as np
import pytest
from problems import DATA

import coupled_gmm as cg

OPTIONS = {"em_steps": 200, "tol": 1e-6}


def clouds():
    data = np.load(DATA / "ott_tutorial.npz")
    return [np.asarray(data[name][:1000], np.float64) for name in ("x0", "x1")]


def variance(*xs):
    return np.mean([x.var(axis=0).mean() for x in xs])


def start(xs, k=3):
    return cg.fit_gmm(np.concatenate(xs), k, key=jax.random.key(0)).gmm


def fitted(xs, gmm, weight=0.1, **options):
    pair = cg.GaussianMixturePair(gmm, gmm, relative_epsilon=0.02, relative_rho=options.pop("relative_rho", None))
    return cg.fit_pair(*xs, pair, relative_weight=weight, **OPTIONS, **options)


@pytest.mark.parametrize("rho", [None, 0.5])
def test_units_origins_and_the_order_of_features(rho):
    xs = clouds()
    plain = fitted(xs, start(xs), relative_rho=rho)
    assert plain.converged
    np.testing.assert_allclose(plain.relative_weight, 0.1, rtol=1e-5)
    np.testing.assert_allclose(plain.transport_weight, 0.1 / variance(*xs), rtol=1e-5)
    for unit, shift, order in ((1e-3, 0, [0, 1]), (1e3, 0, [1, 0]), (1, 1e3, [0, 1]), (1e12, -1e3, [1, 0])):
        other = [(x * [1, 1] + shift * xs[0].std())[:, order] * unit for x in xs]
        fit = fitted(other, start(other), relative_rho=rho)
        d_volume = 2 * len(order) * np.log(unit)
        np.testing.assert_allclose(fit.penalized_log_likelihood + d_volume, plain.penalized_log_likelihood, atol=1e-4)
        matched = [
            int(np.argmin(np.abs(np.asarray(fit.pair.gmm0.weights) - w))) for w in np.asarray(plain.pair.gmm0.weights)
        ]
        for mine, theirs in ((fit.pair.gmm0, plain.pair.gmm0), (fit.pair.gmm1, plain.pair.gmm1)):
            np.testing.assert_allclose(mine.weights[np.array(matched)], theirs.weights, atol=1e-3)
        np.testing.assert_allclose(fit.fidelity.loss, plain.fidelity.loss, atol=1e-4)
        np.testing.assert_allclose(fit.fidelity.mean_shift, plain.fidelity.mean_shift, atol=1e-3)


@pytest.mark.slow
def test_every_coupled_fit_takes_it():
    """A pair, a graph, a path and a batch with relative weights are those with the product of weight and variance."""
    xs = clouds()
    gmm, absolute = start(xs), 0.2 / variance(*xs)
    pair = cg.GaussianMixturePair(gmm, gmm)
    known = cg.fit_pair(*xs, pair, transport_weight=absolute, **OPTIONS)
    graph = cg.fit_graph(xs, cg.MixtureGraph.from_mixtures([gmm, gmm], [(0, 1)]), relative_weight=0.2, **OPTIONS)
    path = cg.fit_path(*xs, pair, relative_weights=[0.2], **OPTIONS)
    many = cg.fit_pairs(xs[:1], xs[1:], pair, relative_weight=0.2, **OPTIONS)
    for fit in (cg.fit_pair(*xs, pair, relative_weight=0.2, **OPTIONS), path[0], many[0]):
        np.testing.assert_allclose(fit.penalized_log_likelihood, known.penalized_log_likelihood, atol=2e-5)
        np.testing.assert_allclose([fit.relative_weight, fit.transport_weight], [0.2, absolute], rtol=1e-5)
    np.testing.assert_allclose(graph.penalized_log_likelihood, known.penalized_log_likelihood, atol=2e-5)
    np.testing.assert_allclose(graph.relative_weights, [0.2], rtol=1e-5)
    value = cg.penalized_log_likelihood(known.pair, *xs, relative_weight=0.2)
    np.testing.assert_allclose(value, known.penalized_log_likelihood, atol=1e-4)
    assert "relative 0.2" in known.summary()


def test_edges_keep_their_proportions_and_points_their_weights():
    xs = [*clouds(), clouds()[0] + 1]
    gmm = start(xs)
    w = np.random.RandomState(0).rand(1000) + 0.1
    graph = cg.MixtureGraph.from_mixtures([gmm] * 3, [(0, 1), (1, 2)], edge_weights=[1.0, 3.0])
    fit = cg.fit_graph(xs, graph, relative_weight=0.1, point_weights=[w, None, None], em_steps=3)
    mean = w @ xs[0] / w.sum()
    variances = [(w @ (xs[0] - mean) ** 2 / w.sum()).mean(), xs[1].var(0).mean(), xs[2].var(0).mean()]
    np.testing.assert_allclose(fit.edge_weights, 0.1 * np.array([1, 3]) / np.mean(variances), rtol=1e-5)
    np.testing.assert_allclose(fit.relative_weights, [0.1, 0.3], rtol=1e-5)


@pytest.mark.slow
def test_under_transformations():
    xs = clouds()
    gmm = start(xs)
    pair = cg.GaussianMixturePair(gmm, gmm)

    def fit(x0):
        return cg.fit_pair(x0, xs[1].astype(np.float32), pair, relative_weight=0.1, em_steps=4)

    many = jax.vmap(fit)(np.stack([xs[0], xs[0] * 2]).astype(np.float32))
    for i, scale in enumerate((1, 2)):
        alone = fit(xs[0] * scale)
        np.testing.assert_allclose(many[i].transport_weight, alone.transport_weight, rtol=1e-5)
        np.testing.assert_allclose(many[i].penalized_log_likelihood, alone.penalized_log_likelihood, atol=1e-4)
        np.testing.assert_allclose(many[i].fidelity.loss, alone.fidelity.loss, atol=1e-4)


def test_relative_epsilon_and_rho_are_parts_of_the_mean_cost():
    one, other = (cg.GaussianMixture.from_moments([[0.0], [m]], [[[1.0]], [[1.0]]], [0.5, 0.5]) for m in (3, 5))
    cost = float(np.asarray(cg.bures_cost_matrix(one, other)).mean())
    pair = cg.GaussianMixturePair(one, other, relative_epsilon=0.05, relative_rho=(2.0, np.inf))
    np.testing.assert_allclose(pair.epsilon, 0.05 * cost, rtol=1e-5)
    np.testing.assert_allclose(pair.rho, [2 * cost, np.inf], rtol=1e-5)
    assert cg.GaussianMixturePair(one, other, relative_rho=np.inf).balanced
    edges = [(0, 1), (1, 2)]
    graph = cg.MixtureGraph.from_mixtures([one, other, one], edges, relative_epsilon=[0.1, 0.2], relative_rho=3.0)
    np.testing.assert_allclose(graph.epsilon, [0.1 * cost, 0.2 * cost], rtol=1e-5)
    np.testing.assert_allclose(graph.rho, [3 * cost] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "^transport_weight: is missing; pass relative_weight"),
        ({"transport_weight": 1.0, "relative_weight": 1.0}, "^transport_weight: given beside relative_weight"),
        ({"relative_weight": -1.0}, "^relative_weight: must be finite and at least 0"),
        ({"relative_weight": 1.0, "x": np.ones((1, 1))}, "^relative_weight: every cloud is one point"),
        (
            {"relative_weight": 1e-30, "x": np.array([[0.0], [1e15]])},
            "^relative_weight: .*float32 can't hold; divide the data",
        ),
    ],
)
def test_refused_by_name(given, message):
    gmm = cg.GaussianMixture.from_moments([[0.0], [1.0]], [[[1.0]], [[1.0]]], [0.5, 0.5])
    x = given.pop("x", np.arange(4.0)[:, None])
    with pytest.raises(ValueError, match=message):
        cg.fit_pair(x, x, cg.GaussianMixturePair(gmm, gmm), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": 1.0, "relative_epsilon": 0.1}, "^relative_epsilon: given beside epsilon"),
        ({"rho": 1.0, "relative_rho": 0.1}, "^relative_rho: given beside rho or tau"),
        ({"tau": 0.9, "relative_rho": 0.1}, "^relative_rho: given beside rho or tau"),
        ({"relative_epsilon": 0.0}, "^relative_epsilon: must be finite and above 0"),
        ({"relative_rho": -1.0}, "^relative_rho: must be above 0"),
    ],
)
def test_prices_refused_by_name(given, message):
    gmm = cg.GaussianMixture.from_moments([[0.0], [1.0]], [[[1.0]], [[1.0]]], [0.5, 0.5])
    with pytest.raises(ValueError, match=message):
        cg.GaussianMixturePair(gmm, gmm, **given)
    with pytest.raises(ValueError, match=message):
        cg.MixtureGraph.from_mixtures([gmm, gmm], [(0, 1)], **given)
