"""Densities and scores of clouds that are not in memory, beside the same points in memory and SciPy's of them."""

import os
import subprocess
import sys

import dask.array as da
import dask.config
import jax
import numpy as np
import polars as pl
import pytest
import scipy.special
import scipy.stats
from problems import ROOT, points, random_mixture

import coupled_gmm as cg

K, D, N = 3, 2, 2500
METHODS = ("log_prob", "log_posterior", "predict", "component_log_prob")
CRITERIA = ("score", "bic", "aic")


def scipy_log_prob(gmm, x):
    """In float64."""
    means, covariances, weights = (np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    each = [scipy.stats.multivariate_normal(m, s).logpdf(x).reshape(-1) for m, s in zip(means, covariances)]
    return scipy.special.logsumexp(np.stack(each, axis=1), b=weights, axis=1)


@pytest.fixture
def opened(tmp_path):
    """A cloud (n, d) as one that is not in memory."""

    def opened(x, chunk_size=None, weights=None):
        place = tmp_path / str(
            len(list(tmp_path.iterdir()))
        )  # a file that changes is no longer the cloud that was opened
        place.mkdir()
        np.save(place / "cloud.npy", x)
        return cg.open_cloud(place / "cloud.npy", chunk_size=chunk_size, weights=weights)

    return opened


def test_values_are_those_of_points_in_memory(opened, precision):
    """Bit for bit, where chunks are as long as those of the whole; by SciPy in float64."""
    gmm = random_mixture(0, K, D)
    x = points(gmm, N).astype(gmm.dtype)
    for size, exactly in ((1024, True), (N, True), (999, False), (7, False)):
        cloud = opened(x if size != 7 else x[:40], size)
        for name in METHODS:
            expected, found = getattr(gmm, name)(x[: len(cloud)]), getattr(gmm, name)(cloud)
            assert isinstance(found, jax.Array) and (found.dtype, found.shape) == (expected.dtype, expected.shape)
            if exactly or name == "predict":
                np.testing.assert_array_equal(found, expected)
            else:
                np.testing.assert_allclose(found, expected, rtol=10 * precision, atol=10 * precision)
        exact = scipy_log_prob(gmm, x[: len(cloud)])
        np.testing.assert_allclose(gmm.log_prob(cloud), exact, rtol=50 * precision, atol=50 * precision)
        for name in CRITERIA:
            np.testing.assert_allclose(getattr(gmm, name)(cloud), getattr(gmm, name)(x[: len(cloud)]), rtol=1e-6)


def test_the_smallest_clouds_and_mixtures(opened):
    """One point, one feature, one component; a component of weight zero, which may be singular."""
    for k, d in ((1, 1), (3, 1), (1, 3)):
        gmm = random_mixture(1, k, d)
        x = points(gmm, 5).astype(np.float32)
        np.testing.assert_allclose(gmm.log_prob(opened(x, 2)), scipy_log_prob(gmm, x), rtol=1e-5)
        assert gmm.log_prob(opened(x[:1])).shape == (1,)
        np.testing.assert_allclose(gmm.score(opened(x, 2)), scipy_log_prob(gmm, x).mean(), rtol=1e-5)
    gmm = cg.GaussianMixture.from_moments([[0.0], [9.0]], [[[1.0]], [[0.0]]], [1, 0])
    cloud = opened(np.array([[0.0], [9.0]], np.float32), 1)
    np.testing.assert_allclose(gmm.log_prob(cloud), scipy.stats.norm.logpdf([0, 9]), rtol=1e-6)
    np.testing.assert_array_equal(gmm.predict(cloud), [0, 0])
    assert np.isneginf(np.asarray(gmm.log_posterior(cloud))[:, 1]).all()


def test_files_of_float64_meet_a_mixture_of_float32_far_from_0(opened):
    """They are moved before they are rounded: 1e6 standard deviations away a float32 would hold one digit."""
    shift = 1e6
    near, far = (random_mixture(2, K, D, shift=s, condition=10) for s in (0.0, shift))
    assert far.remainders is not None
    x = points(near, 600)
    found = far.log_prob(opened(x + shift, 128))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, scipy_log_prob(near, x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(far.score(opened(x + shift, 128)), scipy_log_prob(near, x).mean(), rtol=1e-6)


def test_a_badly_conditioned_mixture(x64, opened):
    gmm = random_mixture(3, K, D, condition=1e8)
    x = points(gmm, 300)
    np.testing.assert_allclose(gmm.log_prob(opened(x, 64)), scipy_log_prob(gmm, x), rtol=1e-6)


def test_scores_of_weighted_points_are_weighted(tmp_path, opened):
    """Against NumPy's; a point of weight zero changes nothing, wherever it lies, nor does a factor."""
    gmm = random_mixture(4, K, D)
    x = points(gmm, N).astype(np.float32)
    w = np.random.RandomState(0).randint(0, 4, N) / 4
    exact = scipy_log_prob(gmm, x)
    mean, n = np.average(exact, weights=w), (w > 0).sum()
    pl.DataFrame({"u": x[:, 0], "v": x[:, 1], "w": w}).write_parquet(tmp_path / "c.parquet", row_group_size=300)
    far = np.where(w[:, None] > 0, x, np.float32(1e30))  # their log-densities are infinite
    clouds = [opened(x, 700, w), opened(x, 700, 1e-30 * w), cg.open_cloud(tmp_path / "c.parquet", weights="w")]
    clouds += [opened(far, 700, w), cg.open_cloud(da.from_array(x, chunks=(600, D)), weights=w)]
    for cloud in clouds:
        np.testing.assert_allclose(gmm.score(cloud), mean, rtol=1e-6)
        np.testing.assert_allclose(gmm.bic(cloud), gmm.n_parameters * np.log(n) - 2 * n * mean, rtol=1e-6)
        np.testing.assert_allclose(gmm.aic(cloud), 2 * gmm.n_parameters - 2 * n * mean, rtol=1e-6)
    assert abs(mean - exact.mean()) > 1e-3, "weights matter here"
    with pytest.raises(ValueError, match=r"^x: its weights sum to inf, too much for float64; divide them"):
        gmm.score(opened(x, 700, np.full(N, 1e307)))


def test_a_mean_over_many_points_keeps_its_digits(opened):
    """Of sums of float32 three digits would be left."""
    gmm = cg.GaussianMixture.from_moments([[0.0]], [[[1.0]]], [1.0])
    x = np.tile(np.array([[0.0], [1.0], [3.0]], np.float32), (100_000, 1))
    expected = scipy.stats.norm.logpdf([0, 1, 3]).mean()
    np.testing.assert_allclose(gmm.score(opened(x, 1000)), expected, rtol=1e-7)


@pytest.mark.parametrize("scheduler", [None, "synchronous"])
def test_blocks_of_dask(x64, scheduler):
    """Values come here; sums are made in float64 on Dask's threads, which no setting of this thread reaches."""
    gmm = random_mixture(5, K, D)
    x = points(gmm, N)
    cloud = cg.open_cloud(da.from_array(x, chunks=(700, D)))
    with dask.config.set({} if scheduler is None else {"scheduler": scheduler}):
        np.testing.assert_allclose(gmm.log_prob(cloud), gmm.log_prob(x), rtol=1e-12)
        np.testing.assert_allclose(gmm.score(cloud), scipy_log_prob(gmm, x).mean(), rtol=1e-12)


def test_values_may_stay_where_blocks_of_dask_lie():
    gmm = random_mixture(5, K, D)
    x = points(gmm, N)
    left = da.from_array(x, chunks=(700, D)).map_blocks(gmm.log_prob, drop_axis=1, dtype=np.float32)
    assert left.shape == (N,)
    np.testing.assert_allclose(left.compute(), gmm.log_prob(x), rtol=1e-6)


def test_chunks_share_a_program(opened):
    """One for all but the last."""
    gmm, compiled = random_mixture(6, 5, 4), []
    x = points(gmm, 9 * 1024 + 5).astype(np.float32)
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **about: compiled.append(name))
    gmm.log_prob(opened(x, 1024))
    assert 1 <= sum(name.endswith("backend_compile_duration") for name in compiled) <= 2
    compiled.clear()
    gmm.score(opened(x, 1024))
    assert not any(name.endswith("backend_compile_duration") for name in compiled)


def test_what_can_not_be_done_is_refused_by_name(opened):
    gmm = random_mixture(7, K, D)
    x = points(gmm, 40)
    cloud, line = opened(x, 8), random_mixture(7, K, 1)
    for name in (*METHODS, *CRITERIA):
        with pytest.raises(ValueError, match=r"^x: expected shape \(n, 1\), got \(40, 2\); axis 1 must have size 1"):
            getattr(line, name)(cloud)
        with pytest.raises(TypeError, match=r"^x: OpenCloud\(.* can't be read under a transformation .*; take points"):
            jax.eval_shape(lambda gmm, name=name: getattr(gmm, name)(cloud), gmm)
    singular = cg.GaussianMixture.from_moments(np.zeros((1, D)), np.zeros((1, D, D)), [1.0])
    for name in ("log_prob", "score"):
        with pytest.raises(ValueError, match=r"^gmm: component 0 has a singular covariance and no density"):
            getattr(singular, name)(cloud)
    x[17, 1] = 1e300
    for call in (gmm.log_prob, gmm.score):
        with pytest.raises(ValueError, match=r"^x\[16:24\]: 1 of 16 values, up to 1e\+300, exceed what float32 holds"):
            call(opened(x, 8))
    x[17, 1] = np.nan
    for call in (gmm.log_prob, gmm.score):
        with pytest.raises(ValueError, match=r"cloud\.npy: column 1 lacks 1 of 8 values .* in row 18"):
            call(opened(x, 8))


def test_a_chunk_may_vanish_in_float32_and_the_whole_may_not(opened):
    gmm = random_mixture(8, 1, 1)
    at_zero = cg.GaussianMixture(0 * gmm.means, gmm.covariances, gmm.weights)
    x = np.array([[1e-60], [2e-60], [1.0]])
    np.testing.assert_allclose(at_zero.log_prob(opened(x, 1)), at_zero.log_prob(x), rtol=1e-6)


def test_a_thin_component_is_named_once(opened):
    gmm = cg.GaussianMixture.from_moments(np.zeros((1, 2)), [[[1.0, 1 - 3e-7], [1 - 3e-7, 1.0]]], [1.0])
    x = np.zeros((40, 2), np.float32)
    for call in (gmm.log_prob, gmm.score):
        with pytest.warns(UserWarning, match="component 0 is so thin") as told:
            call(opened(x, 4))
        assert len(told) == 1


MEMORY = """
import os, resource, sys, threading, time
import numpy as np
import jax
import coupled_gmm as cg
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
gmm = cg.GaussianMixture.from_moments(np.zeros((3, 2)) + np.arange(3)[:, None], [np.eye(2)] * 3, np.full(3, 1 / 3))
cloud, small = cg.open_cloud(sys.argv[1]), cg.open_cloud(sys.argv[2])
call = getattr(gmm, sys.argv[3])
call(small)
start = most = resident()
over = False
def watch():
    global most
    while not over:
        most = max(most, resident())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
begin = time.perf_counter()
call(cloud)
print(time.perf_counter() - begin, file=sys.stderr)
over = True
thread.join()
print(most - start)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
@pytest.mark.parametrize(("name", "n", "most"), [("log_prob", 10_000_000, 40), ("score", 100_000_000, 0)])
def test_memory_is_that_of_chunks_and_values(tmp_path, name, n, most):
    """80 or 800 MB of points (holes in a file), of which a whole array would hold all, and `most` MB of values."""
    for path, rows in ((tmp_path / "c.npy", n), (tmp_path / "small.npy", 5_000_000)):
        with path.open("wb") as file:
            about = {"descr": "<f4", "fortran_order": False, "shape": (rows, 2)}
            np.lib.format.write_array_header_1_0(file, about)
            file.truncate(file.tell() + 8 * rows)
    command = [sys.executable, "-c", MEMORY, tmp_path / "c.npy", tmp_path / "small.npy", name]
    end = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, env=os.environ)
    assert end.returncode == 0, end.stderr
    print(end.stdout, end.stderr)
    assert float(end.stdout) < most + 120
