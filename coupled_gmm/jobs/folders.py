"""A folder that is filled whole or not at all, beside files of other people and other runs.

All is written into a hidden folder inside it first. Then, with the folder locked, the old files go and the new ones move in,
the one last whose presence says that all are there. A process may be killed at any moment of that.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from coupled_gmm.core import interrupts

try:
    import fcntl
except (
    ImportError
):  # Windows: two runs into one folder at once are not kept apart there, and what killed ones leave stays
    fcntl = None

_PREFIX = ".unfinished-run-"
_RESERVED, _MOVING = "reserved", "moving"  # a file beside a run's says how far it is


class Taken(ValueError):
    """A folder that can't be filled."""


@contextlib.contextmanager
def reserved(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """An empty folder to write files into, on its way to `folder`; removed at the end, whatever happens.

    Args:
      folder: made if need be.
      names: all that runs may write there, the last the one whose presence says that the rest is there.

    Raises:
      Taken: nothing could be put there, or what is there is not ours to replace.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise Taken(f"can't make the folder {folder} ({_reason(error)}); name another") from error
    try:
        with locked(folder):
            _remove_abandoned(folder, names)
            _check_names(folder, names)
            part = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
            handle = lock(part, wait=False)
        (part / _RESERVED).write_bytes(bytes(4096))  # a full disk takes a name, and no content
    except OSError as error:
        raise Taken(f"can't write into the folder {folder} ({_reason(error)}); name another") from error
    try:
        with interrupts.undoing(lambda: _remove(part)):
            yield part
    finally:
        if handle is not None:
            os.close(handle)


def publish(part: Path, folder: Path, names: Sequence[str]) -> None:
    """The files in `part` into `folder`, in place of all others of these names.

    Raises:
      Taken: what is there now is not ours to replace.
      OSError: that did not go; then none of these files is there.
    """
    with locked(folder), interrupts.lock:
        _check_names(folder, names)
        os.replace(part / _RESERVED, part / _MOVING)
        try:
            for name in reversed(names):
                (folder / name).unlink(missing_ok=True)
            for name in names:
                if (part / name).exists():
                    os.replace(part / name, folder / name)
        except BaseException:
            _remove_files(folder, names)
            raise


def unfinished(folder: Path) -> bool:
    """Whether a run into this folder is under way, or was killed."""
    return any(folder.glob(f"{_PREFIX}*"))


def _check_names(folder: Path, names: Sequence[str]) -> None:
    there = [name for name in names if os.path.lexists(folder / name)]
    for name in there:
        path = folder / name
        if path.is_dir():
            raise Taken(f"there is a folder {path}, where a run writes a file; remove it, or name another folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise Taken(f"{path} is write-protected; change that, or name another folder")
    if there and names[-1] not in there:
        raise Taken(
            f"{folder / there[0]} was not written by a run, and a run would replace it; remove it, or name another folder"
        )


def _remove_abandoned(folder: Path, names: Sequence[str]) -> None:
    """What killed runs left: their hidden folders and, of one that was killed as its files moved in, those files."""
    for part in folder.glob(f"{_PREFIX}*"):
        handle = lock(part, wait=False)
        if handle is None:
            continue
        if (part / _MOVING).exists() and not os.path.lexists(folder / names[-1]):
            _remove_files(folder, names)
        shutil.rmtree(part, ignore_errors=True)
        os.close(handle)


def _remove_files(folder: Path, names: Sequence[str]) -> None:
    for name in reversed(names):
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _remove(part: Path) -> None:
    aside = part.with_name(f"{part.name}-removed")  # who still writes into it, writes no more
    with contextlib.suppress(OSError):
        part.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def lock(folder: Path, wait: bool) -> int | None:
    """A handle that keeps the folder locked until it is closed, at the latest by the end of the process; or None."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another's or, on some network drives, no locks at all
        if handle is not None:
            os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    handle = lock(folder, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
