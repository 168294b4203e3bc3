"""Points that are read in blocks, in order and again and again: what every format of an open cloud provides.

A block is checked where it is read, so that a refusal names the file and the row in it. Where blocks end is the format's business
(row groups, a zarr's chunks, the end of a file); `cut` makes chunks of one length of them.
"""

import abc
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from coupled_gmm.core import foreign
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.data import arrays
from coupled_gmm.data.files import Stamp

_CHUNK = 2**24  # bytes of points


class Block(NamedTuple):
    """Points (m, d) and their weights (m,), None where all are equal."""

    points: np.ndarray
    weights: np.ndarray | None = None


class Stream(abc.ABC):
    """A cloud (n, d) that lies elsewhere.

    Immutable and picklable: a file is open only while somebody reads it, and each who does has a handle of their own.
    """

    called: str
    shape: tuple[int, int]
    dtype: np.dtype
    names: tuple[str, ...] | None  # of the features
    weighted: bool  # whether blocks come with weights

    @property
    def title(self) -> str:
        """What it is called where there is little room."""
        return self.called

    @abc.abstractmethod
    def blocks(self, rows: int) -> Iterator[Block]:
        """All of it in order, in blocks of `rows` points or as near to that as the format allows."""

    @abc.abstractmethod
    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Points (k, d) at sorted indices."""

    @abc.abstractmethod
    def reordered(self, order: Sequence[int]) -> Self:
        """The same with its features in another order."""

    def picked(self, indices: np.ndarray, blocks: Iterable[tuple[int, Block]]) -> np.ndarray:
        """Points at sorted indices, out of blocks that come with the row of their first point."""
        found = np.empty((len(indices), self.shape[1]), self.dtype)
        for first, (points, _) in blocks:
            start, stop = np.searchsorted(indices, (first, first + len(points)))
            found[start:stop] = points[indices[start:stop] - first]
        return found


@dataclasses.dataclass(frozen=True)
class File(Stream):
    """A file, which must stay as it was when it was opened.

    Args:
      path: of the file.
      stamp: what it is known again by.
      shape: points and features.
      dtype: of the points, float32 or float64.
      labels: what to call the features in a message.
      names: of the features, where the file has names.
      weights: the name of the column of weights, if it holds one.
      columns: where the features stand: places, or names.
    """

    path: Path
    stamp: Stamp
    shape: tuple[int, int]
    dtype: np.dtype
    labels: tuple[str, ...]
    names: tuple[str, ...] | None
    weights: str | None
    columns: tuple[Any, ...]

    @property
    def called(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return str(self.path)

    @property
    def title(self) -> str:
        return self.path.name

    @property
    def weighted(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.weights is not None

    def check_unchanged(self) -> None:
        """Refuse to go on with a file that is no longer the one that was opened."""
        self.stamp.check(self.path)

    def reordered(self, order: Sequence[int]) -> Self:
        names = None if self.names is None else tuple(self.names[i] for i in order)
        labels, columns = (tuple(each[i] for i in order) for each in (self.labels, self.columns))
        return dataclasses.replace(self, labels=labels, names=names, columns=columns)

    def checked(self, block: Block, first: int) -> Block:
        """The block, if all its numbers are finite and no weight is negative."""
        return checked(self.called, self.labels, block, repr(self.weights), first)


class Ranged(File):
    """A file of which any range of rows can be read."""

    @abc.abstractmethod
    def opened(self) -> AbstractContextManager[Any]:
        """What `read` reads from."""

    @abc.abstractmethod
    def ranges(self, rows: int) -> Iterable[tuple[int, int]]:
        """Ranges that make all rows, of some `rows` each, that are cheap to read one by one."""

    @abc.abstractmethod
    def read(self, handle: Any, start: int, stop: int) -> Block:
        """Those rows."""

    def blocks(self, rows: int) -> Iterator[Block]:
        self.check_unchanged()
        with self.opened() as handle:
            for start, stop in self.ranges(rows):
                yield self.checked(self.read(handle, start, stop), start)
        self.check_unchanged()

    def rows(self, indices: np.ndarray) -> np.ndarray:
        self.check_unchanged()
        with self.opened() as handle:
            places = self.around(indices)
            return self.picked(indices, ((a, self.checked(self.read(handle, a, b), a)) for a, b in places))

    def around(self, indices: np.ndarray) -> Iterator[tuple[int, int]]:
        """Ranges that hold all these rows."""
        for start, stop in self.ranges(1):
            first, last = np.searchsorted(indices, (start, stop))
            if first < last:
                yield start, stop


@dataclasses.dataclass(frozen=True)
class Joined(Stream):
    """Several streams, one after the other, with the same features in the same order."""

    streams: tuple[Stream, ...]

    @property
    def called(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{len(self.streams)} files, {self.streams[0].title} first"

    @property
    def shape(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sum(stream.shape[0] for stream in self.streams), self.streams[0].shape[1]

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        return np.result_type(*(stream.dtype for stream in self.streams))

    @property
    def names(self) -> tuple[str, ...] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.streams[0].names

    @property
    def weighted(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.streams[0].weighted

    def blocks(self, rows: int) -> Iterator[Block]:
        dtype = self.dtype
        for stream in self.streams:
            for points, weights in stream.blocks(rows):
                yield Block(points.astype(dtype, copy=False), weights)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        found, first = [], 0
        for stream in self.streams:
            start, stop = np.searchsorted(indices, (first, first + stream.shape[0]))
            if start < stop:
                found.append(stream.rows(indices[start:stop] - first).astype(self.dtype, copy=False))
            first += stream.shape[0]
        return np.concatenate(found) if found else np.empty((0, self.shape[1]), self.dtype)

    def reordered(self, order: Sequence[int]) -> Self:
        return dataclasses.replace(self, streams=tuple(stream.reordered(order) for stream in self.streams))


def chunk_size(stream: Stream) -> int:
    """How many points make a chunk of some 16 MB."""
    return max(1, _CHUNK // (stream.shape[1] * stream.dtype.itemsize))


def joined(streams: Sequence[Stream]) -> Stream:
    """Streams as one, their features in the order of the first.

    Raises:
      ValueError: features that are not the same ones; the message starts with the file's name.
    """
    first, *others = streams
    ordered = [first]
    for other in others:
        called = first.called, other.called
        if first.shape[1] != other.shape[1] and (first.names is None or other.names is None):
            problem = f"has {other.shape[1]} features, and {called[0]} has {first.shape[1]}"
            raise ArgumentError(called[1], problem, "choose the same ones with columns")
        order = foreign.paired_order(called, (first.names, other.names))
        ordered.append(other if order is None else other.reordered(order))
    return first if not others else Joined(tuple(ordered))


def cut(blocks: Iterator[Block], size: int) -> Iterator[Block]:
    """The same points in blocks of one size, but for the last."""
    pieces: list[Block] = []
    there = 0
    for points, weights in blocks:
        start = 0
        while start < len(points):
            stop = min(start + size - there, len(points))
            pieces.append(Block(points[start:stop], None if weights is None else weights[start:stop]))
            there += stop - start
            start = stop
            if there == size:
                yield _together(pieces)
                pieces, there = [], 0
    if pieces:
        yield _together(pieces)


def ahead(blocks: Generator[Block, None, None]) -> Generator[Block, None, None]:
    """The same blocks, each read on a thread while whoever takes them works on the one before.

    The thread, and what it reads from, ends with the last block, and with an iterator that is given up before.
    """
    with ThreadPoolExecutor(1, "coupled_gmm-read-ahead") as reader:
        coming = reader.submit(next, blocks, None)
        try:
            while (block := coming.result()) is not None:
                coming = reader.submit(next, blocks, None)
                yield block
                del block
        finally:
            reader.shutdown(wait=True, cancel_futures=True)
            blocks.close()


def checked(called: str, labels: Sequence[str], block: Block, weights: str, first: int) -> Block:
    """A block from row `first` (counted from 0) on, if all its numbers are finite and no weight is negative.

    Args:
      called: the file.
      labels: what to call the features.
      block: what was read.
      weights: what to call the column of weights.
      first: the row of its first point.

    Raises:
      ValueError: which column, and in which row.
    """
    if not _surely_finite(block.points):
        for label, column in zip(labels, block.points.T, strict=True):
            arrays.check_finite(called, label, column, first)
    if block.weights is not None:
        check_weights(called, weights, block.weights, first)
    return block


def check_weights(called: str, column: str, weights: np.ndarray, first: int) -> None:
    """Refuse weights that are not finite, or negative."""
    if not _surely_finite(weights):
        arrays.check_finite(called, column, weights, first)
    if (wrong := weights < 0).any():
        place = f"{wrong.sum()} of {len(weights)} values, the first in row {first + int(wrong.argmax()) + 1}"
        raise ValueError(f"{called}: column {column} holds negative weights in {place}; weights must be at least 0")


def _together(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    points, weights = zip(*blocks, strict=True)
    return Block(np.concatenate(points), None if weights[0] is None else np.concatenate(weights))


def _surely_finite(values: np.ndarray) -> bool:
    """Whether numbers are finite: told by their sum, or by each of them where that is not finite."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())


def spans(indices: np.ndarray, apart: int, longest: int) -> Iterator[tuple[int, int]]:
    """Ranges that hold all of some sorted indices, where gaps up to `apart` are rather read than skipped."""
    if not len(indices):
        return
    new = np.diff(indices, prepend=indices[0] - apart - 1) > apart
    part = (indices - np.maximum.accumulate(np.where(new, indices, 0))) // longest
    new |= np.diff(part, prepend=0) > 0
    begins = np.flatnonzero(new)
    for begin, end in zip(begins, [*begins[1:], len(indices)], strict=True):
        yield int(indices[begin]), int(indices[end - 1]) + 1


def steps(n: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of one size that make n rows."""
    return ((start, min(start + size, n)) for start in range(0, n, size))
