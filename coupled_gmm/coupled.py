r"""Coupled fits: EM on every cloud, minus the price of transport between the mixtures.

.. math:: J = \sum_i v_i \, \overline{\log p_i} - \sum_{(i, j)} \lambda_{ij} T(p_i, p_j)

One compiled loop over EM steps. Each reduces the clouds to statistics (`statistics`), then raises the expected objective of
all nodes at once (`m_step`); plans' potentials are carried through. A fit is a run, not a value: it can't be differentiated,
the penalised log-likelihood can.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from coupled_gmm import checks, entropic, m_step, plan, report, statistics
from coupled_gmm.graph import MixtureGraph, to_parameters
from coupled_gmm.mixture import GaussianMixture
from coupled_gmm.pair import GaussianMixturePair
from coupled_gmm.plan import Plan
from coupled_gmm.result import Outcome, Status
from coupled_gmm.statistics import Chunks, Parameters
from coupled_gmm.tree import new, pytree

_MISSED = 1e-3  # a plan in the fit with a larger marginal error is no transport plan, and the fit says so


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
        return self.q[..., 1]

    @property
    def transport(self) -> Float[Array, " steps"]:
        """Regularised transport cost, summed over edges."""
        return jnp.sum(self.transport_terms, axis=-1)


@pytree
class GraphFit(Outcome):
    """A fitted graph: its mixtures, its plans edge by edge, and how it went."""

    gmms: list[GaussianMixture]
    plans: Plan  # of the padded mixtures, stacked on a leading axis E
    penalized_log_likelihood: Float[Array, ""]
    status: Int[Array, ""]
    n_steps: Int[Array, ""]
    history: History


@pytree
class PairFit(Outcome):
    """A fitted pair with its plan, and how the fit went."""

    pair: GaussianMixturePair
    plan: Plan
    penalized_log_likelihood: Float[Array, ""]
    status: Int[Array, ""]
    n_steps: Int[Array, ""]
    history: History


@jax.custom_jvp
def _not_differentiable(x: Any) -> Any:
    return x


@_not_differentiable.defjvp
def _refuse(primals, tangents):
    raise TypeError(
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
    solver: plan.Solver
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


_RUNNING = -1


@functools.partial(jax.jit, static_argnames="settings")
def _fit(
    problem: MixtureGraph,
    clouds: list[Array | None],
    weights: list[Array | None],
    controls: Controls,
    settings: Settings,
) -> tuple[_Carry, Float[Array, " d"]]:
    problem, clouds, weights = jax.tree.map(_not_differentiable, (problem, clouds, weights))
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
        status = _status(carry, value, moved.marginal_error, controls.tol, settings.em_steps)
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
    return end, data.origin


def _columns(row: History) -> dict[str, Array]:
    names = ["q0", "q1", "transport", "objective", "penalized_log_likelihood", "marginal_error"]
    return {name: getattr(row, name) for name in names if name != "q1" or row.q.shape[-1] > 1}


def _row(problem: MixtureGraph, moved: m_step.MStep, value: Array) -> History:
    terms = moved.initial
    return History(terms.q, terms.transport, m_step.objective(terms, problem), value, moved.marginal_error)


def _status(carry: _Carry, value: Array, marginal_error: Array, tol: Array, em_steps: int) -> Int[Array, ""]:
    met = (tol > 0) & (carry.step > 0) & (value - carry.value <= tol)
    missed = jnp.fmax(jnp.nanmax(carry.history.marginal_error, initial=0), marginal_error) > _MISSED
    out_of_steps = jnp.where(tol > 0, Status.NOT_CONVERGED, Status.STEPS_DONE)
    status = jnp.where(met, Status.CONVERGED, jnp.where(carry.step >= em_steps, out_of_steps, _RUNNING))
    status = jnp.where((status != _RUNNING) & missed, Status.PLAN_NOT_CONVERGED, status)
    return jnp.where(jnp.isfinite(value), status, Status.NOT_FINITE)


class _Run(NamedTuple):
    """How a fit was asked for, checked."""

    controls: Controls
    em_steps: int
    optimizer: Any
    method: str
    chunk_size: int | None
    progress: Any


def _run(
    problem: MixtureGraph, clouds: list[Array | None], weights: list[Array | None], solver: plan.Solver, run: _Run
) -> tuple[_Carry, Float[Array, " d"]]:
    n_points = max(len(cloud) for cloud in clouds if cloud is not None)
    length = statistics.chunk_length(n_points, *problem.nodes.means.shape[1:], run.chunk_size)
    progress = run.progress is not False and run.progress is not None
    settings = Settings(length, run.em_steps, solver, run.optimizer, progress)
    with report.listening(run.progress):
        return _fit(problem, clouds, weights, run.controls, settings)


def _check_run(
    em_steps: int,
    m_steps: int,
    optimizer: Any,
    learning_rate: Any,
    tol: Any,
    ridge: Any,
    method: str,
    chunk_size: int | None,
    progress: Any,
) -> _Run:
    built = isinstance(optimizer, optax.GradientTransformation)
    if optimizer is not None and not built and not callable(optimizer):
        raise TypeError(
            f"optimizer: expected None, an optax factory such as optax.adam, or a built optax transformation, "
            f"got {type(optimizer).__name__}"
        )
    factory = optimizer is not None and not built
    if factory and learning_rate is None:
        raise ValueError("learning_rate: an optax factory needs one; pass learning_rate=1e-2, say")
    if learning_rate is not None:
        if not factory:
            raise ValueError("learning_rate: goes with an optax factory only, such as optimizer=optax.adam; drop it")
        learning_rate = checks.scalar("learning_rate", learning_rate, above=0, batched=True)
    controls = Controls(
        checks.scalar("ridge", ridge, at_least=0, batched=True),
        checks.scalar("tol", tol, at_least=0, batched=True),
        jnp.asarray(checks.integer("m_steps", m_steps, 1)),
        learning_rate,
    )
    checks.choice("method", method, plan.METHODS)
    if chunk_size is not None:
        checks.integer("chunk_size", chunk_size, 1)
    return _Run(controls, checks.integer("em_steps", em_steps, 1), optimizer, method, chunk_size, progress)


def _check_cloud(name: str, x: Any, weights_name: str, weights: Any, gmm: GaussianMixture) -> tuple[Array, Any]:
    cloud = checks.points(name, x, gmm.n_features).astype(gmm.dtype)
    if weights is not None:
        weights = checks.weights(weights_name, weights, len(cloud)).astype(gmm.dtype)
    return cloud, weights


def _plans(problem: MixtureGraph, end: _Carry, nodes: GaussianMixture) -> Plan:
    ends = (jax.tree.map(lambda leaf: leaf[index], nodes) for index in (problem.sources, problem.targets))
    one, other = ends
    pairs = new(
        GaussianMixturePair, gmm0=one, gmm1=other, epsilon=problem.epsilon, rho=problem.rho, balanced=problem.balanced
    )
    return plan.from_potentials(pairs, end.last.costs, end.last.potentials)


@jax.jit
def _graph_fit(problem: MixtureGraph, end: _Carry, origin: Array) -> GraphFit:
    nodes = problem.fitted(end.parameters, origin)
    return GraphFit(
        problem.split(nodes), _plans(problem, end, nodes), end.value, end.status, end.step, end.history
    )


@jax.jit
def _pair_fit(problem: MixtureGraph, end: _Carry, origin: Array) -> PairFit:
    fit = _graph_fit(problem, end, origin)
    k0, k1 = problem.sizes
    stacked = jax.tree.map(lambda leaf: leaf[0], fit.plans)
    pair = stacked.pair.replace(*fit.gmms)
    f, g = stacked.potentials
    whole = new(
        Plan,
        pair=pair,
        cost=stacked.cost[:k0, :k1],
        potentials=(f[:k0], g[:k1]),
        status=stacked.status,
        n_iterations=stacked.n_iterations,
    )
    return PairFit(pair, whole, fit.penalized_log_likelihood, fit.status, fit.n_steps, fit.history)


def penalized_log_likelihood(
    pair: GaussianMixturePair,
    x0: Any,
    x1: Any,
    *,
    transport_weight: Any,
    point_weights0: Any = None,
    point_weights1: Any = None,
    ridge: Any = 1e-6,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    r"""The objective of `fit_pair` at a pair, differentiable once in both mixtures.

    .. math:: J = \overline{\log p_0} + \overline{\log p_1} - \lambda T(p_0, p_1)

    Arguments and errors as in `fit_pair`.
    """
    checks.instance("pair", pair, GaussianMixturePair)
    x0, w0 = _check_cloud("x0", x0, "point_weights0", point_weights0, pair.gmm0)
    x1, w1 = _check_cloud("x1", x1, "point_weights1", point_weights1, pair.gmm1)
    transport_weight = checks.scalar("transport_weight", transport_weight, at_least=0, batched=True)
    ridge = checks.scalar("ridge", ridge, at_least=0, batched=True)
    problem = MixtureGraph.from_pair(pair, transport_weight, (False, False))
    pair.gmm0.check_densities("pair.gmm0")
    pair.gmm1.check_densities("pair.gmm1")
    length = statistics.chunk_length(max(len(x0), len(x1)), *problem.nodes.means.shape[1:], chunk_size)
    return _value(problem, [x0, x1], [w0, w1], ridge, length)


@functools.partial(jax.jit, static_argnames="length")
def _value(
    problem: MixtureGraph, clouds: list[Array], weights: list[Array | None], ridge: Array, length: int
) -> Float[Array, ""]:
    data = _prepare(clouds, weights, ridge, length)
    parameters = to_parameters(problem.nodes, data.origin)
    found = statistics.e_step(parameters, data.chunks, data.floors)
    start = m_step.no_terms(problem).potentials
    transport, _, _ = m_step.transport_terms(parameters, problem, start, plan.solve_entropic)
    return problem.node_weights @ found.log_likelihood - problem.edge_weights @ transport


def fit_graph(
    clouds: Sequence[Any],
    graph: MixtureGraph,
    *,
    point_weights: Sequence[Any] | None = None,
    em_steps: int = 30,
    m_steps: int = 20,
    optimizer: Any = None,
    learning_rate: Any = None,
    tol: Any = 0.0,
    ridge: Any = 1e-6,
    method: str = "entropic",
    chunk_size: int | None = None,
    progress: Any = False,
) -> GraphFit:
    """The coupled fit of `fit_pair` for any graph of mixtures.

    `clouds` has one (n, d) cloud a node, or None where a node explains none; `point_weights` likewise. Everything else is
    as in `fit_pair`; what is frozen, and the weights of nodes and edges, are the graph's.
    """
    checks.instance("graph", graph, MixtureGraph)
    run = _check_run(em_steps, m_steps, optimizer, learning_rate, tol, ridge, method, chunk_size, progress)
    weights = [None] * graph.n_nodes if point_weights is None else list(point_weights)
    for name, given in (("clouds", clouds), ("point_weights", weights)):
        if len(given) != graph.n_nodes:
            raise ValueError(f"{name}: expected one for each of the {graph.n_nodes} nodes (or None), got {len(given)}")
    if all(cloud is None for cloud in clouds):
        raise ValueError("clouds: every one is None; a fit needs at least one cloud")
    checked = [
        (None, None) if cloud is None else _check_cloud(f"clouds[{i}]", cloud, f"point_weights[{i}]", weight, graph.nodes)
        for i, (cloud, weight) in enumerate(zip(clouds, weights, strict=True))
    ]
    for i, gmm in enumerate(graph.split(graph.nodes)):
        if clouds[i] is not None or i not in np.flatnonzero(graph.frozen):
            gmm.check_densities(f"node {i}")
    pairs = new(GaussianMixturePair, epsilon=graph.epsilon[:1], rho=graph.rho[:1], balanced=graph.balanced)
    solver = plan.solver_for(method, pairs) if graph.n_edges else plan.solve_entropic
    return _graph_fit(graph, *_run(graph, [c for c, _ in checked], [w for _, w in checked], solver, run))


def fit_pair(
    x0: Any,
    x1: Any,
    pair: GaussianMixturePair,
    *,
    transport_weight: Any,
    point_weights0: Any = None,
    point_weights1: Any = None,
    em_steps: int = 30,
    m_steps: int = 20,
    optimizer: Any = None,
    learning_rate: Any = None,
    tol: Any = 0.0,
    freeze: Sequence[str] = (),
    ridge: Any = 1e-6,
    method: str = "entropic",
    chunk_size: int | None = None,
    progress: Any = False,
) -> PairFit:
    r"""Fit two mixtures to two clouds while a penalty on the transport cost between them keeps them close.

    .. math:: J = \overline{\log p_0} + \overline{\log p_1} - \lambda T(p_0, p_1)

    with the means over points, and T the regularised cost of `solve_plan` (MW2 squared, or its unbalanced version, plus the
    entropic term), by EM whose M-step raises the whole objective. With the default optimiser J never falls.

    Args:
      x0, x1: clouds (n0, d) and (n1, d).
      pair: where to start, with epsilon and rho.
      transport_weight: lambda, at least 0, per squared data unit.
      point_weights0, point_weights1: (n0,), (n1,), at least 0, not all 0; None weighs points equally.
      em_steps: EM steps, at most.
      m_steps: evaluations of the M-step's objective and gradient in each, at most.
      optimizer: None is L-BFGS in natural coordinates; an optax factory (``optax.adam``) takes `learning_rate` as a leaf;
        a built optax transformation is used as it is. Both run in log-Cholesky coordinates, as OTT's fit does, and do
        every step.
      learning_rate: above 0, with a factory only.
      tol: at least 0; the fit has converged when an EM step raises J by no more. With 0 all steps are done.
      freeze: any of "gmm0", "gmm1", left as they are.
      ridge: at least 0, floor of the covariances relative to each feature's variance in its cloud: the component
        log-densities are lowered by :math:`tr(\Delta S^{-1}) / 2`, so the exact M-step at weight 0 is the second moment plus
        Delta, and J stays an objective that never falls. 0 turns it off.
      method: of the plans, as in `solve_plan`.
      chunk_size: points that are held in memory K d times over, at once; None suits the machine.
      progress: True draws a bar; a callable gets each row as a dict; either costs one host callback a step.

    Returns:
      A `PairFit` with the fitted pair, its plan, J, the status and the history.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range, before anything is compiled.
    """
    checks.instance("pair", pair, GaussianMixturePair)
    run = _check_run(em_steps, m_steps, optimizer, learning_rate, tol, ridge, method, chunk_size, progress)
    unknown = [name for name in freeze if name not in ("gmm0", "gmm1")] if not isinstance(freeze, str) else [freeze]
    if unknown:
        raise ValueError(f"freeze: expected a collection of 'gmm0' and 'gmm1', got {freeze!r}")
    x0, w0 = _check_cloud("x0", x0, "point_weights0", point_weights0, pair.gmm0)
    x1, w1 = _check_cloud("x1", x1, "point_weights1", point_weights1, pair.gmm1)
    transport_weight = checks.scalar("transport_weight", transport_weight, at_least=0, batched=True)
    pair.gmm0.check_densities("pair.gmm0")
    pair.gmm1.check_densities("pair.gmm1")
    problem = MixtureGraph.from_pair(pair, transport_weight, ["gmm0" in freeze, "gmm1" in freeze])
    return _pair_fit(problem, *_run(problem, [x0, x1], [w0, w1], plan.solver_for(method, pair), run))
