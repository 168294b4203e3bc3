r"""The program of a coupled fit: EM on every cloud, minus the price of transport between the mixtures.

.. math:: J = \sum_i v_i \, \overline{\log p_i} - \sum_{(i, j)} \lambda_{ij} T(p_i, p_j)

One compiled loop over EM steps. Each reduces the clouds to statistics (`statistics`), then raises the expected objective of
all nodes at once (`minorants`, or `m_step`); plans' potentials are carried through. The E-step and the M-step are traced once
each: the last round of the loop looks at where the fit has come to, and moves nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import checks, matrices, report
from coupled_gmm.core.expansions import two_sum
from coupled_gmm.core.status import Status, first_status
from coupled_gmm.core.tree import chosen, unchecked
from coupled_gmm.fits import frame, optimisers, statistics
from coupled_gmm.fits.frame import Sight
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.history import History
from coupled_gmm.fits.m_step import MStep, ascend
from coupled_gmm.fits.merged import merged
from coupled_gmm.fits.minorants import climb
from coupled_gmm.fits.objective import Objective, Terms, all_costs, no_terms
from coupled_gmm.fits.online import Earlier, MixtureStatistics, Moments, with_earlier
from coupled_gmm.fits.optimisers import Optimiser
from coupled_gmm.fits.request import Controls, FitOptions
from coupled_gmm.fits.statistics import Parameters
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport import entropic, limits

_FALL = 1e-4  # an ascent that falls by this part of 1 + |J| has met more than rounding
_A_FEW = 3  # steps that a fit would go on if it could
_ROUNDINGS = 64  # rounding units of 1 + |J| by which J may seem to fall
_RUNNING = -1


_NO_DERIVATIVE = (
    "a fit can't be differentiated: it is a run of an optimiser, not a value; differentiate "
    "coupled_gmm.penalized_log_likelihood at the fitted pair instead"
)


class Task(NamedTuple):
    """What the hooks of a fit share, and no step changes."""

    given: MixtureGraph  # where the fit starts, in data units
    graph: MixtureGraph  # with its prices in the unit of the frame
    sight: Sight
    floors: Float[Array, "V d"]
    earlier: Earlier | None
    controls: Controls
    options: FitOptions
    optimiser: Optimiser

    @property
    def by_minorants(self) -> bool:
        """Whether the M-step raises a minorant, which takes solved-for masses; else it evaluates the objective itself."""
        return bool(self.graph.n_edges) and self.optimiser.monotone and self.options.solver.solves_masses


class _Place(NamedTuple):
    """Where a fit stands: parameters, and what was seen of J there."""

    parameters: Parameters
    terms: Terms
    log_likelihoods: Float[Array, " V"]  # the densities' own
    penalized: Float[Array, " V"]  # with the ridge's term
    rest: Float[Array, " V"]  # what rounding has left of these
    value: Float[Array, ""]
    rise: Float[Array, ""]  # by which it was reached
    seen: Moments | None  # what all data say there of the components, where it is asked for


class FitState(NamedTuple):
    """What the next step of a fit needs of the steps before; how these went is in the history."""

    step: Int[Array, ""]
    base: statistics.Base  # of the next E-step
    potentials: entropic.Potentials  # from which its plans start
    place: _Place  # of the last E-step
    left: Float[Array, ""]  # what the last M-step promised and left undone
    moved: Bool[Array, ""]  # whether it moved at all
    status: Int[Array, ""]

    @property
    def running(self) -> Bool[Array, ""]:
        return self.status == _RUNNING


class Solution(NamedTuple):
    """Where a fit ended, in data units: the nodes there, J and its terms, and how it went."""

    nodes: GaussianMixture
    terms: Terms
    log_likelihoods: Float[Array, " V"]
    penalized: Float[Array, " V"]
    value: Float[Array, ""]
    status: Int[Array, ""]
    n_steps: Int[Array, ""]
    history: History
    feature_variance: Float[Array, ""]
    statistics: MixtureStatistics | None


class Underway(NamedTuple):
    """A fit between two of its steps: what the next needs, and a row of each that was done."""

    state: FitState
    history: History


def run(problem: MixtureGraph, sight: Sight, controls: Controls, options: FitOptions) -> Solution:
    """The program of every fit; trace it inside ``jit``, with `options` static."""
    begun = begin(problem, sight, controls, options)
    return go_on(problem, sight, controls, options, begun, controls.em_steps + 1)[1]


@matrices.precise
def begin(problem: MixtureGraph, sight: Sight, controls: Controls, options: FitOptions) -> Underway:
    """A fit before its first step."""
    problem, sight = checks.value_only((problem, sight), _NO_DERIVATIVE)
    task = prepare(problem, sight, controls, options)
    state = start(task)
    return Underway(state, no_rows(task, state))


@matrices.precise
def go_on(
    problem: MixtureGraph,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
    underway: Underway,
    until: Int[Array, ""],
    sums: statistics.Sums | None = None,
) -> tuple[Underway, Solution]:
    """A fit after steps up to a number, or where it ended; past the last, `em_steps`, it looks at where it has come to.

    With `sums`, of points that no program holds, one step: that which they lead to.
    """
    problem, sight = checks.value_only((problem, sight), _NO_DERIVATIVE)
    task = prepare(problem, sight, controls, options)
    if sums is not None:
        underway = advanced(task, underway, sums)
        return underway, finish(task, *underway)

    def em_step(underway: Underway) -> Underway:
        return advanced(task, underway, e_step(task, underway.state))

    def unfinished(underway: Underway) -> Bool[Array, ""]:
        return underway.state.running & (underway.state.step < until)

    underway = jax.lax.while_loop(unfinished, em_step, underway)
    return underway, finish(task, *underway)


def advanced(task: Task, underway: Underway, sums: statistics.Sums) -> Underway:
    """After the M-step that the whole clouds' sums lead to."""
    before, history = underway
    state, row = m_step(task, before, sums)
    history = jax.tree.map(lambda h, r: h.at[before.step].set(jnp.where(state.running, r, jnp.nan)), history, row)
    if task.options.progress:
        counts = {"running": state.running, "em_steps": task.controls.em_steps, "step": before.step}
        report.emit(task.controls.listener, {**counts, **row.columns})
    return Underway(state, history)


