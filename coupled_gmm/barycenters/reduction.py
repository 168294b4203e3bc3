"""Fewer components: the mixture of a given size that is closest to a given one, the barycenter of one mixture."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from coupled_gmm.barycenters.barycenter import BarycenterFit, reduced
from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import unchecked
from coupled_gmm.gaussians import bures
from coupled_gmm.gaussians.mixture import GaussianMixture, about_one_point, moved_back


def reduce_gmm(
    key: PRNGKeyArray,
    gmm: GaussianMixture,
    n_components: int,
    *,
    n_init: int = 100,
    max_steps: int = 100,
    tol: Any = 1e-7,
) -> BarycenterFit:
    r"""The mixture of `n_components` closest to `gmm` in MW2: weights, means and covariances.

    Each component of `gmm` goes to its nearest, and each new one to the Bures barycenter of those that came to it, by turns:
    k-means among Gaussians. The best of `n_init` starts, each of components chosen by k-means++ (Arthur & Vassilvitskii 2007).

    Args:
      key: a random key; it decides the starts.
      gmm: the mixture.
      n_components: at least 1, at most those of `gmm`.
      n_init: number of starts.
      max_steps, tol: as in `barycenter`.

    Returns:
      A `BarycenterFit`, whose objective is the squared MW2 distance to `gmm`.

    Raises:
      TypeError, ValueError: an argument of the wrong kind or out of range.
    """
    key = checks.key("key", key)
    checks.instance("gmm", gmm, GaussianMixture)
    if checks.integer("n_components", n_components, 1) > gmm.n_components:
        raise ArgumentError(
            "n_components", f"{n_components} are more than the mixture's {gmm.n_components}", "ask for fewer"
        )
    max_steps, tol = checks.integer("max_steps", max_steps, 1, checks.MOST_STEPS), checks.scalar("tol", tol, at_least=0)
    n_init = checks.integer("n_init", n_init, 1, checks.MOST_STARTS)
    (gmm,), centre = about_one_point(gmm)
    fit = reduced(gmm, _starts(key, gmm, n_components, n_init), max_steps, tol)
    return dataclasses.replace(fit, gmm=moved_back(fit.gmm, centre))


@program("n_components", "n")
def _starts(key: Array, gmm: GaussianMixture, n_components: int, n: int) -> GaussianMixture:
    """Components chosen one by one, each with a probability of its mass times its squared distance to those chosen before.

    `fits.starts` does the same among points, too many for a matrix of their distances.
    """
    cost = bures.pairwise_cost(gmm.means, gmm.cholesky, gmm.means, gmm.cholesky)

    def start(key: Array) -> GaussianMixture:
        def choose(nearest: Array, key: Array) -> tuple[Array, Array]:
            worth = gmm.weights * nearest
            worth = jnp.where(jnp.any(worth > 0), worth, gmm.weights)
            chosen = jax.random.categorical(
                key, jnp.where(worth > 0, jnp.log(jnp.where(worth > 0, worth, 1)), -jnp.inf)
            )
            return jnp.minimum(nearest, cost[chosen]), chosen

        _, chosen = jax.lax.scan(
            choose, jnp.full_like(gmm.weights, jnp.max(cost) + 1), jax.random.split(key, n_components)
        )
        weights = jnp.full(n_components, 1 / n_components, gmm.dtype)
        return unchecked(GaussianMixture, means=gmm.means[chosen], covariances=gmm.covariances[chosen], weights=weights)

    return jax.vmap(start)(jax.random.split(key, n))
