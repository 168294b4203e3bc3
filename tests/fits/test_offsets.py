"""Clouds and mixtures far from 0, given in more digits than float32 holds: the same answers as about 0."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

import coupled_gmm as cg
from coupled_gmm.core.expansions import two_sum

# What coupling has cost is told in test_fidelity, and compiled there.
fit_pair = functools.partial(cg.fit_pair, fidelity=False)

JULIAN = 2_459_000.5  # days; the clusters lie 0.15 days apart, float32's spacing there is 0.25
OFFSET = np.array([JULIAN, -3e7])


def near():
    rng = np.random.RandomState(0)
    return np.concatenate([rng.randn(500, 2) * 0.02, [0.15, 0.1] + rng.randn(500, 2) * [0.02, 0.05]])


def means(gmm):
    assert gmm.remainders is not None
    return np.asarray(gmm.means, np.float64) + np.asarray(gmm.remainders)


def in_two_floats(gmm):
    """A mixture about 0 as one far away is kept, so that the same programs take it; the second floats are 0."""
    return dataclasses.replace(gmm, remainders=np.zeros_like(gmm.means))


@pytest.fixture(scope="module")
def fits():
    """The same cloud far away and about 0, from starts of the same key."""
    return [cg.fit_gmm(x, cg.init_gmm(jax.random.key(0), x, 2)) for x in (near() + OFFSET, near())]


def test_two_sum_is_a_sum_without_error():
    rng = np.random.RandomState(0)
    a, b = (10.0 ** rng.uniform(-6, 6, (2, 1000)) * rng.randn(2, 1000)).astype(np.float32)
    high, low = map(np.asarray, jax.jit(two_sum)(a, b))
    exact = a.astype(np.float64) + b
    np.testing.assert_array_equal(high, exact.astype(np.float32))
    np.testing.assert_allclose(high.astype(np.float64) + low, exact, rtol=1e-13)


def test_a_fit(fits):
    """Julian days: the covariances, likelihoods and means of scikit-learn, which fits in float64."""
    far, close = fits
    twin = GaussianMixture(2, random_state=0, reg_covar=1e-10).fit(near())
    order, ours = np.argsort(twin.means_[:, 0]), np.argsort(means(far.gmm)[:, 0])
    assert far.converged
    np.testing.assert_allclose(far.gmm.covariances[ours], twin.covariances_[order], atol=2e-5)
    np.testing.assert_allclose(means(far.gmm)[ours] - OFFSET, twin.means_[order], atol=2e-4)
    np.testing.assert_allclose(far.log_likelihood, twin.score(near()), atol=1e-3)
    np.testing.assert_allclose(far.log_likelihood, close.log_likelihood, atol=1e-5)
    assert close.gmm.remainders is None


def test_densities(fits):
    far, close = fits
    x = near()[::7]
    np.testing.assert_allclose(far.gmm.log_prob(x + OFFSET), close.gmm.log_prob(x), atol=2e-3)
    np.testing.assert_allclose(far.gmm.log_posterior(x + OFFSET)[:, 0], close.gmm.log_posterior(x)[:, 0], atol=2e-3)
    np.testing.assert_allclose(far.gmm.covariance(), np.cov(near().T, bias=True), atol=1e-4)
    np.testing.assert_allclose(
        far.gmm.marginal([1]).log_prob(x[:, 1:] + OFFSET[1]), close.gmm.marginal([1]).log_prob(x[:, 1:]), atol=2e-3
    )
    given, expected = far.gmm.condition([0], [JULIAN + 0.07]), close.gmm.condition([0], [0.07])
    np.testing.assert_allclose(given.weights, expected.weights, atol=1e-3)
    np.testing.assert_allclose(means(given) - OFFSET[1], expected.means, atol=1e-4)


def test_mixtures_of_other_libraries(fits):
    """scikit-learn's mixture of the far cloud keeps its means, there and back."""
    twin = GaussianMixture(2, random_state=0, reg_covar=1e-10).fit(near())
    expected = twin.means_.copy()
    twin.means_ = twin.means_ + OFFSET
    gmm = cg.from_sklearn(twin)
    np.testing.assert_allclose(means(gmm) - OFFSET, expected, atol=1e-7)
    np.testing.assert_allclose(cg.to_sklearn(gmm).means_ - OFFSET, expected, atol=1e-7)


def test_transport(fits):
    """Plans, distances, maps, geodesics, barycenters, flows and reductions between mixtures that lie far from 0 together."""
    far, close = fits[0].gmm, in_two_floats(fits[1].gmm)
    shifted = dataclasses.replace(close, means=close.means + 0.03)
    away = cg.GaussianMixture.from_moments(
        np.asarray(shifted.means, np.float64) + OFFSET, close.covariances, close.weights
    )
    pairs = cg.GaussianMixturePair(far, away), cg.GaussianMixturePair(close, shifted)
    np.testing.assert_allclose(pairs[0].epsilon, pairs[1].epsilon, rtol=1e-3)
    np.testing.assert_allclose(cg.mw2_squared(far, away), 2 * 0.03**2, rtol=1e-3)
    plans = [cg.solve_plan(pair, method="exact") for pair in pairs]
    x = near()[::50]
    np.testing.assert_allclose(cg.map_points(plans[0], x + OFFSET), cg.map_points(plans[1], x) + OFFSET, atol=4)
    middle, expected = (cg.interpolate(plan, 0.5) for plan in plans)
    np.testing.assert_allclose(means(middle) - OFFSET, means(expected), atol=1e-5)
    ends = [cg.barycenter(gmms, gmms[0]) for gmms in ([far, away], [close, shifted])]
    np.testing.assert_allclose(ends[0].objective, ends[1].objective, rtol=1e-3)
    np.testing.assert_allclose(means(ends[0].gmm) - OFFSET, means(ends[1].gmm), atol=1e-5)
    flows = [cg.flow(*gmms, steps=3) for gmms in ((far, away), (close, shifted))]
    np.testing.assert_allclose(flows[0].history.loss, flows[1].history.loss, rtol=1e-3)
    np.testing.assert_allclose(means(flows[0].path) - OFFSET, means(flows[1].path), atol=1e-5)
    few = [cg.reduce_gmm(jax.random.key(0), gmm, 1, n_init=2) for gmm in (far, close)]
    np.testing.assert_allclose(few[0].objective, few[1].objective, rtol=1e-3)


def test_a_pair(fits):
    """Coupled fits, J and its plan are those about 0."""
    far, close = fits[0].gmm, in_two_floats(fits[1].gmm)
    x0, x1 = near()[::2], near()[1::2] + 0.01
    options = {"transport_weight": 1.0, "em_steps": 5}
    fit, expected = (
        fit_pair(a, b, cg.GaussianMixturePair(gmm, gmm, epsilon=1e-4), **options)
        for a, b, gmm in ((x0 + OFFSET, x1 + OFFSET, far), (x0, x1, close))
    )
    np.testing.assert_allclose(fit.penalized_log_likelihood, expected.penalized_log_likelihood, atol=1e-4)
    np.testing.assert_allclose(means(fit.pair.gmm1) - OFFSET, means(expected.pair.gmm1), atol=1e-4)
    np.testing.assert_allclose(fit.plan.matrix, expected.plan.matrix, atol=1e-3)
    value = cg.penalized_log_likelihood(fit.pair, x0 + OFFSET, x1 + OFFSET, transport_weight=1.0)
    np.testing.assert_allclose(value, fit.penalized_log_likelihood, atol=1e-4)
