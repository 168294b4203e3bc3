r"""Exact balanced transport between small discrete measures: the simplex method, inside XLA.

The linear programme, for a cost C and masses a, b of the same sum:

.. math:: \min_{P \ge 0} \langle P, C \rangle, \qquad P 1 = a, \quad P^T 1 = b .

A vertex of it is a spanning tree of K0 + K1 - 1 cells. The inverse of the tree's incidence matrix holds nothing but 0, 1 and -1
(the matrix is totally unimodular), so it is kept dense, a pivot is one rank-one update, and no pivot ever rounds. Masses are
counted in whole units of the precision, so flows, ties and their resolution are exact too: ties fall to a second set of
masses, infinitely small ones under which no vertex is degenerate (Orden 1956), and so the method cannot cycle.
Costs alone round: the vertex is optimal up to 16 units of the largest cost. See Ahuja, Magnanti & Orlin, "Network flows", 1993.

An iteration is a few array operations on (K0 + K1)^2 numbers, the same for every problem of a batch. For more than some tens of
components POT's network simplex, on the host, is quicker: `solve_on_host`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.host import on_host
from coupled_gmm.tree import pytree

_TOLERANCE = 16  # reduced costs above minus so many rounding units of the largest cost count as zero


@pytree
class Basis:
    """The cells of a vertex, and the inverse of their incidence matrix with the last column's equation left out."""

    rows: Int[Array, " n"]
    columns: Int[Array, " n"]
    inverse: Float[Array, "n K0+K1"]


@pytree
class Vertex:
    """An optimal plan with its dual potentials: f + g <= C everywhere, with equality where mass flows."""

    matrix: Float[Array, "K0 K1"]
    f: Float[Array, " K0"]
    g: Float[Array, " K1"]
    n_iterations: Int[Array, ""]
    optimal: Bool[Array, ""]


class _State(NamedTuple):
    basis: Basis
    prices: Float[Array, " n"]  # costs of the basic cells
    flow: Float[Array, " n"]  # in whole units
    tie: Float[Array, " n"]  # the flow of the infinitely small masses
    iteration: Int[Array, ""]
    done: Bool[Array, ""]


def solve(
    cost: Float[Array, "K0 K1"],
    a: Float[Array, " K0"],
    b: Float[Array, " K1"],
    max_iterations: int,
    start: Basis | None = None,
) -> tuple[Vertex, Basis]:
    """An optimal vertex, from that of a nearby problem where `start` is one of this problem's, else from a corner."""
    present = (a > 0)[:, None] & (b > 0)
    price = jnp.where(present, cost, 0)  # cells without mass may be in the tree, and must not lend it their size
    tolerance = _TOLERANCE * jnp.finfo(cost.dtype).eps * jnp.max(jnp.abs(price))
    unit = 2.0 ** -jnp.finfo(a.dtype).nmant * jnp.sum(a)
    units, small = _whole_units(a, b, unit), _small_masses(len(a), len(b), cost.dtype)
    basis = _corner(units, small, len(a), len(b))
    if start is not None:
        legal = _legal(_product(start.inverse, units), _product(start.inverse, small))
        basis = jax.tree.map(lambda given, corner: jnp.where(legal, given, corner), start, basis)

    def unfinished(state: _State) -> Bool[Array, ""]:
        return ~state.done & (state.iteration < max_iterations)

    def pivot(state: _State) -> _State:
        f, g = _potentials(state.basis, state.prices, len(a))
        reduced = jnp.where(present, price - f[:, None] - g, jnp.inf)
        cell = jnp.argmin(reduced)
        row, column = cell // len(b), cell % len(b)
        # A NaN is never below: a cost that is not finite ends the loop, and shows in the certificate.
        improves = reduced[row, column] < -tolerance
        inverse = state.basis.inverse
        change = inverse[:, row] + inverse[:, len(a) + column]  # what a unit through the cell takes from each basic one
        leaving = _first(change > 0, state.flow, state.tie)
        is_leaving = jnp.arange(len(change)) == leaving
        change = jnp.where(improves, jnp.where(is_leaving, 0, change), 0)

        def updated(values: Array) -> Array:
            return values - (change[:, None] * values[leaving] if values.ndim == 2 else change * values[leaving])

        def entered(old: Array, new: Array) -> Array:
            return jnp.where(is_leaving & improves, new.astype(old.dtype), old)

        basis = Basis(entered(state.basis.rows, row), entered(state.basis.columns, column), updated(inverse))
        prices = entered(state.prices, price[row, column])
        iteration = state.iteration + improves
        return _State(basis, prices, updated(state.flow), updated(state.tie), iteration, ~improves)

    flow, tie = _product(basis.inverse, units), _product(basis.inverse, small)
    zero = jnp.zeros((), jnp.int32)
    first = _State(basis, price[basis.rows, basis.columns], flow, tie, zero, jnp.asarray(False))
    end = jax.lax.while_loop(unfinished, pivot, first)
    # The masses as they are: what they are more than whole units flows as well, and may leave less than nothing of a unit.
    excess = _product(end.basis.inverse, jnp.concatenate([a, b]) - unit * units)
    exact_flow = jnp.maximum(unit * end.flow + excess, 0)
    matrix = jnp.zeros_like(cost).at[end.basis.rows, end.basis.columns].set(exact_flow)
    f, _ = _potentials(end.basis, end.prices, len(a))
    f, g = _feasible(cost, a, b, f)
    return Vertex(matrix, f, g, end.iteration, end.done), end.basis


