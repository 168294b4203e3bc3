"""Values at the points of a cloud, in memory or not: one that is not is gone through once, chunk by chunk."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from coupled_gmm.core import checks, chunks, foreign
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError


def points(name: str, x: Any, n_features: int, *others: Any) -> Any:
    """A checked cloud (n, d): as `checks.points` gives it, or one that is not in memory, which checks numbers as it reads them.

    Args:
      name: what errors call it.
      x: the cloud.
      n_features: that it must have.
      *others: what its points are to meet: under a transformation no file can be read.

    Raises:
      TypeError, ValueError: it is none, or one that is not in memory under a transformation.
    """
    if not foreign.is_open(x):
        return checks.points(name, x, n_features)
    if not checks.known(*others):
        taken = f"take points of it: {name}.rows(indices)"
        raise ArgumentTypeError(name, f"{x!r} can't be read under a transformation (jit, grad, vmap)", taken)
    if x.shape[1] != n_features:
        problem = f"expected shape (n, {n_features}), got {x.shape}"
        raise ArgumentError(name, problem, f"axis 1 must have size {n_features}: choose features with columns")
    return x


def values(function: Callable[[Any, int | None], Any], x: Any) -> Any:
    """A function of points (m, d) at all those of a cloud, in order: (n, ...), in memory whether the points are or not.

    Its second argument is the row of the first point, None where the points are the whole cloud.
    """
    if not foreign.is_open(x):
        return function(x, None)
    found, first = None, 0
    for part, _ in x.chunks():
        value = np.asarray(function(part, first))
        if found is None:
            found = chunks.zeros((len(x), *value.shape[1:]), value.dtype)
        found[first : (first := first + len(part))] = value
    return jax.device_put(found)


def rows(name: str, first: int | None, count: int) -> str:
    """What errors call so many rows of a cloud, None: all of it."""
    return name if first is None else f"{name}[{first}:{first + count}]"
