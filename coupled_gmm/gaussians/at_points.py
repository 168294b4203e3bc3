"""A mixture at the points of a cloud, in memory or not: densities, and how well it explains them all.

Points meet the mixture in its own precision, about a point near both. A cloud that is not in memory is gone through chunk by chunk.
The mean over it needs no array of as many numbers, and of a Dask array nothing but sums travels. `gmm` is always a
`GaussianMixture`, whose methods these are.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks, chunks, foreign, matrices, passes
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import AnyArray
from coupled_gmm.gaussians.covariances import rounding_errors
from coupled_gmm.gaussians.density import densities

_MOST_ROUNDING = 0.03  # nats, of a log-density
_MOST_WEIGHT = 1e290  # times log-densities it is still a number


class Score(NamedTuple):
    """The mean log-density of points, and of how many."""

    mean: Any
    count: Any


@matrices.precise
def density(gmm: Any, x: Any, what: str, values: Any = None) -> Array:
    """Something of each point's density, as `density.densities` computes it."""
    return passes.values(lambda points, first: _of_part(gmm, points, first, what, values), _checked(gmm, x))


@matrices.precise
def score(gmm: Any, x: Any) -> Score:
    """Of points (n, d), in float64 where they are known; where they have weights the weighted mean, of those above zero."""
    if not foreign.is_open(x):
        return Score(chunks.mean(density(gmm, x, "mixture")), len(x))
    x, x64 = _checked(gmm, x), np.asarray(jax.config.read("jax_enable_x64"))
    total, mass, count = x.reduce(log_prob_sums, jax.tree.map(np.asarray, gmm), x64)
    if not mass < _MOST_WEIGHT:
        raise ArgumentError("x", f"its weights sum to {mass:.3g}, too much for float64", "divide them by the largest")
    return Score(total / mass, count)


def log_prob_sums(
    points: np.ndarray, weights: np.ndarray | None, first: int, gmm: Any, x64: np.ndarray
) -> tuple[Any, Any, Any]:
    """Of a chunk, wherever it lies: the weighted sum of log-densities, that of the weights, and how many are above zero."""
    with jax.enable_x64(bool(x64)):  # which threads and processes don't take over from each other
        log_prob = np.asarray(_of_part(gmm, points, first, "mixture"), np.float64)
    if weights is None:
        return log_prob.sum(), np.float64(len(points)), np.float64(len(points))
    there = weights > 0
    with np.errstate(over="ignore"):  # is refused, of all chunks together
        return weights[there] @ log_prob[there], weights.sum(dtype=np.float64), np.float64(there.sum())


def seen(
    gmm: Any, x: Any, name: str = "x", whole: bool = True
) -> tuple[Float[AnyArray, "n d"], Float[AnyArray, "K d"]]:
    """Points (the whole cloud, or some of it) and means in the mixture's precision, about a common point where that says more.

    It does where points are given in more digits than the mixture has, and where means have remainders.
    """
    on_host = checks.at_hand(x, gmm.means, gmm.weights, gmm.remainders)
    x = np.asarray(x) if on_host else x
    finer = on_host and x.dtype.itemsize > gmm.means.dtype.itemsize
    if not finer and gmm.remainders is None:
        return checks.representable(name, x, gmm.dtype, whole), gmm.means
    kept: Any = gmm.means, gmm.weights, gmm.remainders
    means, weights, remainders = jax.tree.map(np.asarray, kept) if on_host else kept
    centre = means[weights.argmax()]
    means = means - centre if remainders is None else means - centre + remainders
    x = x - np.asarray(centre, x.dtype if finer else gmm.dtype) if on_host else x.astype(gmm.dtype) - centre
    return checks.representable(name, x, gmm.dtype, whole), means


def warn_of_rounding(gmm: Any) -> None:
    """Say where covariances, as this precision rounds them, do not tell log-densities to two digits."""
    if checks.known(gmm):
        errors = rounding_errors(np.asarray(gmm.covariances)) * (np.asarray(gmm.weights) > 0)
        if (errors > _MOST_ROUNDING).any():
            k = int(errors.argmax())
            warnings.warn(
                f"component {k} is so thin in some direction that its log-densities are off by some {errors[k]:.1g} in "
                f"{gmm.dtype}; enable float64, or raise ridge",
                stacklevel=4,
            )


def _checked(gmm: Any, x: Any) -> Any:
    """Points that have densities."""
    checks.held("gmm", gmm)
    x = passes.points("x", x, gmm.n_features, gmm)
    gmm.check_densities()
    warn_of_rounding(gmm)
    return x


def _of_part(gmm: Any, x: Any, first: int | None, what: str, values: Any = None) -> Array:
    """As `density`, of checked points from row `first` on; None: of a whole cloud."""
    x, means = seen(gmm, x, passes.rows("x", first, len(x)), whole=first is None)
    numbers = gmm.n_components * gmm.n_features
    parameters = means, gmm.covariances, gmm.weights
    return chunks.over_points(_densities(what), x, numbers, parameters, values)


@functools.cache
def _densities(what: str) -> Callable[..., Array]:
    """The same object for the same thing: by that `chunks.over_points` knows its programs."""
    return functools.partial(densities, what=what)
