r"""The program of a coupled fit: EM on every cloud, minus the price of transport between the mixtures.

.. math:: J = \sum_i v_i \, \overline{\log p_i} - \sum_{(i, j)} \lambda_{ij} T(p_i, p_j)

One compiled loop over EM steps. Each reduces the clouds to statistics (`statistics`), then raises the expected objective of
all nodes at once (`m_step`); plans' potentials are carried through. The E-step and the M-step are traced once each: the
last round of the loop looks at where the fit has come to, and moves nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coupled_gmm import checks, entropic, m_step, matrices, report, solvers, statistics
from coupled_gmm.graph import MixtureGraph, to_parameters
from coupled_gmm.mixture import GaussianMixture
from coupled_gmm.result import Status
from coupled_gmm.statistics import Chunks, Parameters
from coupled_gmm.tree import pytree

_FALL = 1e-4  # an ascent that falls by this part of 1 + |J| has met more than rounding
_RUNNING = -1


@pytree
class History:
    """A row per EM step, before its M-step; NaN past the last. Of a graph, q and transport have a column per node and edge."""

    q: Float[Array, "steps V"]
    transport_terms: Float[Array, "steps E"]
    objective: Float[Array, " steps"]
    penalized_log_likelihood: Float[Array, " steps"]
    marginal_error: Float[Array, " steps"]

    @property
    def q0(self) -> Float[Array, " steps"]:
        return self.q[..., 0]

    @property
    def q1(self) -> Float[Array, " steps"]:
        if self.q.shape[-1] == 1:
            raise AttributeError("history.q1: the graph has one node, and q0 is its column; read history.q0")
        return self.q[..., 1]

    @property
    def transport(self) -> Float[Array, " steps"]:
        """Regularised transport cost, summed over edges."""
        return jnp.sum(self.transport_terms, axis=-1)


_NO_DERIVATIVE = (
    "a fit can't be differentiated: it is a run of an optimiser, not a value; differentiate "
    "coupled_gmm.penalized_log_likelihood at the fitted pair instead"
)


class _Data(NamedTuple):
    """Packed clouds about their common centre, and the ridge's floor of each node's variances."""

    chunks: Chunks
    origin: Float[Array, " d"]
    floors: Float[Array, "V d"]


def _prepare(clouds: list[Array | None], weights: list[Array | None], ridge: Array, length: int) -> _Data:
    """Clouds about their common centre: far from the origin, float32 would lose the shape of small components."""
    chunks = statistics.pack(clouds, weights, length)
    n_clouds = sum(cloud is not None for cloud in clouds)
    origin = jnp.einsum("cdb,cb->d", chunks.points, chunks.weights) / n_clouds
    chunks = Chunks(chunks.points - origin[:, None], chunks.weights, chunks.owners)
    return _Data(chunks, origin, ridge * statistics.variances(chunks, len(clouds)))


class Controls(NamedTuple):
    """What a user sweeps: leaves, whose change recompiles nothing."""

    ridge: Float[Array, ""]
    tol: Float[Array, ""]
    m_steps: Int[Array, ""]
    learning_rate: Float[Array, ""] | None


class Settings(NamedTuple):
    """What a fit's program depends on."""

    length: int
    em_steps: int
    solver: solvers.Solver
    optimizer: Any
    progress: bool


def _optimiser(optimizer: Any, learning_rate: Array | None) -> m_step.Optimiser:
    if optimizer is None:
        return m_step.lbfgs_optimiser()
    return m_step.optax_optimiser(optimizer if learning_rate is None else optimizer(learning_rate))


class _Carry(NamedTuple):
    step: Int[Array, ""]
    parameters: Parameters
    potentials: entropic.Potentials
    last: m_step.Terms
    value: Float[Array, ""]
    status: Int[Array, ""]
    history: History


class Run(NamedTuple):
    """Where a fit ended: the nodes there, its last look at J and its terms, and how it went."""

    nodes: GaussianMixture
    terms: m_step.Terms
    value: Float[Array, ""]
    status: Int[Array, ""]
    n_steps: Int[Array, ""]
    history: History


