"""Fits of the mixtures of any graph to their clouds."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import take, unchecked
from coupled_gmm.fits import contest, em, frame, refits
from coupled_gmm.fits.fidelity import Ended, Fidelity
from coupled_gmm.fits.frame import Sight, View
from coupled_gmm.fits.gmm import pooled_draws
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.linked import started_graph
from coupled_gmm.fits.request import Controls, FitOptions, FitRequest, GivenCloud, Stretches, view_of
from coupled_gmm.fits.results import GraphFit
from coupled_gmm.fits.statistics import Sums
from coupled_gmm.fits.weights import Weight
from coupled_gmm.gaussians.mixture import GaussianMixture, alike, stack
from coupled_gmm.transport import plan, solvers
from coupled_gmm.transport.pair import GaussianMixturePair, stated


def _edge_solver(method: str, graph: MixtureGraph) -> solvers.PlanSolver:
    """The solver of all edges at once; OTT's needs one tau, known when it is compiled."""
    if method == "entropic" or not graph.n_edges:
        return solvers.ENTROPIC
    with jax.ensure_compile_time_eval():  # of a graph that is known, inside jit as well
        graph, _ = graph.in_node_order()
        prices = {"epsilon": graph.epsilon, "rho": graph.rho, "balanced": graph.balanced, "links": None}
        edges = unchecked(
            GaussianMixturePair, gmm0=graph.nodes, gmm1=graph.nodes, **prices
        )  # of which prices are looked at
        if not graph.balanced and checks.known(graph.epsilon, graph.rho):
            tau = np.asarray(edges.tau)
            if not np.allclose(tau, tau[0], rtol=1e-5, atol=0):
                each = ", ".join(np.array2string(one, precision=4) for one in tau)
                raise ArgumentError(
                    "method",
                    f"'sinkhorn' needs one tau = rho / (rho + epsilon) for all edges, and these have {each}",
                    "use 'entropic', or give all edges the same tau",
                )
        return solvers.solver_for(method, take(edges, 0))


# The programs see edges in node order, so that no result depends on how they are written; their answers are put back.
@program("options", over_matrices=True)
def _begin_graph(problem: MixtureGraph, sight: Sight, controls: Controls, options: FitOptions) -> em.Underway:
    return em.begin(problem.in_node_order()[0], sight, controls, options)


@program("options", over_matrices=True)
def _go_on_with_graph(
    problem: MixtureGraph,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
    underway: em.Underway,
    until: Array,
    sums: Sums | None = None,
) -> tuple[em.Underway, GraphFit]:
    ordered, order = problem.in_node_order()
    underway, end = em.go_on(ordered, sight, controls, options, underway, until, sums)
    return underway, graph_fit(problem, end, order)


@program("options", over_matrices=True)
def _fit_graphs(
    problem: MixtureGraph, starts: GaussianMixture, sight: Sight, controls: Controls, options: FitOptions
) -> GraphFit:
    """The best of the runs from some starts, stacked."""
    ordered, order = problem.in_node_order()
    schedule = contest.Schedule.along(1, len(starts.weights))
    asked = ordered.edge_weights[None], schedule, sight, controls, options
    found = contest.best_ends(ordered, starts, *asked)
    best, starts_ends, fidelity = jax.tree.map(lambda leaf: leaf[0], tuple(found))
    return dataclasses.replace(graph_fit(problem, best, order), starts=starts_ends, fidelity=fidelity)


def _stretches() -> Stretches:
    return Stretches(_begin_graph, _go_on_with_graph)


def _starts(graph: MixtureGraph, view: View, ridge: Array, n_init: int, key: Any) -> GaussianMixture:
    """The nodes, and nodes that are drawn, stacked; what is frozen is in all of them, and nodes of one size start alike."""
    given = graph.split(graph.nodes)
    drawn = {
        size: pooled_draws(checks.key("key", key), view, ridge, size, n_init - 1) for size in sorted(set(graph.sizes))
    }
    drawn_nodes = [stack([drawn[size][i] for size in graph.sizes]) for i in range(n_init - 1)]
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike([stack(given), *drawn_nodes]))

    def held(leaf: Array) -> Array:
        return jnp.where(jnp.expand_dims(graph.frozen, range(1, leaf.ndim - 1)), leaf[:1], leaf)

    return jax.tree.map(held, starts)


