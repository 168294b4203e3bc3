"""Squared distances between two groups of mixtures: costs of all components with all, and the plans between the mixtures.

Costs are one program for all tiles. Plans are vertices of linear programmes: in float32 on a CPU by POT's network simplex, where it
is installed, with one certificate for all of a tile, in float64; otherwise, and where that certifies none, in XLA, many of a size
side by side.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import expansions, installation, matrices
from coupled_gmm.core.expansions import Words
from coupled_gmm.core.programs import program
from coupled_gmm.gaussians import bures
from coupled_gmm.transport import exact, limits, network_simplex

_TILE = 512  # components a side: costs of a megabyte in float32
_SIDES = (2, 4, 8, 16, 32, 64)  # of the linear programmes that are compiled
_PLANS = 2**21  # numbers in the inverses of plans that are solved side by side
_FULL = 256  # plans, at most
_GAP = 64  # a duality gap of so many rounding units of the value is none, as in `exact`


class Cohort(NamedTuple):
    """Mixtures one after the other, about one point and in a unit of their size: the components of all, and where each ends."""

    means: Float[np.ndarray, "N d"]  # in float64
    covariances: Float[np.ndarray, "N d d"]
    weights: Float[np.ndarray, " N"]
    ends: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    @property
    def begins(self) -> np.ndarray:
        return self.ends - self.sizes

    @property
    def shares(self) -> Float[np.ndarray, " N"]:
        """Weights as parts of their mixture's, in float64."""
        weights = self.weights.astype(np.float64)
        return weights / np.repeat(np.add.reduceat(weights, self.begins), self.sizes)

    def rows(self, number: int) -> slice:
        return slice(self.begins[number], self.ends[number])

    def part(self, first: int, last: int) -> "Cohort":
        begin = self.ends[first - 1] if first else 0
        rows = slice(begin, self.ends[last - 1])
        return Cohort(self.means[rows], self.covariances[rows], self.weights[rows], self.ends[first:last] - begin)

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


def compile_for(rows: Cohort, columns: Cohort, side: int) -> None:
    """What tiles of two cohorts share is compiled and imported, by calls for nothing: of several threads each would do it."""
    dtype = rows.covariances.dtype
    nothing = _padded(rows._replace(means=rows.means[:0], covariances=rows.covariances[:0]), side)
    jax.block_until_ready(_costs(*nothing, *nothing))
    if _pot_is_better(dtype):
        _pot()
        return
    point = np.zeros((1, 1), dtype), np.ones(1, dtype), np.ones(1, dtype)
    for index in np.unique(np.searchsorted(_SIDES, [*rows.sizes, *columns.sizes])):
        if index < len(_SIDES):
            jax.block_until_ready(_plans(*_block([point], _block_size(index), _SIDES[index])))


def tile(rows: Cohort, columns: Cohort, alone: bool, side: int) -> np.ndarray:
    """Squared distances between two groups, each pair of one group once; NaN where a plan has no certificate."""
    costs = np.asarray(_costs(*_padded(rows, side), *_padded(columns, side)))[: len(rows.means), : len(columns.means)]
    squares = np.zeros((len(rows.ends), len(columns.ends)), costs.dtype)
    pairs = [(i, j) for i, j in np.ndindex(squares.shape) if not alone or i < j]
    if _pot_is_better(costs.dtype):
        values, shown = _by_pot(pairs, costs, rows, columns)
        squares[shown] = values[shown]
        pairs = [pair for pair in pairs if not shown[pair]]
    sides = np.array([max(rows.sizes[i], columns.sizes[j]) for i, j in pairs], int)
    classes = np.searchsorted(_SIDES, sides)
    for index in np.unique(classes):
        some = [pair for pair, one in zip(pairs, classes, strict=True) if one == index]
        for pair, value in zip(some, _values(some, index, costs, rows, columns), strict=True):
            squares[pair] = value
    return squares + squares.T if alone else squares


def _pot_is_better(dtype: np.dtype) -> bool:
    """Whether POT's simplex is to go first: it takes a third of the time of XLA's on a CPU, and its potentials, in float64, show a
    plan to be optimal to float32's rounding, but seldom to their own."""
    return jax.default_backend() == "cpu" and dtype == np.float32 and importlib.util.find_spec("ot") is not None


def _pot() -> Any:
    with installation.needed("pot", "mw2_matrix"):
        import ot  # slow to import, and only needed here
    return ot


