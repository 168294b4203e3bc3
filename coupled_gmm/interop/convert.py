"""Mixtures to and from scikit-learn, OTT and POT. Each library is imported when its function is called."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks, installation, matrices
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.core.programs import program
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.pair import GaussianMixturePair


def from_sklearn(estimator: Any) -> GaussianMixture:
    """The mixture that scikit-learn fitted; in float64 where JAX has it enabled.

    Args:
      estimator: a fitted GaussianMixture or BayesianGaussianMixture, of any covariance_type. Of the Bayesian one the
        point estimates are taken; its own scores average over their posterior and so differ from `log_prob`.

    Raises:
      TypeError: another object.
      ValueError: not fitted, or its moments are none that `GaussianMixture.from_moments` takes.
    """
    with installation.needed("sklearn", "from_sklearn"):
        from sklearn import mixture

    _expect("estimator", estimator, mixture.GaussianMixture, mixture.BayesianGaussianMixture)
    if not hasattr(estimator, "covariances_"):
        raise ArgumentError("estimator", "not fitted", "call fit first")
    means, covariances = np.asarray(estimator.means_), np.asarray(estimator.covariances_)
    identity = np.eye(means.shape[1], dtype=means.dtype)
    if estimator.covariance_type == "tied":
        covariances = np.broadcast_to(covariances, (len(means), *covariances.shape))
    elif estimator.covariance_type == "diag":
        covariances = covariances[:, :, None] * identity
    elif estimator.covariance_type == "spherical":
        covariances = covariances[:, None, None] * identity
    return _from_moments("estimator", means, covariances, estimator.weights_)


def to_sklearn(gmm: GaussianMixture) -> Any:
    """A `sklearn.mixture.GaussianMixture` of covariance_type "full", in float64, ready to predict, score and sample.

    Components of weight zero are dropped: scikit-learn would warn of their logarithm at every call. No fit is claimed:
    `converged_` is False, `n_iter_` 0 and `lower_bound_` -inf. With warm_start=True set, its `fit` starts from here.

    Raises:
      TypeError: not a mixture, or traced.
      ValueError: a component of positive weight has a singular covariance, and so no density; stacked mixtures.
    """
    from scipy.linalg import solve_triangular

    with installation.needed("sklearn", "to_sklearn"):
        from sklearn import mixture

    means, covariances, weights = to_pot(gmm)
    gmm.check_densities()
    present = weights > 0
    estimator: Any = mixture.GaussianMixture(int(present.sum()), covariance_type="full")
    estimator.means_, estimator.covariances_, estimator.weights_ = (
        means[present],
        covariances[present],
        weights[present],
    )
    factors, identity = np.linalg.cholesky(estimator.covariances_), np.eye(gmm.n_features)
    estimator.precisions_cholesky_ = np.stack([solve_triangular(factor, identity, lower=True).T for factor in factors])
    estimator.precisions_ = estimator.precisions_cholesky_ @ estimator.precisions_cholesky_.swapaxes(1, 2)
    estimator.converged_, estimator.n_iter_, estimator.lower_bound_ = False, 0, -np.inf
    estimator.n_features_in_ = gmm.n_features
    return estimator


def from_ott(gmm_or_pair: Any) -> GaussianMixture | GaussianMixturePair:
    """OTT's GaussianMixture or GaussianMixturePair as ours, in the precision of its means; works under jit.

    A pair keeps epsilon and tau. Its `lock_gmm1` has no counterpart and is ignored: `fit_pair` has `freeze` for that.

    Raises:
      TypeError: another object, or an epsilon or tau that is no number.
      ValueError: epsilon or tau out of range, parameters that are not finite, stacked mixtures.
    """
    from ott.tools.gaussian_mixture import gaussian_mixture, gaussian_mixture_pair

    theirs = gaussian_mixture.GaussianMixture, gaussian_mixture_pair.GaussianMixturePair
    _expect("gmm_or_pair", gmm_or_pair, *theirs)
    if isinstance(gmm_or_pair, gaussian_mixture.GaussianMixture):
        return _mixture_from_ott("gmm_or_pair", gmm_or_pair)
    epsilon = checks.scalar("epsilon", gmm_or_pair.epsilon, above=0)  # None here is not OTT's None
    gmm0 = _mixture_from_ott("gmm_or_pair.gmm0", gmm_or_pair.gmm0)
    gmm1 = _mixture_from_ott("gmm_or_pair.gmm1", gmm_or_pair.gmm1)
    return GaussianMixturePair(gmm0, gmm1, epsilon, gmm_or_pair.tau)


def to_ott(gmm_or_pair: GaussianMixture | GaussianMixturePair) -> Any:
    """OTT's GaussianMixture or GaussianMixturePair. A mixture may be traced; a pair's epsilon and rho may not.

    OTT holds logarithms of weights and of Cholesky diagonals, and takes infinite ones for a failed fit. A component of
    weight zero keeps its place, and covariance I where its own is singular; the logarithm of its weight is finite, -175
    in float32 and -1417 in float64: the weight reads as zero, but shows where the others' densities are lower still.
    OTT's logits refer to the last component; where that is such a one, the other weights are right to 1e-5 in float32.

    Raises:
      TypeError: not a mixture or pair, or a pair whose epsilon or rho is traced.
      ValueError: a component of positive weight has a singular covariance; stacked mixtures or pairs.
    """
    from ott.tools.gaussian_mixture import gaussian_mixture_pair

    _expect("gmm_or_pair", gmm_or_pair, GaussianMixture, GaussianMixturePair)
    if isinstance(gmm_or_pair, GaussianMixture):
        return _mixture_to_ott("gmm_or_pair", gmm_or_pair)
    if not checks.known(gmm_or_pair.epsilon, gmm_or_pair.rho):  # OTT keeps both in the tree's structure
        raise ArgumentTypeError(
            "gmm_or_pair", "has a traced epsilon or rho, and OTT needs numbers", "convert outside of jit and vmap"
        )
    if gmm_or_pair.links is not None:
        raise ArgumentError("gmm_or_pair", "has links, and OTT's pair holds none", "convert its mixtures one by one")
    gmm0 = _mixture_to_ott("gmm_or_pair.gmm0", gmm_or_pair.gmm0)
    gmm1 = _mixture_to_ott("gmm_or_pair.gmm1", gmm_or_pair.gmm1)
    checks.instance("gmm_or_pair", gmm_or_pair, GaussianMixturePair, computes=False)
    epsilon, rho = float(gmm_or_pair.epsilon), float(gmm_or_pair.rho0)
    if rho != float(gmm_or_pair.rho1):
        raise ArgumentError(
            "gmm_or_pair",
            "has two prices rho, and OTT's pair holds one tau",
            "pass tau_a and tau_b to its solver",
        )
    return gaussian_mixture_pair.GaussianMixturePair(gmm0, gmm1, epsilon=epsilon, tau=1 / (1 + epsilon / rho))


def to_pot(
    gmm: GaussianMixture,
) -> tuple[Float[np.ndarray, "K d"], Float[np.ndarray, "K d d"], Float[np.ndarray, " K"]]:
    """Means, covariances and weights as `ot.gmm` takes them: NumPy copies in float64, in which the weights sum to 1.

    Raises:
      TypeError: not a mixture, or traced.
      ValueError: stacked mixtures.
    """
    _expect("gmm", gmm, GaussianMixture)
    if not checks.known(gmm):
        raise ArgumentTypeError("gmm", "is traced, and NumPy needs numbers", "convert outside of jit, vmap and grad")
    _check_single("gmm", gmm)
    means, covariances, weights = (np.array(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    means = means if gmm.remainders is None else means + np.asarray(gmm.remainders)
    return means, covariances, weights / weights.sum()  # to rounding in float32 is too far from 1 for the peers' checks


def _mixture_from_ott(name: str, gmm: Any) -> GaussianMixture:
    means = checks.array(f"{name}.loc", gmm.loc, "K", "d")
    return _from_moments(name, means, *_covariances_and_weights(gmm, means.dtype))


@program("dtype")
def _covariances_and_weights(gmm: Any, dtype: Any) -> tuple[Array, Array]:
    """Of a mixture of OTT's, which with float64 enabled derives them in it even from float32 parameters."""
    return matrices.gram(gmm.cholesky).astype(dtype), gmm.component_weights.astype(dtype)


