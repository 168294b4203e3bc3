r"""The mixture at any time of a fitted chain.

Given the component at one node, components are a Markov chain into the past and into the future. So the moments of a spline
:math:`X(t) = \sum_v W_v X_v`, given that it passes components k and l on both sides of t, are sums over the nodes: of means,

.. math:: A_v(j) = W_v m_j + \sum_{j'} B_{j'j} A_{v-1}(j') ,

of factors likewise, in the coordinates :math:`\xi` that a component sees itself in, and of covariances what the branches differ by.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coupled_gmm.core import checks, matrices
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import unchecked
from coupled_gmm.courses import chains, splines
from coupled_gmm.courses.chains import Chain
from coupled_gmm.gaussians import bures, mixture
from coupled_gmm.gaussians.mixture import GaussianMixture

_LEAST = 0.03  # part of the geodesic's standard deviations that is left where spline paths cross, times the other nodes' weights


def mixture_at(fit: Any, t: Any, *, method: str = "spline", ends: str = "parabolic") -> GaussianMixture:
    r"""The mixture at any time of a fitted chain.

    It has a component for each pair (k, l) that the plan around t joins, of mass :math:`(1 - u) a_k F_{kl} + u b_l B_{kl}` at the
    part u of the way, as `interpolate` does. "geodesic": on the Bures geodesic from k to l, so that on each edge it is
    `interpolate(plan, u)`. "spline": with the mean and covariance of all spline paths through components that pass k and l,

    .. math:: X(t) = \sum_v W_v(t) X_v , \qquad X_v = m_{Z_v} + A_v \xi ,

    in the law that the plans give to components :math:`Z_v` and, by their Gaussian maps, to the points in them: where transport is
    balanced, that of `trajectories(..., key=key)` of points drawn from the first node. At a node's time it is the node's mixture.
    Between definite covariances they are definite: where spline paths cross, a hundredth or so of the geodesic's standard
    deviations is left.

    Args:
      fit: of a chain or a pair, as for `trajectories`.
      t: one time within those of the chain; it may be traced (many by `jax.vmap`), and is then the nearest end where it is outside.
      method, ends: as for `trajectories`.

    Returns:
      A mixture of K^2 components, K the largest number of a node's; many may have weight zero.

    Raises:
      TypeError, ValueError: a fit of something else, or one that is itself traced; t outside.
    """
    checks.choice("method", method, splines.METHODS)
    checks.choice("ends", ends, splines.ENDS)
    order, times = chains.ordered(fit)
    t = chains.checked_times("t", t, times)
    chain = chains.of_fit(fit, order, times)
    (nodes,), centre = mixture.about_one_point(chain.nodes)
    return mixture.moved_back(_mixture_at(nodes, chain, t, method, ends), centre)


class _Side(NamedTuple):
    """Of the nodes on one side of t, given a component of the last of them: what they add to X(t)."""

    mean: Float[Array, "K d"]
    factor: Float[Array, "K d d"]  # of the component's own coordinates
    spread: Float[Array, "K d d"]  # covariance of what the branches differ by


class _Step(NamedTuple):
    """One node, and the edge that leads to it from the node before, seen from t outward."""

    weight: Float[Array, ""]
    mean: Float[Array, "K d"]
    factor: Float[Array, "K d d"]
    share: Float[Array, "K K"]  # of the node's components (first), from those of the node before
    coupling: Float[Array, "K K d d"]  # coordinates there, of those here


def _side(step: _Step, outer: _Side) -> _Side:
    """With one more node: a mean over the branches that lead on from each of its components."""
    share = step.share
    mean = share @ outer.mean
    turned = outer.factor[None] @ step.coupling  # (here, there, d, d)
    factor = jnp.einsum("kj,kjab->kab", share, turned)
    apart = outer.mean - mean[:, None]
    spread = jnp.einsum("kj,kja,kjb->kab", share, apart, apart)
    spread += jnp.einsum("kj,kjab->kab", share, outer.spread + _left(outer.factor[None], step.coupling))
    spread += jnp.einsum("kj,kjab->kab", share, matrices.gram(turned - factor[:, None]))
    return _Side(step.weight * step.mean + mean, step.weight * step.factor + factor, spread)


def _left(factor: Float[Array, "*#k d d"], coupling: Float[Array, "*k d d"]) -> Float[Array, "*k d d"]:
    """What a coupling of singular covariances leaves open, as a covariance: factor (1 - U U^T) factor^T."""
    gap = jnp.eye(coupling.shape[-1], dtype=coupling.dtype) - coupling @ matrices.transpose(coupling)
    rest = factor @ gap @ matrices.transpose(factor)
    return 0.5 * (rest + matrices.transpose(rest))


def _couplings(factors: Float[Array, "V K d d"]) -> Float[Array, "E K K d d"]:
    """`bures.coupling` of each component with each of the next node."""
    (v, k, d), here, there = factors.shape[:3], factors[:-1, :, None], factors[1:, None]
    shape = (v - 1, k, k, d, d)
    flat = (jnp.broadcast_to(side, shape).reshape(-1, d, d) for side in (here, there))
    return bures.coupling(*flat).reshape(shape)


@program("method", "ends")
def _mixture_at(nodes: GaussianMixture, chain: Chain, t: Array, method: str, ends: str) -> GaussianMixture:
    weights = splines.weights(chain.times, t[None], method, ends)[0]
    i, u = jax.tree.map(lambda one: one[0], splines.segment(chain.times, t[None]))
    factors = nodes.cholesky
    couplings = _couplings(factors)  # (E, here, there, d, d)
    steps = weights, nodes.means, factors
    # What is xi here is U xi in the past, and U^T xi in the future.
    past = steps, chain.backward.swapaxes(1, 2), couplings.swapaxes(1, 2)
    future = jax.tree.map(lambda leaf: leaf[::-1], (steps, chain.forward, matrices.transpose(couplings)))
    sides = jax.vmap(_sides)(*jax.tree.map(lambda *both: jnp.stack(both), past, future))
    before, after = (jax.tree.map(lambda leaf, at=at: leaf[at], sides) for at in ((0, i), (1, len(weights) - 2 - i)))

    def pairs(one: Array, other: Array) -> Array:
        both = jnp.broadcast_arrays(one[:, None], other[None])
        return both[0] + both[1]

    coupling = matrices.transpose(couplings[i])  # U^T
    k, d = before.mean.shape
    factor = before.factor[:, None] + after.factor[None] @ coupling
    covariances = matrices.gram(factor) + pairs(before.spread, after.spread) + _left(after.factor[None], coupling)
    others = jnp.sum(jnp.abs(weights)) - jnp.abs(weights[i]) - jnp.abs(weights[i + 1])
    straight = (1 - u) * factors[i][:, None] + u * factors[i + 1][None] @ coupling
    covariances += (_LEAST * jnp.maximum(others, 0)) ** 2 * matrices.gram(straight)
    forward, backward, masses = chain.forward[i], chain.backward[i], nodes.weights
    mass = (1 - u) * masses[i][:, None] * forward + u * masses[i + 1] * backward
    return unchecked(
        GaussianMixture,
        means=pairs(before.mean, after.mean).reshape(k * k, d),
        covariances=covariances.reshape(k * k, d, d),
        weights=mass.reshape(k * k),
        remainders=None,
    )


def _sides(nodes: tuple[Array, Array, Array], shares: Float[Array, "E K K"], couplings: Array) -> _Side:
    """Of every node, with all before it, stacked (V)."""
    weights, means, factors = nodes
    scale = weights[0]
    first = _Side(scale * means[0], scale * factors[0], jnp.zeros_like(factors[0]))

    def on(outer: _Side, step: tuple) -> tuple[_Side, _Side]:
        found = _side(_Step(*step), outer)
        return found, found

    rest = jax.lax.scan(on, first, (weights[1:], means[1:], factors[1:], shares, couplings))[1]
    return jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, rest)
