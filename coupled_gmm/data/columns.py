"""Which columns of a table are features: those that were asked for, or all but an index; and their numbers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from coupled_gmm.core import installation
from coupled_gmm.data import arrays
from coupled_gmm.data.dialect import Table

with installation.needed("tables", "clouds from files"):
    import polars as pl

# Names that programs and people give to a column that counts rows.
_COUNTERS = ("index", "idx", "id", "row", "rowname", "rownames", "row_name", "row_names", "row_nr", "row_id", "rowid")
_COUNTERS += ("row_index", "row_number", "rn", "level_0", "no", "nr", "obs", "observation")
_ROW_NAMES = ("rownames", "row_names", "rowname", "row_name")


def features(
    path: Path,
    table: Table,
    wanted: Sequence[str] | None,
    exclude: Sequence[str] = (),
    counts: Callable[[int], bool] | None = None,
) -> tuple[list[int], list[str]]:
    """Where the features stand, and notes on what was decided.

    Args:
      path: the file, for messages.
      table: its columns, or their beginnings.
      wanted: names of features, in order; None takes all but an index.
      exclude: names of columns that are none; unused where `wanted` are given.
      counts: whether the column at a place counts the rows; None reads it from the table, which is whole.

    Raises:
      ValueError: a name that is not there, none, or there twice; no feature is left.
    """
    counts = counts or (lambda i: counts_rows(table.columns[i]))
    notes = []
    if wanted is None:
        index = _index(path, table, counts)
        notes += [f"left out {_called(table, i)}, which {why}" for i, why in index.items()]
        taken = [i for i, name in enumerate(table.names) if i not in index and name not in exclude]
        counting = [i for i in taken if len(taken) > 1 and len(table.columns[i]) > 2 and counts(i)]
        notes += [
            f"took {table.names[i]!r}, which counts the rows, for a feature; if it is an index, name the features in columns"
            for i in counting
        ]
    else:
        taken = [place(path, table, name) for name in wanted]
    if not taken:
        raise ValueError(f"{path}: no columns are left to be features; name at least one in columns")
    for i in taken:
        check_name(path, table, i)
    return taken, notes


def check_name(path: Path, table: Table, i: int) -> None:
    """Refuse a column without a name, or with one that others have."""
    name = table.names[i]
    if name == "":
        raise ValueError(f"{path}: column {i + 1} has no name; name it, or name the features in columns")
    if table.names.count(name) > 1:
        raise ValueError(f"{path}: {table.names.count(name)} columns are named {name!r}; give each its own name")


def place(path: Path, table: Table, name: str) -> int:
    """Where the column of a name stands."""
    if name not in table.names:
        raise ValueError(f"{path}: there is no column {name!r}; it has {', '.join(map(repr, table.names))}")
    return table.names.index(name)


def values(path: Path, name: str, column: pl.Series, first: int | None = None) -> np.ndarray:
    """A column as floats, if every value is a finite number.

    Args:
      path: the file, for messages.
      name: of the column.
      column: all of it, or its part from row `first` (counted from 0) on.

    Raises:
      ValueError: a word, a missing value, an infinite one: which column, how many, and in which row the first.
    """
    if not (column.dtype.is_numeric() or column.dtype == pl.Null):
        bad = column.is_not_null()
        at = bad.arg_max() or 0
        cell = f"; {bad.sum()} of {len(bad)} cells, the first {str(column[at])[:40]!r} in row {(first or 0) + at + 1}"
        remedy = "leave it out by naming columns"
        raise ValueError(f"{path}: column {name!r} is not numeric ({column.dtype}); {remedy}{cell}")
    found = column.cast(pl.Float64).to_numpy()  # what is missing is NaN there
    arrays.check_finite(path, repr(name), found, first)
    return found


def counts_rows(column: pl.Series) -> bool:
    """Whether cells are 0, 1, 2 ... or 1, 2, 3 ..."""
    return any(counts_from(column, start) for start in (0, 1))


def counts_from(column: pl.Series, start: int) -> bool:
    """Whether cells are start, start + 1 ..."""
    if not column.dtype.is_numeric() or column.null_count():
        return False
    return np.array_equal(column.cast(pl.Float64).to_numpy(), np.arange(start, start + len(column)))


def _called(table: Table, i: int) -> str:
    return repr(table.names[i]) if table.names[i] else "the column without a name"


def _index(path: Path, table: Table, counting: Callable[[int], bool]) -> dict[int, str]:
    """Columns that say which row it is, no feature of a point, and why they are thought so.

    An id that counts the rows says nothing of a point; who wants it all the same names it in columns.
    """
    found = dict.fromkeys(table.index, "is the index that pandas kept")
    for i, (name, column) in enumerate(zip(table.names, table.columns, strict=True)):
        if i in found:
            continue
        counts = len(column) > 1 and counting(i)
        unnamed = name == "" or name.startswith(("Unnamed: ", "__index_level_"))
        if (unnamed and (counts or ((i == 0 or name[:1] == "_") and _tells_rows_apart(column)))) or (
            name.lower() in _ROW_NAMES and _tells_rows_apart(column)
        ):
            found[i] = "names the rows"
        elif counts and name.lower() in _COUNTERS:
            found[i] = "counts the rows; name it in columns if it is a feature"
        elif counts and not table.named and i == 0 and len(table.columns) > 1:
            rest = ", ".join(table.names[1:3])
            raise ValueError(
                f"{path}: {name} counts the rows; name the features in columns ({rest} ...), it too if it is one"
            )
    return found


def _tells_rows_apart(column: pl.Series) -> bool:
    """Whether cells may be names of rows: words, or whole numbers, none twice."""
    if column.dtype == pl.String:
        return True
    if not column.dtype.is_numeric() or column.null_count():
        return False
    return column.n_unique() == len(column) and bool((column.cast(pl.Float64) % 1 == 0).all())
