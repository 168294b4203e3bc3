r"""Online EM: a fit that goes on from what data of before said of each component, without their points.

Statistics add. Those of earlier data were seen under some parameters; with the probabilities of components found there, Q is a
function of the sums alone, and with the mean entropy H of these probabilities a lower bound of the log-likelihood (Neal & Hinton
1998):

.. math:: L_0(\theta) \ge Q_0(\theta) + H_0, \quad H_0 = - \overline{\sum_k r_k \log r_k},

with equality at those parameters. A fit to new data raises

.. math:: J(\theta) = (1 - a) L(\theta) + a (Q_0(\theta) + H_0), \quad a = (1 - f) M_0 / ((1 - f) M_0 + M),

with the masses M of new data and M0 of earlier ones, of which a part f is forgotten. That is a lower bound of the mean
log-likelihood of all; EM, whose M-step takes the mixed statistics, never lowers it. Where every batch gets one step, that is the
online EM of Cappé & Moulines (2009) with the step size 1 - a.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks, matrices
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import AnyArray, Stackable, number, pytree, saved, unchecked
from coupled_gmm.fits.statistics import Parameters, Statistics, expected_log_likelihood
from coupled_gmm.gaussians.mixture import GaussianMixture


@saved
@pytree
class MixtureStatistics(Stackable):
    """What all data so far say of each component, in data units: from here `fit_gmm` goes on with others.

    Masses sum to 1; scatters are second moments about the means, which are kept in two floats, `means + remainders`. `mass` is the
    number of points, or the sum of their weights; data that were forgotten in part count less. `entropy` is the mean entropy of the
    probabilities of components given a point. Sums of float32 don't notice data of a ten-millionth of the mass: enable float64.
    """

    mass: Float[AnyArray, "*b"]
    masses: Float[AnyArray, "*b K"]
    means: Float[AnyArray, "*b K d"]
    remainders: Float[AnyArray, "*b K d"]
    scatters: Float[AnyArray, "*b K d d"]
    entropy: Float[AnyArray, "*b"]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.mass)

    def unpadded(self, size: int) -> "MixtureStatistics":
        """Of the first components."""
        cut = {name: getattr(self, name)[..., :size, :] for name in ("means", "remainders")}
        cut |= {"masses": self.masses[..., :size], "scatters": self.scatters[..., :size, :, :]}
        return dataclasses.replace(self, **cut)

    def _words(self) -> list[str]:
        k, d = self.means.shape[-2:]
        said = [f"mass {mass}" for mass in [number(self.mass)] if mass]
        return [*self._stacked(), f"{k} components of {d} features", *said]


@pytree
class Update:
    """How a cloud's statistics become those of all data: by its mass, and by earlier statistics, of which a part is forgotten."""

    mass: Float[AnyArray, ""]
    statistics: MixtureStatistics | None = None
    forgetting: Float[AnyArray, ""] | None = None

    @classmethod
    def of(cls, mass: Any, dtype: Any, statistics: MixtureStatistics | None, forgetting: Any) -> "Update":
        rate = None if forgetting is None else forgetting.astype(dtype)
        return cls(_held(mass, dtype), statistics, rate)

    @property
    def kept(self) -> Array:
        """The mass of earlier data, after forgetting."""
        if self.statistics is None or self.forgetting is None:
            return jnp.zeros_like(self.mass)
        return (1 - self.forgetting) * self.statistics.mass

    @property
    def total(self) -> Array:
        return _held(self.kept + self.mass, self.mass.dtype)


class Earlier(NamedTuple):
    """What earlier data say of the components of V nodes, in the coordinates of a fit's frame; and the shares of all data."""

    share: Float[Array, " V"]  # a
    new: Float[Array, " V"]  # 1 - a, of which rounding leaves nothing where a is nearly 1
    masses: Float[Array, "V K"]
    means: Float[Array, "V K d"]
    scatters: Float[Array, "V K d d"]
    entropy: Float[Array, " V"]

    def variances_of_all(self, variances: Float[Array, "V d"]) -> Float[Array, "V d"]:
        """Variances of features in earlier data and a cloud about 0 together, of which the cloud's are given."""
        present = self.masses[..., None] > 0
        means = jnp.where(present, self.means, 0)
        mean = jnp.einsum("vk,vkd->vd", self.masses, means)
        own = jnp.diagonal(self.scatters, axis1=-2, axis2=-1) + (means - mean[:, None]) ** 2
        own = jnp.einsum("vk,vkd->vd", self.masses, jnp.where(present, own, 0))
        share, new = self.share[:, None], self.new[:, None]
        return new * variances + share * (own + new * mean**2)

    def seen_from(self, found: Statistics, floors: Float[Array, "V d"], reference: Float[Array, " V"]) -> Statistics:
        """As an E-step would have found them under the same base, with the bound Q + H for the log-likelihoods."""
        base, whitening = found.base, found.whitening
        present = self.masses[..., None] > 0  # of what is absent anything may be said
        shift = jnp.einsum("vkij,vkj->vki", whitening, jnp.where(present, self.means - base.means, 0))
        scatters = jnp.where(present[..., None], self.scatters, 0)
        scatter = whitening @ scatters @ matrices.transpose(whitening)
        nothing = jnp.zeros_like(reference)
        seen = Statistics(base, whitening, self.masses, shift, scatter, nothing, nothing)
        q = jax.vmap(expected_log_likelihood)
        penalized, density = (q(base, seen, floor) for floor in (floors, jnp.zeros_like(floors)))
        above = self.entropy - reference
        return unchecked(Statistics, **vars(seen) | {"penalized": penalized + above, "log_likelihood": density + above})


