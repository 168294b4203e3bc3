"""Tasks, done in this process or by any executor of `concurrent.futures`' kind: Dask's, a process pool, `mpi4py.futures`, loky.

What an executor loses, since a worker died or the task raised there, comes back as its exception; nothing else is lost with it.
"""

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from coupled_gmm.core import host
from coupled_gmm.core.errors import ArgumentTypeError

_AT_ONCE = 64  # tasks that an executor holds: their arguments are copies


def check(executor: Any) -> None:
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise ArgumentTypeError(
            "executor",
            f"expected an Executor, with a method submit, got {type(executor).__name__}",
            "pass None, or one",
        )


def outcomes(function: Callable[..., Any], tasks: Sequence[tuple], executor: Any = None) -> Iterator[tuple[int, Any]]:
    """The number and result of each task as it is done; of one that an executor lost, its exception in place of the result.

    Args:
      function: of a module, so that it can be pickled; of trees of NumPy arrays, as results are.
      tasks: arguments of each.
      executor: None does them here, in a thread for each core, and raises what one raises. Programs that they share should be
        compiled before: each thread would compile them.
    """
    if executor is not None:
        yield from _submitted(function, tasks, executor)
    elif min(threads(), len(tasks)) < 2:
        yield from ((number, function(*task)) for number, task in enumerate(tasks))
    else:
        with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
            for number, found in _submitted(function, tasks, pool):
                if isinstance(found, BaseException):
                    raise found
                yield number, found


def threads() -> int:
    """Programs at once in this process: one for each core, and one on an accelerator."""
    return host.n_cores() if jax.default_backend() == "cpu" else 1


def _submitted(function: Callable[..., Any], tasks: Sequence[tuple], executor: Any) -> Iterator[tuple[int, Any]]:
    exactly, waiting, running = bool(jax.config.read("jax_enable_x64")), iter(enumerate(tasks)), {}
    try:
        while True:
            for number, task in waiting:
                try:
                    running[executor.submit(_there, exactly, function, task)] = number
                except Exception as error:  # a pool that is broken takes no more
                    yield number, error
                if len(running) == _AT_ONCE:
                    break
            if not running:
                return
            done = next(iter(_completed(running)))
            number = running.pop(done)
            try:
                found = done.result()
            except (Exception, SystemExit) as error:  # a worker that exits must not end who asks for its result
                found = error
            yield number, found
    finally:
        for future in running:
            future.cancel()


def _completed(running: dict[Any, int]) -> Any:
    """Those of some futures that are done, of which there is one at least."""
    if all(isinstance(future, concurrent.futures.Future) for future in running):
        return concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done
    return [next(iter(running))]  # of another library: `result` waits


def _there(exactly: bool, function: Callable[..., Any], task: tuple) -> Any:
    """A task where the executor does it, in the precision of who asked for it."""
    with jax.enable_x64(exactly):
        return jax.tree.map(np.asarray, function(*task))
