"""A cloud in the blocks of a Dask array: sums are made where blocks lie, and added in a tree, so that no points travel.

Arguments of a sum are a part of its graph, and no futures: a worker that is lost takes nothing with it that the scheduler could not
make again, as long as the array's own graph can (what was only scattered to a worker is lost with it).
"""

import contextlib
import dataclasses
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from coupled_gmm.core import checks, foreign
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.data import arrays, streams
from coupled_gmm.data.sources import OpenCloud
from coupled_gmm.data.streams import Block, Stream
from coupled_gmm.data.sums import Combine, Total

_CALLED = "Dask array"
_BRANCHES = 8  # sums that are added in one task
_THREADS = 2  # without a cluster: a block is loaded while XLA, which has threads of its own, works on another


class _Call(NamedTuple):
    """What is summed: once in a graph, however many blocks there are."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    combine: Combine | None
    size: int  # points that the function is called with


@dataclasses.dataclass(frozen=True)
class Blocks(Stream):
    """A Dask array (n, d), cut between rows only, and one of weights (n,), cut in the same places."""

    array: Any
    weights: Any

    @property
    def called(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _CALLED

    @property
    def shape(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _float_dtype(self.array.dtype)

    @property
    def names(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None

    @property
    def weighted(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.weights is not None

    @functools.cached_property
    def parts(self) -> list[tuple[int, Any, Any]]:
        """Of every block that has points: the row of its first, its points and its weights, of which none is computed yet."""
        points = self.array.to_delayed().ravel()
        weights = [None] * len(points) if self.weights is None else self.weights.to_delayed().ravel()
        lengths = self.array.chunks[0]
        firsts = np.cumsum([0, *lengths]).tolist()
        found = zip(firsts[:-1], points, weights, lengths, strict=True)
        return [(first, block, beside) for first, block, beside, length in found if length]

    def blocks(self, rows: int) -> Iterator[Block]:
        for first, points, weights in self.parts:
            points, weights = _computed(points, weights)
            yield _checked(points, weights, first)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        (points,) = _computed(self.array[indices])
        return _checked(points, None, int(indices[0]) if len(indices) else 0).points

    def reordered(self, order: Sequence[int]) -> Self:
        return dataclasses.replace(self, array=self.array[:, list(order)])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockCloud(OpenCloud):
    """The cloud of `open_cloud` in a Dask array."""

    stream: Blocks

    def reduce(
        self, function: Callable[..., Any], *arguments: Any, combine: Combine | None = None, threads: bool = False
    ) -> Any:
        del threads  # Dask has its own
        from dask.delayed import delayed

        call = delayed(_Call(function, arguments, combine, self.chunk_size), pure=False, traverse=False)
        sums, add = delayed(_sum_of_blocks, pure=False), delayed(_sum_of_sums, pure=False)
        found = []
        for workers, blocks in self._tasks(in_order=combine is not None):
            with _at(workers):
                found.append(sums(call, blocks))
        while len(found) > 1:
            found = [add(call, found[i : i + _BRANCHES]) for i in range(0, len(found), _BRANCHES)]
        (parts,) = _computed(found[0])
        whole = Total(combine)
        whole.add(*parts)
        return whole.value

    def _tasks(self, in_order: bool) -> list[tuple[Any, list[Any]]]:
        """Which blocks are summed in one task, and where: all that lie on a worker in a task for each of its threads.

        Tasks that wait for their turn a cluster may give to workers that have none, and their blocks with them. Blocks that lie
        nowhere yet, or whose order matters, have a task each.
        """
        held, beside = _holders(self.stream.array), _holders(self.stream.weights)

        def holders(points: Any, weights: Any) -> list[Any]:
            """Workers that hold the points, and among them those that hold the weights too, if there are any."""
            some = set(held.get(points.key) or ())
            both = some if weights is None else some & set(beside.get(weights.key) or ())
            return sorted(both or some)

        parts = [(holders(points, weights), (first, points, weights)) for first, points, weights in self.stream.parts]
        if in_order or not all(workers for workers, _ in parts):
            return [(workers, [block]) for workers, block in parts]
        groups: dict[Any, list[Any]] = {}
        for workers, block in parts:
            groups.setdefault(workers[0], []).append(block)
        threads = _threads_of_workers()
        tasks = []
        for worker, blocks in groups.items():
            n = min(threads.get(worker, 1), len(blocks))  # it may be gone by now
            tasks += [([worker], blocks[i::n]) for i in range(n)]
        return tasks

    def _parts(self) -> str:
        count = len(self.stream.parts)
        return f"{count:,} block{'s' * (count > 1)}"


def is_dask(value: Any) -> bool:
    """Whether a value is a collection of Dask, which is not imported to see that."""
    return type(value).__module__.partition(".")[0] == "dask"


def open_blocks(array: Any, columns: Sequence[int] | None, weights: Any, chunk_size: int | None) -> BlockCloud:
    """The cloud in a Dask array.

    Args:
      array: (n, d); where lengths of its blocks are unknown they are computed.
      columns: places of the features, in order; None takes all.
      weights: an array (n,) of Dask or of NumPy, which is sent to the workers once; None is equal.
      chunk_size: as of `open_cloud`.

    Raises:
      TypeError, ValueError: no array of real numbers of shape (n, d), or weights that don't fit it.
    """
    if not type(array).__module__.startswith("dask.array"):
        raise ArgumentTypeError(
            "path",
            f"expected an array of Dask, got its {type(array).__name__}",
            "pass frame.to_dask_array(lengths=True)",
        )
    if array.dtype.kind not in "fiub":
        raise ArgumentTypeError("path", f"expected real numbers, got dtype {array.dtype}", "convert it to floats first")
    array = _with_lengths(array)
    arrays.check_cloud(_CALLED, array.shape)
    if columns is not None:
        array = array[:, list(arrays.positions(_CALLED, columns, array.shape[1]))]
    if array.numblocks[1] > 1:
        array = array.rechunk({1: -1})
    found = Blocks(array, None if weights is None else _weights(weights, array))
    return BlockCloud(found, chunk_size or streams.chunk_size(found))


def _weights(weights: Any, array: Any) -> Any:
    """Weights as a Dask array with the blocks of the points."""
    lengths = (array.chunks[0],)
    if not is_dask(weights):
        import dask.array

        given: Any = np.asarray(checks.own_weights("weights", weights, len(array)))
        if _scheduler() is None:
            return dask.array.from_array(given, chunks=lengths)  # pyright: ignore[reportArgumentType]
        return _laid_beside(given, array)
    if weights.dtype.kind not in "fiub":
        raise ArgumentTypeError("weights", f"expected real numbers, got dtype {weights.dtype}")
    weights = _with_lengths(weights)
    if weights.shape != (len(array),):
        raise ArgumentError("weights", f"expected shape ({len(array)},), got {weights.shape}", "give each point one")
    if not _computed((weights != 0).any())[0]:
        raise ArgumentError("weights", "all weights are zero", "at least one must be positive")
    return weights.rechunk(lengths)


def _laid_beside(weights: np.ndarray, array: Any) -> Any:
    """Weights on the workers that hold the points: else they would travel in every pass, as clusters drop second copies."""
    import dask.array
    from dask.delayed import delayed

    held, lengths, first, pieces = _holders(array), array.chunks[0], 0, []
    for points, length in zip(array.to_delayed().ravel(), lengths, strict=True):
        with _at(held.get(points.key)):
            piece = delayed(_same, pure=False)(weights[first : (first := first + length)])
        pieces.append(dask.array.from_delayed(piece, (length,), weights.dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sending large graph")  # they travel now, and once
        whole: Any = dask.array.concatenate(pieces)
        return whole.persist(optimize_graph=False)  # which would forget who is to hold what


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _with_lengths(array: Any) -> Any:
    if any(math.isnan(length) for axis in array.chunks for length in axis):
        return array.copy().compute_chunk_sizes()  # it changes what it is called on
    return array


def _sum_of_blocks(call: _Call, blocks: list[tuple[int, Any, Any]]) -> tuple[Any, Any]:
    """Where blocks lie: what the function makes of their chunks, added."""
    found = Total(call.combine)
    for first, points, weights in blocks:
        for start, stop in streams.steps(len(points), call.size):
            chunk = _checked(points[start:stop], None if weights is None else weights[start:stop], first + start)
            found.add(call.function(*chunk, first + start, *call.arguments))
    return found.parts


def _sum_of_sums(call: _Call, sums: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    found = Total(call.combine)
    for parts in sums:
        found.add(*parts)
    return found.parts


def _checked(points: Any, weights: Any, first: int) -> Block:
    """A block as floats of NumPy, all finite, with valid weights."""
    points = np.ascontiguousarray(foreign.native_floats(_CALLED, np.asarray(points)))
    weights = None if weights is None else foreign.native_floats(_CALLED, np.asarray(weights))
    return streams.checked(_CALLED, tuple(map(str, range(points.shape[1]))), Block(points, weights), "weights", first)


def _computed(*collections: Any) -> tuple[Any, ...]:
    """Computed by whatever scheduler is set, or on two threads."""
    import dask.base

    options = {} if _scheduler() is not None else {"scheduler": "threads", "num_workers": _THREADS}
    return dask.base.compute(*collections, **options)


def _scheduler() -> Any:
    """Dask's scheduler, if somebody has chosen one or is a cluster's client."""
    import dask.base

    return dask.base.get_scheduler()


def _holders(array: Any) -> dict[Any, Any]:
    """Which workers of a cluster hold which blocks now: those of an array that was persisted."""
    if array is None or "distributed" not in sys.modules:
        return {}
    from distributed import get_client

    try:
        held: Any = get_client().who_has(array)
    except ValueError:  # there is no client
        return {}
    return dict(held)


def _threads_of_workers() -> dict[Any, int]:
    from distributed import get_client

    threads: Any = get_client().nthreads()
    return {worker: max(1, count) for worker, count in threads.items()}


def _at(workers: Any) -> contextlib.AbstractContextManager[Any]:
    """Tasks made herein run on one of these workers, while there is one: else an idle worker would fetch the block."""
    from dask.base import annotate

    return annotate(workers=list(workers), allow_other_workers=True) if workers else contextlib.nullcontext()


def _float_dtype(dtype: np.dtype) -> np.dtype:
    return foreign.native_floats(_CALLED, np.empty(0, dtype)).dtype
