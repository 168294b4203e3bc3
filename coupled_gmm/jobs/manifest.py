"""What a batch calls its jobs and sets for each: rows of a table, written in the configuration, of a manifest, or of globs.

A row sets keys by their dotted names, ``fit.transport_weight``; a cell without a value leaves the key as it is. In text a cell is
the value itself where the key takes text (``data.cloud0``), and as in JSON where it does not: ``0.01``, ``[0.5, 1.0]``, ``true``.
"""

import csv
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from coupled_gmm.core.checks import brief
from coupled_gmm.core.errors import reason
from coupled_gmm.data.files import regular
from coupled_gmm.jobs.sections import ConfigError, Section, may_be_text

NAME = "name"
_TEXT = {".csv": ",", ".tsv": "\t"}
_LONGEST_CELL = 10_000_000  # characters
_WORDS = {"true": True, "false": False, "inf": float("inf"), "nan": float("nan")}


class Row(NamedTuple):
    """What is set for one job."""

    where: str  # the file and the row, to begin a line about it with
    table: str  # the file alone
    name: str | None
    values: dict[str, Any]  # by dotted keys
    kept: dict[str, Any]  # other columns, for the summary
    folder: Path  # from which files are named


def of_tables(path: Path, tables: Sequence[Mapping[str, Any]], keep: Sequence[str]) -> list[Row]:
    """Rows that stand in the configuration at `path`, as ``[[jobs.rows]]``."""
    return [_row(f"{path}: jobs.rows.{i}", str(path), path.parent, table, keep) for i, table in enumerate(tables)]


def of_manifest(path: Path, manifest: Path, keep: Sequence[str], model: type[Section]) -> list[Row]:
    """Rows of a CSV or Parquet table.

    Args:
      path: the configuration that names it.
      manifest: the table.
      keep: columns that are no keys.
      model: the configuration of a job, which says what is text.

    Raises:
      ConfigError: it is missing or damaged, has no rows, no such column as one to keep, or cells that can't be told apart.
    """
    try:
        regular(manifest)
        columns, cells = _parquet(manifest) if manifest.suffix.lower() == ".parquet" else _text(manifest)
    except ConfigError as error:
        raise ConfigError(f"{path}: jobs.manifest: {error}") from error
    except (Exception, pl.exceptions.PanicException) as error:  # a damaged file makes a reader raise anything
        said = reason(error)
        told = said if said.startswith(str(manifest)) else f"{manifest}: can't be read ({brief(said)[1:-1]})"
        raise ConfigError(f"{path}: jobs.manifest: {told}") from error
    for fault in _faults(manifest, columns, cells, keep):
        raise ConfigError(f"{path}: jobs.manifest: {fault}")
    kinds = [column in (NAME, *keep) or may_be_text(column, model) for column in columns]
    rows = []
    for i, line in enumerate(cells):
        values = {c: _value(cell, text) for c, cell, text in zip(columns, line, kinds, strict=True) if _given(cell)}
        rows.append(_row(f"{manifest}: row {i + 1}", str(manifest), manifest.parent, values, keep))
    return rows


def of_patterns(path: Path, patterns: Mapping[str, Sequence[str]]) -> list[Row]:
    """Rows of files, by keys of [jobs]: those of each key in the order of their names, the first of each with one another.

    Raises:
      ConfigError: a pattern matches nothing, or keys have different numbers of files.
    """
    found = {key: _files(path, key, names) for key, names in patterns.items()}
    numbers = {key: len(files) for key, files in found.items()}
    (first, n), *others = numbers.items()
    for key, number in others:
        if number != n:
            told = f"{path}: jobs.{key}: {number} files, and {first} has {n}"
            raise ConfigError(f"{told}; name as many, or one for all jobs as data.{key}")
    lines = zip(*found.values(), strict=True)
    each = [{f"data.{key}": file for key, file in zip(found, files, strict=True)} for files in lines]
    return [Row(f"{path}: jobs", str(path), None, values, {}, path.parent) for values in each]


