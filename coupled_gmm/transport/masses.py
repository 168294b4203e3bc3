r"""Masses and plans of a graph of mixtures solved for together: the part of an M-step that is not smooth.

Given the costs of all edges, and masses n_i that the clouds ask for with weights v_i, maximise over the masses a_i

.. math:: \sum_i v_i \sum_k n_{ik} \log a_{ik} - \sum_{(i, j)} \lambda_{ij} T(a_i, a_j)

Balanced, T has kinks in the masses: where they agree, or nearly, no gradient says how far they should part. As a saddle point in
masses and potentials the problem is smooth. Its equations are those that `annealing` solves, with masses that answer to the
potentials of all edges of their node,

.. math:: a_i = n_i / (1 + \Phi_i - s_i), \qquad \Phi_i = \sum_{h} \lambda_h \phi(F_h) / v_i, \quad
   \phi(F) = \rho (1 - e^{-F / \rho})

(F where :math:`\rho` is infinite), :math:`s_i` being such that they sum to 1. With the masses put in, it is a convex function of
the potentials that is minimised: it tells good steps from bad, where the residual alone may go round in circles.

The entropy of a plan is taken against the marginals :math:`p_0 q_0^T` that the plan has for the present masses. That makes the
problem concave, and its value a lower bound that is exact at the start: balanced, T differs by
:math:`\epsilon (KL(a | a_0) + KL(b | b_0))`, never negative; else what a mass pays for being missed is
:math:`\rho + \epsilon`, since :math:`p \log a \ge p \log p_0 + p - p_0 - p \log (p / a)`. So the true objective rises.

Newton's step is one of all edges at once: `edges`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import expansions, matrices
from coupled_gmm.core.expansions import Words
from coupled_gmm.core.tree import chosen, pytree
from coupled_gmm.transport import edges, entropic
from coupled_gmm.transport.annealing import FAR, Goal, Merit, NewtonSystem, Solve, Unknowns, anneal
from coupled_gmm.transport.entropic import Potentials
from coupled_gmm.transport.problem import Potential, TransportProblem, largest_exponent, value, worth

# Of Newton's method for the normalizer, from the last one: the merit must be that of masses that sum to 1.
_NORMALIZER_STEPS, _LAST_NORMALIZER_STEPS = 4, 8
_ROUNDS = 8  # of looking for what rounding has left, where there are links


@pytree
class Response:
    """What masses answer with: the targets n (summing to 1), the weights v above 0, and which nodes are free to answer."""

    targets: Float[Array, "V K"]
    weights: Float[Array, " V"]
    free: Bool[Array, " V"]


@pytree
class Joins:
    """The nodes that edges join, and the weights lambda of their transport costs."""

    ends: Int[Array, "2 E"]
    weights: Float[Array, " E"]


class _Nodes:
    """Masses as a function of what the edges' potentials pull with."""

    def __init__(self, response: Response, given: Float[Array, "V K"]):
        self.targets, self.weights = response.targets, response.weights
        self.free = response.free[:, None]
        self.present = jnp.where(self.free, self.targets > 0, jnp.isfinite(given))
        self.given = jnp.where(self.present, given, -jnp.inf)  # what no cloud asks for gives up what it has

    def answer(self, pull: Array, normalizer: Array, steps: int) -> tuple[Array, Array, Array]:
        """Log-masses, the slopes of their answer, and the improved normalizer, at which they sum to 1.

        That is the least denominator 1 + Phi - s. Newton's method on the reciprocal of the sum, which is concave and nearly
        linear in it, closes in from below.
        """
        targets = self.targets
        has = targets > 0
        excess = jnp.where(has, pull - self._lowest(pull), 0)
        # Of those that have no more excess than one, the masses would sum to more than 1 at any less.
        upto = jnp.sum(jnp.where(excess[..., None, :] <= excess[..., None], targets[..., None, :], 0), axis=-1)
        least = jnp.max(jnp.where(has, upto - excess, 0), axis=-1, keepdims=True)

        def newton(_, normalizer):
            share = jnp.where(has, targets / (normalizer + excess), 0)
            total = jnp.sum(share, axis=-1, keepdims=True)
            # No square of a tiny target's reciprocal.
            slope = jnp.sum(share / total / ((normalizer + excess) * total), axis=-1, keepdims=True)
            return jnp.clip(normalizer + (1 - 1 / total) / slope, least, 1)

        # The last normalizer may be that of another component's least excess, with quite another target.
        normalizer = jnp.clip(normalizer, least, 1)
        normalizer = jax.lax.fori_loop(0, steps, newton, normalizer, unroll=steps == _NORMALIZER_STEPS)
        denominator = normalizer + excess
        log_mass = jnp.where(has, jnp.log(jnp.where(has, targets, 1)) - jnp.log(denominator), -jnp.inf)
        return (
            jnp.where(self.free, log_mass, self.given),
            jnp.where(self.free & has, 1 / denominator, 0),
            normalizer,
        )

    def _lowest(self, pull: Array) -> Float[Array, "V 1"]:
        return jnp.min(jnp.where(self.targets > 0, pull, jnp.inf), axis=-1, keepdims=True)

    def worth(self, log_mass: Array, pull: Array, normalizer: Array) -> Float[Array, " n"]:
        r"""The terms of :math:`v (n \log a - a \Phi)`, which free masses have, but for a constant.

        As a Lagrangian in the normalizer, least where the masses sum to 1: one that is not quite there seems worth no less.
        """
        has = self.free & (self.targets > 0)
        one = jnp.where(has, self.targets * jnp.where(has, log_mass, 0), 0)
        common = jnp.where(self.free, normalizer - self._lowest(pull), 0)
        return (self.weights[:, None] * jnp.concatenate([one, common], axis=1)).ravel()


