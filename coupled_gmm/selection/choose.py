"""How many components, and how dear transport: by how likely points are that a fit has not seen."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks, chunks, meshes, report
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.core.status import USABLE, FitError, Status
from coupled_gmm.core.tree import take
from coupled_gmm.fits.coupled import fit_graph
from coupled_gmm.fits.frame import Sight, View
from coupled_gmm.fits.graph import MixtureGraph, unpadded
from coupled_gmm.fits.linked import started_graph
from coupled_gmm.fits.pairs import fit_pair
from coupled_gmm.fits.request import FitOptions, FitRequest, GivenCloud, view_of
from coupled_gmm.fits.results import GraphFit, PairFit
from coupled_gmm.fits.weights import Weight
from coupled_gmm.gaussians.mixture import GaussianMixture, stack
from coupled_gmm.selection import criteria, rules
from coupled_gmm.selection import folds as splits
from coupled_gmm.selection.choice import Choice
from coupled_gmm.selection.grid import RELATIVE_WEIGHTS, Grid, Prices, Starts, checked_numbers, checked_sizes
from coupled_gmm.selection.paths import Path, PathTask, paths, with_split
from coupled_gmm.transport import solvers
from coupled_gmm.transport.pair import GaussianMixturePair


class _Group(NamedTuple):
    """Rows that differ in their weight alone."""

    starts: Starts  # for fits to all points
    prices: Prices
    whole: Path  # of fits to all points
    scores: Float[np.ndarray, "W F"]
    errors: Float[np.ndarray, " W"]
    by_cloud: Float[np.ndarray, "W V"]  # means of scores
    n_failed: np.ndarray


def choose(
    clouds: Sequence[Any],
    graph_or_key: Any,
    *,
    relative_weights: Sequence[float] | None = None,
    n_components: Any = None,
    epsilons: Any = None,
    rhos: Any = None,
    folds: int = 5,
    rule: str = "one_standard_error",
    held_out: str = "points",
    key: Any = None,
    point_weights: Sequence[Any] | None = None,
    n_init: int = 4,
    em_steps: int = 200,
    m_steps: int = 20,
    tol: Any = 1e-5,
    ridge: Any = 1e-6,
    progress: Any = False,
) -> Choice:
    r"""The coupled fit whose number of components and transport weight serve points best that it has not seen.

    Each fold of the points of every cloud is held out in turn; fits of the others are scored by

    .. math:: s = \sum_i v_i \, \overline{\log p_i(x)} \quad \text{over the points x of cloud i that were held out,}

    for every number of components, epsilon, rho and relative weight. Along the weights fits start from one another, in both
    directions, and the best J is kept, as in `fit_path`. A row's mean over F folds has, as points are drawn at random, the standard
    error

    .. math:: se^2 = \frac1{F^2} \sum_{f, i} v_i^2 \, \mathrm{var}_i(\log p_i(x)) / n_{f, i},

    and rules are:

    - "one_standard_error": of all rows that the best is ahead of by no more than its standard error (Breiman et al. 1984) the
      fewest components, and of these the strongest coupling: the largest weight, at the epsilon and rho at which that costs most.
      Rows are left out in which coupling has cost a cloud more than chance costs fits apart: p / 2n nats per held-out point, of p
      numbers that are fitted to n points, by which these are on average worse than the true ones; or more than 0.1, there or in
      the fit to all points.
    - "best": the best mean score.
    - "corner": of the components, epsilon and rho that the first rule takes, the weight where log-likelihood against transport, of
      fits to all points, is farthest above the line between its ends.

    The row that is chosen is fitted to all points, from where the path of its weights ended there.

    Args:
      clouds: two, or one for each node of a graph, (n, d) or None.
      graph_or_key: a random key, for the pair of two clouds or, where there are more, the chain in their order; or a
        `MixtureGraph`, with its edges and their weights, prices, node weights and frozen mixtures.
      relative_weights: at least 0, as in `fit_pair` and `fit_graph`; 0, fits apart, is always among them. None takes 0 and 1e-4 to
        10, by factors of about 3.
      n_components: K of all mixtures that are not frozen, one or several; None takes 1 to 8, or the graph's own mixtures. With a
        graph it needs `key`.
      epsilons: above 0, parts of the mean cost between the components of the start: 1e-2 where none are given, or the graph's own.
      rhos: above 0, the same; infinite is balanced, as where none are given, or the graph's own.
      folds: at least 2.
      rule: one of those above.
      held_out: "points"; or "nodes": the whole cloud of each node that has two neighbours, which the node's mixture is then to
        foretell from its neighbours alone. Folds are those of its points, all of which are scored.
      key: beside a graph, decides folds and starts; None deals points to folds in turn.
      point_weights: for each cloud (n,) or None.
      n_init: starts for each number of components, all of which are fitted apart, and the first at every weight.
      em_steps, m_steps, tol, ridge: as in `fit_pair`.
      progress: True draws a bar; a callable gets a dict of what is ``done`` and ``of`` how many.

    Returns:
      A `Choice`: `fit`, `chosen`, and a `table` of all rows with their BIC and AIC (of mixtures fitted apart).

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range, before anything is compiled.
      FitError: no fit has a usable result.

    >>> x = jax.random.normal(jax.random.key(1), (200, 1)) + jnp.repeat(jnp.array([0.0, 9.0]), 100)[:, None]
    >>> choice = cg.choose([x, x + 1], jax.random.key(0), n_components=[1, 2, 3], relative_weights=[0.01, 0.1])
    >>> print(choice.chosen["n_components"], choice.fit.pair.gmm1.n_components)
    2 2
    """
    if not checks.known(clouds, graph_or_key, key, relative_weights, epsilons, rhos, point_weights):
        raise ArgumentError("clouds", "arguments are traced", "call choose outside of transformations")
    checks.choice("rule", rule, rules.RULES)
    checks.choice("held_out", held_out, ("points", "nodes"))
    n_folds = checks.integer("folds", folds, 2)
    n_init = checks.integer("n_init", n_init, 1, checks.MOST_STARTS)
    weights = checked_numbers("relative_weights", relative_weights, at_least=0) or RELATIVE_WEIGHTS
    weights = tuple(sorted({0.0, *weights}))
    prices = {"epsilons": checked_numbers("epsilons", epsilons, above=0)}
    prices |= {"rhos": checked_numbers("rhos", rhos, above=0, infinite=True)}
    request = FitRequest.checked(ridge=ridge, tol=tol, em_steps=em_steps, m_steps=m_steps)
    graph, key = _graph_and_key(graph_or_key, key)
    given = _given(clouds, point_weights, None if graph is None else graph.n_nodes)
    starts = [] if graph is None else [graph.nodes]
    view = view_of(given, starts, request.controls.ridge, in_memory="choose by a sample of it: cloud.rows(indices)")
    for cloud, x in zip(given, view.clouds, strict=True):
        if meshes.is_spread(x):
            raise ArgumentError(cloud.name, "lies on several devices", "choose by points that lie on one")
    own = graph is not None and n_components is None
    if graph is not None and graph.links is not None:
        if not own:
            problem = "draws components in no order, and the graph's links say of each what it may be linked to"
            raise ArgumentError("n_components", problem, "leave it out: the graph's own mixtures are taken")
        graph = started_graph(graph)
    if graph is not None and not own and key is None:
        raise ArgumentError("key", "decides the starts of other numbers of components", "pass key=jax.random.key(0)")
    smallest = min(len(x) for x in view.clouds if x is not None)
    sizes = None if own else checked_sizes(n_components, smallest)
    grid = Grid(graph or _chain(view), key, sizes, weights, n_init=n_init, **prices)
    labels = splits.drawn(key, view, n_folds)
    groups = _fitted(grid, view, labels, n_folds, held_out, request, progress)
    return _chosen(grid, view, groups, rule, request, given, is_pair=graph is None and len(given) == 2)


def _graph_and_key(given: Any, key: Any) -> tuple[MixtureGraph | None, Array | None]:
    if isinstance(given, MixtureGraph):
        checks.instance("graph_or_key", given, MixtureGraph)
        return given, None if key is None else checks.key("key", key)
    if not isinstance(given, (jax.Array, np.ndarray)):
        raise ArgumentTypeError("graph_or_key", f"expected a MixtureGraph or a random key, got {type(given).__name__}")
    if key is not None:
        raise ArgumentError("key", "goes with a graph, and there is a key in its place", "drop it")
    return None, checks.key("graph_or_key", given)


def _given(clouds: Any, weights: Any, n_nodes: int | None) -> list[GivenCloud]:
    clouds = checks.sequence("clouds", clouds)
    n = len(clouds) if n_nodes is None else n_nodes
    weights = [None] * n if weights is None else checks.sequence("point_weights", weights)
    if n_nodes is None and (n < 2 or any(cloud is None for cloud in clouds)):
        raise ArgumentError("clouds", "expected two or more, all with points", "pass a graph where some have none")
    for name, some in (("clouds", clouds), ("point_weights", weights)):
        if len(some) != n:
            raise ArgumentError(name, f"expected one for each of the {n} mixtures, got {len(some)}")
    if all(cloud is None for cloud in clouds):
        raise ArgumentError("clouds", "every one is None", "a fit needs at least one cloud")
    return [
        GivenCloud(f"clouds[{i}]", cloud, f"point_weights[{i}]", weight)
        for i, (cloud, weight) in enumerate(zip(clouds, weights, strict=True))
    ]


def _chain(view: View) -> MixtureGraph:
    """Of as many nodes as there are clouds, one after the other, with one component each until they get others."""
    n, d, dtype = len(view.clouds), len(view.pooled), view.pooled.dtype
    one = GaussianMixture.from_moments(np.zeros((1, d), dtype), np.eye(d, dtype=dtype)[None], np.ones(1, dtype))
    return MixtureGraph.from_mixtures([one] * n, [(i, i + 1) for i in range(n - 1)], epsilon=1.0)


def _fitted(
    grid: Grid,
    view: View,
    labels: list[np.ndarray],
    n_folds: int,
    held_out: str,
    request: FitRequest,
    progress: Any,
) -> list[_Group]:
    """All paths of weights, to all points and without what is held out, by one program."""
    graph, ridge = grid.graph, request.controls.ridge
    sight = view.in_chunks(grid.largest * graph.nodes.n_features)
    options = FitOptions(chunks.rows(request.em_steps), solvers.ENTROPIC, None, progress=False)
    scale = Weight.given(None, np.asarray(grid.relative_weights), "s").of(view)
    weights = np.asarray(scale)[:, None] * np.asarray(graph.edge_weights)
    some = _splits(graph, sight, view, labels, n_folds, held_out)
    tasks, groups = [], []
    for size in grid.n_components or (None,):
        of_all = grid.starts(view, ridge, size)
        each = [of_all if s.without is None else grid.starts(_without(view, s.without), ridge, size) for s in some]
        for prices in grid.prices(of_all):
            problem = dataclasses.replace(
                graph, sizes=(grid.largest,) * graph.n_nodes, balanced=False, epsilon=prices.epsilon, rho=prices.rho
            )
            for split, starts in zip(some, each, strict=True):
                nodes = jax.device_put(starts.nodes)
                problem = dataclasses.replace(problem, nodes=take(nodes, 0))
                seen = with_split(sight, split)
                some_weights, held = jax.device_put((weights.astype(graph.nodes.dtype), split.held))
                tasks.append(PathTask(problem, nodes, some_weights, jax.device_put(seen), held, request.controls))
            groups.append((of_all, prices))
    found: list[Any] = [None] * len(tasks)
    with report.counting(progress, len(tasks), "choosing") as advance:
        for index, path in paths(tasks, options):
            found[index] = path
            advance()
    n = len(some)
    node_weights = np.asarray(graph.node_weights)
    return [_Group(*group, *_scored(found[n * i : n * (i + 1)], some, node_weights)) for i, group in enumerate(groups)]


def _splits(
    graph: MixtureGraph, sight: Sight, view: View, labels: list[np.ndarray], n_folds: int, held_out: str
) -> list[splits.Split]:
    """Nothing held out, then each of what is."""
    if held_out == "points":
        return [splits.whole(sight.chunks, view, 1), *splits.by_points(sight.chunks, view, labels, n_folds)]
    edges = np.stack([np.asarray(graph.sources), np.asarray(graph.targets)], axis=1)
    nodes = splits.interior(edges, view, np.asarray(graph.frozen))
    if not nodes:
        raise ArgumentError(
            "held_out", "no node that has a cloud and is not frozen lies between two others", "hold out 'points'"
        )
    return [
        splits.whole(sight.chunks, view, n_folds), *splits.by_nodes(sight.chunks, view, labels, n_folds, nodes)
    ]  # fmt: skip


def _without(view: View, node: int) -> View:
    clouds, weights = list(view.clouds), list(view.weights)
    clouds[node] = weights[node] = None
    return view._replace(clouds=clouds, weights=weights)


def _scored(found: list[Path], some: list[splits.Split], node_weights: np.ndarray) -> tuple:
    """The path of all points; scores of the others, fold by fold, and their means' standard errors; means cloud by cloud; and how
    many of them have no usable result, by weight."""
    scores, variances, failures, sums, counts = [], [], [], 0.0, 0.0
    for path, split in zip(found[1:], some[1:], strict=True):
        held = np.ones(len(node_weights)) if split.without is None else np.arange(len(node_weights)) == split.without
        by = held * (node_weights.astype(np.float64) if split.without is None else 1)
        each = np.asarray(path.scores, np.float64)
        value = each @ by  # (W, H)
        failed = ~np.isin(np.asarray(path.status), USABLE) | ~np.isfinite(value).all(axis=1)
        scores.append(np.where(failed[:, None], -np.inf, value))
        variances.append(np.asarray(path.variances, np.float64) @ by**2)
        failures.append(failed)
        sums, counts = sums + each.sum(axis=1), counts + held * value.shape[1]
    variance = np.concatenate(variances, axis=1)
    error = np.nan_to_num(np.sqrt(np.sum(variance, axis=1)) / variance.shape[1], nan=np.inf)
    by_cloud = sums / np.maximum(counts, 1)
    return found[0], np.concatenate(scores, axis=1), error, by_cloud, np.sum(failures, axis=0)


def _chosen(
    grid: Grid,
    view: View,
    groups: list[_Group],
    rule: str,
    request: FitRequest,
    given: list[GivenCloud],
    is_pair: bool,
) -> Choice:
    """The table, the row that the rule takes, and its fit to all points.

    Where the penalty has overruled the data in a fit, coupling was dear: the rule of one standard error then takes another row.
    """
    n, columns = len(grid.relative_weights), _columns(grid, view, groups)
    if not np.isfinite(columns["scores"]).all(axis=1).any():
        status = Status(int(np.asarray(groups[0].whole.status)[0]))
        raise FitError(f"choose: no fit has a usable result in every fold: {status.message}")
    fields = {"sizes": "n_components", "weights": "relative_weights", "errors": "standard_errors"}
    candidates = rules.Candidates(*(columns[fields.get(name, name)] for name in rules.Candidates._fields))

    def fitted(row: int) -> PairFit | GraphFit:
        return _refitted(grid, groups[row // n], row % n, request, given, is_pair)

    row = rules.chosen(candidates, rule)
    fit = fitted(row)
    while rule == "one_standard_error" and fit.fidelity is not None and fit.fidelity.overruled.any():
        candidates.dear[row] = True
        before, row = row, rules.chosen(candidates, rule)
        if row == before:
            break
        fit = fitted(row)
    return Choice(fit, **jax.device_put(columns), row=jax.device_put(np.int32(row)), rule=rule)


def _columns(grid: Grid, view: View, groups: list[_Group]) -> dict[str, np.ndarray]:
    """Of the table, as `Choice` has them."""
    n, dtype = len(grid.relative_weights), grid.graph.nodes.dtype
    edge_weights = np.asarray(grid.graph.edge_weights)
    fitted = [criteria.Fitted.of(view, group.starts.sizes, grid, group.whole, group.by_cloud) for group in groups]

    def rows(values: list[Any]) -> np.ndarray:
        return np.repeat(np.asarray(values), n)

    scale = np.asarray(Weight.given(None, np.asarray(grid.relative_weights), "s").of(view), dtype)
    transport = np.concatenate([np.asarray(group.whole.transport) @ _shares(edge_weights) for group in groups])
    likelihoods = np.concatenate([np.asarray(group.whole.log_likelihoods) for group in groups])
    likelihoods = likelihoods @ np.asarray(grid.graph.node_weights)
    return {
        "n_components": rows([max(group.starts.sizes) for group in groups]).astype(np.int32),
        "relative_weights": np.tile(np.asarray(grid.relative_weights, dtype), len(groups)),
        "transport_weights": np.tile(scale, len(groups)),
        "epsilons": rows([np.mean(np.asarray(group.prices.epsilon)) for group in groups]).astype(dtype),
        "rhos": rows([np.mean(np.asarray(group.prices.rho)) for group in groups]).astype(dtype),
        "scores": np.concatenate([group.scores for group in groups]).astype(dtype),
        "standard_errors": np.concatenate([group.errors for group in groups]).astype(dtype),
        "lost": np.concatenate([one.lost.max(axis=1) for one in fitted]).astype(dtype),
        "dear": np.concatenate([one.dear() for one in fitted]),
        "log_likelihoods": likelihoods.astype(dtype),
        "transport": transport.astype(dtype),
        "bic": rows([one.bic() for one in fitted]).astype(dtype),
        "aic": rows([one.aic() for one in fitted]).astype(dtype),
        "n_failed": np.concatenate([group.n_failed for group in groups]).astype(np.int32),
        "groups": rows(list(range(len(groups)))).astype(np.int32),
    }


def _shares(edge_weights: np.ndarray) -> np.ndarray:
    """Of edges, in the transport of a table's row: as their weights, whose mean is 1."""
    total = edge_weights.sum()
    return edge_weights * (len(edge_weights) / total) if total > 0 else np.ones_like(edge_weights)


