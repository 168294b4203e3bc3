"""Problems in parts of a batch: which share a program, and how their points and mixtures lie in one shape.

A part's clouds lie one after the other in one buffer of chunks, and each problem knows where its own are. Mixtures are padded to
the largest of their part with components of weight zero.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from coupled_gmm.batch import executors, lanes
from coupled_gmm.core import checks, chunks, meshes
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import unchecked
from coupled_gmm.fits.frame import Frame, View
from coupled_gmm.fits.online import Update
from coupled_gmm.fits.request import GivenCloud
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport import solvers

_ALIKE = 3  # times the components of another: mixtures of no larger ratio are padded to one size
_CPU_MOST, _GPU_MOST = 64, 2**12  # problems of a part
_CPU_FLOATS, _GPU_FLOATS = 2**25, 2**29  # numbers in the clouds of a part, or one problem


class Problem(NamedTuple):
    """One of a part, as its program takes it; its points lie in the part's buffer."""

    start: tuple  # what its graph is made of; mixtures are padded
    ends: Any
    first: Any
    frame: Frame
    variances: Any
    pooled: Any
    update: Update | None


class Part(NamedTuple):
    """Problems, stacked, of which the first `count` are asked for, and the points of all."""

    problems: Problem
    count: Any
    points: Any  # (C, d, B), in chunks
    weights: Any


@dataclasses.dataclass(frozen=True)
class Given:
    """What was asked for of one problem, checked."""

    number: int
    start: tuple  # of NumPy's arrays
    view: View
    solver: solvers.PlanSolver

    @functools.cached_property
    def gmms(self) -> list[GaussianMixture]:
        return [leaf for leaf in jax.tree.leaves(self.start, is_leaf=_is_mixture) if _is_mixture(leaf)]

    @functools.cached_property
    def size(self) -> int:
        return max(gmm.n_components for gmm in self.gmms)

    @functools.cached_property
    def n_points(self) -> int:
        return sum(map(len, self.view.clouds))

    @functools.cached_property
    def kind(self) -> tuple:
        """What problems of one program share, but for their sizes."""
        tree, gmm = jax.tree.structure(self.start), self.gmms[0]
        others = [np.shape(leaf) for leaf in jax.tree.leaves(over_mixtures(lambda gmm: None, self.start))]
        return tree, *others, gmm.dtype, gmm.n_features, self.view.far, self.solver


def at_least_one(name: str, clouds: Any) -> list:
    """A list of one cloud at least."""
    clouds = checks.sequence(name, clouds)
    if not clouds:
        raise ArgumentError(name, "the list is empty", "give at least one cloud")
    return clouds


def one_each(name: str, values: Any, n: int, clouds: str, alone: Any = None) -> list:
    """One for each of n clouds; one of a kind that may stand alone is for all."""
    if alone is not None and isinstance(values, alone):
        return [values] * n
    values = checks.sequence(name, values)
    if len(values) != n:
        raise ArgumentError(name, f"expected one for each of the {n} clouds of {clouds}, got {len(values)}")
    return values


def check_known(name: str, single: str, *values: Any) -> None:
    if not checks.known(values):
        raise ArgumentError(name, "arguments are traced", f"call it outside of jit; there map over {single}")


def over_mixtures(function: Callable[[Any], Any], start: Any) -> Any:
    """What a problem starts from, after a function of each mixture in it."""
    return jax.tree.map(lambda leaf: function(leaf) if _is_mixture(leaf) else leaf, start, is_leaf=_is_mixture)


def _is_mixture(leaf: Any) -> bool:
    return isinstance(leaf, GaussianMixture)


def check_whole(view: View, clouds: list[GivenCloud], single: str) -> None:
    """Refuse a cloud that lies on several devices."""
    for cloud, x in zip(clouds, view.clouds, strict=True):
        if meshes.is_spread(x):
            problem = "lies on several devices, and a batch keeps clouds whole"
            raise ArgumentError(cloud.name, problem, f"{single} takes it")


