"""Rows of a running fit, sent to whoever listens: between calls of its program, or from the loop of somebody's own.

That holds one fixed callback and is told the number of its listener as it is told a tolerance, so a new listener
recompiles nothing, and fits in several threads each reach their own; without a listener there is no callback at all.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from coupled_gmm.core import installation

Row = dict[str, Any]
_numbers = itertools.count()  # never used twice: a program that outlives its listener reaches nobody
_listeners: dict[int, "_Listener"] = {}


class _Listener:
    """A callable of rows, called until it raises; what it raised is kept for the thread that listens."""

    def __init__(self, call: Callable[[Row], Any]):
        self.call = call
        self.error: BaseException | None = None

    def __call__(self, row: Row) -> None:
        if self.error is None:
            try:
                self.call(row)
            except BaseException as error:  # into JAX's runtime it would go as a page of that, and to any thread
                self.error = error


@contextlib.contextmanager
def listening(progress: Any) -> Iterator[np.int32 | None]:
    """Deliver rows to `progress`: a callable, or True for the package's own bar; False or None is nobody.

    Yields the number for `emit` to call it by. Once the program has ended, raises what the callable raised: the first row on
    which it does is its last.
    """
    if progress is False or progress is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        if progress is True:
            with installation.needed("cli", "progress"):
                from coupled_gmm.core.progress import ProgressBar  # rich is imported only where a bar is asked for

            progress = stack.enter_context(ProgressBar())
        elif not callable(progress):
            raise TypeError(f"progress: expected True, False or a callable of a row, got {type(progress).__name__}")
        number, listener = next(_numbers), _Listener(progress)
        _listeners[number] = listener
        try:
            yield np.int32(number)
            jax.effects_barrier()
        finally:
            del _listeners[number]
        if listener.error is not None:
            raise listener.error


@contextlib.contextmanager
def counting(progress: Any, total: int, what: str) -> Iterator[Callable[[], Any]]:
    """Count tasks as they are done: what is yielded is called after each.

    Args:
      progress: True draws a bar with the time left; a callable gets a dict of ``done`` and ``of``; False or None is nobody.
      what: is being done, for the bar.
    """
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress: expected True, False or a callable of a row, got {type(progress).__name__}")
    with contextlib.ExitStack() as stack:
        show = progress
        if progress is True:
            with installation.needed("cli", "progress"):
                from coupled_gmm.core.progress import CountBar

            show = stack.enter_context(CountBar(what, total))
        numbers = itertools.count(1)
        yield lambda: show({"done": next(numbers), "of": total}) if callable(show) else None


def emit(listener: Any, values: dict[str, Any]) -> None:
    """From inside a program: one row, with what its listener needs to show it. Rows past the last are not delivered.

    Args:
      listener: the number that `listening` gave, a leaf of the program's.
      values: of the row, with `em_steps`, how many there are at most, and whether it is `running`.
    """

    def deliver_if(number: Any, running: Any, **row: Any) -> None:
        if running:
            deliver(number, row)

    jax.debug.callback(deliver_if, listener, **values)


def deliver(listener: Any, row: Row) -> None:
    """From the host: one row, of numbers, to the listener of that number, if there is one yet."""
    listener = _listeners.get(int(listener))
    if listener is not None:
        listener({name: np.asarray(value).item() for name, value in row.items()})
