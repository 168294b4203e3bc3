"""Compiled programs: what they are compiled for, and how a process gives back what it cannot hold.

On a CPU most of a first call is compilation, and most of that is XLA's newest emitter of kernels, which takes each of hundreds
through a pipeline of its own, and the search for what loops compute again and again, which finds nothing here that counts. Both
are left out where a program is compiled by itself: half the seconds, for kernels that are as quick (`fits.statistics` minds
what the older emitter can't do). Inside somebody else's program theirs is the choice.

A program of XLA lies in hundreds of memory maps, of which Linux allows a process 65,530: the next one ends it, without a word.
Whenever something has been compiled, maps are counted now and then; where half are taken, this package's programs are
dropped, and compiled anew when they are called again.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from coupled_gmm.core import checks, matrices

_MAPS, _LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_COMPILED = "/jax/core/compile/backend_compile_duration"
_EVERY = 8  # compilations between two counts: the largest programs take 1,500 maps each
_OURS, _ALL = 0.55, 0.75  # parts of the limit at which this package's programs are dropped, and at which JAX's are
# Options of XLA's compiler for CPUs, of a program that is compiled by itself.
_QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
_may_be_quick = True  # until a version of XLA does not know one of them
_programs: list["Program"] = []
_count = 0


def program(*static: str) -> Callable[[Callable], "Program"]:
    """A function compiled for its arguments' shapes and the values of its `static` ones, in full precision."""
    return lambda function: Program(function, static)


class Program:
    """A compiled function: by itself in few seconds, or as a part of the program that calls it."""

    def __init__(self, function: Callable, static: tuple[str, ...]):
        functools.update_wrapper(self, function)
        precise = matrices.precise
        self._part: Any = jax.jit(precise(function), static_argnames=static)
        self._alone: Any = jax.jit(precise(function), static_argnames=static, compiler_options=_quick())
        _programs.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _may_be_quick or jax.default_backend() != "cpu" or not checks.known(args, kwargs):
            return self._part(*args, **kwargs)
        try:
            return self._alone(*args, **kwargs)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if not _is_refused(error):
                raise
        return self._part(*args, **kwargs)

    def clear_cache(self) -> None:
        self._part.clear_cache()
        self._alone.clear_cache()

    def _cache_size(self) -> int:
        return self._part._cache_size() + self._alone._cache_size()


def _quick() -> dict[str, Any]:
    """Options of the compiler, but for those that the user has set."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in _QUICK.items() if name not in flags}


def _is_refused(error: Exception) -> bool:
    """Whether options are to blame: those of a part of a program, or one that this version of XLA does not know."""
    global _may_be_quick
    said = str(error)
    _may_be_quick &= "No such compile option" not in said
    return not _may_be_quick or "compiler_options" in said


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