def prepare(problem: MixtureGraph, sight: Sight, controls: Controls, options: FitOptions) -> Task:
    dtype = problem.nodes.dtype
    controls = jax.tree.map(lambda c: c.astype(dtype) if jnp.issubdtype(c, jnp.floating) else c, controls)
    if options.optimizer is None:
        optimiser = optimisers.lbfgs_optimiser(patience=1e-2)
    else:
        rate = controls.learning_rate
        optimiser = optimisers.optax_optimiser(options.optimizer if rate is None else options.optimizer(rate))
    graph = in_frame(problem, sight.frame.unit)
    return Task(problem, graph, sight, sight.floors(controls.ridge), sight.earlier, controls, options, optimiser)


def start(task: Task) -> FitState:
    """Before the first step: at the given mixtures, no plan solved yet."""
    graph, frame_of = task.graph, task.sight.frame
    parameters = frame_of.parameters(task.given.nodes, jnp.where(graph.frozen[:, None], 0, task.floors))
    parameters = frame.apart(parameters, task.sight.has_cloud & ~graph.frozen)
    terms, zeros = no_terms(graph), jnp.zeros(graph.n_nodes, parameters.means.dtype)
    zero = jnp.zeros((), zeros.dtype)
    seen = None if task.sight.update is None else Moments.none(parameters)
    return FitState(
        step=jnp.asarray(0),
        base=statistics.Base.of(parameters),
        potentials=terms.potentials,
        place=_Place(parameters, terms, zeros, zeros, zeros, value=zero - jnp.inf, rise=zero, seen=seen),
        left=zero + jnp.inf,
        moved=jnp.asarray(True),
        status=jnp.asarray(_RUNNING),
    )


def e_step(task: Task, state: FitState) -> statistics.Sums:
    """What all points say of the present mixtures: sums, to which any source of points may add its own (`rows`)."""
    return statistics.additive_sums(state.base, task.sight.chunks, task.floors, state.place.penalized)


def m_step(task: Task, state: FitState, sums: statistics.Sums) -> tuple[FitState, History]:
    """The M-step, from the whole clouds' sums: J where the E-step was, whether the fit ends there, and where it goes next."""
    graph, controls = task.graph, task.controls
    found = statistics.centred(sums, state.base)
    if task.earlier is not None:
        found = with_earlier(found, task.earlier, task.floors, state.place.penalized)
    # The last round only looks at where the fit has come to.
    budget = jnp.where(state.step < controls.em_steps, controls.m_steps, 1)
    objective = Objective(found, task.floors, graph, task.options.solver)
    step = climb if task.by_minorants else ascend
    moved = step(objective, state.potentials, task.optimiser, task.sight.frame.unit, budget)
    place, gain = _arrived(state.place, found, moved, graph)
    fell = (state.step > 0) & (task.options.optimizer is None) & (gain < -_rounding(state.place, place))
    collapsed = fell & _has_collapsed(gain, place, graph)
    status = _status_of_step(state, place.value, gain, fell, collapsed, moved, controls)
    place = chosen(fell, state.place, place)  # J never falls: a step on which it did is taken back
    if task.by_minorants:
        leaps, moved = _or_merged(task, state, found, place, moved, status, gain)
        status = jnp.where(leaps, _RUNNING, status)
    after = FitState(
        step=state.step + (status == _RUNNING),
        base=statistics.Base.of(moved.parameters),
        potentials=moved.potentials,
        place=place,
        left=moved.left,
        moved=moved.moved,
        status=status,
    )
    return after, _row(task, place, moved.marginal_error)


