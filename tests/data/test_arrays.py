""".npy and .npz files: what they hold, and what a damaged or dishonest one is called."""

import os
import re
import zipfile

import numpy as np
import polars as pl
import pytest

from coupled_gmm.data import arrays, clouds

X = np.array([[1.0, 2.0], [3.0, 4.5], [-1.0, 0.25]])


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(X),
        X.astype(">f4"),
        X.astype(">f8"),
        X.astype(np.float16),
        X.astype(np.longdouble),
        np.array(list(map(tuple, X)), [("x", "f8"), ("y", "f4")]),
        np.array(list(map(tuple, X)), [("x", "f8"), ("y", "f4")]).view(np.recarray),
    ],
    ids=lambda array: f"{array.dtype}-{array.flags.f_contiguous}",
)
def test_arrays_of_every_kind(tmp_path, array):
    np.save(tmp_path / "c.npy", array)
    np.savez_compressed(tmp_path / "c.npz", array)
    for name in ("c.npy", "c.npz"):
        cloud = clouds.read_named_cloud(tmp_path / name)
        np.testing.assert_array_equal(cloud.points, X)
        assert cloud.points.dtype in (np.float32, np.float64) and cloud.points.dtype.isnative
        assert cloud.names == array.dtype.names


def test_whole_numbers_and_flags(tmp_path):
    for array in (np.arange(6, dtype=">i2").reshape(3, 2), X > 1):
        np.save(tmp_path / "c.npy", array)
        np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "c.npy"), array.astype(float))


def test_weights_from_a_field(tmp_path):
    np.save(tmp_path / "c.npy", np.array([(1.0, 2.0, 0.5)], [("x", "f8"), ("y", "f8"), ("w", "f8")]))
    np.testing.assert_array_equal(clouds.read_weights(tmp_path / "c.npy", name="w"), [0.5])
    cloud = clouds.read_named_cloud(tmp_path / "c.npy", exclude=["w"])
    assert cloud.names == ("x", "y") and cloud.points.shape == (1, 2)


