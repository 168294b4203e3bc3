"""Where a fit of one mixture may start: k-means++ centres, moved by Lloyd's steps; and which of several promises most.

All distances are between points in a frame of their own: each feature over its standard deviation, so that no unit decides.
A start is a draw. Which of several promises most is decided by a race: all climb the likelihood by some steps of EM, the
likelier half goes on for as many again, and so on. Distances to the centres take no note of shapes, and where EM has only begun
it tells little of where it will end: most is spent on the few that may win.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coupled_gmm import matrices, statistics
from coupled_gmm.statistics import Chunks, Parameters
from coupled_gmm.tree import taken

_LLOYD_STEPS = 10
_EM_STEPS = 3  # of the first round
_ALIKE = 1e-4  # nats a point: of ends so close the first is taken, whatever rounding says
DRAWS = 4  # for each start that is asked for
MOST_POINTS = 50_000  # what a start is drawn from; a fit sees all


class Points(NamedTuple):
    """A cloud in its frame, feature by feature, with weights that sum to 1 and the deviations that distances are measured in."""

    x: Float[Array, "d n"]
    weights: Float[Array, " n"]
    deviations: Float[Array, " d"]


def draws(key: Array, points: Points, floor: Float[Array, " d"], n_components: int, n: int) -> Parameters:
    """n starts, stacked: moments of the points closest to each of the centres, and the floor."""
    standard = points.x / points.deviations[:, None]
    n_tries = 2 + int(math.log(n_components))

    def draw(draws: Array) -> Parameters:
        labels = _plus_plus(draws, standard, points.weights)
        return _moments(points, _lloyd(standard, points.weights, labels, n_components), floor, n_components)

    return jax.lax.map(draw, jax.random.uniform(key, (n, n_components, n_tries), standard.dtype))


def _squares(x: Float[Array, "d n"], centre: Float[Array, " d"]) -> Float[Array, " n"]:
    """As differences: the expanded square of points far from the centre would lose those near each other.

    A product with ones, because XLA's CPU code sums down columns of 50,000 numbers fifty times slower.
    """
    return jnp.ones_like(centre) @ (x - centre[:, None]) ** 2


def _plus_plus(draws: Float[Array, "K tries"], x: Float[Array, "d n"], w: Float[Array, " n"]) -> Int[Array, " n"]:
    """The closest of centres drawn one by one, with a probability of weight times squared distance to the closest so far.

    Of some tries each the one that leaves the least distances (Arthur & Vassilvitskii 2007); the first is taken as it comes.
    """

    def add(carry: tuple, step: tuple) -> tuple:
        (closest, labels), (k, draws) = carry, step
        masses = jnp.where(k > 0, w * closest, w)
        sums, last = jnp.cumsum(masses), jnp.max(jnp.where(masses > 0, index, 0))

        def attempt(draw: Array) -> tuple[Array, Array]:
            """The point that a number in [0, 1) stands for, in proportion to masses; never one without mass."""
            chosen = jnp.minimum(jnp.sum(sums <= draw * sums[-1], dtype=jnp.int32), last)
            squares = jnp.minimum(_squares(x, x[:, chosen]), closest)
            return squares @ w, squares

        left, squares = jax.lax.map(attempt, draws)
        best = squares[jnp.where(k > 0, jnp.argmin(left), 0)]
        return (best, jnp.where(best < closest, k, labels)), None

    index = jnp.arange(x.shape[1], dtype=jnp.int32)
    start = jnp.full_like(w, jnp.finfo(w.dtype).max), jnp.zeros_like(index)
    return jax.lax.scan(add, start, (jnp.arange(len(draws), dtype=jnp.int32), draws))[0][1]


def _lloyd(x: Float[Array, "d n"], w: Float[Array, " n"], labels: Int[Array, " n"], k: int) -> Int[Array, " n"]:
    """Labels after steps of k-means, as long as they change and leave no centre without points."""

    every = jnp.arange(k, dtype=labels.dtype)

    def nearest(labels: Array) -> Array:
        shares = jnp.where(labels == every[:, None], w, 0)
        masses = jnp.sum(shares, axis=1)
        centres = shares @ x.T / jnp.where(masses > 0, masses, 1)[:, None]

        def add(carry: tuple, one: tuple) -> tuple:
            (closest, best), (label, centre, mass) = carry, one
            square = _squares(x, centre)
            nearer = (square < closest) & (mass > 0)
            return (jnp.where(nearer, square, closest), jnp.where(nearer, label, best)), None

        return jax.lax.scan(add, (jnp.full_like(w, jnp.inf), labels), (every, centres, masses))[0][1]

    def step(carry: tuple) -> tuple:
        labels, _, count = carry
        moved = nearest(labels)
        masses = jax.ops.segment_sum(w, moved, k)
        fine = jnp.all(masses > 0)
        return jnp.where(fine, moved, labels), fine & jnp.any((moved != labels) & (w > 0)), count + 1

    def unfinished(carry: tuple) -> Array:
        return carry[1] & (carry[2] < _LLOYD_STEPS)

    return jax.lax.while_loop(unfinished, step, (labels, jnp.asarray(True), jnp.zeros((), jnp.int32)))[0]


def _moments(points: Points, labels: Int[Array, " n"], floor: Float[Array, " d"], k: int) -> Parameters:
    x, w, _ = points

    def one(label: Array) -> tuple[Array, Array, Array]:
        share = jnp.where(labels == label, w, 0)
        mass = jnp.sum(share)
        mean = x @ share / mass
        centred = x - mean[:, None]
        return mean, (centred * (share / mass)) @ centred.T + jnp.diag(floor), mass

    means, covariances, masses = jax.lax.map(one, jnp.arange(k, dtype=labels.dtype))
    return Parameters(means, matrices.cholesky(covariances), jnp.log(masses / jnp.sum(masses)))


def race(draws: Parameters, chunks: Chunks, floor: Float[Array, " d"], n: int) -> Parameters:
    """The n of several starts that are likeliest after rounds of EM, best first, as they are then.

    Each round takes as many steps as all that went before it, for half as many starts.
    """
    count, counts, steps = len(draws.log_weights), [], []
    while count > n:
        counts.append(count)
        steps.append(_EM_STEPS * max(1, 2 ** (len(steps) - 1)))
        count = max(n, count // 2)

    def climb(value: Array, start: Parameters, n_steps: Array) -> tuple[Array, Parameters]:
        def step(_: Array, carry: tuple) -> tuple:
            found = statistics.e_step(carry[1], chunks, floor[None])
            return found.penalized[0], statistics.maximiser(found, floor[None])[0]

        value, end = jax.lax.fori_loop(0, n_steps, step, (value, jax.tree.map(lambda leaf: leaf[None], start)))
        return value, taken(end, 0)

    def climb_and_rank(carry: tuple, turn: tuple) -> tuple:
        count, n_steps = turn
        racing = jnp.arange(len(draws.log_weights)) < count
        values, ends = jax.lax.map(lambda one: climb(*one), (*carry, jnp.where(racing, n_steps, 0)))
        order = jnp.argsort(jnp.where(racing & jnp.isfinite(values), -jnp.round(values / _ALIKE), jnp.inf))
        return jax.tree.map(lambda leaf: leaf[order], (values, ends)), None

    start = jnp.full(len(draws.log_weights), -jnp.inf, floor.dtype), draws
    (_, ranked), _ = jax.lax.scan(climb_and_rank, start, (jnp.asarray(counts), jnp.asarray(steps)))
    return jax.tree.map(lambda leaf: leaf[:n], ranked)