def _or_merged(
    task: Task, state: FitState, found: statistics.Statistics, place: _Place, moved: MStep, status: Array, gain: Array
) -> tuple[Bool[Array, ""], MStep]:
    """Whether one Gaussian is better where a fit would end; or where it has one step left, and more than a few would be
    needed at its pace; and the step that goes there."""
    last, left = state.step == task.controls.em_steps - 1, state.step < task.controls.em_steps
    one, gains = merged(found, task.floors, task.graph, place.penalized, place.terms.transport)
    ends = jnp.where(status == _RUNNING, (state.step > 0) & last & (gains > _A_FEW * gain), left)
    leaps = ends & (gains > _rounding(place, place))
    parameters = jax.tree.map(
        lambda one, many: jnp.where(jnp.expand_dims(leaps, range(1, many.ndim)), one, many), one, moved.parameters
    )
    some = jnp.any(leaps)
    return some, moved._replace(parameters=parameters, left=jnp.where(some, jnp.inf, moved.left))


def finish(task: Task, state: FitState, history: History) -> Solution:
    """The mixtures, J and the status in data units; "converged" only where plans and mixtures allow it."""
    sight, place, graph = task.sight, state.place, task.graph
    nodes = task.given.fitted(sight.frame.mixture(place.parameters, sight.far))
    terms = place.terms.scaled(jnp.square(sight.frame.unit))
    if task.by_minorants and nodes.n_features > 2:  # of pairs between which no mass moves, a fit knows a lower bound
        costs = all_costs(place.parameters, graph)
        terms = terms._replace(costs=costs * jnp.square(sight.frame.unit))
    row = _row(task, place, jnp.zeros_like(place.value))
    return Solution(
        nodes=nodes,
        terms=terms,
        log_likelihoods=jnp.asarray(row.log_likelihoods),
        penalized=place.penalized - volume(task.sight),
        value=row.penalized_log_likelihood,
        status=_status_of_end(task, state, nodes),
        n_steps=state.step,
        history=history,
        feature_variance=sight.feature_variance,
        # J less Q is the entropy of the probabilities that Q is under.
        statistics=sight.statistics(place.parameters, place.seen, place.penalized - place.terms.q),
    )


def in_frame(problem: MixtureGraph, unit: Array) -> MixtureGraph:
    """The graph with its prices in the frame's unit: costs are squared lengths there too."""
    square = unit**2
    return dataclasses.replace(
        problem,
        edge_weights=problem.edge_weights * square,
        epsilon=problem.epsilon / square,
        rho=problem.rho / square,
    )


def _arrived(before: _Place, found: statistics.Statistics, moved: MStep, graph: MixtureGraph) -> tuple[_Place, Array]:
    """The place that was looked at, and what J has gained on the way to it, to less than a rounding unit of J."""
    penalized, rest = two_sum(before.penalized, found.penalized)
    log_likelihoods, terms = before.penalized + found.log_likelihood, moved.initial
    value = graph.node_weights @ penalized - graph.edge_weights @ terms.transport
    gain = graph.node_weights @ (found.penalized - before.rest)
    gain = gain - graph.edge_weights @ (terms.transport - before.terms.transport)
    rise = graph.node_weights @ jnp.abs(found.penalized)
    seen = None if before.seen is None else Moments.of(found)
    return _Place(found.base, terms, log_likelihoods, penalized, rest, value, rise, seen), gain


def _rounding(before: _Place, place: _Place) -> Array:
    """By what J may seem to fall: rounding of its own size, and of the step by which it came where it was before."""
    return _ROUNDINGS * jnp.finfo(place.value.dtype).eps * (1 + jnp.abs(place.value) + before.rise)


