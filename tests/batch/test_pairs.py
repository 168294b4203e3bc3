"""`fit_pairs` beside `fit_pair`, pair by pair."""

import dataclasses

import jax
import numpy as np
import pytest
from tasks import Losing

import coupled_gmm as cg
from coupled_gmm.batch import stacks
from coupled_gmm.core.status import Status

OPTIONS = {"transport_weight": 0.05, "em_steps": 25, "tol": 1e-5, "fidelity": False}


def problem(seed, n, k, d=2, offset=0.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    clouds = []
    for size, count in zip(n, k):
        centres = 4 * rng.normal(size=(count, d))
        clouds.append((offset + centres[rng.integers(count, size=size)] + rng.normal(size=(size, d))).astype(dtype))
    gmms = [
        cg.GaussianMixture.from_moments(cloud[:count], np.tile(np.eye(d), (count, 1, 1)), np.full(count, 1 / count))
        for cloud, count in zip(clouds, k)
    ]
    return clouds, gmms


def check_same(fit, alone, rtol=1e-4):
    assert jax.tree.structure(fit) == jax.tree.structure(alone)
    assert [leaf.shape for leaf in jax.tree.leaves(fit)] == [leaf.shape for leaf in jax.tree.leaves(alone)]
    assert [leaf.dtype for leaf in jax.tree.leaves(fit)] == [leaf.dtype for leaf in jax.tree.leaves(alone)]
    np.testing.assert_allclose(fit.penalized_log_likelihood, alone.penalized_log_likelihood, rtol=rtol)
    np.testing.assert_allclose(fit.log_likelihoods, alone.log_likelihoods, rtol=rtol)
    assert bool(fit.plan.converged) == bool(alone.plan.converged)


@pytest.fixture(scope="module")
def cohort():
    """Ragged pairs of two sizes of mixtures, one of them unbalanced, one with a component without mass."""
    sizes = [((40, 700), (2, 2)), ((300, 300), (3, 2)), ((1100, 90), (2, 3)), ((400, 650), (9, 8)), ((256, 31), (2, 2))]
    made = [problem(seed, n, k) for seed, (n, k) in enumerate(sizes)]
    starts = [cg.GaussianMixturePair(*gmms, epsilon=0.1) for _, gmms in made]
    starts[1] = cg.GaussianMixturePair(*made[1][1], epsilon=0.1, rho=2.0)
    one, other = made[4][1]
    starts[4] = cg.GaussianMixturePair(
        one, cg.GaussianMixture.from_moments(other.means, other.covariances, [1.0, 0.0]), 0.1
    )
    return [clouds[0] for clouds, _ in made], [clouds[1] for clouds, _ in made], starts


def test_each_is_what_fit_pair_returns(cohort, tmp_path):
    weights = [None, np.random.default_rng(0).random(300) * (np.arange(300) > 20), None, None, None]
    rows = []
    fits = cg.fit_pairs(*cohort, point_weights0=weights, progress=rows.append, **OPTIONS)
    assert len(fits) == 5 and fits.status.shape == fits.penalized_log_likelihood.shape == fits.n_steps.shape == (5,)
    assert rows[-1]["done"] == rows[-1]["of"]
    for i, (fit, x0, x1, pair, w) in enumerate(zip(fits, *cohort, weights)):
        alone = cg.fit_pair(x0, x1, pair, point_weights0=w, **OPTIONS)
        check_same(fit, alone)
        assert fit.pair.balanced == pair.balanced
        assert float(fits.penalized_log_likelihood[i]) == float(fit.penalized_log_likelihood)
        assert int(fits.status[i]) == int(fit.status) and int(fits.n_steps[i]) == int(fit.n_steps)
    assert "5 pairs" in repr(fits) and fits.status_name and not fits.reason(0)
    cg.save(tmp_path / "fits.npz", fits)
    again = cg.load(tmp_path / "fits.npz")
    assert jax.tree.structure(again) == jax.tree.structure(fits)
    assert all(np.array_equal(*both, equal_nan=True) for both in zip(jax.tree.leaves(again), jax.tree.leaves(fits)))


@pytest.mark.slow
def test_far_clouds_in_float64_and_fits_in_float64():
    made = [problem(seed, (200, 150), (2, 2), offset=1e5, dtype=np.float64) for seed in range(2)]
    clouds = [clouds[0] for clouds, _ in made], [clouds[1] for clouds, _ in made]
    starts = [cg.GaussianMixturePair(*gmms, epsilon=0.1) for _, gmms in made]
    for fit, x0, x1, pair in zip(cg.fit_pairs(*clouds, starts, **OPTIONS), *clouds, starts):
        check_same(fit, cg.fit_pair(x0, x1, pair, **OPTIONS))
    with jax.enable_x64(True):
        made = [problem(seed, (200, 150), (2, 2), dtype=np.float64) for seed in range(2)]
        clouds = [clouds[0] for clouds, _ in made], [clouds[1] for clouds, _ in made]
        starts = [cg.GaussianMixturePair(*gmms, epsilon=0.1) for _, gmms in made]
        for fit, x0, x1, pair in zip(cg.fit_pairs(*clouds, starts, **OPTIONS), *clouds, starts):
            check_same(fit, cg.fit_pair(x0, x1, pair, **OPTIONS), rtol=1e-9)


def test_one_start_for_all_weights_for_each_and_a_frozen_side():
    (clouds, gmms), (others, _) = problem(0, (100, 80), (2, 2)), problem(1, (70, 90), (2, 2))
    pair, weights = cg.GaussianMixturePair(*gmms, epsilon=0.1), [0.0, 0.5]
    options = OPTIONS | {"freeze": ["gmm0"]}
    fits = cg.fit_pairs(
        [clouds[0], others[0]], [clouds[1], others[1]], pair, **(options | {"transport_weight": weights})
    )
    for fit, (x0, x1), weight in zip(fits, (clouds, others), weights):
        check_same(fit, cg.fit_pair(x0, x1, pair, **(options | {"transport_weight": weight})))
        assert np.array_equal(fit.pair.gmm0.means, pair.gmm0.means)


def test_more_pairs_than_lanes_share_one_program():
    made = [problem(seed, (30 + seed, 60 - seed), (2, 2)) for seed in range(21)]
    clouds = [clouds[0] for clouds, _ in made], [clouds[1] for clouds, _ in made]
    starts = [cg.GaussianMixturePair(*gmms, epsilon=0.1) for _, gmms in made]
    before = stacks._fits._cache_size()
    fits = cg.fit_pairs(*clouds, starts, **OPTIONS)
    assert stacks._fits._cache_size() <= before + 1
    again = cg.fit_pairs(*(some[::-1] for some in (*clouds, starts)), **OPTIONS)  # the order says nothing
    np.testing.assert_allclose(fits.penalized_log_likelihood, again.penalized_log_likelihood[::-1], rtol=1e-5)
    for i in (0, 20):
        check_same(fits[i], cg.fit_pair(clouds[0][i], clouds[1][i], starts[i], **OPTIONS))


def test_an_executor_gives_the_same_and_what_it_loses_is_marked(cohort, tmp_path):
    alone = cg.fit_pairs(*cohort, **OPTIONS)
    with Losing(2) as pool, pytest.warns(UserWarning, match="a worker died"):
        fits = cg.fit_pairs(*cohort, executor=pool, **OPTIONS)
    lost = np.asarray(fits.status) == Status.LOST
    assert 0 < lost.sum() < 5
    for i, (fit, other) in enumerate(zip(fits, alone)):
        if lost[i]:
            assert fits.reason(i) == "a worker died" and np.isnan(fit.penalized_log_likelihood)
            assert jax.tree.structure(fit) == jax.tree.structure(other)
            assert np.array_equal(fit.pair.gmm0.means, cohort[2][i].gmm0.means)
            with pytest.raises(cg.FitError, match="the executor lost it"):
                fit.raise_if_failed()
        else:
            assert fits.reason(i) == ""
            check_same(fit, other)
    with pytest.raises(cg.FitError):
        fits.raise_if_failed()
    cg.save(tmp_path / "fits.npz", fits)
    assert cg.load(tmp_path / "fits.npz").reasons == fits.reasons
    wrong = dataclasses.replace(fits, places=fits.places + 3)
    with pytest.raises(ValueError, match="places: names a row that is in no part"):
        cg.save(tmp_path / "wrong.npz", wrong)


def test_refusals_name_the_pair():
    (clouds, gmms) = problem(0, (30, 30), (2, 2))
    pair, x = cg.GaussianMixturePair(*gmms, epsilon=0.1), clouds[0]
    bad = x.copy()
    bad[3, 1] = np.nan
    for arguments, options, named in (
        (([], [], pair), {}, "clouds0: the list is empty"),
        (([x], [x, x], pair), {}, "clouds1: expected one for each of the 1"),
        (([x, x], [x, bad], pair), {}, r"clouds1\[1\]: 1 of 60 values"),
        (([x, x], [x, x[:, :1]], pair), {}, r"clouds1\[1\]"),
        (([x], [x], [pair, pair]), {}, "pairs: expected one for each"),
        (([x, x], [x, x], [pair, 3]), {}, r"pairs\[1\]"),
        (([x], [x], pair), {"transport_weight": [1.0, 2.0]}, "transport_weight"),
        (([x], [x], pair), {"transport_weight": -1.0}, "transport_weight"),
        (([x], [x], pair), {"tol": [1e-5]}, "tol: expected one number"),
        (([x], [x], pair), {"point_weights1": [[1.0]]}, r"point_weights1\[0\]"),
        (([x], [x], pair), {"freeze": ["gmm2"]}, "freeze"),
        (([x], [x], pair), {"freeze": 3}, "freeze: expected a collection"),
        (([x], [x], pair), {"executor": 3}, "executor"),
    ):
        with pytest.raises((ValueError, TypeError), match=named):
            cg.fit_pairs(*arguments, **(OPTIONS | options))
