"""Clouds that are not in memory, beside the same read as a whole: every format, in chunks of every size."""

import gc
import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import chunk_sums
import jax
import numpy as np
import polars as pl
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ROOT

import coupled_gmm as cg
from coupled_gmm.data import clouds, row_groups, streams, sums

N, D = 230, 3
X = np.random.RandomState(0).randn(N, D)
NAMES = ("u", "v", "w")
FRAME = pl.DataFrame(X, schema=list(NAMES))


def write_zarr(path, x, chunks=(64, 2), **options):
    zarr.create_array(path, shape=x.shape, dtype=x.dtype, chunks=chunks, **options)[:] = x


FORMATS = {
    "c.npy": lambda path: np.save(path, X),
    "f.npy": lambda path: np.save(path, np.asfortranarray(X.astype(np.float32))),
    "stored.npz": lambda path: np.savez(path, X),
    "fortran.npz": lambda path: np.savez(path, np.asfortranarray(X)),
    "packed.npz": lambda path: np.savez_compressed(path, X.astype(">f4")),
    "fields.npy": lambda path: np.save(path, np.array(list(map(tuple, X)), [(name, "f8") for name in NAMES])),
    "c.parquet": lambda path: FRAME.write_parquet(path, row_group_size=41),
    "one.parquet": lambda path: FRAME.write_parquet(path),
    "single.parquet": lambda path: FRAME.cast(pl.Float32).write_parquet(path),
    "c.csv": lambda path: FRAME.write_csv(path),
    "c.tsv.gz": lambda path: np.savetxt(path, X, delimiter="\t"),
    "c.txt": lambda path: np.savetxt(path, X),
    "c.zarr": lambda path: write_zarr(path, X.astype(np.float32)),
    "sharded.zarr": lambda path: write_zarr(path, X, (10, 3), shards=(50, 3)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clouds")
    for name, write in FORMATS.items():
        write(place / name)
    return place


def whole(path):
    return np.asarray(zarr.open_array(path, mode="r")) if path.suffix == ".zarr" else clouds.read_cloud(path)


def gathered(cloud):
    return np.concatenate([points for points, _ in cloud.chunks()])


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_are_the_whole(folder, name):
    expected = whole(folder / name)
    for size in (1, 41, 64, N - 1, N, 10 * N, None):
        cloud = cg.open_cloud(folder / name, chunk_size=size)
        found = list(cloud.chunks())
        assert all(weights is None for _, weights in found)
        assert all(len(points) == cloud.chunk_size for points, _ in found[:-1])
        np.testing.assert_array_equal(np.concatenate([points for points, _ in found]), expected)
        assert {points.dtype for points, _ in found} == {cloud.dtype}
    assert cloud.shape == expected.shape == (len(cloud), cloud.n_features)
    assert cloud.dtype == (np.float32 if name in ("f.npy", "packed.npz", "single.parquet", "c.zarr") else np.float64)
    assert cloud.names == (NAMES if name in ("fields.npy", "c.csv") or name.endswith(".parquet") else None)
    assert repr(cloud) == f"OpenCloud({name}: 230 x 3 {cloud.dtype}, 1 chunk)"


@pytest.mark.parametrize("name", FORMATS)
def test_columns_and_rows_are_those_of_the_whole(folder, name):
    cloud, expected = cg.open_cloud(folder / name, chunk_size=50), whole(folder / name)
    wanted = ["w", "u"] if cloud.names else ["column_3", "column_1"] if name in ("c.tsv.gz", "c.txt") else [2, 0]
    some = cg.open_cloud(folder / name, columns=wanted, chunk_size=50)
    np.testing.assert_array_equal(gathered(some), expected[:, [2, 0]])
    assert some.names == (("w", "u") if cloud.names else None)
    draw = np.random.RandomState(1)
    for indices in ([0], [N - 1], [], [3, 3, 4], np.sort(draw.choice(N, 70)), np.arange(N)):
        np.testing.assert_array_equal(cloud.rows(indices), expected[np.asarray(indices, int)])
        assert some.rows(indices).shape == (len(indices), 2)
    for indices, says in (
        ([2, 1], "not sorted"),
        ([0, N], "reach from 0 to 230"),
        ([-1], "reach from -1"),
        ([0.5], "whole"),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"^indices: .*{says}"):
            cloud.rows(indices)


@pytest.mark.parametrize("name", FORMATS)
def test_sums_are_those_of_the_whole(folder, name):
    """Against NumPy's of the whole; a pickled cloud gives the same bits."""
    cloud, x = cg.open_cloud(folder / name, chunk_size=33), whole(folder / name).astype(np.float64)
    reference = x[0]
    count, mass, total, squares, rows = cloud.reduce(chunk_sums.moments, reference)
    assert (count, mass, rows) == (N, N, N * (N - 1) / 2)
    np.testing.assert_allclose(total, (x - reference).sum(0), rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(squares, ((x - reference) ** 2).sum(0), rtol=1e-13)
    found = cloud.reduce(chunk_sums.extremes, combine=chunk_sums.wider)
    for key, expected in {"low": x.min(0), "high": x.max(0), "first": x[0]}.items():
        np.testing.assert_array_equal(found[key], expected)
    again = pickle.loads(pickle.dumps(cloud))
    np.testing.assert_array_equal(again.reduce(chunk_sums.moments, reference)[3], squares)
    assert repr(again) == repr(cloud)


def test_threads_change_no_sum(tmp_path):
    """Nor do they hide what is refused."""
    x = np.random.RandomState(0).randn(1000, 3)
    np.save(tmp_path / "x.npy", x)
    cloud = cg.open_cloud(tmp_path / "x.npy", chunk_size=37)
    for function, combine in ((chunk_sums.extremes, chunk_sums.wider), (chunk_sums.shapes, None)):
        found, expected = (cloud.reduce(function, combine=combine, threads=threads) for threads in (True, False))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    one, other = (cloud.reduce(chunk_sums.moments, x[0], threads=threads) for threads in (True, False))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    x[700, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"x.npy: column 1 .* row 701"):
        cg.open_cloud(tmp_path / "x.npy", chunk_size=37).reduce(chunk_sums.shapes, threads=True)
    with pytest.raises(ZeroDivisionError):
        cloud_of = cg.open_cloud(tmp_path / "x.npy", chunk_size=37, columns=[0, 2])
        cloud_of.reduce(lambda points, weights, first: 1 / (first < 500), threads=True)


def test_sums_keep_what_rounding_takes():
    """Of numbers that cancel, where plain addition in float64 loses all; infinite ones stay infinite."""
    numbers = [1e16, 1.0, -1e16, 1.0] * 100
    assert sum(numbers) != 200
    assert total((np.float64(number),) for number in numbers).value[0] == 200
    for infinite in (np.inf, -np.inf):
        assert total([1.0, infinite, 2.0]).value == infinite
    assert np.isnan(total([np.inf, -np.inf]).value)
    assert total([]).value is None
    for order in (numbers, sorted(numbers)):  # totals of parts, whoever adds first
        whole = total([])
        for i in range(3):
            whole.add(*total(order[i::3]).parts)
        assert whole.value == 200


def total(values):
    found = sums.Total()
    for value in values:
        found.add(value)
    return found


DTYPES = ("f2", "f4", "f8", ">f4", ">f8", "i1", "u4", ">i8", "?", "g")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_arrays_of_every_shape_order_and_kind(tmp_path_factory, data):
    n, d = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 5))
    x = np.random.RandomState(data.draw(st.integers(0, 99))).randint(-100, 100, (n, d)) / 4
    dtype, order = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from("CF"))
    with np.errstate(invalid="ignore"):
        x = np.asarray(x.astype(dtype), order=order)
    name = data.draw(st.sampled_from(["c.npy", "c.npz"]))
    path = tmp_path_factory.mktemp("drawn") / name
    np.save(path, x) if name == "c.npy" else np.savez(path, x)
    expected = clouds.read_cloud(path)
    columns = data.draw(st.none() | st.permutations(range(d)).flatmap(lambda p: st.integers(1, d).map(lambda k: p[:k])))
    cloud = cg.open_cloud(path, columns=columns, chunk_size=data.draw(st.integers(1, 130)))
    expected = expected if columns is None else expected[:, columns]
    np.testing.assert_array_equal(gathered(cloud), expected)
    assert cloud.dtype == expected.dtype
    indices = sorted(data.draw(st.lists(st.integers(0, n - 1), max_size=20)))
    np.testing.assert_array_equal(cloud.rows(indices), expected[indices])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), group=st.integers(1, 90), size=st.integers(1, 220), d=st.integers(1, 4))