class _Joint(NamedTuple):
    """The problem of all edges as seen from potentials that are near, whose change is what is unknown.

    Costs are less those potentials, and so rounded as finely as the change is; the unit of an edge is a power of two near its
    epsilon, so that none is rounded by it.
    """

    nodes: _Nodes
    ends: Int[Array, "2 E"]
    present: Bool[Array, "2 E K"]
    free: Bool[Array, "2 E"]
    unit: Float[Array, " E"]
    epsilon: Float[Array, " E"]
    price: Float[Array, "2 E"]  # 1 / rho, with rho + epsilon for rho where masses are free
    problems: TransportProblem  # between the present masses, at the costs that are left
    near: tuple[Words, Words]
    start: Float[Array, "2 E K"]  # the same, against the present marginals
    weights: Float[Array, " E"]
    rates: Float[Array, "2 E 1"]
    kept: Float[Array, "2 E K"]  # what the start leaves of masses
    pulled: Float[Array, "V K"]  # by the start
    heaviest: Float[Array, ""]  # at least 1: mass that goes astray costs what an edge weighs times its costs
    enough: Float[Array, ""]  # a marginal error that is not worth the way over a plateau

    @classmethod
    def of(
        cls,
        problems: TransportProblem,
        joins: Joins,
        log_masses: Array,
        init: tuple[Potential, Potential],
        response: Response,
        tol: Array,
    ) -> "_Joint":
        ends, nodes = joins.ends, _Nodes(response, log_masses)
        given, present, free = nodes.given[ends], nodes.present[ends], response.free[ends]
        unit = jnp.exp2(jnp.round(jnp.log2(problems.epsilon)))
        near = _near(problems, present, init, joins, response)
        cost = -jax.vmap(TransportProblem.exponent)(problems, *near) / unit[:, None, None]
        start = jnp.stack([value(side) for side in near]) / unit[:, None]
        left = problems.in_unit(unit, cost).with_log_masses(given[0], given[1])
        epsilon, price = left.epsilon, jnp.stack(left.inverse_rhos)
        grown = 1 + jnp.where(free, epsilon * price, 0)
        start, price = start * grown[..., None], price / grown
        # Where no node is free, edges have nothing to do with each other, and each counts.
        weights = jnp.where(jnp.any(response.free), joins.weights * unit, 1)
        rates = jnp.where(free, joins.weights * unit / response.weights[ends], 0)[..., None]
        joint = cls(
            nodes=nodes,
            ends=ends,
            present=present,
            free=free,
            unit=unit,
            epsilon=epsilon,
            price=price,
            problems=left,
            near=near,
            start=start,
            weights=weights,
            rates=rates,
            kept=jnp.exp(jnp.minimum(-start * price[..., None], largest_exponent(start))),
            pulled=jnp.zeros_like(log_masses),
            heaviest=tol,
            enough=tol,
        )
        heaviest = jnp.max(joins.weights * unit * epsilon * joint.scales, initial=0) / jnp.max(response.weights)
        heaviest = jnp.maximum(1, heaviest)
        pulled = joint.summed(worth(start, joint.rho))
        # A shift of all of a node's is free: masses sum to 1.
        pulled = pulled - jnp.min(jnp.where(nodes.present, pulled, jnp.inf), axis=-1, keepdims=True)
        pulled = jnp.where(nodes.present, pulled, 0)
        return joint._replace(pulled=pulled, heaviest=heaviest, enough=0.9 * tol / heaviest)

    @property
    def rho(self) -> Float[Array, "2 E 1"]:
        price = self.price[..., None]
        return jnp.where(price > 0, 1 / jnp.where(price > 0, price, 1), jnp.inf)

    def summed(self, worths: Float[Array, "2 E K"]) -> Float[Array, "V K"]:
        """Over a node's edges, by what they weigh for it."""
        return jnp.zeros_like(self.nodes.given).at[self.ends].add(self.rates * worths)

    def pulls(self, x: Float[Array, "2 E K"]) -> Float[Array, "V K"]:
        """phi of the whole potential is that of the start, and that of the change times what the start has left of masses."""
        return self.pulled + self.summed(self.kept * worth(x, self.rho))

    def equations(self, x: Array, heat: Array, normalizer: Array) -> NewtonSystem:
        """At changes of all potentials, laid out flat."""
        x, eps = x.reshape(self.start.shape), self.epsilon * heat
        pull = self.pulls(x)
        log_mass, slope, normalizer = self.nodes.answer(pull, normalizer, _NORMALIZER_STEPS)
        wanted = log_mass[self.ends] - (self.start + x) * self.price[..., None]
        log_plan = jax.vmap(TransportProblem.log_plan)(self.problems.at(eps), x[0], x[1])
        log_sums = jnp.stack([jax.nn.logsumexp(log_plan, axis=2), jax.nn.logsumexp(log_plan, axis=1)])
        log_total = jnp.where(self.problems.balanced, 0, jax.nn.logsumexp(log_plan, axis=(1, 2)))[:, None]
        part = lambda log_mass: jnp.exp(log_mass - log_total)  # noqa: E731
        missed = jnp.sum(jnp.abs(part(log_sums) - part(wanted)), axis=(0, 2))
        lost = jnp.max(jnp.abs(jnp.sum(jnp.exp(log_mass), axis=-1) - 1))
        plan = jnp.exp(log_plan - jnp.reshape(log_total, (-1, 1, 1)))
        # What rounding of the pulls is worth in masses.
        swayed = (
            jnp.finfo(x.dtype).eps * jnp.exp(log_mass) * slope * self.summed(jnp.abs(self.kept * worth(x, self.rho)))
        )
        fine = jnp.max(jax.vmap(entropic.rounding)(plan, self.problems.cost, x[0], eps))
        fine = fine + jnp.max(jnp.sum(swayed, axis=-1))
        # What potentials of one float would reach, where that will do.
        sizes = jnp.abs(self.start[0])[..., None] + jnp.abs(self.start[1])[:, None]
        coarse = jnp.max(jax.vmap(entropic.rounding)(plan, sizes, self.start[0], eps))
        residual = jnp.where(self.present, wanted - log_sums, 0)
        moved = self.kept * jnp.exp(jnp.minimum(-x * self.price[..., None], largest_exponent(x)))  # the slope of worth
        answers = edges.Answers.of(slope, log_mass, self.rates * eps[:, None] * moved)
        return NewtonSystem(
            residual=residual.ravel(),
            matrix=self._step(answers, log_plan, log_sums, residual, eps),
            marginal_error=jnp.max(missed) + lost,
            rounding=jnp.maximum(fine, 0.5 * jnp.minimum(coarse / self.heaviest, self.enough)),
            warm_start=normalizer,
            merit=self._merit(x, log_mass, pull, normalizer, eps[:, None] * jnp.exp(log_sums[0])),
        )

    def _step(self, answers: edges.Answers, log_plan: Array, log_sums: Array, residual: Array, eps: Array) -> Solve:
        centres = jnp.where(self.present, log_sums, 0)
        u, v = jnp.exp(log_plan - centres[0][..., None]), jnp.exp(log_plan - centres[1][:, None])

        def step(mu: Array, careful: Array) -> Array:
            rows, masses = (jnp.where(careful, scale, 1) for scale in edges.row_scales(residual))
            base = jnp.maximum(1, rows) * (1 + mu) + masses * (eps * self.price)[..., None]
            across = u * rows[0][..., None], matrices.transpose(v) * rows[1][..., None]
            delta = edges.newton_step(answers, self.ends, base, masses, *across, residual)
            return (self.epsilon[:, None] * delta).ravel()

        return step

    def _merit(self, x: Array, log_mass: Array, pull: Array, normalizer: Array, mass: Float[Array, "E K"]) -> Merit:
        held = self.present & ~self.free[..., None]
        paid = jnp.where(held, jnp.exp(log_mass[self.ends]) * self.kept * worth(x, self.rho), 0)
        of_edges = (self.weights[:, None] * term for term in (-paid[0], -paid[1], mass))
        terms = jnp.concatenate([self.nodes.worth(log_mass, pull, normalizer), *(term.ravel() for term in of_edges)])
        return Merit(jnp.sum(terms), jnp.sum(jnp.abs(terms)))

    @property
    def scales(self) -> Float[Array, " E"]:
        """Of the costs, in units of epsilon."""
        return _cost_scales(self.problems, self.present) / self.epsilon

    def unknowns(self) -> Unknowns:
        given = self.nodes.given[self.ends[0]]
        weights = jnp.where(self.problems.balanced[:, None], jnp.exp(given), 0)

        def centred(x: Array) -> Array:
            x = x.reshape(self.start.shape)
            shift = jnp.sum(jnp.where(weights > 0, weights * x[0], 0), axis=-1, keepdims=True)
            return (x + jnp.stack([-shift, shift])).ravel()

        return Unknowns(self.present.ravel(), centred, jnp.max(self.scales))

    def goal(self, tol: Array, max_iterations: int) -> Goal:
        info = jnp.finfo(self.start.dtype)
        # At an epsilon above v / lambda masses answer to a step in F by orders of magnitude.
        stiffest = jnp.maximum(jnp.max(self.rates * self.epsilon[:, None]), info.tiny)
        least = tol / (16 * self.heaviest)
        if self.problems.links is not None:  # masses that are held agree no better than they were solved for
            least = jnp.where(jnp.any(self.free), least, tol / 4)
        return Goal(
            jnp.ones((), self.start.dtype),
            marginal_error=jnp.maximum(least, 8 * info.eps),
            hottest=jnp.maximum(1, jnp.minimum(jnp.max(self.scales), 1 / stiffest)),
            max_iterations=max_iterations,
        )


