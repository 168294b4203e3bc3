"""Several runs of a fit, of which the best are kept: from several starts, and along a list of transport weights.

One run after the other in one program, which holds a single fit: a schedule says from where each starts.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core.tree import take
from coupled_gmm.fits import em
from coupled_gmm.fits.em import Solution
from coupled_gmm.fits.frame import Sight
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.request import Controls, FitOptions
from coupled_gmm.gaussians.mixture import GaussianMixture


class Schedule(NamedTuple):
    """Runs in their order: of which weight each is, and where it starts: at given start s, or, as -1 - w, where weight w ended."""

    weight: Int[np.ndarray, " runs"]
    start: Int[np.ndarray, " runs"]

    @classmethod
    def along(cls, n_weights: int, n_starts: int) -> "Schedule":
        """Every weight from every start and from the end of the one before it; then back, from the end of the one after it."""
        forth = [
            (weight, start)
            for weight in range(n_weights)
            for start in [*range(n_starts), *([-weight] if weight else [])]
        ]
        back = [(weight, -2 - weight) for weight in range(n_weights - 2, -1, -1)]
        weight, start = np.array(forth + back, np.int32).T
        return cls(weight, start)


class _Best(NamedTuple):
    """The best end so far of every weight, and which weights have one."""

    ends: Solution
    ran: Bool[Array, " W"]


def best_ends(
    problem: MixtureGraph,
    starts: GaussianMixture,
    weights: Float[Array, "W E"],
    schedule: Schedule,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
) -> Solution:
    """The end of highest J for each row of edge weights, stacked; `starts` are nodes of the graph, stacked."""

    def run(weight: Array, nodes: GaussianMixture) -> Solution:
        return em.run(dataclasses.replace(problem, edge_weights=weights[weight], nodes=nodes), sight, controls, options)

    def one(best: _Best, turn: tuple[Array, Array]) -> tuple[_Best, None]:
        weight, start = turn
        before = best.ends.nodes
        nodes = jax.tree.map(
            lambda given, ended: jnp.where(start >= 0, given[jnp.maximum(start, 0)], ended[jnp.maximum(-1 - start, 0)]),
            starts,
            before,
        )
        end = run(weight, nodes)
        better = ~best.ran[weight] | (end.value > best.ends.value[weight]) | jnp.isnan(best.ends.value[weight])
        ends = jax.tree.map(lambda old, new: old.at[weight].set(jnp.where(better, new, old[weight])), best.ends, end)
        return _Best(ends, best.ran.at[weight].set(True)), None

    shapes = jax.eval_shape(run, jnp.asarray(0), take(starts, 0))
    none = jax.tree.map(lambda leaf: jnp.zeros((len(weights), *leaf.shape), leaf.dtype), shapes)
    best = _Best(none, jnp.zeros(len(weights), bool))
    return jax.lax.scan(one, best, (jnp.asarray(schedule.weight), jnp.asarray(schedule.start)))[0].ends
