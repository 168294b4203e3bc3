r"""The price of transport in J: in its own unit, one over squared data units, or in none.

.. math:: \lambda = r / s^2, \quad s^2 = \text{mean over clouds and features of the variance within a cloud}

With a relative weight r a fit in metres and one in millimetres are the same.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.fits.frame import View


class Weight(NamedTuple):
    """A checked lambda, or several; or, where `relative`, these times the clouds' variance."""

    name: str
    value: Array
    relative: bool

    @classmethod
    def given(cls, transport: Any, relative: Any, plural: str = "") -> "Weight":
        """Of `transport_weight` and `relative_weight`, of which one is given.

        Raises:
          TypeError, ValueError: both or none are; it is no number, or below 0.
        """
        names = f"transport_weight{plural}", f"relative_weight{plural}"
        if transport is None and relative is None:
            raise ArgumentError(names[0], "is missing", f"pass {names[1]}, which has no unit (0.01, say), or this one")
        if transport is not None and relative is not None:
            raise ArgumentError(names[0], f"given beside {names[1]}, and both say the same", "keep one of them")
        name, value = (names[1], relative) if transport is None else (names[0], transport)
        return cls(name, checks.scalar(name, value, at_least=0, batched=True), transport is None)

    def of(self, view: View) -> Array:
        """lambda, per squared data unit.

        Raises:
          ValueError: the clouds have no variance, or so little or much that lambda is no number of their precision.
        """
        if not self.relative:
            return self.value
        variance = view.feature_variance
        if not checks.known(variance, self.value):
            return self.value / variance
        dtype, value = view.pooled.dtype, np.asarray(self.value, np.float64)
        with np.errstate(all="ignore"):
            absolute = value / np.float64(variance)
        if not variance > 0:
            raise ArgumentError(
                self.name, "every cloud is one point, without a variance that gives it a unit", "pass transport_weight"
            )
        limits = np.finfo(dtype)
        if np.any(absolute > limits.max) or np.any((value > 0) & (absolute < limits.tiny)):
            size = float(np.sqrt(variance))
            raise ArgumentError(
                self.name,
                f"features of standard deviation {size:.1e} make it a transport weight that {dtype} can't hold",
                f"divide the data by {size:.0e}",
            )
        return jnp.asarray(absolute, dtype)
