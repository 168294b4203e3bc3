r"""The M-step on a graph: raise sum v_i Q_i - sum lambda_ij T_ij, all of whose terms are functions of the parameters alone.

Balanced transport has kinks in the masses: where they agree, or nearly, no gradient says how far they should part. For a
balanced pair the default therefore solves for masses and plan at once (`masses`), exactly, in each evaluation,
and searches over means and factors only; the objective it sees is smooth.

The transport cost enters by its dual value. Potentials are carried from one evaluation to the next and never
differentiated: by the envelope theorem the derivative at fixed potentials is that of the cost.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core.tree import chosen, taken
from coupled_gmm.fits.coordinates import Coordinates, log_cholesky_coordinates, natural_coordinates, thawed
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.statistics import Parameters, Statistics, expected_log_likelihood, maximiser
from coupled_gmm.gaussians import bures
from coupled_gmm.transport import duals, entropic, limits, masses
from coupled_gmm.transport.masses import Response
from coupled_gmm.transport.problem import TransportProblem
from coupled_gmm.transport.solvers import PlanSolver

_MEMORY = 8
_SLACK = 4.0  # by so much a slope's promise may exceed what is gained
_ARMIJO = 1e-4


class Terms(NamedTuple):
    """What an evaluation of the objective leaves: its parts, the cost matrices, the plans' potentials and errors."""

    q: Float[Array, " V"]
    transport: Float[Array, " E"]
    costs: Float[Array, "E K K"]
    potentials: entropic.Potentials

    @property
    def marginal_error(self) -> Float[Array, ""]:
        return jnp.max(self.potentials.marginal_error, initial=0)


def no_terms(graph: MixtureGraph) -> Terms:
    """Terms before any evaluation, with the potentials that the first plans start from."""
    n, k = graph.n_edges, graph.nodes.means.shape[1]
    zeros = jnp.zeros((n, k), graph.nodes.dtype)
    flags = jnp.zeros(n, bool)
    count = jnp.zeros(n, jnp.int32)
    potentials = entropic.Potentials(zeros, zeros, zeros, zeros, zeros[:, 0], count, flags, flags)
    return Terms(jnp.zeros(graph.n_nodes, zeros.dtype), zeros[:, 0], jnp.zeros((n, k, k), zeros.dtype), potentials)


def scaled(found: Terms, square: Float[Array, ""]) -> Terms:
    """The terms of transport in another unit, in which costs are so many times larger."""
    potentials = found.potentials
    potentials = dataclasses.replace(potentials, f=potentials.f * square, g=potentials.g * square)
    return found._replace(transport=found.transport * square, costs=found.costs * square, potentials=potentials)


def transport_terms(
    parameters: Parameters,
    graph: MixtureGraph,
    potentials: entropic.Potentials,
    solver: PlanSolver,
    response: Response | None = None,
) -> tuple[Float[Array, " E"], Float[Array, "E K K"], entropic.Potentials]:
    """Regularised transport cost of every edge, differentiable in the parameters; costs, and certifying potentials."""
    if not graph.n_edges:
        empty = no_terms(graph)
        return empty.transport, empty.costs, potentials

    def edge(one: Parameters, other: Parameters, epsilon: Array, rho: Array, start: entropic.Potentials):
        cost = bures.pairwise_cost(one.means, one.factors, other.means, other.factors)
        tol = jnp.asarray(limits.fit_tolerance(cost.dtype), cost.dtype)
        prices = {"epsilon": epsilon, "rho": rho, "balanced": graph.balanced}
        problem = TransportProblem.of_log_masses(cost, one.log_weights, other.log_weights, **prices)
        fixed, init = jax.lax.stop_gradient((problem, (start.f, start.g)))
        if response is None:
            solved = solver(fixed, init, tol, limits.MAX_ITERATIONS_IN_FITS)
        else:
            solved = masses.solve(fixed, init, tol, limits.MAX_ITERATIONS_IN_FITS, response)
            log_a = jnp.where(response.free[0], solved.log_a, one.log_weights)
            log_b = jnp.where(response.free[1], solved.log_b, other.log_weights)
            problem = problem.with_log_masses(log_a, log_b)
        value = duals.dual_value(problem, solved.f, solved.g)
        return value, *jax.lax.stop_gradient((cost, solved))

    sources, targets = taken(parameters, graph.sources), taken(parameters, graph.targets)
    return jax.vmap(edge)(sources, targets, graph.epsilon, graph.rho, potentials)


def terms(
    parameters: Parameters,
    statistics: Statistics,
    floors: Float[Array, "V d"],
    graph: MixtureGraph,
    potentials: entropic.Potentials,
    solver: PlanSolver,
    response: Response | None = None,
) -> Terms:
    transport, costs, solved = transport_terms(parameters, graph, potentials, solver, response)
    if response is not None:
        free = jnp.stack(response.free)[:, None]
        log_weights = jnp.where(free, _solved_log_weights(solved), parameters.log_weights)
        parameters = parameters._replace(log_weights=log_weights)
    q = jax.vmap(expected_log_likelihood)(parameters, statistics, floors)
    return Terms(q, transport, costs, solved)


