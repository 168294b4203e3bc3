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
    scores: Float[AnyArray, "W H V"]  # mean log-densities of parts of what was held out; 0 where a node has none
    variances: Float[AnyArray, "W H V"]  # of these means, as points are drawn at random
    log_likelihoods: Float[AnyArray, "W V"]  # of what was fitted
    transport: Float[AnyArray, "W E"]
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

    def scores(nodes: GaussianMixture) -> tuple[Float[Array, "H V"], Float[Array, "H V"]]:
        return mean_log_densities(nodes, task.sight, task.held)

    back = jnp.argsort(order)
    means, variances = jax.lax.map(scores, ends.nodes)
    transport = ends.terms.transport[:, back]
    return Path(ends.nodes, means, variances, ends.log_likelihoods, transport, ends.status)


def schedule_along(n_weights: int, n_starts: int) -> contest.Schedule:
    """`contest.Schedule.along` with all starts at the first weight, and the first start alone at the others."""
    whole = contest.Schedule.along(n_weights, n_starts)
    kept = (whole.start <= 0) | (whole.weight == 0)
    return contest.Schedule(whole.weight[kept], whole.start[kept])


def mean_log_densities(
    nodes: GaussianMixture, sight: Sight, weights: Float[Array, "H C B"]
) -> tuple[Float[Array, "H V"], Float[Array, "H V"]]:
    r"""Of each node's points, in data units, the mean log-density under each of several weights, and that mean's variance:

    .. math:: \sum_i w_i l_i, \quad \sum_i w_i^2 (l_i - \bar l)^2 / (1 - \sum_i w_i^2),

    the squared standard deviation over n for n equal weights. Both are 0 where no point has a weight.
    """
    n_nodes, chunks = len(nodes.weights), sight.chunks
    base = statistics.Base.of(sight.frame.parameters(nodes, jnp.zeros((n_nodes, sight.n_features), nodes.dtype)))
    owner = jnp.minimum(jnp.searchsorted(chunks.ends, jnp.arange(len(chunks.weights)), side="right"), n_nodes - 1)
    density = statistics.log_densities(base, chunks, owner)

    def total(values: Float[Array, "H C B"]) -> Float[Array, "H V"]:
        each = jnp.sum(values, axis=2)
        return jnp.zeros((len(values), n_nodes), values.dtype).at[:, owner].add(each)

    def centred(about: Float[Array, "H V"]) -> Float[Array, "H C B"]:
        return jnp.where(weights > 0, density - about[:, owner, None], 0)

    mean = total(weights * centred(jnp.zeros((len(weights), n_nodes), density.dtype)))
    mean = mean + total(weights * centred(mean))  # of which float32 would lose what weights differ by
    squares = total(weights**2)
    variance = total((weights * centred(mean)) ** 2) / jnp.where(squares < 1, 1 - squares, 1)
    return mean - (total(weights) > 0) * sight.n_features * jnp.log(sight.frame.unit), variance


def with_split(sight: Sight, split: Any) -> Sight:
    """The same clouds with the weights of what is fitted."""
    return dataclasses.replace(
        sight, chunks=dataclasses.replace(sight.chunks, weights=split.fitted), has_cloud=split.has_cloud
    )
