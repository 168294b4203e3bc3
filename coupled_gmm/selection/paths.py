"""The fits of one size of mixtures along a list of transport weights, without what is held out, and how likely that is then.

One program for all: mixtures are padded to the largest that is asked for with components of weight zero, which stay that.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coupled_gmm.batch import executors
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import AnyArray
from coupled_gmm.fits import contest, statistics
from coupled_gmm.fits.frame import Sight
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.request import Controls, FitOptions
from coupled_gmm.gaussians.mixture import GaussianMixture


class PathTask(NamedTuple):
    """Fits along weights, and the points that they are scored at."""

    problem: MixtureGraph
    starts: GaussianMixture  # nodes, stacked on axes S V
    weights: Float[AnyArray, "W E"]
    sight: Sight
    held: Float[AnyArray, "H C B"]
    controls: Controls


class Path(NamedTuple):
    """Where the fits along some weights ended."""

    nodes: GaussianMixture  # stacked on axes W V
    scores: Float[
        AnyArray, "W H V"
    ]  # mean log-density of each part of what was held out; 0 for nodes of which nothing was
    log_likelihoods: Float[AnyArray, "W V"]  # of what was fitted
    transport: Float[AnyArray, "W E"]
    values: Float[AnyArray, " W"]
    status: Int[AnyArray, " W"]


def paths(tasks: Sequence[PathTask], options: FitOptions) -> Iterator[tuple[int, Path]]:
    """The number and result of each as it is done; on a CPU a thread for each core."""
    first, *others = ((task, options) for task in tasks)
    yield 0, jax.tree.map(jax.device_get, _finished(*first))  # compiled once, not by each thread
    for index, path in executors.outcomes(_finished, others):
        yield index + 1, path


def _finished(task: PathTask, options: FitOptions) -> Path:
    return jax.block_until_ready(_path(task, options))


@program("options", over_matrices=True)
def _path(task: PathTask, options: FitOptions) -> Path:
    problem, order = task.problem.in_node_order()
    weights = task.weights[:, order]
    schedule = schedule_along(len(weights), len(task.starts.weights))
    ends, _ = contest.run_all(problem, task.starts, weights, schedule, task.sight, task.controls, options)

    def scores(nodes: GaussianMixture) -> Float[Array, "H V"]:
        return jax.lax.map(lambda held: mean_log_densities(nodes, task.sight, held), task.held)

    back = jnp.argsort(order)
    found = ends.log_likelihoods, ends.terms.transport[:, back], ends.value, ends.status
    return Path(ends.nodes, jax.lax.map(scores, ends.nodes), *found)


def schedule_along(n_weights: int, n_starts: int) -> contest.Schedule:
    """`contest.Schedule.along` with all starts at the first weight, and the first start alone at the others."""
    whole = contest.Schedule.along(n_weights, n_starts)
    kept = (whole.start <= 0) | (whole.weight == 0)
    return contest.Schedule(whole.weight[kept], whole.start[kept])


def mean_log_densities(nodes: GaussianMixture, sight: Sight, weights: Float[Array, "C B"]) -> Float[Array, " V"]:
    """Of each node's points, weighted, in data units; 0 where none has a weight."""
    zeros = jnp.zeros((len(nodes.weights), sight.n_features), nodes.dtype)
    base = statistics.Base.of(sight.frame.parameters(nodes, zeros))
    sums = statistics.additive_sums(base, dataclasses.replace(sight.chunks, weights=weights), zeros)
    volume = sight.n_features * jnp.log(sight.frame.unit)
    return sums.log_likelihood - volume * jnp.sum(sums.masses, axis=-1)


def with_split(sight: Sight, split: Any) -> Sight:
    """The same clouds with the weights of what is fitted."""
    return dataclasses.replace(
        sight, chunks=dataclasses.replace(sight.chunks, weights=split.fitted), has_cloud=split.has_cloud
    )
