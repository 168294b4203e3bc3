"""Standard output and error of the command line: what goes wrong with them is not the job's fault, and does not end it."""

import errno
import io
import os
import re
import sys
from typing import Any

import typer
from rich.console import Console

_WIDTH = 120  # of tables where standard output is no terminal
_LONGEST = 2000  # characters of a line of an error; some quote what a file holds
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # moves the cursor, or turns the writing round


def plain(text: str) -> str:
    """Text on one line without control characters: names of files and columns may hold some, and a terminal obeys them."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def console() -> Console:
    """To print tables on."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_WIDTH)


def say(out: Console, text: str) -> None:
    """A line."""
    out.print(plain(text), markup=False, soft_wrap=True)
    out.file.flush()


def say_error(text: str) -> None:
    """A line, or several, on standard error."""
    for line in text.split("\n"):
        short = line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        typer.echo(plain(short), err=True)


class _Sink(io.FileIO):
    """A descriptor that takes everything; from the first failure on, what it takes is lost."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int | None:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return len(data)


def settle() -> None:
    """Of a process of our own: standard output and error that never fail, whatever they are and whoever reads them."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would take its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        encoding = old.encoding if old is not None else "utf-8"
        setattr(sys, name, _text(descriptor, encoding, line_buffering=descriptor == 2 or os.isatty(descriptor)))


def _text(descriptor: int, encoding: str, line_buffering: bool) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(_Sink(descriptor))
    return io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


def lost() -> str | None:
    """Why standard output was not all taken, or None; a reader who has read enough, as `head`, has lost nothing."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Sink) else None
    return None if error is None or error.errno == errno.EPIPE else error.strerror