def test_parquet_of_every_cut(tmp_path_factory, n, group, size, d):
    path = tmp_path_factory.mktemp("drawn") / "c.parquet"
    x = np.random.RandomState(n).randn(n, d)
    pl.DataFrame(x, schema=[f"x{i}" for i in range(d)]).write_parquet(path, row_group_size=group)
    assert sum(row_groups.sizes(path)) == n
    cloud = cg.open_cloud(path, chunk_size=size)
    np.testing.assert_array_equal(gathered(cloud), x)
    np.testing.assert_array_equal(cloud.rows([0, n - 1]), x[[0, -1]])


def test_row_groups_are_those_of_pyarrow(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    wide = FRAME.with_columns(word=pl.lit("a"), flag=pl.lit(True), **{f"c{i}": pl.lit(float(i)) for i in range(20)})
    for size in (7, 100, N):
        pq.write_table(wide.to_arrow(), tmp_path / "c.parquet", row_group_size=size)
        about = pq.ParquetFile(tmp_path / "c.parquet").metadata
        assert row_groups.sizes(tmp_path / "c.parquet") == [
            about.row_group(i).num_rows for i in range(about.num_row_groups)
        ]


def test_parquet_whose_end_is_not_understood_is_read_all_the_same(folder, monkeypatch):
    monkeypatch.setattr(row_groups, "sizes", lambda path: [1, 2])
    np.testing.assert_array_equal(gathered(cg.open_cloud(folder / "c.parquet", chunk_size=50)), X)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 60), st.integers(1, 80))