def with_earlier(
    found: Statistics, earlier: Earlier, floors: Float[Array, "V d"], reference: Float[Array, " V"]
) -> Statistics:
    """Statistics of a cloud and of earlier data together, in their shares."""
    one, other = found, earlier.seen_from(found, floors, reference)
    new, share = earlier.new, earlier.share
    masses = new[:, None] * one.masses, share[:, None] * other.masses
    total = masses[0] + masses[1]
    # Of each component's mass the parts of both: one less one of them would have lost its digits.
    here, before = (jnp.where(total > 0, mass / jnp.where(total > 0, total, 1), 0)[..., None] for mass in masses)
    apart = other.shift - one.shift
    between = (here * before * apart)[..., :, None] * apart[..., None, :]
    return Statistics(
        base=one.base,
        whitening=one.whitening,
        masses=total,
        shift=here * one.shift + before * other.shift,
        scatter=here[..., None] * one.scatter + before[..., None] * other.scatter + between,
        penalized=new * one.penalized + share * other.penalized,
        log_likelihood=new * one.log_likelihood + share * other.log_likelihood,
    )


class Moments(NamedTuple):
    """Masses, shifts and scatters as of `Statistics`."""

    masses: Float[Array, "*V K"]
    shift: Float[Array, "*V K d"]
    scatter: Float[Array, "*V K d d"]

    @classmethod
    def of(cls, found: Statistics) -> "Moments":
        return cls(found.masses, found.shift, found.scatter)

    @classmethod
    def none(cls, parameters: Parameters) -> "Moments":
        return cls(*(jnp.zeros_like(leaf) for leaf in (parameters.log_weights, parameters.means, parameters.factors)))


def total_weight(point_weights: Any, n: int) -> Any:
    """The mass of a cloud in memory: the number of its points, or the sum of their weights."""
    if point_weights is None:
        return np.float64(n)
    weights = checks.own_array("point_weights", point_weights, n)
    return np.asarray(weights, np.float64).sum() if checks.at_hand(weights) else jnp.sum(weights)


def checked(statistics: Any, forgetting: Any, init: GaussianMixture | None) -> tuple[MixtureStatistics | None, Any]:
    """Earlier statistics and the rate, from which a fit may go on from a mixture; None both where there are none.

    Raises:
      TypeError, ValueError: statistics of another size, or that are none; a rate out of range, or without statistics.
    """
    if statistics is None or init is None:
        if checks.known(forgetting) and np.ndim(forgetting) == 0 and forgetting == 0:
            return None, None
        raise ArgumentError("forgetting", "there are no earlier data to forget", "goes with statistics=; drop it")
    checks.instance("statistics", statistics, MixtureStatistics)
    forgetting = checks.scalar("forgetting", forgetting, at_least=0, at_most=1)
    sizes, given = (init.n_components, init.n_features), statistics.means.shape
    if given != sizes:
        problem = "are of {} components of {} features, and init is of {} of {}".format(*given, *sizes)
        raise ArgumentError("statistics", problem, "start from the mixture of the same fit")
    if checks.known(statistics):
        _check_values(statistics)
        if checks.known(init.weights):
            _check_present(np.asarray(statistics.masses), np.asarray(init.weights))
    return statistics, forgetting


def _check_values(statistics: MixtureStatistics) -> None:
    masses = np.asarray(statistics.masses, np.float64)
    of_present = (
        np.asarray(leaf)[masses > 0] for leaf in (statistics.means, statistics.remainders, statistics.scatters)
    )
    numbers = (statistics.mass, statistics.entropy, masses, *of_present)
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in numbers):
        raise ArgumentError("statistics", "are not finite", "the fit that they are of has failed: begin without them")
    if not (np.asarray(statistics.mass) > 0 and (masses >= 0).all() and abs(masses.sum() - 1) <= 1e-3):
        raise ArgumentError("statistics", "mass must be above 0, and masses sum to 1", "take those of a fit")


def _check_present(masses: np.ndarray, weights: np.ndarray) -> None:
    """Refuse a start that has no component where earlier data have one: Q is minus infinity there."""
    missing = np.flatnonzero((weights == 0) & (masses > np.finfo(masses.dtype).eps))
    if missing.size:
        problem = f"component {missing[0]} has mass in earlier data, and weight 0 in init"
        raise ArgumentError("statistics", problem, "start from the mixture of the same fit")


def _held(mass: Any, dtype: Any) -> Any:
    """A mass as a positive number of this precision, of which two have a sum."""
    xp: Any = np if isinstance(mass, (np.ndarray, np.generic, float)) else jnp
    limits = np.finfo(dtype)
    return xp.asarray(xp.clip(mass, float(limits.tiny), float(limits.max) / 4), dtype)
