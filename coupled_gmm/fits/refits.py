"""The mixtures of a coupled fit, refitted without the penalty from where it ended: its own program once more, at weight zero.

Nothing is compiled for it. EM is not asked for more than a fair guess: at most a hundred steps, to a rough tolerance.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from coupled_gmm.core import checks
from coupled_gmm.core.tree import rebuilt
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.request import Controls, FitRequest
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.pair import GaussianMixturePair

_STEPS, _M_STEPS, _TOL = 100, 20, 1e-4
_NEAR = 1e-2
_BLURRED = 1e3  # times as much as was asked for: plans that cost nothing are then found at once


def request(given: FitRequest) -> FitRequest:
    """What is asked of a refit, by the optimiser that has EM's M-step."""
    controls = sparing(given.controls)._replace(learning_rate=None)
    return given._replace(controls=controls, em_steps=_STEPS, optimizer=None, progress=False)


def sparing(controls: Controls) -> Controls:
    """The controls with the tolerance and the steps of a refit."""

    def like(leaf: Any, value: float) -> Any:
        if checks.known(leaf):
            return jax.device_put(np.full(np.shape(leaf), value, leaf.dtype))
        return jnp.full_like(leaf, value)

    asked = {"tol": _TOL, "em_steps": _STEPS, "m_steps": _M_STEPS}
    return controls._replace(**{name: like(getattr(controls, name), value) for name, value in asked.items()})


def graph(given: MixtureGraph, ended: GaussianMixture, has_cloud: Any) -> MixtureGraph:
    """What a refit of a graph starts from: its nodes, stacked, as they ended, without a price between them.

    What has a cloud is fitted, frozen or not: of its refit the moments of the cloud are read.
    """
    nodes = beginning(ended, given.nodes)
    xp = checks.array_module(given, nodes)
    free = {"edge_weights": xp.zeros_like(given.edge_weights), "frozen": ~xp.asarray(has_cloud), **_free(given)}
    return rebuilt(given, nodes=nodes, **free)


def pair(given: GaussianMixturePair, gmm0: GaussianMixture, gmm1: GaussianMixture) -> GaussianMixturePair:
    """The same of a pair, or of several, stacked."""
    return rebuilt(given, gmm0=beginning(gmm0, given.gmm0), gmm1=beginning(gmm1, given.gmm1), **_free(given))


def _free(edges: Any) -> dict[str, Any]:
    """Prices and links of edges that hold nothing back."""
    xp = checks.array_module(edges)
    links = None if edges.links is None else xp.ones_like(edges.links)
    return {"epsilon": _BLURRED * xp.asarray(edges.epsilon), "rho": xp.full_like(edges.rho, np.inf), "links": links}


def beginning(ended: GaussianMixture, started: GaussianMixture) -> GaussianMixture:
    """Where a refit begins: where the fit ended, or began, if two components have become one, which EM hardly parts."""
    xp = checks.array_module(ended, started)
    one = _have_become_one(ended)
    rest = None if started.remainders is None else ended.remainders
    if started.remainders is not None and rest is None:
        rest = xp.zeros_like(started.remainders)

    def kept(end: Array, start: Array) -> Array:
        return xp.where(xp.expand_dims(one, tuple(range(one.ndim, end.ndim))), start, end)

    return jax.tree.map(kept, rebuilt(ended, remainders=rest), started)


def _have_become_one(gmm: GaussianMixture) -> Bool[Any, "*b"]:
    """Whether two components of a mixture differ by no more than a hundredth of their size."""
    xp = checks.array_module(gmm)
    means, covariances, present = xp.asarray(gmm.means), xp.asarray(gmm.covariances), xp.asarray(gmm.weights) > 0
    size = xp.trace(covariances, axis1=-2, axis2=-1)[..., :, None, None]
    size = xp.where(size > 0, size, 1)
    # In each one's own unit: squares of covariances may leave a float's range.
    apart = (means[..., :, None, :] - means[..., None, :, :]) / xp.sqrt(size)
    unlike = (covariances[..., :, None, :, :] - covariances[..., None, :, :, :]) / size[..., None]
    near = (xp.sum(apart**2, axis=-1) <= _NEAR**2) & (xp.sum(unlike**2, axis=(-2, -1)) <= _NEAR**2)
    near &= present[..., :, None] & present[..., None, :] & ~np.eye(present.shape[-1], dtype=bool)
    return xp.any(near, axis=(-2, -1))
