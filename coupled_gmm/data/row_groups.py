"""Row groups of a Parquet file: polars reads any rows of it, but does not say where reading them one by one is cheap.

That stands at the end of the file, in Thrift's compact protocol: fields of a struct are a byte of type and step of their number,
numbers are of seven bits a byte. Here everything is stepped over but the number of rows of each group.
"""

from collections.abc import Iterator
from pathlib import Path

_MARK = b"PAR1"
_ROW_GROUPS, _NUM_ROWS = 4, 3  # fields of FileMetaData and of RowGroup
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12


def sizes(path: Path) -> list[int]:
    """Rows in each group, in order.

    Raises:
      ValueError, IndexError: it is no Parquet file, or its end is damaged.
    """
    with path.open("rb") as file:
        file.seek(-8, 2)
        tail = file.read(8)
        if tail[4:] != _MARK:
            raise ValueError("its last bytes are not those of a Parquet file")
        length = int.from_bytes(tail[:4], "little")
        file.seek(-8 - length, 2)
        footer = _Thrift(file.read(length))
    for field, kind in footer.fields():
        if field == _ROW_GROUPS and kind in _LISTS:
            count, _ = footer.elements()
            return [_rows(footer) for _ in range(count)]
        footer.skip(kind)
    return []


def _rows(footer: "_Thrift") -> int:
    found = -1
    for field, kind in footer.fields():
        if field == _NUM_ROWS and kind in _INTEGERS:
            found = footer.integer()
        else:
            footer.skip(kind)
    return found


class _Thrift:
    """Bytes of Thrift's compact protocol, read from the first on."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        result, shift = 0, 0
        while (byte := self.byte()) & 0x80:
            result |= (byte & 0x7F) << shift
            shift += 7
        return result | byte << shift

    def integer(self) -> int:
        coded = self.number()
        return (coded >> 1) ^ -(coded & 1)

    def elements(self) -> tuple[int, int]:
        """How many elements, and of which type."""
        head = self.byte()
        return (self.number() if head >> 4 == 15 else head >> 4), head & 15

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct; who takes them reads or skips its value."""
        field = 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.integer()
            yield field, head & 15

    def skip(self, kind: int) -> None:
        """Step over a value."""
        if kind == _BYTE:
            self.at += 1
        elif kind in _INTEGERS:
            self.number()
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            length = self.number()
            self.at += length
        elif kind in _LISTS:
            count, inner = self.elements()
            for _ in range(count):
                self.skip_element(inner)
        elif kind == _MAP:
            if count := self.number():
                kinds = self.byte()
                for _ in range(count):
                    self.skip_element(kinds >> 4)
                    self.skip_element(kinds & 15)
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner)
        elif kind not in _BOOLEANS:
            raise ValueError(f"a value of type {kind}")

    def skip_element(self, kind: int) -> None:
        """Step over an element of a list or map, where a truth value is a byte; in a struct it is in its type."""
        if kind in _BOOLEANS:
            self.at += 1
        else:
            self.skip(kind)
