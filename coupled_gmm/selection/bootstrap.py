"""How sure a coupled fit is: intervals by refits under random weights of the points."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from coupled_gmm.core import checks, chunks, meshes
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.core.status import USABLE, FitError, Outcome, Status
from coupled_gmm.core.tree import AnyArray, number, pytree, saved
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.pairs import frozen_sides
from coupled_gmm.fits.request import FitOptions, FitRequest, GivenCloud, view_of
from coupled_gmm.fits.results import GraphFit, PairFit
from coupled_gmm.gaussians.mixture import stack
from coupled_gmm.selection.replicates import Refit, Resampling, refits
from coupled_gmm.transport import solvers
from coupled_gmm.transport.pair import stated

_MOST_REPLICATES = 1_000_000
_PRECISE = 1e-2  # of what the log-likelihood of a point varies by between samples, that a step gains at the end
_UNSETTLED = 0.5  # standard errors by which a fit that goes on may move before its end is called another


@saved
@pytree
class Intervals:
    """An interval for each of some numbers, and the samples that it was read from."""

    estimate: Float[AnyArray, "*b"]  # the fit's own
    low: Float[AnyArray, "*b"]
    high: Float[AnyArray, "*b"]
    replicates: Float[AnyArray, "*b R"]

    @property
    def samples(self) -> Float[Array, "R *b"]:
        """Of each replicate that was used, the same numbers."""
        return jnp.moveaxis(self.replicates, -1, 0)

    @property
    def standard_error(self) -> Float[Array, "*b"]:
        """The samples' standard deviation."""
        return jnp.std(self.replicates, axis=-1, ddof=1)

    @classmethod
    def of(cls, estimate: Any, samples: np.ndarray, level: float, mirrored: bool = False) -> "Intervals":
        """Between the quantiles that leave the same part of the samples on both sides; or these mirrored at the estimate."""
        estimate = np.asarray(estimate)
        low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        if mirrored:
            low, high = np.maximum(2 * estimate - high, 0), np.maximum(2 * estimate - low, 0)
        found = estimate, low, high, np.ascontiguousarray(np.moveaxis(samples, 0, -1))
        return cls(*(jax.device_put(np.asarray(each, estimate.dtype)) for each in found))


@saved
@pytree
class Bootstrap(Outcome):
    """Intervals for what a coupled fit says, and how its replicates ended.

    Of a pair `plan` is (K0, K1), `mass_change` and `growth` (K0,), `distance` (); of a graph these have a leading axis of edges, as
    `fit.plans` has. Masses are (V, K), padded with zeros to the largest mixture. `growth` is the logarithm of `mass_change`.
    """

    masses: Intervals
    plan: Intervals
    mass_change: Intervals
    growth: Intervals
    distance: Intervals
    level: Float[AnyArray, ""]
    drift: Float[AnyArray, ""]  # standard errors by which some mass of the fit moves when it goes on as it is
    status: Int[AnyArray, " N"]  # of all replicates
    n_steps: Int[AnyArray, " N"]

    @property
    def n_used(self) -> int:
        """Replicates that intervals were read from; the others ended without a usable result, and are left out."""
        return self.distance.replicates.shape[-1]

    @property
    def message(self) -> str:
        """How the replicates ended, with the remedy; which were left out, and whether the fit itself had not ended."""
        n, left_out = len(self.status), len(self.status) - self.n_used
        said = [super().message, *([f"{left_out} of {n} replicates are left out"] if left_out else [])]
        if np.asarray(self.drift) > _UNSETTLED:
            said.append(
                f"the fit had not ended: gone on with, it moves by {number(self.drift)} standard errors, and intervals are about "
                "where it ends (fit it with tol=1e-6 and em_steps=1000, say)"
            )
        return "; ".join(said)

    def _words(self) -> list[str]:
        return [f"{self.n_used} of {self.status.shape[-1]} replicates", f"{number(100 * self.level)} % intervals"]

    def _facts(self) -> dict[str, str]:
        distance = self.distance
        ends = f"{number(distance.estimate)}, in {number(distance.low)} to {number(distance.high)}"
        return {
            "distance <P, C>": ends if distance.estimate.ndim == 0 else number(distance.estimate),
            "standard errors of masses": number(self.masses.standard_error),
            "of plan entries": number(self.plan.standard_error),
            "of growth rates": number(self.growth.standard_error),
            "steps a replicate": number(self.n_steps),
        }


