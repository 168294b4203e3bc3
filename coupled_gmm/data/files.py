"""What a file is: the format that its name says, whether it is there, and whether it is still the one that was opened."""

import os
import stat
from os import PathLike
from pathlib import Path
from typing import NamedTuple

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
