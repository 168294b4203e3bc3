"""Pairs of clouds in parts of a batch: which share a program, and how their points and mixtures lie in one shape.

A part's clouds lie one after the other in one buffer of chunks, and each pair knows where its own are. Mixtures are padded to the
largest of their part with components of weight zero.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from coupled_gmm.batch import lanes
from coupled_gmm.core import checks, chunks, host, meshes
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import unchecked
from coupled_gmm.fits.frame import Frame, View
from coupled_gmm.fits.pairs import check_densities
from coupled_gmm.fits.request import GivenCloud, view_of
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport import solvers
from coupled_gmm.transport.pair import GaussianMixturePair, stated

_ALIKE = 3  # times the components of another: mixtures of no larger ratio are padded to one size
_CPU_MOST, _GPU_MOST = 64, 2**12  # pairs of a part
_CPU_FLOATS, _GPU_FLOATS = 2**25, 2**29  # numbers in the clouds of a part, or one pair


class Problem(NamedTuple):
    """A pair of a part, as its program takes it; its points lie in the part's buffer."""

    pair: GaussianMixturePair  # padded
    transport_weight: Any
    ends: Any
    first: Any
    frame: Frame
    variances: Any
    pooled: Any


class Part(NamedTuple):
    """Problems, stacked, of which the first `count` are asked for, and the points of all."""

    problems: Problem
    count: Any
    points: Any  # (C, d, B), in chunks
    weights: Any


class Given(NamedTuple):
    """What was asked for of one pair, checked."""

    number: int
    pair: GaussianMixturePair  # of NumPy's arrays
    transport_weight: np.ndarray
    view: View
    solver: solvers.PlanSolver

    @property
    def size(self) -> int:
        return max(self.pair.gmm0.n_components, self.pair.gmm1.n_components)

    @property
    def n_points(self) -> int:
        return sum(map(len, self.view.clouds))

    @property
    def kind(self) -> tuple:
        """What pairs of one program share, but for their sizes."""
        leaves, tree = jax.tree.flatten(self.pair)
        return tree, leaves[0].dtype, self.pair.n_features, self.pair.rho.shape, self.view.far, self.solver


def checked(
    clouds0: Any, clouds1: Any, pairs: Any, weight: Any, weights: tuple, frozen: np.ndarray, ridge: Any, method: str
) -> list[Given]:
    """Every pair with its clouds, in the frame that its fit sees them in."""
    clouds = [checks.sequence(name, some) for name, some in (("clouds0", clouds0), ("clouds1", clouds1))]
    n = len(clouds[0])
    if not n:
        raise ArgumentError("clouds0", "the list is empty", "give at least one cloud")
    pairs = [pairs] * n if isinstance(pairs, GaussianMixturePair) else checks.sequence("pairs", pairs)
    lists = [
        [None] * n if some is None else checks.sequence(f"point_weights{i}", some) for i, some in enumerate(weights)
    ]
    named = {"clouds1": clouds[1], "pairs": pairs, "point_weights0": lists[0], "point_weights1": lists[1]}
    for name, some in named.items():
        if len(some) != n:
            raise ArgumentError(name, f"expected one for each of the {n} clouds of clouds0, got {len(some)}")
    weight = np.asarray(checks.scalar("transport_weight", weight, at_least=0, batched=True))
    if weight.shape not in ((), (n,)):
        raise ArgumentError("transport_weight", f"expected one number or ({n},), got shape {weight.shape}")
    for i, pair in enumerate(pairs):
        checks.instance(f"pairs[{i}]", pair, GaussianMixturePair)
    if not checks.known(pairs, clouds, lists, weight):
        raise ArgumentError("clouds0", "arguments are traced", "call it outside of jit; there map over fit_pair")
    pairs = jax.device_get(pairs)  # at once: an accelerator would be waited for at every leaf
    given = []
    for i, (pair, *cloud, w0, w1) in enumerate(zip(pairs, *clouds, *lists, strict=True)):
        check_densities(f"pairs[{i}]", pair, frozen, ridge)
        seen = [
            GivenCloud(f"clouds{side}[{i}]", x, f"point_weights{side}[{i}]", w)
            for side, (x, w) in enumerate(zip(cloud, (w0, w1), strict=True))
        ]
        for one in seen:
            if meshes.is_spread(one.points):
                raise ArgumentError(
                    one.name, "lies on several devices, and a batch keeps each cloud in memory", "take fit_pair"
                )
        view = view_of(seen, [pair.gmm0, pair.gmm1], ridge)
        solver = solvers.solver_for(method, pair)
        given.append(Given(i, stated(pair, balanced=False), np.broadcast_to(weight, n)[i], view, solver))
    return given


