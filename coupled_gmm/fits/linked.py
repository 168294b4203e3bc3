r"""Starts of fits some of whose links are forbidden: balanced, masses that the links can carry.

A fit moves masses, but J is infinite where links can't carry them, and no ascent begins there. On a graph without circles there are
masses near the given ones that they can: the marginals of

.. math:: p(k_1, \ldots, k_V) \propto \prod_i a_i(k_i) \prod_{(i, j)} M_{ij}(k_i, k_j) ,

M being 1 where there is a link, whose marginals of two joined nodes are a plan between theirs. They are found from the leaves to a
root, and back. A frozen node is the root, and keeps its masses.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import rebuilt
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.links import check_carry, shortage
from coupled_gmm.transport.pair import GaussianMixturePair

_CARRIED = 1e-6  # of all mass, what links may be short of
_REMEDY = "give it weights that they can, more links, or masses that may change (tau below 1)"
Edges = list[tuple[int, int, np.ndarray]]  # nodes and links of those whose masses are held


def started(pair: GaussianMixturePair, frozen: Bool[np.ndarray, "2"]) -> GaussianMixturePair:
    """The pair with weights that its links can carry; its own where they can, and where that is not known.

    Raises:
      ValueError: both sides are frozen, and their weights are none that the links can carry.
    """
    weights = pair.gmm0.weights, pair.gmm1.weights
    if pair.links is None or not pair.balanced or not checks.known(pair.links, weights):
        return pair
    given = [np.asarray(w, np.float64) for w in weights]
    if shortage(np.asarray(pair.links), *given)[0] <= _CARRIED:
        return pair
    if frozen.all():
        check_carry("pair", pair.links, *weights, _CARRIED)
    gmm0, gmm1 = _carried("pair", [pair.gmm0, pair.gmm1], given, [(0, 1, np.asarray(pair.links))], frozen)
    return rebuilt(pair, gmm0=gmm0, gmm1=gmm1)


def started_graph(graph: MixtureGraph) -> MixtureGraph:
    """The same of a graph, in which edges that hold both their masses count.

    Raises:
      ValueError: what holds masses goes in a circle, or joins frozen nodes, and links there can't carry the weights.
    """
    read: Any = (graph.links, graph.nodes.weights, graph.sources, graph.targets, graph.rho, graph.frozen)
    if graph.links is None or not checks.known(read):
        return graph
    masks, weights, sources, targets, rho, frozen = (np.asarray(leaf) for leaf in read)
    held = np.isinf(rho).reshape(len(rho), -1).all(axis=1)
    edges = [(int(sources[e]), int(targets[e]), masks[e]) for e in np.flatnonzero(held)]
    given = [w.astype(np.float64) for w in weights]
    short = [edge for edge in edges if shortage(edge[2], given[edge[0]], given[edge[1]])[0] > _CARRIED]
    if not short:
        return graph
    i, j, _ = short[0]
    gmms = graph.split(graph.nodes)
    found = _carried(f"graph: the links of edge ({i}, {j})", gmms, given, edges, frozen)
    padded = np.stack([np.pad(np.asarray(g.weights), (0, len(given[0]) - len(g.weights))) for g in found])
    nodes = dataclasses.replace(graph.nodes, weights=jax.device_put(padded))
    return dataclasses.replace(graph, nodes=nodes)


def _carried(
    called: str, gmms: list[GaussianMixture], masses: list[np.ndarray], edges: Edges, frozen: np.ndarray
) -> list[GaussianMixture]:
    """The mixtures with masses that links can carry."""
    name, _, which = called.partition(": ")
    which = which or "its links"
    order = _from_roots(len(masses), edges, frozen)
    if order is None:
        problem = f"{which} can't carry the weights that it starts from, in a circle of edges or between frozen nodes"
        raise ArgumentError(name, problem, _REMEDY)
    weights = [m.copy() for m in masses]  # of each component, with all that hangs on it
    for node, parent, mask in reversed(order):
        if parent is not None:
            weights[parent] *= mask @ weights[node]
            weights[parent] /= max(weights[parent].max(), np.finfo(float).tiny)
    found: list[np.ndarray] = [np.zeros(0)] * len(masses)
    for node, parent, mask in order:
        if parent is None:
            mass = masses[node] if frozen[node] else weights[node]
        else:
            ways = mask * weights[node]
            mass = (found[parent] / np.maximum(ways.sum(1), np.finfo(float).tiny)) @ ways
        if not mass.sum() > 0 or (parent is None and np.any((mass > 0) & (weights[node] == 0))):
            raise ArgumentError(name, f"{which} can carry no masses at all", "allow more links")
        found[node] = mass / mass.sum()
    return [
        gmm if still else dataclasses.replace(gmm, weights=jax.device_put(mass[: gmm.n_components].astype(gmm.dtype)))
        for gmm, mass, still in zip(gmms, found, frozen, strict=True)
    ]


def _from_roots(n: int, edges: Edges, frozen: np.ndarray) -> list[tuple[int, int | None, Any]] | None:
    """Nodes, each after its parent, with that and the links from there; None where there are circles, or two frozen in one tree."""
    around: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(n)]
    for i, j, mask in edges:
        around[i].append((j, mask))
        around[j].append((i, mask.T))
    order: list[tuple[int, int | None, Any]] = []
    seen: set[int] = set()
    for root in sorted(range(n), key=lambda node: not frozen[node]):
        if root in seen:
            continue
        seen.add(root)
        tree: list[tuple[int, int | None, Any]] = [(root, None, None)]
        for node, parent, _ in tree:  # grows as it is read
            for other, mask in around[node]:
                if other == parent:
                    continue
                if other in seen or frozen[other]:
                    return None
                seen.add(other)
                tree.append((other, node, mask))
        order += tree
    return order
