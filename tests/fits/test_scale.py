"""Fits of clouds that are larger than memory is meant for: files, 1e8 points, a cluster whose worker dies. Minutes each."""

import os
import signal
import subprocess
import sys
import threading

import chunk_sums
import dask.array as da
import jax
import numpy as np
import polars as pl
import pytest
from problems import ROOT
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import coupled_gmm as cg
from coupled_gmm.fits import rows, statistics
from coupled_gmm.fits.request import GivenCloud, view_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def blocks(count, n, d, offset=0.0):
    """A Dask array of blocks that their number decides."""
    numbers = da.arange(count, chunks=1)
    return numbers.map_blocks(
        chunk_sums.clusters_of, rows=n, d=d, offset=offset, dtype="f4", new_axis=1, chunks=((n,) * count, (d,))
    )


def start(d, offset=0.0):
    means = chunk_sums.CENTRES[:, :d] + offset + 0.3
    return cg.GaussianMixture.from_moments(means, np.tile(1.5 * np.eye(d), (3, 1, 1)), [0.5, 0.3, 0.2])


MEMORY = """
import resource, sys, threading, time
import numpy as np
import coupled_gmm as cg

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

def watch():
    while True:
        most[0] = max(most[0], resident())
        time.sleep(0.01)

path, part, d = sys.argv[1], sys.argv[2], int(sys.argv[3])
means = np.eye(3, d) + 0.5
start = cg.GaussianMixture.from_moments(means, np.tile(1.5 * np.eye(d), (3, 1, 1)), [0.5, 0.3, 0.2])
pair, options = cg.GaussianMixturePair(start, start, 0.1), {"transport_weight": 0.01, "em_steps": 2}
few = cg.open_cloud(part)
cg.fit_gmm(few, start, max_steps=2), cg.fit_pair(few, few, pair, **options)  # programs, and polars' threads
most = [resident()]
before = most[0]
threading.Thread(target=watch, daemon=True).start()
cloud = cg.open_cloud(path)
assert cg.fit_gmm(cloud, start, max_steps=2, tol=0).n_steps == 2
assert cg.fit_pair(cloud, cloud, pair, **options).n_steps == 2
print(most[0] - before)
"""


