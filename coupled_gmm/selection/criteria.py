"""What each cloud says: how many components fits apart should have, and what coupling has cost them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from coupled_gmm.fits.fidelity import MOST_LOST
from coupled_gmm.fits.frame import View
from coupled_gmm.gaussians.mixture import n_free
from coupled_gmm.selection.grid import Grid
from coupled_gmm.selection.paths import Path

_ROUNDING = 1e-5  # nats, of a mean log-likelihood in float32


class Fitted(NamedTuple):
    """Mixtures of one size along some weights, each fitted to a cloud of n points by choosing p numbers."""

    n_points: Int[np.ndarray, " V"]  # of positive weight; 0 where there is no cloud
    n_parameters: Int[np.ndarray, " V"]
    apart: Float[np.ndarray, " V"]  # mean log-likelihoods at weight 0
    lost: Float[np.ndarray, "W V"]  # nats per held-out point that coupling has cost, at each weight

    @classmethod
    def of(
        cls, view: View, sizes: Sequence[int], grid: Grid, path: Path, held_out: Float[np.ndarray, "W V"]
    ) -> "Fitted":
        """From the path of fits to all points, and the mean log-densities of what was held out from others."""
        d, frozen, apart = len(view.pooled), np.asarray(grid.graph.frozen), grid.relative_weights.index(0.0)
        counts = np.array([_count(x, w) for x, w in zip(view.clouds, view.weights, strict=True)])
        free = np.where(frozen, 0, n_free(np.asarray(sizes), d))
        likelihood = np.where(counts > 0, np.asarray(path.log_likelihoods, np.float64)[apart], 0)
        good = np.isfinite(held_out) & np.isfinite(held_out[apart])
        lost = np.where(good, held_out[apart], np.inf) - np.where(good, held_out, 0)
        return cls(counts, free, likelihood, lost)

    def dear(self) -> Bool[np.ndarray, " W"]:
        """Whether coupling has cost a cloud more than chance costs fits apart, or than a mixture of its cloud can lose.

        2 n times what fitted parameters lose against the true ones is about chi-squared of p degrees (Wilks 1938): p on average.
        """
        by_chance = self.n_parameters / (2 * np.maximum(self.n_points, 1))
        return np.any(self.lost > np.minimum(by_chance, MOST_LOST) + _ROUNDING, axis=1)

    def bic(self) -> float:
        """Of the fits apart, summed over clouds: of two the one with the lower is preferred."""
        return float(np.sum(self.n_parameters * np.log(np.maximum(self.n_points, 1)) + self._deviances()))

    def aic(self) -> float:
        """The same with another price for a parameter."""
        return float(np.sum(np.where(self.n_points > 0, 2 * self.n_parameters, 0) + self._deviances()))

    def _deviances(self) -> Float[np.ndarray, " V"]:
        return -2 * self.n_points * self.apart


def _count(x: Any, weights: Any) -> int:
    if x is None:
        return 0
    return len(x) if weights is None else int(np.sum(np.asarray(weights) > 0))
