r"""Coordinates in which the M-step climbs.

Two coordinate systems. *Log-Cholesky* is OTT's: means, lower triangular factors with the logarithm of the diagonal, logits
against the last component of positive weight; any optax optimiser runs in it. *Natural* is the default's: each component
is seen from its present self, :math:`m = m_0 + L_0 u`, :math:`L = L_0 T`, and every coordinate is divided by the square root of its
curvature in Q and in the transport cost. There the Hessian is close to the identity, a first unit step of steepest ascent
is nearly the plain EM step, and L-BFGS needs a handful of evaluations. A component of little mass has a long coordinate, and
nothing else would keep it from leaving the data in one step: how far a step takes a component is bounded, smoothly.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from coupled_gmm.core import matrices
from coupled_gmm.core.tree import AnyArray
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.statistics import Parameters, Statistics

_MOST_GROWTH = 3.0  # of the logarithm of a component's extent in one M-step
_GROWTH_WITHOUT_POINTS = 0.7  # of one that transport alone shapes, by couplings that turn as it does
_FARTHEST = 4.0  # a component moves in one M-step, as a part of the distance to its points, which is 1 at least


class Coordinates(NamedTuple):
    """A map from a flat vector of unknowns (and the log-weights they are relative to) to parameters."""

    start: Float[Array, " p"]
    parameters: Callable[[Float[Array, " p"], Float[Array, "V K"]], Parameters]
    promise: Callable[
        [Float[Array, " p"]], Float[Array, ""]
    ]  # what a gradient promises, where every step is taken anyway


def _log_softmax(logits: Array, present: Array) -> Array:
    """Log-probabilities over the components that are present; -inf elsewhere, with no gradient there."""
    masked = jnp.where(present, logits, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True))
    total = jnp.log(jnp.sum(jnp.where(present, jnp.exp(jnp.where(present, logits, 0) - peak), 0), -1, keepdims=True))
    return jnp.where(present, jnp.where(present, logits, 0) - peak - total, -jnp.inf)


def restore_frozen(frozen: Bool[Array, " V"], moved: Parameters, kept: Parameters) -> Parameters:
    return jax.tree.map(lambda m, k: jnp.where(jnp.expand_dims(frozen, range(1, m.ndim)), k, m), moved, kept)


def log_cholesky_coordinates(
    base: Parameters,
    statistics: Statistics,
    graph: MixtureGraph,
    unit: Float[AnyArray, ""],
    floors: Float[Array, "V d"],
) -> Coordinates:
    """OTT's coordinates, in data units; frozen nodes, absent components and each last logit do not move."""
    del floors  # every step is taken
    present = jnp.isfinite(base.log_weights)
    n_components = present.shape[-1]
    last = n_components - 1 - jnp.argmax(present[:, ::-1], axis=-1)
    is_last = jnp.arange(n_components) == last[:, None]
    reference = jnp.sum(jnp.where(is_last, base.log_weights, 0), axis=-1, keepdims=True)
    logits = jnp.where(present, base.log_weights - reference, 0)
    eye = jnp.eye(base.means.shape[-1], dtype=base.means.dtype)
    factors = unit * base.factors
    safe = factors + eye * (factors == 0)
    log_factors = jnp.tril(safe, -1) + eye * jnp.log(jnp.where(eye > 0, safe, 1))
    start, unravel = ravel_pytree((unit * base.means, log_factors, logits))

    def parameters(x: Array, log_weights: Array) -> Parameters:
        del log_weights  # logits are absolute
        means, triangle, logits = unravel(x)
        factors = jnp.tril(triangle, -1) + eye * jnp.exp(triangle * eye)
        log_weights = _log_softmax(jnp.where(is_last, 0, logits), present)
        return restore_frozen(graph.frozen, Parameters(means / unit, factors / unit, log_weights), base)

    def promise(gradient: Array) -> Float[Array, ""]:
        in_means, in_triangle, in_logits = unravel(gradient)
        in_factors = jnp.tril(in_triangle, -1) + eye * in_triangle / jnp.where(eye > 0, safe, 1)
        scale, _ = _natural_scale(base, statistics, graph)
        means = jnp.einsum("vkij,vki->vkj", factors, in_means)
        factored = jnp.tril(matrices.transpose(factors) @ in_factors)
        squares = jnp.sum(means**2, axis=-1) + jnp.sum(factored**2, axis=(-2, -1)) + in_logits**2
        return jnp.sum(scale**2 * squares)

    return Coordinates(start, parameters, promise)


