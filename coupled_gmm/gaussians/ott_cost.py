"""The Bures geometry as OTT takes it. Apart, because importing OTT takes twice as long as all the rest of the package."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ott.geometry import costs

from coupled_gmm.core import matrices
from coupled_gmm.gaussians import bures


@jax.tree_util.register_pytree_node_class
class BuresCost(costs.CostFn):
    """Squared Bures-Wasserstein distance as an OTT cost between packed Gaussians (mean, then covariance row by row).

    The exact counterpart of ``ott.geometry.costs.Bures``, for every OTT geometry and solver.
    """

    def __init__(self, dimension: int):
        super().__init__()
        self.dimension = dimension

    def _unpack(self, x: Float[Array, " p"]) -> tuple[Array, Array]:
        return x[: self.dimension], x[self.dimension :].reshape(self.dimension, self.dimension)

    def __call__(self, x: Float[Array, " p"], y: Float[Array, " p"]) -> Float[Array, ""]:  # pyright: ignore
        (mean0, covariance0), (mean1, covariance1) = self._unpack(x), self._unpack(y)
        factor0, factor1 = matrices.cholesky(covariance0), matrices.cholesky(covariance1)
        return bures.pairwise_cost(mean0[None], factor0[None], mean1[None], factor1[None])[0, 0]

    def norm(self, x: Float[Array, "*b p"]) -> Float[Array, "*b"]:
        """Squared norm of the mean plus trace of the covariance: the squared distance to the Dirac at the origin."""
        covariance = x[..., self.dimension :].reshape(*x.shape[:-1], self.dimension, self.dimension)
        return jnp.sum(x[..., : self.dimension] ** 2, -1) + jnp.trace(covariance, axis1=-2, axis2=-1)

    @classmethod
    def _padder(cls, dim: int) -> Array:
        return jnp.zeros((1, dim))

    def tree_flatten(self) -> tuple[tuple, Any]:
        return (), self.dimension

    @classmethod
    def tree_unflatten(cls, aux_data: Any, children: tuple) -> "BuresCost":
        del children
        return cls(aux_data)