def _by_pot(
    pairs: list[tuple[int, int]], costs: np.ndarray, rows: Cohort, columns: Cohort
) -> tuple[np.ndarray, np.ndarray]:
    r"""<P, C> of all pairs of a tile, by POT's network simplex, and which of them were shown to be optimal.

    With potentials f and g and reduced costs r = C - f - g no plan is cheaper by more than

    .. math:: \sum_{ij} P_{ij} r^+_{ij} + \sum_i a_i \max_j r^-_{ij} + \max C \, (|P 1 - a|_1 + |P^T 1 - b|_1)
    """
    emd, cost = _pot().emd, costs.astype(np.float64)
    (n0, n1), (k0, k1) = (len(rows.ends), len(columns.ends)), cost.shape
    a, b = rows.shares, columns.shares
    largest = _blocks(np.maximum, cost, rows, columns)
    unit = np.where(largest > 0, largest, 1)  # POT's tolerances are absolute
    plans, f, g, done = np.zeros((k0, k1)), np.zeros((k0, n1)), np.zeros((n0, k1)), np.zeros((n0, n1), bool)
    for i, j in pairs:
        r, c = rows.rows(i), columns.rows(j)
        steps = limits.MAX_ITERATIONS["exact"]
        plan, log = emd(a[r], b[c], cost[r, c] / unit[i, j], steps, log=True, center_dual=False, check_marginals=False)
        plans[r, c], f[r, j], g[i, c] = plan, unit[i, j] * log["u"], unit[i, j] * log["v"]
        done[i, j] = log["result_code"] == 1  # ot.lp's code of an optimal solution
    high, rest0 = expansions.two_sum(cost, -np.repeat(f, columns.sizes, axis=1))
    high, rest1 = expansions.two_sum(high, -np.repeat(g, rows.sizes, axis=0))
    reduced = high + (rest0 + rest1)
    gap = _blocks(np.add, plans * reduced.clip(min=0), rows, columns)
    infeasible = np.maximum.reduceat((-reduced).clip(min=0), columns.begins, axis=1)
    gap += np.add.reduceat(a[:, None] * infeasible, rows.begins, axis=0)
    missed = abs(np.add.reduceat(plans, columns.begins, axis=1) - a[:, None])
    gap += largest * np.add.reduceat(missed, rows.begins, axis=0)
    missed = abs(np.add.reduceat(plans, rows.begins, axis=0) - b)
    gap += largest * np.add.reduceat(missed, columns.begins, axis=1)
    values = _blocks(np.add, plans * cost, rows, columns)
    return values, done & (gap <= _GAP * float(np.finfo(costs.dtype).eps) * values)


def _blocks(ufunc: np.ufunc, matrix: np.ndarray, rows: Cohort, columns: Cohort) -> np.ndarray:
    """A sum, or the like, over each block of two mixtures' components."""
    return ufunc.reduceat(ufunc.reduceat(matrix, columns.begins, axis=1), rows.begins, axis=0)


def _padded(cohort: Cohort, size: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Means, in two floats, and covariances of so many components."""
    dtype, (n, d) = cohort.covariances.dtype, cohort.means.shape
    means = np.concatenate([cohort.means, np.zeros((size - n, d))])
    high = means.astype(dtype)
    rest = np.broadcast_to(np.eye(d, dtype=dtype), (size - n, d, d))
    return (high, (means - high).astype(dtype)), np.concatenate([cohort.covariances, rest])


@program()
def _costs(means0: Words, covariances0: Array, means1: Words, covariances1: Array) -> Float[Array, "N0 N1"]:
    """Of mixtures far apart and near each other: differences of means in two floats."""
    high, low = (x[:, None] - y for x, y in zip(means0, means1, strict=True))
    factors, nowhere = [matrices.cholesky(covariances) for covariances in (covariances0, covariances1)], means0[0] * 0
    return jnp.sum((high + low) ** 2, axis=-1) + bures.pairwise_cost(nowhere, factors[0], nowhere, factors[1])


def _values(
    pairs: list[tuple[int, int]], index: int, costs: np.ndarray, rows: Cohort, columns: Cohort
) -> Iterator[float]:
    """Of pairs of one class of sizes, in blocks of plans of one shape."""
    if index == len(_SIDES):
        for i, j in pairs:
            yield _certified(*_problem(i, j, costs, rows, columns))
        return
    side = _SIDES[index]
    block = _block_size(index)
    for first in range(0, len(pairs), block):
        some = pairs[first : first + block]
        problems = [_problem(i, j, costs, rows, columns) for i, j in some]
        cost, a, b = _block(problems, block, side)
        values, optimal = map(np.asarray, _plans(cost, a, b))
        for value, good, problem in zip(values, optimal, problems, strict=False):
            yield value if good else _certified(*problem)


def _block_size(index: int) -> int:
    """Plans that are solved side by side."""
    return min(_FULL, max(1, _PLANS // (4 * _SIDES[index] ** 2)))


def _problem(i: int, j: int, costs: np.ndarray, rows: Cohort, columns: Cohort) -> tuple[np.ndarray, ...]:
    r, c = rows.rows(i), columns.rows(j)
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
    vertex = network_simplex.solve(cost, a, b, limits.MAX_ITERATIONS["exact"])
    return jnp.sum(vertex.matrix * cost), vertex.optimal
