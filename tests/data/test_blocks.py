"""Clouds in Dask arrays: sums where blocks lie, by threads and by processes, beside NumPy's of the whole."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import chunk_sums
import dask.array as da
import dask.config
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROOT

import coupled_gmm as cg

N, D = 500, 3
X = np.random.RandomState(0).randn(N, D) + 100


def check_sums(cloud, x, w=None):
    w = np.ones(len(x)) if w is None else w
    reference = x[0].astype(np.float64)
    centred = x.astype(np.float64) - reference
    count, mass, total, squares, rows = cloud.reduce(chunk_sums.moments, reference)
    assert (count, rows) == (len(x), len(x) * (len(x) - 1) / 2)
    np.testing.assert_allclose(mass, w.sum(), rtol=1e-14)
    np.testing.assert_allclose(total, w @ centred, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(squares, w @ centred**2, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sums_and_chunks_are_those_of_the_whole(data):
    n, d = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from(["f2", "f4", "f8", ">f4", "i4", "?"]))
    x = (np.random.RandomState(n).randint(-50, 50, (n, d)) / 4).astype(dtype)
    array = da.from_array(x, chunks=(data.draw(st.integers(1, 60)), data.draw(st.integers(1, d))))
    w = data.draw(st.sampled_from([None, np.arange(1, n + 1) / 8]))
    weights = w if w is None or data.draw(st.booleans()) else da.from_array(w, chunks=data.draw(st.integers(1, 60)))
    cloud = cg.open_cloud(array, weights=weights, chunk_size=data.draw(st.integers(1, 80)))
    check_sums(cloud, x, w)
    found = list(cloud.chunks())
    np.testing.assert_array_equal(np.concatenate([points for points, _ in found]), x)
    assert all(len(points) == cloud.chunk_size for points, _ in found[:-1])
    if w is not None:
        np.testing.assert_array_equal(np.concatenate([weights for _, weights in found]), w)
    assert cloud.dtype == found[0].points.dtype == (np.float32 if dtype in ("f2", "f4", ">f4") else np.float64)
    indices = sorted(data.draw(st.lists(st.integers(0, n - 1), max_size=9)))
    np.testing.assert_array_equal(cloud.rows(indices), x[indices])
    found = cloud.reduce(chunk_sums.extremes, combine=chunk_sums.wider)
    for key, expected in {"low": x.min(0), "high": x.max(0), "first": x[0]}.items():
        np.testing.assert_array_equal(found[key], expected)


def test_what_it_says_of_itself():
    cloud = cg.open_cloud(da.from_array(X.astype("f4"), chunks=(60, 3)), weights=np.ones(N))
    assert repr(cloud) == "OpenCloud(Dask array: 500 x 3 float32, 9 blocks, weighted)"
    assert cloud.names is None and len(cloud) == N and cloud.n_features == D
    check_sums(pickle.loads(pickle.dumps(cloud)), X.astype("f4"))


def test_columns_of_any_cut():
    cloud = cg.open_cloud(da.from_array(X, chunks=(60, 1)), columns=[2, 0])
    check_sums(cloud, X[:, [2, 0]])


def test_blocks_of_unknown_length():
    array = da.from_array(X, chunks=(60, 3))
    some = array[array[:, 0] > 100]
    cloud = cg.open_cloud(some, weights=some[:, 1] - 90)
    x = X[X[:, 0] > 100]
    check_sums(cloud, x, x[:, 1] - 90)
    assert np.isnan(some.shape[0]), "the caller's array is left alone"
    empty = array[array[:, 0] > 102.2]
    check_sums(cg.open_cloud(empty), X[X[:, 0] > 102.2])  # most of its blocks have no point
    with pytest.raises(ValueError, match=r"Dask array: expected an array of shape \(n, d\), got \(0, 3\)"):
        cg.open_cloud(array[array[:, 0] > 1e3])


def test_chunks_of_a_block_are_as_long_as_others():
    count, points, features = cg.open_cloud(da.from_array(X, chunks=(250, 3)), chunk_size=100).reduce(chunk_sums.shapes)
    assert (count, points, features) == (6, N, 6 * D)


def test_what_is_missing_is_told_with_its_row():
    for row, column, value, what in (
        (0, 0, np.nan, "lacks"),
        (317, 2, np.inf, "is infinite in"),
        (499, 1, np.nan, "lacks"),
    ):
        x = X.copy()
        x[row, column] = value
        cloud = cg.open_cloud(da.from_array(x, chunks=(60, 3)))
        for call in (lambda cloud=cloud: cloud.reduce(chunk_sums.shapes), lambda cloud=cloud: list(cloud.chunks())):
            with pytest.raises(
                ValueError, match=rf"^Dask array: column {column} {what} 1 of .*, the first in row {row + 1};"
            ):
                call()
    w = np.ones(N)
    w[77] = -1
    cloud = cg.open_cloud(da.from_array(X, chunks=(60, 3)), weights=da.from_array(w, chunks=100))
    with pytest.raises(
        ValueError, match=r"column weights holds negative weights in 1 of \d+ values, the first in row 78"
    ):
        cloud.reduce(chunk_sums.shapes)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda a: cg.open_cloud(a[:, 0]),
            ValueError,
            r"expected an array of shape \(n, d\), got \(500,\); reshape one",
        ),
        (lambda a: cg.open_cloud(a + 1j), TypeError, "path: expected real numbers, got dtype complex128"),
        (lambda a: cg.open_cloud(a.astype("U1")), TypeError, "path: expected real numbers, got dtype <U1"),
        (lambda a: cg.open_cloud(a.to_delayed()[0, 0]), TypeError, "path: expected an array of Dask, got its Delayed"),
        (lambda a: cg.open_cloud(a, columns=[3]), ValueError, "there is no column 3; it has columns 0 to 2"),
        (lambda a: cg.open_cloud(a, columns=["u"]), ValueError, "its columns have no names; choose by position"),
        (lambda a: cg.open_cloud(a, key="x"), ValueError, "key: is for files; leave it out"),
        (lambda a: cg.open_cloud(a, header=True), ValueError, "header: is for files; leave it out"),
        (lambda a: cg.open_cloud(a, weights=np.ones(3)), ValueError, r"weights: expected shape \(500,\), got \(3,\)"),
        (lambda a: cg.open_cloud(a, weights=a[:7, 0]), ValueError, r"weights: expected shape \(500,\), got \(7,\)"),
        (lambda a: cg.open_cloud(a, weights=0 * a[:, 0]), ValueError, "weights: all weights are zero"),
        (lambda a: cg.open_cloud(a, weights=-np.ones(N)), ValueError, "weights: 500 weights are negative"),
    ],
)
def test_what_is_no_cloud_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call(da.from_array(X, chunks=(60, 3)))


def test_a_scheduler_that_was_chosen_is_used():
    """Else two threads, however many cores there are."""
    seen = []

    def looking(points, weights, first):
        seen.append(threading.current_thread())
        time.sleep(0.01)
        return (np.ones(()),)

    cloud = cg.open_cloud(da.from_array(X, chunks=(20, 3)))
    with dask.config.set(scheduler="synchronous"):
        assert cloud.reduce(looking)[0] == 25
    assert set(seen) == {threading.current_thread()}
    seen.clear()
    with dask.config.set(num_workers=8):
        assert cloud.reduce(looking)[0] == 25
    assert 1 <= len(set(seen)) <= 2


def test_dask_is_not_imported_to_look():
    code = """
