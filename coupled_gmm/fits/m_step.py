"""The M-step on a graph: a search that raises the objective, from the parameters that the E-step was made under."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core.tree import AnyArray, chosen
from coupled_gmm.fits.coordinates import restore_frozen
from coupled_gmm.fits.objective import Objective, Terms, no_terms
from coupled_gmm.fits.optimisers import Optimiser, Search
from coupled_gmm.fits.statistics import Parameters, maximiser
from coupled_gmm.transport import entropic, limits

SLACK = 4.0  # by so much a slope's promise may exceed what is gained


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


class _Ascent(NamedTuple):
    """What the next evaluation needs of those before; the rest as in `MStep`."""

    search: Search
    initial: Terms
    potentials: entropic.Potentials
    marginal_error: Float[Array, ""]
    ahead: Float[Array, ""]
    moved: Bool[Array, ""]
    n: Int[Array, ""]  # evaluations so far


def ascend(
    objective: Objective,
    potentials: entropic.Potentials,
    optimiser: Optimiser,
    unit: Float[AnyArray, ""],
    budget: Int[Array, ""],
) -> MStep:
    """At most `budget` evaluations of the objective and its gradient, from the base of the statistics; the first is there.

    A graph without edges is plain EM, and has its maximiser in closed form.
    """
    graph, base = objective.graph, objective.statistics.base
    if not graph.n_edges:
        return _closed_form(objective, potentials)
    coordinates = optimiser.coordinates(base, objective.statistics, graph, unit, objective.floors)

    def loss(x: Array, now: _Ascent) -> tuple[Array, Terms]:
        found = objective.terms(coordinates.parameters(x, base.log_weights), now.potentials)
        return -found.total(graph), found

    def unfinished(now: _Ascent) -> Bool[Array, ""]:
        return (now.n < budget) & ~now.search.done

    def evaluate(now: _Ascent) -> _Ascent:
        (value, found), gradient = jax.value_and_grad(loss, has_aux=True)(now.search.trial, now)
        first = now.n == 0
        # A trial that overshot into infinity, or has no plan, is the optimiser's to reject; nothing is carried on from it.
        finite = jnp.isfinite(value) & jnp.isfinite(found.marginal_error)
        if optimiser.monotone:
            finite &= first | (found.marginal_error <= limits.MAX_MARGINAL_ERROR)
            value = jnp.where(finite, value, jnp.inf)
        search = optimiser.update(now.search, value, gradient)
        accepted = search.accepted & finite
        largest = jnp.maximum(now.marginal_error, found.marginal_error)
        return _Ascent(
            search=search,
            initial=chosen(first, found, now.initial),
            potentials=chosen(accepted, found.potentials, now.potentials),
            # The first evaluation counts whatever it finds: it is where the fit is.
            marginal_error=jnp.where(accepted | first, largest, now.marginal_error),
            ahead=jnp.where(first, coordinates.promise(gradient) / SLACK, now.ahead),
            moved=now.moved | (~first & search.accepted),
            n=now.n + 1,
        )

    zero = jnp.zeros((), base.means.dtype)
    start = _Ascent(
        search=optimiser.init(coordinates.start),
        initial=no_terms(graph),
        potentials=potentials,
        marginal_error=zero,
        ahead=zero,
        moved=jnp.asarray(False),
        n=jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(unfinished, evaluate, start)
    return MStep(
        parameters=coordinates.parameters(end.search.best, base.log_weights),
        initial=end.initial,
        potentials=end.potentials,
        marginal_error=end.marginal_error,
        moved=end.moved | (not optimiser.monotone),
        ahead=end.ahead,
        left=end.search.left / SLACK,
    )


def _closed_form(objective: Objective, potentials: entropic.Potentials) -> MStep:
    """The M-step without transport: its maximiser at once."""
    graph, base = objective.graph, objective.statistics.base
    best, gains = maximiser(objective.statistics, objective.floors)
    zero = jnp.zeros((), base.means.dtype)
    return MStep(
        parameters=restore_frozen(graph.frozen, best, base),
        initial=no_terms(graph)._replace(q=objective.q(base)),
        potentials=potentials,
        marginal_error=zero,
        moved=jnp.asarray(True),
        ahead=graph.node_weights @ jnp.where(graph.frozen, 0, gains),
        left=zero,
    )
