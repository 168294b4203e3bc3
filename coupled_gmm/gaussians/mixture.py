"""Gaussian mixtures: an immutable pytree of means, covariances and weights.

The three arrays that users think in are the leaves, so ``jax.grad`` of any value returns gradients in means, covariances
and weights. Factors are derived when they are needed. A component of weight zero is valid and contributes nothing to a
value or a gradient, whatever its other parameters are: mixtures of unequal size are padded with such components.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from coupled_gmm.core import checks, chunks, matrices
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.core.expansions import two_sum
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import AnyArray, Stackable, mapped, pytree, saved, single, unchecked
from coupled_gmm.gaussians import at_points
from coupled_gmm.gaussians.conditional import conditionals
from coupled_gmm.gaussians.covariances import check_covariances, which_singular
from coupled_gmm.gaussians.density import log_weights

# Called outside of jit, a loop is compiled anew at every call.
_cholesky = program()(matrices.cholesky)


@saved
@pytree
class GaussianMixture(Stackable):
    r"""A mixture :math:`\sum_k w_k N(m_k, S_k)` of K Gaussians in d dimensions.

    Build one with `from_moments`, which checks; the bare constructor does not. Mixtures may be stacked on leading axes, as a flow's
    path is: `gmm[i]` is one of them.

    `remainders` is what the precision of the means leaves of them: a fit sets it where a cloud lies so far from 0, in its own
    standard deviations, that one float would round a mean away from its points. Densities and fits read it.
    """

    means: Float[AnyArray, "*b K d"]
    covariances: Float[AnyArray, "*b K d d"]
    weights: Float[AnyArray, "*b K"]
    remainders: Float[AnyArray, "*b K d"] | None = None

    @classmethod
    def from_moments(cls, means: Any, covariances: Any, weights: Any) -> "GaussianMixture":
        """A mixture from its moments, checked.

        Args:
          means: (K, d), data units.
          covariances: (K, d, d), symmetric positive semi-definite, squared data units. Singular ones are valid: transport
            needs no more, densities do.
          weights: (K,), at least 0; normalised if they sum to 1 within 1e-3.

        Raises:
          ValueError: shapes that disagree, values that are not finite, negative weights or a sum away from 1,
            covariances that are not symmetric or not positive semi-definite.
        """
        given = checks.own_array("means", means, "K", "d")
        n_components, n_features = given.shape
        means = checks.array("means", given, n_components, n_features)
        covariances = checks.array("covariances", covariances, n_components, n_features, n_features)
        checks.finite("means", means)
        checks.finite("covariances", covariances)
        weights = checks.weights("weights", weights, n_components)
        dtype = jnp.result_type(means, covariances, weights)
        if checks.known(weights) and abs((total := float(np.sum(np.asarray(weights)))) - 1) > 1e-3:
            raise ArgumentError("weights", f"must sum to 1 within 1e-3, got {total:.6g}", "divide by the sum")
        if checks.known(covariances):
            check_covariances(np.asarray(covariances, np.float64), float(jnp.finfo(dtype).eps))
        covariances, weights = _normalized(covariances, weights, dtype)
        # NumPy's were copied as they were put there; those of JAX their owner may give up.
        means = means.astype(dtype) if isinstance(given, np.ndarray) else jnp.array(means, dtype)
        return cls(means, covariances, weights, _remainders(given, means, covariances))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.means.shape[:-2]

    def _words(self) -> list[str]:
        return [*self._stacked(), f"{self.n_components} components of {self.n_features} features", str(self.dtype)]

    @property
    def n_components(self) -> int:
        return self.means.shape[-2]

    @property
    def n_features(self) -> int:
        return self.means.shape[-1]

    @property
    def dtype(self) -> Any:
        return self.means.dtype

    @property
    def cholesky(self) -> Float[Array, "*b K d d"]:
        """Lower triangular L with S = L L^T; singular where S is."""
        return _cholesky(self.covariances)

    @property
    def log_weights(self) -> Float[Array, "*b K"]:
        """Logarithms of the weights: -inf, with zero gradient, where a weight is zero."""
        return log_weights(self.weights)

    @single
    def component_log_prob(self, x: Any) -> Float[Array, "n K"]:
        r""":math:`\log N(x; m_k, S_k)`, (n, K), without weights; NaN for a singular component of weight zero.

        Raises:
          ValueError: a component of positive weight has a singular covariance, and so no density.
        """
        return at_points.density(self, x, "components")

    def posterior_mean(self, x: Any, values: Float[Array, " K"]) -> Float[Array, " n"]:
        """The mean of a value of each component over the components given the point, (n,)."""
        return at_points.density(self, x, "posterior_mean", values)

    @single
    def log_prob(self, x: Any) -> Float[Array, " n"]:
        r"""Log-density :math:`\log \sum_k w_k N(x; m_k, S_k)` at points (n, d).

        This, and every density at points, is taken of clouds that are not in memory as well (`open_cloud`): a chunk at a time, and
        only the values are in memory. Blocks of a Dask array are brought here one by one; to leave values where the blocks lie,
        map `log_prob` over them (``array.map_blocks``).
        """
        return at_points.density(self, x, "mixture")

    @single
    def log_posterior(self, x: Any) -> Float[Array, "n K"]:
        """Log-probability of each component given the point, (n, K); -inf for components of weight zero."""
        return at_points.density(self, x, "posterior")

    @single
    def predict(self, x: Any) -> Int[Array, " n"]:
        """The most probable component of each point, (n,); never one of weight zero."""
        return at_points.density(self, x, "label")

    @single
    def score(self, x: Any) -> Any:
        """Mean log-density of points (n, d): in float64 where they are known, whatever the mixture's precision.

        Of a cloud that is not in memory, and was opened with weights, it is the weighted mean.
        """
        return at_points.score(self, x).mean

    @property
    def n_parameters(self) -> Any:
        """Numbers that a fit is free to choose: means, covariances and weights of the components of positive weight."""
        xp = checks.array_module(self.weights)
        count, d = xp.sum(xp.asarray(self.weights) > 0, axis=-1), self.n_features
        number = n_free(count, d)
        return int(number) if xp is np and not self.batch_shape else number

    @single
    def bic(self, x: Any) -> Any:
        """Bayesian information criterion at points (n, d); of two mixtures the one with the lower is preferred.

        Where points have weights (see `score`), n counts those whose weight is positive.
        """
        score, n = at_points.score(self, x)
        return self.n_parameters * math.log(n) - 2 * n * score

    @single
    def aic(self, x: Any) -> Any:
        """Akaike's information criterion at points (n, d), n as of `bic`; of two mixtures the one with the lower is preferred."""
        score, n = at_points.score(self, x)
        return 2 * self.n_parameters - 2 * n * score

    @single
    @matrices.precise
    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
        """n independent draws; the key decides them."""
        checks.held("gmm", self)
        key = checks.key("key", key)
        n = checks.integer("n", n, 1, checks.MOST_NUMBERS // self.n_features**2)
        traced = not checks.known(self, key)
        return chunks.first(_sample(self, key, n if traced else chunks.rounded(n)), n)

    @mapped
    @program()
    def mean(self) -> Float[Array, " d"]:
        """Mean of the whole mixture."""
        return self.weights @ self.means

    @mapped
    @program()
    def covariance(self) -> Float[Array, "d d"]:
        """Covariance of the whole mixture: within plus between components."""
        (near,), _ = about_one_point(self)
        deviations = near.means - near.mean()
        within = jnp.einsum("k,kij->ij", self.weights, self.covariances)
        return within + jnp.einsum("k,ki,kj->ij", self.weights, deviations, deviations)

    @single
    def marginal(self, axes: Sequence[int]) -> "GaussianMixture":
        """The mixture over some of the features, in the order given."""
        index = np.asarray(self._check_axes(axes))
        # Without programs of their own where NumPy can do it.
        kept = jax.tree.map(np.asarray, self) if checks.at_hand(self) else self
        remainders = None if kept.remainders is None else kept.remainders[:, index]
        covariances = kept.covariances[:, index[:, None], index]
        return GaussianMixture(*jax.device_put((kept.means[:, index], covariances, kept.weights, remainders)))

    @single
    def condition(self, axes: Sequence[int], values: Any) -> "GaussianMixture":
        """The mixture over the other features, in their order, given `values` (len(axes),) of the features `axes`.

        Of many values at once, (m, len(axes)), m mixtures stacked on a leading axis.

        Raises:
          ValueError: `axes` repeat, are out of range or leave no feature; `values` have another length; a component of
            positive weight is singular in `axes`, so that they have no density.
        """
        checks.held("gmm", self)
        given = self._check_axes(axes)
        if len(given) == self.n_features:
            raise ArgumentError(
                "axes", f"all {self.n_features} features are given", "leave at least one to be conditioned"
            )
        listed = isinstance(values, (list, tuple)) and len(values) > 0
        many = np.ndim(next(iter(values)) if listed else values) == (1 if listed else 2)
        values = checks.own_array("values", values, *(("m",) if many else ()), len(given))
        checks.finite("values", values)
        observed = self.marginal(given)
        observed.check_densities(f"marginal over axes {given}")
        at_points.warn_of_rounding(observed)
        points, centres = at_points.seen(observed, values if many else values[None], "values")
        moments = self.means, self.covariances, self.weights, self.remainders
        found = conditionals(moments, chunks.filled(points), centres, tuple(given))
        stacked = GaussianMixture(*chunks.first(found, len(points)))
        return stacked if many else jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[1:]), stacked)

    def check_densities(self, name: str = "gmm") -> None:
        """Raise ValueError where a component of positive weight is singular, so that the mixture has no density."""
        if checks.known(self):
            singular = np.flatnonzero((np.asarray(self.weights) > 0) & which_singular(np.asarray(self.covariances)))
            if singular.size:
                raise ArgumentError(
                    name,
                    f"component {singular[0]} has a singular covariance and no density",
                    "add a small multiple of the identity to it, or drop the component",
                )

    def _check_axes(self, axes: Sequence[int]) -> list[int]:
        index = np.asarray(axes)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise ArgumentTypeError("axes", f"expected a sequence of integers such as [0, 2], got {checks.brief(axes)}")
        chosen = index.astype(int).tolist()
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= axis < self.n_features for axis in chosen):
            raise ArgumentError("axes", f"expected distinct features between 0 and {self.n_features - 1}, got {chosen}")
        return chosen


