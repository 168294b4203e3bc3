"""Arrays from .npy and .npz files: no code is run, and no memory taken for what a header merely claims."""

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from coupled_gmm.core import foreign

_MOST_SMALLER = 1100  # deflate makes nothing smaller than by 1032
_LOCAL_HEADER = 30  # bytes before the name of a zip's member, the last four of which say how long name and extras are


class Layout(NamedTuple):
    """How an array lies in a file."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    offset: int  # of its numbers, in bytes

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def read(path: Path, key: str | None = None) -> np.ndarray:
    """The array in a .npy, or the one named key (the only one) in a .npz.

    Raises:
      ValueError: the array can't be named; the message starts with the file's name.
      Exception: whatever zip, zlib and NumPy raise of damaged files.
    """
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            return _array(file, path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        chosen = member(path, archive, key)
        with archive.open(chosen) as file:
            return _array(file, chosen.file_size)


def member(path: Path, archive: zipfile.ZipFile, key: str | None = None) -> zipfile.ZipInfo:
    """The member of a .npz that holds the array named key, or the only one.

    Raises:
      ValueError: there is none, or several and no key; or it is not packed as NumPy packs.
    """
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    chosen = members[_key(path, list(members), key)]
    if chosen.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"its compression, {chosen.compress_type}, is not one that NumPy writes")
    if chosen.file_size > _MOST_SMALLER * chosen.compress_size:
        raise ValueError(f"{chosen.compress_size} bytes claim to hold {chosen.file_size}")
    return chosen


def beginning(file: IO[bytes], chosen: zipfile.ZipInfo) -> int:
    """Where the bytes of a zip's member begin in the file."""
    file.seek(chosen.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise ValueError("a member does not begin where the zip says")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return chosen.header_offset + _LOCAL_HEADER + name + extra


def layout(file: IO[bytes], size: int) -> Layout:
    """How the array lies that fills so many bytes, of which the file stands at the first.

    Raises:
      ValueError: it holds objects, or not what its header claims; and what NumPy raises of damaged headers.
    """
    start = file.tell()
    version = np.lib.format.read_magic(file)
    read_header = {1: np.lib.format.read_array_header_1_0}.get(version[0], np.lib.format.read_array_header_2_0)
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: they may run code; save an array of floats")
    if any(axis < 0 for axis in shape):
        raise ValueError(f"the header claims shape {shape}")
    found = Layout(shape, fortran, dtype, file.tell())
    there = size - (found.offset - start)
    if found.size != there:
        raise ValueError(f"the header claims {found.size} bytes of numbers, and there are {there}")
    return found


def floats(path: Path, array: np.ndarray) -> np.ndarray:
    """Real numbers of any kind as floats of this machine.

    Raises:
      ValueError: they are no real numbers.
    """
    check_real(path, array.dtype)
    return foreign.native_floats(str(path), array)


def check_real(path: Path, dtype: np.dtype) -> None:
    if dtype.kind not in "fiub":
        raise ValueError(f"{path}: expected real numbers, got dtype {dtype}; convert the array to floats")


def check_fields(path: Path, dtype: np.dtype, ndim: int, names: tuple[str, ...]) -> None:
    """Refuse an array with named fields whose `names` are not one number each."""
    for name in names:
        check_real(path, dtype[name].base)
    if ndim != 1 or any(dtype[name].shape for name in names):
        raise ValueError(f"{path}: expected fields of one number each, got dtype {dtype}; save plain floats")


def check_cloud(path: object, shape: tuple[int, ...]) -> None:
    """Refuse the shape of what is no cloud."""
    if len(shape) != 2 or 0 in shape:
        hint = "reshape one feature to (n, 1)" if len(shape) == 1 else "save one row a point and one column a feature"
        raise ValueError(f"{path}: expected an array of shape (n, d), got {shape}; {hint}")


def positions(path: object, columns: Sequence[Any] | None, d: int) -> tuple[int, ...]:
    """Places of the features of an array of d columns."""
    if columns is None:
        return tuple(range(d))
    for column in columns:
        if not isinstance(column, (int, np.integer)) or isinstance(column, bool):
            raise ValueError(f"{path}: its columns have no names; choose by position (0, 1 ...), not {column!r}")
        if not 0 <= column < d:
            raise ValueError(f"{path}: there is no column {column}; it has columns 0 to {d - 1}")
    return tuple(int(column) for column in columns)


def check_finite(called: object, column: str, values: np.ndarray, first: int | None = None) -> None:
    """Refuse a column that holds NaN or infinite numbers.

    Args:
      called: the file.
      column: what to call the column.
      values: all of it, or those from row `first` (counted from 0) on.

    Raises:
      ValueError: file, column, how many, and the row of the first, counted from 1.
    """
    for wrong, what in ((np.isnan(values), "lacks"), (np.isinf(values), "is infinite in")):
        if count := int(wrong.sum()):
            start = first or 0
            rows = "" if first is None else f" in rows {start + 1} to {start + len(values)}"
            text = f"column {column} {what} {count} of {len(values)} values{rows}, the first in row"
            remedy = "drop those rows, fill them in, or leave it out by naming columns"
            raise ValueError(f"{called}: {text} {start + int(wrong.argmax()) + 1}; {remedy}")


def _array(file: IO[bytes], size: int) -> np.ndarray:
    """The array that fills a file of so many bytes."""
    found = layout(file, size)
    data = file.read(found.size)
    if len(data) != found.size:
        raise ValueError(f"the header claims {found.size} bytes of numbers, and there are {len(data)}")
    return np.frombuffer(bytearray(data), found.dtype).reshape(found.shape, order="F" if found.fortran else "C")


def _key(path: Path, names: list[str], key: str | None) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key is None:
        raise ValueError(f"{path}: holds {len(names)} arrays ({', '.join(names)}); name one with key")
    if key not in names:
        raise ValueError(f"{path}: there is no array {key!r}; it has {', '.join(map(repr, names))}")
    return key
