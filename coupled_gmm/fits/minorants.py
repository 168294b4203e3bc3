r"""The M-step by minorants: masses and plans of all edges at once, then means and factors under fixed plans and couplings.

Both parts raise the objective by no more than they seem to. Masses and plans are solved for exactly at the present costs
(`masses`). With the plans that come out, and the couplings of the components between which they move mass, the price of transport
is a quadratic function of means and factors that is never below the cost and meets it at the start (`couplings`): a search
raises Q less that price, by evaluations in which there is neither a plan nor a polar factor.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core.tree import AnyArray, chosen
from coupled_gmm.fits.coordinates import Coordinates
from coupled_gmm.fits.couplings import Couplings
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.m_step import SLACK, MStep
from coupled_gmm.fits.objective import Objective, Terms
from coupled_gmm.fits.optimisers import Optimiser, Search
from coupled_gmm.fits.statistics import Parameters, Statistics
from coupled_gmm.transport import limits, masses
from coupled_gmm.transport.entropic import Potentials
from coupled_gmm.transport.masses import Joins, Response
from coupled_gmm.transport.problem import TransportProblem

_HELD = 1e-2  # of a node's weight, by which its masses stay what they are
_STIFFEST = 30.0  # in units of what masses answer with, the weight of the entropy of plans that they answer to


class _Planned(NamedTuple):
    """Plans at the present masses, and at those that answer to them, each of its own masses; with the couplings they need."""

    before: Potentials
    after: Potentials
    log_weights: Float[Array, "V K"]
    couplings: Couplings


class _Look(NamedTuple):
    """Plans on their way: whose turn is next, how far off the last of it were, and the pairs whose costs are wanted exactly."""

    turn: Int[Array, ""]
    error: Float[Array, ""]
    wanted: Bool[Array, "E K K"]
    planned: _Planned


class _Search(NamedTuple):
    """A search for means and factors: what was found where it began, and how many evaluations it has taken."""

    search: Search
    value: Float[Array, ""]
    slope: Float[Array, ""]
    q: Float[Array, " V"]
    n: Int[Array, ""]


def climb(
    objective: Objective,
    potentials: Potentials,
    optimiser: Optimiser,
    unit: Float[AnyArray, ""],
    budget: Int[Array, ""],
) -> MStep:
    """At most `budget` evaluations of a minorant and its gradient, from the base of the statistics; the first is there."""
    graph, base, statistics = objective.graph, objective.statistics.base, objective.statistics
    response = _response(graph, statistics)
    planned = _planned(base, graph, potentials, response)
    costs = planned.couplings.costs
    transport, later = (_dual_values(graph, costs, found) for found in (planned.before, planned.after))
    asked = statistics.masses
    some = (asked > 0) & (response.targets > 0) & ~graph.frozen[:, None]
    change = jnp.where(some, planned.log_weights - jnp.where(some, base.log_weights, 0), 0)
    change = jnp.sum(asked * change, axis=-1)
    gain = graph.node_weights @ change - graph.edge_weights @ (later - transport)
    error, later_error = (jnp.max(found.marginal_error, initial=0) for found in (planned.before, planned.after))
    # A plan that misses its marginals seems to cost less than it does, which counts where edges weigh much.
    missed, farthest = planned.after.marginal_error, jnp.max(costs, axis=(1, 2), initial=0)
    heavy = graph.edge_weights * farthest > jnp.max(graph.node_weights)
    doubt = jnp.where(heavy & (missed > 8 * jnp.finfo(missed.dtype).eps), missed * farthest, 0)
    good = (later_error <= limits.MAX_MARGINAL_ERROR) & (gain > graph.edge_weights @ doubt)
    adopted, worst = good & (budget > 1), jnp.fmax(error, later_error)
    log_weights = chosen(adopted, planned.log_weights, base.log_weights)
    used = chosen(adopted, planned.after, planned.before)

    coordinates = optimiser.coordinates(base, statistics, graph, unit, objective.floors)
    weights = graph.edge_weights[:, None, None] * jnp.exp(_log_plans(graph, costs, used))
    weights = jnp.where(planned.couplings.known, weights, 0)
    end = _search(objective, coordinates, optimiser, log_weights, planned.couplings, weights, budget)
    gain = jnp.where(good, gain, 0)
    return MStep(
        parameters=coordinates.parameters(end.search.best, log_weights)._replace(log_weights=log_weights),
        initial=Terms(end.q - jnp.where(adopted, change, 0), transport, costs, planned.before),
        potentials=used,
        # Masses that links make agree, and that were not found, are no end to be content with.
        marginal_error=jnp.where(adopted, worst, error) if graph.links is None else worst,
        moved=adopted | (end.search.state.value < end.value),
        ahead=(gain + end.slope) / SLACK,
        left=end.search.left / SLACK,
    )


def _response(graph: MixtureGraph, statistics: Statistics) -> Response:
    r"""What masses answer with: mostly what the clouds ask for, and with a small weight the present masses.

    That is a minorant again, since :math:`\sum a_0 \log (a / a_0) \le 0`, and one that is curved enough where a cloud asks for
    1e-20 of a component, or where entropy weighs so much more than the clouds that masses would answer to potentials' rounding.
    Masses of a node without a cloud are held by that alone, as much as by the entropy of its plans. A component of which less
    is left than rounding of rounding is none.
    """
    asked = (graph.node_weights > 0) & (jnp.sum(statistics.masses, axis=-1) > 0)
    entropy = jnp.zeros_like(graph.node_weights).at[graph.sources].add(graph.edge_weights * graph.epsilon)
    entropy = entropy.at[graph.targets].add(graph.edge_weights * graph.epsilon)
    least = jnp.maximum(_HELD * graph.node_weights, entropy / _STIFFEST - graph.node_weights)
    held = jnp.where(asked, least, jnp.where(entropy > 0, entropy, 1))
    asks = jnp.where(asked, graph.node_weights, 0)
    present = jnp.exp(statistics.base.log_weights)
    targets = (asks[:, None] * statistics.masses + held[:, None] * present) / (asks + held)[:, None]
    info = jnp.finfo(targets.dtype)
    return Response(jnp.where(targets > info.tiny / info.eps, targets, 0), asks + held, ~graph.frozen)


def _problems(graph: MixtureGraph, costs: Array, log_a: Array, log_b: Array) -> TransportProblem:
    return TransportProblem.of_log_masses(costs, log_a, log_b, epsilon=graph.epsilon, rho=graph.rho, links=graph.links)


def _dual_values(graph: MixtureGraph, costs: Array, potentials: Potentials) -> Float[Array, " E"]:
    problems = _problems(graph, costs, potentials.log_a, potentials.log_b)
    return jax.vmap(TransportProblem.dual_objective)(problems, *potentials.words)


def _log_plans(graph: MixtureGraph, costs: Array, potentials: Potentials) -> Float[Array, "E K K"]:
    problems = _problems(graph, costs, potentials.log_a, potentials.log_b)
    return jax.vmap(TransportProblem.log_plan)(problems, *potentials.words)


def _planned(parameters: Parameters, graph: MixtureGraph, near: Potentials, response: Response) -> _Planned:
    """Plans at exact costs wherever they move mass."""
    joins = Joins(jnp.stack([graph.sources, graph.targets]), graph.edge_weights)
    log_weights = parameters.log_weights
    tol = jnp.asarray(limits.fit_tolerance(log_weights.dtype), log_weights.dtype)
    least = jnp.log(jnp.finfo(log_weights.dtype).eps) - 7

    def moves_mass(costs: Array, potentials: Potentials, margin: float = 0) -> Bool[Array, "E K K"]:
        return _log_plans(graph, costs, potentials) > least - margin

    def look(now: _Look) -> _Look:
        turn, error, wanted, (before, after, log_masses, couplings) = now
        couplings = couplings.with_those(wanted, parameters, graph)
        log_masses = jnp.where(turn == 0, log_weights, log_masses)
        asked = Response(response.targets, response.weights, response.free & (turn == 1))
        problems, init = _problems(graph, couplings.costs, *log_masses[joins.ends]), after.words
        found, log_masses = masses.solve(problems, joins, log_masses, init, tol, limits.MAX_ITERATIONS_IN_FITS, asked)
        wanted = couplings.known | moves_mass(couplings.costs, found)
        exact, missed = jnp.all(wanted == couplings.known), jnp.max(found.marginal_error, initial=0)
        # From where they are, plans at a small epsilon come nearer: potentials' rounding is that of their change.
        nearer = (turn != 1) & jnp.any(found.stalled) & (missed < 0.5 * error)
        before = chosen(turn == 0, found, before)
        turn, error = jnp.where(exact, jnp.where(nearer, turn, turn + 1), 0), jnp.where(exact & nearer, missed, jnp.inf)
        return _Look(turn, error, wanted, _Planned(before, found, log_masses, couplings))

    couplings = Couplings.none(parameters, graph)
    few = parameters.means.shape[-1] <= 2  # features: a cost costs nothing
    wanted = jnp.ones_like(couplings.known) if few else moves_mass(couplings.costs, near, margin=10)
    start = _Look(jnp.zeros((), jnp.int32), tol + jnp.inf, wanted, _Planned(near, near, log_weights, couplings))
    turns = jnp.where(jnp.all(jnp.isinf(graph.rho)), 2, 3)  # balanced, plans come out with the masses
    return jax.lax.while_loop(lambda now: now.turn < turns, look, start).planned


def _search(
    objective: Objective,
    coordinates: Coordinates,
    optimiser: Optimiser,
    log_weights: Float[Array, "V K"],
    couplings: Couplings,
    weights: Float[Array, "E K K"],
    budget: Int[Array, ""],
) -> _Search:
    """Means and factors, with masses, plans and couplings as they are."""
    graph = objective.graph

    def loss(x: Array) -> tuple[Array, Array]:
        parameters = coordinates.parameters(x, log_weights)._replace(log_weights=log_weights)
        q = objective.q(parameters)
        return couplings.price(parameters, weights) - graph.node_weights @ q, q

    def evaluate(now: _Search) -> _Search:
        (value, q), gradient = jax.value_and_grad(loss, has_aux=True)(now.search.trial)
        search = optimiser.update(now.search, value, gradient)
        found = _Search(search, value, search.left, q, now.n + 1)
        return chosen(now.n == 0, found, now._replace(search=search, n=now.n + 1))

    def unfinished(now: _Search) -> Bool[Array, ""]:
        return (now.n < budget) & ~now.search.done

    zero = jnp.zeros((), log_weights.dtype)
    start = _Search(
        optimiser.init(coordinates.start), zero, zero, jnp.zeros_like(graph.node_weights), jnp.zeros((), jnp.int32)
    )
    return jax.lax.while_loop(unfinished, evaluate, start)
