"""Compiled programs, and how a process gives back what it cannot hold.

A program of XLA lies in hundreds of memory maps, of which Linux allows a process 65,530: the next one ends it, without a word.
Whenever something has been compiled, maps are counted now and then; where half are taken, this package's programs are
dropped, and compiled anew when they are called again.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from coupled_gmm.core import matrices

_MAPS, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_COMPILED = "/jax/core/compile/backend_compile_duration"
_EVERY = 8  # compilations between two counts: the largest programs take 1,500 maps each
_OURS, _ALL = 0.55, 0.75  # parts of the limit at which this package's programs are dropped, and at which JAX's are
_programs: list[Any] = []
_count = 0


def program(*static: str) -> Callable[[Callable], Any]:
    """A function compiled for its arguments' shapes and the values of its `static` ones, in full precision."""

    def compiled(function: Callable) -> Any:
        made = jax.jit(matrices.precise(function), static_argnames=static)
        _programs.append(made)
        return made

    return compiled


def _give_back(event: str, duration_secs: float, **kwargs: Any) -> None:
    """After a compilation: drop programs where too many are held."""
    global _count
    del duration_secs, kwargs
    if event != _COMPILED:
        return
    _count += 1
    if _count % _EVERY or (limit := _limit()) is None:
        return
    if n_maps() > _OURS * limit:
        for made in _programs:
            made.clear_cache()
    if n_maps() > _ALL * limit:
        jax.clear_caches()


def n_maps() -> int:
    """Memory maps of this process; 0 where the system does not say."""
    try:
        return _MAPS.read_bytes().count(b"\n")
    except OSError:
        return 0


@functools.cache
def _limit() -> int | None:
    """How many a process may have; None where there is no such limit."""
    try:
        return int(_LIMIT.read_text())
    except (OSError, ValueError):
        return None


jax.monitoring.register_event_duration_secs_listener(_give_back)
