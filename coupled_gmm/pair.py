"""Two mixtures and the transport problem between them."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm import bures, checks
from coupled_gmm.mixture import GaussianMixture
from coupled_gmm.tree import new, pytree, static

if TYPE_CHECKING:
    from ott.geometry import pointcloud


@pytree
class GaussianMixturePair:
    r"""Two mixtures, the entropic weight epsilon, and the price rho of changing masses (infinite: balanced transport).

    epsilon and rho are leaves, so sweeping them recompiles nothing; whether transport is balanced is part of the structure.
    """

    gmm0: GaussianMixture
    gmm1: GaussianMixture
    epsilon: Float[Array, ""]
    rho: Float[Array, ""]
    balanced: bool = static()

    def __init__(self, gmm0: GaussianMixture, gmm1: GaussianMixture, epsilon: Any = None, tau: Any = 1.0):
        r"""A pair with :math:`\rho = \epsilon \tau / (1 - \tau)`; tau = 1 is balanced transport.

        Args:
          gmm0, gmm1: mixtures over the same features; their numbers of components may differ.
          epsilon: above 0, squared data units; None takes 1e-2 of the mean cost between components.
          tau: in (0, 1]. A traced tau is taken as unbalanced.

        Raises:
          TypeError, ValueError: not mixtures, features that disagree, epsilon or tau out of range.
        """
        given, tau = tau, checks.scalar("tau", tau, above=0, at_most=1, batched=True)
        balanced = checks.known(given) and bool(np.all(np.asarray(given) == 1))
        epsilon = _check(gmm0, gmm1, epsilon)
        rho = jnp.where(tau < 1, epsilon * tau / jnp.where(tau < 1, 1 - tau, 1), jnp.inf)
        self._set(gmm0, gmm1, epsilon, rho, balanced)

    @classmethod
    def from_rho(
        cls, gmm0: GaussianMixture, gmm1: GaussianMixture, epsilon: Any = None, rho: Any = jnp.inf
    ) -> "GaussianMixturePair":
        """A pair from rho itself (above 0, squared data units; infinite is balanced). A traced rho is unbalanced."""
        given, rho = rho, checks.scalar("rho", rho, above=0, infinite=True, batched=True)
        balanced = checks.known(given) and bool(np.all(np.isinf(np.asarray(given))))
        epsilon = _check(gmm0, gmm1, epsilon)
        self = object.__new__(cls)
        self._set(gmm0, gmm1, epsilon, rho, balanced)
        return self

    def _set(self, gmm0: GaussianMixture, gmm1: GaussianMixture, epsilon: Array, rho: Array, balanced: bool) -> None:
        dtype = jnp.result_type(gmm0.dtype, gmm1.dtype)
        fields = {"gmm0": gmm0, "gmm1": gmm1, "epsilon": epsilon.astype(dtype), "rho": rho.astype(dtype)}
        for name, value in {**fields, "balanced": balanced}.items():
            object.__setattr__(self, name, value)

    @property
    def tau(self) -> Float[Array, ""]:
        r""":math:`\rho / (\rho + \epsilon)`: 1 when balanced."""
        return 1 / (1 + self.epsilon / self.rho)

    @property
    def n_features(self) -> int:
        return self.gmm0.n_features

    def cost_matrix(self) -> Float[Array, "K0 K1"]:
        """Squared Bures-Wasserstein distances between components, squared data units."""
        return bures.bures_cost_matrix(self.gmm0, self.gmm1)

    def geometry(self) -> "pointcloud.PointCloud":
        """The same costs as an OTT point cloud of packed Gaussians under `BuresCost`, for OTT's solvers."""
        from ott.geometry import pointcloud  # slow to import, and only needed here

        from coupled_gmm.ott_cost import BuresCost

        cost = BuresCost(self.n_features)
        return pointcloud.PointCloud(bures.pack(self.gmm0), bures.pack(self.gmm1), cost_fn=cost, epsilon=self.epsilon)

    def replace(self, gmm0: GaussianMixture, gmm1: GaussianMixture) -> "GaussianMixturePair":
        """The same problem between two other mixtures."""
        return new(
            GaussianMixturePair, gmm0=gmm0, gmm1=gmm1, epsilon=self.epsilon, rho=self.rho, balanced=self.balanced
        )


def _check(gmm0: GaussianMixture, gmm1: GaussianMixture, epsilon: Any) -> jax.Array:
    checks.instance("gmm0", gmm0, GaussianMixture)
    checks.instance("gmm1", gmm1, GaussianMixture)
    bures.same_features(gmm0, gmm1)
    if epsilon is None:
        return _default_epsilon(gmm0, gmm1)
    return checks.scalar("epsilon", epsilon, above=0, batched=True)


@jax.jit
def _default_epsilon(gmm0: GaussianMixture, gmm1: GaussianMixture) -> jax.Array:
    cost = bures.pairwise_cost(gmm0.means, gmm0.cholesky, gmm1.means, gmm1.cholesky)
    mean = gmm0.weights @ cost @ gmm1.weights
    # Two equal one-component mixtures cost nothing; their spread then sets the scale.
    spread = jnp.trace(gmm0.covariance() + gmm1.covariance())
    scale = jnp.where(mean > 1e-6 * spread, mean, jnp.where(spread > 0, spread, 1))
    return 1e-2 * scale