@program("n")
def _sample(gmm: GaussianMixture, key: PRNGKeyArray, n: int) -> Float[Array, "n d"]:
    key_component, key_noise = jax.random.split(key)
    component = jax.random.categorical(key_component, gmm.log_weights, shape=(n,))
    noise = jax.random.normal(key_noise, (n, gmm.n_features), gmm.dtype)
    return gmm.means[component] + jnp.einsum("nij,nj->ni", gmm.cholesky[component], noise)


def n_free(n_components: Any, n_features: int) -> Any:
    """Numbers that mixtures of so many components are made of: means, covariances, and weights that sum to 1."""
    return n_components * (1 + n_features + n_features * (n_features + 1) // 2) - 1


def padded(gmm: GaussianMixture, n_components: int) -> GaussianMixture:
    """The same mixture with components of weight zero (mean 0, covariance I) appended up to `n_components`."""
    extra = n_components - gmm.n_components
    if not extra:
        return gmm
    identity = jnp.broadcast_to(jnp.eye(gmm.n_features, dtype=gmm.dtype), (extra, gmm.n_features, gmm.n_features))
    nothing = jnp.zeros((extra, gmm.n_features), gmm.dtype)
    return unchecked(
        GaussianMixture,
        means=jnp.concatenate([gmm.means, nothing]),
        covariances=jnp.concatenate([gmm.covariances, identity]),
        weights=jnp.concatenate([gmm.weights, nothing[:, 0]]),
        remainders=None if gmm.remainders is None else jnp.concatenate([gmm.remainders, nothing]),
    )


def alike(gmms: Sequence[GaussianMixture]) -> list[GaussianMixture]:
    """The same mixtures, all with remainders where one has them: trees that can be stacked."""
    if all(gmm.remainders is None for gmm in gmms):
        return list(gmms)
    return [
        gmm if gmm.remainders is not None else dataclasses.replace(gmm, remainders=jnp.zeros_like(gmm.means))
        for gmm in gmms
    ]


@program()
def stack(gmms: Sequence[GaussianMixture]) -> GaussianMixture:
    """Mixtures on a leading axis, padded to the largest."""
    size = max(gmm.n_components for gmm in gmms)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(padded(gmm, size) for gmm in alike(gmms)))