def graph_fit(problem: MixtureGraph, end: em.Solution, order: Array) -> GraphFit:
    """What a program returns of a solution whose edges are in node order."""
    edges = jnp.stack([problem.sources, problem.targets], axis=1)
    back = jnp.argsort(order) if problem.n_edges > 1 else order
    history = dataclasses.replace(end.history, transport_terms=end.history.transport_terms[:, back])
    ends = [take(end.nodes, index) for index in (problem.sources, problem.targets)]
    pairs = unchecked(
        GaussianMixturePair,
        gmm0=ends[0],
        gmm1=ends[1],
        epsilon=problem.epsilon,
        rho=problem.rho,
        balanced=problem.balanced,
        links=problem.links,
    )
    found = take((end.terms.costs, end.terms.potentials), back)
    costs, potentials = jax.tree.map(
        lambda turned, found: jnp.where(jnp.expand_dims(problem.turned, range(1, found.ndim)), turned, found),
        (found[0].swapaxes(1, 2), found[1].swap()),
        found,
    )
    plans = plan.from_potentials(pairs, costs, potentials)
    return GraphFit(
        gmms=problem.split(end.nodes),
        plans=plans,
        penalized_log_likelihood=end.value,
        status=end.status,
        n_steps=end.n_steps,
        history=history,
        log_likelihoods=end.log_likelihoods,
        penalized_log_likelihoods=end.penalized,
        edges=edges,
        edge_weights=problem.edge_weights,
        node_weights=problem.node_weights,
        feature_variance=end.feature_variance,
    )


