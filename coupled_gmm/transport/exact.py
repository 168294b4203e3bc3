r"""Exact balanced transport between small discrete measures: the simplex method, inside XLA.

The linear programme, for a cost C and masses a, b of the same sum:

.. math:: \min_{P \ge 0} \langle P, C \rangle, \qquad P 1 = a, \quad P^T 1 = b .

A vertex of it is a spanning tree of K0 + K1 - 1 cells. The inverse of the tree's incidence matrix holds nothing but 0, 1 and -1
(the matrix is totally unimodular), so it is kept dense, a pivot is one rank-one update, and no pivot ever rounds. Masses are
counted in whole units, so flows, ties and their resolution are exact too: ties fall to a second set of
masses, infinitely small ones under which no vertex is degenerate (Orden 1956), and so the method cannot cycle.
See Ahuja, Magnanti & Orlin, "Network flows", 1993.

The optimum is as well conditioned as its costs, whose roundings are relative, entry by entry. Potentials are not: those of a
component far away are as large as its costs, and cancel in the reduced costs of its neighbours. So they are `expansions` of three
floats, and the gap between the plan and its dual is a sum of products that cannot cancel,
:math:`\sum P_{ij} (C_{ij} - f_i - g_j)`.

An iteration is a few array operations on (K0 + K1)^2 numbers, the same for every problem of a batch. For more than some tens of
components POT's network simplex, on the host, is quicker: `network_simplex`.

Links that are forbidden have an infinite cost, as a number of its own beside the finite one: costs and potentials are pairs,
ordered by the first. Those of potentials are whole numbers, and exact; at the end they get a finite weight.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import expansions
from coupled_gmm.core.expansions import Expansion
from coupled_gmm.core.tree import pytree, static

_SLACK = 16  # reduced costs above minus so many cubed rounding units of their potentials count as zero
_GAP = 64  # a duality gap of so many rounding units of the cost is none
NOISE = 8  # a flow of no more rounding units of all mass on one side of it is none


@pytree
class Basis:
    """The cells of a vertex, and the inverse of their incidence matrix with the last column's equation left out."""

    rows: Int[Array, "*b n"]
    columns: Int[Array, "*b n"]
    inverse: Float[Array, "*b n masses"]


@pytree
class Vertex:
    """An optimal plan with its dual potentials: f + g <= C everywhere, with equality where mass flows.

    Of the potentials that differ by a constant, the ones that round least: half of the mass has them below zero, half above.
    """

    matrix: Float[Array, "*b K0 K1"]
    f: Float[Array, "*b K0"]
    g: Float[Array, "*b K1"]
    n_iterations: Int[Array, "*b"]
    done: Bool[Array, "*b"]  # the steps did not run out
    optimal: Bool[Array, "*b"]  # done, and shown to be optimal by the gap
    gap: Float[Array, "*b"]  # a bound on how far <P, C> is from optimal, for the masses that P has


class _Flow(NamedTuple):
    """Mass in whole units, large ones and small ones of which the large are multiples, and of the infinitely small masses."""

    large: Float[Array, " n"]
    small: Float[Array, " n"]
    tie: Float[Array, " n"]


class _State(NamedTuple):
    basis: Basis
    potentials: Expansion
    infinities: Float[Array, " masses"] | None  # of potentials, how many infinite costs; None without links
    flow: _Flow
    iteration: Int[Array, ""]
    done: Bool[Array, ""]


