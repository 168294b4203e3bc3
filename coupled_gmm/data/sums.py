"""Sums over the chunks of a cloud, of whatever a function makes of each: in float64, with what rounding took kept beside them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from coupled_gmm.core.expansions import two_sum

Combine = Callable[[Any, Any], Any]


class Total:
    """The sum of trees of numbers, or what `combine` makes of them, one after the other."""

    def __init__(self, combine: Combine | None = None):
        self._combine = combine
        self._total: Any = None
        self._lost: Any = None

    def add(self, value: Any, lost: Any = None) -> None:
        """A value, and what an earlier total of it has lost."""
        value = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), value)
        if self._total is None:
            self._total, self._lost = value, jax.tree.map(np.zeros_like, value) if lost is None else lost
        elif self._combine is not None:
            self._total = self._combine(self._total, value)
        else:
            with np.errstate(all="ignore"):  # infinite sums stay what they are
                both = jax.tree.map(two_sum, self._total, value)
                self._total, errors = jax.tree.transpose(jax.tree.structure(value), jax.tree.structure((0, 0)), both)
                for more in (errors,) if lost is None else (errors, lost):
                    self._lost = jax.tree.map(_plus_finite, self._lost, more)

    @property
    def parts(self) -> tuple[Any, Any]:
        """The sum so far, and what rounding has taken from it: together they don't depend on who added first."""
        return self._total, self._lost

    @property
    def value(self) -> Any:
        """The sum: None of nothing."""
        if self._total is None or self._combine is not None:
            return self._total
        return jax.tree.map(np.add, self._total, self._lost)


def _plus_finite(lost: np.ndarray, error: np.ndarray) -> np.ndarray:
    return lost + np.where(np.isfinite(error), error, 0.0)
