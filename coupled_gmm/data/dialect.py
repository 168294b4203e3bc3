"""Tables in text files, as pandas, polars, R, NumPy and spreadsheets write them.

Encoding, delimiter, header, index and decimal mark are told from what the file holds. What can be taken in two ways is
refused, with the key that settles it; what was decided is told in notes, never in silence.
"""

import csv
import gzip
import io
import re
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from coupled_gmm.core import installation

with installation.needed("tables", "clouds from files"):
    import polars as pl

MISSING = ("", "na", "n/a", "nan", "-nan", "null", "none", "<na>", "nat", "missing", "-", "--", ".", "?")
MISSING += ("#n/a", "#na", "#num!", "#div/0!", "#value!", "#ref!", "#name?", "#null!")
INFINITE = tuple(f"{sign}{word}" for sign in ("", "+", "-") for word in ("inf", "infinity"))
SAMPLE = 200  # lines that tell the delimiter
_SPACE, _ONE = " ", "\x1f"  # delimiters: runs of white space; none, in a file of one column
_CANDIDATES = ("\t", ";", "|", ",", _SPACE)  # of two that fit equally well the first
_EXPONENT = r"([eE][+-]?\d+)?$"
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*|,\d+)?|\.\d+|\d{1,3}(,\d{3})+(\.\d*)?|\d{1,3}(\.\d{3})+(,\d+)?)" + _EXPONENT)
_EXACT = rf"^{_NUMBER.pattern}"
_WHOLE = r"^[+-]?\d+$"
_PADDED = r"^[+-]?\d+[.,](\d*0)?([eE].*)?$"  # 1.0, 0.50: who writes so writes no plain 0 among floats


class Table(NamedTuple):
    """Columns of a file: numbers (null where a value is missing), or of another type where they hold none."""

    names: list[str]
    columns: list[pl.Series]
    named: bool  # whether the file gives the names; else they are column_1, column_2 ...
    index: tuple[int, ...] = ()  # columns that only say which row it is
    notes: tuple[str, ...] = ()


def read(path: Path, header: bool | None = None) -> Table:
    """The table in a text file.

    Args:
      path: the file; ".gz" is unpacked.
      header: whether the first line holds names; None tells it from the lines below, where that is possible.

    Raises:
      ValueError: no table, or one that can be taken in two ways; the message lacks the file's name.
    """
    text, forced = _separated(_decoded(path))
    comments, text = _uncommented(text)
    if not text.strip():
        raise ValueError("the file is empty; a cloud needs at least one point")
    sample = [line for line in islice(io.StringIO(text), SAMPLE) if line.strip()]
    delimiter = forced or _delimiter(sample)
    first = next(_rows(text, delimiter))
    columns = _body(text, delimiter)
    if not columns:  # one line: a header, or one point
        if header or (header is None and not all(map(_is_value, first))):
            return Table(first, [pl.Series(dtype=pl.String) for _ in first], True)
        columns = [pl.Series(dtype=pl.String) for _ in first]
    columns, first = _without_empty_end(columns, first)
    names = None if header is False else _names_in_comment(comments, delimiter, columns, first)
    notes = []
    if names is None and (header if header is not None else _is_header(first, columns, notes)):
        names = first
    else:
        if len(first) != len(columns):
            raise ValueError(f"the first line has {len(first)} cells and the others {len(columns)}; {_RAGGED}")
        columns = [pl.concat([pl.Series([cell]), column]) for cell, column in zip(first, columns, strict=True)]
    if names is not None and len(names) == len(columns) - 1:
        _check_row_names(names, columns, delimiter == "," and '\n"' not in text)
        names = ["", *names]
    if names is not None and len(names) != len(columns):
        raise ValueError(f"the header has {len(names)} names and the rows have {len(columns)} cells; {_RAGGED}")
    if names is None and delimiter == "," and _may_be_decimals(columns):
        if header is None:
            raise ValueError(
                "two columns of whole numbers may be one of decimals cut at their comma; write a decimal point, or say "
                "header = false if there are two"
            )
        notes.append("read as two columns of whole numbers; if they are one of decimals, write a point for the comma")
    numbers = _numbers(columns)
    return Table(
        names or [f"column_{i + 1}" for i in range(len(columns))], numbers, names is not None, (), tuple(notes)
    )


_RAGGED = "give every row a cell for each column, and a header to all columns or none"