def solve(
    cost: Float[Array, "K0 K1"],
    a: Float[Array, " K0"],
    b: Float[Array, " K1"],
    max_iterations: int,
    start: Basis | None = None,
    links: Bool[Array, "K0 K1"] | None = None,
) -> tuple[Vertex, Basis]:
    """An optimal vertex, from that of a nearby problem where `start` is one of this problem's, else from a corner.

    Where links can't carry the masses, its marginals miss these by as much: mass that none takes is in no cell.
    """
    k0 = len(a)
    free = usable(a, b, links)
    price = jnp.where(free, cost, 0)  # cells without mass may be in the tree, and must not lend it their size
    infinite = None if links is None else ((a > 0)[:, None] & (b > 0) & ~free).astype(cost.dtype)
    units = _Units.of(a, b)
    basis = _corner(units)
    if start is not None:
        feasible = _feasible(units.flow(start.inverse))
        basis = jax.tree.map(lambda given, corner: jnp.where(feasible, given, corner), start, basis)

    def unfinished(state: _State) -> Bool[Array, ""]:
        return ~state.done & (state.iteration < max_iterations)

    def pivot(state: _State) -> _State:
        f, g = _sides(state.potentials, k0)
        reduced = expansions.reduced(price, *crossed(f, g))
        # A NaN is never below: a cost that is not finite ends the loop, and shows in the certificate.
        reduced = jnp.where(free & (reduced < -_resolved(f[0], g[0])), reduced, 0)
        over = _over(infinite, state.infinities, k0)
        if over is not None:
            worst = jnp.where(free & (over < 0), over, 0)
            reduced = jnp.where(jnp.any(worst < 0), worst, jnp.where(over == 0, reduced, 0))
        row, column = _least(reduced)
        improves = reduced[row, column] < 0
        inverse = state.basis.inverse
        change = inverse[:, row] + inverse[:, k0 + column]  # what a unit through the cell takes from each basic one
        leaving = _first(change > 0, state.flow)
        is_leaving = jnp.arange(len(change)) == leaving
        change = jnp.where(improves, jnp.where(is_leaving, 0, change), 0)
        # What hangs on the leaving cell shifts by the entering one's reduced cost, up or down.
        shift = jnp.where(improves, inverse[leaving], 0)
        by = _of_cell(price, f, g, row, column)
        potentials = expansions.added(state.potentials, expansions.scaled(by, shift))
        infinities = state.infinities
        if over is not None and infinities is not None:
            infinities = infinities + over[row, column] * shift

        def updated(values: Array) -> Array:
            return values - change * values[leaving]

        def entered(old: Array, new: Array) -> Array:
            return jnp.where(is_leaving & improves, new.astype(old.dtype), old)

        inverse = inverse - change[:, None] * inverse[leaving]
        basis = Basis(entered(state.basis.rows, row), entered(state.basis.columns, column), inverse)
        flow = units.normal(_Flow(*map(updated, state.flow)))
        return _State(basis, potentials, infinities, flow, state.iteration + improves, ~improves)

    zero = jnp.zeros((), jnp.int32)
    infinities = None if infinite is None else infinite[basis.rows, basis.columns] @ basis.inverse
    first = _State(basis, _potentials(basis, price), infinities, units.flow(basis.inverse), zero, jnp.asarray(False))
    end = jax.lax.while_loop(unfinished, pivot, first)
    matrix = jnp.zeros_like(cost).at[end.basis.rows, end.basis.columns].set(units.mass(end.basis, end.flow))
    potentials = end.potentials
    over = _over(infinite, end.infinities, k0)
    if over is not None and end.infinities is not None:
        matrix = jnp.where(free, matrix, 0)
        potentials = _finite(price, potentials, end.infinities, jnp.where(free, over, 0), k0)
    return certified(cost, a, b, free, matrix, *_sides(potentials, k0), end.iteration, end.done), end.basis


def usable(a: Array, b: Array, links: Array | None) -> Bool[Array, "K0 K1"]:
    """Cells that may have mass."""
    present = (a > 0)[:, None] & (b > 0)
    return present if links is None else present & links


def _over(infinite: Array | None, infinities: Array | None, k0: int) -> Float[Array, "K0 K1"] | None:
    """Of reduced costs, how many infinite ones."""
    if infinite is None or infinities is None:
        return None
    return infinite - infinities[:k0, None] - infinities[k0:]


def _finite(price: Array, potentials: Expansion, infinities: Array, over: Array, k0: int) -> Expansion:
    """Potentials that are feasible, with the least power of two that will do for an infinite cost."""
    f, g = _sides(potentials, k0)
    reduced = expansions.reduced(price, *crossed(f, g))
    least = jnp.max(jnp.where((over > 0) & (reduced < 0), -reduced / jnp.where(over > 0, over, 1), 0))
    size = jnp.where(least > 0, jnp.ldexp(jnp.ones_like(least), jnp.frexp(least)[1]), 0)
    zeros = jnp.zeros_like(infinities)
    return expansions.added(potentials, (size * infinities, zeros, zeros))


def certified(
    cost: Array,
    a: Array,
    b: Array,
    free: Bool[Array, "K0 K1"],
    matrix: Array,
    f: Expansion,
    g: Expansion,
    n_iterations: Array,
    done: Array,
) -> Vertex:
    """A vertex with its duality gap; optimal where that is within rounding of the cost."""
    price = jnp.where(free, cost, 0)
    bound, known = gap(price, a, b, free, matrix, f, g, float(jnp.finfo(cost.dtype).eps))
    bound = jnp.where(jnp.all(jnp.isfinite(price)), bound, jnp.nan)
    rounded_f, rounded_g = _centred(a, b, f, g)
    # Those of absent components are as large as the others' allow.
    free_f = jnp.min(jnp.where(b > 0, cost - rounded_g, jnp.inf), axis=1)
    free_g = jnp.min(jnp.where(jnp.expand_dims(a > 0, 1), cost - rounded_f[:, None], jnp.inf), axis=0)
    rounded_f, rounded_g = jnp.where(a > 0, rounded_f, free_f), jnp.where(b > 0, rounded_g, free_g)
    return Vertex(matrix, rounded_f, rounded_g, n_iterations, done, done & (bound <= known), bound)


