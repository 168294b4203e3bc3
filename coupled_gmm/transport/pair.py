"""Two mixtures and the transport problem between them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import Stackable, mapped, number, pytree, rebuilt, saved, single, static
from coupled_gmm.gaussians import bures
from coupled_gmm.gaussians.mixture import GaussianMixture, about_one_point, check_features
from coupled_gmm.transport.links import checked, transposed
from coupled_gmm.transport.problem import BALANCED, Prices, TransportProblem, both_sides, tau_of_rho

if TYPE_CHECKING:
    from ott.geometry import pointcloud


@saved
@pytree
class GaussianMixturePair(Stackable):
    r"""Two mixtures, the entropic weight epsilon, and the price rho of changing masses (infinite: balanced transport).

    rho is one number, or two: the price on gmm0's side and on gmm1's (one may be infinite: that side's masses are kept). epsilon
    and rho are leaves, so sweeping them recompiles nothing; whether transport is balanced is part of the structure.

    `links` says which components may exchange mass: a mask (K0, K1), or None where all may. A plan has exactly nothing elsewhere.
    """

    gmm0: GaussianMixture
    gmm1: GaussianMixture
    epsilon: Float[Array, "*b"]
    rho: Float[Array, "*two"]
    balanced: bool = static(init=False)  # follows from rho, in `dataclasses.replace` too
    links: Bool[Array, "*b K0 K1"] | None = None  # files of before have none

    def __init__(
        self,
        gmm0: GaussianMixture,
        gmm1: GaussianMixture,
        epsilon: Any = None,
        tau: Any = BALANCED,
        *,
        rho: Any = None,
        relative_epsilon: Any = None,
        relative_rho: Any = None,
        links: Any = None,
    ):
        r"""A pair with :math:`\rho = \epsilon \tau / (1 - \tau)`; tau = 1 is balanced transport.

        Args:
          gmm0, gmm1: mixtures over the same features; their numbers of components may differ.
          epsilon: above 0, squared data units; None takes 1e-2 of the mean cost between components.
          tau: in (0, 1], one number, or two: gmm0's side and gmm1's (OTT's and moscot's tau_a, tau_b). A traced tau is taken as
            unbalanced.
          rho: instead of tau, the price itself: above 0, squared data units, infinite is balanced; one number or two.
          relative_epsilon, relative_rho: in place of epsilon, and of rho and tau: as a part of the mean cost between components,
            so that they have no unit.
          links: a mask (K0, K1) of bools, True where component i of gmm0 may send mass to j of gmm1, as `coupled_gmm.links` makes
            it; None is everywhere. A forbidden link carries nothing, in every solver and in a fit.

        Raises:
          TypeError, ValueError: not mixtures, features that disagree, numbers out of range or of another shape, two that say the
            same; links that leave a component without any.
        """
        checks.instance("gmm0", gmm0, GaussianMixture)
        checks.instance("gmm1", gmm1, GaussianMixture)
        check_features("gmm1", gmm1, " and gmm0 has", gmm0.n_features)
        rho = given_rho(tau, rho, relative_rho, checks.one_or_two, lambda: mean_cost(gmm0, gmm1))
        prices = Prices.given(tau, rho, checks.one_or_two)
        epsilon = given_epsilon(epsilon, relative_epsilon, checks.scalar, lambda: mean_cost(gmm0, gmm1))
        dtype = jnp.result_type(gmm0.dtype, gmm1.dtype)
        fields = {
            "gmm0": gmm0,
            "gmm1": gmm1,
            "epsilon": epsilon.astype(dtype),
            "rho": prices.rho(epsilon).astype(dtype),
            "links": checked("links", links, gmm0.weights, gmm1.weights),
        }
        for name, value in {**fields, "balanced": prices.balanced}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_rho(
        cls, gmm0: GaussianMixture, gmm1: GaussianMixture, epsilon: Any = None, rho: Any = jnp.inf
    ) -> "GaussianMixturePair":
        """A pair from rho itself: `GaussianMixturePair` with its argument `rho`. A traced rho is unbalanced."""
        if rho is None:
            raise ArgumentTypeError("rho", "expected a real number, got None", "leave it out for balanced transport")
        return cls(gmm0, gmm1, epsilon, rho=rho)

    @property
    def rho0(self) -> Float[Array, "*b"]:
        """The price of changing masses on gmm0's side."""
        return both_sides(self.rho, jnp.ndim(self.epsilon))[0]

    @property
    def rho1(self) -> Float[Array, "*b"]:
        """The price of changing masses on gmm1's side."""
        return both_sides(self.rho, jnp.ndim(self.epsilon))[1]

    @property
    def tau(self) -> Float[Array, "*two"]:
        r""":math:`\rho / (\rho + \epsilon)`: 1 when balanced; two where rho is two."""
        two = jnp.ndim(self.rho) > jnp.ndim(self.epsilon)
        return tau_of_rho(self.rho, self.epsilon[..., None] if two else self.epsilon)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.epsilon.shape

    @property
    def n_features(self) -> int:
        return self.gmm0.n_features

    def _words(self) -> list[str]:
        one, other = self.gmm0.n_components, self.gmm1.n_components
        price = ["balanced"] if self.balanced else [f"rho {said}" for said in [number(self.rho)] if said]
        epsilon = [f"epsilon {said}" for said in [number(self.epsilon)] if said]
        sizes = f"{one} and {other} components of {self.n_features} features"
        linked = [] if self.links is None else ["with links"]
        return [*self._stacked(), sizes, *epsilon, *price, *linked, str(self.gmm0.dtype)]

    @mapped
    def cost_matrix(self) -> Float[Array, "K0 K1"]:
        """Squared Bures-Wasserstein distances between components, squared data units."""
        return bures.bures_cost_matrix(self.gmm0, self.gmm1)

    @single
    def geometry(self) -> "pointcloud.PointCloud":
        """The same costs as an OTT point cloud of packed Gaussians under `BuresCost`, for OTT's solvers; it knows of no links."""
        from ott.geometry import pointcloud  # slow to import, and only needed here

        from coupled_gmm.gaussians.ott_cost import BuresCost

        cost, (gmms, _) = BuresCost(self.n_features), about_one_point(self.gmm0, self.gmm1)
        return pointcloud.PointCloud(*map(bures.pack, gmms), cost_fn=cost, epsilon=self.epsilon)

    def replace(self, gmm0: GaussianMixture, gmm1: GaussianMixture) -> "GaussianMixturePair":
        """The same problem between two other mixtures of these sizes, or shorter ones: of padded ones the beginnings."""
        links, k0, k1 = self.links, gmm0.n_components, gmm1.n_components
        links = None if links is None else links[..., :k0, :k1]
        return rebuilt(self, gmm0=gmm0, gmm1=gmm1, links=links)

    def reverse(self) -> "GaussianMixturePair":
        """The same problem from gmm1 to gmm0."""
        two = jnp.ndim(self.rho) > jnp.ndim(self.epsilon)
        rho = jnp.flip(self.rho, axis=-1) if two else self.rho
        return rebuilt(self, gmm0=self.gmm1, gmm1=self.gmm0, rho=rho, links=transposed(self.links))


def stated(pair: GaussianMixturePair, balanced: bool) -> GaussianMixturePair:
    """The same pair, whose structure says that it is balanced, or leaves that to its prices."""
    return rebuilt(pair, balanced=balanced)


def transport_problem(pair: GaussianMixturePair, cost: Float[Array, "*b K0 K1"]) -> TransportProblem:
    """The problem between the components of a pair, at costs that are known."""
    masses = pair.gmm0.weights, pair.gmm1.weights
    return TransportProblem.of_masses(cost, *masses, epsilon=pair.epsilon, rho=pair.rho, links=pair.links)


def given_epsilon(epsilon: Any, relative: Any, check: Callable[..., Array], cost: Callable[[], Array]) -> Array:
    """epsilon, checked: as it was given, or as a part of a mean cost, which is a hundredth where nothing is given."""
    if epsilon is None:
        return (1e-2 if relative is None else check("relative_epsilon", relative, above=0)) * cost()
    if relative is not None:
        raise ArgumentError(
            "relative_epsilon", "given beside epsilon, and both say how blurred plans are", "keep one of them"
        )
    return check("epsilon", epsilon, above=0)


def given_rho(tau: Any, rho: Any, relative: Any, check: Callable[..., Array], cost: Callable[[], Array]) -> Any:
    """rho as it was given, or as a part of a mean cost."""
    if relative is None:
        return rho
    if rho is not None or tau is not BALANCED:
        raise ArgumentError(
            "relative_rho", "given beside rho or tau, and each says what it costs to change masses", "keep one of them"
        )
    share = check("relative_rho", relative, above=0, infinite=True)
    if checks.known(relative) and bool(np.all(np.isinf(np.asarray(relative)))):
        return relative
    each = cost()
    return share * jnp.reshape(each, each.shape + (1,) * (share.ndim - each.ndim) if each.ndim else ())


@program()
def mean_cost(gmm0: GaussianMixture, gmm1: GaussianMixture) -> jax.Array:
    """The mean cost between components, or, where mixtures are equal and of one component, their variance."""
    (gmm0, gmm1), _ = about_one_point(gmm0, gmm1)
    cost = bures.pairwise_cost(gmm0.means, gmm0.cholesky, gmm1.means, gmm1.cholesky)
    mean = gmm0.weights @ cost @ gmm1.weights
    # Two equal one-component mixtures cost nothing; their variance then sets the scale.
    variance = jnp.trace(gmm0.covariance() + gmm1.covariance())
    return jnp.where(mean > 1e-6 * variance, mean, jnp.where(variance > 0, variance, 1))
