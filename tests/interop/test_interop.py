"""Conversions, each against the other library's own densities, and what they refuse."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from ott.tools.gaussian_mixture import gaussian_mixture as ott_mixture
from ott.tools.gaussian_mixture import gaussian_mixture_pair as ott_pair
from ott.tools.gaussian_mixture import probabilities, scale_tril
from problems import random_mixture
from sklearn import mixture as sk

import coupled_gmm as cg

SIZES = [(3, 2), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((1, 2), (4, 1)))]  # components, features


def points(d: int, n: int = 50) -> np.ndarray:  # floats: of integers scikit-learn 1.9.1 returns other scores
    return 2 * np.random.RandomState(7).randn(n, d)


def fitted(covariance_type: str, d: int = 2, k: int = 3, bayesian: bool = False):
    cls = sk.BayesianGaussianMixture if bayesian else sk.GaussianMixture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # five steps don't converge, and need not
        return cls(n_components=k, covariance_type=covariance_type, max_iter=5, random_state=0).fit(points(d, 200))


def with_absent(singular: bool, place: int):
    """Two components and a third, of weight zero, at a place; and the two alone."""
    gmm = random_mixture(1, 2, 2, condition=4.0)
    absent = np.ones((2, 2)) if singular else 3 * np.eye(2)
    moments = zip((gmm.means, gmm.covariances, gmm.weights), ([5.0, 5.0], absent, 0.0))
    return cg.GaussianMixture.from_moments(*(np.insert(np.asarray(a), place, b, axis=0) for a, b in moments)), gmm


@functools.partial(jax.jit, static_argnums=(0, 1))  # operation by operation OTT compiles for seconds
def ott_random(k: int, d: int, seed: int = 0) -> ott_mixture.GaussianMixture:
    rng = jax.random.key(seed)
    return ott_mixture.GaussianMixture.from_random(rng, k, d, stdev_mean=2.0, stdev_cov=1.0, stdev_weights=1.0)


@jax.jit
def ott_densities(gmm: ott_mixture.GaussianMixture, x):
    """Logarithms of the density at points, and of what each component has of it."""
    return gmm.log_prob(x), gmm.get_log_component_posterior(x)


def assert_close(left, right, **tolerances):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, **tolerances)
        assert one.dtype == other.dtype


# scikit-learn


@pytest.mark.parametrize(("k", "d"), SIZES)
@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_from_sklearn_scores_as_the_estimator(covariance_type, k, d, x64):
    estimator, x = fitted(covariance_type, d, k), points(d)
    gmm = cg.from_sklearn(estimator)
    assert gmm.dtype == jnp.float64 and gmm.covariances.shape == (k, d, d)
    np.testing.assert_allclose(gmm.log_prob(x), estimator.score_samples(x), rtol=1e-11)
    np.testing.assert_allclose(np.exp(gmm.log_posterior(x)), estimator.predict_proba(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_from_sklearn_takes_the_bayesian_point_estimates(covariance_type, x64):
    estimator = fitted(covariance_type, bayesian=True)
    gmm, plain = cg.from_sklearn(estimator), sk.GaussianMixture(3, covariance_type=covariance_type)
    names = ("weights_", "means_", "covariances_", "precisions_cholesky_", "n_features_in_")
    vars(plain).update({name: getattr(estimator, name) for name in names})
    np.testing.assert_allclose(gmm.weights, estimator.weights_, rtol=1e-14)
    np.testing.assert_allclose(gmm.log_prob(points(2)), plain.score_samples(points(2)), rtol=1e-10)


def test_from_sklearn_follows_the_precision():
    assert cg.from_sklearn(fitted("full")).dtype == jnp.float32
    x = points(2, 200).astype(np.float32)
    assert cg.from_sklearn(sk.GaussianMixture(2, random_state=0).fit(x)).dtype == jnp.float32


@pytest.mark.parametrize(("k", "d"), SIZES)
def test_to_sklearn_scores_predicts_and_samples(k, d, x64):
    gmm, x = random_mixture(0, k, d), points(d)
    estimator = cg.to_sklearn(gmm)
    np.testing.assert_allclose(estimator.score_samples(x), gmm.log_prob(x), rtol=1e-11)
    np.testing.assert_allclose(estimator.predict_proba(x), np.exp(gmm.log_posterior(x)), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(estimator.predict(x), np.argmax(gmm.log_posterior(x), axis=1))
    products = estimator.precisions_ @ estimator.covariances_
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(d), (k, d, d)), atol=1e-11)
    drawn, labels = estimator.set_params(random_state=0).sample(20000)
    np.testing.assert_allclose(drawn.mean(0), gmm.mean(), atol=0.1)
    np.testing.assert_allclose(np.cov(drawn.T).reshape(d, d), gmm.covariance(), rtol=0.1, atol=0.1)
    assert set(labels) == set(range(k))
    assert_close(cg.from_sklearn(estimator), gmm, rtol=1e-14)


def test_to_sklearn_has_what_a_fitted_estimator_has():
    gmm = random_mixture(0, 3, 2)
    estimator = cg.to_sklearn(gmm)
    assert {name for name in vars(fitted("full")) if name.endswith("_")} - set(vars(estimator)) <= {"lower_bounds_"}
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_"):
        assert getattr(estimator, name).dtype == np.float64
    assert (estimator.n_features_in_, estimator.n_iter_, estimator.converged_) == (2, 0, False)
    np.testing.assert_allclose(estimator.score_samples(points(2)), gmm.log_prob(points(2)), rtol=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_to_sklearn_samples_mixtures_of_float32(seed):
    """Weights of float32 sum to more than 1 in float64 every other time, and NumPy's multinomial refuses those."""
    weights = np.random.RandomState(seed).dirichlet(np.ones(20)).astype(np.float32)
    weights[-1] = 0
    weights /= weights.sum()
    gmm = cg.GaussianMixture.from_moments(np.zeros((20, 1)), np.ones((20, 1, 1)), weights)
    estimator = cg.to_sklearn(gmm)
    assert abs(estimator.weights_.sum() - 1) < 1e-15
    assert estimator.sample(10)[0].shape == (10, 1)


