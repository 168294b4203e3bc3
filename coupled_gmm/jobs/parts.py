"""The folder of a batch: a file for each finished job, written whole or not at all, and the summary of all.

``config.toml`` says which batch this is, ``parts/`` holds a Parquet file of one row for each finished job, under a name that only
this job with this configuration has. A file there is believed where its row says the same and has its checksum; so two processes
may fill one folder at once, any of them may be killed at any moment, and who comes next does what is left.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from coupled_gmm.core import interrupts
from coupled_gmm.core.checks import brief
from coupled_gmm.data import files, saving
from coupled_gmm.jobs import batch, folders, run
from coupled_gmm.jobs.batch import Batch, Task
from coupled_gmm.jobs.job import Job
from coupled_gmm.jobs.sections import ConfigError

CONFIG, PARTS, TIMINGS = "config.toml", "parts", "timings.csv"
SUMMARIES = ("summary.parquet", "summary.csv")
_PART = ".part"
_LARGEST = 2**31  # bytes of a part


class Record(NamedTuple):
    """How a job ended."""

    name: str
    digest: str
    status: str  # of its result; "" where there is none
    error: str  # why it failed, in a line; "" where it did not
    seconds: float
    measures: dict[str, float | int]
    result: bytes | None  # as `saving.pack` makes them

    @property
    def failed(self) -> bool:
        return self.error != ""

    def checksum(self) -> str:
        """Of everything."""
        text = json.dumps([*self[:-1], hashlib.blake2b(self.result or b"").hexdigest()], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class BatchFolder:
    """The folder of a batch; `claimed` makes it, `existing` finds it."""

    def __init__(self, folder: Path, of: Batch):
        self.folder, self.batch = folder, of

    def record(self, task: Task) -> Record | None:
        """How a job ended; None where nothing whole says so."""
        try:
            return _read(self._path(task), task)
        except (Exception, pl.exceptions.PanicException):  # damaged in whichever way
            return None

    def records(self, tasks: Sequence[Task]) -> Iterator[Record | None]:
        """How jobs ended, without what came out: thousands of these would fill the memory."""
        for task in tasks:
            record = self.record(task)
            yield None if record is None else record._replace(result=None)

    def remove_damaged(self, task: Task) -> bool:
        """A file under a job's name that is no record of it goes; whether there was one."""
        path = self._path(task)
        if not os.path.lexists(path) or self.record(task) is not None:  # another process may have written it meanwhile
            return False
        with self._written(PARTS):
            path.unlink()
        return True

    def write(self, record: Record) -> None:
        """A record, in place of what is there for its job.

        Raises:
          ConfigError: it can't be written; what is there stays.
        """
        self._write(Path(PARTS) / f"{record.digest}.parquet", _parquet(_frame(record)))

    def forget_summary(self) -> None:
        """It will no longer be true."""
        for name in (*SUMMARIES, TIMINGS):
            with self._written(name), contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def write_summary(self, records: Sequence[Record]) -> None:
        """Tables of all jobs, in their order: results, which are the same whenever and wherever they ran; and seconds.

        Raises:
          ConfigError: they can't be written.
        """
        table = summary(self.batch, records)
        seconds = pl.DataFrame({"name": [r.name for r in records], "seconds": [round(r.seconds, 3) for r in records]})
        self._write(Path(TIMINGS), seconds.write_csv().encode())
        self._write(Path("summary.csv"), table.write_csv().encode())
        self._write(Path("summary.parquet"), _parquet(table))

    def _path(self, task: Task) -> Path:
        return self.folder / PARTS / f"{task.digest}.parquet"

    def _write(self, name: Path, content: bytes) -> None:
        path = self.folder / name
        with self._written(str(name)):
            _replace(path, content)

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            told = f"{self.folder / name}: can't be written ({reason}); make room, and run the batch again: it goes on"
            raise ConfigError(told) from error