def test_spans_hold_what_is_asked_for(asked, apart, longest):
    indices = np.array(sorted(asked), np.int64)
    ranges = list(streams.spans(indices, apart, longest))
    held = [i for start, stop in ranges for i in range(start, stop)]
    assert held == sorted(set(held)) and set(asked) <= set(held)
    assert all(stop - start <= longest for start, stop in ranges)
    assert {i for start, stop in ranges for i in (start, stop - 1)} <= set(asked)


def test_several_files_are_one_cloud(folder, tmp_path):
    """Features are paired by name, and the wider precision is everyone's."""
    FRAME.select("w", "u", "v").write_csv(tmp_path / "turned.csv")
    paths = [folder / "c.parquet", tmp_path / "turned.csv", folder / "single.parquet", folder / "fields.npy"]
    cloud = cg.open_cloud(paths, chunk_size=100)
    x = np.concatenate([X, X, X.astype(np.float32), X])
    assert repr(cloud) == "OpenCloud(4 files, c.parquet first: 920 x 3 float64, 10 chunks)"
    np.testing.assert_array_equal(gathered(cloud), x)
    indices = np.array([0, N - 1, N, 2 * N + 5, 4 * N - 1])
    np.testing.assert_array_equal(cloud.rows(indices), x[indices])
    np.testing.assert_array_equal(cg.open_cloud(paths, columns=["v"]).rows([N + 1]), X[1:2, 1:2])
    assert cg.open_cloud([folder / "single.parquet"] * 2).dtype == np.float32
    FRAME.select("u", "v").write_csv(tmp_path / "fewer.csv")
    FRAME.rename({"u": "z"}).write_csv(tmp_path / "others.csv")
    np.save(tmp_path / "fewer.npy", X[:, :2])
    for other, says in (
        ("fewer.csv", "has 2 features and .* has 3; choose the same ones"),
        ("others.csv", "has the features 'z', 'v', 'w', and"),
        ("fewer.npy", "has 2 features, and .* has 3"),
    ):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / other))}: {says}"):
            cg.open_cloud([folder / "c.csv", tmp_path / other])
    with pytest.raises(ValueError, match=r"c\.csv names its features \('u', 'v', 'w'\) and .*c\.npy does not"):
        cg.open_cloud([folder / "c.csv", folder / "c.npy"])