def test_to_sklearn_is_a_warm_start(x64):
    """Started from the fit's own end, another EM step moves nothing; a cold start would be elsewhere."""
    x = points(2, 300)
    end = sk.GaussianMixture(3, tol=1e-12, max_iter=2000, reg_covar=0, random_state=0).fit(x)
    again = cg.to_sklearn(cg.from_sklearn(end)).set_params(warm_start=True, max_iter=2, reg_covar=0).fit(x)
    np.testing.assert_allclose(again.means_, end.means_, atol=1e-4)
    assert again.lower_bound_ == pytest.approx(end.lower_bound_, abs=1e-9)


@pytest.mark.parametrize("singular", [False, True])
def test_to_sklearn_drops_absent_components(singular, x64):
    gmm, without = with_absent(singular, 1)
    estimator = cg.to_sklearn(gmm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(estimator.score_samples(points(2)), gmm.log_prob(points(2)), rtol=1e-11)
        estimator.sample(10)
    assert estimator.n_components == 2
    assert_close(cg.from_sklearn(estimator), without, rtol=1e-14)


# OTT


@pytest.mark.parametrize(("k", "d"), SIZES)
def test_from_ott_has_its_density(k, d, x64):
    theirs, x = ott_random(k, d), points(d)
    ours = cg.from_ott(theirs)
    log_prob, log_posterior = ott_densities(theirs, x)
    np.testing.assert_allclose(ours.log_prob(x), log_prob, rtol=1e-10)
    np.testing.assert_allclose(ours.log_posterior(x), log_posterior, rtol=1e-9, atol=1e-9)
    assert_close(cg.to_ott(ours), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("k", "d"), SIZES)
def test_to_ott_has_our_density(k, d, x64):
    gmm, x = random_mixture(0, k, d), points(d)
    theirs = cg.to_ott(gmm)
    np.testing.assert_allclose(ott_densities(theirs, x)[0], gmm.log_prob(x), rtol=1e-10)
    assert theirs.sample(jax.random.key(0), 5).shape == (5, d)
    assert_close(cg.from_ott(theirs), gmm, rtol=1e-12, atol=1e-13)


def test_from_ott_keeps_float32_and_takes_numpy(x64):
    with jax.enable_x64(False):
        theirs = ott_random(3, 2)
    assert cg.from_ott(theirs).dtype == jnp.float32
    assert cg.to_ott(cg.from_ott(theirs)).dtype == jnp.float32
    of_numpy = jax.tree.map(np.asarray, theirs)
    assert_close(cg.from_ott(of_numpy), cg.from_ott(theirs), rtol=1e-6)


@pytest.mark.parametrize("place", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("singular", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_to_ott_keeps_absent_components(singular, place, precision):
    gmm, without = with_absent(singular, place)
    theirs, x = cg.to_ott(gmm), points(2)
    rounding = 1000 * precision
    assert theirs.n_components == 3 and not theirs.has_nans()
    np.testing.assert_allclose(ott_densities(theirs, x)[0], without.log_prob(x), rtol=rounding, atol=rounding)
    back = cg.from_ott(theirs)
    assert back.weights[place] == 0
    np.testing.assert_allclose(back.weights, gmm.weights, rtol=rounding)
    if not singular:
        assert_close(back, gmm, rtol=rounding, atol=rounding)
    slopes = jax.jit(jax.grad(lambda theirs: jnp.sum(theirs.log_prob(x))))(theirs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.slow
def test_mixtures_convert_under_transformations():
    gmm, x = random_mixture(0, 3, 2), points(2)
    np.testing.assert_allclose(jax.jit(lambda g: cg.to_ott(g).log_prob(x))(gmm), gmm.log_prob(x), rtol=1e-4)
    assert_close(jax.jit(lambda g: cg.from_ott(cg.to_ott(g)))(gmm), gmm, rtol=1e-4, atol=1e-5)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), gmm)
    assert jax.vmap(cg.to_ott)(stack).loc.shape == (2, 3, 2)
    theirs = jax.grad(lambda g: jnp.mean(cg.to_ott(g).log_prob(x)))(gmm)
    ours = jax.grad(lambda g: jnp.mean(g.log_prob(x)))(gmm)
    np.testing.assert_allclose(theirs.means, ours.means, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("tau", "lock_gmm1"), [pytest.param(1.0, False, marks=pytest.mark.slow), (0.9, False), (0.01, True)]
)
def test_pairs_of_ott(tau, lock_gmm1, x64):
    theirs = ott_pair.GaussianMixturePair(ott_random(3, 2), ott_random(2, 2, 1), 0.3, tau, lock_gmm1)
    ours = cg.from_ott(theirs)
    assert ours.balanced is (tau == 1)
    np.testing.assert_allclose([ours.epsilon, ours.tau], [0.3, tau], rtol=1e-14)
    np.testing.assert_allclose(ours.rho, np.inf if tau == 1 else theirs.rho, rtol=1e-13)
    np.testing.assert_allclose(
        ours.cost_matrix(), jax.jit(lambda pair: pair.get_cost_matrix())(theirs), rtol=1e-4
    )  # theirs iterates to 1e-6
    back = cg.to_ott(ours)
    assert type(back.epsilon) is type(back.tau) is float and (back.tau == 1) == (tau == 1)
    np.testing.assert_allclose([back.epsilon, back.tau], [0.3, tau], rtol=1e-14)
    assert_close([back.gmm0, back.gmm1], [theirs.gmm0, theirs.gmm1], rtol=1e-12, atol=1e-12)
    jax.jit(lambda pair: pair.gmm0.loc)(back)  # OTT's epsilon and tau are static: they must be hashable


def test_plans_of_padded_pairs_agree_with_ott(x64):
    """OTT's Sinkhorn takes the absent component of a converted pair as an empty row."""
    gmm, _ = with_absent(True, 2)
    pair = cg.GaussianMixturePair(gmm, random_mixture(3, 3, 2), 0.5)
    theirs = cg.to_ott(pair)
    out = theirs.get_sinkhorn(pair.cost_matrix(), threshold=1e-9, max_iterations=20000)
    np.testing.assert_allclose(out.matrix, cg.solve_plan(pair, tol=1e-9).matrix, atol=1e-8)


# POT


@pytest.mark.parametrize(("k", "d"), SIZES)
def test_to_pot_has_our_density(k, d, x64):
    gmm, x = random_mixture(0, k, d), points(d)
    moments = cg.to_pot(gmm)
    np.testing.assert_allclose(ot.gmm.gmm_pdf(x, *moments), np.exp(gmm.log_prob(x)), rtol=1e-9)
    assert_close(cg.GaussianMixture.from_moments(*moments), gmm, rtol=1e-15)


def test_to_pot_transports():
    """In float64 also from float32: POT refuses weights whose sums differ by more than 1e-7."""
    for seed in range(5):
        gmm0, gmm1 = random_mixture(seed, 20, 2), random_mixture(seed + 100, 15, 2)
        (m0, s0, w0), (m1, s1, w1) = cg.to_pot(gmm0), cg.to_pot(gmm1)
        assert m0.dtype == s0.dtype == w0.dtype == np.float64
        cost = ot.gmm.dist_bures_squared(m0, m1, s0, s1)
        np.testing.assert_allclose(cost, cg.bures_cost_matrix(gmm0, gmm1), rtol=1e-4, atol=1e-4)
        assert ot.gmm.gmm_ot_loss(m0, m1, s0, s1, w0, w1) > 0


def test_to_pot_copies(x64):
    gmm, _ = with_absent(True, 0)
    before = jax.tree.map(np.array, gmm)
    for array, leaf in zip(cg.to_pot(gmm), (gmm.means, gmm.covariances, gmm.weights)):
        np.testing.assert_array_equal(array, leaf)
        array[:] = -1
    assert_close(gmm, before)


# Refusals


def flat(covariance) -> cg.GaussianMixture:
    return cg.GaussianMixture.from_moments(np.zeros((2, 2)), [np.eye(2), covariance], [0.5, 0.5])


def singular() -> cg.GaussianMixture:
    return flat(np.ones((2, 2)))


def stacked() -> cg.GaussianMixture:
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), random_mixture(0, 2, 2))


