"""Compiled programs: what they are compiled for, and how a process gives back what it cannot hold.

On a CPU most of a first call is compilation, and most of that is XLA's newest emitter of kernels, which takes each of hundreds
through a pipeline of its own, and the search for what loops compute again and again. Both are left out where a program is
compiled by itself: half the seconds, for kernels that are as quick (`fits.statistics` minds what the older emitter can't do).
Where features are many, loops over their matrices would take a fifth more time, and keep both. Inside somebody else's program
theirs is the choice.

A program of XLA lies in hundreds of memory maps, of which Linux allows a process 65,530: the next one ends it, without a word.
Whenever something has been compiled, maps are counted now and then; where half are taken, this package's programs are
dropped, and compiled anew when they are called again.
"""

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator
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
_FEW_FEATURES = 3  # of which matrices are small
_quick_options_are_known = True  # until a version of XLA does not know one of them
_programs: list["Program"] = []
_count = 0


def program(*static: str, over_matrices: bool = False) -> Callable[[Callable], "Program"]:
    """A function compiled for its arguments' shapes and the values of its `static` ones, in full precision.

    `over_matrices`: whether most of its time may go into matrices as large as the features are many.
    """
    return lambda function: Program(function, static, over_matrices)


class Program:
    """A compiled function: by itself in few seconds, or as a part of the program that calls it."""

    def __init__(self, function: Callable, static: tuple[str, ...], over_matrices: bool):
        functools.update_wrapper(self, function)

        def compiled(options: dict[str, Any] | None) -> Any:
            return jax.jit(matrices.precise(function), static_argnames=static, compiler_options=options)

        self._over_matrices = over_matrices
        self._full, self._quick = compiled(None), compiled(_unless_set(_QUICK))
        _programs.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _no_collection():
            if self._may_be_quick(args, kwargs):
                try:
                    return self._quick(*args, **kwargs)
                except (ValueError, jax.errors.JaxRuntimeError) as error:
                    if not _is_refused(error):
                        raise
            return self._full(*args, **kwargs)

    def _may_be_quick(self, args: Any, kwargs: Any) -> bool:
        if not _quick_options_are_known or jax.default_backend() != "cpu" or not checks.known(args, kwargs):
            return False
        return not self._over_matrices or all(n <= _FEW_FEATURES for n in _features(args))

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As that of ``jax.jit``: what a call with such arguments would compile."""
        return (self._quick if self._may_be_quick(args, kwargs) else self._full).lower(*args, **kwargs)

    def clear_cache(self) -> None:
        self._full.clear_cache()
        self._quick.clear_cache()

    def _cache_size(self) -> int:
        return self._full._cache_size() + self._quick._cache_size()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage is left for later: a program is traced into a million objects that stay, and the collector would look
    through them again and again, for a sixth of a first call."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _features(args: Any) -> list[int]:
    """Of what has any among some arguments."""
    leaves = jax.tree.leaves(args, is_leaf=lambda x: hasattr(x, "n_features"))
    return [leaf.n_features for leaf in leaves if hasattr(leaf, "n_features")]


def _unless_set(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the compiler, but for those that the user has set."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags}


def _is_refused(error: Exception) -> bool:
    """Whether options are to blame: those of a part of a program, or one that this version of XLA does not know."""
    global _quick_options_are_known
    said = str(error)
    _quick_options_are_known &= "No such compile option" not in said
    return not _quick_options_are_known or "compiler_options" in said


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
