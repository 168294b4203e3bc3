"""`fit_gmms` and `init_gmms` beside `fit_gmm` and `init_gmm`, cloud by cloud; and closed forms of NumPy."""

import pickle

import jax
import numpy as np
import pytest
from tasks import Losing

import coupled_gmm as cg
from coupled_gmm.batch import executors, mixtures, pairs, stacks
from coupled_gmm.core.status import Status


def cloud(seed, n, k, d=2, offset=0.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    centres = 4 * rng.normal(size=(k, d))
    return (offset + centres[rng.integers(k, size=n)] + rng.normal(size=(n, d))).astype(dtype)


def start(x, k):
    """At its first points, poor enough for some tens of steps."""
    eyes = np.broadcast_to(np.eye(x.shape[1]), (k, x.shape[1], x.shape[1]))
    return cg.GaussianMixture.from_moments(x[:k], eyes, np.full(k, 1 / k))


def check_same(fit, alone, rtol=1e-5):
    assert jax.tree.structure(fit) == jax.tree.structure(alone)
    assert [leaf.shape for leaf in jax.tree.leaves(fit)] == [leaf.shape for leaf in jax.tree.leaves(alone)]
    assert [leaf.dtype for leaf in jax.tree.leaves(fit)] == [leaf.dtype for leaf in jax.tree.leaves(alone)]
    np.testing.assert_allclose(fit.log_likelihood, alone.log_likelihood, rtol=rtol)
    np.testing.assert_allclose(fit.penalized_log_likelihood, alone.penalized_log_likelihood, rtol=rtol)
    assert int(fit.status) == int(alone.status)
    assert float(fit.statistics.mass) == float(alone.statistics.mass)
    for name in ("masses", "entropy", "means", "scatters"):
        one, other = getattr(fit.statistics, name), getattr(alone.statistics, name)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(other).max(), err_msg=name)


def same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(np.array_equal(*both, equal_nan=True) for both in zip(jax.tree.leaves(one), jax.tree.leaves(other)))


@pytest.fixture(scope="module")
def cohort():
    """Ragged clouds, mixtures of three groups of sizes, one with a component without mass."""
    clouds = [cloud(seed, n, 3) for seed, n in enumerate((40, 700, 1100, 31, 300, 256, 90))]
    inits = [start(x, k) for x, k in zip(clouds, (2, 3, 9, 1, 2, 8, 2))]
    inits[4] = cg.GaussianMixture.from_moments(inits[4].means, inits[4].covariances, [1.0, 0.0])
    return clouds, inits


def test_each_is_what_fit_gmm_returns(cohort, tmp_path):
    clouds, inits = cohort
    weights = [None] * 7
    weights[1] = np.random.default_rng(0).random(700) * (np.arange(700) > 20)
    rows = []
    fits = cg.fit_gmms(clouds, inits, point_weights=weights, progress=rows.append)
    assert len(fits) == 7 and rows[-1]["done"] == rows[-1]["of"]
    for name in ("status", "log_likelihood", "penalized_log_likelihood", "n_steps"):
        assert getattr(fits, name).shape == (7,)
        assert [float(v) for v in getattr(fits, name)] == [float(getattr(fit, name)) for fit in fits]
    for fit, x, init, w in zip(fits, clouds, inits, weights):
        check_same(fit, cg.fit_gmm(x, init, point_weights=w))
    assert "7 clouds" in repr(fits) and fits.status_name and not fits.reason(0)
    assert int(fits[-1].n_steps) == int(fits.n_steps[6]) > 1
    with pytest.raises(IndexError):
        fits[7]
    first, third = fits[:4:2]
    same_bits(first, fits[0])
    same_bits(third, fits[2])
    for gmm, fit in zip(fits.gmms, fits, strict=True):
        same_bits(gmm, fit.gmm)
    cg.save(tmp_path / "fits.npz", fits)
    same_bits(cg.load(tmp_path / "fits.npz"), fits)


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("exactly", [False, True])
def test_one_component_is_the_moments_of_the_points(d, exactly):
    with jax.enable_x64(exactly):
        clouds = [cloud(seed, n, 2, d, 1e3, np.float64) for seed, n in enumerate((50, 300))]
        weights = [np.random.default_rng(0).random(50), None]
        fits = cg.fit_gmms(clouds, cg.init_gmms(jax.random.key(0), clouds, 1), point_weights=weights, ridge=1e-9)
        for fit, x, w in zip(fits, clouds, weights):
            rtol = 1e-8 if exactly else 2e-5
            np.testing.assert_allclose(fit.gmm.means[0], np.average(x, axis=0, weights=w), rtol=1e-6)
            covariance = np.cov(x.T, aweights=w, ddof=0).reshape(d, d)
            np.testing.assert_allclose(fit.gmm.covariances[0], covariance, rtol=rtol, atol=rtol * covariance.max())


