"""What a fit asks of clouds that are not in memory, before its program runs: their extremes, moments, some of their points.

Each is a pass by the cloud's own `reduce`, two where points are drawn by weights: functions go where points lie, chunk by chunk,
and what comes back does not grow with the points.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from coupled_gmm.core.errors import ArgumentError

_BLOCK = 2**14  # points whose float64 copies stay in cache


class Moments(NamedTuple):
    """Of points: their mass, means, centred second moments times the mass, and the extremes of all, those without mass too."""

    mass: Any
    mean: Float[np.ndarray, " d"]
    square: Float[np.ndarray, " d"]
    least: Float[np.ndarray, " d"]
    largest: Float[np.ndarray, " d"]


@dataclasses.dataclass(frozen=True, eq=False)
class External:
    """A cloud (n, d) that is not in memory, and what a pass has found of it."""

    cloud: Any  # it gives `chunks`, `rows` and `reduce`, as `data.sources.OpenCloud` does
    moments: Moments

    @classmethod
    def read(cls, name: str, cloud: Any) -> "External":
        """After the pass that also finds whatever is missing, infinite, or a negative weight.

        Raises:
          ValueError: such a value, with its place; weights whose sum is no number.
        """
        moments = Moments(*cloud.reduce(moments_of_chunk, combine=merged, threads=True))
        if not 0 < moments.mass < np.inf:
            raise ArgumentError(
                name, f"its weights sum to {moments.mass:.3g}", "give weights whose sum a float64 holds"
            )
        return cls(cloud, moments)

    @property
    def shape(self) -> tuple[int, int]:
        return self.cloud.shape

    @property
    def dtype(self) -> np.dtype:
        return self.cloud.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def most(self) -> int:
        """Points of a chunk as it is read."""
        return min(self.cloud.chunk_size, len(self))

    @property
    def extremes(self) -> tuple[Any, Any]:
        """The least and the largest value of each feature."""
        return self.moments.least, self.moments.largest

    @property
    def scales(self) -> tuple[Any, Any]:
        """Means and variances of features, in float64; a feature that is constant has a variance of exactly 0."""
        return self.moments.mean, self.moments.square / self.moments.mass


def all_of(x: External, w: None) -> tuple[np.ndarray, np.ndarray | None]:
    """All points of a cloud that is small, and their weights, which it has in itself."""
    blocks = list(x.cloud.chunks())
    weights = w if blocks[0][1] is None else np.concatenate([weights for _, weights in blocks])
    return np.concatenate([points for points, _ in blocks]), weights


def drawn(x: External, w: None, places: Float[np.ndarray, " m"]) -> np.ndarray:
    """The points (m, d) at some sorted places in [0, 1) of the mass, row after row."""
    del w
    first, masses, weighted = np.asarray(x.cloud.reduce(mass_of_chunk, combine=joined), np.float64).T
    if not weighted.any():
        return x.cloud.rows((places * len(x)).astype(np.int64))
    upto = np.cumsum(masses)
    before = np.stack([first, upto - masses, upto], axis=1)
    places = np.minimum(places * upto[-1], np.nextafter(upto[-1], 0))
    return np.asarray(x.cloud.reduce(drawn_of_chunk, before, places, combine=joined)).astype(x.dtype)


def moments_of_chunk(points: np.ndarray, weights: np.ndarray | None, first: int) -> Moments:
    """Of a chunk, wherever it lies."""
    del first
    parts = (slice(start, start + _BLOCK) for start in range(0, len(points), _BLOCK))
    return functools.reduce(merged, (_moments(points[at], None if weights is None else weights[at]) for at in parts))


def _moments(points: np.ndarray, weights: np.ndarray | None) -> Moments:
    columns = np.array(
        points.T, np.float64, order="C"
    )  # our own; rows of a few numbers NumPy reads twenty times slower
    w = np.ones(len(points)) if weights is None else weights.astype(np.float64)
    extremes, mass = (columns.min(axis=1), columns.max(axis=1)), w.sum()
    reference = columns[:, np.argmax(w > 0)].copy()  # a point with mass: what is constant is 0 from there
    columns -= reference[:, None]
    mean = columns @ w / mass if mass > 0 else np.zeros_like(reference)
    columns -= mean[:, None]
    return Moments(mass, reference + mean, np.square(columns, out=columns) @ w, *extremes)


def merged(one: Moments, other: Moments) -> Moments:
    """Of the points of both: Chan, Golub & LeVeque (1983)."""
    one, other = Moments(*one), Moments(*other)
    extremes = np.minimum(one.least, other.least), np.maximum(one.largest, other.largest)
    mass = one.mass + other.mass
    if not (one.mass > 0 and other.mass > 0):
        return Moments(*(one if one.mass > 0 else other)[:3], *extremes)
    part, apart = other.mass / mass, other.mean - one.mean
    square = one.square + other.square + apart**2 * one.mass * part
    return Moments(mass, one.mean + apart * part, square, *extremes)


def mass_of_chunk(points: np.ndarray, weights: np.ndarray | None, first: int) -> Float[np.ndarray, "1 3"]:
    """The number of its first row, its mass, and whether it has weights."""
    mass = len(points) if weights is None else weights.sum(dtype=np.float64)
    return np.array([[first, mass, weights is not None]], np.float64)


def drawn_of_chunk(
    points: np.ndarray,
    weights: np.ndarray | None,
    first: int,
    before: Float[np.ndarray, "C 3"],
    places: Float[np.ndarray, " m"],
) -> Float[np.ndarray, "k d"]:
    """Its points at places in the mass, of which chunks have their first row, and the mass before and up to their end."""
    _, start, stop = before[np.searchsorted(before[:, 0], first)]
    own = places[(places >= start) & (places < stop)] - start
    mass = np.ones(len(points)) if weights is None else weights.astype(np.float64)
    rows = np.searchsorted(np.cumsum(mass), own, side="right")
    return points[np.minimum(rows, np.flatnonzero(mass)[-1])] if own.size else points[:0]


def joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rows of both."""
    return np.concatenate([one, other])