def in_one_space(name: str, gmms: Any, remedy: str = "give at least one mixture") -> list[GaussianMixture]:
    """A list of mixtures, checked: at least one, over the same features."""
    gmms = checks.sequence(name, gmms)
    if not gmms:
        raise ArgumentError(name, "the list is empty", remedy)
    for i, gmm in enumerate(gmms):
        checks.instance(f"{name}[{i}]", gmm, GaussianMixture)
        check_features(f"{name}[{i}]", gmm, f" and {name}[0] has", gmms[0].n_features)
    return gmms


def check_features(name: str, gmm: GaussianMixture, theirs: str, n_features: int) -> None:
    """Refuse a mixture over another number of features than others; `theirs` says whose that is."""
    if gmm.n_features != n_features:
        problem = f"has {gmm.n_features} features{theirs} {n_features}"
        raise ArgumentError(name, problem, "mixtures are compared in one space: take a marginal of one")


def about_one_point(*gmms: GaussianMixture) -> tuple[list[GaussianMixture], Float[Array, " d"] | None]:
    """The mixtures moved together to where one float holds their means, and by how much: `moved_back` undoes it.

    Transport between them is the same there. None where no mean has a remainder, and nothing moves.
    """
    if all(gmm.remainders is None for gmm in gmms):
        return list(gmms), None
    first = jnp.argmax(gmms[0].weights, axis=-1)
    centre = gmms[0].means.reshape(-1, gmms[0].n_features)[first.ravel()[0]]
    moved = [gmm.means - centre + (0 if gmm.remainders is None else gmm.remainders) for gmm in gmms]
    near = [dataclasses.replace(gmm, means=means, remainders=None) for gmm, means in zip(gmms, moved, strict=True)]
    return near, centre


def moved_back(gmm: GaussianMixture, centre: Float[Array, " d"] | None) -> GaussianMixture:
    if centre is None:
        return gmm
    means, remainders = two_sum(centre, gmm.means)
    return dataclasses.replace(gmm, means=means, remainders=remainders)


@program("dtype")
def _normalized(covariances: Array, weights: Array, dtype: Any) -> tuple[Array, Array]:
    """Covariances that are symmetric and weights that sum to one, to rounding."""
    symmetric = 0.5 * (covariances + matrices.transpose(covariances))
    return symmetric.astype(dtype), (weights / jnp.sum(weights)).astype(dtype)


def _remainders(given: Any, means: Array, covariances: Array) -> Array | None:
    """What rounding the means as given has left of them, where that is more than 1e-4 of a standard deviation."""
    if not isinstance(given, np.ndarray) or not checks.known(means, covariances):
        return None
    lost = given - np.asarray(means, given.dtype)
    deviations = np.sqrt(np.diagonal(np.asarray(covariances), axis1=1, axis2=2))
    return jnp.asarray(lost, means.dtype) if (np.abs(lost) > 1e-4 * deviations).any() else None
