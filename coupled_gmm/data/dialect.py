"""Tables in text files, as pandas, polars, R, NumPy and spreadsheets write them.

Encoding, delimiter, header, index and decimal mark are told from what the file holds. What can be taken in two ways is
refused, with the key that settles it; what was decided is told in notes, never in silence.
"""

import io
import re
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from coupled_gmm.core import installation
from coupled_gmm.data import cells

with installation.needed("tables", "clouds from files"):
    import polars as pl

SAMPLE = 200  # lines that tell the delimiter
_CANDIDATES = ("\t", ";", "|", ",", cells.SPACE)  # of two that fit equally well the first
_PADDED = r"^[+-]?\d+[.,](\d*0)?([eE].*)?$"  # 1.0, 0.50: who writes so writes no plain 0 among floats


class Table(NamedTuple):
    """Columns of a file: numbers (null where a value is missing), or of another type where they hold none."""

    names: list[str]
    columns: list[pl.Series]
    named: bool  # whether the file gives the names; else they are column_1, column_2 ...
    index: tuple[int, ...] = ()  # columns that only say which row it is
    notes: tuple[str, ...] = ()


class Dialect(NamedTuple):
    """How a text is a table: what `decided` found."""

    delimiter: str
    n_columns: int
    empty_end: bool  # whether delimiters at the ends of lines make one more column, of nothing
    header: bool  # whether the first line holds names
    start: int  # characters that stand before the first row of numbers
    decimal: str
    thousands: str | None


def read(path: Path, header: bool | None = None) -> Table:
    """The table in a text file.

    Args:
      path: the file; ".gz" is unpacked.
      header: whether the first line holds names; None tells it from the lines below, where that is possible.

    Raises:
      ValueError: no table, or one that can be taken in two ways; the message lacks the file's name.
    """
    return decided("".join(cells.decoded(path)), header)[0]


def decided(text: str, header: bool | None = None, whole: bool = True) -> tuple[Table, Dialect]:
    """The table in a text, and how it is read; where the text is not `whole`, lines may follow."""
    characters = len(text)
    text, forced = cells.separated(text)
    comments, text = cells.uncommented(text)
    start = characters - len(text)
    text = cells.without_blank_lines(cells.without_comments_at_end(text) if whole else text)
    if not text.strip():
        raise ValueError("the file is empty; a cloud needs at least one point")
    sample = [line for line in islice(io.StringIO(text), SAMPLE) if line.strip()]
    delimiter = forced or _delimiter(sample)
    first = next(cells.rows(text, delimiter))
    columns = cells.body(text, delimiter)
    if not columns:  # one line: a header, or one point
        if header or (header is None and not all(map(cells.is_value, first))):
            table = Table(first, [pl.Series(dtype=pl.String) for _ in first], True)
            return table, Dialect(delimiter, len(first), False, True, characters, ".", None)
        columns = [pl.Series(dtype=pl.String) for _ in first]
    n_cells = len(columns)
    columns, first = _without_empty_end(columns, first)
    names = None if header is False else _names_in_comment(comments, delimiter, columns, first)
    in_first = False
    notes = []
    if names is None and (header if header is not None else _is_header(first, columns, notes)):
        names, in_first = first, True
        start += _end_of_row(text)
    else:
        if len(first) != len(columns):
            raise ValueError(f"the first line has {len(first)} cells and the others {len(columns)}; {cells.RAGGED}")
        columns = [pl.concat([pl.Series([cell]), column]) for cell, column in zip(first, columns, strict=True)]
    if names is not None and len(names) == len(columns) - 1:
        _check_row_names(names, columns, delimiter == "," and '\n"' not in text)
        names = ["", *names]
    if names is not None and len(names) != len(columns):
        raise ValueError(f"the header has {len(names)} names and the rows have {len(columns)} cells; {cells.RAGGED}")
    if names is None and delimiter == "," and _may_be_decimals(columns):
        if header is None:
            raise ValueError(
                "two columns of whole numbers may be one of decimals cut at their comma; write a decimal point, or say "
                "header = false if there are two"
            )
        notes.append("read as two columns of whole numbers; if they are one of decimals, write a point for the comma")
    how = Dialect(delimiter, len(columns), len(columns) < n_cells, in_first, start, *cells.marks(columns))
    numbers = [cells.numbers(column, how.decimal, how.thousands) for column in columns]
    called = names or [f"column_{i + 1}" for i in range(len(columns))]
    return Table(called, numbers, names is not None, (), tuple(notes)), how


