"""Where jobs of a batch run: in this process, or on Dask's workers, on this machine or on a cluster that is there.

Dask starts workers again that die, moves their jobs to others, and shows what is done where on its dashboard; here is only what a
job is to it: a function of plain values that never raises. Records come back as they are ready, and whoever asked writes them down:
workers read files of points, and write nothing.
"""

import contextlib
import importlib.util
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import polars as pl
from rich.console import Console

import coupled_gmm as cg
from coupled_gmm.core import installation, interrupts
from coupled_gmm.data import saving
from coupled_gmm.jobs import cache
from coupled_gmm.jobs.batch import Task
from coupled_gmm.jobs.parts import Record
from coupled_gmm.jobs.registry import job_named
from coupled_gmm.jobs.sections import ConfigError, validated
from coupled_gmm.jobs.terminal import plain, say

Runner = Callable[[Sequence[Task]], contextlib.AbstractContextManager[Iterator[Record]]]
_SHARE = {"XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}  # one GPU's memory
_LONGEST = 2000  # characters of an error
_SECONDS = 30  # until a scheduler that does not answer is said to be absent


class LostClusterError(Exception):
    """The cluster went away; the jobs that it had are not done."""


def solve(task: Task) -> Record:
    """A job from its configuration to its record; whatever goes wrong in it is in that."""
    start = time.monotonic()
    job = job_named(task.command, task.values)
    assert job is not None
    status, error, measures, packed = "", "", {}, None
    try:
        config = validated(task.values, job.config, Path())
        with jax.enable_x64(config.precision == "float64"):
            path = Path(task.name)
            _, result = job.solve(path, config, job.read(path, config), Console(quiet=True))
            status, measures, packed = result.status_name, job.measured(result), saving.pack(result)
            result.raise_if_failed()
    except (ConfigError, cg.FitError, installation.MissingExtraError) as caught:
        error = "\n".join(line.removeprefix(f"{Path(task.name)}: ") for line in str(caught).split("\n"))
    except (Exception, pl.exceptions.PanicException) as caught:  # a fault, of this job alone
        error = f"{type(caught).__name__}: {caught}"
    return Record(task.name, task.digest, status, _line(error), time.monotonic() - start, measures, packed)


@contextlib.contextmanager
def here(tasks: Sequence[Task]) -> Iterator[Iterator[Record]]:
    """Jobs one after the other in this process."""
    yield map(solve, tasks)


def local(workers: int, keep_programs: bool, console: Console) -> Runner:
    """Jobs on so many processes on this machine, of one thread each.

    Raises:
      MissingExtraError: Dask is not installed.
    """
    with installation.needed("cluster", "--workers"):
        from distributed import Client, LocalCluster

    @contextlib.contextmanager
    def runner(tasks: Sequence[Task]) -> Iterator[Iterator[Record]]:
        started: list[Any] = []
        # Where a signal ends this process, its helper would tell of semaphores that nobody gave back.
        sys.warnoptions.append("ignore:resource_tracker")
        options: dict[str, Any] = {"threads_per_worker": 1, "processes": True, "dashboard_address": ":0", "env": _SHARE}
        with (
            interrupts.undoing(lambda: _end(started)),
            LocalCluster(n_workers=min(workers, len(tasks)), **options) as cluster,
            Client(cluster) as client,
        ):
            started.append(cluster)
            yield _records(client, tasks, keep_programs, console)

    return runner


def _end(clusters: Sequence[Any]) -> None:
    """Of clusters that are not closed, the workers: they would end by themselves, with many words."""
    for worker in [worker for cluster in clusters for worker in cluster.workers.values()]:
        if worker.pid is not None:
            with contextlib.suppress(OSError):
                os.kill(worker.pid, signal.SIGKILL)


def remote(address: str, keep_programs: bool, console: Console) -> Runner:
    """Jobs on the workers of the Dask scheduler at an address; a ConfigError where none answers there.

    Raises:
      MissingExtraError: Dask is not installed.
    """
    with installation.needed("cluster", "--scheduler"):
        import dask.config
        from distributed import Client

    @contextlib.contextmanager
    def runner(tasks: Sequence[Task]) -> Iterator[Iterator[Record]]:
        chosen = dask.config.get("scheduler", None)
        try:
            client = Client(address, timeout=_SECONDS)
        except (OSError, ValueError, TypeError) as error:
            dask.config.set(scheduler=chosen)  # of a client that reached nobody Dask keeps that it is to be used
            reason = _line(str(error) or type(error).__name__)
            raise ConfigError(f"--scheduler: {address}: can't be reached ({reason}); check the address") from error
        with client:
            try:
                client.run(installation.version)
            except Exception as error:  # of unpickling, on the other side
                told = _line(f"{type(error).__name__}: {error}")
                raise ConfigError(
                    f"--scheduler: {address}: its workers lack this package ({told}); install it"
                ) from error
            yield _records(client, tasks, keep_programs, console)

    return runner


def _records(client: Any, tasks: Sequence[Task], keep_programs: bool, console: Console) -> Iterator[Record]:
    """Jobs on the workers of a Dask client, as they end.

    Raises:
      LostClusterError: the scheduler went away.
    """
    from distributed import as_completed

    shown = f", dashboard {client.dashboard_link}" if importlib.util.find_spec("bokeh") else ""
    say(console, f"workers: {len(client.nthreads())}{shown}")
    futures = client.map(_solve_on_worker, tasks, keep_programs=keep_programs, pure=False)
    left = {future.key: task for future, task in zip(futures, tasks, strict=True)}
    waiting = as_completed(futures)
    del futures  # who holds a future holds its result on the worker
    for future in waiting:
        task = left[future.key]
        if future.status == "finished":
            yield future.result()
        elif future.status == "error":  # a worker that died again and again, or a record that could not travel
            error = _line(f"{type(future.exception()).__name__}: {future.exception()}")
            yield Record(task.name, task.digest, "", error, 0.0, {}, None)
        else:
            raise LostClusterError(
                f"the cluster went away, with {len(left):,} jobs left; run the batch again: it goes on"
            )
        del left[future.key]


def _solve_on_worker(task: Task, keep_programs: bool) -> Record:
    # Ctrl-C may reach a worker while its tasks are cancelled, of which it would warn.
    logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
    if keep_programs:
        cache.keep_programs()  # once is enough: the second call finds that there is a place
    return solve(task)


def _line(text: str) -> str:
    """An error on one line that a table can hold."""
    line = plain(" | ".join(part.strip() for part in text.splitlines() if part.strip()))
    short = line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return short.encode("utf-8", "backslashreplace").decode()