def named(rows: Sequence[Row]) -> list[Row]:
    """Rows that all have a name: that of its first file, where these tell rows apart, or its number."""
    files = [Path(next((value for value in row.values.values() if isinstance(value, str)), "")) for row in rows]
    for names in ([file.stem for file in files], [str(file) for file in files]):
        if all(names) and len(set(names)) == len(names):
            break
    else:
        width = len(str(len(rows)))
        names = [f"{i + 1:0{width}}" for i in range(len(rows))]
    return [row if row.name is not None else row._replace(name=name) for row, name in zip(rows, names, strict=True)]


def _row(where: str, table: str, folder: Path, values: Mapping[str, Any], keep: Sequence[str]) -> Row:
    name = values.get(NAME)
    if name is not None and not (isinstance(name, str) and name.strip() and "\0" not in name):
        raise ConfigError(f"{where}: name: must be a word or several, got {brief(name)}; give each job a name")
    kept = {column: _plain(values[column]) for column in keep if column in values}
    keys = {key: value for key, value in values.items() if key != NAME and key not in keep}
    return Row(where, table, name, keys, kept, folder)


def _text(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a text in UTF-8, as spreadsheets write it, with a byte order mark or without."""
    if path.suffix.lower() not in _TEXT:
        raise ConfigError(f"{path}: is no .csv, .tsv or .parquet file; save it as one")
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        comma = _TEXT[path.suffix.lower()]
        lines = [line for line in csv.reader(file, delimiter=comma if comma in first else ";", strict=True) if line]
    if not lines:
        raise ConfigError(f"{path}: is empty; write a line of column names, and a row for each job")
    columns, *cells = lines
    for i, line in enumerate(cells):
        if len(line) != len(columns):
            raise ConfigError(f"{path}: row {i + 1}: {len(line)} cells for {len(columns)} columns; correct that row")
    return [column.strip() for column in columns], [[cell.strip() for cell in line] for line in cells]


def _parquet(path: Path) -> tuple[list[str], list[list[Any]]]:
    frame = pl.read_parquet(path, glob=False)
    return frame.columns, [list(row) for row in frame.iter_rows()]


def _faults(manifest: Path, columns: Sequence[str], cells: Sequence[Any], keep: Sequence[str]) -> Iterator[str]:
    for column in columns:
        if not column:
            yield f"{manifest}: column {columns.index('') + 1} has no name; give it the key that it sets, or remove it"
        if columns.count(column) > 1:
            yield f"{manifest}: {columns.count(column)} columns are named {column!r}; keep one of them"
    for column in keep:
        if column not in columns:
            yield f"{manifest}: there is no column {column!r}, which jobs.keep names; it has {', '.join(columns)}"
    if not cells:
        yield f"{manifest}: has no rows; write one for each job"


def _given(cell: Any) -> bool:
    return cell is not None and cell != ""


def _value(cell: Any, text: bool) -> Any:
    """What a cell says."""
    if isinstance(cell, float) and cell.is_integer() and not text:  # a table with gaps has only such numbers
        return int(cell)
    if text or not isinstance(cell, str):
        return cell
    word = cell.lower()
    if word.lstrip("+-") in _WORDS:
        return -_WORDS[word[1:]] if word[0] == "-" else _WORDS[word.lstrip("+")]
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):  # no number, nor a list: what is wrong with it is said of the key
        return cell


def _plain(value: Any) -> Any:
    """What TOML and every table can hold: numbers and words; of dates and the like the words."""
    return value if isinstance(value, (str, int, float)) else str(value)


def _files(path: Path, key: str, patterns: Sequence[str]) -> list[str]:
    """Files that names or patterns mean, those of each pattern in order."""
    found = []
    for pattern in patterns:
        if not glob.has_magic(pattern):
            found.append(pattern)
            continue
        matches = glob.glob(pattern, root_dir=path.parent, recursive=True)
        files = sorted(name for name in matches if not (path.parent / name).is_dir())
        if not files:
            raise ConfigError(f"{path}: jobs.{key}: no file matches {brief(pattern)} from {path.parent}; check it")
        found += files
    return found