def _npy(shape, body=b"", descr="<f8"):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def _zip(path, body, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", body)


DISHONEST = {
    "a shape of terabytes": _npy((10**6, 10**6), b"\0" * 64),
    "a shape beyond integers": _npy((10**30, 2), b"\0" * 64),
    "a negative shape": _npy((-2, -3), b"\0" * 48),
    "too little": _npy((3, 2), b"\0" * 40),
    "too much": _npy((3, 2), b"\0" * 56),
    "an open string": b"\x93NUMPY\x01\x00\x08\x00'''{[(\n \n",
    "an open bracket": b"\x93NUMPY\x01\x00\x08\x00{'a': (\n",
    "brackets": b"\x93NUMPY\x01\x00\x00\x20" + b"[" * 8192,
    "no header": b"\x93NUMPY\x01\x00",
    "a later version": b"\x93NUMPY\x09\x00" + b"\0" * 50,
    "an unknown dtype": _npy((3, 2), descr="<q99"),
    "objects": _npy((3, 2), b"\0" * 48, descr="|O"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", DISHONEST)
def test_what_a_header_claims_is_not_believed(tmp_path, name):
    (tmp_path / "c.npy").write_bytes(DISHONEST[name])
    _zip(tmp_path / "c.npz", DISHONEST[name])
    for file in (tmp_path / "c.npy", tmp_path / "c.npz"):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: can't be read as \.np") as caught:
            clouds.read_cloud(file)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_numpy_does_not_write(tmp_path, compression):
    _zip(tmp_path / "c.npz", _npy((10**5, 8), b"\0" * (64 * 10**5)), compression)
    with pytest.raises(
        ValueError, match=r"can't be read as \.npz \(its compression, \d+, is not one that NumPy writes\)"
    ):
        clouds.read_cloud(tmp_path / "c.npz")


def test_flipped_bits_are_refused_or_change_nothing_else(tmp_path):
    """Every refusal is a ValueError of one line, whatever zip, zlib, NumPy or polars raise."""
    draw = np.random.default_rng(0)
    np.save(tmp_path / "c.npy", X)
    np.savez_compressed(tmp_path / "c.npz", x=X)
    for name in ("c.npy", "c.npz"):
        good = (tmp_path / name).read_bytes()
        for _ in range(150):
            data = bytearray(good)
            for place in draw.integers(0, min(len(data), 400), draw.integers(1, 4)):
                data[place] ^= 1 << int(draw.integers(8))
            (tmp_path / f"bad-{name}").write_bytes(data[: draw.integers(1, len(data))] if draw.random() < 0.2 else data)
            try:
                clouds.read_cloud(tmp_path / f"bad-{name}")
            except ValueError as error:
                assert str(error).startswith(str(tmp_path)) and len(str(error).splitlines()) == 1


@pytest.mark.parametrize("ending", [".csv", ".npy", ".parquet"])
def test_a_named_pipe_does_not_hang(tmp_path, ending):
    os.mkfifo(tmp_path / f"c{ending}")
    with pytest.raises(ValueError, match=r"it is no regular file\); name a file"):
        clouds.read_cloud(tmp_path / f"c{ending}")


@pytest.mark.parametrize("ending", [".csv", ".npy", ".npz"])
def test_no_permission_is_not_called_damage(tmp_path, ending, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    (tmp_path / f"c{ending}").write_bytes(b"1,2\n")
    monkeypatch.setattr(arrays, "read", refuse)
    monkeypatch.setattr(clouds.dialect, "read", refuse)
    with pytest.raises(ValueError, match=r"may not be read; ask for permission to, or change it$"):
        clouds.read_cloud(tmp_path / f"c{ending}")


def test_a_panic_of_polars_is_a_refusal(tmp_path, monkeypatch):
    def panic(*arguments, **options):
        raise pl.exceptions.PanicException("index out of bounds")

    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(pl, "read_parquet", panic)
    with pytest.raises(ValueError, match=r"can't be read as \.parquet \(index out of bounds\); save it again"):
        clouds.read_cloud(tmp_path / "c.parquet")


def test_parquet_as_pandas_writes_it(tmp_path):
    """Its index is a column of the file, and no feature."""
    frame = pl.DataFrame({"x": [1.5, 2.0], "n": [1, 2], "__index_level_0__": [7, 3], "cell": ["a", "b"]})
    about = '{"index_columns": ["__index_level_0__", "cell"]}'
    frame.write_parquet(tmp_path / "c.parquet", metadata={"pandas": about})
    cloud = clouds.read_named_cloud(tmp_path / "c.parquet")
    assert cloud.names == ("x", "n") and len(cloud.notes) == 2
    np.testing.assert_array_equal(cloud.points, [[1.5, 1], [2, 2]])
    frame.drop("cell").write_parquet(
        tmp_path / "c.parquet", metadata={"pandas": '{"index_columns": [{"kind": "range"}]}'}
    )
    assert clouds.read_named_cloud(tmp_path / "c.parquet").names == ("x", "n")


def test_parquet_columns(tmp_path):
    frame = (
        pl.DataFrame({"d": ["1.5", "2.25"]}).cast(pl.Decimal(10, 2)).with_columns(i=pl.Series([1, 2], dtype=pl.UInt8))
    )
    frame.write_parquet(tmp_path / "c.parquet")
    np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "c.parquet"), [[1.5, 1], [2.25, 2]])
    for column, says in (
        (pl.Series([1, None]), "column 'z' lacks 1 of 2 values, the first in row 2"),
        (pl.Series([None, None]), "column 'z' lacks 2 of 2 values, the first in row 1"),
        (pl.Series([float("nan"), 1]), "column 'z' lacks 1 of 2 values, the first in row 1"),
        (pl.Series([[1.0], [2.0]]), r"column 'z' is not numeric \(List\(Float64\)\); leave it out by naming columns"),
        (pl.Series([True, False]), r"column 'z' is not numeric \(Boolean\)"),
        (pl.Series(["a", "b"], dtype=pl.Categorical), r"column 'z' is not numeric \(Categorical"),
    ):
        frame.with_columns(z=column).write_parquet(tmp_path / "c.parquet")
        with pytest.raises(ValueError, match=says):
            clouds.read_cloud(tmp_path / "c.parquet")