def fit_graph(
    clouds: Sequence[Any],
    graph: MixtureGraph,
    *,
    relative_weight: Any = None,
    point_weights: Sequence[Any] | None = None,
    em_steps: int = 30,
    m_steps: int = 20,
    optimizer: Any = None,
    learning_rate: Any = None,
    tol: Any = 0.0,
    ridge: Any = 1e-6,
    method: str = "entropic",
    chunk_size: int | None = None,
    n_init: int = 1,
    key: PRNGKeyArray | None = None,
    progress: Any = False,
    fidelity: bool = True,
) -> GraphFit:
    r"""The coupled fit of `fit_pair` for any graph of mixtures.

    .. math:: J = \sum_i v_i \overline{\log p_i} - \sum_{ij} \lambda_{ij} T(p_i, p_j)

    over nodes i that have a cloud, and edges ij.

    Args:
      clouds: for each node a cloud (n, d), or None where it has none; of mixtures alone J is what transport costs.
      graph: where to start, with the edges, their weights lambda, the nodes' weights v, epsilon, rho, and what is frozen.
      relative_weight: at least 0, times which the edges' weights are taken, and without a unit: lambda is that product over the
        mean variance of a feature within the clouds. None takes the edges' weights as they are, per squared data unit.
      point_weights: for each node (n,), at least 0, not all 0, or None; None weighs the points of every cloud equally.
      n_init: starts, of which the fit of highest J is kept, and `fit.starts` says where each ended: the graph's mixtures, and
        beside them ones that are drawn for the points of all clouds together, where a node is not frozen.
      key: decides what is drawn; goes with an `n_init` above 1.
      em_steps, m_steps, optimizer, learning_rate, tol, ridge, method, chunk_size, progress, fidelity: as in `fit_pair`.

    Returns:
      A `GraphFit` with the fitted mixtures, their plans, J, the status and the history.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range, before anything is compiled.
    """
    checks.instance("graph", graph, MixtureGraph)
    n_init = contest.check_starts(n_init, key)
    if n_init > 1 and progress:
        raise ArgumentError("progress", "fits of several starts have none", "leave it out, or n_init")
    contest.check_drawn(n_init, "graph", graph.links)
    if graph.sources.ndim != 1:
        raise ArgumentError(
            "graph", f"is a batch of {len(graph.sources)} graphs", "fit them with jax.vmap, or take one of them"
        )
    graph = started_graph(graph)
    request = FitRequest.checked(
        ridge=ridge,
        tol=tol,
        em_steps=em_steps,
        m_steps=m_steps,
        optimizer=optimizer,
        learning_rate=learning_rate,
        method=method,
        chunk_size=chunk_size,
        progress=progress,
    )
    clouds = checks.sequence("clouds", clouds)
    weights = [None] * graph.n_nodes if point_weights is None else checks.sequence("point_weights", point_weights)
    for name, given in (("clouds", clouds), ("point_weights", weights)):
        if len(given) != graph.n_nodes:
            raise ArgumentError(name, f"expected one for each of the {graph.n_nodes} nodes (or None), got {len(given)}")
    for i, (cloud, weight) in enumerate(zip(clouds, weights, strict=True)):
        if cloud is None and weight is not None:
            raise ArgumentError(f"point_weights[{i}]", f"node {i} has no cloud to weigh", "pass None, or its cloud")
    alone = all(cloud is None for cloud in clouds)
    if alone and relative_weight is not None:
        raise ArgumentError(
            "relative_weight", "no node has a cloud, whose variance is its unit", "give edge_weights alone"
        )
    if alone and n_init > 1:
        raise ArgumentError(
            "n_init", "no node has a cloud, from which starts could be drawn", "give graphs of your own"
        )
    still = np.asarray(graph.frozen) if checks.known(graph.frozen) else np.array([cloud is None for cloud in clouds])
    for i, gmm in enumerate(graph.split(graph.nodes)):
        frozen = bool(still[i])
        if frozen == (clouds[i] is not None) or (clouds[i] is not None and not frame.raises(ridge)):
            gmm.check_densities(f"node {i}")
    given = [
        GivenCloud(f"clouds[{i}]", cloud, f"point_weights[{i}]", weight)
        for i, (cloud, weight) in enumerate(zip(clouds, weights, strict=True))
    ]
    view = view_of(given, [graph.nodes], ridge)
    numbers = max(graph.sizes) * graph.nodes.n_features
    if relative_weight is not None:
        weight = Weight.given(None, relative_weight).of(view)
        graph = dataclasses.replace(graph, edge_weights=(weight * graph.edge_weights).astype(graph.nodes.dtype))
    # One program, whatever the prices are and nodes are called.
    problem = dataclasses.replace(graph, balanced=False, times=None, names=None)
    seen = {
        "view": view,
        "numbers": numbers,
        "solver": _edge_solver(method, graph),
        "sight": request.seen(view, numbers),
    }
    in_program = fidelity and not alone and request.optimizer is None  # which the refits, by EM, have not
    if n_init == 1 and (not in_program or progress or checks.known(view, problem, request.controls)):
        fit = request.fit(_stretches(), problem, **seen)
    elif n_init == 1:  # in somebody's program: fit and refit are runs of one loop
        starts = jax.tree.map(lambda leaf: leaf[None], problem.nodes)
        fit = request.fit(_fit_graphs, problem, starts, **seen, refits=True)
        fit = dataclasses.replace(fit, starts=None)
    else:
        starts = _starts(graph, view, request.controls.ridge, n_init, key)
        if view.external:
            each = (dataclasses.replace(problem, nodes=one) for one in starts)
            fit = contest.best_of([request.fit(_stretches(), one, **seen) for one in each])
        else:
            fit = request.fit(_fit_graphs, problem, starts, **seen, refits=in_program)
    plans = dataclasses.replace(fit.plans, pair=stated(fit.plans.pair, graph.balanced))
    fit = dataclasses.replace(fit, plans=plans, times=graph.times, names=graph.names)
    if checks.known(graph.sources, graph.targets):  # so that inside somebody's program its course can be read
        with jax.ensure_compile_time_eval():
            fit = dataclasses.replace(fit, edges=jnp.stack([graph.sources, graph.targets], axis=1))
    if alone:
        return dataclasses.replace(fit, feature_variance=None)
    if not fidelity or fit.fidelity is not None:
        return fit
    has_cloud = np.array([cloud is not None for cloud in clouds])
    if request.optimizer is None:
        free = refits.graph(problem, stack(fit.gmms), has_cloud)
        refit = _ended(refits.request(request).fit(_stretches(), free, **seen))
    else:
        refit = refitted_apart(fit.gmms, graph.split(graph.nodes), has_cloud, request, view)
    return dataclasses.replace(fit, fidelity=Fidelity.of(_ended(fit), refit, graph.frozen, has_cloud))


def _ended(fit: GraphFit) -> Ended:
    return Ended(fit.gmms, fit.log_likelihoods, fit.penalized_log_likelihoods)


def refitted_apart(
    gmms: Sequence[GaussianMixture],
    starts: Sequence[GaussianMixture],
    has_cloud: np.ndarray,
    request: FitRequest,
    view: View,
) -> Ended:
    """Where mixtures end by EM alone, that an optimiser of the user's has fitted, whose program has not EM's M-step."""
    nodes = stack([refits.beginning(*each) for each in zip(gmms, starts, strict=True)])
    graph = dataclasses.replace(MixtureGraph.unjoined(nodes, ~has_cloud), sizes=tuple(gmm.n_components for gmm in gmms))
    seen = {"view": view, "numbers": nodes.n_components * nodes.n_features, "solver": solvers.ENTROPIC}
    return _ended(refits.request(request).fit(_stretches(), graph, **seen))