def _decoded(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in data:
        raise ValueError("holds zero bytes, so it is no text; save it as a table in UTF-8")
    else:
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not in UTF-8 (byte {error.start}); save it again in that encoding") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _separated(text: str) -> tuple[str, str | None]:
    """The text without the line `sep=;` that Excel puts first, and that delimiter."""
    said = re.match(r'\s*"?sep=(.)"?[ \t]*\n', text, re.IGNORECASE)
    return (text[said.end() :], said[1]) if said else (text, None)


def _is_comment(line: str) -> bool:
    """A line that starts with #, but not with one of the errors that Excel writes."""
    start = line.lstrip(' \t"').lower()
    return start.startswith("#") and not start.startswith(MISSING[-8:])


def _uncommented(text: str) -> tuple[list[str], str]:
    """Comments on top, and the text without them, those at its end, and blank lines."""
    top, rest = [], text
    while rest and (not (line := rest.partition("\n")[0]).strip() or _is_comment(line)):
        top += [line] if line.strip() else []
        rest = rest.partition("\n")[2]
    rest = rest.rstrip("\n")
    while rest and _is_comment(rest[rest.rfind("\n") + 1 :]):
        rest = rest[: max(rest.rfind("\n"), 0)].rstrip("\n")
    return top, re.sub(r"\n(?: *\n)+", "\n", rest)


def _rows(text: str, delimiter: str) -> Iterator[list[str]]:
    lines = io.StringIO(text, newline="\n")
    if delimiter == _SPACE:
        lines = (line.replace("\t", " ").strip() for line in lines)
    try:
        for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True):
            yield [cell.strip() for cell in row]
    except csv.Error as error:
        raise ValueError(f"a quoted cell is broken ({error}); save it again") from error


def _is_value(cell: str) -> bool:
    return bool(_NUMBER.fullmatch(cell)) or cell.lower() in (*MISSING, *INFINITE)


def _delimiter(sample: list[str]) -> str:
    """The one that cuts the lines into equally many cells, most of which are numbers."""
    fits, best, ragged = 0.0, _ONE, None
    for candidate in _CANDIDATES:
        try:
            rows = list(_rows("".join(sample), candidate))
        except ValueError:  # a sample may end within a quoted cell
            continue
        first, *body = map(len, rows)
        widths = set(body or [first])
        if first > 1 or max(widths) > 2:
            ragged = ragged or candidate
        if len(widths) > 1 or max(widths) < 2 or abs(first - max(widths)) > 1:
            continue
        cells = [cell for row in rows[1:] or rows for cell in row]
        share = sum(map(_is_value, cells)) / len(cells)
        if share > fits or best == _ONE:
            fits, best = share, candidate
    return ragged if best == _ONE and ragged is not None else best


def _body(text: str, delimiter: str) -> list[pl.Series]:
    """Columns of cells below the first line, stripped, in order."""
    body = text.partition("\n")[2]
    if not body or '"' in text:
        return _columns(list(_rows(text, delimiter))[1:])
    if delimiter == _SPACE:
        body = re.sub(r"[ \t]+", " ", re.sub(r"(?m)^[ \t]+|[ \t]+$", "", body))
    lines = body.partition("\n")[0].count(delimiter) + 1
    schema = {f"column_{i}": pl.String for i in range(lines)}
    options = {"has_header": False, "separator": delimiter, "quote_char": None, "schema": schema}
    try:
        frame = pl.read_csv(io.BytesIO(body.encode()), **options)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return _columns(list(_rows(text, delimiter))[1:])
    if frame.to_series(frame.width - 1).null_count() or frame.height != body.count("\n") + 1:  # a row may be short
        return _columns(list(_rows(text, delimiter))[1:])
    return [column.fill_null("").str.strip_chars() for column in frame.get_columns()]


def _columns(rows: list[list[str]]) -> list[pl.Series]:
    """Rows of equal length as columns."""
    if not rows:
        return []
    width = len(rows[0])
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise ValueError(f"row {number} below the first line has {len(row)} cells and row 1 has {width}; {_RAGGED}")
    return [pl.Series(list(column), dtype=pl.String) for column in zip(*rows, strict=True)]


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
    if not comments or not all(map(_is_value, first)):
        return None
    names = next(_rows(comments[-1].lstrip(' \t"#'), delimiter), [])
    return names if len(names) == len(columns) and not any(map(_is_value, names)) else None


def _check_row_names(names: list[str], columns: list[pl.Series], bare: bool) -> None:
    """Refuse a first column without a name that can't name rows, as it does where R wrote the file.

    Args:
      names: of the other columns.
      columns: of cells.
      bare: commas are the delimiter, and the first cells are not quoted: they may be parts of decimals.
    """
    labels = columns[0]
    fractions = labels.str.contains(_EXACT).any() and not labels.str.contains(_WHOLE).all()
    if labels.n_unique() < len(labels) or fractions or (bare and len(names) == 1):
        raise ValueError(
            f"the header has {len(names)} names and the rows have {len(columns)} cells, the first of which may not name "
            f"rows; {_RAGGED}, and write a decimal point where commas are the delimiter"
        )