def bootstrap(
    key: PRNGKeyArray,
    fit: PairFit | GraphFit,
    clouds: Sequence[Any],
    *,
    n_replicates: int = 100,
    level: float = 0.9,
    point_weights: Sequence[Any] | None = None,
    transport_weight: Any = None,
    freeze: Sequence[str] = (),
    graph: MixtureGraph | None = None,
    em_steps: int = 200,
    m_steps: int = 20,
    tol: Any = None,
    ridge: Any = 1e-6,
) -> Bootstrap:
    r"""Intervals for masses, plan entries, mass changes, growth rates and the distance of a coupled fit.

    A replicate is the same fit under random weights of the same points,

    .. math:: \omega_i = w_i e_i \big/ \textstyle\sum_j w_j e_j, \quad e_i \sim \mathrm{Exp}(1),

    in each cloud by itself: the Bayesian bootstrap (Rubin 1981), with which a maximum of likelihood varies as from sample to sample
    (Newton & Raftery 1994). Unlike counts, no such weight is 0, so that no replicate loses a rare component. It starts where the
    fit ends, with the same prices, and its components are put in the fit's order by the assignment of least total squared
    Bures-Wasserstein distance. An interval lies between the quantiles of the replicates that leave (1 - level) / 2 on both sides:
    of a plan entry near 0 it stays at or above 0, where one mirrored at the estimate would not. That of the distance is mirrored
    (the basic bootstrap): sampling makes a squared distance larger, in the fit and once more in its replicates, and the mirror
    takes that back.

    What intervals cover is what the sampling of points does to the fit. Their target is the population's own penalised optimum near
    the fit, not the population that the penalty has moved it from. They say nothing of the number of components, the transport
    weight, or which of several optima is meant: all of these are taken as chosen. Clouds are taken as independent of each other,
    and points as independent draws.

    Args:
      key: decides the weights.
      fit: of a pair or a graph.
      clouds: what it was fitted to: [x0, x1], or one for each node, None where it has none.
      n_replicates: at least 2. Intervals at 90 % want 100, at 99 % 1,000.
      level: above 0 and below 1.
      point_weights: for each cloud (n,) or None, as in the fit.
      transport_weight: of a pair, lambda; None takes the fit's.
      freeze: of a pair, as in the fit.
      graph: of a graph, what was fitted: its node weights and frozen nodes. None takes weights of 1 and none frozen.
      em_steps, m_steps, ridge: as in `fit_pair`, for a replicate.
      tol: at least 0; a replicate has ended when a step raises J by no more. None is 1e-2 over the number of points of the
        smallest cloud: what is then left to gain moves no parameter by much of its standard error.

    Returns:
      A `Bootstrap`; replicates without a usable result are counted, and left out.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range, before anything is compiled.
      FitError: fewer than two replicates have a usable result.

    >>> start = cg.GaussianMixture.from_moments([[0.0], [7.0]], [[[1.0]], [[1.0]]], [0.5, 0.5])
    >>> clouds = [[0.0], [1.0], [7.0], [8.0]], [[1.0], [2.0], [8.0], [9.0]]
    >>> fit = cg.fit_pair(*clouds, cg.GaussianMixturePair(start, start), transport_weight=0.01, tol=1e-5, em_steps=100)
    >>> sure = cg.bootstrap(jax.random.key(0), fit, clouds)
    >>> print(bool(sure.masses.low[0, 0] < fit.pair.gmm0.weights[0] < sure.masses.high[0, 0]), sure.plan.samples.shape)
    True (100, 2, 2)
    """
    if not checks.known(key, fit, clouds, point_weights):
        raise ArgumentError("fit", "arguments are traced", "call bootstrap outside of transformations")
    key = checks.key("key", key)
    n_replicates = checks.integer("n_replicates", n_replicates, 2, _MOST_REPLICATES)
    level = float(checks.scalar("level", level, above=0, at_most=1))
    if level == 1:
        raise ArgumentError("level", "must be below 1, got 1", "0.9 is usual")
    problem = _problem(fit, transport_weight, freeze, graph)
    given = _given(clouds, point_weights, problem)
    request = FitRequest.checked(ridge=ridge, tol=0.0 if tol is None else tol, em_steps=em_steps, m_steps=m_steps)
    view = view_of(given, [problem.nodes], ridge, in_memory="bootstrap a sample of it: cloud.rows(indices)")
    for cloud, x in zip(given, view.clouds, strict=True):
        if meshes.is_spread(x):
            raise ArgumentError(cloud.name, "lies on several devices", "bootstrap it on one of them")
    controls = request.controls
    if tol is None:
        least = min(len(x) for x in view.clouds if x is not None)
        controls = controls._replace(tol=jnp.asarray(_PRECISE / least, problem.nodes.dtype))
    sight = view.in_chunks(max(problem.sizes) * problem.nodes.n_features)
    options = FitOptions(chunks.rows(request.em_steps), solvers.ENTROPIC, None, progress=False)
    settled, found = refits(Resampling(problem, problem.nodes, sight, controls), options, key, n_replicates)
    return _read(fit, problem, settled, found, level)


