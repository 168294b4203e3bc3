r"""Fits of several mixtures to their clouds: the pair, and any graph.

A fit is a run, not a value: it can't be differentiated; `penalized_log_likelihood`, its objective, can.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import take, unchecked
from coupled_gmm.fits import em, frame
from coupled_gmm.fits.frame import Sight
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.request import Controls, FitOptions, FitRequest, GivenCloud, view_of
from coupled_gmm.fits.results import GraphFit, PairFit, trimmed
from coupled_gmm.transport import plan, solvers
from coupled_gmm.transport.pair import GaussianMixturePair


def _edge_solver(method: str, graph: MixtureGraph) -> solvers.PlanSolver:
    """The solver of all edges at once; OTT's needs one tau, known when it is compiled."""
    if method == "entropic" or not graph.n_edges:
        return solvers.ENTROPIC
    with jax.ensure_compile_time_eval():  # of a graph that is known, inside jit as well
        graph, _ = graph.in_node_order()
        prices = {"epsilon": graph.epsilon, "rho": graph.rho, "balanced": graph.balanced}
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


@program("options")
def _fit_graph(problem: MixtureGraph, sight: Sight, controls: Controls, options: FitOptions) -> GraphFit:
    # The program sees edges in node order, so that no result depends on how they are written; its answers are put back.
    ordered, order = problem.in_node_order()
    edges = jnp.stack([problem.sources, problem.targets], axis=1)
    end = em.run(ordered, sight, controls, options)
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
    )
    found = take((end.terms.costs, end.terms.potentials), back)
    costs, potentials = jax.tree.map(
        lambda turned, found: jnp.where(jnp.expand_dims(problem.turned, range(1, found.ndim)), turned, found),
        (found[0].swapaxes(1, 2), found[1].swap()),
        found,
    )
    plans = plan.from_potentials(pairs, costs, potentials)
    return GraphFit(
        problem.split(end.nodes), plans, end.value, end.status, end.n_steps, history, end.log_likelihoods, edges
    )


@program("options")
def _fit_pair(
    pair: GaussianMixturePair,
    transport_weight: Array,
    frozen: Array,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
) -> PairFit:
    problem = MixtureGraph.from_pair(pair, transport_weight, frozen)
    fit = _fit_graph(problem, sight, controls, options)
    whole = trimmed(take(fit.plans, 0), *fit.gmms)
    end = fit.penalized_log_likelihood, fit.status, fit.n_steps, fit.history, fit.log_likelihoods
    return PairFit(whole.pair, whole, *end)


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
    transport_weight = checks.scalar("transport_weight", transport_weight, at_least=0, batched=True)
    ridge = checks.scalar("ridge", ridge, at_least=0, batched=True)
    if chunk_size is not None:
        checks.integer("chunk_size", chunk_size, 1)
    pair.gmm0.check_densities("pair.gmm0")
    pair.gmm1.check_densities("pair.gmm1")
    view = view_of(_two_clouds(x0, x1, point_weights0, point_weights1), [pair.gmm0, pair.gmm1], ridge)
    return _value(pair, transport_weight, view.in_chunks(_numbers(pair), chunk_size), ridge)


def _two_clouds(x0: Any, x1: Any, weights0: Any, weights1: Any) -> list[GivenCloud]:
    return [GivenCloud("x0", x0, "point_weights0", weights0), GivenCloud("x1", x1, "point_weights1", weights1)]


def _numbers(pair: GaussianMixturePair) -> int:
    """That a program holds of each point."""
    return max(pair.gmm0.n_components, pair.gmm1.n_components) * pair.n_features


