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
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import matrices
from coupled_gmm.core.chunks import Chunks
from coupled_gmm.core.tree import chosen, take
from coupled_gmm.fits import statistics
from coupled_gmm.fits.statistics import Parameters

_LLOYD_STEPS = 10
_EM_STEPS = 3  # of the first round
_ALIKE = 1e-4  # nats a point: of ends so close the first is taken, whatever rounding says
DRAWS = 4  # for each start that is asked for
MOST_POINTS = 50_000  # what a start is drawn from; a fit sees all


class Drawn(NamedTuple):
    """Of every point its squared distance to the nearest centre and the number of that; of every chunk its mass times distance."""

    closest: Float[Array, "C B"]
    labels: Int[Array, "C B"]
    sums: Float[Array, " C"]


def draws(
    key: Array,
    chunks: Chunks,
    deviations: Float[Array, " d"],
    floor: Float[Array, " d"],
    n_components: int,
    n: int,
    present: Int[Array, ""] | None = None,
) -> Parameters:
    """n starts, stacked: moments of the points closest to each of the centres, and the floor.

    Args:
      chunks: one cloud, whose weights sum to 1.
      deviations: of features, in which distances are measured.
      present: so many of the components, the first, are drawn, and the others have weight zero; None draws all.
    """
    n_tries = 2 + int(math.log(n_components))
    drawn = jnp.arange(n_components, dtype=jnp.int32) < (n_components if present is None else present)

    def draw(draws: Array) -> Parameters:
        labels = _plus_plus(draws, chunks, deviations, drawn)
        return _moments(chunks, *_lloyd(chunks, deviations, labels, drawn), floor)

    return jax.lax.map(draw, jax.random.uniform(key, (n, n_components, n_tries), deviations.dtype))


def _squares(
    x: Float[Array, "d B"], centres: Float[Array, "K d"], deviations: Float[Array, " d"]
) -> Float[Array, "K B"]:
    """As differences: the expanded square of points far from the centre would lose those near each other."""
    return jnp.sum(((x - centres[:, :, None]) / deviations[:, None]) ** 2, axis=1)


def _plus_plus(
    draws: Float[Array, "K tries"], chunks: Chunks, deviations: Float[Array, " d"], drawn: Bool[Array, " K"]
) -> Int[Array, "C B"]:
    """The closest of centres drawn one by one, with a probability of weight times squared distance to the closest so far.

    Of some tries each the one that leaves the least distances (Arthur & Vassilvitskii 2007); the first is taken as it comes.
    """
    points, weights, count = chunks.points, chunks.weights, chunks.count

    def add(drawn: Drawn, step: tuple) -> tuple[Drawn, None]:
        k, draws, counts = step
        masses = jnp.where(k > 0, drawn.sums, jnp.sum(weights, axis=1))
        centres = jax.vmap(lambda draw: _chosen(draw, masses, drawn.closest, chunks, k == 0))(draws)

        def left(index: Array, total: Array) -> Array:
            squares = _squares(points[index], centres, deviations)
            return total + jnp.minimum(squares, drawn.closest[index]) @ weights[index]

        total = jax.lax.fori_loop(0, count, left, jnp.zeros(len(draws), weights.dtype))
        centre = centres[jnp.where(k > 0, jnp.argmin(total), 0)]

        def update(index: Array, drawn: Drawn) -> Drawn:
            (square,) = _squares(points[index], centre[None], deviations)
            nearer = (square < drawn.closest[index]) & counts
            closest = jnp.where(nearer, square, drawn.closest[index])
            return Drawn(
                drawn.closest.at[index].set(closest),
                drawn.labels.at[index].set(jnp.where(nearer, k, drawn.labels[index])),
                drawn.sums.at[index].set(weights[index] @ closest),
            )

        return jax.lax.fori_loop(0, count, update, drawn), None

    start = Drawn(
        jnp.full_like(weights, jnp.inf), jnp.zeros(weights.shape, jnp.int32), jnp.zeros(len(weights), weights.dtype)
    )
    return jax.lax.scan(add, start, (jnp.arange(len(draws), dtype=jnp.int32), draws, drawn))[0].labels


def _chosen(
    draw: Array, sums: Float[Array, " C"], closest: Float[Array, "C B"], chunks: Chunks, by_weight: Array
) -> Float[Array, " d"]:
    """The point that a number in [0, 1) stands for, in proportion to masses; never one without mass."""
    upto = jnp.cumsum(sums)
    chunk = _place(upto, sums, draw * upto[-1])
    weights = chunks.weights[chunk]
    masses = jnp.where(by_weight, weights, weights * closest[chunk])
    point = _place(jnp.cumsum(masses), masses, draw * upto[-1] - (upto[chunk] - sums[chunk]))
    return chunks.points[chunk, :, point]