def pair(epsilon=1.0, tau=1.0, gmm1=None) -> cg.GaussianMixturePair:
    gmm = random_mixture(0, 2, 2)
    return cg.GaussianMixturePair(gmm, gmm if gmm1 is None else gmm1, epsilon, tau)


def theirs(epsilon=1.0, tau=1.0) -> ott_pair.GaussianMixturePair:
    return ott_pair.GaussianMixturePair(ott_random(2, 2), ott_random(2, 2), epsilon, tau)


def ott_with(loc) -> ott_mixture.GaussianMixture:
    scale = scale_tril.ScaleTriL.from_cholesky(jnp.stack([jnp.eye(2)] * 2))
    return ott_mixture.GaussianMixture(jnp.asarray(loc), scale.params, probabilities.Probabilities(jnp.zeros(1)))


def broken_estimator():
    estimator = fitted("full")
    estimator.weights_ = estimator.weights_ / 2
    return estimator


REFUSED = {
    "from-sklearn-ours": (
        lambda: cg.from_sklearn(singular()),
        TypeError,
        "^estimator: expected a sklearn.GaussianMixture or sklearn.Bayes.*, got coupled_gmm.GaussianMixture$",
    ),
    "from-sklearn-class": (lambda: cg.from_sklearn(sk.GaussianMixture), TypeError, "^estimator: expected a sklearn"),
    "from-sklearn-unfitted": (
        lambda: cg.from_sklearn(sk.GaussianMixture()),
        ValueError,
        "^estimator: not fitted; call fit first$",
    ),
    "from-sklearn-weights": (
        lambda: cg.from_sklearn(broken_estimator()),
        ValueError,
        "^estimator: its weights: must sum to 1 .*0.5; divide by the sum",
    ),
    "to-sklearn-kind": (
        lambda: cg.to_sklearn(sk.GaussianMixture()),
        TypeError,
        "^gmm: expected a coupled_gmm.GaussianMixture, got sklearn.GaussianMixture$",
    ),
    "to-sklearn-pair": (lambda: cg.to_sklearn(pair()), TypeError, "^gmm: .*, got coupled_gmm.GaussianMixturePair$"),
    "to-sklearn-singular": (
        lambda: cg.to_sklearn(singular()),
        ValueError,
        "^gmm: component 1 has a singular covariance and no density; add a small",
    ),
    "to-sklearn-stack": (lambda: cg.to_sklearn(stacked()), ValueError, r"^gmm: .*stacked in shape \(2,\); take one of"),
    "to-sklearn-jit": (lambda: jax.jit(cg.to_sklearn)(singular()), TypeError, "^gmm: is traced.*outside of jit"),
    "to-pot-kind": (lambda: cg.to_pot(np.eye(2)), TypeError, "^gmm: expected a coupled_gmm.*, got numpy.ndarray$"),
    "to-pot-jit": (lambda: jax.jit(cg.to_pot)(singular()), TypeError, "^gmm: is traced.*outside of jit"),
    "to-pot-vmap": (lambda: jax.vmap(cg.to_pot)(stacked()), TypeError, "^gmm: is traced.*outside of jit, vmap"),
    "to-pot-stack": (lambda: cg.to_pot(stacked()), ValueError, r"^gmm: .*stacked in shape \(2,\); take one of"),
    "from-ott-kind": (
        lambda: cg.from_ott(singular()),
        TypeError,
        "^gmm_or_pair: expected a ott.GaussianMixture or ott.GaussianMixturePair, got coupled_gmm.GaussianMixture$",
    ),
    "from-ott-nan": (
        lambda: cg.from_ott(ott_with([[0.0, 0.0], [np.nan, 0.0]])),
        ValueError,
        "^gmm_or_pair: its means: 1 of 4 values are NaN or infinite; remove or replace",
    ),
    "from-ott-stack": (
        lambda: cg.from_ott(jax.vmap(cg.to_ott)(stacked())),
        ValueError,
        r"^gmm_or_pair.loc: expected shape \(K, d\), got \(2, 2, 2\)",
    ),
    "from-ott-epsilon": (lambda: cg.from_ott(theirs(None)), TypeError, "^epsilon: expected a real number, got None"),
    "from-ott-epsilon-zero": (lambda: cg.from_ott(theirs(0.0)), ValueError, "^epsilon: must be .* above 0, got 0.0"),
    "from-ott-tau": (lambda: cg.from_ott(theirs(tau=2)), ValueError, "^tau: must be above 0 and at most 1, got 2"),
    "to-ott-kind": (
        lambda: cg.to_ott(theirs()),
        TypeError,
        "^gmm_or_pair: expected a coupled_gmm.GaussianMixture or coupled_gmm.*Pair, got ott.GaussianMixturePair$",
    ),
    "to-ott-singular": (lambda: cg.to_ott(singular()), ValueError, "^gmm_or_pair: component 1 has a singular"),
    "to-ott-pair-singular": (
        lambda: cg.to_ott(pair(gmm1=singular())),
        ValueError,
        "^gmm_or_pair.gmm1: component 1 has a singular covariance and no density; add",
    ),
    "to-ott-stack": (
        lambda: cg.to_ott(stacked()),
        ValueError,
        "^gmm_or_pair: holds several, stacked in shape .*; take one of",
    ),
    "to-ott-jit": (
        lambda: jax.jit(cg.to_ott)(pair()),
        TypeError,
        "^gmm_or_pair: has a traced epsilon or rho.*outside of jit",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*case, id=name) for name, case in REFUSED.items()])
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