def gap(price: Any, a: Any, b: Any, free: Any, matrix: Any, f: Expansion, g: Expansion, eps: float) -> tuple[Any, Any]:
    """A bound on what a plan of the same masses could save, and what of it is no more than rounding; of either library."""
    reduced = expansions.reduced(price, *crossed(f, g)) * free
    resolved = _SLACK * eps**3 * (a @ abs(f[0]) + b @ abs(g[0]))
    # Where the dual is infeasible, the best plan may gain as much on all of a row's mass.
    gap = (matrix * reduced.clip(min=0)).sum() + a @ (-reduced).clip(min=0).max(axis=1) + resolved
    return gap, _GAP * (eps * (matrix * abs(price)).sum() + resolved)


@pytree
class _Units:
    """Masses of both sides in whole units, and what is left of them.

    The large unit is the smallest that all mass can be counted in; a small one is as many times less as sums of it stay exact.
    """

    masses: Float[Array, " masses"]
    counts: _Flow
    rest: Float[Array, " masses"]
    unit: Float[Array, ""]
    n_small: Float[Array, ""]
    k0: int = static()

    @classmethod
    def of(cls, a: Float[Array, " K0"], b: Float[Array, " K1"]) -> "_Units":
        (k0, k1), dtype, digits = (len(a), len(b)), a.dtype, jnp.finfo(a.dtype).nmant
        masses = jnp.concatenate([a, b])
        of_a = jnp.arange(k0 + k1) < k0
        unit = jnp.ldexp(jnp.ones((), dtype), jnp.frexp(jnp.sum(a))[1] - digits)
        n_small = jnp.asarray(2.0 ** (digits - 1 - math.ceil(math.log2(k0 + k1))), dtype)
        large = jnp.floor(masses / unit)
        rest = masses - unit * large
        small = jnp.round(rest / unit * n_small)
        rest = rest - unit / n_small * small
        # Masses of no part of the rows balance a part of the columns, unless both are empty or all.
        tie = jnp.concatenate([jnp.full(k0, k1, dtype), jnp.ones(k1 - 1, dtype), jnp.full(1, k0 * k1 - k1 + 1, dtype)])
        self = cls(masses, _Flow(large, small, tie), rest, unit, n_small, k0)
        # Both sides get one sum: by what is relative rounding of each mass, and a few small units.
        for share in (jnp.where(of_a, 0, masses) / jnp.sum(b), jnp.zeros_like(masses).at[k0 + jnp.argmax(b)].set(1)):
            self = self._shifted(share)
        return self

    def _shifted(self, share: Float[Array, " masses"]) -> "_Units":
        side = jnp.where(jnp.arange(len(share)) < self.k0, 1, -1)
        excess = self.n_small * jnp.sum(side * self.counts.large) + jnp.sum(side * self.counts.small)
        given = jnp.round(share * excess)
        large = jnp.floor(given / self.n_small)
        small = given - self.n_small * large
        counts = _Flow(self.counts.large + large, self.counts.small + small, self.counts.tie)
        return dataclasses.replace(self, counts=self.normal(counts))

    def flow(self, inverse: Float[Array, "n masses"]) -> _Flow:
        return self.normal(_Flow(*(_product(inverse, count) for count in self.counts)))

    def normal(self, flow: _Flow) -> _Flow:
        """The same with fewer small units than a large one has, and no less than none."""
        carry = jnp.floor(flow.small / self.n_small)
        return _Flow(flow.large + carry, flow.small - self.n_small * carry, flow.tie)

    def mass(self, basis: Basis, flow: _Flow) -> Float[Array, " n"]:
        """Of basic cells: with what masses are more than whole units, without what is rounding of all mass on one side."""
        mass = self.unit * (flow.large + flow.small / self.n_small) + _product(basis.inverse, self.rest)
        side = _product(jnp.abs(basis.inverse), self.masses)
        side = jnp.minimum(side, jnp.sum(self.masses) - side)
        return jnp.where(mass > NOISE * jnp.finfo(mass.dtype).eps * side, mass, 0)


def _corner(units: _Units) -> Basis:
    """The north-west corner rule: rows and columns laid along one line, a cell for each piece between two ends.

    The flow of a piece is the sum of masses up to its end less that up to its beginning, hence the inverse.
    """
    n, k0 = len(units.masses), units.k0
    below = jnp.tril(jnp.ones((n, n), units.masses.dtype))
    same_side = (jnp.arange(n) < k0)[:, None] == (jnp.arange(n) < k0)
    sums = (below * same_side)[:-1]  # of masses up to each end; that of the last column is that of the last row
    ends = units.flow(sums)
    order = jnp.lexsort((ends.tie, ends.small, ends.large))
    sums = sums[order]
    of_row = order < k0
    before = jnp.cumsum(of_row, dtype=jnp.int32) - of_row
    inverse = sums - jnp.concatenate([jnp.zeros_like(sums[:1]), sums[:-1]])
    return Basis(before, jnp.arange(n - 1, dtype=jnp.int32) - before, inverse)


