"""A fit again and again, under other weights of the same points: the program of the bootstrap.

Nothing is copied: a replicate is a row of weights, drawn where it is used. It starts where the fit has ended, near where it will
end itself, and so needs few steps. One program goes through the replicates one by one: on a CPU a thread for each core calls it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.batch import executors
from coupled_gmm.core.chunks import Chunks
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import AnyArray, take
from coupled_gmm.fits import em
from coupled_gmm.fits.coupled import graph_fit
from coupled_gmm.fits.frame import Sight
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.request import Controls, FitOptions
from coupled_gmm.gaussians import bures
from coupled_gmm.gaussians.mixture import GaussianMixture

_BLOCK = 256  # points whose weights have one key; chunks are as long, or a multiple of it


class Refit(NamedTuple):
    """What is kept of the fit of a replicate; of several, stacked."""

    nodes: GaussianMixture  # stacked on an axis V
    plans: Float[AnyArray, "*R E K K"]
    mass_changes: Float[AnyArray, "*R E K"]
    distances: Float[AnyArray, "*R E"]
    apart: Float[AnyArray, "*R V K K"]  # squared distances of the fit's components from the replicate's
    status: Int[AnyArray, "*R"]
    n_steps: Int[AnyArray, "*R"]


class Resampling(NamedTuple):
    """What is fitted again: the graph at the fit's end, its clouds, and how."""

    problem: MixtureGraph
    fitted: GaussianMixture  # nodes with whose components those of replicates are compared
    sight: Sight
    controls: Controls


def refits(task: Resampling, options: FitOptions, key: Array, n_replicates: int) -> tuple[Refit, Refit]:
    """Where the fit itself ends when it goes on; and where the replicates end that start there, stacked."""

    def part(task: Resampling, numbers: np.ndarray, room: int, drawn: bool) -> tuple:
        return task, options, key, np.resize(numbers, room).astype(np.int32), np.int32(len(numbers)), np.bool_(drawn)

    workers = min(executors.threads(), n_replicates)
    parts = [np.arange(n_replicates)[i::workers] for i in range(workers)]
    room = len(parts[0])
    settled = jax.device_get(take(_refits(*part(task, np.zeros(1), room, drawn=False)), 0))
    problem = dataclasses.replace(task.problem, nodes=jax.device_put(settled.nodes))
    tasks = [part(task._replace(problem=problem), numbers, room, drawn=True) for numbers in parts]
    found = dict(executors.outcomes(_fitted, tasks))
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(found[index] for index in range(workers)))
    places = np.concatenate([room * index + np.arange(len(numbers)) for index, numbers in enumerate(parts)])
    return settled, take(joined, places[np.argsort(np.concatenate(parts))])


def _fitted(*arguments: object) -> Refit:
    return jax.block_until_ready(_refits(*arguments))


@program("options", over_matrices=True)
def _refits(
    task: Resampling,
    options: FitOptions,
    key: Array,
    numbers: Int[Array, " R"],
    count: Int[Array, ""],
    drawn: Bool[Array, ""],
) -> Refit:
    """Replicates of the first `count` of these numbers, stacked; not `drawn`, with the points' own weights."""
    problem, order = task.problem.in_node_order()
    factors = task.fitted.cholesky

    def one(number: Array) -> Refit:
        chunks = reweighted(jax.random.fold_in(key, number), task.sight.chunks, drawn)
        end = em.run(problem, dataclasses.replace(task.sight, chunks=chunks), task.controls, options)
        plans = graph_fit(task.problem, end, order).plans
        moved = end.nodes.means, end.nodes.cholesky
        apart = jax.vmap(bures.pairwise_cost)(task.fitted.means, factors, *moved)
        found = plans.matrix, plans.mass_change(), plans.transport_cost
        return Refit(end.nodes, *found, apart, end.status, end.n_steps)

    shapes = jax.eval_shape(one, numbers[0])
    nothing = jax.tree.map(lambda leaf: jnp.zeros((len(numbers), *leaf.shape), leaf.dtype), shapes)

    def add(index: Array, found: Refit) -> Refit:
        return jax.tree.map(lambda all, one: all.at[index].set(one), found, one(numbers[index]))

    return jax.lax.fori_loop(0, count, add, nothing)


def reweighted(key: Array, chunks: Chunks, drawn: Bool[Array, ""]) -> Chunks:
    """The same points with their weights times independent standard exponentials, in every cloud summing to 1 again.

    By the key and the point's place alone, however long chunks are.
    """
    n_chunks, length = chunks.weights.shape
    blocks, clouds = length // _BLOCK, jnp.arange(n_chunks)
    owner = jnp.searchsorted(chunks.ends, clouds, side="right")
    begins = jnp.concatenate([jnp.zeros(1, chunks.ends.dtype), chunks.ends])[owner]

    def reweigh(index: Array, weights: Array) -> Array:
        mine = jax.random.fold_in(key, owner[index])
        first = (index - begins[index]) * blocks
        keys = jax.vmap(lambda block: jax.random.fold_in(mine, first + block))(jnp.arange(blocks))
        draws = jax.vmap(lambda key: jax.random.exponential(key, (_BLOCK,), weights.dtype))(keys)
        return weights.at[index].multiply(jnp.where(drawn, draws.reshape(-1), 1))

    weights = jax.lax.fori_loop(0, chunks.count, reweigh, chunks.weights)
    totals = jax.ops.segment_sum(jnp.sum(weights, axis=1), owner, len(chunks.ends) + 1)[owner]
    return dataclasses.replace(chunks, weights=weights / jnp.where(totals > 0, totals, 1)[:, None])
