r"""All distances MW2 of a cohort of mixtures.

.. math:: D_{ij} = \min_{P \ge 0, P 1 = a_i, P^T 1 = a_j} \langle P, C_{ij} \rangle

Costs are those of all components of some mixtures with all of some others, whatever the sizes of the mixtures are: tiles of one
shape. Plans are vertices of linear programmes of few sizes, many side by side. Every value has its plan's certificate.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.batch import executors
from coupled_gmm.core import checks, matrices, report
from coupled_gmm.core.errors import ArgumentError, reason
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import FitError
from coupled_gmm.gaussians import bures
from coupled_gmm.gaussians.mixture import GaussianMixture, check_features, in_one_space
from coupled_gmm.transport import exact, limits

_TILE = 512  # components a side: costs of a megabyte in float32
_ROUND = 32  # what a tile's components are rounded up to
_SIDES = (2, 4, 8, 16, 32, 64)  # of the linear programmes that are compiled
_PLANS = 2**21  # numbers in the inverses of plans that are solved side by side
_FULL = 256  # plans, at most


class _Cohort(NamedTuple):
    """Mixtures one after the other, about one point and in a unit of their size: the components of all, and where each ends."""

    means: Float[np.ndarray, "N d"]
    covariances: Float[np.ndarray, "N d d"]
    weights: Float[np.ndarray, " N"]
    ends: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def part(self, first: int, last: int) -> "_Cohort":
        begin = self.ends[first - 1] if first else 0
        rows = slice(begin, self.ends[last - 1])
        return _Cohort(self.means[rows], self.covariances[rows], self.weights[rows], self.ends[first:last] - begin)

    def groups(self) -> list[tuple[int, int]]:
        """Mixtures from one number to before another: as few groups as tiles allow, evenly filled; a large mixture is alone."""
        sizes = self.sizes
        most = min(_TILE, len(self.means) / np.ceil(len(self.means) / _TILE) + sizes.max())
        groups, first, held = [], 0, 0
        for number, size in enumerate(sizes):
            if held and held + size > most:
                groups.append((first, number))
                first, held = number, 0
            held += size
        return [*groups, (first, len(sizes))]


def mw2_matrix(
    gmms: Sequence[GaussianMixture],
    others: Sequence[GaussianMixture] | None = None,
    *,
    progress: Any = False,
    executor: Any = None,
) -> Float[Array, "B Bo"]:
    r"""Squared distances MW2 between all mixtures of a list, or of two lists, exact, in squared data units.

    .. math:: D_{ij} = MW_2^2(p_i, p_j) = \min_{P \ge 0, P 1 = a_i, P^T 1 = a_j} \langle P, C_{ij} \rangle

    Each is what `mw2_squared` gives, with the certificate of its plan. Within one list the matrix is symmetric and its diagonal
    zero. It needs some 5 MB beside the mixtures and the matrix, however many they are.

    Args:
      gmms: B mixtures over the same features, of any numbers of components.
      others: None compares `gmms` with themselves; or B' mixtures over the same features.
      progress: True draws a bar; a callable gets a dict of what is ``done`` and ``of`` how many, in tiles of 512 components a side.
      executor: None works in this process; or a `concurrent.futures.Executor`, which gets tiles. One that it loses is done here,
        with a warning.

    Raises:
      TypeError, ValueError: not mixtures, features that disagree, traced mixtures, an empty list.
      FitError: a plan was not shown to be optimal; names the two mixtures.

    >>> gmms = [cg.GaussianMixture.from_moments([[x]], [[[1.0]]], [1.0]) for x in (0.0, 1.0, 3.0)]
    >>> print(cg.mw2_matrix(gmms).tolist())
    [[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]]
    """
    gmms = in_one_space("gmms", gmms)
    alone = others is None
    found = [] if others is None else in_one_space("others", others)
    for i, gmm in enumerate(found):
        check_features(f"others[{i}]", gmm, " and gmms[0] has", gmms[0].n_features)
    if not checks.known(gmms, found):
        raise ArgumentError("gmms", "are traced", "call it outside of jit, vmap and grad; there map over mw2_squared")
    executors.check(executor)
    cohorts, unit, dtype = _cohorts([gmms] if alone else [gmms, found])
    rows, columns = cohorts[0], cohorts[-1]
    places = [(a, b) for a, b in itertools.product(rows.groups(), columns.groups()) if not alone or a[0] <= b[0]]
    parts = [(rows.part(*a), columns.part(*b)) for a, b in places]
    side = -(-max(len(one.means) for pair in parts for one in pair) // _ROUND) * _ROUND  # one shape for all
    tasks = [(*pair, alone and a == b, side) for pair, (a, b) in zip(parts, places, strict=True)]
    squares = np.zeros((len(rows.ends), len(columns.ends)), dtype)
    for number, tile in _done(tasks, executor, progress):
        (first, last), (begin, end) = places[number]
        if (wrong := np.argwhere(~np.isfinite(tile))).size:
            i, j = wrong[0] + (first, begin)
            name = "gmms" if alone else "others"
            raise FitError(f"the plan from gmms[{i}] to {name}[{j}] was not shown to be optimal: enable float64")
        squares[first:last, begin:end] = tile
        if alone:
            squares[begin:end, first:last] = tile.T
    with np.errstate(over="ignore"):
        squares = (squares.astype(np.float64) * unit**2).astype(dtype)
    if not np.isfinite(squares).all():
        raise ArgumentError(
            "gmms", f"squared distances leave the range of {dtype}", "change the unit, or enable float64"
        )
    return jax.device_put(squares)


def _done(tasks: list[tuple], executor: Any, progress: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The number and distances of each tile; what an executor loses is done here."""
    with report.counting(progress, len(tasks), "comparing") as advance:
        for number, tile in executors.outcomes(_tile, tasks, executor):
            if isinstance(tile, Exception):
                warnings.warn(
                    f"executor: it lost a part of the work, which is done here ({reason(tile)})", stacklevel=3
                )
                tile = _tile(*tasks[number])
            yield number, tile
            advance()