@pytest.mark.slow
def test_far_clouds_and_fits_in_float64():
    for exactly in (False, True):
        with jax.enable_x64(exactly):
            clouds = [cloud(seed, 150, 2, offset=1e5, dtype=np.float64) for seed in range(2)]
            inits = [start(x, 2) for x in clouds]
            for fit, x, init in zip(cg.fit_gmms(clouds, inits), clouds, inits):
                check_same(fit, cg.fit_gmm(x, init), rtol=1e-9 if exactly else 1e-5)


def test_one_start_for_all_and_more_clouds_than_lanes_share_one_program(cohort):
    clouds, init = [cloud(seed, 30 + 3 * seed, 2) for seed in range(20)], start(cohort[0][0], 2)
    before = stacks._fits._cache_size()
    fits = cg.fit_gmms(clouds, init, tol=0, max_steps=7)
    assert stacks._fits._cache_size() <= before + 1
    assert fits.status_name == "20 steps done" and set(np.asarray(fits.n_steps)) == {7}
    check_same(fits[19], cg.fit_gmm(clouds[19], init, tol=0, max_steps=7))
    turned = cg.fit_gmms(clouds[::-1], init, tol=0, max_steps=7)  # the order says nothing
    np.testing.assert_allclose(fits.log_likelihood, turned.log_likelihood[::-1], rtol=1e-6)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_starts_are_those_of_init_gmm_to_the_bit(n_threads, monkeypatch):
    monkeypatch.setattr(executors, "threads", lambda: n_threads)
    clouds, sizes = [cloud(seed, n, 3) for seed, n in enumerate((40, 300, 90, 50))], [2, 2, 1, 2]
    weights = [None, np.arange(300) % 3, None, None]
    key, rows = jax.random.key(3), []
    gmms = cg.init_gmms(key, clouds, sizes, point_weights=weights, n_init=2, progress=rows.append)
    assert rows[-1]["done"] == rows[-1]["of"] == 4
    for i, gmm in enumerate(gmms):
        each = jax.random.fold_in(key, i)
        same_bits(gmm, cg.init_gmm(each, clouds[i], sizes[i], point_weights=weights[i], n_init=2))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(gmm))
    same_bits(cg.init_gmms(key, clouds[:2], 2, point_weights=weights[:2], n_init=2), gmms[:2])


def test_what_an_executor_loses_is_marked_with_its_reason(cohort, tmp_path):
    clouds, inits = cohort
    with Losing(2) as pool, pytest.warns(UserWarning, match="a worker died"):
        fits = cg.fit_gmms(clouds, inits, executor=pool)
    lost = np.asarray(fits.status) == Status.LOST
    assert 0 < lost.sum() < 7
    for i, (fit, x, init) in enumerate(zip(fits, clouds, inits)):
        alone = cg.fit_gmm(x, init)
        if lost[i]:
            assert fits.reason(i) == "a worker died" and np.isnan(fit.log_likelihood)
            assert jax.tree.structure(fit) == jax.tree.structure(alone)
            same_bits(fit.gmm, init)
            with pytest.raises(cg.FitError, match="the executor lost it"):
                fit.raise_if_failed()
        else:
            assert not fits.reason(i)
            check_same(fit, alone)
    cg.save(tmp_path / "fits.npz", fits)
    assert cg.load(tmp_path / "fits.npz").reasons == fits.reasons


def test_what_is_lost_of_far_clouds_has_the_structure_of_a_fit():
    x = cloud(0, 60, 2, offset=1e5, dtype=np.float64)
    with Losing(1) as pool, pytest.warns(UserWarning, match="a worker died"):
        (fit,) = cg.fit_gmms([x], start(x, 2), executor=pool)
    assert jax.tree.structure(fit) == jax.tree.structure(cg.fit_gmm(x, start(x, 2), max_steps=2))


def test_clouds_that_are_not_in_memory_are_refused_by_name_and_give_starts(tmp_path):
    x = cloud(0, 60, 2)
    np.save(tmp_path / "x.npy", x)
    away, pair = cg.open_cloud(tmp_path / "x.npy"), cg.GaussianMixturePair(start(x, 2), start(x, 2), 1.0)
    with pytest.raises(ValueError, match=r"^clouds\[1\]: expected points in memory, .*fit_gmm takes it"):
        cg.fit_gmms([x, away], start(x, 2))
    with pytest.raises(ValueError, match=r"^clouds1\[0\]: expected points in memory, .*fit_pair takes it"):
        cg.fit_pairs([x], [away], pair, transport_weight=0.1)
    key = jax.random.key(0)
    (gmm,) = cg.init_gmms(key, [away], 2, n_init=2)
    same_bits(gmm, cg.init_gmm(jax.random.fold_in(key, 0), away, 2, n_init=2))


def test_what_is_fitted_can_be_told_to_another_process():
    for kind in (mixtures._KIND, pairs._KIND):
        assert pickle.loads(pickle.dumps(kind)) == kind