def _end_of_row(text: str) -> int:
    """Where the second row of a text begins."""
    end = text.index("\n") + 1
    while text.count('"', 0, end) % 2:
        end = text.index("\n", end) + 1
    return end


def following(text: str, how: Dialect, taken: Sequence[int], row: int) -> list[pl.Series]:
    """Columns of further lines of a text that `decided` has seen the beginning of.

    Lines that would have changed the decision are refused, or their cells left as words.

    Args:
      text: whole lines.
      how: what was decided.
      taken: places of the columns to give.
      row: how many rows of numbers stand above.

    Raises:
      ValueError: a row of another length; the message lacks the file's name.
    """
    text = cells.without_blank_lines(text).strip("\n")
    if not text.strip():
        return [pl.Series(dtype=pl.Float64) for _ in taken]
    width = how.n_columns + how.empty_end
    if (how.decimal, how.thousands) == (".", None):
        quick = cells.plain_numbers(text, how.delimiter, width, taken)
        if quick is not None and not how.empty_end:
            return quick
    columns = cells.body("\n" + text, how.delimiter, row - (not how.header), width)
    if how.empty_end and not (columns[-1] == "").all():
        raise ValueError(f"the last column is empty at first, and not below row {row}; {cells.RAGGED}")
    return [cells.numbers(columns[i], how.decimal, how.thousands) for i in taken]


def _delimiter(sample: list[str]) -> str:
    """The one that cuts the lines into equally many cells, most of which are numbers."""
    fits, best, ragged = 0.0, cells.ONE, None
    for candidate in _CANDIDATES:
        try:
            rows = list(cells.rows("".join(sample), candidate))
        except ValueError:  # a sample may end within a quoted cell
            continue
        first, *others = map(len, rows)
        widths = set(others or [first])
        if first > 1 or max(widths) > 2:
            ragged = ragged or candidate
        if len(widths) > 1 or max(widths) < 2 or abs(first - max(widths)) > 1:
            continue
        body = [cell for row in rows[1:] or rows for cell in row]
        share = sum(map(cells.is_value, body)) / len(body)
        if share > fits or best == cells.ONE:
            fits, best = share, candidate
    return ragged if best == cells.ONE and ragged is not None else best


def _without_empty_end(columns: list[pl.Series], first: list[str]) -> tuple[list[pl.Series], list[str]]:
    """Without the column of nothing that delimiters at the ends of lines make."""
    if len(first) == len(columns) + 1 and not first[-1]:
        return columns, first[:-1]
    unnamed = len(first) < len(columns) or not first[-1]
    if len(columns) > 1 and unnamed and len(columns[-1]) and (columns[-1] == "").all():
        return columns[:-1], first[: len(columns) - 1]
    return columns, first


def _names_in_comment(
    comments: list[str], delimiter: str, columns: list[pl.Series], first: list[str]
) -> list[str] | None:
    """Names in the last comment over rows of numbers, as NumPy's savetxt writes its header."""
    if not comments or not all(map(cells.is_value, first)):
        return None
    names = next(cells.rows(comments[-1].lstrip(' \t"#'), delimiter), [])
    return names if len(names) == len(columns) and not any(map(cells.is_value, names)) else None