def _cohorts(lists: list[list[GaussianMixture]]) -> tuple[list[_Cohort], float, np.dtype]:
    """Lists of mixtures in the same coordinates, by float64; their unit, a power of two; and the precision to work in."""
    read = [[_components(gmm) for gmm in some] for some in lists]
    means, covariances = (np.concatenate([gmm[i] for some in read for gmm in some]) for i in (0, 1))
    centre = means.mean(0)
    size = max(np.abs(means - centre).max(), covariances.max() ** 0.5)
    unit = 2.0 ** np.round(np.log2(size)) if size > 0 else 1.0
    dtype = np.dtype(jnp.result_type(*(gmm.dtype for some in lists for gmm in some)))

    def cohort(some: list[tuple[np.ndarray, ...]]) -> _Cohort:
        means, covariances, weights = (np.concatenate(arrays) for arrays in zip(*some, strict=True))
        arrays = (means - centre) / unit, covariances / unit / unit, weights
        means, covariances, weights = (array.astype(dtype) for array in arrays)
        return _Cohort(means, covariances, weights, np.cumsum([len(weights) for _, _, weights in some]))

    return [cohort(some) for some in read], float(unit), dtype


def _components(gmm: GaussianMixture) -> tuple[np.ndarray, ...]:
    """Means, covariances and weights in float64, without components that have no mass: nothing is carried to or from them."""
    gmm = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gmm)
    means = gmm.means if gmm.remainders is None else gmm.means + gmm.remainders
    return tuple(np.asarray(leaf)[np.asarray(gmm.weights) > 0] for leaf in (means, gmm.covariances, gmm.weights))