def _refitted(
    grid: Grid, group: _Group, place: int, request: FitRequest, given: list[GivenCloud], is_pair: bool
) -> PairFit | GraphFit:
    """The fit to all points, from where its path ended: the same program and the same result as of the public functions."""
    nodes = jax.device_put(take(group.whole.nodes, place))
    gmms = [unpadded(take(nodes, i), size) for i, size in enumerate(group.starts.sizes)]
    asked: dict[str, Any] = {"em_steps": request.em_steps, "m_steps": int(request.controls.m_steps)}
    asked |= {"tol": request.controls.tol, "ridge": request.controls.ridge}
    asked |= {"relative_weight": grid.relative_weights[place]}
    clouds, weights = [cloud.points for cloud in given], [cloud.weights for cloud in given]
    epsilon, rho = group.prices
    if is_pair:
        (x0, x1), (w0, w1), (gmm0, gmm1) = clouds, weights, gmms
        pair = GaussianMixturePair(gmm0, gmm1, epsilon[0], rho=rho[0])
        return fit_pair(x0, x1, pair, point_weights0=w0, point_weights1=w1, **asked)
    again = dataclasses.replace(
        grid.graph,
        nodes=stack(gmms),
        sizes=tuple(gmm.n_components for gmm in gmms),
        epsilon=epsilon,
        rho=rho,
        balanced=bool(np.all(np.isinf(np.asarray(rho)))),
    )
    return fit_graph(clouds, again, point_weights=weights, **asked)
