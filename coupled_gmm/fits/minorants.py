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

from coupled_gmm.core.tree import AnyArray, chosen, take
from coupled_gmm.fits.coordinates import Coordinates
from coupled_gmm.fits.couplings import Couplings
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.m_step import SLACK, MStep
from coupled_gmm.fits.objective import Objective, Terms, no_terms
from coupled_gmm.fits.optimisers import Optimiser, Search
from coupled_gmm.fits.statistics import Parameters, Statistics
from coupled_gmm.transport import limits, masses
from coupled_gmm.transport.entropic import Potentials
from coupled_gmm.transport.masses import Links, Response
from coupled_gmm.transport.problem import TransportProblem


_HELD = 1e-2  # of a node's weight, by which its masses stay what they are


class _Planned(NamedTuple):
    """Plans and costs at the present masses, and at the ones that the clouds ask for at these costs."""

    before: Potentials
    after: Potentials
    log_weights: Float[Array, "V K"]
    couplings: Couplings


class _Climb(NamedTuple):
    """What the next pass needs of those before; the rest as in `MStep`."""

    x: Float[Array, " p"]
    log_weights: Float[Array, "V K"]
    potentials: Potentials
    initial: Terms
    marginal_error: Float[Array, ""]
    first_gain: Float[Array, ""]
    last_gain: Float[Array, ""]
    ahead: Float[Array, ""]
    left: Float[Array, ""]
    moved: Bool[Array, ""]
    n: Int[Array, ""]
    n_passes: Int[Array, ""]