def _is_header(first: list[str], columns: list[pl.Series], notes: list[str]) -> bool:
    """Whether the first line holds names."""
    labels = [i for i, cell in enumerate(first) if _NUMBER.fullmatch(cell)]
    words = [i for i, cell in enumerate(first) if not _is_value(cell)]
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
    cells = column.head(SAMPLE).to_list()
    return 2 * sum(map(_is_value, cells)) > len(cells)


def _counts(column: pl.Series) -> bool:
    """Whether cells are 0, 1, 2 ... or 1, 2, 3 ..."""
    return bool(column.equals(pl.Series(map(str, range(len(column)))))) or bool(
        column.equals(pl.Series(map(str, range(1, len(column) + 1))))
    )


def _numbers_are_labels(first: list[str], columns: list[pl.Series]) -> bool | None:
    """Whether numbers in the first line are names; None where that can't be told."""
    if not all(re.match(_WHOLE, cell) for cell in first) or len(set(first)) < len(first):
        return False
    numbers = [int(cell) for cell in first]
    d, steps = len(numbers), {b - a for a, b in pairwise(numbers)}
    from_zero, from_one = numbers == list(range(d)), numbers == list(range(1, d + 1))
    whole = [column.str.contains(_WHOLE) for column in columns]
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
        or not columns[0].str.contains(_WHOLE).all()
        or not columns[1].str.contains(r"^\d+([eE]|$)").all()
    ):
        return False
    # Decimals are written to the last digit that counts, or all to as many digits.
    after = columns[1]
    rounded = bool(after.str.contains(r"^\d+0$").any()) and after.str.len_chars().n_unique() > 1
    return not rounded or bool(after.str.contains(r"^0\d").any())


def _numbers(columns: list[pl.Series]) -> list[pl.Series]:
    """Columns of cells as numbers; one that holds anything else is left with that alone."""
    decimal, thousands = _marks(columns)
    mark = re.escape(decimal)
    plain = rf"^[+-]?(\d+({mark}\d*)?|{mark}\d+)" + _EXPONENT
    grouped = rf"^[+-]?\d{{1,3}}({re.escape(thousands)}\d{{3}})+({mark}\d*)?$" if thousands else plain
    read = []
    for cells in columns:
        lower = cells.str.to_lowercase()
        number, infinite = cells.str.contains(plain) | cells.str.contains(grouped), lower.is_in(INFINITE)
        bad = ~(number | infinite | lower.is_in(MISSING))
        if bad.any():
            read.append(cells.zip_with(bad, pl.Series([None], dtype=pl.String)))
            continue
        if thousands:
            cells = cells.str.replace_all(thousands, "", literal=True)
        if decimal != ".":
            cells = cells.str.replace(decimal, ".", literal=True)
        cells = cells.zip_with(number | infinite, pl.Series([None], dtype=pl.String))
        read.append(cells.str.to_lowercase().cast(pl.Float64))
    return read


def _marks(columns: list[pl.Series]) -> tuple[str, str | None]:
    """The decimal mark, and the one between thousands if there is one."""
    with_comma = [cells for column in columns if len(cells := column.filter(column.str.contains(",", literal=True)))]
    if not with_comma:
        return ".", None

    def seen(pattern: str, among: list[pl.Series]) -> bool:
        return any(bool(cells.str.contains(pattern).any()) for cells in among)

    either = seen(r"^[+-]?[1-9]\d{0,2},\d{3}$", with_comma)
    commas_group = seen(r"^[+-]?\d{1,3}((,\d{3}){2,}(\.\d*)?|(,\d{3})+\.\d*)$", with_comma)
    points_group = seen(r"^[+-]?\d{1,3}(\.\d{3})+,\d+$", with_comma)
    comma = points_group or seen(
        r"^[+-]?(0\d*,\d+|\d{4,},\d+|\d+,\d{1,2}|\d+,\d{4,}|,\d+|\d+,)$|^[+-]?\d+,\d*[eE]", with_comma
    )
    point = seen(r"^[+-]?(0*\.\d+|0\d*\.\d*|\d{4,}\.\d*|\d+\.(\d{0,2}|\d{4,}))" + _EXPONENT, columns)
    if comma and (point or commas_group):
        raise ValueError("both 1,5 and 1.5 stand in it; write one decimal mark, a point, say")
    if comma:
        return ",", "." if points_group else None
    if commas_group or (either and point):
        return ".", ","
    if either:
        raise ValueError("1,234 in it may be 1.234 or 1234; write a decimal point, and nothing between thousands")
    return ".", None