@pytest.mark.parametrize(("kind", "n", "d"), [("npy", 10**8, 2), ("parquet", 10**7, 10)])
def test_memory_does_not_grow_with_a_file(tmp_path, kind, n, d):
    """And a part of it that fits in memory is fitted as it is there."""
    path, part = tmp_path / f"cloud.{kind}", tmp_path / f"part.{kind}"
    x = (
        np.random.default_rng(0).standard_normal((10**6, d), np.float32)
        + np.eye(3, d, dtype=np.float32)[np.arange(10**6) % 3]
    )
    if kind == "npy":
        whole = np.lib.format.open_memmap(path, "w+", np.float32, (n, d))
        for first in range(0, n, len(x)):
            whole[first : first + len(x)] = x
        del whole
        np.save(part, x)
    else:
        table = pl.DataFrame(x.astype(np.float64), schema=[f"x{i}" for i in range(d)])
        table.write_parquet(part, row_group_size=10**5)
        pl.concat([table.lazy()] * (n // len(x))).sink_parquet(path, row_group_size=10**5)
    end = subprocess.run(
        [sys.executable, "-c", MEMORY, path, part, str(d)], capture_output=True, text=True, cwd=ROOT, timeout=800
    )
    assert end.returncode == 0, end.stderr
    assert float(end.stdout) < 1000, "megabytes"
    gmm = cg.GaussianMixture.from_moments(np.eye(3, d) + 0.5, np.tile(1.5 * np.eye(d), (3, 1, 1)), [0.5, 0.3, 0.2])
    found, expected = (cg.fit_gmm(cloud, gmm, max_steps=5, tol=0) for cloud in (cg.open_cloud(part), x))
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, rtol=1e-6)
    np.testing.assert_allclose(found.gmm.means, expected.gmm.means, atol=2e-5)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_sums_over_1e8_points_are_those_of_float64(offset):
    """Log-likelihood, masses, means and scatters of float32 beside NumPy's, which shares no code with it."""
    count, n, d = 50, 2_000_000, 2
    gmm = start(d, offset)
    cloud = cg.open_cloud(blocks(count, n, d, offset))
    view = view_of([GivenCloud("x", cloud, "w", None)], [gmm], 0.0)
    floors = jax.numpy.zeros((1, d))
    parameters = view.frame.parameters(jax.tree.map(lambda leaf: leaf[None], gmm), floors)
    base = statistics.Base.of(parameters)
    nothing = view.in_chunks(3 * d).chunks
    sums = rows.e_step(view, nothing, base, floors, jax.numpy.zeros(1), 3 * d, None)
    found = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), statistics.centred(sums, base))
    origin, unit = (
        np.asarray(each, np.float64) for each in (view.frame.origin + view.frame.remainder, view.frame.unit)
    )
    means, shift = np.asarray(parameters.means[0], np.float64), np.asarray(found.shift, np.float64)
    factors = np.asarray(parameters.factors[0], np.float64)
    means = origin + unit * (means + np.einsum("kij,kj->ki", factors, shift))
    scatters = unit**2 * factors @ found.scatter @ factors.swapaxes(1, 2)

    at = np.asarray(gmm.means, np.float64)
    total, masses, first, second = 0.0, np.zeros(3), np.zeros((3, d)), np.zeros((3, d, d))
    for index in range(count):
        x = chunk_sums.clusters(index, n, d, offset).astype(np.float64)
        joint = np.stack(
            [np.log(w) + multivariate_normal(m, s).logpdf(x) for w, m, s in zip(gmm.weights, at, gmm.covariances)]
        )
        log_prob = logsumexp(joint, axis=0)
        total += log_prob.sum()
        for k, r in enumerate(np.exp(joint - log_prob)):
            y = x - at[k]
            masses[k] += r.sum()
            first[k] += r @ y
            second[k] += (r[:, None] * y).T @ y
    size, truth = count * n, first / masses[:, None]
    volume = d * np.log(unit)
    np.testing.assert_allclose(found.log_likelihood - volume, total / size, rtol=1e-5)
    np.testing.assert_allclose(found.masses, masses / size, rtol=1e-5)
    np.testing.assert_allclose(means, at + truth, rtol=1e-5)
    np.testing.assert_allclose(means - at, truth, atol=1e-4)  # of a standard deviation
    spread = second / masses[:, None, None] - truth[:, :, None] * truth[:, None]
    deviations = np.sqrt(np.diagonal(spread, axis1=1, axis2=2))
    np.testing.assert_allclose(
        scatters / deviations[:, None] / deviations[..., None],
        spread / deviations[:, None] / deviations[..., None],
        atol=1e-5,
    )


def test_blocks_of_a_cluster_are_fitted_where_they_lie(client):
    """2e7 x 4 in 40 blocks on two processes: as in memory; what travels between workers does not grow with points."""
    from distributed import wait

    array = blocks(40, 500_000, 4).persist()
    wait(array)
    cloud, gmm = cg.open_cloud(array), start(4)
    cg.fit_gmm(cloud, gmm, max_steps=1)  # workers compile
    before = chunk_sums.sent(client)
    found = cg.fit_gmm(cloud, gmm, max_steps=5, tol=0)
    travelled = (chunk_sums.sent(client) - before) / 7  # six E-steps, and the moments
    assert travelled < 40_000, travelled
    print(f"{travelled:.0f} bytes travel in a pass")
    x = np.concatenate([chunk_sums.clusters(i, 500_000, 4) for i in range(40)])
    expected = cg.fit_gmm(x, gmm, max_steps=5, tol=0)
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, rtol=1e-5)
    for name in ("means", "covariances", "weights"):
        np.testing.assert_allclose(getattr(found.gmm, name), getattr(expected.gmm, name), rtol=1e-5, atol=1e-5)


def test_a_worker_that_is_killed_within_a_fit_changes_nothing(client):
    array = blocks(24, 200_000, 4)
    cloud, other, gmm = cg.open_cloud(array), cg.open_cloud(blocks(8, 100_000, 4)), start(4)
    pair, options = cg.GaussianMixturePair(gmm, gmm, 0.1), {"transport_weight": 0.01, "em_steps": 4}
    undisturbed = cg.fit_pair(cloud, other, pair, **options)
    victim = next(iter(client.run(os.getpid).values()))
    killed = []

    def kill(row):
        if row["step"] == 1:
            threading.Timer(0.3, lambda: killed.append(os.kill(victim, signal.SIGKILL))).start()  # within the next pass

    found = cg.fit_pair(cloud, other, pair, progress=kill, **options)
    assert killed and victim not in client.run(os.getpid).values()
    jax.tree.map(np.testing.assert_array_equal, found, undisturbed)