def _problem(fit: Any, transport_weight: Any, freeze: Any, graph: Any) -> MixtureGraph:
    """The graph that was fitted, with the fitted mixtures."""
    if not isinstance(fit, (PairFit, GraphFit)):
        raise ArgumentTypeError("fit", f"expected a PairFit or a GraphFit, got {type(fit).__name__}")
    checks.instance("fit", fit, type(fit))
    if checks.known(fit.status) and int(fit.status) not in USABLE:
        raise ArgumentError("fit", f"has no usable result ({fit.status_name})", fit.message)
    if isinstance(fit, PairFit):
        if graph is not None:
            raise ArgumentError("graph", "goes with the fit of a graph, and this is one of a pair", "drop it")
        frozen = frozen_sides(freeze)
        weight = fit.transport_weight if transport_weight is None else transport_weight
        if weight is None:
            raise ArgumentError("transport_weight", "the fit does not say which it had", "pass it")
        weight = checks.scalar("transport_weight", weight, at_least=0)
        return MixtureGraph.from_pair(stated(fit.pair, balanced=False), weight, frozen)
    if transport_weight is not None or len(freeze):
        name = "freeze" if len(freeze) else "transport_weight"
        raise ArgumentError(name, "goes with the fit of a pair", "pass graph=, the graph that was fitted")
    edges, weights = fit.edges, fit.edge_weights
    if edges is None or weights is None:
        raise ArgumentError("fit", "was saved before fits kept their edges and weights", "fit again")
    n_nodes, frozen, node_weights = len(fit.gmms), np.zeros(len(fit.gmms), bool), None
    if graph is not None:
        checks.instance("graph", graph, MixtureGraph)
        written = np.stack([np.asarray(graph.sources), np.asarray(graph.targets)], axis=1)
        if graph.n_nodes != n_nodes or not np.array_equal(written, np.asarray(edges)):
            raise ArgumentError("graph", "has other nodes or edges than the fit", "pass the graph that was fitted")
        frozen, node_weights = graph.frozen, graph.node_weights
    nodes, pair = stack(fit.gmms), fit.plans.pair
    return MixtureGraph(
        nodes=nodes,
        sources=edges[:, 0],
        targets=edges[:, 1],
        edge_weights=weights,
        epsilon=pair.epsilon,
        rho=pair.rho,
        node_weights=jnp.ones(n_nodes, nodes.dtype) if node_weights is None else node_weights,
        frozen=jnp.asarray(frozen),
        sizes=tuple(gmm.n_components for gmm in fit.gmms),
        balanced=False,  # one program, whatever the prices are
        links=pair.links,
    )