def _place(upto: Array, masses: Array, mass: Array) -> Array:
    """Where sums of masses come to exceed a mass; the last one that has any, where they do not."""
    last = jnp.max(jnp.where(masses > 0, jnp.arange(len(masses)), 0))
    return jnp.minimum(jnp.sum(upto <= mass, dtype=jnp.int32), last)


class _Sums(NamedTuple):
    """Of the points of each label: their mass, and the sum of their coordinates."""

    masses: Float[Array, " K"]
    points: Float[Array, "K d"]

    def centres(self) -> Float[Array, "K d"]:
        return self.points / jnp.where(self.masses > 0, self.masses, 1)[:, None]


def _lloyd(
    chunks: Chunks, deviations: Float[Array, " d"], labels: Int[Array, "C B"], drawn: Bool[Array, " K"]
) -> tuple[Int[Array, "C B"], _Sums]:
    """Labels after steps of k-means, as long as they change and leave no centre without points; and their sums."""
    k = len(drawn)
    every = jnp.arange(k, dtype=labels.dtype)[:, None]

    def sums(index: Array, labels: Array, total: _Sums) -> _Sums:
        share = jnp.where(labels == every, chunks.weights[index], 0)
        return _Sums(total.masses + jnp.sum(share, axis=1), total.points + share @ chunks.points[index].T)

    def nearest(old: Array, before: _Sums) -> tuple[Array, _Sums, Array]:
        centres, present = before.centres(), before.masses > 0

        def move(index: Array, carry: tuple) -> tuple:
            labels, total, changed = carry
            squares = jnp.where(present[:, None], _squares(chunks.points[index], centres, deviations), jnp.inf)
            moved = jnp.argmin(squares, axis=0).astype(labels.dtype)
            changed |= jnp.any((moved != old[index]) & (chunks.weights[index] > 0))
            return labels.at[index].set(moved), sums(index, moved, total), changed

        return jax.lax.fori_loop(0, chunks.count, move, (old, nothing, jnp.asarray(False)))

    def step(carry: tuple) -> tuple:
        labels, total, _, count = carry
        moved, found, changed = nearest(labels, total)
        fine = jnp.all((found.masses > 0) | ~drawn)
        labels, total = chosen(fine, (moved, found), (labels, total))
        return labels, total, fine & changed, count + 1

    def unfinished(carry: tuple) -> Array:
        return carry[2] & (carry[3] < _LLOYD_STEPS)

    dtype = chunks.points.dtype
    nothing = _Sums(jnp.zeros(k, dtype), jnp.zeros((k, chunks.points.shape[1]), dtype))
    start = jax.lax.fori_loop(0, chunks.count, lambda index, total: sums(index, labels[index], total), nothing)
    end = jax.lax.while_loop(unfinished, step, (labels, start, jnp.asarray(True), jnp.zeros((), jnp.int32)))
    return end[0], end[1]


def _moments(chunks: Chunks, labels: Int[Array, "C B"], sums: _Sums, floor: Float[Array, " d"]) -> Parameters:
    k, d = sums.points.shape
    means, every = sums.centres(), jnp.arange(k, dtype=labels.dtype)[:, None]

    def add(index: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        points = chunks.points[index]
        share = jnp.where(labels[index] == every, chunks.weights[index], 0)
        weighted = share[:, None] * (points - means[:, :, None])
        shift, second = total
        return shift + jnp.sum(weighted, axis=2), second + (weighted.reshape(k * d, -1) @ points.T).reshape(k, d, d)

    zero = jnp.zeros_like(means), jnp.zeros((k, d, d), means.dtype)
    shift, second = jax.lax.fori_loop(0, chunks.count, add, zero)
    mass = jnp.where(sums.masses > 0, sums.masses, 1)[:, None, None]
    second = (second - shift[:, :, None] * means[:, None, :]) / mass
    covariances = 0.5 * (second + matrices.transpose(second)) + jnp.diag(floor)
    return Parameters(means, matrices.cholesky(covariances), jnp.log(sums.masses / jnp.sum(sums.masses)))


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
        return value, take(end, 0)

    def climb_and_rank(carry: tuple, turn: tuple) -> tuple:
        count, n_steps = turn
        racing = jnp.arange(len(draws.log_weights)) < count
        values, ends = jax.lax.map(lambda one: climb(*one), (*carry, jnp.where(racing, n_steps, 0)))
        good = racing & jnp.isfinite(values)
        # From the best of them, not from zero: units add the same to all.
        behind = jnp.max(values, where=good, initial=-jnp.inf) - values
        order = jnp.argsort(jnp.where(good, jnp.round(behind / _ALIKE), jnp.inf))
        return jax.tree.map(lambda leaf: leaf[order], (values, ends)), None

    start = jnp.full(len(draws.log_weights), -jnp.inf, floor.dtype), draws
    (_, ranked), _ = jax.lax.scan(climb_and_rank, start, (jnp.asarray(counts), jnp.asarray(steps)))
    return jax.tree.map(lambda leaf: leaf[:n], ranked)