@matrices.precise
def run(
    problem: MixtureGraph,
    clouds: list[Array | None],
    weights: list[Array | None],
    controls: Controls,
    settings: Settings,
) -> Run:
    """The program of every fit; trace it inside ``jit``, with `settings` static."""
    problem, clouds, weights = checks.value_only((problem, clouds, weights), _NO_DERIVATIVE)
    dtype = problem.nodes.dtype
    controls = jax.tree.map(lambda c: c.astype(dtype) if jnp.issubdtype(c, jnp.floating) else c, controls)
    data = _prepare(clouds, weights, controls.ridge, settings.length)
    optimiser = _optimiser(settings.optimizer, controls.learning_rate)

    def em_step(carry: _Carry) -> _Carry:
        found = statistics.e_step(carry.parameters, data.chunks, data.floors)
        # The last round only looks at where the fit has come to.
        budget = jnp.where(carry.step < settings.em_steps, controls.m_steps, 1)
        moved = m_step.m_step(
            carry.parameters, found, data.floors, problem, carry.potentials, settings.solver, optimiser, budget
        )
        value = problem.node_weights @ found.log_likelihood - problem.edge_weights @ moved.initial.transport
        status = _status(carry, value, moved.marginal_error, controls.tol, settings)
        running = status == _RUNNING
        row = _row(problem, moved, value)
        history = jax.tree.map(lambda h, r: h.at[carry.step].set(jnp.where(running, r, jnp.nan)), carry.history, row)
        if settings.progress:
            report.emit(settings.em_steps, {"running": running, "step": carry.step, **_columns(row)})
        parameters = jax.tree.map(lambda new, old: jnp.where(running, new, old), moved.parameters, carry.parameters)
        step = carry.step + running
        return _Carry(step, parameters, moved.potentials, moved.initial, value, status, history)

    empty = m_step.no_terms(problem)
    nothing = History(empty.q, empty.transport, *jnp.zeros((3,), empty.q.dtype))
    history = jax.tree.map(lambda leaf: jnp.full((settings.em_steps, *leaf.shape), jnp.nan, leaf.dtype), nothing)
    start = _Carry(
        jnp.asarray(0),
        to_parameters(problem.nodes, data.origin),
        empty.potentials,
        empty,
        jnp.asarray(-jnp.inf, empty.q.dtype),
        jnp.asarray(_RUNNING),
        history,
    )
    end = jax.lax.while_loop(lambda carry: carry.status == _RUNNING, em_step, start)
    nodes = problem.fitted(end.parameters, data.origin)
    return Run(nodes, end.last, end.value, end.status, end.step, end.history)


def _columns(row: History) -> dict[str, Array]:
    names = ["transport", "objective", "penalized_log_likelihood", "marginal_error"]
    return {f"q{i}": q for i, q in enumerate(row.q)} | {name: getattr(row, name) for name in names}


def _row(problem: MixtureGraph, moved: m_step.MStep, value: Array) -> History:
    terms = moved.initial
    return History(terms.q, terms.transport, m_step.objective(terms, problem), value, moved.marginal_error)


def _status(carry: _Carry, value: Array, marginal_error: Array, tol: Array, settings: Settings) -> Int[Array, ""]:
    met = (tol > 0) & (carry.step > 0) & (value - carry.value <= tol)
    missed = jnp.fmax(jnp.nanmax(carry.history.marginal_error, initial=0), marginal_error) > m_step.MISSED
    out_of_steps = jnp.where(tol > 0, Status.NOT_CONVERGED, Status.STEPS_DONE)
    status = jnp.where(met, Status.CONVERGED, jnp.where(carry.step >= settings.em_steps, out_of_steps, _RUNNING))
    status = jnp.where((status != _RUNNING) & missed, Status.PLAN_NOT_CONVERGED, status)
    if settings.optimizer is None:  # whose steps only ever rise
        fell = (carry.step > 0) & (value < carry.value - _FALL * (1 + jnp.abs(carry.value)))
        status = jnp.where(fell, Status.COLLAPSED, status)
    return jnp.where(jnp.isfinite(value), status, Status.NOT_FINITE)


@matrices.precise
def value(
    problem: MixtureGraph, clouds: list[Array | None], weights: list[Array | None], ridge: Array, length: int
) -> Float[Array, ""]:
    """J at the graph's own nodes, differentiable once in them."""
    data = _prepare(clouds, weights, ridge, length)
    parameters = to_parameters(problem.nodes, data.origin)
    found = statistics.e_step(parameters, data.chunks, data.floors)
    start = m_step.no_terms(problem).potentials
    transport, _, _ = m_step.transport_terms(parameters, problem, start, solvers.solve_entropic)
    return problem.node_weights @ found.log_likelihood - problem.edge_weights @ transport