def _given(clouds: Any, weights: Any, problem: MixtureGraph) -> list[GivenCloud]:
    clouds = checks.sequence("clouds", clouds)
    weights = [None] * problem.n_nodes if weights is None else checks.sequence("point_weights", weights)
    for name, some in (("clouds", clouds), ("point_weights", weights)):
        if len(some) != problem.n_nodes:
            raise ArgumentError(name, f"expected one for each of the {problem.n_nodes} mixtures, got {len(some)}")
    if all(cloud is None for cloud in clouds):
        raise ArgumentError("clouds", "every one is None", "give those that were fitted")
    return [
        GivenCloud(f"clouds[{i}]", cloud, f"point_weights[{i}]", weight)
        for i, (cloud, weight) in enumerate(zip(clouds, weights, strict=True))
    ]


def _read(fit: PairFit | GraphFit, problem: MixtureGraph, settled: Refit, found: Refit, level: float) -> Bootstrap:
    """Intervals from replicates that have a result, their components in the fit's order."""
    numbers = [np.asarray(leaf) for leaf in (found.nodes.weights, *found[1:5])]
    usable = np.isin(np.asarray(found.status), USABLE)
    for leaf in numbers:
        usable &= np.isfinite(leaf).reshape(len(usable), -1).all(axis=1)
    if usable.sum() < 2:
        worst = Status(int(found.status[~usable][0]))
        raise FitError(f"bootstrap: {usable.sum()} of {len(usable)} replicates have a usable result: {worst.message}")
    masses, plans, changes, distances, apart = (leaf[usable] for leaf in numbers)
    order = _orders(apart, problem.sizes)
    masses = np.take_along_axis(masses, order, axis=2)
    sources, targets = (order[:, np.asarray(index)] for index in (problem.sources, problem.targets))
    plans = np.take_along_axis(np.take_along_axis(plans, sources[..., None], axis=2), targets[:, :, None], axis=3)
    changes = np.take_along_axis(changes, sources, axis=2)
    plan = fit.plan if isinstance(fit, PairFit) else fit.plans
    if isinstance(fit, PairFit):
        k0, k1 = problem.sizes
        plans, changes, distances = plans[:, 0, :k0, :k1], changes[:, 0, :k0], distances[:, 0]
    own, change = np.asarray(problem.nodes.weights), np.asarray(plan.mass_change())
    changes = np.ones_like(changes) if plan.pair.balanced else changes  # to the last bit
    spread = np.std(masses, axis=0, ddof=1)
    drift = np.max(np.abs(settled.nodes.weights - own) / np.where(spread > 0, spread, np.inf))
    return Bootstrap(
        masses=Intervals.of(own, masses, level),
        plan=Intervals.of(plan.matrix, plans, level),
        mass_change=Intervals.of(change, changes, level),
        growth=Intervals.of(_log(change), _log(changes), level),
        distance=Intervals.of(plan.transport_cost, distances, level, mirrored=True),
        level=jax.device_put(np.asarray(level, own.dtype)),
        drift=jax.device_put(np.asarray(drift, own.dtype)),
        status=jax.device_put(found.status),
        n_steps=jax.device_put(found.n_steps),
    )


def _orders(apart: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """For each replicate and node, of the fit's components in their order, which of the replicate's is each (R, V, K)."""
    n, n_nodes, size, _ = apart.shape
    order = np.broadcast_to(np.arange(size), (n, n_nodes, size)).copy()
    # Where each component's nearest is its own namesake, that is the best assignment; and so it nearly always is.
    namesakes = (np.argmin(apart, axis=3) == np.arange(size)).all(axis=2)
    from scipy.optimize import linear_sum_assignment  # takes a moment to import

    for replicate, node in zip(*np.nonzero(~namesakes), strict=True):
        k = sizes[node]
        order[replicate, node, :k] = linear_sum_assignment(apart[replicate, node, :k, :k])[1]
    return order


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, np.finfo(values.dtype).tiny))
