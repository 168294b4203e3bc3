"""What coupling has cost each mixture, against scikit-learn's EM from the same place, and moments by NumPy in float64."""

import jax
import numpy as np
import optax
import pytest
from sklearn.mixture import GaussianMixture

import coupled_gmm as cg
from coupled_gmm.fits import refits


def clusters(n=400, d=2, shift=1.0, seed=0):
    rng = np.random.RandomState(seed)
    x = np.concatenate([rng.randn(n, d), 6 + rng.randn(n // 2, d)])
    return x, np.concatenate([rng.randn(n, d) + shift, 6 + 1.5 * rng.randn(n, d)])


def coupled(xs, k, weight, **options):
    gmm = cg.fit_gmm(np.concatenate(xs), k, key=jax.random.key(0)).gmm
    return cg.fit_pair(*xs, cg.GaussianMixturePair(gmm, gmm), relative_weight=weight, em_steps=200, tol=1e-6, **options)


def refitted(gmm, x):
    """scikit-learn's mixture by EM from a mixture, and by how much its mean log-likelihood is above that one's."""
    gmm = cg.to_sklearn(gmm)
    twin = GaussianMixture(
        gmm.n_components,
        weights_init=gmm.weights_,
        means_init=gmm.means_,
        precisions_init=np.linalg.inv(gmm.covariances_),
        max_iter=500,
        tol=1e-7,
    )
    return twin.fit(x).score(x) - gmm.score(x)


def shifts(gmm, x):
    """How far the mean and the covariance of a mixture are from a cloud's, in its standard deviations."""
    means, covariances, weights = (np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    mean = weights @ means
    covariance = np.einsum("k,kij->ij", weights, covariances + np.einsum("ki,kj->kij", means - mean, means - mean))
    own, deviations = np.cov(x.T, bias=True).reshape(covariance.shape), x.std(axis=0)
    off = np.abs(covariance - own) / np.outer(deviations, deviations)
    return (np.abs(mean - x.mean(axis=0)) / deviations).max(), off.max()


@pytest.mark.parametrize(
    ("k", "d", "weight"),
    [(2, 2, 0.3), (2, 2, 3.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 1, 1.0), (1, 3, 1.0)])],
)
def test_against_twins(k, d, weight):
    xs = clusters(d=d)
    fit = coupled(xs, k, weight)
    for i, (gmm, x) in enumerate(zip((fit.pair.gmm0, fit.pair.gmm1), xs, strict=True)):
        np.testing.assert_allclose(fit.fidelity.loss[i], refitted(gmm, x), atol=1e-3)
        mean, covariance = shifts(gmm, x)
        np.testing.assert_allclose(fit.fidelity.mean_shift[i], mean, atol=1e-4)
        np.testing.assert_allclose(fit.fidelity.covariance_shift[i], covariance, atol=1e-4)
        np.testing.assert_allclose(fit.fidelity.log_likelihood[i], gmm.score(x), atol=1e-5)
        assert fit.fidelity.penalized_log_likelihood[i] <= fit.fidelity.log_likelihood[i]


def test_plain_em_has_lost_nothing():
    fit = coupled(clusters(), 2, 0.0)
    assert np.all(np.asarray(fit.fidelity.loss) < 1e-5)
    assert np.all(np.asarray(fit.fidelity.mean_shift) < 1e-4)
    assert np.all(np.asarray(fit.fidelity.covariance_shift) < 1e-4)
    assert "overruled" not in fit.message


def test_the_message_names_a_weight_that_costs_less():
    """At the weight that the message names the fit has lost no more than it says, and the message is silent."""
    xs = clusters()
    fit = coupled(xs, 2, 30.0)
    assert fit.fidelity.overruled.any()
    assert "converged: the tolerance was met; but the penalty has overruled the data" in fit.message
    assert fit.message in fit.summary()
    named = float(fit.message.split("relative_weight=")[1].split(")")[0])
    other = coupled(xs, 2, named)
    assert np.asarray(other.fidelity.loss).sum() <= 0.1
    assert "overruled" not in other.message


def test_mixtures_that_have_become_one():
    """Where all components are one, EM from there parts nothing: the refit goes on from the start, and finds what was lost."""
    xs = clusters()
    for weight in (100.0, 1e4):
        fit = coupled(xs, 2, weight)
        assert "gmm0 and gmm1 have become one mixture" in fit.message
        best = [GaussianMixture(2, n_init=5, random_state=0).fit(x).score(x) for x in xs]
        lost = np.array(best) - [gmm.score(x) for gmm, x in zip((fit.pair.gmm0, fit.pair.gmm1), xs, strict=True)]
        np.testing.assert_allclose(fit.fidelity.loss, lost, atol=0.01)


def test_graphs_with_frozen_nodes_and_nodes_without_points():
    xs = clusters()
    gmm = cg.fit_gmm(np.concatenate(xs), 2, key=jax.random.key(0)).gmm
    graph = cg.MixtureGraph.from_mixtures([gmm, gmm, gmm], [(0, 1), (1, 2)], frozen=[2])
    fit = cg.fit_graph([xs[0], None, xs[1]], graph, relative_weight=20.0)
    found = fit.fidelity
    assert np.isnan(found.loss[1]) and np.isnan(found.mean_shift[1])
    assert found.loss[2] == 0 and found.loss[0] > 0.1
    np.testing.assert_allclose(found.mean_shift[2], shifts(gmm, xs[1])[0], atol=1e-4)
    assert "coupling has cost node 0" in fit.message and "node 2 0" not in fit.message


@pytest.mark.slow
def test_batches_paths_maps_and_switches():
    xs = clusters()
    gmm = cg.fit_gmm(np.concatenate(xs), 2, key=jax.random.key(0)).gmm
    pair, options = cg.GaussianMixturePair(gmm, gmm), {"em_steps": 20}
    weights = [0.1, 30.0]
    alone = [cg.fit_pair(*xs, pair, relative_weight=weight, **options) for weight in weights]
    many = cg.fit_pairs([xs[0]] * 2, [xs[1]] * 2, pair, relative_weight=weights, **options)
    path = cg.fit_path(*xs, pair, relative_weights=weights, **options)
    mapped = jax.vmap(lambda weight: cg.fit_pair(*xs, pair, relative_weight=weight, **options))(np.array(weights))
    for i, fit in enumerate(alone):
        for other in (many[i], mapped[i]):
            for name in ("loss", "mean_shift", "covariance_shift", "log_likelihood"):
                np.testing.assert_allclose(
                    getattr(other.fidelity, name), getattr(fit.fidelity, name), atol=2e-4, err_msg=name
                )
            for one, twin in zip(other.fidelity.alone, fit.fidelity.alone, strict=True):
                np.testing.assert_allclose(one.means, twin.means, atol=1e-2)
    assert path.fidelity.loss.shape == (2, 2) and path.fidelity[0].loss.shape == (2,)
    for several in (many, path, mapped):
        assert "overruled the data in 1 of 2 fits" in several.message
    assert cg.fit_pair(*xs, pair, relative_weight=1.0, fidelity=False, **options).fidelity is None
    assert cg.fit_pairs(xs[:1], xs[1:], pair, relative_weight=1.0, fidelity=False, **options)[0].fidelity is None


@pytest.mark.slow
def test_far_from_zero_in_another_unit_and_in_float64():
    xs = clusters()
    plain = coupled(xs, 2, 3.0).fidelity
    with jax.enable_x64(True):
        fine = coupled(xs, 2, 3.0).fidelity
    far = coupled([1e-6 * (x + 1e4) for x in xs], 2, 3.0).fidelity
    for name in ("loss", "mean_shift", "covariance_shift"):
        np.testing.assert_allclose(getattr(plain, name), getattr(fine, name), atol=2e-4, err_msg=name)
        np.testing.assert_allclose(getattr(far, name), getattr(fine, name), atol=1e-3, err_msg=name)


def test_weights_of_points_and_files(tmp_path):
    """Points of weight zero count for nothing; a cloud in a file is told what one in memory is."""
    xs = clusters()
    gmm = cg.fit_gmm(np.concatenate(xs), 2, key=jax.random.key(0)).gmm
    pair, options = cg.GaussianMixturePair(gmm, gmm), {"relative_weight": 3.0, "em_steps": 8}
    plain = cg.fit_pair(*xs, pair, **options).fidelity
    more = np.concatenate([xs[0], np.full((50, 2), 100.0)])
    weighted = cg.fit_pair(more, xs[1], pair, point_weights0=np.repeat([2.0, 0.0], [600, 50]), **options).fidelity
    np.save(tmp_path / "x0.npy", xs[0].astype(np.float32))
    external = cg.fit_pair(cg.open_cloud(tmp_path / "x0.npy"), xs[1], pair, **options).fidelity
    for name in ("loss", "mean_shift", "covariance_shift"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(plain, name), atol=1e-4, err_msg=name)
        np.testing.assert_allclose(getattr(external, name), getattr(plain, name), atol=1e-4, err_msg=name)


def test_kept_in_files(tmp_path):
    fit = coupled(clusters(), 2, 3.0)
    cg.save(tmp_path / "fit.npz", fit)
    again = cg.load(tmp_path / "fit.npz")
    np.testing.assert_array_equal(again.fidelity.loss, fit.fidelity.loss)
    assert again.message == fit.message and again.relative_weight == fit.relative_weight


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_a_refit_begins_where_the_fit_ended_unless_two_components_are_one(unit):
    apart = cg.GaussianMixture.from_moments(unit * np.array([[0.0], [5.0]]), unit**2 * np.ones((2, 1, 1)), [0.5, 0.5])
    wide = cg.GaussianMixture.from_moments(np.zeros((2, 1)), unit**2 * np.array([[[1.0]], [[2.0]]]), [0.5, 0.5])
    near = cg.GaussianMixture.from_moments(
        unit * np.array([[0.0], [0.005]]), unit**2 * np.array([[[1.0]], [[1.005]]]), [0.5, 0.5]
    )
    for begin in (refits.beginning, jax.jit(refits.beginning)):
        for ended, started, expected in ((apart, near, apart), (wide, near, wide), (near, apart, apart)):
            jax.tree.map(np.testing.assert_array_equal, begin(ended, started), expected)


@pytest.mark.parametrize("kind", ["pair", *(pytest.param(one, marks=pytest.mark.slow) for one in ("graph", "batch"))])
def test_a_refit_compiles_nothing(kind):
    """It is the fit's own program, begun where that ended."""
    xs = clusters(n=60)
    gmm = cg.init_gmm(jax.random.key(0), np.concatenate(xs), 2)
    pair, options = cg.GaussianMixturePair(gmm, gmm), {"relative_weight": 1.0, "em_steps": 7, "m_steps": 9}
    call = {
        "pair": lambda **some: cg.fit_pair(*xs, pair, **options, **some),
        "graph": lambda **some: cg.fit_graph(xs, cg.chain([gmm, gmm]), **options, **some),
        "batch": lambda **some: cg.fit_pairs(xs[:1], xs[1:], pair, **options, **some)[0],
    }[kind]
    compiled, counting = [], False

    def listen(name, _, **__):
        if counting and "backend_compile" in name:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    call(fidelity=False)
    counting = True
    fit = call()
    counting = False
    assert not compiled and np.all(np.asarray(fit.fidelity.loss) > 0)


@pytest.mark.slow
def test_fits_by_an_optimiser_of_the_users_are_refitted_by_em():
    xs = clusters(n=200)
    options = {"optimizer": optax.adam, "learning_rate": 1e-2, "em_steps": 20}
    gmm = cg.fit_gmm(np.concatenate(xs), 2, key=jax.random.key(0)).gmm
    pair = cg.fit_pair(*xs, cg.GaussianMixturePair(gmm, gmm), relative_weight=1.0, **options)
    graph = cg.fit_graph(xs, cg.chain([gmm, gmm]), relative_weight=1.0, **options)
    path = cg.fit_path(*xs, cg.GaussianMixturePair(gmm, gmm), relative_weights=[1.0], **options)
    for fit, gmms in (
        (pair, [pair.pair.gmm0, pair.pair.gmm1]),
        (graph, graph.gmms),
        (path[0], [path[0].pair.gmm0, path[0].pair.gmm1]),
    ):
        for i, (one, x) in enumerate(zip(gmms, xs, strict=True)):
            np.testing.assert_allclose(fit.fidelity.loss[i], refitted(one, x), atol=1e-3)
            np.testing.assert_allclose(fit.fidelity.mean_shift[i], shifts(one, x)[0], atol=1e-4)
