"""Rows of a running fit, sent from the compiled loop to whoever listens on the host.

The program holds one fixed callback, so a new listener recompiles nothing; without a listener there is no callback at all.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

Row = dict[str, Any]
_listeners: list[Callable[[Row], Any]] = []


@contextlib.contextmanager
def listening(progress: Any) -> Iterator[None]:
    """Deliver rows to `progress`: a callable, or True for the package's own bar; False or None is nobody."""
    if progress is False or progress is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        if progress is True:
            from coupled_gmm.progress import ProgressBar  # rich is imported only where a bar is asked for

            progress = stack.enter_context(ProgressBar())
        elif not callable(progress):
            raise TypeError(f"progress: expected True, False or a callable of a row, got {type(progress).__name__}")
        _listeners.append(progress)
        try:
            yield
            jax.effects_barrier()
        finally:
            _listeners.remove(progress)


def emit(values: dict[str, Any]) -> None:
    """From inside a program: one row, with what its listeners need to show it. Rows past the last are not delivered."""

    def deliver(running: Any, **row: Any) -> None:
        if running and _listeners:
            _listeners[-1]({name: value.item() for name, value in row.items()})

    jax.debug.callback(deliver, **values)
