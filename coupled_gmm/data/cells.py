"""Cells of a text: its lines without comments, rows cut at a delimiter, columns of cells, and the numbers in them."""

import codecs
import csv
import gzip
import io
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from coupled_gmm.core import installation

with installation.needed("tables", "clouds from files"):
    import polars as pl

MISSING = ("", "na", "n/a", "nan", "-nan", "null", "none", "<na>", "nat", "missing", "-", "--", ".", "?")
MISSING += ("#n/a", "#na", "#num!", "#div/0!", "#value!", "#ref!", "#name?", "#null!")
INFINITE = tuple(f"{sign}{word}" for sign in ("", "+", "-") for word in ("inf", "infinity"))
SPACE, ONE = " ", "\x1f"  # delimiters: runs of white space; none, in a file of one column
WHOLE = r"^[+-]?\d+$"
RAGGED = "give every row a cell for each column, and a header to all columns or none"
_EXPONENT = r"([eE][+-]?\d+)?$"
NUMBER = re.compile(r"[+-]?(\d+(\.\d*|,\d+)?|\.\d+|\d{1,3}(,\d{3})+(\.\d*)?|\d{1,3}(\.\d{3})+(,\d+)?)" + _EXPONENT)
_LONGEST = 4  # pieces of a text that one row may take
EXACT = rf"^{NUMBER.pattern}"


def decoded(path: Path, size: int = -1) -> Iterator[str]:
    """A text file in parts of some `size` bytes, or at once, its lines ending in "\\n"; ".gz" is unpacked."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        data = file.read(size)
        encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        decoder = codecs.getincrementaldecoder(encoding)()
        lines = io.IncrementalNewlineDecoder(None, translate=True)
        done = 0
        while data:
            if encoding != "utf-16" and b"\0" in data:
                raise ValueError("holds zero bytes, so it is no text; save it as a table in UTF-8")
            after = file.read(size) if size > 0 else b""
            done -= len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, not after)
            except UnicodeDecodeError as error:
                at = done + error.start
                raise ValueError(f"is not in UTF-8 (byte {at}); save it again in that encoding") from error
            yield lines.decode(text, not after)
            done += len(data) + len(decoder.getstate()[0])
            data = after


def pieces(path: Path, size: int) -> Generator[tuple[str, bool], None, None]:
    """A text file in pieces of whole rows, of some `size` bytes, each with whether it is the last.

    A row ends with a line, but not within quotes.
    """
    left, ready = "", None
    for text in decoded(path, size):
        left += text
        end = left.rfind("\n") + 1
        while end and left.count('"', 0, end) % 2:
            end = left.rfind("\n", 0, end - 1) + 1
        if not end and len(left) > _LONGEST * size:
            raise ValueError(f"a row is longer than {_LONGEST * size:,} characters; close its quotes, or save it again")
        if end:
            if ready is not None:
                yield ready, False
            ready, left = left[:end], left[end:]
    yield (ready or "") + left, True


def separated(text: str) -> tuple[str, str | None]:
    """The text without the line `sep=;` that Excel puts first, and that delimiter."""
    said = re.match(r'\s*"?sep=(.)"?[ \t]*\n', text, re.IGNORECASE)
    return (text[said.end() :], said[1]) if said else (text, None)


def _is_comment(line: str) -> bool:
    """A line that starts with #, but not with one of the errors that Excel writes."""
    start = line.lstrip(' \t"').lower()
    return start.startswith("#") and not start.startswith(MISSING[-8:])


def uncommented(text: str) -> tuple[list[str], str]:
    """Comments on top, and the text below them."""
    top, rest = [], text
    while rest and (not (line := rest.partition("\n")[0]).strip() or _is_comment(line)):
        top += [line] if line.strip() else []
        rest = rest.partition("\n")[2]
    return top, rest


def without_comments_at_end(text: str) -> str:
    """The text without the comments and blank lines that end it."""
    rest = text.rstrip("\n")
    while rest and _is_comment(rest[rest.rfind("\n") + 1 :]):
        rest = rest[: max(rest.rfind("\n"), 0)].rstrip("\n")
    return rest


def without_blank_lines(text: str) -> str:
    return re.sub(r"\n(?: *\n)+", "\n", text).rstrip("\n")