def solve(
    problems: TransportProblem,
    joins: Joins,
    log_masses: Float[Array, "V K"],
    init: tuple[Potential, Potential],
    tol: Float[Array, ""],
    max_iterations: int,
    response: Response,
) -> tuple[Potentials, Float[Array, "V K"]]:
    """Potentials and masses of the problems of all edges, stacked; masses of nodes that are not free stay the present ones.

    `init`: the potentials of the plans between the present masses, or of ones nearby where no node is free. Where unbalanced,
    those that are returned are optimal for masses that were free only once they no longer move.
    """
    if problems.links is None:
        return _once(problems, joins, log_masses, init, response, tol, max_iterations)[:2]
    # Masses that links alone make agree do so at potentials of v / lambda, whatever the costs are; their rounding is none in the
    # next round. Unbalanced there is no next one: a start that is no plan's bounds nothing.
    rest = {"response": response, "tol": tol, "max_iterations": max_iterations}
    once = functools.partial(_once, problems, joins, log_masses, **rest)

    def again(now: _Round) -> _Round:
        found, new, near = once(now.near)
        missed, before = (jnp.max(one.marginal_error, initial=0) for one in (found, now.found))
        goes_on = jnp.all(problems.balanced) & jnp.any(found.stalled) & ((now.count == 0) | (missed < 0.5 * before))
        found, new = chosen((now.count == 0) | (missed < before), (found, new), (now.found, now.log_masses))
        return _Round(near, found, new, now.count + 1, ~goes_on)

    near = jax.tree.map(lambda side: side.astype(log_masses.dtype), tuple(map(expansions.words, init)))
    found, new, _ = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(once, near))
    start = _Round(near, found, new, jnp.zeros((), jnp.int32), jnp.asarray(False))
    end = jax.lax.while_loop(lambda now: ~now.done & (now.count < _ROUNDS), again, start)
    return end.found, end.log_masses


