"""Clouds of 40,001 points against NumPy in float64.

jaxlib 0.10.2 returns wrong numbers on CPU for a vmapped matrix-vector product followed by a sum of squares, at n >= 16,385
(float64) or 32,769 (float32) (https://github.com/jax-ml/jax/issues/39103). What is computed here a point at a time has that shape.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_mixture

import coupled_gmm as cg

N, K, D = 40_001, 3, 3


@pytest.fixture
def problem(precision):
    """A mixture, a second one, points as rounded, and what is allowed to differ: some hundred roundings."""
    gmm, other = random_mixture(0, K, D, condition=10), random_mixture(1, K, D, condition=10)
    x = np.asarray(jnp.asarray(2 * np.random.RandomState(0).randn(N, D)))
    return gmm, other, x, 1e3 * precision


def moments(gmm):
    return [np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights)]


def component_log_prob(gmm, x):
    means, covariances, _ = moments(gmm)
    centred = np.asarray(x, np.float64)[:, None] - means
    square = np.einsum("nki,kij,nkj->nk", centred, np.linalg.inv(covariances), centred)
    return -0.5 * (square + np.linalg.slogdet(2 * np.pi * covariances)[1])


def posterior(gmm, x):
    joint = component_log_prob(gmm, x) + np.log(moments(gmm)[2])
    total = np.logaddexp.reduce(joint, axis=1)
    return joint - total[:, None], total


def close(got, expected, tolerance):
    """Everywhere, as a part of the largest: the fault of jaxlib is of the order of the values themselves."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_densities_and_posteriors(problem):
    gmm, other, x, tolerance = problem
    log_posterior, log_prob = posterior(gmm, x)
    close(gmm.component_log_prob(x), component_log_prob(gmm, x), tolerance)
    close(gmm.log_prob(x), log_prob, tolerance)
    close(gmm.log_posterior(x), log_posterior, tolerance)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), gmm, other)
    batched = jax.jit(jax.vmap(cg.GaussianMixture.log_prob, (0, None)))(both, x)
    close(batched, [log_prob, posterior(other, x)[1]], tolerance)
    one_by_one = jax.jit(jax.vmap(lambda point: gmm.log_prob(point[None])[0]))(jnp.asarray(x))
    close(one_by_one, log_prob, tolerance)


def test_predictions(problem):
    gmm, _, x, tolerance = problem
    log_posterior, log_prob = posterior(gmm, x)
    best, second = np.sort(log_posterior, axis=1)[:, [-1, -2]].T
    sure = best - second > tolerance
    np.testing.assert_array_equal(np.asarray(gmm.predict(x))[sure], log_posterior.argmax(1)[sure])
    np.testing.assert_allclose(gmm.score(x), log_prob.mean(), rtol=tolerance)
    expected = gmm.n_parameters * np.log(N) - 2 * log_prob.sum()  # some 3e6: to what a mean in float32 would lose
    np.testing.assert_allclose(gmm.bic(x), expected, rtol=1e-3 * tolerance)


def test_maps(problem):
    gmm, other, x, tolerance = problem
    plan = cg.solve_plan(cg.GaussianMixturePair(gmm, other, 0.5), method="exact")  # compiled more quickly
    share = np.exp(posterior(gmm, x)[0])
    rows = np.asarray(plan.matrix, np.float64)
    rows = rows / rows.sum(1, keepdims=True)
    (m0, s0, _), (m1, s1, _) = moments(gmm), moments(other)
    expected = np.zeros_like(x, np.float64)
    for k in range(K):
        for j in range(K):
            expected += (share[:, k] * rows[k, j])[:, None] * (m1[j] + (x - m0[k]) @ bures_map(s0[k], s1[j]))
    close(cg.map_points(plan, x), expected, 10 * tolerance)


def bures_map(s0, s1):
    """S0^-1/2 (S0^1/2 S1 S0^1/2)^1/2 S0^-1/2, by eigenvectors."""

    def power(s, exponent):
        values, vectors = np.linalg.eigh(s)
        return vectors * values**exponent @ vectors.T

    half, inverse = power(s0, 0.5), power(s0, -0.5)
    return inverse @ power(half @ s1 @ half, 0.5) @ inverse


def test_an_em_step(problem):
    gmm, _, x, tolerance = problem
    log_posterior, log_prob = posterior(gmm, x)
    share = np.exp(log_posterior)
    masses = share.mean(0)
    means = share.T @ x / (N * masses[:, None])
    centred = np.asarray(x, np.float64)[:, None] - means
    covariances = np.einsum("nk,nki,nkj->kij", share, centred, centred) / (N * masses[:, None, None])
    fit = cg.fit_gmm(x, gmm, max_steps=1, tol=0, ridge=0)
    np.testing.assert_allclose(fit.history.log_likelihood[0], log_prob.mean(), rtol=tolerance)
    for got, expected in zip((fit.gmm.means, fit.gmm.covariances, fit.gmm.weights), (means, covariances, masses)):
        close(got, expected, 3 * tolerance)


def test_an_e_step_in_one_chunk(problem):
    gmm, other, x, tolerance = problem
    pair = cg.GaussianMixturePair(gmm, other, 0.5)
    got = cg.penalized_log_likelihood(pair, x, x, transport_weight=0.0, ridge=0.0, chunk_size=N)
    expected = posterior(gmm, x)[1].mean() + posterior(other, x)[1].mean()
    np.testing.assert_allclose(got, expected, rtol=tolerance)