def _tile(rows: _Cohort, columns: _Cohort, alone: bool, side: int) -> np.ndarray:
    """Squared distances between two groups, each pair of one group once; NaN where a plan has no certificate."""
    costs = np.asarray(_costs(*_padded(rows, side), *_padded(columns, side)))[: len(rows.means), : len(columns.means)]
    squares = np.zeros((len(rows.ends), len(columns.ends)), costs.dtype)
    pairs = [(i, j) for i, j in np.ndindex(squares.shape) if not alone or i < j]
    sides = np.array([max(rows.sizes[i], columns.sizes[j]) for i, j in pairs], int)
    classes = np.searchsorted(_SIDES, sides)
    for index in np.unique(classes):
        some = [pair for pair, one in zip(pairs, classes, strict=True) if one == index]
        for (i, j), value in zip(some, _values(some, index, costs, rows, columns), strict=True):
            squares[i, j] = value
            if alone:
                squares[j, i] = value
    return squares


def _padded(cohort: _Cohort, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and covariances of so many components."""
    n, d = cohort.means.shape
    extra, eye = size - n, np.eye(d, dtype=cohort.means.dtype)
    means = np.concatenate([cohort.means, np.zeros((extra, d), cohort.means.dtype)])
    return means, np.concatenate([cohort.covariances, np.broadcast_to(eye, (extra, d, d))])


@program()
def _costs(means0: Array, covariances0: Array, means1: Array, covariances1: Array) -> Float[Array, "N0 N1"]:
    return bures.pairwise_cost(means0, matrices.cholesky(covariances0), means1, matrices.cholesky(covariances1))


def _values(
    pairs: list[tuple[int, int]], index: int, costs: np.ndarray, rows: _Cohort, columns: _Cohort
) -> Iterator[float]:
    """Of pairs of one class of sizes, in blocks of plans of one shape."""
    if index == len(_SIDES):
        for i, j in pairs:
            yield _certified(*_problem(i, j, costs, rows, columns))
        return
    side = _SIDES[index]
    block = min(_FULL, max(1, _PLANS // (4 * side * side)))
    for first in range(0, len(pairs), block):
        some = pairs[first : first + block]
        problems = [_problem(i, j, costs, rows, columns) for i, j in some]
        cost, a, b = _block(problems, block, side)
        values, optimal = map(np.asarray, _plans(cost, a, b))
        for value, good, problem in zip(values, optimal, problems, strict=False):
            yield value if good else _certified(*problem)


def _problem(i: int, j: int, costs: np.ndarray, rows: _Cohort, columns: _Cohort) -> tuple[np.ndarray, ...]:
    (r, c) = (slice(one.ends[n] - one.sizes[n], one.ends[n]) for one, n in ((rows, i), (columns, j)))
    return costs[r, c], rows.weights[r], columns.weights[c]


def _block(problems: list[tuple[np.ndarray, ...]], n: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Problems stacked, with components without mass up to one size, and with problems of one component up to one number."""
    dtype = problems[0][0].dtype
    cost, a, b = np.zeros((n, side, side), dtype), np.zeros((n, side), dtype), np.zeros((n, side), dtype)
    a[len(problems) :, 0] = b[len(problems) :, 0] = 1
    for each, (c, left, right) in enumerate(problems):
        cost[each, : len(left), : len(right)], a[each, : len(left)], b[each, : len(right)] = c, left, right
    return cost, a, b


@program()
def _plans(
    cost: Float[Array, "n k k"], a: Float[Array, "n k"], b: Float[Array, "n k"]
) -> tuple[Float[Array, " n"], Array]:
    """<P, C> of exact plans, and whether each was shown to be optimal."""
    solved, _ = jax.vmap(lambda cost, a, b: exact.solve(cost, a, b, limits.MAX_ITERATIONS["exact"]))(cost, a, b)
    return jnp.sum(solved.matrix * cost, axis=(1, 2)), solved.optimal


def _certified(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """<P, C> of one plan by the network simplex on the host; NaN where it is not shown to be optimal."""
    value, optimal = _on_host(cost, a, b)
    return float(value) if optimal else np.nan


@program()
def _on_host(cost: Array, a: Array, b: Array) -> tuple[Float[Array, ""], Array]:
    vertex = exact.solve_on_host(cost, a, b, limits.MAX_ITERATIONS["exact"])
    return jnp.sum(vertex.matrix * cost), vertex.optimal
