"""Optimisers of the M-step: any of optax, whose every step is taken; and L-BFGS with a line search, by which nothing falls.

An optimiser asks for one evaluation at a time, so that a line search needs no loop of its own: `update` is told value and
gradient at the point that it wanted, and says which one it wants next.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from coupled_gmm.core.tree import chosen
from coupled_gmm.fits.coordinates import Coordinates, log_cholesky_coordinates, natural_coordinates
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.statistics import Parameters, Statistics

_MEMORY_SIZE = 8  # steps that L-BFGS knows the curvature from
_ARMIJO = 1e-4


class Search(NamedTuple):
    """Where an optimiser is: the point it wants evaluated next, the best it vouches for, and a state of its own."""

    trial: Float[Array, " p"]
    best: Float[Array, " p"]
    state: Any
    accepted: Bool[Array, ""]  # the last trial became the best
    done: Bool[Array, ""]
    left: Float[Array, ""]  # the gain that it still promises at the best


class Optimiser(NamedTuple):
    """Three functions of an optimiser of the M-step; values and gradients are to be minimised."""

    monotone: bool
    coordinates: Callable[[Parameters, Statistics, MixtureGraph, Array, Array], Coordinates]
    init: Callable[[Array], Search]
    update: Callable[[Search, Array, Array], Search]


def optax_optimiser(transformation: optax.GradientTransformation) -> Optimiser:
    """Any optax optimiser in log-Cholesky coordinates: every step is taken."""

    def update(search: Search, value: Array, gradient: Array) -> Search:
        del value
        step, state = transformation.update(gradient, search.state, search.trial)
        trial = jnp.asarray(optax.apply_updates(search.trial, step))
        return Search(trial, trial, state, jnp.asarray(True), search.done, search.left)

    def init(start: Array) -> Search:
        nothing = jnp.zeros((), start.dtype)
        return Search(start, start, transformation.init(start), jnp.asarray(True), jnp.asarray(False), nothing)

    return Optimiser(False, log_cholesky_coordinates, init, update)


class _Line(NamedTuple):
    """A line search from `best`: value there, direction, slope and step; and L-BFGS's own state."""

    value: Float[Array, ""]
    direction: Float[Array, " p"]
    slope: Float[Array, ""]
    step: Float[Array, ""]
    first_slope: Float[Array, ""]
    lbfgs: Any


def lbfgs_optimiser(patience: float = 1e-3) -> Optimiser:
    """L-BFGS in natural coordinates with a backtracking search: the objective never falls.

    It stops when the promised gain is `patience` of the first one, or under rounding.
    """
    transformation = optax.scale_by_lbfgs(memory_size=_MEMORY_SIZE, scale_init_precond=False)

    def init(start: Array) -> Search:
        zero = jnp.zeros((), start.dtype)
        line = _Line(zero + jnp.inf, jnp.zeros_like(start), zero, zero + 1, zero, transformation.init(start))
        return Search(start, start, line, jnp.asarray(True), jnp.asarray(False), zero)

    def update(search: Search, value: Array, gradient: Array) -> Search:
        line: _Line = search.state
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(gradient))
        accepted = finite & (value <= line.value + _ARMIJO * line.step * line.slope)
        preconditioned, lbfgs = transformation.update(gradient, line.lbfgs, search.trial)
        preconditioned = jnp.asarray(preconditioned)
        slope = -jnp.vdot(preconditioned, gradient)
        downhill = slope < 0
        direction = jnp.where(downhill, -preconditioned, -gradient)
        slope = jnp.where(downhill, slope, -jnp.vdot(gradient, gradient))
        first = jnp.isinf(line.value)
        # A rejected step goes to the minimum of the parabola through both values and the slope, within bounds.
        bend = value - line.value - line.step * line.slope
        shrink = jnp.where(finite, -0.5 * line.step * line.slope / jnp.where(bend > 0, bend, 1), 0.1)
        longest = jnp.max(jnp.abs(direction))
        length = jnp.minimum(1, 2 / jnp.where(longest > 0, longest, 1))
        fresh = _Line(value, direction, slope, length, jnp.where(first, slope, line.first_slope), lbfgs)
        retry = line._replace(step=line.step * jnp.clip(shrink, 0.1, 0.5))
        line = chosen(accepted, fresh, retry)
        best = jnp.where(accepted, search.trial, search.best)
        rounding = jnp.finfo(value.dtype).eps * (1 + jnp.abs(line.value))
        gain = -line.step * line.slope
        done = (gain <= rounding) | (accepted & (-line.slope <= -patience * line.first_slope))
        trial = best + line.step * line.direction
        return Search(trial, best, line, accepted, done | (first & ~finite), -line.slope)

    return Optimiser(True, natural_coordinates, init, update)
