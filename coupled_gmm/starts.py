"""Where a fit of one mixture may start: k-means++ centres, moved by Lloyd's steps; and which of several promises most.

All distances are between points in a frame of their own: each feature over its standard deviation, so that no unit decides.
A start is a draw. Of several, the likelihood decides after a few steps of EM, not the distance to the centres, which
takes no note of shapes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coupled_gmm import matrices, statistics
from coupled_gmm.statistics import Chunks, Parameters

_LLOYD_STEPS = 30
_EM_STEPS = 10
MOST_POINTS = 50_000  # what a start is drawn from; a fit sees all


class Points(NamedTuple):
    """A cloud in its frame, feature by feature, with weights that sum to 1 and the deviations that distances are measured in."""

    x: Float[Array, "d n"]
    weights: Float[Array, " n"]
    deviations: Float[Array, " d"]


def draws(key: Array, points: Points, floor: Float[Array, " d"], n_components: int, n: int) -> Parameters:
    """n starts, stacked: moments of the points closest to each of the centres, and the floor."""
    standard = points.x / points.deviations[:, None]

    def draw(key: Array) -> Parameters:
        labels = _lloyd(standard, points.weights, _plus_plus(key, standard, points.weights, n_components), n_components)
        return _moments(points, labels, floor, n_components)

    return jax.lax.map(draw, jax.random.split(key, n))


def _squares(x: Float[Array, "d n"], centre: Float[Array, " d"]) -> Float[Array, " n"]:
    """As differences: the expanded square of points far from the centre would lose those near each other."""
    return jnp.sum((x - centre[:, None]) ** 2, axis=0)


def _plus_plus(key: Array, x: Float[Array, "d n"], w: Float[Array, " n"], n_components: int) -> Int[Array, " n"]:
    """The closest of centres drawn one by one, with a probability of weight times squared distance to the closest so far.

    Of some tries each the one that leaves the least distances (Arthur & Vassilvitskii 2007); the first is taken as it comes.
    """
    n_tries = 2 + int(math.log(n_components))

    def add(carry: tuple, step: tuple) -> tuple:
        (closest, labels), (k, draws) = carry, step
        tries = drawn(draws, jnp.where(k > 0, w * closest, w))
        squares = jax.lax.map(lambda i: jnp.minimum(_squares(x, x[:, i]), closest), tries)
        best = squares[jnp.where(k > 0, jnp.argmin(squares @ w), 0)]
        return (best, jnp.where(best < closest, k, labels)), None

    steps = jnp.arange(n_components, dtype=jnp.int32), jax.random.uniform(key, (n_components, n_tries), x.dtype)
    start = jnp.full_like(w, jnp.finfo(w.dtype).max), jnp.zeros(x.shape[1], jnp.int32)
    return jax.lax.scan(add, start, steps)[0][1]


def drawn(draws: Float[Array, " m"], masses: Float[Array, " n"]) -> Int[Array, " m"]:
    """The indices that numbers in [0, 1) stand for, in proportion to masses; never one without mass."""
    sums = jnp.cumsum(masses)
    index = jax.lax.map(lambda draw: jnp.sum(sums <= draw * sums[-1], dtype=jnp.int32), draws)
    last = jnp.max(jnp.where(masses > 0, jnp.arange(len(masses), dtype=jnp.int32), 0))
    return jnp.minimum(index, last)


def _lloyd(x: Float[Array, "d n"], w: Float[Array, " n"], labels: Int[Array, " n"], k: int) -> Int[Array, " n"]:
    """Labels after steps of k-means, as long as they change and leave no centre without points."""

    def nearest(labels: Array) -> Array:
        def add(carry: tuple, label: Array) -> tuple:
            closest, best = carry
            share = jnp.where(labels == label, w, 0)
            mass = jnp.sum(share)
            square = _squares(x, x @ share / jnp.where(mass > 0, mass, 1))
            nearer = (square < closest) & (mass > 0)
            return (jnp.where(nearer, square, closest), jnp.where(nearer, label, best)), None

        start = jnp.full_like(w, jnp.inf), labels
        return jax.lax.scan(add, start, jnp.arange(k, dtype=labels.dtype))[0][1]

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


def best(starts: Parameters, chunks: Chunks, floor: Float[Array, " d"]) -> Parameters:
    """Of several starts the one that is most likely after some steps of EM, as it is then."""

    def climb(start: Parameters) -> tuple[Array, Parameters]:
        def step(_: Array, carry: tuple) -> tuple:
            found = statistics.e_step(carry[1], chunks, floor[None])
            return found.penalized[0], statistics.maximiser(found, floor[None])[0]

        first = jnp.zeros((), floor.dtype), jax.tree.map(lambda leaf: leaf[None], start)
        value, end = jax.lax.fori_loop(0, _EM_STEPS, step, first)
        return value, jax.tree.map(lambda leaf: leaf[0], end)

    values, ends = jax.lax.map(climb, starts)
    chosen = jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))
    return jax.tree.map(lambda leaf: leaf[chosen], ends)
