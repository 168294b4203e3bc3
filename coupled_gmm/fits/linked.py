"""Starts of fits whose links are forbidden in part: balanced, masses that links can carry.

A fit moves masses, but J is infinite where links can't carry them, and no ascent begins there.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.links import check_carry, shortage
from coupled_gmm.transport.pair import GaussianMixturePair, rebuilt

_CARRIED = 1e-6  # of all mass, what links may be short of


def started(pair: GaussianMixturePair, frozen: Bool[np.ndarray, "2"]) -> GaussianMixturePair:
    r"""The pair with weights that its links can carry: its own, or the marginals of :math:`a b^T` on the links alone.

    A frozen side keeps its weights: then of its rows, each with its own mass.

    Raises:
      ValueError: both sides are frozen, and their weights are none that the links can carry.
    """
    weights = pair.gmm0.weights, pair.gmm1.weights
    if pair.links is None or not pair.balanced or not checks.known(pair.links, weights):
        return pair
    allowed, a, b = np.asarray(pair.links), *(np.asarray(w, np.float64) for w in weights)
    if shortage(allowed, a, b)[0] <= _CARRIED:
        return pair
    if frozen.all():
        check_carry("pair", pair.links, *weights, _CARRIED)
    plan = a[:, None] * b * allowed
    for side in (1, 0):
        if frozen[1 - side]:
            plan = plan * ((a[:, None], b)[1 - side] / plan.sum(side, keepdims=True).clip(np.finfo(float).tiny))
    plan = plan / plan.sum()
    sides = zip((pair.gmm0, pair.gmm1), frozen, (plan.sum(1), plan.sum(0)), strict=True)
    gmm0, gmm1 = (gmm if still else _reweighted(gmm, masses) for gmm, still, masses in sides)
    return rebuilt(pair, gmm0=gmm0, gmm1=gmm1)


def _reweighted(gmm: GaussianMixture, weights: np.ndarray) -> GaussianMixture:
    return dataclasses.replace(gmm, weights=jax.device_put(weights.astype(gmm.dtype)))


def check_edges(graph: MixtureGraph) -> None:
    """Refuse a graph of balanced edges with links that can't carry the weights that it starts from, where these are known."""
    known: Any = (graph.links, graph.nodes.weights, graph.sources, graph.targets)
    if graph.links is None or not graph.balanced or not checks.known(known):
        return
    for edge, (i, j) in enumerate(zip(np.asarray(graph.sources), np.asarray(graph.targets), strict=True)):
        sides = graph.nodes.weights[i], graph.nodes.weights[j]
        if shortage(*(np.asarray(x) for x in (graph.links[edge], *sides)))[0] > _CARRIED:
            raise ArgumentError(
                "graph",
                f"the links of edge ({i}, {j}) can't carry the weights that its nodes start from",
                "start it from the mixtures of a fit_pair with these links, or let masses change (tau below 1)",
            )