def climb(
    objective: Objective,
    potentials: Potentials,
    optimiser: Optimiser,
    unit: Float[AnyArray, ""],
    budget: Int[Array, ""],
) -> MStep:
    """At most `budget` evaluations of minorants and their gradients, from the base of the statistics; the first is there."""
    graph, base, statistics = objective.graph, objective.statistics.base, objective.statistics
    coordinates = optimiser.coordinates(base, statistics, graph, unit)
    response = _response(graph, statistics)

    def a_pass(now: _Climb) -> _Climb:
        parameters = coordinates.parameters(now.x, now.log_weights)._replace(log_weights=now.log_weights)
        planned = _planned(parameters, graph, now.potentials, response)
        costs = planned.couplings.costs
        transport = _dual_values(graph, costs, planned.before)
        first = now.n == 0
        initial = Terms(objective.q(parameters), transport, costs, planned.before)
        gain = _gain_of_masses(objective, now.log_weights, planned, transport)
        good = jnp.all(planned.after.marginal_error <= limits.MAX_MARGINAL_ERROR) & (gain > 0)
        adopted = good & (budget > 1)
        log_weights = chosen(adopted, planned.log_weights, now.log_weights)
        used = chosen(adopted, planned.after, planned.before)
        search, n, start, slope = _search(objective, coordinates, optimiser, now, log_weights, (planned, used), budget)
        gain = jnp.where(good, gain, 0)
        risen = jnp.where(adopted, gain, 0) + start - search.state.value
        error = jnp.max(used.marginal_error, initial=0)
        error = jnp.where(first, jnp.fmax(error, jnp.max(planned.before.marginal_error, initial=0)), error)
        return _Climb(
            x=search.best,
            log_weights=log_weights,
            potentials=used,
            initial=chosen(first, initial, now.initial),
            marginal_error=jnp.fmax(now.marginal_error, error),
            first_gain=jnp.where(first, risen, now.first_gain),
            last_gain=risen,
            ahead=jnp.where(first, (gain + slope) / SLACK, now.ahead),
            left=search.left / SLACK,
            moved=now.moved | (risen > 0),
            n=n,
            n_passes=now.n_passes + 1,
        )

    import os
    passes = int(os.environ.get("PASSES", 1))

    def unfinished(now: _Climb) -> Bool[Array, ""]:
        return (now.n_passes == 0) | ((now.n_passes < passes) & (now.n < budget) & (now.last_gain > 0.03 * now.first_gain))

    zero = jnp.zeros((), base.means.dtype)
    start = _Climb(
        x=coordinates.start,
        log_weights=base.log_weights,
        potentials=potentials,
        initial=no_terms(graph),
        marginal_error=zero,
        first_gain=zero,
        last_gain=zero,
        ahead=zero,
        left=zero,
        moved=jnp.asarray(False),
        n=jnp.zeros((), jnp.int32),
        n_passes=jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(unfinished, a_pass, start)
    return MStep(
        parameters=coordinates.parameters(end.x, end.log_weights)._replace(log_weights=end.log_weights),
        initial=end.initial,
        potentials=end.potentials,
        marginal_error=end.marginal_error,
        moved=end.moved,
        ahead=end.ahead,
        left=end.left,
    )


def _response(graph: MixtureGraph, statistics: Statistics) -> Response:
    r"""What masses answer with: mostly what the clouds ask for, and with a small weight the present masses.

    That is a minorant again, since :math:`\\sum a_0 \\log (a / a_0) \\le 0`, and one that is curved enough where a cloud asks for 1e-20
    of a component. Masses of a node without a cloud are held by that alone, as much as by the entropy of its plans.
    """
    asked = (graph.node_weights > 0) & (jnp.sum(statistics.masses, axis=-1) > 0)
    entropy = jnp.zeros_like(graph.node_weights).at[graph.sources].add(graph.edge_weights * graph.epsilon)
    entropy = entropy.at[graph.targets].add(graph.edge_weights * graph.epsilon)
    held = jnp.where(asked, _HELD * graph.node_weights, jnp.where(entropy > 0, entropy, 1))
    asks = jnp.where(asked, graph.node_weights, 0)
    present = jnp.exp(statistics.base.log_weights)
    targets = asks[:, None] * statistics.masses + held[:, None] * present
    return Response(targets / (asks + held)[:, None], asks + held, ~graph.frozen)


def _problems(graph: MixtureGraph, costs: Array, log_weights: Array) -> TransportProblem:
    one, other = log_weights[graph.sources], log_weights[graph.targets]
    prices = {"epsilon": graph.epsilon, "rho": graph.rho, "balanced": graph.balanced}
    return TransportProblem.of_log_masses(costs, one, other, **prices)


def _dual_values(graph: MixtureGraph, costs: Array, potentials: Potentials) -> Float[Array, " E"]:
    problems = _problems(graph, costs, jnp.zeros((graph.n_nodes, costs.shape[-1]), costs.dtype))
    problems = problems.with_log_masses(potentials.log_a, potentials.log_b)
    return jax.vmap(TransportProblem.dual_objective)(problems, potentials.f, potentials.g)


def _log_plans(graph: MixtureGraph, costs: Array, potentials: Potentials) -> Float[Array, "E K K"]:
    problems = _problems(graph, costs, jnp.zeros((graph.n_nodes, costs.shape[-1]), costs.dtype))
    problems = problems.with_log_masses(potentials.log_a, potentials.log_b)
    return jax.vmap(TransportProblem.log_plan)(problems, potentials.f, potentials.g)


def _planned(parameters: Parameters, graph: MixtureGraph, near: Potentials, response: Response) -> _Planned:
    """Plans at exact costs wherever they move mass."""
    links = Links(jnp.stack([graph.sources, graph.targets]), graph.edge_weights)
    log_weights = parameters.log_weights
    tol = jnp.asarray(limits.fit_tolerance(log_weights.dtype), log_weights.dtype)
    least = jnp.log(jnp.finfo(log_weights.dtype).eps) - 7

    def moves_mass(costs: Array, potentials: Potentials, margin: float = 0) -> Bool[Array, "E K K"]:
        return _log_plans(graph, costs, potentials) > least - margin

    def a_round(index: Array, now: tuple[Potentials, Potentials, Array, Array]) -> tuple[Potentials, Potentials, Array, Array]:
        """At the present masses; at those that answer, from there; and between these for themselves."""
        before, last, log_masses, wanted, costs = now
        answers = response.free & (index == 1)
        asked = Response(response.targets, response.weights, answers)
        problems = _problems(graph, costs, log_masses)
        found, log_masses = masses.solve(
            problems, links, log_masses, (last.f, last.g), tol, limits.MAX_ITERATIONS_IN_FITS, asked
        )
        wanted = wanted | moves_mass(costs, found)
        return chosen(index == 0, found, before), found, log_masses, wanted, costs

    def look(now: tuple[_Planned, Array]) -> tuple[_Planned, Array]:
        planned, wanted = now
        couplings = planned.couplings.with_those(wanted, parameters, graph)
        start = planned.before, planned.before, log_weights, couplings.known, couplings.costs
        before, after, new, wanted, _ = jax.lax.fori_loop(0, 3, a_round, start)
        return _Planned(before, after, new, couplings), wanted

    couplings = Couplings.none(parameters, graph)
    if parameters.means.shape[-1] <= 2:
        wanted = jnp.ones_like(couplings.known)
    else:
        wanted = moves_mass(couplings.costs, near, margin=10)
    def unsettled(now: tuple[_Planned, Array]) -> Bool[Array, ""]:
        planned, wanted = now
        return (planned.couplings.count == 0) | jnp.any(wanted & ~planned.couplings.known)

    wanted = wanted.at[:, 0, 0].set(True)  # that there is a first look
    return jax.lax.while_loop(unsettled, look, (_Planned(near, near, log_weights, couplings), wanted))[0]


def _gain_of_masses(
    objective: Objective, log_weights: Array, planned: _Planned, transport: Array
) -> Float[Array, ""]:
    """What J gains by the masses that answer."""
    graph = objective.graph
    asked = objective.statistics.masses
    change = jnp.where(asked > 0, planned.log_weights - jnp.where(asked > 0, log_weights, 0), 0)
    after = _dual_values(graph, planned.couplings.costs, planned.after)
    return graph.node_weights @ jnp.sum(asked * change, axis=-1) - graph.edge_weights @ (after - transport)


def _search(
    objective: Objective,
    coordinates: Coordinates,
    optimiser: Optimiser,
    now: _Climb,
    log_weights: Array,
    plans: tuple[_Planned, Potentials],
    budget: Array,
) -> tuple[Search, Array, Array, Array]:
    """Means and factors for given masses, plans and couplings: the search at its end, evaluations, and value and slope at its start."""
    graph, (planned, used) = objective.graph, plans
    couplings = planned.couplings
    weights = graph.edge_weights[:, None, None] * jnp.exp(_log_plans(graph, couplings.costs, used))
    weights, couplings = jax.lax.stop_gradient((jnp.where(couplings.known, weights, 0), couplings))

    def loss(x: Array) -> Array:
        parameters = coordinates.parameters(x, log_weights)._replace(log_weights=log_weights)
        return couplings.price(parameters, weights) - graph.node_weights @ objective.q(parameters)

    def evaluate(carry: tuple[Search, Array, Array, Array]) -> tuple[Search, Array, Array, Array]:
        search, n, start, slope = carry
        value, gradient = jax.value_and_grad(loss)(search.trial)
        first = n == now.n
        search = optimiser.update(search, value, gradient)
        return search, n + 1, jnp.where(first, value, start), jnp.where(first, search.left, slope)

    def unfinished(carry: tuple[Search, Array, Array, Array]) -> Array:
        return (carry[1] < jnp.maximum(budget, now.n + 1)) & ~carry[0].done

    zero = jnp.zeros((), now.x.dtype)
    return jax.lax.while_loop(unfinished, evaluate, (optimiser.init(now.x), now.n, zero, zero))
