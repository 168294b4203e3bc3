"""Clouds in arrays on disk that are read in blocks: .npy, .npz and zarr.

Files are read into buffers of our own: the pages of a memory map would count as this process' memory. Arrays in Fortran's order
are read a column at a time, those of the block's rows.
"""

import contextlib
import dataclasses
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from coupled_gmm.core import foreign, installation
from coupled_gmm.data import arrays
from coupled_gmm.data.arrays import Layout
from coupled_gmm.data.files import Stamp, as_unreadable, unreadable
from coupled_gmm.data.streams import Block, File, Ranged, spans, steps

_APART = 2**16  # bytes that are rather read than skipped
_LONGEST = 2**23  # bytes that are read at once, where single rows are asked for
_ZARR = ("zarr.json", ".zarray", ".zgroup")  # what a folder of zarr holds, whatever its version


@dataclasses.dataclass(frozen=True)
class ArrayFile(Ranged):
    """An array in a .npy, or stored in a .npz, whose bytes can be reached.

    Args:
      layout: how it lies in the file.
    """

    layout: Layout

    def opened(self) -> IO[bytes]:
        return self.path.open("rb", buffering=0)

    def ranges(self, rows: int) -> Iterable[tuple[int, int]]:
        return steps(self.shape[0], rows)

    def around(self, indices: np.ndarray) -> Iterator[tuple[int, int]]:
        row = max(1, self.layout.size // self.shape[0])
        return spans(indices, max(1, _APART // row), max(1, _LONGEST // row))

    def read(self, handle: IO[bytes], start: int, stop: int) -> Block:
        shape, fortran, dtype, offset = self.layout
        if fortran and len(shape) == 2:
            columns = np.empty((len(self.columns), stop - start), dtype)
            for column, j in zip(columns, self.columns, strict=True):
                self._fill(handle, column, offset + (j * shape[0] + start) * dtype.itemsize)
            return Block(np.ascontiguousarray(_floats(self.path, columns).T))
        raw = np.empty((stop - start, *shape[1:]), dtype)
        self._fill(handle, raw, offset + start * (self.layout.size // shape[0]))
        return _taken(self, raw)

    def _fill(self, handle: IO[bytes], array: np.ndarray, offset: int) -> None:
        """Read all of an array from a place in the file."""
        left: Any = memoryview(array.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]
        handle.seek(offset)
        while left:
            with as_unreadable(self.path):
                count = handle.readinto(left)  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                self.check_unchanged()
                raise ValueError(f"{self.path}: ends before its last point; save it again")
            left = left[count:]


@dataclasses.dataclass(frozen=True)
class PackedArray(File):
    """An array in a compressed .npz: it is unpacked from its beginning whenever it is read.

    Args:
      member: its name in the zip.
      layout: how it lies in the member, in C's order.
    """

    member: str
    layout: Layout

    def blocks(self, rows: int) -> Iterator[Block]:
        self.check_unchanged()
        shape, _, dtype, offset = self.layout
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            file.read(offset)
            for start, stop in steps(self.shape[0], rows):
                raw = np.empty((stop - start, *shape[1:]), dtype)
                try:
                    data = file.read(raw.nbytes)
                except Exception as error:  # a damaged file makes zlib raise anything
                    raise unreadable(self.path, error) from error
                if len(data) != raw.nbytes:
                    raise unreadable(self.path, ValueError("it ends before its last point"))
                raw = np.frombuffer(data, dtype).reshape(raw.shape)
                yield self.checked(_taken(self, raw), start)
        self.check_unchanged()

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return self.picked(indices, _numbered(self.blocks(max(1, _LONGEST * self.shape[0] // self.layout.size))))


@dataclasses.dataclass(frozen=True)
class ZarrArray(Ranged):
    """An array of zarr, a folder of chunks, which are read whole.

    Args:
      key: the array's name in the folder, "" where the folder is the array.
      chunk: how many rows one chunk holds, or one shard.
    """

    key: str
    chunk: int

    def check_unchanged(self) -> None:
        """By its metadata: chunks that are written anew, in the same shape, are not noticed."""
        self.stamp.check(_metadata(self.path, self.key))

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        with as_unreadable(self.path):
            found = _zarr(self.path, self.key)
        if found.shape[0] != self.shape[0]:
            raise ValueError(f"{self.path}: has changed since it was opened; open it again")
        yield found

    def ranges(self, rows: int) -> Iterable[tuple[int, int]]:
        return steps(self.shape[0], self.chunk * max(1, rows // self.chunk))

    def read(self, handle: Any, start: int, stop: int) -> Block:
        return self._selected(handle, slice(start, stop))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        self.check_unchanged()
        with self.opened() as handle:
            return self.checked(self._selected(handle, indices), int(indices[0]) if len(indices) else 0).points

    def _selected(self, handle: Any, rows: Any) -> Block:
        with as_unreadable(self.path):
            if handle.ndim == 1:
                found = handle.oindex[rows][:, None]
            else:
                everything = self.columns == tuple(range(handle.shape[1]))
                found = handle.oindex[rows, slice(None) if everything else list(self.columns)]
        return Block(np.ascontiguousarray(_floats(self.path, np.asarray(found))))


def is_zarr(path: Path) -> bool:
    """Whether a path is a folder of zarr."""
    return path.is_dir() and any((path / name).is_file() for name in _ZARR)


def has_fields(path: Path, key: str | None) -> bool:
    """Whether the array in a .npy or .npz has fields with names."""
    with as_unreadable(path), path.open("rb") as file:
        return _located(path, file, key)[0].dtype.names is not None


def open_array(
    path: Path, columns: Sequence[Any] | None, key: str | None, weights: str | None, vector: bool = False
) -> File:
    """The cloud in a .npy or .npz.

    Args:
      path: of an existing file.
      columns: places of the features, or names of fields, in order; None takes all.
      key: of a .npz, the array to take.
      weights: of an array with fields, the one that holds weights.
      vector: whether an array (n,) is taken for one column.

    Raises:
      ValueError: no array of real numbers of shape (n, d); a column that is not there.
    """
    stamp = Stamp.of(path)
    with as_unreadable(path), path.open("rb") as file:
        layout, member = _located(path, file, key)
    names = layout.dtype.names
    if names is None:
        if weights is not None:
            raise ValueError(f"{path}: its columns have no names, so none is {weights!r}; give the weights' own file")
        arrays.check_real(path, layout.dtype)
        shape = (*layout.shape, 1) if vector and len(layout.shape) == 1 else layout.shape
        arrays.check_cloud(path, shape)
        taken = arrays.positions(path, columns, shape[1])
        labels, dtype = tuple(map(str, taken)), foreign.native_floats(str(path), np.empty(0, layout.dtype)).dtype
    else:
        wanted = [name for name in names if name != weights] if columns is None else list(columns)
        for name in wanted if weights is None else [*wanted, weights]:
            if name not in names:
                raise ValueError(f"{path}: there is no column {name!r}; it has {', '.join(map(repr, names))}")
        taken = tuple(wanted)
        arrays.check_fields(path, layout.dtype, len(layout.shape), (*taken, *([] if weights is None else [weights])))
        shape, labels, dtype = (*layout.shape, len(taken)), tuple(map(repr, taken)), np.dtype(np.float64)
        arrays.check_cloud(path, shape)
    found = (
        path,
        stamp,
        (shape[0], len(taken)),
        dtype,
        labels,
        None if names is None else tuple(map(str, taken)),
        weights,
    )
    if member is None:
        return ArrayFile(*found, taken, layout)
    if layout.fortran and len(layout.shape) == 2 and 1 not in layout.shape:
        raise ValueError(
            f"{path}: holds a compressed array in Fortran's order, which can't be read in chunks; save it with "
            "np.savez, uncompressed, or as .npy"
        )
    return PackedArray(*found, taken, member, layout)


def open_zarr(path: Path, columns: Sequence[Any] | None, key: str | None, vector: bool = False) -> ZarrArray:
    """The cloud in a folder of zarr; of a group, `key` names the array. Arguments and errors as `open_array`."""
    with as_unreadable(path):
        array = _zarr(path, key or "")
    if array.dtype.names is not None:
        raise ValueError(f"{path}: has fields with names; save one array of its columns")
    arrays.check_real(path, array.dtype)
    shape = (*array.shape, 1) if vector and array.ndim == 1 else array.shape
    arrays.check_cloud(path, shape)
    taken = arrays.positions(path, columns, shape[1])
    dtype = foreign.native_floats(str(path), np.empty(0, array.dtype)).dtype
    chunk = (array.shards or array.chunks)[0]
    stamp = Stamp.of(_metadata(path, key or ""))
    found = (path, stamp, (shape[0], len(taken)), dtype, tuple(map(str, taken)), None, None)
    return ZarrArray(*found, taken, key or "", chunk)


def _located(path: Path, file: IO[bytes], key: str | None) -> tuple[Layout, str | None]:
    """How an array lies in a .npy or .npz; and the name of its member, where that must be unpacked."""
    if path.suffix.lower() == ".npy":
        return arrays.layout(file, path.stat().st_size), None
    with zipfile.ZipFile(file) as archive:
        member = arrays.member(path, archive, key)
        if member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1:
            file.seek(arrays.beginning(file, member))
            return arrays.layout(file, member.file_size), None
        with archive.open(member) as unpacked:
            layout = arrays.layout(unpacked, member.file_size)
        return layout, member.filename


def _taken(file: ArrayFile | PackedArray, raw: np.ndarray) -> Block:
    """The features, and the weights, of rows as they lie in a file in C's order."""
    if raw.dtype.names is not None:
        columns = [_floats(file.path, raw[name]) for name in file.columns]
        weights = None if file.weights is None else _floats(file.path, raw[file.weights])
        return Block(np.stack(columns, axis=1).astype(file.dtype), weights)
    if raw.ndim == 1:
        raw = raw[:, None]
    everything = file.columns == tuple(range(raw.shape[1]))
    return Block(_floats(file.path, raw if everything else raw[:, file.columns]))


def _floats(path: Path, array: np.ndarray) -> np.ndarray:
    return foreign.native_floats(str(path), array)


def _numbered(blocks: Iterator[Block]) -> Iterator[tuple[int, Block]]:
    first = 0
    for block in blocks:
        yield first, block
        first += len(block.points)


def _zarr(path: Path, key: str) -> Any:
    """The array of zarr, open to be read."""
    with installation.needed("zarr", "a zarr array"):
        import zarr

    found: Any = zarr.open(str(path), mode="r", path=key or None)
    if not hasattr(found, "shape"):
        names = ", ".join(sorted(found.array_keys()))
        raise ValueError(f"{path}: is a group of arrays ({names}); name one with key")
    return found


def _metadata(path: Path, key: str) -> Path:
    folder = path / key
    return next((folder / name for name in _ZARR if (folder / name).is_file()), folder / _ZARR[0])