def alike(given: list[Given]) -> list[list[Given]]:
    """Pairs that share a program: of one kind, and of mixtures that are padded to the largest of them."""
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
    """Pairs of one program in parts of like work and one shape, and which pairs they are."""
    size, d = some[0].size, some[0].pair.n_features
    lengths = [len(x) for one in some for x in one.view.clouds]
    length = chunks.length(lengths, size * d, chunk_size, at_once=lanes.lanes_for(len(some)))
    floats = sum(one.n_points for one in some) * d
    workers = 1 if executor is not None else threads()
    most, most_floats = (_CPU_MOST, _CPU_FLOATS) if jax.default_backend() == "cpu" else (_GPU_MOST, _GPU_FLOATS)
    n = max(min(workers, len(some)), -(-len(some) // most), -(-floats // most_floats))
    ordered = sorted(some, key=lambda one: -one.n_points)  # the largest first: small ones fill what is left at the end
    dealt = [ordered[i::n] for i in range(n) if ordered[i::n]]
    total = chunks.capacity(max(sum(-(-len(x) // length) for one in part for x in one.view.clouds) for part in dealt))
    room = 2 ** (max(map(len, dealt)) - 1).bit_length()
    return [(_part(part, size, length, total, room), [one.number for one in part]) for part in dealt]


def threads() -> int:
    """Programs at once: one for each core, and one on an accelerator."""
    return host.n_cores() if jax.default_backend() == "cpu" else 1


def _part(some: list[Given], size: int, length: int, total: int, room: int) -> Part:
    """Clouds one after the other in a buffer, and problems that know where theirs lie."""
    d, dtype = some[0].pair.n_features, some[0].pair.gmm0.dtype
    points, shares = chunks.zeros((total, d, length), dtype), chunks.zeros((total, length), dtype)
    problems, last = [], 0
    for one in some:
        first, ends = last, []
        place = jax.tree.map(np.asarray, one.view.frame)
        for x, w in zip(one.view.clouds, one.view.weights, strict=True):
            begin, last = last, last + -(-len(x) // length)
            chunks.lay(points[begin:last], shares[begin:last], np.asarray(x), w, place.points_on_host)
            ends.append(last)
        pair = one.pair.replace(*(_padded(gmm, size) for gmm in (one.pair.gmm0, one.pair.gmm1)))
        seen = (np.asarray(one.view.variances), np.asarray(one.view.pooled))
        where = np.array(ends, np.int32), np.int32(first)
        problems.append(Problem(pair, one.transport_weight.astype(dtype), *where, place, *seen))
    problems += [problems[-1]] * (room - len(problems))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *problems)
    return Part(stacked, np.int32(len(some)), points, shares)


def _padded(gmm: GaussianMixture, size: int) -> GaussianMixture:
    """As `gaussians.mixture.padded`, by NumPy: a program for each size would cost more than the fit."""
    extra, d = size - gmm.n_components, gmm.n_features

    def more(leaf: Any, fill: Any) -> np.ndarray:
        return np.concatenate([leaf, np.broadcast_to(np.asarray(fill, leaf.dtype), (extra, *leaf.shape[1:]))])

    return unchecked(
        GaussianMixture,
        means=more(gmm.means, 0),
        covariances=more(gmm.covariances, np.eye(d)),
        weights=more(gmm.weights, 0),
        remainders=None if gmm.remainders is None else more(gmm.remainders, 0),
    )