def claimed(of: Batch) -> BatchFolder:
    """The folder that a batch will fill, or has begun to: made if need be, with what killed processes left removed.

    Raises:
      ConfigError: it can't be written, or is of something else: a run, another batch, this one with other jobs or keys.
    """
    folder = Path(of.directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = of.dump().encode()
        with folders.locked(folder):
            new = _claim(of, folder, text)
            (folder / PARTS).mkdir(exist_ok=True)
            if new:
                _replace(folder / CONFIG, text, folder_is_locked=True)
        _remove_abandoned(folder)
        _remove_abandoned(folder / PARTS)
        _probe(folder / PARTS)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{of.path}: output.directory: can't write into {folder} ({reason}); name another") from error
    return BatchFolder(folder, of)


def existing(folder: Path) -> BatchFolder:
    """The folder of a batch that was begun.

    Raises:
      ConfigError: it is none.
    """
    path = folder / CONFIG
    try:
        there = path.exists() and (folder / PARTS).is_dir()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: can't be read ({error}); give the folder of a batch") from error
    if not there:
        wanted = f"there is no {CONFIG} beside {PARTS}/ in it"
        raise ConfigError(f"{folder}: not the folder of a batch ({wanted}); give one that `coupled-gmm batch` wrote")
    return BatchFolder(folder, batch.load(path, resolved=True))


def result_of(folder: Path, name: str) -> tuple[Job[Any, Any, Any], Any]:
    """The job of a batch's folder, and what came out of the one of this name: a fit, say, as `coupled_gmm.load` gives it.

    Raises:
      ConfigError: the folder is no batch's, or has no such job, or that has not ended or has no result.
    """
    place = existing(folder)
    task = next((task for task in place.batch.tasks if task.name == name), None)
    if task is None:
        raise ConfigError(f"{folder}: has no job {brief(name)}; {CONFIG} there has their names")
    record = place.record(task)
    if record is None:
        raise ConfigError(f"{folder}: job {brief(name)} has not ended; run the batch again: it goes on")
    if record.result is None:
        raise ConfigError(f"{folder}: job {brief(name)} left no result: {record.error}")
    return place.batch.job, saving.unpack(f"{folder}: job {brief(name)}", record.result)


def summary(of: Batch, records: Sequence[Record]) -> pl.DataFrame:
    """A row for each job: its name, the keys in which jobs differ, columns that were kept, status, measures and error."""
    columns: dict[str, list[Any]] = {"name": [record.name for record in records]}
    flat = [batch.flattened(task.values) for task in of.tasks]
    columns |= {key: [values.get(key) for values in flat] for key in of.differing()}
    for kept in dict.fromkeys(column for task in of.tasks for column in task.kept):
        columns[kept] = [task.kept.get(kept) for task in of.tasks]
    frame = [_series(name, values) for name, values in columns.items()]
    frame.append(pl.Series("status", [record.status for record in records], pl.String))
    for name in of.job.measures:
        values = [record.measures.get(name) for record in records]
        whole = {type(value) for value in values} - {type(None)} == {int}
        frame.append(pl.Series(name, values, pl.Int64 if whole else pl.Float64))
    frame.append(pl.Series("error", [record.error for record in records], pl.String))
    return pl.DataFrame(frame)


def _series(name: str, values: list[Any]) -> pl.Series:
    """Values of one kind as they are, others as in JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        values = [None if value is None else float(value) for value in values]
    elif len(kinds) > 1 or kinds - {str, bool, int, float}:
        values = [None if value is None else json.dumps(value, default=str) for value in values]
    return pl.Series(name, values)


def _frame(record: Record) -> pl.DataFrame:
    columns = record._asdict() | {"measures": json.dumps(record.measures), "checksum": record.checksum()}
    return pl.DataFrame({name: [value] for name, value in columns.items()}, schema=_SCHEMA)


_SCHEMA = {"name": pl.String, "digest": pl.String, "status": pl.String, "error": pl.String, "seconds": pl.Float64}
_SCHEMA |= {"measures": pl.String, "result": pl.Binary, "checksum": pl.String}


def _parquet(frame: pl.DataFrame) -> bytes:
    file = io.BytesIO()
    frame.write_parquet(file, compression="uncompressed")
    return file.getvalue()


def _read(path: Path, task: Task) -> Record | None:
    """A part that is this job's and whole."""
    files.regular(path)
    if path.stat().st_size > _LARGEST:
        return None
    frame = pl.read_parquet(io.BytesIO(path.read_bytes()), n_rows=2)
    if dict(frame.schema) != _SCHEMA or len(frame) != 1:
        return None
    row = frame.row(0, named=True)
    checksum = row.pop("checksum")
    record = Record(**row | {"measures": json.loads(row["measures"])})
    whole = record.checksum() == checksum
    return record if whole and (record.name, record.digest) == (task.name, task.digest) else None


def _claim(of: Batch, folder: Path, text: bytes) -> bool:
    """Whether the folder is to be this batch's from now on, or, its configuration to be written anew.

    Raises:
      ConfigError: it is of something else.
    """
    path = folder / CONFIG
    where = f"{of.path}: output.directory"
    if not path.exists():
        theirs = [name for name in (*run.NAMES, *SUMMARIES, TIMINGS) if os.path.lexists(folder / name)]
        parts = folder / PARTS
        if parts.exists() and (not parts.is_dir() or any(parts.iterdir())):
            theirs.append(PARTS)
        if theirs:
            there = folder / theirs[0]
            raise ConfigError(f"{where}: {there} was not written by this batch; remove it, or name another folder")
        return True
    files.regular(path)
    if path.read_bytes() == text:
        return False
    if not (folder / PARTS).is_dir():
        raise ConfigError(f"{where}: {path} was not written by a batch; remove it, or name another folder")
    try:
        old = batch.load(path, resolved=True)
    except ConfigError as error:
        told = str(error).partition("\n")[0]
        raise ConfigError(f"{where}: {folder} holds no batch of this version ({told}); name another folder") from error
    if difference := batch.changed(old, of):
        told = f"{of.path}: {difference} in {folder}, which holds the results of that"
        raise ConfigError(f"{told}; name another folder with --out, or remove that one")
    return True


def _replace(path: Path, content: bytes, folder_is_locked: bool = False) -> None:
    """A file, whole or not at all, whoever else writes it at the same time."""
    part = path.with_name(f".{secrets.token_hex(8)}{_PART}")
    with interrupts.lock:  # a signal waits until it is there
        handle = None
        try:
            with contextlib.nullcontext() if folder_is_locked else folders.locked(path.parent):
                file = part.open("xb")  # exclusively: what another has put there is not followed
                handle = folders.lock(part, wait=False)
            with file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
            if handle is not None:
                os.close(handle)


def _probe(folder: Path) -> None:
    """A full disk takes a name, and no content."""
    path = folder / f".{secrets.token_hex(8)}"
    _replace(path, bytes(4096))
    path.unlink()


def _remove_abandoned(folder: Path) -> None:
    """What processes that were killed were writing."""
    with folders.locked(folder):
        for part in folder.glob(f".*{_PART}"):
            handle = folders.lock(part, wait=False)
            if handle is not None:
                with contextlib.suppress(OSError):
                    part.unlink()
                os.close(handle)