def weights_of(cloud):
    return np.concatenate([weights for _, weights in cloud.chunks()])


def test_weights_from_everywhere(tmp_path):
    w = np.arange(N) / 8
    FRAME.with_columns(mass=w).write_parquet(tmp_path / "c.parquet", row_group_size=50)
    FRAME.with_columns(mass=w).write_csv(tmp_path / "c.csv")
    np.save(tmp_path / "c.npy", X)
    np.savez(tmp_path / "c.npz", x=X, mass=w)
    fields = [*((name, "f8") for name in NAMES), ("mass", "f4")]
    np.save(tmp_path / "fields.npy", np.array([(*x, m) for x, m in zip(X, w)], fields))
    np.save(tmp_path / "w.npy", w)
    np.save(tmp_path / "column.npy", w[:, None].astype(">f4"))
    pl.DataFrame({"mass": w}).write_csv(tmp_path / "w.csv")
    write_zarr(tmp_path / "c.zarr", X)
    write_zarr(tmp_path / "w.zarr", w, (30,))
    cases = [("c.parquet", "mass"), ("c.csv", "mass"), ("c.npz", "mass"), ("fields.npy", "mass")]
    cases += [
        (name, tmp_path / file) for name in ("c.npy", "c.zarr") for file in ("w.npy", "column.npy", "w.csv", "w.zarr")
    ]
    cases += [("c.npy", w), ("c.npy", list(w)), ("c.npy", str(tmp_path / "w.npy"))]
    for name, weights in cases:
        cloud = cg.open_cloud(tmp_path / name, weights=weights, chunk_size=60, key="x" if name == "c.npz" else None)
        np.testing.assert_array_equal(weights_of(cloud), w)
        np.testing.assert_array_equal(gathered(cloud), X)
        np.testing.assert_array_equal(cloud.rows([5]), X[5:6])
        assert repr(cloud).endswith("4 chunks, weighted)")
        assert cloud.reduce(chunk_sums.moments, np.zeros(D))[1] == w.sum()
        assert pickle.loads(pickle.dumps(cloud)).reduce(chunk_sums.moments, np.zeros(D))[1] == w.sum()
    both = cg.open_cloud([tmp_path / "c.parquet", tmp_path / "c.csv"], weights="mass", chunk_size=100)
    np.testing.assert_array_equal(weights_of(both), np.tile(w, 2))
    both = cg.open_cloud(
        [tmp_path / "c.npy"] * 2, weights=[tmp_path / "w.npy", tmp_path / "column.npy"], chunk_size=100
    )
    np.testing.assert_array_equal(weights_of(both), np.tile(w, 2))