@program()
def _value(pair: GaussianMixturePair, transport_weight: Array, sight: Sight, ridge: Array) -> Float[Array, ""]:
    problem = MixtureGraph.from_pair(pair, transport_weight, np.zeros(2, bool))
    return em.value(problem, sight, ridge)


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
    r"""The coupled fit of `fit_pair` for any graph of mixtures.

    .. math:: J = \sum_i v_i \overline{\log p_i} - \sum_{ij} \lambda_{ij} T(p_i, p_j)

    over nodes i that have a cloud, and edges ij.

    Args:
      clouds: for each node a cloud (n, d), or None where it has none.
      graph: where to start, with the edges, their weights lambda, the nodes' weights v, epsilon, rho, and what is frozen.
      point_weights: for each node (n,), at least 0, not all 0, or None; None weighs the points of every cloud equally.
      em_steps, m_steps, optimizer, learning_rate, tol, ridge, method, chunk_size, progress: as in `fit_pair`.

    Returns:
      A `GraphFit` with the fitted mixtures, their plans, J, the status and the history.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range, before anything is compiled.
    """
    checks.instance("graph", graph, MixtureGraph)
    if graph.sources.ndim != 1:
        raise ArgumentError(
            "graph", f"is a batch of {len(graph.sources)} graphs", "fit them with jax.vmap, or take one of them"
        )
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
    if all(cloud is None for cloud in clouds):
        raise ArgumentError("clouds", "every one is None", "a fit needs at least one cloud")
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
    return request.fit(_fit_graph, graph, view=view, numbers=numbers, solver=_edge_solver(method, graph))


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
      m_steps: evaluations of the M-step's objective, or of what bounds it from below, and its gradient in each, at most.
      optimizer: None solves for masses and plans, and moves means and factors by L-BFGS in natural coordinates; an optax
        factory (``optax.adam``) takes `learning_rate` as a leaf; a built optax transformation is used as it is. Both run in
        log-Cholesky coordinates, as OTT's fit does, and do every step.
      learning_rate: above 0, with a factory only.
      tol: at least 0; the fit has converged when an EM step raises J by no more. With 0 all steps are done.
      freeze: any of "gmm0", "gmm1", left as they are.
      ridge: at least 0, floor of the covariances relative to each feature's variance in its cloud: the component
        log-densities are lowered by :math:`tr(\Delta S^{-1}) / 2`, so the exact M-step at weight 0 is the second moment plus
        Delta, and J stays an objective that never falls. 0 turns it off.
      method: of the plans, as in `solve_plan`.
      chunk_size: points that are held in memory K d times over, at once; None suits the machine.
      progress: True draws a bar; a callable gets each row as a dict; either costs one host callback a step. After what a
        callable raises it gets no more rows, and the fit raises that at its end.

    Returns:
      A `PairFit` with the fitted pair, its plan, J, the status and the history.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range, before anything is compiled.

    >>> start = cg.GaussianMixture.from_moments([[0.0], [7.0]], [[[1.0]], [[1.0]]], [0.5, 0.5])
    >>> clouds = [[0.0], [1.0], [7.0], [8.0]], [[1.0], [2.0], [8.0], [9.0]]
    >>> fit = cg.fit_pair(*clouds, cg.GaussianMixturePair(start, start), transport_weight=0.01, em_steps=5)
    >>> print(fit.status_name, fit.pair.gmm1.means.round(1).tolist())
    steps done [[1.5], [8.5]]
    """
    checks.instance("pair", pair, GaussianMixturePair)
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
    if not isinstance(freeze, (tuple, list, set, frozenset)) or any(name not in ("gmm0", "gmm1") for name in freeze):
        raise ArgumentError("freeze", f"expected a collection of 'gmm0' and 'gmm1', got {checks.brief(freeze)}")
    transport_weight = checks.scalar("transport_weight", transport_weight, at_least=0, batched=True)
    for name, gmm in (("gmm0", pair.gmm0), ("gmm1", pair.gmm1)):
        if name in freeze or not frame.raises(ridge):
            gmm.check_densities(f"pair.{name}")
    solver = solvers.solver_for(method, pair)
    frozen = np.array(["gmm0" in freeze, "gmm1" in freeze])
    view = view_of(_two_clouds(x0, x1, point_weights0, point_weights1), [pair.gmm0, pair.gmm1], ridge)
    problem = pair, transport_weight, frozen
    return request.fit(_fit_pair, *problem, view=view, numbers=_numbers(pair), solver=solver)
