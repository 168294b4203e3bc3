r"""How far a penalty has pulled mixtures away from their clouds.

Of a node with a cloud, of mean log-likelihood L under its fitted mixture, and L' under the same mixture refitted without coupling:

.. math:: loss = L' - L \ge 0

with the ridge's term in both, in nats per point. A weight :math:`\lambda` costs no more than it saves: with T the transport cost
of the fit and T' that between the refitted mixtures,

.. math:: \sum_i v_i \, loss_i \le \sum_{ij} \lambda_{ij} (T'_{ij} - T_{ij}),

so that at :math:`\lambda \le \delta / T'` no more than :math:`\delta` can be lost.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks
from coupled_gmm.core.tree import Stackable, listed, number, pytree, saved, take
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.pair import GaussianMixturePair
from coupled_gmm.transport.plan import Plan
from coupled_gmm.transport.solvers import solve_plan

MOST_LOST = 0.1  # nats per point; a mixture that has lost more is none of its cloud
_ONE = 0.01  # of the squared distance between two mixtures: with no more left they are one


class Ended(NamedTuple):
    """Where a fit, or each of several, ended."""

    gmms: list[GaussianMixture]
    log_likelihoods: Float[Any, "*b V"]
    penalized: Float[Any, "*b V"]


@saved
@pytree
class Fidelity(Stackable):
    """What coupling has cost each of V mixtures; NaN where a node has no cloud.

    Likelihoods are means per point of the cloud, `log_likelihood` the density's own. `loss` is what the mixture gains by being
    refitted without coupling, from where the fit ended, in nats per point; at least that, where a hundred steps were not enough.
    Shifts are in the cloud's standard deviations, and 0 of a mixture that was fitted by EM alone: of the mean, the largest of any
    feature; of the covariance, of any two, the cloud's having the ridge's floor. `alone` are the refitted mixtures, of which frozen
    ones, which lose nothing, are as they were.
    """

    log_likelihood: Float[Array, "*b V"]
    penalized_log_likelihood: Float[Array, "*b V"]
    loss: Float[Array, "*b V"]
    mean_shift: Float[Array, "*b V"]
    covariance_shift: Float[Array, "*b V"]
    alone: list[GaussianMixture]

    @classmethod
    def of(cls, fit: Ended, refit: Ended, frozen: Any, has_cloud: Any) -> "Fidelity":
        """Of a fit, and of where it ended without the penalty; in a program, or on the host."""
        xp = checks.array_module(fit, refit, frozen, has_cloud)
        frozen, has_cloud = xp.asarray(frozen), xp.asarray(has_cloud)
        loss = xp.maximum(xp.asarray(refit.penalized) - xp.asarray(fit.penalized), 0)
        shifts = [xp.stack(each, axis=-1) for each in zip(*map(_shifts, fit.gmms, refit.gmms), strict=True)]
        loss = xp.where(frozen, 0, loss).astype(loss.dtype)
        columns = [fit.log_likelihoods, fit.penalized, loss, *shifts]
        likelihood, penalized, *rest = (xp.where(has_cloud, one, np.nan).astype(loss.dtype) for one in columns)
        still = xp.broadcast_to(frozen | ~has_cloud, loss.shape)

        def kept(v: int) -> GaussianMixture:
            def one(old: Any, new: Any) -> Any:
                return xp.where(xp.expand_dims(still[..., v], tuple(range(still.ndim - 1, new.ndim))), old, new)

            return jax.tree.map(one, fit.gmms[v], refit.gmms[v])

        alone = [kept(v) for v in range(len(fit.gmms))]
        fields = (likelihood, penalized, *rest, alone)
        return cls(*(fields if xp is jnp else jax.device_put(fields)))  # pyright: ignore[reportArgumentType]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.loss)[:-1]

    def _words(self) -> list[str]:
        return [
            *self._stacked(),
            f"loss {number(self.loss)} nats per point",
            f"mean off by {number(self.mean_shift)} sd",
        ]

    @property
    def overruled(self) -> np.ndarray:
        """Of which nodes the penalty has overruled the data, on the host."""
        return np.asarray(np.nan_to_num(np.asarray(self.loss)) > MOST_LOST)


def overruled(
    found: Fidelity,
    plans: Plan,
    edges: np.ndarray,
    names: list[str],
    edge_weights: Any,
    node_weights: Any,
    variance: Any,
) -> list[str]:
    """What is to be known where the penalty has overruled the data, with the remedy; on the host.

    Args:
      plans: of the edges, stacked, between the fitted mixtures.
      edges: pairs of nodes, (E, 2).
      names: of the nodes.
      edge_weights, node_weights: lambda (E,) and v (V,); for several fits stacked.
      variance: by which lambda has no unit.
    """
    lost = found.overruled
    if not lost.any():
        return []
    if found.batch_shape:
        each = lost.reshape(-1, lost.shape[-1]).any(axis=1)
        return [many_overruled(each.sum(), each.size)]
    losses = [f"{names[i]} {np.asarray(found.loss)[i]:.3g}" for i in np.flatnonzero(lost)]
    said = [f"the penalty has overruled the data: coupling has cost {listed(losses)} nats per point"]
    price, linked = np.zeros(len(edges)), plans.pair.links is not None
    for edge, (i, j) in enumerate(edges.tolist()):
        pair, alone = take(plans.pair, edge), (found.alone[i], found.alone[j])
        price[edge] = np.nan if linked else float(solve_plan(pair.replace(*alone)).regularized_cost)
        if (lost[i] or lost[j]) and _distance(pair.gmm0, pair.gmm1) < _ONE * _distance(*alone):
            said.append(f"{names[i]} and {names[j]} have become one mixture")
    if linked:  # which may be no links that the refitted mixtures' masses can take
        return [*said, "fit with a smaller weight"]
    weights, cost = np.asarray(edge_weights, np.float64), np.asarray(node_weights, np.float64)
    least = cost[np.isfinite(np.asarray(found.loss))].min()
    safe = MOST_LOST * least / (weights @ price) * weights.max()
    if safe >= weights.max():  # no fit at its end loses more than it saves
        return [*said, "and more than it would at its end: do more steps, or several starts (n_init)"]
    given = f"transport_weight={safe:.2g} (relative_weight={safe * float(variance):.2g})"
    return [*said, f"at {given} none of them need lose more than {MOST_LOST:g}: fit with that, or less"]


def many_overruled(number: int, of: int) -> str:
    """The same of several fits."""
    return f"the penalty has overruled the data in {number} of {of} fits: see the message of each"


def _distance(gmm0: GaussianMixture, gmm1: GaussianMixture) -> float:
    return float(solve_plan(GaussianMixturePair(gmm0, gmm1, epsilon=1.0), method="exact").transport_cost)


def _shifts(gmm: GaussianMixture, refit: GaussianMixture) -> tuple[Float[Any, "*b"], Float[Any, "*b"]]:
    """How far mean and covariance of a mixture are from those of its cloud, in standard deviations.

    EM's M-step gives a mixture the moments of its cloud, the covariance with the ridge's floor: they are read off the refit.
    """
    xp = checks.array_module(gmm, refit)
    centre = xp.asarray(refit.means)[..., :1, :]
    own, cloud = (_moments(xp, mixture, centre) for mixture in (gmm, refit))
    deviations = xp.sqrt(xp.diagonal(cloud[1], axis1=-2, axis2=-1))
    deviations = xp.where(deviations > 0, deviations, 1)
    of_means = xp.abs(own[0] - cloud[0]) / deviations
    of_covariances = xp.abs(own[1] - cloud[1]) / deviations[..., :, None] / deviations[..., None, :]
    return xp.max(of_means, axis=-1), xp.max(of_covariances, axis=(-2, -1))


def _moments(xp: Any, gmm: GaussianMixture, centre: Any) -> tuple[Any, Any]:
    """Mean and covariance of a mixture, about a point near it."""
    weights, means, covariances = (xp.asarray(leaf) for leaf in (gmm.weights, gmm.means, gmm.covariances))
    rest = 0 if gmm.remainders is None else xp.asarray(gmm.remainders)
    present = weights > 0
    means = xp.where(present[..., None], (means - centre) + rest, 0)
    mean = xp.einsum("...k,...kd->...d", weights, means)
    apart = means - mean[..., None, :]
    each = xp.where(present[..., None, None], covariances, 0) + apart[..., :, None] * apart[..., None, :]
    return mean, xp.einsum("...k,...kij->...ij", weights, each)