def _has_collapsed(gain: Array, place: _Place, graph: MixtureGraph) -> Bool[Array, ""]:
    """Whether a fall is more than what rounding may have done: of J, and of masses that go astray and pay for it."""
    astray = jnp.maximum(place.terms.potentials.marginal_error, 2 * jnp.finfo(gain.dtype).eps)
    costs = graph.edge_weights @ (astray * jnp.max(place.terms.costs, axis=(1, 2), initial=0))
    return gain < -_FALL * (1 + jnp.abs(place.value)) - costs


def _status_of_step(
    state: FitState, value: Array, gain: Array, fell: Array, collapsed: Array, moved: MStep, controls: Controls
) -> Int[Array, ""]:
    """Whether and why a fit ends here.

    It has converged where a step gained no more than the tolerance, and neither the M-step on the way here had left more
    undone nor the one from here promises more.
    """
    tol = controls.tol
    asked, still, steps_done = tol > 0, (state.step > 0) & (gain <= tol), state.step >= controls.em_steps
    met = asked & still & ~fell & (state.left <= tol) & (moved.ahead <= tol)
    stalled = asked & still & ~met & ~state.moved
    kept = jnp.where(fell, state.place.terms.marginal_error, 0)
    missed = jnp.fmax(kept, moved.marginal_error) > limits.MAX_MARGINAL_ERROR
    ends = [
        (~jnp.isfinite(value), Status.NOT_FINITE),
        # While the fit runs, the next plans may be good ones again.
        (missed & (fell | stalled | met | steps_done), Status.PLAN_NOT_CONVERGED),
        (collapsed, Status.COLLAPSED),
        (fell, jnp.where(asked, Status.PRECISION, Status.STEPS_DONE)),
        (stalled, Status.STALLED),
        (met, Status.CONVERGED),
        (steps_done, jnp.where(asked, Status.NOT_CONVERGED, Status.STEPS_DONE)),
    ]
    return first_status(ends, _RUNNING)


def _status_of_end(task: Task, state: FitState, nodes: GaussianMixture) -> Int[Array, ""]:
    """The status after a look at the last plans and mixtures: a fit has not converged whose plans have not, a component may
    have starved, and work that was done may have left one without a density in this precision."""
    plans, given = state.place.terms.potentials, task.given
    fitted, short = task.sight.has_cloud & ~given.frozen, ~plans.converged
    starved = jnp.any((nodes.weights == 0) & (given.nodes.weights > 0), axis=-1) & (not given.n_edges)
    singular = _singular(task.sight.frame.unit * state.place.parameters.factors, nodes.weights)
    converged, steps_done = state.status == Status.CONVERGED, state.status == Status.STEPS_DONE
    ends = [
        ((converged | steps_done) & jnp.any(singular & fitted), Status.SINGULAR),
        (converged & jnp.any(short & ~plans.stalled), Status.PLAN_NOT_CONVERGED),
        (converged & jnp.any(starved & fitted), Status.STARVED),
        (converged & jnp.any(short), Status.PRECISION),
    ]
    return first_status(ends, state.status)


def _singular(factors: Float[Array, "V K d d"], weights: Float[Array, "V K"]) -> Bool[Array, " V"]:
    """Whether a component has a pivot that `matrices.cholesky` will take for zero, with room for rounding."""
    pivots = jnp.diagonal(factors, axis1=-2, axis2=-1) ** 2
    least = 8 * jnp.finfo(pivots.dtype).eps * jnp.sum(factors**2, axis=-1) + jnp.finfo(pivots.dtype).tiny
    return jnp.any(jnp.any(pivots <= least, axis=-1) & (weights > 0), axis=-1)


def no_rows(task: Task, state: FitState) -> History:
    """The history before the first step: NaN, in as many rows as the program has room for."""
    row = _row(task, state.place, jnp.zeros_like(state.place.value))
    return jax.tree.map(lambda leaf: jnp.full((task.options.rows, *leaf.shape), jnp.nan, leaf.dtype), row)


def _row(task: Task, place: _Place, marginal_error: Array) -> History:
    """What was seen at a place, in data units."""
    unit, graph, terms, larger = task.sight.frame.unit, task.graph, place.terms, volume(task.sight)
    return unchecked(
        History,
        q=terms.q - larger,
        transport_terms=terms.transport * unit**2,
        objective=terms.total(graph) - graph.node_weights @ larger,
        penalized_log_likelihood=place.value - graph.node_weights @ larger,
        marginal_error=marginal_error,
        log_likelihoods=place.log_likelihoods - larger,
    )


def volume(sight: Sight) -> Float[Array, " V"]:
    """By what log-densities in the frame exceed those in data units: a density is per volume."""
    return jnp.where(sight.has_cloud, sight.n_features * jnp.log(sight.frame.unit), 0)