def alike(given: list[Given]) -> list[list[Given]]:
    """Problems that share a program: of one kind, and of mixtures that are padded to the largest of them."""
    kinds: dict[tuple, list[Given]] = {}
    for one in given:
        kinds.setdefault(one.kind, []).append(one)
    groups: list[list[Given]] = []
    for some in kinds.values():
        for one in sorted(some, key=lambda one: -one.size):
            if groups and groups[-1][0].kind == one.kind and groups[-1][0].size <= _ALIKE * one.size:
                groups[-1].append(one)
            else:
                groups.append([one])
    return groups


def parts(some: list[Given], chunk_size: int | None, executor: Any) -> list[tuple[Part, list[int]]]:
    """Problems of one program in parts of like work and one shape, and which they are."""
    size, d = some[0].size, len(some[0].view.pooled)
    lengths = [len(x) for one in some for x in one.view.clouds]
    length = chunks.length(lengths, size * d, chunk_size, at_once=lanes.lanes_for(len(some)))
    floats = sum(one.n_points for one in some) * d
    workers = 1 if executor is not None else executors.threads()
    most, most_floats = (_CPU_MOST, _CPU_FLOATS) if jax.default_backend() == "cpu" else (_GPU_MOST, _GPU_FLOATS)
    n = max(min(workers, len(some)), -(-len(some) // most), -(-floats // most_floats))
    ordered = sorted(some, key=lambda one: -one.n_points)  # the largest first: small ones fill what is left at the end
    dealt = [ordered[i::n] for i in range(n) if ordered[i::n]]
    total = chunks.capacity(max(sum(-(-len(x) // length) for one in part for x in one.view.clouds) for part in dealt))
    room = 2 ** (max(map(len, dealt)) - 1).bit_length()
    return [(_part(part, size, length, total, room), [one.number for one in part]) for part in dealt]


def _part(some: list[Given], size: int, length: int, total: int, room: int) -> Part:
    """Clouds one after the other in a buffer, and problems that know where theirs lie."""
    d, dtype = len(some[0].view.pooled), some[0].gmms[0].dtype
    points, shares = chunks.zeros((total, d, length), dtype), chunks.zeros((total, length), dtype)
    problems, last = [], 0
    for one in some:
        first, ends = last, []
        place = jax.tree.map(np.asarray, one.view.frame)
        for x, w in zip(one.view.clouds, one.view.weights, strict=True):
            begin, last = last, last + -(-len(x) // length)
            chunks.lay(points[begin:last], shares[begin:last], np.asarray(x), w, place.points_on_host)
            ends.append(last)
        start = over_mixtures(lambda gmm: padded(gmm, size), one.start)
        seen = (np.asarray(one.view.variances), np.asarray(one.view.pooled))
        where = np.array(ends, np.int32), np.int32(first)
        problems.append(Problem(start, *where, place, *seen, one.view.update))
    problems += [problems[-1]] * (room - len(problems))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *problems)
    return Part(stacked, np.int32(len(some)), points, shares)


def padded(gmm: GaussianMixture, size: int) -> GaussianMixture:
    """As `gaussians.mixture.padded`, of any stack, by NumPy: a program for each size would cost more than the fit."""
    *lead, k = gmm.weights.shape
    extra, d, axis = size - k, gmm.n_features, len(lead)
    if not extra:
        return gmm

    def more(leaf: Any, fill: Any) -> np.ndarray:
        added = np.broadcast_to(np.asarray(fill, leaf.dtype), (*lead, extra, *leaf.shape[axis + 1 :]))
        return np.concatenate([leaf, added], axis=axis)

    return unchecked(
        GaussianMixture,
        means=more(gmm.means, 0),
        covariances=more(gmm.covariances, np.eye(d)),
        weights=more(gmm.weights, 0),
        remainders=None if gmm.remainders is None else more(gmm.remainders, 0),
    )