def rows(text: str, delimiter: str) -> Iterator[list[str]]:
    lines = io.StringIO(text, newline="\n")
    if delimiter == SPACE:
        lines = (line.replace("\t", " ").strip() for line in lines)
    try:
        for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True):
            yield [cell.strip() for cell in row]
    except csv.Error as error:
        raise ValueError(f"a quoted cell is broken ({error}); save it again") from error


def is_value(cell: str) -> bool:
    return bool(NUMBER.fullmatch(cell)) or cell.lower() in (*MISSING, *INFINITE)


def body(text: str, delimiter: str, above: int = 0, width: int | None = None) -> list[pl.Series]:
    """Columns of cells below the first line, stripped, in order.

    Args:
      text: lines of a table.
      delimiter: between cells.
      above: rows below the table's first line that stand above this text, for messages.
      width: how many cells a row has; None is as many as the first.
    """
    below = text.partition("\n")[2]
    if not below or '"' in text:
        return _columns(list(rows(text, delimiter))[1:], above, width)
    if delimiter == SPACE:
        below = _single_spaced(below)
    schema = [f"{i}" for i in range(width or below.partition("\n")[0].count(delimiter) + 1)]
    frame = _frame(below, delimiter, dict.fromkeys(schema, pl.String))
    if frame is None or frame[schema[-1]].null_count():  # a row may be short
        return _columns(list(rows(text, delimiter))[1:], above, width)
    return [column.fill_null("").str.strip_chars() for column in frame.get_columns()]


def plain_numbers(text: str, delimiter: str, width: int, taken: Sequence[int]) -> list[pl.Series] | None:
    """Columns of finite numbers with a decimal point, by polars' own parser; None where anything else may stand in them.

    Args:
      text: rows of numbers.
      delimiter: between cells.
      width: how many cells a row has.
      taken: places of the columns to give.
    """
    if '"' in text:
        return None
    if delimiter == SPACE and re.search(r"\t|  |^ | $", text, re.MULTILINE):
        text = _single_spaced(text)
    schema = {f"{i}": pl.Float64 if i in taken else pl.String for i in range(width)}
    frame = _frame(text, delimiter, schema)
    if frame is None or frame[f"{width - 1}"].null_count():
        return None
    found = [frame[f"{i}"] for i in taken]
    return found if all(column.is_finite().all() and not column.null_count() for column in found) else None


def _frame(text: str, delimiter: str, schema: dict[str, Any]) -> pl.DataFrame | None:
    """Lines without quotes as columns of these types; None where polars makes other rows of them."""
    options = {"has_header": False, "separator": delimiter, "quote_char": None, "schema": schema}
    try:
        frame = pl.read_csv(io.BytesIO(text.encode()), **options)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return None
    return frame if frame.height == text.count("\n") + 1 else None


def _single_spaced(text: str) -> str:
    return re.sub(r"[ \t]+", " ", re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text))


def _columns(rows: list[list[str]], above: int, width: int | None) -> list[pl.Series]:
    """Rows of equal length as columns."""
    if not rows:
        return []
    width = width or len(rows[0])
    for number, row in enumerate(rows, above + 1):
        if len(row) != width:
            raise ValueError(f"row {number} below the first line has {len(row)} cells and row 1 has {width}; {RAGGED}")
    return [pl.Series(list(column), dtype=pl.String) for column in zip(*rows, strict=True)]


def numbers(cells: pl.Series, decimal: str, thousands: str | None) -> pl.Series:
    """A column of cells as numbers; if it holds anything else, that alone."""
    mark = re.escape(decimal)
    plain = rf"^[+-]?(\d+({mark}\d*)?|{mark}\d+)" + _EXPONENT
    grouped = rf"^[+-]?\d{{1,3}}({re.escape(thousands)}\d{{3}})+({mark}\d*)?$" if thousands else plain
    lower = cells.str.to_lowercase()
    number, infinite = cells.str.contains(plain) | cells.str.contains(grouped), lower.is_in(INFINITE)
    bad = ~(number | infinite | lower.is_in(MISSING))
    if bad.any():
        return cells.zip_with(bad, pl.Series([None], dtype=pl.String))
    if thousands:
        cells = cells.str.replace_all(thousands, "", literal=True)
    if decimal != ".":
        cells = cells.str.replace(decimal, ".", literal=True)
    cells = cells.zip_with(number | infinite, pl.Series([None], dtype=pl.String))
    return cells.str.to_lowercase().cast(pl.Float64)


def marks(columns: list[pl.Series]) -> tuple[str, str | None]:
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
