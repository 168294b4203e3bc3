"""A run folder: what a job leaves on disk."""

import contextlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coupled_gmm.data import saving
from coupled_gmm.jobs import folders
from coupled_gmm.jobs.config import JobConfig
from coupled_gmm.jobs.job import Job, JobResult
from coupled_gmm.jobs.registry import JOBS, job_of
from coupled_gmm.jobs.sections import ConfigError, at, dump, is_utf8

FIT = "fit.npz"
# All that runs of any job write, tables before pictures; the result comes last, so that where it is the rest is.
_FILES = sorted(dict.fromkeys(name for job in JOBS for name in job.files), key=lambda name: Path(name).suffix)
NAMES = ("config.toml", "given.npz", *_FILES, FIT)


class RunFolder:
    """Where a run will be left: `reserve` makes one before the work, so that what came out can be written."""

    def __init__(self, folder: Path, part: Path):
        self.folder, self._part = folder, part

    def write(self, job: Job[Any, Any, Any], config: JobConfig, result: JobResult, inputs: Any) -> None:
        """Everything about a run, in place of an older one; or, where that fails, nothing.

        fit.npz, config.toml, the job's tables and texts, given.npz with what it keeps, pictures if wanted.

        Args:
          job: whose run it was.
          config: as run.
          result: what came out.
          inputs: what the job read.

        Raises:
          ConfigError: the disk is full, or the folder was changed meanwhile.
        """
        try:
            _write(self._part, job, config, result, inputs)
            folders.publish(self._part, self.folder, NAMES)
        except folders.Taken as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"{self.folder}: the run can't be written ({reason}); make room, or name another"
            ) from error


@contextlib.contextmanager
def reserve(path: Path, config: JobConfig) -> Iterator[RunFolder]:
    """A place for a run of the configuration at `path`.

    Raises:
      ConfigError: the run could not be written there; or its configuration, in UTF-8, could not at all.
    """
    folder = Path(config.output.directory or "")
    if odd := [line for line in dump(config).splitlines() if not is_utf8(line)]:
        raise ConfigError(f"{path}: {odd[0]!a}: a name that is not UTF-8 can't be written down; rename it")
    with contextlib.ExitStack() as stack:
        with at(path, "output.directory"):
            part = stack.enter_context(folders.reserved(folder, NAMES))
        yield RunFolder(folder, part)


def _write(folder: Path, job: Job[Any, Any, Any], config: JobConfig, result: JobResult, inputs: Any) -> None:
    saving.save(folder / FIT, result)
    (folder / "config.toml").write_text(dump(config), encoding="utf-8")
    for name, table in job.tables(result).items():
        (folder / name).write_text(table.write_csv(), encoding="utf-8")
    for name, text in job.texts(config, result).items():
        (folder / name).write_text(text, encoding="utf-8")
    if (kept := job.kept(inputs)) is not None:
        saving.save(folder / "given.npz", kept)
    if config.output.pictures and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(job.drawn(result))):
        job.draw(folder, config, result, inputs)


def read(folder: str | PathLike[str]) -> tuple[Job[Any, Any, Any], Any]:
    """The job of a run folder, and its result.

    Raises:
      ConfigError: the folder holds none.
    """
    path = Path(folder) / FIT
    try:
        there = path.exists()
    except OSError as error:
        raise ConfigError(f"{folder}: can't be read ({error.strerror}); give a run folder") from error
    if not there and folders.unfinished(path.parent):
        raise ConfigError(f"{folder}: its run is unfinished: under way, or it was stopped; run it again")
    if not there and (path.parent / "parts").is_dir():
        raise ConfigError(f"{folder}: the folder of a batch; name one of its jobs with --job, or see batch --status")
    if not there:
        raise ConfigError(f"{folder}: not a run folder (there is no {FIT} in it); give one that `coupled-gmm` wrote")
    try:
        result = saving.load(path)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    job = job_of(result)
    if job is None:
        raise ConfigError(
            f"{path}: holds a {type(result).__name__}, which is not a run's result; name the folder of a run"
        )
    return job, result