def _mixture_to_ott(name: str, gmm: GaussianMixture) -> Any:
    from ott.tools.gaussian_mixture import gaussian_mixture, probabilities, scale_tril

    _check_single(name, gmm)
    gmm.check_densities(name)
    factors, logits = _factors_and_logits(gmm)
    scale = scale_tril.ScaleTriL.from_cholesky(factors)
    return gaussian_mixture.GaussianMixture(gmm.means, scale.params, probabilities.Probabilities(logits))


@program()
def _factors_and_logits(gmm: GaussianMixture) -> tuple[Array, Array]:
    """As OTT's mixtures have them: finite for absent components too, and relative to the last component."""
    present, factors = gmm.weights > 0, gmm.cholesky
    usable = present | jnp.all(jnp.diagonal(factors, axis1=-2, axis2=-1) > 0, axis=-1)
    factors = jnp.where(usable[:, None, None], factors, jnp.eye(gmm.n_features, dtype=gmm.dtype))
    logits = jnp.where(present, gmm.log_weights, 2 * math.log(jnp.finfo(gmm.dtype).tiny))
    return factors, logits[:-1] - logits[-1]


def _from_moments(name: str, means: Any, covariances: Any, weights: Any) -> GaussianMixture:
    try:
        return GaussianMixture.from_moments(means, covariances, weights)
    except ValueError as error:
        raise ArgumentError(name, f"its {error}") from error


def _check_single(name: str, gmm: GaussianMixture) -> None:
    checks.instance(name, gmm, GaussianMixture, computes=False)


def _expect(name: str, value: Any, *classes: type) -> None:
    """As `checks.instance`, and names the library: three of them have a GaussianMixture."""
    if not isinstance(value, classes):
        *expected, got = [f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in (*classes, type(value))]
        raise ArgumentTypeError(name, f"expected a {' or '.join(expected)}, got {got}")