import sys
import numpy as np
import coupled_gmm as cg
try:
    cg.open_cloud(np.ones((3, 2)))
except TypeError as error:
    assert "path: expected a file" in str(error)
assert not [name for name in sys.modules if name.partition(".")[0] in ("dask", "distributed", "polars", "zarr")]
"""
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert end.returncode == 0, end.stderr


def recomputable(blocks, rows):
    return da.arange(blocks, chunks=1).map_blocks(
        chunk_sums.drawn, rows=rows, dtype="f8", new_axis=1, chunks=((rows,) * blocks, (4,))
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_only_sums_travel(client):
    """Of 64 MB on two processes; as in memory."""
    from distributed import wait

    array = recomputable(40, 50_000).persist()
    wait(array)
    x = np.concatenate([chunk_sums.drawn([i], 50_000) for i in range(40)])
    cloud = cg.open_cloud(array, weights=np.arange(len(x)) % 7 + 0.5)
    for pause in (
        0,
        5,
    ):  # in which the cluster drops what lies on two workers: weights are where the points are, from the first
        time.sleep(pause)
        before = chunk_sums.sent(client)
        check_sums(cloud, x, np.arange(len(x)) % 7 + 0.5)
        assert chunk_sums.sent(client) - before < 50_000
    np.testing.assert_array_equal(cloud.rows([5, 1_234_567]), x[[5, 1_234_567]])
    assert next(cloud.chunks()).points.shape == (cloud.chunk_size, 4)
    bad = da.from_array(np.where(np.arange(N)[:, None] == 317, np.nan, X), chunks=(60, 3))
    with pytest.raises(ValueError, match=r"Dask array: column 0 lacks 1 of .* the first in row 318"):
        cg.open_cloud(bad).reduce(chunk_sums.shapes)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("persisted", [False, True])
def test_a_worker_that_is_killed_changes_nothing(client, tmp_path, persisted):
    """Once within a sum, by itself, and once from outside, while sums are made again and again."""
    array = recomputable(24, 2000)
    x = np.concatenate([chunk_sums.drawn([i], 2000) for i in range(24)])
    cloud = cg.open_cloud(array.persist() if persisted else array)
    undisturbed = cloud.reduce(chunk_sums.slowly, 0.0)[0]
    np.testing.assert_allclose(undisturbed, x.sum(0), rtol=1e-10)
    mark = np.frombuffer(str(tmp_path / "killed").encode(), np.uint8)
    np.testing.assert_array_equal(cloud.reduce(chunk_sums.killing, 20_000, mark)[0], undisturbed)
    assert (tmp_path / "killed").exists()
    client.wait_for_workers(2, timeout=60)
    victim = next(iter(client.run(os.getpid).values()))
    timer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
    timer.start()
    for _ in range(4):
        np.testing.assert_array_equal(cloud.reduce(chunk_sums.slowly, 0.05)[0], undisturbed)
    timer.join()