def solve_on_host(
    cost: Float[Array, "K0 K1"], a: Float[Array, " K0"], b: Float[Array, " K1"], max_iterations: int
) -> Vertex:
    """The same from POT's network simplex, in float64, through a callback."""

    def network_simplex(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
        import ot  # only needed here

        usable = np.isfinite(cost)
        price = np.where(usable & (a > 0)[:, None] & (b > 0), cost, 0)
        scale = np.abs(price).max() or 1.0  # POT's tolerances are absolute
        matrix, log = ot.emd(a / a.sum(), b / b.sum(), price / scale, max_iterations, log=True)
        optimal = usable.all() and log["result_code"] == 1  # ot.lp's code of an optimal solution
        return matrix * a.sum(), scale * log["u"], np.asarray(optimal)

    matrix, f, optimal = on_host(network_simplex, (cost.shape, a.shape, ()), cost, a, b)
    f, g = _feasible(cost, a, b, f)
    return Vertex(matrix, f, g, jnp.zeros((), jnp.int32), optimal > 0)


def _whole_units(a: Array, b: Array, unit: Array) -> Float[Array, " K0+K1"]:
    """Masses as whole numbers of the smallest unit that their sum can hold, both sides of one sum."""
    a, b = jnp.round(a / unit), jnp.round(b / unit)
    b = b.at[jnp.argmax(b)].add(jnp.sum(a) - jnp.sum(b))
    return jnp.concatenate([a, b])


def _small_masses(k0: int, k1: int, dtype) -> Float[Array, " K0+K1"]:
    """Masses of which no part of the rows balances a part of the columns, unless both are empty or all."""
    return jnp.concatenate([jnp.full(k0, k1, dtype), jnp.ones(k1 - 1, dtype), jnp.full(1, k0 * k1 - k1 + 1, dtype)])


def _corner(units: Array, small: Array, k0: int, k1: int) -> Basis:
    """The north-west corner rule: rows and columns laid along one line, a cell for each piece between two ends.

    The flow of a piece is the sum of masses up to its end less that up to its beginning, hence the inverse.
    """
    below = jnp.tril(jnp.ones((k0 + k1, k0 + k1), units.dtype))
    same_side = (jnp.arange(k0 + k1) < k0)[:, None] == (jnp.arange(k0 + k1) < k0)
    sums = (below * same_side)[:-1]  # of masses up to each end; that of the last column is that of the last row
    order = jnp.lexsort((_product(sums, small), _product(sums, units)))
    sums = sums[order]
    of_row = order < k0
    before = jnp.cumsum(of_row, dtype=jnp.int32) - of_row
    inverse = sums - jnp.concatenate([jnp.zeros_like(sums[:1]), sums[:-1]])
    return Basis(before, jnp.arange(k0 + k1 - 1, dtype=jnp.int32) - before, inverse)


def _product(inverse: Array, masses: Array) -> Array:
    """A sum of products, not a dot: accelerators round the factors of those."""
    return jnp.sum(inverse * masses, axis=1)


def _legal(flow: Array, tie: Array) -> Bool[Array, ""]:
    return jnp.all((flow > 0) | ((flow == 0) & (tie > 0)))


def _first(candidates: Array, flow: Array, tie: Array) -> Int[Array, ""]:
    """The candidate that runs empty first."""
    flow = jnp.where(candidates, flow, jnp.inf)
    return jnp.argmin(jnp.where(flow == jnp.min(flow), jnp.where(candidates, tie, jnp.inf), jnp.inf))


def _potentials(basis: Basis, prices: Array, k0: int) -> tuple[Array, Array]:
    both = jnp.sum(prices[:, None] * basis.inverse, axis=0)
    return both[:k0], both[k0:]


def _feasible(cost: Array, a: Array, b: Array, f: Array) -> tuple[Array, Array]:
    """The largest potentials that are feasible, from f: what rounding and components without mass leave open."""
    g = jnp.min(jnp.where((a > 0)[:, None], cost - f[:, None], jnp.inf), axis=0)
    return jnp.min(jnp.where(b > 0, cost - g, jnp.inf), axis=1), g
