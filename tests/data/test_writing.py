"""Clouds that are written in chunks: every format of the source, whole or not at all, whatever ends it before."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import dask.array as da
import jax
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROOT

import coupled_gmm as cg
from coupled_gmm.data import clouds

N, D = 230, 3
X = np.random.RandomState(0).randn(N, D)
W = np.arange(N) / 8
NAMES = ("u", "v", "w")
FRAME = pl.DataFrame(X, schema=list(NAMES))
ENDS = (".npy", ".parquet")


@pytest.fixture
def cloud(tmp_path):
    np.save(tmp_path / "cloud.npy", X)
    return cg.open_cloud(tmp_path / "cloud.npy", chunk_size=41)


def gathered(cloud):
    return np.concatenate([points for points, _ in cloud.chunks()])


def weights_of(cloud):
    return np.concatenate([weights for _, weights in cloud.chunks()])


def doubled(points, first):
    """Points of which each knows its row."""
    return 2 * points + (first + np.arange(len(points)))[:, None]


@pytest.mark.parametrize("end", ENDS)
def test_what_is_written_is_what_was_read(tmp_path, end):
    """Text, Parquet, float32, Dask; by NumPy and polars, who read it as a whole."""
    FRAME.write_csv(tmp_path / "c.csv")
    np.save(tmp_path / "f.npy", np.asfortranarray(X.astype(np.float32)))
    sources = [tmp_path / "c.csv", tmp_path / "f.npy", da.from_array(X, chunks=(60, 2))]
    for i, source in enumerate(sources):
        cloud, path = cg.open_cloud(source, chunk_size=50), tmp_path / f"{i}{end}"
        found = cloud.write(path)
        expected = X.astype(cloud.dtype)
        whole = np.load(path) if end == ".npy" else pl.read_parquet(path).to_numpy()
        np.testing.assert_array_equal(whole, expected)
        np.testing.assert_array_equal(gathered(found), expected)
        assert whole.dtype == found.dtype == cloud.dtype and found.chunk_size == 50 and found.shape == (N, D)
        named = cloud.names is not None and end == ".parquet"
        assert found.names == (NAMES if named else None if end == ".npy" else ("column_0", "column_1", "column_2"))
        np.testing.assert_array_equal(clouds.read_cloud(path), expected)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 150), d=st.integers(1, 4), size=st.integers(1, 160), end=st.sampled_from(ENDS))
def test_any_function_of_any_chunks(tmp_path_factory, n, d, size, end):
    folder = tmp_path_factory.mktemp("drawn")
    x = np.random.RandomState(n).randint(-9, 9, (n, d)).astype(np.float32)
    np.save(folder / "c.npy", x)
    found = cg.open_cloud(folder / "c.npy", chunk_size=size).write(folder / f"out{end}", doubled)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(gathered(found), 2 * x + np.arange(n)[:, None])
    assert sorted(path.name for path in folder.iterdir()) == ["c.npy", f"out{end}"]


def test_weights_go_along(tmp_path, cloud):
    """Into Parquet as a column; beside a .npy from where they are; where they would be lost it is refused."""
    FRAME.with_columns(mass=W).write_parquet(tmp_path / "mass.parquet", row_group_size=50)
    np.save(tmp_path / "w.npy", W)
    inside = cg.open_cloud(tmp_path / "mass.parquet", weights="mass", chunk_size=60)
    beside = cg.open_cloud(tmp_path / "cloud.npy", weights=tmp_path / "w.npy", chunk_size=60)
    given = cg.open_cloud(tmp_path / "cloud.npy", weights=W, chunk_size=60)
    blocks = cg.open_cloud(da.from_array(X, chunks=(70, 3)), weights=da.from_array(W, chunks=50))
    for i, source in enumerate((inside, beside, given, blocks)):
        found = source.write(tmp_path / f"{i}.parquet", doubled)
        np.testing.assert_array_equal(weights_of(found), W)
        assert found.names == (NAMES if source is inside else ("column_0", "column_1", "column_2"))
        again = cg.open_cloud(tmp_path / f"{i}.parquet", weights="weight")
        np.testing.assert_array_equal(weights_of(again), W)
        assert again.shape == (N, D)
    for source in (beside, given):
        np.testing.assert_array_equal(weights_of(source.write(tmp_path / "out.npy")), W)
        assert all(weights is None for _, weights in cg.open_cloud(tmp_path / "out.npy").chunks())
    for source in (inside, blocks):
        with pytest.raises(ValueError, match=r"lost\.npy: a \.npy holds no weights, .* write a \.parquet"):
            source.write(tmp_path / "lost.npy")
    assert not (tmp_path / "lost.npy").exists()
    FRAME.rename({"v": "weight"}).with_columns(mass=W).write_parquet(tmp_path / "body.parquet")
    found = cg.open_cloud(tmp_path / "body.parquet", weights="mass").write(tmp_path / "4.parquet")
    assert list(pl.read_parquet_schema(tmp_path / "4.parquet")) == ["u", "weight", "w", "weight_2"]
    np.testing.assert_array_equal(weights_of(found), W)
    np.testing.assert_array_equal(gathered(found), X)


def test_features_are_put_into_another_order(tmp_path, cloud):
    """In every way to read them, their names and the weights with them."""
    FRAME.with_columns(mass=W).write_parquet(tmp_path / "c.parquet")
    FRAME.with_columns(mass=W).write_csv(tmp_path / "c.csv")
    opened = [cg.open_cloud(tmp_path / name, weights="mass", chunk_size=70) for name in ("c.parquet", "c.csv")]
    opened += [cg.open_cloud([tmp_path / "c.csv", tmp_path / "c.parquet"], weights="mass", chunk_size=70)]
    opened += [cloud, cg.open_cloud(da.from_array(X, chunks=(60, 2)), weights=W, chunk_size=70)]
    for one in opened:
        turned = one.reordered([2, 0, 1])
        copies = len(one) // N
        np.testing.assert_array_equal(gathered(turned), np.tile(X, (copies, 1))[:, [2, 0, 1]])
        np.testing.assert_array_equal(turned.rows([3, N - 1]), X[[3, N - 1]][:, [2, 0, 1]])
        assert turned.names == (None if one.names is None else ("w", "u", "v"))
        assert (type(turned), turned.chunk_size, repr(turned)) == (type(one), one.chunk_size, repr(one))
        np.testing.assert_array_equal(gathered(turned.reordered([1, 2, 0])), gathered(one))
        if one is not cloud:
            np.testing.assert_array_equal(weights_of(turned), np.tile(W, copies))
    for order in ([0, 1], [0, 1, 1], [0, 1, 3], [2, 1, 0, 0]):
        with pytest.raises(ValueError, match=r"^order: expected each of 0 to 2 once"):
            cloud.reordered(order)


@pytest.mark.parametrize("end", ENDS)
def test_what_can_not_be_written_leaves_what_was_there(tmp_path, cloud, end):
    def failing(points, first):
        if first > 100:
            raise RuntimeError("in the middle")
        return points

    def interrupted(points, first):
        if first > 100:
            raise KeyboardInterrupt
        return points

    path = tmp_path / f"out{end}"
    cloud.write(path)
    before, there = path.read_bytes(), sorted(os.listdir(tmp_path))
    threads = set(threading.enumerate())
    for function, error, says in (
        (failing, RuntimeError, "in the middle"),
        (interrupted, KeyboardInterrupt, None),
        (lambda x, first: x[:-1], ValueError, r"^function: expected real numbers of shape \(41, 3\), got float64 of "),
        (lambda x, first: x[:, :2], ValueError, r"^function: expected real numbers of shape \(41, 3\), got"),
        (lambda x, first: x + 1j, ValueError, "^function: expected real numbers"),
        (lambda x, first: x / (x < 2), ValueError, rf"out\{end}: column \d is infinite in \d+ of 41 values"),
        (lambda x, first: np.where(first, np.nan, x), ValueError, rf"out\{end}: column 0 lacks 41 .*in row 42"),
    ):
        with np.errstate(divide="ignore"), pytest.raises(error, match=says):
            cloud.write(path, function)
        assert sorted(os.listdir(tmp_path)) == there and path.read_bytes() == before
        assert set(threading.enumerate()) <= threads
    x = X.copy()
    x[200, 1] = np.nan
    np.save(tmp_path / "bad.npy", x)
    with pytest.raises(ValueError, match=r"bad\.npy: column 1 lacks 1 .* in row 201"):
        cg.open_cloud(tmp_path / "bad.npy", chunk_size=50).write(path)
    assert path.read_bytes() == before and len(os.listdir(tmp_path)) == len(there) + 1
    path.chmod(0o600)
    cloud.write(path, doubled)
    assert path.read_bytes() != before and path.stat().st_mode & 0o777 == 0o600


def test_what_is_no_place_is_refused_before_anything_is_read(tmp_path, cloud):
    def never(points, first):
        raise AssertionError("was read")

    (tmp_path / "folder.npy").mkdir()
    for path, error, says in (
        (7, TypeError, "^path: expected a file to write, got int"),
        (tmp_path / "out.csv", ValueError, r"out\.csv: can't write \.csv; use one of \.npy, \.parquet"),
        (tmp_path / "out", ValueError, r"out: can't write a file without ending"),
        (tmp_path / "folder.npy", ValueError, r"folder\.npy: is a folder; name a file"),
        (tmp_path / "no" / "out.npy", FileNotFoundError, r"No such file or directory: '.*/no/out\.npy'"),
        (tmp_path / "no" / "out.parquet", FileNotFoundError, r"No such file or directory: '.*/no/out\.parquet'"),
    ):
        with pytest.raises(error, match=says):
            cloud.write(path, never)


def test_a_source_that_goes_meanwhile_is_named(tmp_path, cloud):
    """And not the file that was to be written."""

    def removing(points, first):
        (tmp_path / "cloud.npy").unlink(missing_ok=True)
        return points

    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'cloud.npy'))}: is gone"):
        cloud.write(tmp_path / "out.npy", removing)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("end", ENDS)
def test_functions_are_called_where_the_caller_is(tmp_path, cloud, end):
    """Whose precision of JAX, a matter of threads, is theirs."""
    seen = set()

    def looking(points, first):
        seen.add((threading.current_thread(), jax.numpy.asarray(points).dtype.name))
        return points

    with jax.enable_x64(True):
        cloud.write(tmp_path / f"out{end}", looking)
    assert seen == {(threading.current_thread(), "float64")}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_leaves_nothing(tmp_path, cloud, end):
    calls = []

    def interrupted(
        points, first
    ):  # in the third chunk of six: by a clock it may come after the last, on a busy machine
        calls.append(first)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return points

    with pytest.raises(KeyboardInterrupt):
        cloud.write(tmp_path / f"out{end}", interrupted)
    assert len(calls) == 3
    assert os.listdir(tmp_path) == ["cloud.npy"]


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    end = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert end.returncode == 0, end.stderr
    return end.stdout


FULL = """
import resource, sys
import coupled_gmm as cg
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    cg.open_cloud(sys.argv[1], chunk_size=1000).write(sys.argv[2])
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit of the process")
@pytest.mark.parametrize("end", ENDS)
def test_a_full_disk_leaves_nothing(tmp_path, end):
    np.save(tmp_path / "cloud.npy", np.random.RandomState(0).randn(50_000, 3))
    said = run(FULL, tmp_path / "cloud.npy", tmp_path / f"out{end}")
    assert "File too large" in said and f"out{end}" in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["cloud.npy"]