class _Round(NamedTuple):
    """Where the next starts, and the best so far."""

    near: tuple[Words, Words]
    found: Potentials
    log_masses: Float[Array, "V K"]
    count: Int[Array, ""]
    done: Bool[Array, ""]


def _once(
    problems: TransportProblem,
    joins: Joins,
    log_masses: Float[Array, "V K"],
    init: tuple[Potential, Potential],
    response: Response,
    tol: Float[Array, ""],
    max_iterations: int,
) -> tuple[Potentials, Float[Array, "V K"], tuple[Words, Words]]:
    """Potentials and masses, and the former as they are between the present masses."""
    joint = _Joint.of(problems, joins, log_masses, init, response, tol)
    nothing, ones = jnp.zeros(joint.start.size, joint.start.dtype), jnp.ones((len(log_masses), 1), joint.start.dtype)
    end = anneal(joint.equations, nothing, ones, joint.unknowns(), joint.goal(tol, max_iterations))
    x = end.x.reshape(joint.start.shape)
    new, _, _ = joint.nodes.answer(joint.pulls(x), end.warm_start, _LAST_NORMALIZER_STEPS)
    moved = new[joins.ends]
    change = joint.unit[:, None] * (x - joint.epsilon[:, None] * _difference(moved, joint.nodes.given[joins.ends]))
    found = _potentials(problems, moved, joint.present, joint.near, change)
    near = joint.near
    if problems.links is not None:
        steps = joint.unit[:, None] * jnp.where(joint.present, x, 0)
        near = expansions.moved(near[0], steps[0]), expansions.moved(near[1], steps[1])
    return jax.vmap(entropic.certified, (0, 0, 0, None, None))(*found, tol, end), new, near