def _solved_log_weights(potentials: entropic.Potentials) -> Float[Array, "2 K"]:
    """The log-weights of a pair's two nodes, where they were solved for with its one plan."""
    return jax.lax.stop_gradient(jnp.stack([potentials.log_a[0], potentials.log_b[0]]))


def _response(statistics: Statistics, graph: MixtureGraph, free: Bool[Array, ""]) -> Response:
    """How the masses of a pair answer to potentials: they maximise Q's part in them less the price of transport."""
    weighs = graph.node_weights > 0
    rates = graph.edge_weights[0] / jnp.where(weighs, graph.node_weights, 1)
    moving = free & ~graph.frozen
    return Response(tuple(statistics.masses), tuple(rates), tuple(moving))


def objective(found: Terms, graph: MixtureGraph) -> Float[Array, ""]:
    return graph.node_weights @ found.q - graph.edge_weights @ found.transport


class Search(NamedTuple):
    """An optimiser's state: the point it wants evaluated next, the best it vouches for, and what it remembers."""

    trial: Float[Array, " p"]
    best: Float[Array, " p"]
    memory: Any
    accepted: Bool[Array, ""]  # the last trial became the best
    done: Bool[Array, ""]
    left: Float[Array, ""]  # the gain that it still promises at the best


class Optimiser(NamedTuple):
    """Three functions of an optimiser of the M-step; values and gradients are to be minimised."""

    monotone: bool
    coordinates: Callable[[Parameters, Statistics, MixtureGraph, Array], Coordinates]
    init: Callable[[Array], Search]
    update: Callable[[Search, Array, Array], Search]


def optax_optimiser(transformation: optax.GradientTransformation) -> Optimiser:
    """Any optax optimiser in log-Cholesky coordinates: every step is taken."""

    def update(search: Search, value: Array, gradient: Array) -> Search:
        del value
        step, memory = transformation.update(gradient, search.memory, search.trial)
        trial = jnp.asarray(optax.apply_updates(search.trial, step))
        return Search(trial, trial, memory, jnp.asarray(True), search.done, search.left)

    def init(start: Array) -> Search:
        nothing = jnp.zeros((), start.dtype)
        return Search(start, start, transformation.init(start), jnp.asarray(True), jnp.asarray(False), nothing)

    return Optimiser(False, log_cholesky_coordinates, init, update)


class _Line(NamedTuple):
    """A line search from `best`: value there, direction, slope and step; and L-BFGS's own state."""

    value: Float[Array, ""]
    direction: Float[Array, " p"]
    slope: Float[Array, ""]
    step: Float[Array, ""]
    first_slope: Float[Array, ""]
    lbfgs: Any


def lbfgs_optimiser(patience: float = 1e-3) -> Optimiser:
    """L-BFGS in natural coordinates with a backtracking search: the objective never falls.

    It stops when the promised gain is `patience` of the first one, or under rounding.
    """
    transformation = optax.scale_by_lbfgs(memory_size=_MEMORY, scale_init_precond=False)

    def init(start: Array) -> Search:
        zero = jnp.zeros((), start.dtype)
        line = _Line(zero + jnp.inf, jnp.zeros_like(start), zero, zero + 1, zero, transformation.init(start))
        return Search(start, start, line, jnp.asarray(True), jnp.asarray(False), zero)

    def update(search: Search, value: Array, gradient: Array) -> Search:
        line: _Line = search.memory
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient))
        accepted = finite & (value <= line.value + _ARMIJO * line.step * line.slope)
        preconditioned, lbfgs = transformation.update(gradient, line.lbfgs, search.trial)
        preconditioned = jnp.asarray(preconditioned)
        slope = -jnp.vdot(preconditioned, gradient)
        downhill = slope < 0
        direction = jnp.where(downhill, -preconditioned, -gradient)
        slope = jnp.where(downhill, slope, -jnp.vdot(gradient, gradient))
        first = jnp.isinf(line.value)
        # A rejected step goes to the minimum of the parabola through both values and the slope, within bounds.
        bend = value - line.value - line.step * line.slope
        shrink = jnp.where(finite, -0.5 * line.step * line.slope / jnp.where(bend > 0, bend, 1), 0.1)
        longest = jnp.max(jnp.abs(direction))
        length = jnp.minimum(1, 2 / jnp.where(longest > 0, longest, 1))
        fresh = _Line(value, direction, slope, length, jnp.where(first, slope, line.first_slope), lbfgs)
        retry = line._replace(step=line.step * jnp.clip(shrink, 0.1, 0.5))
        line = chosen(accepted, fresh, retry)
        best = jnp.where(accepted, search.trial, search.best)
        rounding = jnp.finfo(value.dtype).eps * (1 + jnp.abs(line.value))
        gain = -line.step * line.slope
        done = (gain <= rounding) | (accepted & (-line.slope <= -patience * line.first_slope))
        trial = best + line.step * line.direction
        return Search(trial, best, line, accepted, done | (first & ~finite), -line.slope)

    return Optimiser(True, natural_coordinates, init, update)


