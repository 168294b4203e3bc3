"""Clouds in tables on disk that are read in blocks: Parquet by row groups, text by pieces.

A text is decided on by its first eight megabytes: a shorter one is taken as `clouds.read_cloud` takes it, and in a longer one
whatever speaks against the decision is refused. Every pass cuts and converts the text again: a fit of many steps is
better served by what `OpenCloud.write` makes of it.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coupled_gmm.core import installation
from coupled_gmm.data import cells, columns, dialect, row_groups
from coupled_gmm.data.dialect import Dialect, Table
from coupled_gmm.data.files import Stamp, as_unreadable, unreadable
from coupled_gmm.data.streams import Block, File, Ranged, steps

with installation.needed("tables", "clouds from files"):
    import polars as pl

PIECE = 2**23  # bytes of text that are read at once
_TOGETHER = 2**25  # bytes of Parquet that are read at once: polars takes some milliseconds to begin
_as_unreadable = functools.partial(as_unreadable, also=pl.exceptions.PanicException)
_HEAD = 2**12  # rows that tell what the columns of a Parquet file are


@dataclasses.dataclass(frozen=True)
class ParquetFile(Ranged):
    """Columns of a Parquet file.

    Args:
      groups: rows in each row group.
    """

    groups: tuple[int, ...]

    def blocks(self, rows: int) -> Iterator[Block]:
        return super().blocks(max(rows, _TOGETHER // (8 * self.shape[1])))

    def opened(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def ranges(self, rows: int) -> Iterable[tuple[int, int]]:
        """Row groups, where small ones are read together."""
        start = stop = 0
        for group in self.groups:
            if start < stop and stop + group - start > rows:
                yield start, stop
                start = stop
            stop += group
        if start < stop:
            yield start, stop

    def read(self, handle: Any, start: int, stop: int) -> Block:
        named = [*self.columns, *([] if self.weights is None else [self.weights])]
        frame = _slice(self.path, named, start, stop)
        if len(frame) != stop - start:
            self.check_unchanged()
            raise unreadable(self.path, ValueError("a row group ends before its last row"))
        floats = pl.Float32 if self.dtype == np.float32 else pl.Float64
        points = frame.select(pl.col(self.columns).cast(floats)).to_numpy(order="c")  # what is missing is NaN there
        return Block(points, None if self.weights is None else frame[self.weights].cast(pl.Float64).to_numpy())


@dataclasses.dataclass(frozen=True)
class TextFile(File):
    """Columns of a table in text.

    Args:
      how: what was decided on its delimiter, header and decimal mark.
      place: where the weights stand, -1 if nowhere.
    """

    how: Dialect
    place: int

    def blocks(self, rows: int = 0) -> Iterator[Block]:
        """In blocks of as many rows as a piece of text has."""
        self.check_unchanged()
        labels = [*self.labels, *([] if self.weights is None else [self.weights])]
        first = 0
        for found in _following(self.path, self.how, (*self.columns, *([] if self.weights is None else [self.place]))):
            numbers = [
                columns.values(self.path, label, column, first) for label, column in zip(labels, found, strict=True)
            ]
            weights = None if self.weights is None else numbers.pop()
            if len(numbers[0]):
                yield self.checked(Block(np.stack(numbers, axis=1), weights), first)
            first += len(numbers[0])
        self.check_unchanged()

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """In one pass, up to the last that is asked for."""
        return self.picked(indices, self._until(int(indices[-1]) if len(indices) else -1))

    def _until(self, last: int) -> Iterator[tuple[int, Block]]:
        first = 0
        for block in self.blocks() if last >= 0 else ():
            yield first, block
            first += len(block.points)
            if first > last:
                return


def open_parquet(path: Path, wanted: Sequence[str] | None, weights: str | None) -> tuple[ParquetFile, list[str]]:
    """The cloud in a Parquet file, and notes on what was decided.

    Args:
      path: of an existing file.
      wanted: names of the features, in order; None takes all but an index.
      weights: the name of the column of weights.

    Raises:
      ValueError: as `clouds.read_cloud`; of missing values those in the first rows.
    """
    stamp = Stamp.of(path)
    with _as_unreadable(path):
        schema = pl.read_parquet_schema(path)
        about = json.loads(pl.read_parquet_metadata(path).get("pandas", "{}"))
        n = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
    names = list(schema)
    for name in (*(wanted or ()), *([] if weights is None else [weights])):
        columns.place(path, Table(names, [], True), name)
    groups = _groups(path, n)
    beside = [] if weights is None or weights in (wanted or ()) else [weights]
    read = names if wanted is None else [*wanted, *beside]
    head = _slice(path, read, 0, min(n, _HEAD))
    kept = [name for name in about.get("index_columns", []) if isinstance(name, str)]
    table = Table(read, head.get_columns(), True, tuple(i for i, name in enumerate(read) if name in kept))
    if n == 0 or not names:
        raise ValueError(f"{path}: the table has no rows; a cloud needs at least one point")

    def counts(i: int) -> bool:
        column = table.columns[i]
        start = next((start for start in (0, 1) if columns.counts_from(column, start)), None)
        if start is None or len(head) == n:
            return start is not None
        ranges = ((a, b) for group, end in zip(groups, np.cumsum(groups), strict=True) for a, b in [(end - group, end)])
        return all(columns.counts_from(_slice(path, [read[i]], a, b)[read[i]], start + a) for a, b in ranges)

    taken, notes = columns.features(path, table, wanted, () if weights is None else (weights,), counts)
    labels = tuple(read[i] for i in taken)
    first = None if len(head) == n else 0
    for name in (*labels, *([] if weights is None else [weights])):
        columns.values(path, name, head[name], first)
    dtype = np.dtype(np.float32 if all(schema[name] == pl.Float32 for name in labels) else np.float64)
    shape, quoted = (n, len(labels)), tuple(map(repr, labels))
    return ParquetFile(path, stamp, shape, dtype, quoted, labels, weights, labels, groups), notes


def open_text(
    path: Path, wanted: Sequence[str] | None, weights: str | None, header: bool | None
) -> tuple[TextFile, list[str]]:
    """The cloud in a text file, and notes; it is read once, to count its rows. Arguments and errors as `open_parquet`.

    Args:
      header: whether the first line holds names; None tells it from the lines below.
    """
    stamp = Stamp.of(path)
    with _as_unreadable(path):
        text, last = next(cells.pieces(path, PIECE))
        table, how = dialect.decided(text, header, whole=last)
    del text
    if not table.columns or len(table.columns[0]) == 0:
        raise ValueError(f"{path}: the table has no rows; a cloud needs at least one point")

    def counts(i: int) -> bool:
        start = next((start for start in (0, 1) if columns.counts_from(table.columns[i], start)), None)
        if start is None or last:
            return start is not None
        for (column,) in _following(path, how, (i,)):
            if not columns.counts_from(column, start):
                return False
            start += len(column)
        return True

    taken, notes = columns.features(path, table, wanted, () if weights is None else (weights,), counts)
    place = -1 if weights is None else columns.place(path, table, weights)
    names = tuple(table.names[i] for i in taken)
    if last:
        for i in taken if weights is None else [*taken, place]:
            columns.values(path, table.names[i], table.columns[i])
    del table.columns[:]
    about = (names, names if table.named else None, weights, tuple(taken), how, place)
    found = TextFile(path, stamp, (0, len(names)), np.dtype(np.float64), *about)
    n = sum(len(block.points) for block in found.blocks())
    return dataclasses.replace(found, shape=(n, len(names))), [*table.notes, *notes]


def frame(block: Block, names: Sequence[str], weights: str | None) -> pl.DataFrame:
    """A block as a table, its weights in a column of this name."""
    columns = dict(zip(names, block.points.T, strict=True))
    return pl.DataFrame(columns if weights is None else columns | {weights: np.asarray(block.weights, np.float64)})


def _slice(path: Path, names: Sequence[str], start: int, stop: int) -> pl.DataFrame:
    with _as_unreadable(path):
        return pl.scan_parquet(path, glob=False).select(names).slice(start, stop - start).collect()


def _groups(path: Path, n: int) -> tuple[int, ...]:
    """Rows in each row group, or in parts of equal length where the file's own way of saying so is not understood."""
    with contextlib.suppress(Exception):
        found = row_groups.sizes(path)
        if sum(found) == n and min(found, default=0) >= 0:
            return tuple(group for group in found if group)
    return tuple(stop - start for start, stop in steps(n, 2**17))


def _following(path: Path, how: Dialect, taken: Sequence[int]) -> Iterator[list[pl.Series]]:
    """Columns of a text, piece by piece."""
    row = 0
    pieces = cells.pieces(path, PIECE)
    start, last = how.start, False
    with contextlib.closing(pieces):
        while not last:
            with _as_unreadable(path):
                text, last = next(pieces)
                text, start = text[start:], 0
                found = dialect.following(cells.without_comments_at_end(text) if last else text, how, taken, row)
            yield found
            row += len(found[0])
