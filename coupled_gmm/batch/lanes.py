"""Runs of unequal length side by side: as many lanes as are worth it, and where one has ended the next run begins."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from coupled_gmm.core.tree import take

_CPU_LANES, _GPU_LANES = 4, 4096  # on a CPU more wait for each other longer than they save


class Work(NamedTuple):
    """What is done with a problem, one of a stack: begun, carried on while it runs, and read where it ended.

    `step` takes the problems and states of all lanes, and which of them run; the others of one.
    """

    begin: Callable[[Any], Any]
    step: Callable[[Any, Any, Bool[Array, " L"]], Any]
    runs: Callable[[Any], Bool[Array, ""]]
    finish: Callable[[Any, Any], Any]


class _Lanes(NamedTuple):
    numbers: Int[Array, " L"]  # of the problem in each; past the last where a lane is idle
    next: Int[Array, ""]
    states: Any
    ends: Any


def lanes_for(size: int) -> int:
    """Lanes that so many problems are dealt to."""
    return min(size, _CPU_LANES if jax.default_backend() == "cpu" else _GPU_LANES)


def ends(work: Work, problems: Any, count: Any) -> Any:
    """Where the first `count` of some stacked problems end, stacked; zero for the others."""
    size = len(jax.tree.leaves(problems)[0])
    n_lanes = lanes_for(size)

    def of(numbers: Array) -> Any:
        return take(problems, jnp.minimum(numbers, size - 1))

    def running(lanes: _Lanes) -> Bool[Array, " L"]:
        return (lanes.numbers < count) & jax.vmap(work.runs)(lanes.states)

    def step(lanes: _Lanes) -> _Lanes:
        run = running(lanes)
        states = _chosen(run, work.step(of(lanes.numbers), lanes.states, run), lanes.states)
        lanes = lanes._replace(states=states)
        run = running(lanes)
        done = jnp.sum((lanes.numbers < count) & ~run)
        return jax.lax.cond((done >= max(1, n_lanes // 8)) | ~jnp.any(run), refilled, lambda same: same, lanes)

    def refilled(lanes: _Lanes) -> _Lanes:
        done = (lanes.numbers < count) & ~running(lanes)
        found = jax.vmap(work.finish)(of(lanes.numbers), lanes.states)
        places = jnp.where(done, lanes.numbers, size)
        every = jax.tree.map(lambda all, some: all.at[places].set(some, mode="drop"), lanes.ends, found)
        numbers = jnp.where(done, lanes.next + jnp.cumsum(done) - 1, lanes.numbers)
        states = _chosen(done, jax.vmap(work.begin)(of(numbers)), lanes.states)
        return _Lanes(numbers, lanes.next + jnp.sum(done), states, every)

    numbers = jnp.arange(n_lanes)
    states = jax.vmap(work.begin)(of(numbers))
    shapes = jax.eval_shape(work.finish, take(problems, 0), take(states, 0))
    nothing = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), shapes)
    start = _Lanes(numbers, jnp.asarray(n_lanes), states, nothing)
    return jax.lax.while_loop(lambda lanes: jnp.any(lanes.numbers < count), step, start).ends


def _chosen(which: Bool[Array, " L"], some: Any, others: Any) -> Any:
    """Of two stacked trees, row by row."""
    return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(which, range(1, a.ndim)), a, b), some, others)
