"""What a file is: the format that its name says, whether it is there, whether it is the one that was opened; how one is written."""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO, NamedTuple

from coupled_gmm.core import installation
from coupled_gmm.core.errors import reason

TEXT = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
TABLES = (*TEXT, ".parquet")
FORMATS = (".npy", ".npz", ".csv", ".parquet", *TEXT[1:])


def ending(path: str | PathLike[str]) -> str:
    """What a file's name says it is: ".csv", ".csv.gz"; empty where it says nothing."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def existing(path: str | PathLike[str]) -> Path:
    """The path of a regular file in a format that can be read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another format, a folder, a pipe; or it can't be reached.
    """
    path = Path(path)
    if ending(path) not in FORMATS:
        end = ending(path) or "a file without ending"
        raise ValueError(f"{path}: can't read {end}; use one of {', '.join(FORMATS)}")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; check the name and the folder") from error
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):  # reading a named pipe would wait for ever
        raise ValueError(f"{path}: can't be read as {ending(path)} (it is no regular file); name a file")
    return path


def regular(path: Path) -> None:
    """Refuse what is no ordinary file: a pipe would be waited for, and a device never ends.

    Raises:
      FileNotFoundError: there is none.
      PermissionError, OSError: it can't be looked at; the message says why.
      ValueError: a folder, a pipe, a device, or a name that no file can have.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; check the name and the folder") from error
    except OSError as error:
        raise type(error)(f"{path}: can't be reached ({error.strerror}); check the name and the permissions") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: is no name of a file ({error}); give another") from error
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: is a folder; name a file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: is a pipe or a device; name a file")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is written whole or not at all: under a name of its own beside the path, where it moves at the end of the block.

    Raises:
      ValueError: something stands at the path that is no file.
      OSError: it can't be written; nothing is left behind, whatever ends the block.
    """
    with contextlib.suppress(FileNotFoundError):
        regular(path)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:  # exclusively: what another has put there is not followed
            yield file
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, part)  # a file that was kept from others stays so
        os.replace(part, path)
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        if error.filename not in (None, str(part)):
            raise  # of a file that was read meanwhile
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def as_unreadable(path: Path, also: type[BaseException] = Exception) -> Iterator[None]:
    """Whatever libraries raise of a damaged file, `also` what is no exception of Python's, as one line that names it."""
    try:
        yield
    except installation.MissingExtraError:
        raise
    except (Exception, also) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> ValueError:
    """Whatever a library raised of a file, as one line that names the file."""
    if isinstance(error, PermissionError):
        return ValueError(f"{path}: may not be read; ask for permission to, or change it")
    if isinstance(error, MemoryError):
        return ValueError(f"{path}: does not fit into memory; save fewer points, or float32")
    said = reason(error)
    if ending(path) in TEXT and isinstance(error, ValueError) and "; " in said:  # with a remedy of its own
        return ValueError(f"{path}: can't be read as {ending(path)}: {said}")
    return ValueError(f"{path}: can't be read as {ending(path)} ({said}); save it again, or check that it is complete")


class Stamp(NamedTuple):
    """By which a file is known again: what rewriting it changes."""

    size: int  # bytes
    modified: int  # nanoseconds

    @staticmethod
    def of(path: Path) -> "Stamp":
        now = os.stat(path)
        return Stamp(now.st_size, now.st_mtime_ns)

    def check(self, path: Path) -> None:
        """Refuse a file that is no longer the one that was opened.

        Raises:
          ValueError: it has changed, or is gone.
        """
        try:
            now = Stamp.of(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: is gone since it was opened; bring it back, and open it again") from error
        except OSError as error:
            raise unreadable(path, error) from error
        if now != self:
            grown = now.size - self.size
            how = f" by {abs(grown):,} bytes, it has {'grown' if grown > 0 else 'shrunk'}" if grown else ""
            raise ValueError(f"{path}: has changed since it was opened{how}; open it again when it is whole")