def _check_row_names(names: list[str], columns: list[pl.Series], bare: bool) -> None:
    """Refuse a first column without a name that can't name rows, as it does where R wrote the file.

    Args:
      names: of the other columns.
      columns: of cells.
      bare: commas are the delimiter, and the first cells are not quoted: they may be parts of decimals.
    """
    labels = columns[0]
    fractions = labels.str.contains(cells.EXACT).any() and not labels.str.contains(cells.WHOLE).all()
    if labels.n_unique() < len(labels) or fractions or (bare and len(names) == 1):
        raise ValueError(
            f"the header has {len(names)} names and the rows have {len(columns)} cells, the first of which may not name "
            f"rows; {cells.RAGGED}, and write a decimal point where commas are the delimiter"
        )


def _is_header(first: list[str], columns: list[pl.Series], notes: list[str]) -> bool:
    """Whether the first line holds names."""
    labels = [i for i, cell in enumerate(first) if cells.NUMBER.fullmatch(cell)]
    words = [i for i, cell in enumerate(first) if not cells.is_value(cell)]
    shift = len(columns) - len(first)
    if words:
        over_numbers = any(_mostly_values(columns[i + shift]) for i in words if 0 <= i + shift < len(columns))
        if over_numbers or not labels or shift:
            return True
    if not labels or shift not in (0, 1):
        return False
    numbered = _numbers_are_labels([first[i] for i in labels], [columns[i + shift] for i in labels])
    if numbered is None and first[0] == "" and len(labels) == len(first) - 1 and _counts(columns[0]):
        return True
    if numbered is None:
        raise ValueError(
            f"the first line ({', '.join(first)[:60]}) may hold names or a point; say which with header = true or "
            "header = false"
        )
    if numbered:
        notes.append(f"took the first line ({', '.join(first)[:60]}) for names; if it is a point, say header = false")
    return numbered


def _mostly_values(column: pl.Series) -> bool:
    some = column.head(SAMPLE).to_list()
    return 2 * sum(map(cells.is_value, some)) > len(some)


def _counts(column: pl.Series) -> bool:
    """Whether cells are 0, 1, 2 ... or 1, 2, 3 ..."""
    return bool(column.equals(pl.Series(map(str, range(len(column)))))) or bool(
        column.equals(pl.Series(map(str, range(1, len(column) + 1))))
    )


def _numbers_are_labels(first: list[str], columns: list[pl.Series]) -> bool | None:
    """Whether numbers in the first line are names; None where that can't be told."""
    if not all(re.match(cells.WHOLE, cell) for cell in first) or len(set(first)) < len(first):
        return False
    numbers = [int(cell) for cell in first]
    d, steps = len(numbers), {b - a for a, b in pairwise(numbers)}
    from_zero, from_one = numbers == list(range(d)), numbers == list(range(1, d + 1))
    whole = [column.str.contains(cells.WHOLE) for column in columns]
    if len(columns[0]) and not any(one.any() for one in whole):  # floats below, written as such
        if any(column.str.contains(_PADDED).any() for column in columns) or (from_zero and d > 1):
            return True
        return None if from_zero or from_one or (len(steps) == 1 and d > 2) else False
    if from_zero:
        return None
    all_whole = len(columns[0]) > 0 and all(one.all() for one in whole)
    return None if all_whole and d > 1 and (from_one or (steps == {1} and d > 2)) else False


def _may_be_decimals(columns: list[pl.Series]) -> bool:
    """Whether two columns of whole numbers may be one of decimals with a comma."""
    if (
        len(columns) != 2
        or not columns[0].str.contains(cells.WHOLE).all()
        or not columns[1].str.contains(r"^\d+([eE]|$)").all()
    ):
        return False
    # Decimals are written to the last digit that counts, or all to as many digits.
    after = columns[1]
    rounded = bool(after.str.contains(r"^\d+0$").any()) and after.str.len_chars().n_unique() > 1
    return not rounded or bool(after.str.contains(r"^0\d").any())
