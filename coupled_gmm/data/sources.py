"""A cloud that is not in memory: points that come in chunks, and sums over them."""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from typing import Any, Self

import numpy as np

from coupled_gmm.core import checks, host
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.data import files, streams, writing
from coupled_gmm.data.streams import Block, Stream
from coupled_gmm.data.sums import Combine, Total

_THREADS = 8  # at most, each with a chunk: more would wait for the one that reads


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OpenCloud:
    """A cloud (n, d) in files, as `open_cloud` gives it.

    Nothing is open between passes. It can be pickled, and read by several threads or processes at once.

    Args:
      stream: what is read.
      chunk_size: points in each chunk but the last.
      weights: a stream of one column, or an array (n,), where the weights don't lie beside the points.
    """

    stream: Stream
    chunk_size: int
    weights: Stream | np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.stream.shape

    @property
    def dtype(self) -> np.dtype:
        """float32 or float64."""
        return self.stream.dtype

    @property
    def names(self) -> tuple[str, ...] | None:
        """Of the features, where the files have names."""
        return self.stream.names

    @property
    def n_features(self) -> int:
        return self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def chunks(self) -> Generator[Block, None, None]:
        """Pairs of points (m, d) and weights (m,), None where all are equal, in order; anew with each call.

        The next chunk is read on a thread while the caller works on this one, and that thread ends with the iterator. Chunks are
        the caller's own: nothing writes to them later.

        Raises:
          ValueError: a value that is missing or infinite, a negative weight, a file that has changed: which, and where.
        """
        return streams.ahead(self._pieces())

    def rows(self, indices: Any) -> np.ndarray:
        """Points (k, d) at sorted indices (k,): by random access to .npy, zarr, row groups of Parquet and Dask's blocks.

        Compressed .npz and text are read in one pass. Errors are those of `chunks`.
        """
        return self.stream.rows(self._checked_indices(indices))

    def reduce(
        self, function: Callable[..., Any], *arguments: Any, combine: Combine | None = None, threads: bool = False
    ) -> Any:
        """The sum over all chunks of ``function(points, weights, first_row, *arguments)``.

        Sums are in float64, what rounding takes from them is kept and added at the end. A chunk is read while the function works
        on the one before. Of a Dask array the function is called where the blocks lie, and may be called there on several threads.

        Args:
          function: of a module, so that it can be sent to workers; it returns a tree (a tuple, say) of arrays.
          *arguments: trees of NumPy arrays.
          combine: what to do with two values in place of adding them, such as minima and maxima: associative, of a module too.
            The first belongs to the rows before those of the second.
          threads: whether the function may be called on several threads at once, of as many chunks as there are cores, up to 8.
            The sum is the same: values are added in the order of their chunks.
        """
        total, first, n_threads = Total(combine), 0, min(_THREADS, host.n_cores()) if threads else 1
        if n_threads == 1 or len(self) <= self.chunk_size:
            for points, weights in self.chunks():
                total.add(function(points, weights, first, *arguments))
                first += len(points)
            return total.value
        with ThreadPoolExecutor(n_threads, "coupled_gmm-sums") as pool, contextlib.closing(self.chunks()) as chunks:
            under_way: deque[Future] = deque()
            for points, weights in chunks:
                under_way.append(pool.submit(function, points, weights, first, *arguments))
                first += len(points)
                del points, weights
                if len(under_way) == n_threads or first == self.chunk_size:  # alone the first: it may compile
                    total.add(under_way.popleft().result())
            for value in under_way:
                total.add(value.result())
        return total.value

    def reordered(self, order: Sequence[int]) -> Self:
        """The same cloud with its features in another order: feature `order[i]` of this one stands at i."""
        chosen = list(order)
        if sorted(chosen) != list(range(self.n_features)):
            raise ArgumentError(
                "order", f"expected each of 0 to {self.n_features - 1} once, got {checks.brief(chosen)}"
            )
        return dataclasses.replace(self, stream=self.stream.reordered(chosen))

    def write(self, path: str | PathLike[str], function: Callable[..., Any] | None = None) -> "OpenCloud":
        """Its points, or what a function makes of them, in a new file, as the cloud in that.

            binary = cg.open_cloud("cells.csv").write("cells.npy")    # so that no pass converts text again

        It is written a chunk at a time, whole or not at all: whatever ends it before, an error, a full disk or Ctrl-C, leaves
        nothing, and a file that stood there as it was.

        Args:
          path: a .npy, or a .parquet, which keeps the features' names, and weights in a column "weight" ("weight_2", if a feature
            is called so). A .npy holds no weights: the cloud that is returned has those that this one was given in an array or in
            files of their own, and others, which lie beside their points, are refused.
          function: of points (m, d) and the row of the first; returns points (m, d), of the same features. None is these points.

        Raises:
          TypeError, ValueError: a path that is none of these; a value that is missing or infinite, here or in what is read.
          OSError: it can't be written.
        """
        place = writing.place(path)
        beside = self.stream.weighted
        if beside and files.ending(place) == ".npy":
            raise ValueError(f"{place}: a .npy holds no weights, and these lie beside their points; write a .parquet")
        with contextlib.closing(self._made(function)) as blocks:
            if files.ending(place) == ".npy":
                return OpenCloud(writing.array(place, blocks, self.shape), self.chunk_size, self.weights)
            weighted = beside or self.weights is not None
            return OpenCloud(writing.table(place, blocks, self.shape, self.names, weighted), self.chunk_size)

    def __repr__(self) -> str:
        n, d = self.shape
        weighted = "" if self._equal_weights() else ", weighted"
        return f"OpenCloud({self.stream.title}: {n:,} x {d:,} {self.dtype}, {self._parts()}{weighted})"

    def _parts(self) -> str:
        count = -(-len(self) // self.chunk_size)
        return f"{count:,} chunk{'s' * (count > 1)}"

    def _equal_weights(self) -> bool:
        return self.weights is None and not self.stream.weighted

    def _made(self, function: Callable[..., Any] | None) -> Generator[Block, None, None]:
        """Chunks of what a function makes of points."""
        first = 0
        with contextlib.closing(self.chunks()) as chunks:
            for points, weights in chunks:
                made = points if function is None else np.asarray(function(points, first))
                if made.shape != points.shape or made.dtype.kind not in "fiub":
                    got = f"{made.dtype} of shape {made.shape}"
                    raise ArgumentError("function", f"expected real numbers of shape {points.shape}, got {got}")
                yield Block(made, weights)
                first += len(points)

    def _pieces(self) -> Generator[Block, None, None]:
        points = streams.cut(self.stream.blocks(self.chunk_size), self.chunk_size)
        if self.weights is None:
            yield from points
        elif isinstance(self.weights, np.ndarray):
            first = 0
            for block in points:
                yield Block(block.points, self.weights[first : (first := first + len(block.points))])
        else:
            columns = streams.cut(self.weights.blocks(self.chunk_size), self.chunk_size)
            first = 0
            for block, column in zip(points, columns, strict=True):
                weights = column.points[:, 0]
                streams.check_weights(self.weights.called, "0", weights, first)
                yield Block(block.points, weights)
                first += len(weights)

    def _checked_indices(self, indices: Any) -> np.ndarray:
        found = np.asarray(indices)
        if found.size == 0:
            return np.zeros(0, np.int64)
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise ArgumentTypeError("indices", f"expected whole numbers (k,), got {found.dtype} {found.shape}")
        found = found.astype(np.int64)
        if (np.diff(found) < 0).any():
            raise ArgumentError("indices", "they are not sorted", "sort them first")
        if found[0] < 0 or found[-1] >= len(self):
            raise ArgumentError(
                "indices", f"they reach from {found[0]} to {found[-1]}", f"choose from 0 to {len(self) - 1}"
            )
        return found
