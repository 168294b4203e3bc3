"""Files, or a Dask array, as one cloud that is not in memory."""

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.data import array_files, blocks, files, streams
from coupled_gmm.data.sources import OpenCloud
from coupled_gmm.data.streams import Stream


def open_cloud(
    path: Any,
    *,
    columns: Sequence[str | int] | None = None,
    key: str | None = None,
    weights: Any = None,
    header: bool | None = None,
    chunk_size: int | None = None,
) -> OpenCloud:
    """A cloud (n, d) that stays where it is, and is read in chunks of bounded memory as often as it is needed.

        cloud = cg.open_cloud("cells.parquet", columns=["CD3", "CD8"])
        for points, weights in cloud.chunks(): ...
        total, squares = cloud.reduce(sums)          # of sums(points, weights, first_row) over all chunks

    What is read at a time: of .npy, and arrays stored in a .npz, one chunk; of Parquet a row group; of zarr a chunk of its own; of
    text 8 MB, converted anew in each pass (for a fit of many steps go on with ``cloud.write("cells.npy")``), and once when it is
    opened, to count its rows. Text is decided on, its header and its decimal mark, by its first 8 MB. float32 stays float32;
    integers become float64.

    A Dask array keeps its blocks on its workers, where sums are made: persist it, or each pass makes it again. A block that is lost
    with its worker is made again from the array's graph, and can't be where that has no more than data that were scattered.

    Args:
      path: a file in .npy, .npz, .parquet or text (.csv, .tsv, .txt, these with .gz); a folder of zarr; several of these as one
        cloud, with the same features, which are paired by name; or a Dask array (n, d).
      columns: the features, in this order: names of a table's columns, positions in an array. None takes all, of a table all
        but an index.
      key: of a .npz, or a group of zarr, the array to take.
      weights: of the points, non-negative: the name of a column beside them (or of an array in the same .npz), a file, one for each
        file, an array (n,), or, of a Dask array, one of Dask. None is equal.
      header: of text, whether the first line holds names; None tells it from the lines below.
      chunk_size: points in a chunk; None is what makes 16 MB.

    Raises:
      FileNotFoundError: there is no such file.
      TypeError, ValueError: as `data.clouds.read_cloud`; files with other features, weights that don't fit. What is missing or
        infinite is refused when it is read, with its file, column and row.
    """
    size = None if chunk_size is None else checks.integer("chunk_size", chunk_size, 1)
    columns = _distinct(columns)
    if blocks.is_dask(path):
        if key is not None or header is not None:
            raise ArgumentError("key" if key is not None else "header", "is for files", "leave it out")
        return blocks.open_blocks(path, columns, weights, size)  # pyright: ignore[reportArgumentType]
    named = weights if isinstance(weights, str) and not _names_file(weights) else None
    parts = [_opened(one, columns, key, named, header) for one in _paths("path", path)]
    for note, file in {note: part.points.called for part in reversed(parts) for note in part.notes}.items():
        warnings.warn(f"{file}: {note}", stacklevel=2)
    files_of = [part.points for part in parts]
    whole = streams.joined(files_of)
    size = size or streams.chunk_size(whole)
    beside = [part.weights for part in parts if part.weights is not None]
    if named is None and _are_paths(weights):
        beside = [_column(one, header) for one in _paths("weights", weights)]
    if beside:
        return OpenCloud(whole, size, _fitting(beside, files_of, size))
    if whole.weighted:
        _check_some_positive(repr(named), (block.weights for block in whole.blocks(size)))
    if weights is None or named is not None:
        return OpenCloud(whole, size)
    if blocks.is_dask(weights):
        raise ArgumentTypeError("weights", "expected an array, got one of Dask", "pass weights.compute()")
    return OpenCloud(whole, size, np.asarray(checks.own_weights("weights", weights, whole.shape[0])))


class _Opened(NamedTuple):
    """The points of a file, weights that are an array of their own in it, and notes on what was decided."""

    points: Stream
    weights: Stream | None = None
    notes: Sequence[str] = ()