def _near(
    problems: TransportProblem, present: Bool[Array, "2 E K"], init: Any, joins: Joins, response: Response
) -> tuple[Words, Words]:
    """Potentials to start from; those that are of another problem are farther away than zero."""
    f, g = (expansions.words(side) for side in init)
    farthest = FAR * _cost_scales(problems, present)[:, None]
    if problems.links is not None:  # they may be as large as what moves masses, and then go together
        pulls = jnp.max(response.weights[joins.ends], axis=0) / joins.weights
        farthest = problems.longest_way * farthest + FAR * pulls[:, None]
        near = [jnp.all(jnp.abs(side[0]) <= farthest, axis=1, keepdims=True) for side in (f, g)]
        farthest = jnp.where(near[0] & near[1], farthest, -1)
    return _where(jnp.abs(f[0]) <= farthest, f), _where(jnp.abs(g[0]) <= farthest, g)


def _cost_scales(problems: TransportProblem, present: Bool[Array, "2 E K"]) -> Float[Array, " E"]:
    """Of each edge the largest cost at which mass may move."""
    both = jax.vmap(TransportProblem.usable)(problems, present[0], present[1])
    return jnp.max(jnp.where(both, jnp.abs(problems.cost), 0), axis=(1, 2))


def _potentials(
    problems: TransportProblem, log_masses: Array, present: Array, near: tuple[Words, Words], change: Array
) -> tuple[TransportProblem, Words, Words]:
    """The problems between the new masses, with f centred by them, and g once more from f: rounded no more than they need be."""
    solved = problems.with_log_masses(log_masses[0], log_masses[1])
    f, g = (
        expansions.moved(side, jnp.where(here, by, 0)) for side, here, by in zip(near, present, change, strict=True)
    )
    shift = jnp.sum(jnp.exp(log_masses[0]) * jnp.where(present[0], value(f), 0), axis=-1, keepdims=True)
    shift = jnp.where(problems.balanced[:, None], shift, 0)
    f, g = expansions.moved(f, -shift), expansions.moved(g, shift)
    f = _where(present[0], f)
    g = jax.vmap(lambda problem, f, g: problem.transpose().c_transform(f, g))(solved, f, g)
    return solved, f, _where(present[1], g)


def _where(those: Array, words: Words) -> Words:
    """Zero elsewhere."""
    return jnp.where(those, words[0], 0), jnp.where(those, words[1], 0)


def _difference(new: Array, old: Array) -> Array:
    both = jnp.isfinite(new) & jnp.isfinite(old)
    return jnp.where(both, jnp.where(both, new, 0) - jnp.where(both, old, 0), 0)
