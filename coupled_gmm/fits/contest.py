"""Several runs of a fit, of which the best are kept: from several starts, and along a list of transport weights.

One run after the other in one program, which holds a single fit: a schedule says from where each starts. The last may be refits
of the best ends at weight zero.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.status import Outcome
from coupled_gmm.core.tree import chosen, counted, number, pytree, saved, take
from coupled_gmm.fits import em, refits
from coupled_gmm.fits.em import Solution
from coupled_gmm.fits.fidelity import Ended, Fidelity
from coupled_gmm.fits.frame import Sight
from coupled_gmm.fits.gmm import highest
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

    def refitted(self, n_weights: int) -> "Schedule":
        """The same, and then for each weight a run of another row of weights, from where it ended."""
        last = np.arange(n_weights, dtype=np.int32)
        return Schedule(np.concatenate([self.weight, n_weights + last]), np.concatenate([self.start, -1 - last]))


@saved
@pytree
class StartEnds(Outcome):
    """Where a fit ended from each of its S starts: J, and how."""

    penalized_log_likelihood: Float[Array, "*b S"]
    status: Int[Array, "*b S"]

    def _words(self) -> list[str]:
        return [*counted(self.status.shape[-1], "start"), f"J {number(self.penalized_log_likelihood)}", *self._ended()]


class _Best(NamedTuple):
    """The best end so far of every weight, and which weights have one."""

    ends: Solution
    ran: Bool[Array, " W"]


def check_starts(n_init: Any, key: Any) -> int:
    """A number of starts, of which more than one are drawn by a key."""
    n_init = checks.integer("n_init", n_init, 1, checks.MOST_STARTS)
    if (key is None) != (n_init == 1):
        raise ArgumentError("key", "goes with an n_init above 1, whose starts it decides", "pass both, or neither")
    if key is not None:
        checks.key("key", key)
    return n_init


def check_drawn(n_init: int, noun: str, links: Any) -> None:
    """Refuse several starts of a pair or a graph whose links say which component is which."""
    if n_init > 1 and links is not None:
        problem = f"draws components in no order, and the {noun}'s links say of each what it may be linked to"
        raise ArgumentError("n_init", problem, f"fit from {noun}s of your own, one by one")


def best_of(fits: list[Any]) -> Any:
    """The fit of highest J, with the ends of all."""
    values = np.array([float(fit.penalized_log_likelihood) for fit in fits])
    best = fits[highest(values)]
    every = [(fit.penalized_log_likelihood, fit.status) for fit in fits]
    return dataclasses.replace(best, starts=StartEnds(*(jnp.stack(column) for column in zip(*every, strict=True))))


class Contest(NamedTuple):
    """What came of some runs: the end of highest J for each of W weights, all starts' ends, and what coupling has cost the best."""

    best: Solution
    starts: StartEnds
    fidelity: Fidelity | None


def best_ends(
    problem: MixtureGraph,
    starts: GaussianMixture,
    weights: Float[Array, "W E"],
    schedule: Schedule,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
) -> Contest:
    """Of some rows of edge weights; `starts` are nodes of the graph, stacked.

    The schedule has every start at every weight. Refits, where the options ask for them, are its last runs.
    """
    n_weights = len(weights)
    from_starts = np.flatnonzero(schedule.start >= 0).reshape(n_weights, -1)
    if options.refits:
        schedule = schedule.refitted(n_weights)
        weights = jnp.concatenate([weights, jnp.zeros_like(weights)])
    ends, every = run_all(problem, starts, weights, schedule, sight, controls, options)
    every = StartEnds(*take(every, from_starts))
    if not options.refits:
        return Contest(ends, every, None)

    def ended(ends: Solution) -> Ended:
        return Ended(jax.vmap(problem.split)(ends.nodes), ends.log_likelihoods, ends.penalized)

    best, alone = take(ends, slice(n_weights)), take(ends, slice(n_weights, None))
    return Contest(best, every, Fidelity.of(ended(best), ended(alone), problem.frozen, sight.has_cloud))


def run_all(
    problem: MixtureGraph,
    starts: GaussianMixture,
    weights: Float[Array, "W E"],
    schedule: Schedule,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
) -> tuple[Solution, tuple[Float[Array, " runs"], Int[Array, " runs"]]]:
    """The best end for each row of weights, stacked, by any schedule; and J and status of every run."""
    first = dataclasses.replace(problem, nodes=take(starts, 0))

    def run(weight: Array, nodes: GaussianMixture) -> Solution:
        asked = dataclasses.replace(problem, edge_weights=weights[weight], nodes=nodes), controls
        if options.refits:
            alone = refits.graph(first, nodes, sight.has_cloud), refits.sparing(controls)
            asked = chosen(weight >= len(weights) // 2, alone, asked)
        return em.run(asked[0], sight, asked[1], options)

    def one(best: _Best, turn: tuple[Array, Array]) -> tuple[_Best, tuple[Array, Array]]:
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
        return _Best(ends, best.ran.at[weight].set(True)), (end.value, end.status)

    shapes = jax.eval_shape(run, jnp.asarray(0), take(starts, 0))
    none = jax.tree.map(lambda leaf: jnp.zeros((len(weights), *leaf.shape), leaf.dtype), shapes)
    best = _Best(none, jnp.zeros(len(weights), bool))
    best, every = jax.lax.scan(one, best, (jnp.asarray(schedule.weight), jnp.asarray(schedule.start)))
    return best.ends, every