def _opened(path: Path, columns: Any, key: str | None, weights: str | None, header: bool | None) -> _Opened:
    if array_files.is_zarr(path):
        beside = None if weights is None else array_files.open_zarr(path, None, weights, vector=True)
        return _Opened(array_files.open_zarr(path, columns, key), beside)
    if files.ending(path) == ".zarr" and not path.exists():
        raise FileNotFoundError(f"{path}: no such folder; check the name")
    path = files.existing(path)
    end = files.ending(path)
    if header is not None and end not in files.TEXT:
        raise ValueError(f"{path}: header is for text files ({', '.join(files.TEXT)}); leave it out")
    if end not in files.TABLES:
        apart = weights is not None and end == ".npz" and not array_files.has_fields(path, key)
        beside = array_files.open_array(path, None, weights, None, vector=True) if apart else None
        return _Opened(array_files.open_array(path, columns, key, None if apart else weights), beside)
    if key is not None:
        raise ValueError(f"{path}: key is for .npz files; choose columns of a table by name instead")
    if columns is not None and not all(isinstance(column, str) for column in columns):
        raise ValueError(f"{path}: the columns of a table are chosen by name, not by position")
    from coupled_gmm.data import table_files  # polars is imported where a table is read

    if end == ".parquet":
        points, notes = table_files.open_parquet(path, columns, weights)
    else:
        points, notes = table_files.open_text(path, columns, weights, header)
    return _Opened(points, None, notes)


def _column(path: Path, header: bool | None) -> Stream:
    """A file of one column."""
    if array_files.is_zarr(path):
        return array_files.open_zarr(path, None, None, vector=True)
    end = files.ending(files.existing(path))
    if end in files.TABLES:
        return _opened(path, None, None, None, header if end in files.TEXT else None).points
    return array_files.open_array(path, None, None, None, vector=True)


def _fitting(weights: list[Stream], points: list[Stream], size: int) -> Stream:
    """Streams of weights as one, if there is one for each point."""
    for stream in weights:
        if stream.shape[1] != 1:
            raise ValueError(f"{stream.called}: expected one weight a point, got {stream.shape[1]} columns; save one")
    if len(weights) not in (1, len(points)):
        raise ArgumentError(
            "weights", f"{len(weights)} files for {len(points)} files of points", "give one for each, or one"
        )
    pairs = zip(weights, points if len(weights) == len(points) else [streams.joined(points)], strict=True)
    for theirs, ours in pairs:
        if theirs.shape[0] != ours.shape[0]:
            problem = f"holds {theirs.shape[0]:,} weights, and {ours.called} {ours.shape[0]:,} points"
            raise ValueError(f"{theirs.called}: {problem}; give each point one")
    whole = streams.joined(weights)
    _check_some_positive(whole.called, (block.points for block in whole.blocks(size)))
    return whole


def _check_some_positive(called: Any, weights: Any) -> None:
    """Refuse weights that are all zero; those that are not are read up to the first that says so."""
    if not any((part > 0).any() for part in weights):
        raise ArgumentError("weights", f"all weights of {called} are zero", "at least one must be positive")


def _paths(name: str, value: Any) -> list[Path]:
    given = [value] if _is_path(value) else value
    if not isinstance(given, (list, tuple)) or not given or not all(map(_is_path, given)):
        kind = "an empty list" if isinstance(given, (list, tuple)) and not given else type(value).__name__
        raise ArgumentTypeError(
            name,
            f"expected a file, several, or a Dask array, got {kind}",
            "what is in memory is passed to fits as it is",
        )
    return [Path(one) for one in given]


def _are_paths(value: Any) -> bool:
    return _is_path(value) or (isinstance(value, (list, tuple)) and bool(value) and all(map(_is_path, value)))


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, PathLike))


def _names_file(name: str) -> bool:
    return files.ending(name) in files.FORMATS or array_files.is_zarr(Path(name))


def _distinct(columns: Any) -> Any:
    if columns is None:
        return None
    found = list(columns) if isinstance(columns, (list, tuple, range, np.ndarray)) else [None]
    if any(isinstance(column, bool) or not isinstance(column, (str, int, np.integer)) for column in found):
        raise ArgumentTypeError("columns", f"expected names or positions, got {checks.brief(columns)}", "pass a list")
    if not found or len(set(found)) < len(found):
        problem = "names none" if not found else f"names some twice ({checks.brief(found)})"
        raise ArgumentError("columns", problem, "name each feature once")
    return found