def test_weights_that_are_none_are_refused(tmp_path):
    np.save(tmp_path / "c.npy", X)
    w = np.ones(N)
    for name, change in {"negative": -1.0, "nan": np.nan, "infinite": np.inf}.items():
        w[150], w[0] = change, 1
        np.save(tmp_path / f"{name}.npy", w)
        FRAME.with_columns(mass=w).write_parquet(tmp_path / f"{name}.parquet", row_group_size=40)
        FRAME.with_columns(mass=w).write_csv(tmp_path / f"{name}.csv")
    np.save(tmp_path / "zero.npy", 0 * X[:, 0])
    FRAME.with_columns(mass=0.0).write_parquet(tmp_path / "zero.parquet")
    np.save(tmp_path / "short.npy", np.ones(N - 1))
    for name, says in {"negative": "negative", "nan": "lacks", "infinite": "is infinite in"}.items():
        for open_it in (
            lambda name=name: cg.open_cloud(tmp_path / "c.npy", weights=tmp_path / f"{name}.npy"),
            lambda name=name: cg.open_cloud(tmp_path / f"{name}.parquet", weights="mass"),
            lambda name=name: cg.open_cloud(tmp_path / f"{name}.csv", weights="mass"),
        ):
            with pytest.raises(ValueError, match=rf"{name}\.\w+: .*{says}.* in row 151"):
                gathered(open_it())
    for call, says in (
        (
            lambda: cg.open_cloud(tmp_path / "c.npy", weights=tmp_path / "zero.npy"),
            r"weights: all weights of .* are zero",
        ),
        (lambda: cg.open_cloud(tmp_path / "zero.parquet", weights="mass"), "weights: all weights of 'mass' are zero"),
        (
            lambda: cg.open_cloud(tmp_path / "c.npy", weights=tmp_path / "short.npy"),
            "holds 229 weights, and .* 230 points",
        ),
        (
            lambda: cg.open_cloud(tmp_path / "c.npy", weights=np.ones(7)),
            r"weights: expected shape \(230,\), got \(7,\)",
        ),
        (
            lambda: cg.open_cloud(tmp_path / "c.npy", weights=tmp_path / "c.npy"),
            "expected one weight a point, got 3 columns",
        ),
        (lambda: cg.open_cloud(tmp_path / "c.npy", weights="mass"), "its columns have no names, so none is 'mass'"),
        (
            lambda: cg.open_cloud(tmp_path / "zero.parquet", weights="m"),
            "there is no column 'm'; it has 'u', 'v', 'w', 'mass'",
        ),
        (lambda: cg.open_cloud([tmp_path / "c.npy"] * 3, weights=[tmp_path / "zero.npy"] * 2), "2 files for 3 files"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_missing_is_told_with_its_place(tmp_path_factory, data):
    """In the first chunk that has any: how many, in which column, and the row of the first."""
    folder = tmp_path_factory.mktemp("drawn")
    row, column = data.draw(st.integers(0, N - 1)), data.draw(st.integers(0, D - 1))
    value = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    x = X.copy()
    x[row:, column] = value
    name = data.draw(st.sampled_from(["c.npy", "f.npy", "c.npz", "c.parquet", "c.csv", "c.zarr"]))
    path = folder / name
    if name.endswith("npy"):
        np.save(path, np.asfortranarray(x) if name == "f.npy" else x)
    elif name == "c.npz":
        np.savez_compressed(path, x)
    elif name == "c.zarr":
        write_zarr(path, x)
    else:
        frame = pl.DataFrame(x, schema=list(NAMES))
        frame.write_csv(path) if name == "c.csv" else frame.write_parquet(
            path, row_group_size=data.draw(st.integers(1, 240))
        )
    label = repr(NAMES[column]) if name in ("c.parquet", "c.csv") else str(column)
    what = "lacks" if np.isnan(value) else "is infinite in"
    says = rf"^{re.escape(str(path))}: column {label} {what} \d+ of \d+ values.*, the first in row {row + 1}; drop those rows"
    with pytest.raises(ValueError, match=says):
        gathered(cg.open_cloud(path, chunk_size=data.draw(st.integers(1, 240))))


def test_rows_of_several_files_are_counted_in_each(tmp_path):
    for name, x in (("a.npy", X), ("b.npy", np.where(np.arange(N)[:, None] == 7, np.nan, X))):
        np.save(tmp_path / name, x)
    chunks = cg.open_cloud([tmp_path / "a.npy", tmp_path / "b.npy"], chunk_size=N).chunks()
    np.testing.assert_array_equal(next(chunks).points, X)
    with pytest.raises(
        ValueError, match=r"b\.npy: column 0 lacks 1 of 230 values in rows 1 to 230, the first in row 8"
    ):
        next(chunks)


def test_large_numbers_are_not_called_infinite(tmp_path):
    """Their sum is, in float32 and in float64."""
    for dtype, value in ((np.float32, 3e38), (np.float64, 1e308)):
        x = np.full((50, 2), value, dtype)
        x[1] *= -1
        np.save(tmp_path / "c.npy", x)
        np.testing.assert_array_equal(gathered(cg.open_cloud(tmp_path / "c.npy")), x)


def test_a_file_that_changes_is_refused(tmp_path):
    for name in ("c.npy", "c.parquet", "c.csv", "c.npz"):
        path = tmp_path / name
        FORMATS[name](path) if name in FORMATS else np.savez_compressed(path, X)
        cloud = cg.open_cloud(path, chunk_size=10)
        assert len(gathered(cloud)) == N
        chunks = cloud.chunks()
        next(chunks)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        for call in (
            cloud.reduce,
            lambda shape, cloud=cloud: cloud.rows([N - 1]),
            lambda shape, chunks=chunks: list(chunks),
        ):
            with pytest.raises(
                ValueError, match=rf"^{re.escape(str(path))}: has changed since .* shrunk; open it again"
            ):
                call(chunk_sums.shapes)
        path.write_bytes(data)
        os.utime(path, ns=(0, 10**18))
        with pytest.raises(ValueError, match="has changed since it was opened; open it again"):
            next(cloud.chunks())
        path.unlink()
        with pytest.raises(ValueError, match="is gone since it was opened; bring it back"):
            cloud.reduce(chunk_sums.shapes)


def readers():
    return [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


def open_files(folder):
    links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.islink(link) and os.readlink(link).startswith(str(folder))]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for open files in /proc")
@pytest.mark.parametrize("name", ["c.npy", "packed.npz", "c.parquet", "c.csv", "c.zarr"])
def test_an_iterator_that_is_given_up_leaves_nothing(folder, name):
    cloud = cg.open_cloud(folder / name, chunk_size=10)
    assert not readers() and not open_files(folder)
    chunks = cloud.chunks()
    assert not readers(), "nothing is read before it is asked for"
    next(chunks)
    assert len(readers()) == 1
    del chunks
    gc.collect(1)  # of what is young: traced programs are millions of objects
    assert not readers() and not open_files(folder)
    for _ in cloud.chunks():
        break
    with pytest.raises(ZeroDivisionError):
        cloud.reduce(lambda *_: 1 // 0)
    gc.collect(1)  # of what is young: traced programs are millions of objects
    assert not readers() and not open_files(folder)
    assert cloud.reduce(chunk_sums.threads)[0] == 23, "one reader a pass"
    assert not readers() and not open_files(folder)


def test_threads_read_one_cloud_at_once(folder):
    for name in ("c.npy", "packed.npz", "c.parquet", "c.csv"):
        cloud, expected = cg.open_cloud(folder / name, chunk_size=7), whole(folder / name)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _, cloud=cloud: gathered(cloud), range(8)):
                np.testing.assert_array_equal(found, expected)


def test_chunks_are_the_callers_own(folder):
    """To write into one changes nothing else."""
    for name in ("c.npy", "c.parquet", "c.csv", "packed.npz"):
        cloud, expected = cg.open_cloud(folder / name, chunk_size=50), whole(folder / name)
        kept = []
        for points, _ in cloud.chunks():
            kept.append(points.copy())
            if points.flags.writeable:
                points[:] = np.nan
        np.testing.assert_array_equal(np.concatenate(kept), expected)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda p: cg.open_cloud(p / "absent.npy"), FileNotFoundError, r"absent\.npy: no such file; check the name"),
        (
            lambda p: cg.open_cloud(p / "absent.zarr"),
            FileNotFoundError,
            r"absent\.zarr: no such folder; check the name",
        ),
        (lambda p: cg.open_cloud(p / "c.xlsx"), ValueError, r"can't read \.xlsx; use one of \.npy"),
        (lambda p: cg.open_cloud(p), ValueError, "can't read a file without ending"),
        (
            lambda p: cg.open_cloud(X),
            TypeError,
            "path: expected a file, several, or a Dask array, got ndarray; what is in",
        ),
        (lambda p: cg.open_cloud([]), TypeError, "path: expected a file, several, or a Dask array, got an empty list"),
        (lambda p: cg.open_cloud(p / "c.npy", chunk_size=0), ValueError, "^chunk_size: "),
        (lambda p: cg.open_cloud(p / "c.npy", columns="u"), TypeError, "columns: expected names or positions"),
        (lambda p: cg.open_cloud(p / "c.npy", columns=[]), ValueError, "columns: names none"),
        (lambda p: cg.open_cloud(p / "c.npy", columns=[0, 0]), ValueError, "columns: names some twice"),
        (lambda p: cg.open_cloud(p / "c.npy", columns=[3]), ValueError, "there is no column 3; it has columns 0 to 2"),
        (lambda p: cg.open_cloud(p / "c.npy", columns=[-1]), ValueError, "there is no column -1"),
        (
            lambda p: cg.open_cloud(p / "c.npy", columns=["u"]),
            ValueError,
            "its columns have no names; choose by position",
        ),
        (
            lambda p: cg.open_cloud(p / "fields.npy", columns=["z"]),
            ValueError,
            "there is no column 'z'; it has 'u', 'v', 'w'",
        ),
        (lambda p: cg.open_cloud(p / "c.parquet", columns=[0]), ValueError, "are chosen by name, not by position"),
        (
            lambda p: cg.open_cloud(p / "c.parquet", columns=["z"]),
            ValueError,
            "there is no column 'z'; it has 'u', 'v', 'w'",
        ),
        (
            lambda p: cg.open_cloud(p / "c.csv", columns=["z"]),
            ValueError,
            "there is no column 'z'; it has 'u', 'v', 'w'",
        ),
        (lambda p: cg.open_cloud(p / "c.csv", key="x"), ValueError, r"key is for \.npz files"),
        (lambda p: cg.open_cloud(p / "c.npy", header=True), ValueError, "header is for text files"),
        (lambda p: cg.open_cloud(p / "two.npz"), ValueError, r"two\.npz: holds 2 arrays \(a, b\); name one with key"),
        (lambda p: cg.open_cloud(p / "two.npz", key="c"), ValueError, "there is no array 'c'; it has 'a', 'b'"),
        (lambda p: cg.open_cloud(p / "group.zarr"), ValueError, r"is a group of arrays \(x\); name one with key"),
        (
            lambda p: cg.open_cloud(p / "vector.npy"),
            ValueError,
            r"expected an array of shape \(n, d\), got \(5,\); reshape",
        ),
        (lambda p: cg.open_cloud(p / "cube.npy"), ValueError, r"expected an array of shape \(n, d\), got \(2, 2, 2\)"),
        (lambda p: cg.open_cloud(p / "none.npy"), ValueError, r"expected an array of shape \(n, d\), got \(0, 2\)"),
        (
            lambda p: cg.open_cloud(p / "complex.npy"),
            ValueError,
            "expected real numbers, got dtype complex128; convert",
        ),
        (lambda p: cg.open_cloud(p / "objects.npy"), ValueError, "Object arrays cannot be loaded"),
        (lambda p: cg.open_cloud(p / "words.npy"), ValueError, "expected real numbers, got dtype <U1"),
        (lambda p: cg.open_cloud(p / "cut.npy"), ValueError, "claims 5520 bytes of numbers, and there are 5519"),
        (
            lambda p: cg.open_cloud(p / "packed_f.npz"),
            ValueError,
            "compressed array in Fortran's order, which can't be read in",
        ),
        (
            lambda p: cg.open_cloud(p / "empty.parquet"),
            ValueError,
            "the table has no rows; a cloud needs at least one point",
        ),
        (
            lambda p: cg.open_cloud(p / "flags.parquet"),
            ValueError,
            r"column 'flag' is not numeric \(Boolean\); leave it out",
        ),
        (lambda p: cg.open_cloud(p / "broken.parquet"), ValueError, r"can't be read as \.parquet \("),
        (lambda p: cg.open_cloud(p / "empty.csv"), ValueError, "the file is empty; a cloud needs at least one point"),
        (lambda p: cg.open_cloud(p / "broken.csv.gz"), ValueError, r"can't be read as \.csv\.gz \("),
    ],
)
def test_what_is_no_cloud_is_refused(refused, call, error, says):
    with pytest.raises(error, match=says) as caught:
        call(refused)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture(scope="module")