MEMORY = """
import os, sys, threading, time
import coupled_gmm as cg
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
cloud = cg.open_cloud(sys.argv[1])
cloud.rows([0])
import polars
start = most = resident()
over = False
def watch():
    global most
    while not over:
        most = max(most, resident())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
cloud.write(sys.argv[2])
over = True
thread.join()
print(most - start)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
@pytest.mark.parametrize(("end", "most"), [(".npy", 120), (".parquet", 400)])
def test_memory_is_that_of_chunks(tmp_path, end, most):
    """Of 800 MB of random numbers; polars, which writes Parquet, holds some row groups."""
    rows = np.random.RandomState(0).randn(500_000, 4).astype(np.float32)
    with (tmp_path / "c.npy").open("wb") as file:
        about = {"descr": "<f4", "fortran_order": False, "shape": (50_000_000, 4)}
        np.lib.format.write_array_header_1_0(file, about)
        for _ in range(100):
            file.write(rows.data)
    grown = float(run(MEMORY, tmp_path / "c.npy", tmp_path / f"out{end}"))
    print(grown)
    assert grown < most
    found = cg.open_cloud(tmp_path / f"out{end}")
    assert found.shape == (50_000_000, 4)
    np.testing.assert_array_equal(found.rows([7, 49_999_999]), rows[[7, -1]])