def _product(inverse: Array, masses: Array) -> Array:
    """A sum of products, not a dot: accelerators round the factors of those."""
    return jnp.sum(inverse * masses, axis=1)


def _feasible(flow: _Flow) -> Bool[Array, ""]:
    some = (flow.large > 0) | (flow.small > 0)
    return jnp.all((flow.large >= 0) & (some | (flow.tie > 0)))


def _first(candidates: Array, flow: _Flow) -> Int[Array, ""]:
    """The candidate that runs empty first, by a reduction of its own: one kernel, where three minima are nine."""

    def least(one: tuple, other: tuple) -> tuple:
        (large0, small0, tie0, _), (large1, small1, tie1, _) = one, other
        by_small = (small0 < small1) | ((small0 == small1) & (tie0 < tie1))
        first = (large0 < large1) | ((large0 == large1) & by_small)
        return tuple(jnp.where(first, x, y) for x, y in zip(one, other, strict=True))

    large = jnp.where(candidates, flow.large, jnp.inf)
    index = jnp.arange(len(large), dtype=jnp.int32)
    infinite = jnp.asarray(jnp.inf, large.dtype)
    start = infinite, infinite, infinite, jnp.zeros((), jnp.int32)
    return jax.lax.reduce((large, flow.small, flow.tie, index), start, least, (0,))[3]


def _least(values: Float[Array, "K0 K1"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Row and column of the least value: XLA's argmin of a matrix is slower on CPU than all that makes the matrix."""
    values = jax.lax.optimization_barrier(values)
    column = jnp.argmin(jnp.min(values, axis=0))
    return jnp.argmin(values[:, column]), column


def _potentials(basis: Basis, price: Array) -> Expansion:
    """Those at which the reduced costs of the basic cells vanish: what one sum leaves of these, the next one adds."""
    prices, k0 = price[basis.rows, basis.columns], len(price)

    def improved(_, both: Expansion) -> Expansion:
        f, g = _sides(both, k0)
        missed = expansions.reduced(prices, _taken(f, basis.rows), _taken(g, basis.columns))
        change = jnp.sum(missed[:, None] * basis.inverse, axis=0)
        return expansions.added(both, (change, jnp.zeros_like(change), jnp.zeros_like(change)))

    start = expansions.zeros(sum(price.shape), price.dtype)
    return jax.lax.fori_loop(0, len(start), improved, start)


def _sides(both: Expansion, k0: int) -> tuple[Expansion, Expansion]:
    return tuple(part[:k0] for part in both), tuple(part[k0:] for part in both)


def _taken(x: Expansion, index: Any) -> Expansion:
    return x[0][index], x[1][index], x[2][index]


def crossed(f: Expansion, g: Expansion) -> tuple[Expansion, Expansion]:
    """Along rows, and along columns."""
    return (f[0][:, None], f[1][:, None], f[2][:, None]), g


def _of_cell(price: Array, f: Expansion, g: Expansion, row: Array, column: Array) -> Expansion:
    """A cell's reduced cost, all parts of it."""
    zero = jnp.zeros((), price.dtype)
    taken = expansions.added(_taken(f, row), _taken(g, column))
    return expansions.added((price[row, column], zero, zero), expansions.scaled(taken, -1))


def _resolved(f: Float[Array, " K0"], g: Float[Array, " K1"]) -> Float[Array, "K0 K1"]:
    """What reduced costs are known to."""
    unit = _SLACK * float(jnp.finfo(f.dtype).eps) ** 3
    return unit * jnp.abs(f)[:, None] + unit * jnp.abs(g)


def _centred(a: Array, b: Array, f: Expansion, g: Expansion) -> tuple[Array, Array]:
    """Rounded potentials, from the constant at which the rounding counts least: a median."""
    values = jnp.concatenate([f[0], -g[0]])
    masses = jnp.concatenate([a, b])
    distance = jnp.sum(masses * jnp.abs(values[:, None] - values), axis=1)
    median = jnp.argmin(jnp.where(masses > 0, distance, jnp.inf))
    centre = tuple(jnp.concatenate([one, -other])[median] for one, other in zip(f, g, strict=True))
    f, g = expansions.added(f, expansions.scaled(centre, -1)), expansions.added(g, centre)
    return expansions.rounded(f), expansions.rounded(g)