def refused(folder):
    arrays = {"vector": np.ones(5), "cube": np.ones((2, 2, 2)), "none": np.ones((0, 2)), "complex": X + 1j}
    arrays |= {"objects": np.array([[None]]), "words": np.array([["a"]])}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    (folder / "cut.npy").write_bytes((folder / "c.npy").read_bytes()[:-1])
    np.savez(folder / "two.npz", a=X, b=X)
    np.savez_compressed(folder / "packed_f.npz", np.asfortranarray(X))
    FRAME.clear().write_parquet(folder / "empty.parquet")
    FRAME.with_columns(flag=True).write_parquet(folder / "flags.parquet")
    (folder / "broken.parquet").write_bytes(b"PAR1" + b"\0" * 50)
    (folder / "empty.csv").write_text("")
    (folder / "broken.csv.gz").write_bytes(b"\x1f\x8b\x08" + b"\0" * 40)
    zarr.open_group(folder / "group.zarr", mode="w").create_array("x", shape=X.shape, dtype="f8")[:] = X
    return folder


def test_a_group_of_zarr_names_its_array(refused):
    cloud = cg.open_cloud(refused / "group.zarr", key="x")
    np.testing.assert_array_equal(gathered(cloud), X)


def test_a_damaged_member_is_refused_when_it_is_read(tmp_path):
    np.savez_compressed(tmp_path / "c.npz", np.random.RandomState(0).randn(5000, 4))
    data = bytearray((tmp_path / "c.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "c.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"c\.npz: can't be read as \.npz \(.*save it again"):
        gathered(cg.open_cloud(tmp_path / "c.npz", chunk_size=100))
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x.npy", b"\x93NUMPY")
    with pytest.raises(ValueError, match="its compression, 12, is not one that NumPy writes"):
        cg.open_cloud(tmp_path / "b.npz")


def test_an_index_is_left_out_as_of_the_whole(tmp_path):
    """One that counts the rows to the end; not one that ceases to, far below what tells it."""
    n = 10_000
    x = np.random.RandomState(0).randn(n)
    ceases = np.where(np.arange(n) == n - 1, 0, np.arange(n))
    for name, column in {"counts": np.arange(n), "from one": np.arange(1, n + 1), "ceases": ceases}.items():
        for end in ("parquet", "csv"):
            path = tmp_path / f"{name}.{end}"
            frame = pl.DataFrame({"id": column, "x": x})
            frame.write_csv(path) if end == "csv" else frame.write_parquet(path, row_group_size=3000)
            if name == "ceases":
                assert cg.open_cloud(path).names == clouds.read_named_cloud(path).names == ("id", "x")
            else:
                with pytest.warns(UserWarning, match=r"left out 'id', which counts the rows; name it in columns if"):
                    assert cg.open_cloud(path).names == clouds.read_named_cloud(path).names == ("x",)
            assert cg.open_cloud(path, columns=["x", "id"]).names == ("x", "id")
    kept = '{"index_columns": ["__index_level_0__"]}'
    pl.DataFrame({"x": x, "__index_level_0__": x}).write_parquet(tmp_path / "kept.parquet", metadata={"pandas": kept})
    with pytest.warns(UserWarning, match="left out '__index_level_0__', which is the index that pandas kept"):
        assert cg.open_cloud(tmp_path / "kept.parquet").names == ("x",)


MEMORY = """
import os, sys
import numpy as np
import coupled_gmm as cg
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
cloud = cg.open_cloud(sys.argv[1])
start = most = resident()
total = 0
for points, _ in cloud.chunks():
    total += len(points)
    most = max(most, resident())
assert total == len(cloud)
print(most - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
@pytest.mark.parametrize("kind", ["C", "F", "npz"])
def test_memory_is_that_of_chunks(tmp_path, kind):
    """400 MB, of which a whole array would hold all; the file is a hole, so that none are written."""
    shape = (25_000_000, 4)
    path = tmp_path / ("c.npz" if kind == "npz" else "c.npy")
    if kind == "npz":
        with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for _ in range(100):
                file.write(bytes(4_000_000))
    else:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": kind == "F", "shape": shape})
            file.truncate(file.tell() + 400_000_000)
    end = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert end.returncode == 0, end.stderr
    assert float(end.stdout) < 120


def test_what_wants_an_array_refuses_an_open_cloud_by_name(tmp_path):
    np.save(tmp_path / "cloud.npy", np.eye(3))
    cloud = cg.open_cloud(tmp_path / "cloud.npy")
    with pytest.raises(
        TypeError, match=r"means: expected an array, got OpenCloud\(.*not in memory; take points of it: means.rows"
    ):
        cg.GaussianMixture.from_moments(cloud, [np.eye(3)] * 3, np.full(3, 1 / 3))
