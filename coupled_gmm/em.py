"""One mixture for one cloud: where to start, and the plain EM fit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from coupled_gmm import checks, coupled, matrices, solvers, statistics
from coupled_gmm.coupled import Controls, Settings
from coupled_gmm.graph import MixtureGraph
from coupled_gmm.mixture import GaussianMixture
from coupled_gmm.result import Outcome
from coupled_gmm.tree import new, pytree


def init_gmm(
    key: PRNGKeyArray,
    x: Any,
    n_components: int,
    *,
    point_weights: Any = None,
    n_init: int = 1,
    ridge: Any = 1e-6,
) -> GaussianMixture:
    """A mixture to start a fit from: k-means++ centres, then the moments of the points closest to each.

    Centres are drawn one by one with probability proportional to a point's weight times its squared distance to the closest
    centre (Arthur & Vassilvitskii 2007).

    Args:
      key: decides the draw.
      x: cloud (n, d).
      n_components: K, at most the number of distinct points of positive weight.
      point_weights: (n,), at least 0, not all 0; None weighs points equally.
      n_init: draws, of which the one with the least mean squared distance is kept.
      ridge: added to the covariances, relative to each feature's variance.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range.
    """
    key = checks.key("key", key)
    x = checks.points("x", x)
    n_components = checks.integer("n_components", n_components, 1)
    n_init = checks.integer("n_init", n_init, 1)
    ridge = checks.scalar("ridge", ridge, at_least=0)
    w = jnp.ones(len(x), x.dtype) if point_weights is None else checks.weights("point_weights", point_weights, len(x))
    if checks.known(x, w):
        _check_distinct(np.asarray(x)[np.asarray(w) > 0], n_components)
    return _init(key, x, w.astype(x.dtype), ridge.astype(x.dtype), n_components, n_init)


def _check_distinct(x: np.ndarray, n_components: int) -> None:
    """Refuse more components than distinct points; a small sample usually settles it."""
    for n in (16 * n_components, len(x)):
        n_distinct = len(np.unique(x[:n], axis=0))
        if n_distinct >= n_components:
            return
    raise ValueError(
        f"n_components: {n_components} components need as many distinct points of positive weight, x has {n_distinct}; "
        "lower n_components"
    )


@functools.partial(jax.jit, static_argnames=("n_components", "n_init"))
@matrices.precise
def _init(key: Array, x: Array, w: Array, ridge: Array, n_components: int, n_init: int) -> GaussianMixture:
    w = w / jnp.sum(w)
    centre = w @ x
    x = x - centre

    def draw(key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, n_components)
        logits = jnp.where(w > 0, jnp.log(w), -jnp.inf)
        first = x[jax.random.categorical(keys[0], logits)]
        closest = jnp.sum((x - first) ** 2, axis=1)
        labels = jnp.zeros(len(x), jnp.int32)

        def add(carry, draw):
            closest, labels = carry
            k, key = draw
            distance = jnp.log(jnp.where(closest > 0, closest, 1))
            chosen = jax.random.categorical(key, jnp.where(closest > 0, logits + distance, -jnp.inf))
            square = jnp.sum((x - x[chosen]) ** 2, axis=1)
            return (jnp.minimum(closest, square), jnp.where(square < closest, k, labels)), None

        carry = (closest, labels)
        (closest, labels), _ = jax.lax.scan(add, carry, (jnp.arange(1, n_components, dtype=labels.dtype), keys[1:]))
        return w @ closest, labels

    inertia, labels = jax.lax.map(draw, jax.random.split(key, n_init))
    labels = labels[jnp.argmin(inertia)]
    floor = jnp.diag(ridge * (w @ x**2))

    def moments(k: Array) -> tuple[Array, Array, Array]:
        share = jnp.where(labels == k, w, 0)
        mass = jnp.sum(share)
        mean = share @ x / mass
        centred = x - mean
        return mean, (centred * (share / mass)[:, None]).T @ centred + floor, mass

    means, covariances, masses = jax.lax.map(moments, jnp.arange(n_components))
    return new(GaussianMixture, means=means + centre, covariances=covariances, weights=masses / jnp.sum(masses))


@pytree
class MixtureHistory:
    """A row per EM step, before it; NaN past the last."""

    log_likelihood: Float[Array, " max_steps"]


@pytree
class MixtureFit(Outcome):
    """A fitted mixture and how the fit went; `log_likelihood` is the mean per point at the end."""

    gmm: GaussianMixture
    log_likelihood: Float[Array, ""]
    status: Int[Array, ""]
    n_steps: Int[Array, ""]
    history: MixtureHistory


def fit_gmm(
    x: Any,
    init: GaussianMixture,
    *,
    point_weights: Any = None,
    max_steps: int = 100,
    tol: Any = 1e-5,
    ridge: Any = 1e-6,
) -> MixtureFit:
    """Fit one mixture to one cloud by EM: the coupled fit of a graph of one node.

    Args:
      x: cloud (n, d).
      init: where to start, as from `init_gmm`.
      point_weights: (n,), at least 0, not all 0; None weighs points equally.
      max_steps: EM steps, at most.
      tol: at least 0; converged when a step raises the mean log-likelihood by no more. 0 does all steps.
      ridge: floor of the covariances relative to each feature's variance, as in `fit_pair`; the log-likelihood includes it.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range.
    """
    checks.instance("init", init, GaussianMixture)
    x = checks.points("x", x, init.n_features).astype(init.dtype)
    w = None if point_weights is None else checks.weights("point_weights", point_weights, len(x)).astype(init.dtype)
    ridge = checks.scalar("ridge", ridge, at_least=0, batched=True)
    tol = checks.scalar("tol", tol, at_least=0, batched=True)
    init.check_densities("init")
    length = statistics.chunk_length(len(x), init.n_components, init.n_features, None)
    settings = Settings(length, checks.integer("max_steps", max_steps, 1), solvers.solve_entropic, None, False)
    return _fit(init, x, w, Controls(ridge, tol, jnp.ones((), jnp.int32), None), settings)


@functools.partial(jax.jit, static_argnames="settings")
@matrices.precise
def _fit(init: GaussianMixture, x: Array, w: Array | None, controls: Controls, settings: Settings) -> MixtureFit:
    problem = MixtureGraph.single(init)
    run = coupled.run(problem, [x], [w], controls, settings)
    (gmm,) = problem.split(run.nodes)
    history = MixtureHistory(run.history.penalized_log_likelihood)
    return MixtureFit(gmm, run.value, run.status, run.n_steps, history)