def _natural_scale(
    base: Parameters, statistics: Statistics, graph: MixtureGraph
) -> tuple[Float[Array, "V K"], Bool[Array, "V K"]]:
    """One over the square root of the objective's curvature in what moves a component, seen as a standard Gaussian; and whether
    points have a part in that.

    0 for a component of which neither points nor transport have anything to say: it keeps its shape and place.
    """
    likelihood = graph.node_weights[:, None] * statistics.masses
    pull = jnp.zeros_like(graph.node_weights).at[graph.sources].add(graph.edge_weights)
    pull = pull.at[graph.targets].add(graph.edge_weights)
    variance = jnp.mean(jnp.sum(base.factors**2, axis=-1), axis=-1)
    curvature = likelihood + 2 * pull[:, None] * jnp.exp(base.log_weights) * variance
    most = jnp.maximum(1, graph.node_weights)[:, None]
    some = curvature > jnp.finfo(curvature.dtype).eps * most
    return jnp.where(some, jax.lax.rsqrt(curvature + 1e-6 * most), 0), likelihood > 1e-2 * curvature


def natural_coordinates(
    base: Parameters,
    statistics: Statistics,
    graph: MixtureGraph,
    unit: Float[AnyArray, ""],
    floors: Float[Array, "V d"],
) -> Coordinates:
    """Coordinates in which the objective curves about equally in every direction, and the base is zero.

    What keeps a component from less than the `floors` of variances is the likelihood: one without points is kept by these here.
    """
    del unit  # they have none
    present = jnp.isfinite(base.log_weights)
    eye = jnp.eye(base.means.shape[-1], dtype=base.means.dtype)
    scale, by_points = _natural_scale(base, statistics, graph)
    most = jnp.where(by_points, _MOST_GROWTH, _GROWTH_WITHOUT_POINTS)[..., None, None]
    pivots = jnp.diagonal(base.factors, axis1=-2, axis2=-1)
    room = jnp.where(
        (pivots > 0) & (floors > 0)[:, None], jnp.sqrt(floors)[:, None] / jnp.where(pivots > 0, pivots, 1), 0
    )
    least = jnp.where(by_points[..., None], 0, jnp.minimum(room, 1))[..., None] * eye
    # Points that lie wider than the component they belong to make the likelihood curve more in its shape.
    second = jnp.diagonal(statistics.scatter, axis1=-2, axis2=-1) + statistics.shift**2
    shape_scale = scale * jax.lax.rsqrt(jnp.maximum(1, jnp.mean(second, axis=-1)))
    farthest = _FARTHEST * jnp.sqrt(1 + jnp.sum(statistics.shift**2, axis=-1, keepdims=True))
    zeros = (jnp.zeros_like(base.means), jnp.zeros_like(base.factors), jnp.zeros_like(base.log_weights))
    start, unravel = ravel_pytree(zeros)

    def parameters(x: Array, log_weights: Array) -> Parameters:
        shift, triangle, logits = unravel(x)
        shift = _bounded(shift * scale[..., None], farthest)
        means = base.means + jnp.einsum("vkij,vkj->vki", base.factors, shift)
        triangle = triangle * shape_scale[..., None, None]
        growth = most * jnp.tanh(triangle * eye * 2**-0.5 / most)
        stretch = jnp.tril(triangle, -1) + jnp.maximum(eye * jnp.exp(growth), least)
        logits = jnp.where(present, log_weights, 0) + logits * scale
        moved = Parameters(means, base.factors @ stretch, _log_softmax(logits, present))
        return restore_frozen(graph.frozen, moved, base)

    return Coordinates(start, parameters, lambda gradient: jnp.zeros((), gradient.dtype))


def _bounded(shift: Float[Array, "V K d"], farthest: Float[Array, "V K 1"]) -> Float[Array, "V K d"]:
    """A shift itself as long as it is short, and never longer than the farthest."""
    return shift * jax.lax.rsqrt(1 + jnp.sum((shift / farthest) ** 2, axis=-1, keepdims=True))