class MStep(NamedTuple):
    """The parameters reached, the terms at the start, the potentials at the end and the worst marginal error between.

    And what tells whether it came to its end: whether it moved, what the objective promised to gain at its start where the
    optimiser does not look at that, and what it still promises at the end.
    """

    parameters: Parameters
    initial: Terms
    potentials: entropic.Potentials
    marginal_error: Float[Array, ""]
    moved: Bool[Array, ""]
    ahead: Float[Array, ""]
    left: Float[Array, ""]


class _Progress(NamedTuple):
    search: Search
    initial: Terms
    potentials: entropic.Potentials
    log_weights: Float[Array, "V K"]  # what the coordinates are relative to; at the best, while they are solved for
    solves_masses: Bool[Array, ""]
    marginal_error: Float[Array, ""]
    ahead: Float[Array, ""]
    moved: Bool[Array, ""]
    n: Int[Array, ""]


def m_step(
    statistics: Statistics,
    floors: Float[Array, "V d"],
    graph: MixtureGraph,
    potentials: entropic.Potentials,
    solver: PlanSolver,
    optimiser: Optimiser,
    unit: Float[Array, ""],
    budget: Int[Array, ""],
) -> MStep:
    """At most `budget` evaluations of the objective and its gradient, from the base of the statistics; the first is there.

    A graph without edges is plain EM, and has its maximiser in closed form.
    """
    base, yes = statistics.base, jnp.asarray(True)
    if not graph.n_edges:
        q = jax.vmap(expected_log_likelihood)(base, statistics, floors)
        best, gains = maximiser(statistics, floors)
        zero, ahead = jnp.zeros((), base.means.dtype), graph.node_weights @ jnp.where(graph.frozen, 0, gains)
        moved = thawed(graph.frozen, best, base)
        return MStep(moved, no_terms(graph)._replace(q=q), potentials, zero, yes, ahead, zero)
    coordinates = optimiser.coordinates(base, statistics, graph, unit)
    may_solve = optimiser.monotone and graph.balanced and graph.matched and solver.solves_masses

    def loss(x: Array, now: _Progress) -> tuple[Array, Terms]:
        free = now.solves_masses & (now.n > 0)
        response = _response(statistics, graph, free) if may_solve else None
        parameters = coordinates.parameters(x, now.log_weights)
        if may_solve:  # solved-for weights are no unknowns of the search
            fixed = jax.lax.stop_gradient(parameters.log_weights)
            parameters = parameters._replace(log_weights=jnp.where(now.solves_masses, fixed, parameters.log_weights))
        found = terms(parameters, statistics, floors, graph, now.potentials, solver, response)
        return -objective(found, graph), found

    def unfinished(now: _Progress) -> Bool[Array, ""]:
        return (now.n < budget) & ~now.search.done

    def evaluate(now: _Progress) -> _Progress:
        (value, found), gradient = jax.value_and_grad(loss, has_aux=True)(now.search.trial, now)
        # A trial that overshot into infinity, or has no plan, is the optimiser's to reject; nothing is carried on from it.
        finite = jnp.isfinite(value) & jnp.isfinite(found.marginal_error)
        if optimiser.monotone:
            finite &= (now.n == 0) | (found.marginal_error <= limits.MAX_MARGINAL_ERROR)
            value = jnp.where(finite, value, jnp.inf)
        search = optimiser.update(now.search, value, gradient)
        accepted = search.accepted & finite

        log_weights = now.log_weights
        if may_solve:
            solved = _solved_log_weights(found.potentials)
            log_weights = chosen(accepted & now.solves_masses, solved, log_weights)
        return _Progress(
            search,
            chosen(now.n == 0, found, now.initial),
            chosen(accepted, found.potentials, now.potentials),
            log_weights,
            now.solves_masses & finite,  # where that fails, weights are searched for like the rest
            # The first evaluation counts whatever it finds: it is where the fit is.
            jnp.where(
                accepted | (now.n == 0), jnp.maximum(now.marginal_error, found.marginal_error), now.marginal_error
            ),
            jnp.where(now.n == 0, coordinates.promise(gradient) / _SLACK, now.ahead),
            now.moved | ((now.n > 0) & search.accepted),
            now.n + 1,
        )

    zero = jnp.zeros((), base.means.dtype)
    search = optimiser.init(coordinates.start)
    count = jnp.zeros((), jnp.int32)
    # Masses of a node of weight zero follow no cloud: there is nothing that they would answer with.
    solves = jnp.all((graph.node_weights > 0) | graph.frozen)
    start = _Progress(search, no_terms(graph), potentials, base.log_weights, solves, zero, zero, ~yes, count)
    end = jax.lax.while_loop(unfinished, evaluate, start)
    reached = coordinates.parameters(end.search.best, end.log_weights)
    moved = end.moved | (not optimiser.monotone)
    return MStep(reached, end.initial, end.potentials, end.marginal_error, moved, end.ahead, end.search.left / _SLACK)
