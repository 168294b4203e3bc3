"""Points that are written in blocks, into .npy or Parquet: whole or not at all, and never all in memory."""

import contextlib
import itertools
import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from coupled_gmm.core import foreign, installation
from coupled_gmm.core.errors import ArgumentTypeError, reason
from coupled_gmm.data import array_files, files, streams
from coupled_gmm.data.streams import Block, File

_FORMATS = (".npy", ".parquet")
_GROUP = 2**25  # bytes of a row group
_PATIENCE = 0.1  # seconds between two looks whether polars has failed


def place(path: str | PathLike[str]) -> Path:
    """Where a file may be written.

    Raises:
      TypeError, ValueError: it is no path, or of another format; polars, which writes Parquet, is not installed.
    """
    if not isinstance(path, (str, PathLike)):
        raise ArgumentTypeError("path", f"expected a file to write, got {type(path).__name__}")
    found = Path(path)
    if files.ending(found) not in _FORMATS:
        end = files.ending(found) or "a file without ending"
        raise ValueError(f"{found}: can't write {end}; use one of {', '.join(_FORMATS)}")
    if files.ending(found) == ".parquet":
        with installation.needed("tables", "a Parquet file"):
            import polars  # noqa: F401
    return found


def array(path: Path, blocks: Iterator[Block], shape: tuple[int, int]) -> File:
    """A .npy of the points (n, d) in blocks."""
    with files.whole(path) as file:
        for first, (points, _) in _checked(path, blocks, shape):
            if not first:
                about = {"descr": np.lib.format.dtype_to_descr(points.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, about)
            file.write(points.data)
        _settle(file)
    return array_files.open_array(path, None, None, None)


def table(
    path: Path, blocks: Iterator[Block], shape: tuple[int, int], names: Sequence[str] | None, weighted: bool
) -> File:
    """A Parquet file of the points (n, d) in blocks, and of their weights.

    Args:
      names: of the features; None calls them by their positions.
      weighted: whether blocks have weights.
    """
    from coupled_gmm.data import table_files  # polars is imported where a table is written

    names = [f"column_{i}" for i in range(shape[1])] if names is None else list(names)
    free = (name for name in _numbered("weight") if name not in names)
    column = next(free) if weighted else None
    with files.whole(path) as file:
        frames = (table_files.frame(block, names, column) for _, block in _checked(path, blocks, shape))
        _sink(file, frames, max(1, _GROUP // (8 * shape[1])))
        _settle(file)
    return table_files.open_parquet(path, names, column)[0]


def _checked(path: Path, blocks: Iterator[Block], shape: tuple[int, int]) -> Iterator[tuple[int, Block]]:
    """Blocks of finite floats, of one dtype, with the row of the first of each."""
    first, dtype, labels = 0, None, tuple(map(str, range(shape[1])))
    for points, weights in blocks:
        points = foreign.native_floats("function", points)
        dtype = points.dtype if dtype is None else dtype
        block = Block(np.ascontiguousarray(points, dtype), weights)
        yield first, streams.checked(str(path), labels, block, "weights", first)
        first += len(points)
    if first != shape[0]:
        raise ValueError(f"{path}: {shape[0]:,} points were to be written, and {first:,} came; open their cloud again")


def _settle(file: BinaryIO) -> None:
    """Wait until all is on the disk: only then it is said whether it was full."""
    file.flush()
    os.fsync(file.fileno())


def _sink(file: BinaryIO, frames: Iterator[Any], group: int) -> None:
    """Frames into a Parquet file, in row groups of so many rows.

    polars asks for them on threads of its own. They are made on this one, with the caller's settings of JAX and Ctrl-C.
    """
    from polars.io.plugins import register_io_source

    first = next(frames)
    handed: queue.Queue = queue.Queue(1)

    def asked(*_: Any) -> Iterator[Any]:
        while (frame := handed.get()) is not None:
            if isinstance(frame, BaseException):
                raise frame
            yield frame

    with ThreadPoolExecutor(1, "coupled_gmm-write") as writer:
        lazy = register_io_source(asked, schema=first.schema)
        end = writer.submit(lazy.sink_parquet, file, row_group_size=group)
        try:
            for frame in itertools.chain([first], frames):
                _hand(handed, frame, end)
        except BaseException:
            with contextlib.suppress(Exception):  # of polars, which is told
                _hand(handed, InterruptedError("given up"), end)
            raise
        _hand(handed, None, end)


def _hand(handed: queue.Queue, frame: Any, end: Future) -> None:
    """Put a frame where it is waited for; or else say why nobody waits any more. None is the last, and its end is waited for."""
    while not end.done():
        with contextlib.suppress(queue.Full):
            handed.put(frame, timeout=_PATIENCE)
            if frame is not None:
                return
            break
    try:
        end.result()
    except Exception as error:
        raise OSError(f"a .parquet can't be written ({reason(error)})") from error


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{i}" for i in itertools.count(2))
