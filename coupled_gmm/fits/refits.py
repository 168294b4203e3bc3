"""The mixtures of a coupled fit, refitted by EM alone from where it ended: what they would be without the penalty."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import pytree
from coupled_gmm.fits import em, online
from coupled_gmm.fits.fidelity import Fidelity, shifts
from coupled_gmm.fits.frame import Sight, View
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.history import History
from coupled_gmm.fits.request import Controls, FitOptions, FitRequest, Stretches
from coupled_gmm.fits.statistics import Sums
from coupled_gmm.gaussians.mixture import GaussianMixture, alike, stack
from coupled_gmm.transport import solvers

STEPS, _TOL = 100, 1e-4
_NEAR = 1e-2


@pytree
class Refit:
    """What a program returns of it."""

    fidelity: Fidelity
    status: Int[Array, "*b"]
    history: History


def fidelity_of(
    fit: Any, coupled: "Coupled", starts: "list[GaussianMixture]", frozen: Any, request: FitRequest, view: View
) -> Any:
    """The same fit, or fits stacked, with what coupling has cost its nodes, by the view that it has had of the clouds.

    Args:
      coupled: where it ended.
      starts: where its nodes began.
    """
    dtype, numbers = coupled.gmms[0].dtype, max(gmm.n_components * gmm.n_features for gmm in coupled.gmms)
    request = request._replace(controls=sparing(request.controls), em_steps=STEPS, optimizer=None, progress=False)
    seen = {"view": view._replace(update=update(dtype)), "numbers": numbers}
    program = Stretches(_begin, _go_on) if view.external else _refit
    found = request.fit(program, coupled, starts, frozen, solver=solvers.ENTROPIC, **seen)
    return dataclasses.replace(fit, fidelity=found.fidelity)


def sparing(controls: Controls) -> Controls:
    """The controls of a refit, of which no more is asked than a fair guess."""
    tol, steps = jax.device_put((np.float32(_TOL), np.int32(STEPS)))
    return controls._replace(tol=tol, em_steps=steps, learning_rate=None)


def update(dtype: Any) -> online.Update:
    """What makes an E-step keep the statistics of a cloud, of which its moments are read."""
    return online.Update.of(np.float64(1), dtype, None, None)


class Coupled(NamedTuple):
    """Where a coupled fit ended."""

    gmms: list[GaussianMixture]
    penalized: Any  # (V,), as the fit has them
    log_likelihoods: Any

    def alone(self, starts: list[GaussianMixture], frozen: Array, sight: Sight) -> MixtureGraph:
        """Its nodes without edges; where two components have become one, which EM hardly parts, as the fit began.

        What is frozen, or has no cloud, stays as it is.
        """
        nodes, began = alike([stack(self.gmms), stack(starts)])
        became_one = _have_become_one(nodes)

        def kept(end: Array, start: Array) -> Array:
            return jnp.where(jnp.expand_dims(became_one, range(1, end.ndim)), start, end)

        return MixtureGraph.unjoined(jax.tree.map(kept, nodes, began), frozen | ~sight.has_cloud)

    def result(self, sight: Sight, controls: Controls, end: em.Solution) -> "Refit":
        assert end.statistics is not None
        floors = sight.floors(controls.ridge) * jnp.square(sight.frame.unit)
        mean_shift, covariance_shift = shifts(stack(self.gmms), end.statistics, floors)
        numbers = {
            "log_likelihood": self.log_likelihoods,
            "penalized_log_likelihood": self.penalized,
            "loss": jnp.maximum(end.penalized - self.penalized, 0),
            "mean_shift": mean_shift,
            "covariance_shift": covariance_shift,
        }
        numbers = {name: jnp.where(sight.has_cloud, number, jnp.nan) for name, number in numbers.items()}
        return Refit(Fidelity(**numbers, alone=end.nodes), end.status, end.history)


def _have_become_one(nodes: GaussianMixture) -> Bool[Array, " V"]:
    """Whether two components of a mixture differ by no more than a hundredth of their size."""
    k = nodes.weights.shape[1]
    size = jnp.trace(nodes.covariances, axis1=2, axis2=3)
    apart = jnp.sum((nodes.means[:, :, None] - nodes.means[:, None]) ** 2, axis=-1)
    unlike = jnp.sum((nodes.covariances[:, :, None] - nodes.covariances[:, None]) ** 2, axis=(-2, -1))
    near = (apart <= _NEAR**2 * size[:, None]) & (unlike <= (_NEAR * size[:, None]) ** 2)
    present = nodes.weights > 0
    return jnp.any(near & present[:, None] & present[:, :, None] & ~np.eye(k, dtype=bool), axis=(1, 2))


@program("options", over_matrices=True)
def _refit(
    coupled: Coupled,
    starts: list[GaussianMixture],
    frozen: Array,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
) -> Refit:
    def one(coupled: Coupled) -> Refit:
        return coupled.result(sight, controls, em.run(coupled.alone(starts, frozen, sight), sight, controls, options))

    return one(coupled) if coupled.penalized.ndim == 1 else jax.lax.map(one, coupled)


@program("options", over_matrices=True)
def _begin(
    coupled: Coupled,
    starts: list[GaussianMixture],
    frozen: Array,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
) -> em.Underway:
    return em.begin(coupled.alone(starts, frozen, sight), sight, controls, options)


@program("options", over_matrices=True)
def _go_on(
    coupled: Coupled,
    starts: list[GaussianMixture],
    frozen: Array,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
    underway: em.Underway,
    until: Array,
    sums: Sums | None = None,
) -> tuple[em.Underway, Refit]:
    underway, end = em.go_on(coupled.alone(starts, frozen, sight), sight, controls, options, underway, until, sums)
    return underway, coupled.result(sight, controls, end)
