"""Sufficient statistics and Q against direct sums over points and components in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_covariances

from coupled_gmm.core import chunks, matrices
from coupled_gmm.fits import statistics
from coupled_gmm.fits.statistics import Parameters

e_step = jax.jit(statistics.e_step)
expected_log_likelihood = jax.jit(statistics.expected_log_likelihood)
maximiser = jax.jit(statistics.maximiser)


def pack(clouds, weights, length):
    return chunks.pack(clouds, weights, length, jnp.result_type(float))


def log_normal(x, mean, covariance, floor):
    """Log-density (n,) lowered by tr(floor S^-1) / 2, the plain way."""
    inverse = np.linalg.inv(covariance)
    square = np.einsum("ni,ij,nj->n", x - mean, inverse, x - mean)
    penalty = np.trace(np.diag(floor) @ inverse)
    return -0.5 * (square + np.linalg.slogdet(2 * np.pi * covariance)[1] + penalty)


def direct(x, point_weights, means, covariances, weights, floor):
    """Responsibilities, masses, means, centred second moments and mean log-likelihood, float64."""
    w = np.full(len(x), 1 / len(x)) if point_weights is None else point_weights / point_weights.sum()
    with np.errstate(divide="ignore"):
        joint = np.stack([np.log(p) + log_normal(x, m, s, floor) for m, s, p in zip(means, covariances, weights)], 1)
    total = np.logaddexp.reduce(joint, axis=1)
    r = w[:, None] * np.exp(joint - total[:, None])
    masses = r.sum(0)
    safe = np.where(masses > 0, masses, 1)
    centres = (r.T @ x) / safe[:, None]
    centred = x[:, None] - centres
    scatters = np.einsum("nk,nki,nkj->kij", r, centred, centred) / safe[:, None, None]
    return r, masses, centres, scatters, w @ total


class Problem:
    """Two clouds of different length with their mixtures; float64 on the host, whatever JAX works in."""

    def __init__(self, seed, k, d, sizes=(60, 37), spread=2.0):
        rng = np.random.RandomState(seed)
        self.clouds = [spread * rng.randn(n, d) + i for i, n in enumerate(sizes)]
        self.clouds = [np.asarray(jnp.asarray(x), np.float64) for x in self.clouds]
        self.point_weights = [None, rng.rand(sizes[1])]
        self.point_weights[1][::5] = 0
        self.means = np.stack([x[:k] for x in self.clouds])
        self.covariances = np.stack([random_covariances(rng, k, d) for _ in sizes])
        self.weights = rng.dirichlet(np.full(k, 2.0), len(sizes))
        self.floors = 1e-2 * rng.rand(len(sizes), d)

    def chunks(self, length):
        return pack(self.clouds, self.point_weights, length)

    def parameters(self):
        with np.errstate(divide="ignore"):
            arrays = self.means, np.linalg.cholesky(self.covariances), np.log(self.weights)
        return Parameters(*map(jnp.asarray, arrays))

    def direct(self, i, floored=True):
        point_weights, floor = self.point_weights[i], self.floors[i] * floored
        return direct(self.clouds[i], point_weights, self.means[i], self.covariances[i], self.weights[i], floor)


@pytest.mark.parametrize(("k", "d"), [(1, 2), (3, 1), (4, 3)])
def test_e_step_equals_direct_sums(precision, k, d):
    problem = Problem(10 * k + d, k, d)
    # One chunk, several with padding, chunks longer than a cloud.
    lengths = (20,) if precision > 1e-8 else (97, 7)
    for length in lengths:
        found = e_step(problem.parameters(), problem.chunks(length), jnp.asarray(problem.floors))
        for i in range(2):
            _, masses, means, scatters, log_likelihood = problem.direct(i)
            tolerance = 2e4 * precision
            np.testing.assert_allclose(found.masses[i], masses, atol=tolerance)
            np.testing.assert_allclose(found.means[i], means, atol=tolerance)
            np.testing.assert_allclose(found.scatters[i], scatters, atol=tolerance)
            np.testing.assert_allclose(found.penalized[i], log_likelihood, rtol=tolerance)
            np.testing.assert_allclose(found.log_likelihood[i], problem.direct(i, floored=False)[-1], rtol=tolerance)


def test_zero_weights_change_nothing(x64):
    """Points of weight zero, components of weight zero, and a node without a cloud."""
    problem = Problem(0, 3, 2, sizes=(40, 31))
    problem.weights[0] = [0.3, 0.0, 0.7]
    base = e_step(problem.parameters(), problem.chunks(30), jnp.asarray(problem.floors))
    np.testing.assert_array_equal(base.masses[0, 1], 0)
    np.testing.assert_allclose(base.means[0, 1], problem.means[0, 1], atol=1e-12)
    said = base.masses, base.shift, base.scatter, base.penalized, base.log_likelihood
    assert all(np.isfinite(leaf).all() for leaf in said)

    rng = np.random.RandomState(1)
    for i in range(2):  # far points that weigh nothing
        n = len(problem.clouds[i])
        weights = np.ones(n) if problem.point_weights[i] is None else problem.point_weights[i]
        problem.clouds[i] = np.concatenate([problem.clouds[i], 1e3 * rng.randn(9, 2)])
        problem.point_weights[i] = np.concatenate([weights, np.zeros(9)])
    more = e_step(problem.parameters(), problem.chunks(30), jnp.asarray(problem.floors))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), more, base)

    alone = pack([None, problem.clouds[1]], [None, problem.point_weights[1]], 30)
    half = e_step(problem.parameters(), alone, jnp.asarray(problem.floors))
    np.testing.assert_array_equal(half.masses[0], 0)
    np.testing.assert_array_equal(half.log_likelihood[0], 0)
    np.testing.assert_allclose(half.scatters[1], base.scatters[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", [1e3, 1e4])
def test_clusters_far_apart_keep_their_covariances(distance):
    """Float32, unit clusters thousands of standard deviations apart; also where the present means are off."""
    rng = np.random.RandomState(0)
    factors = np.linalg.cholesky(random_covariances(rng, 3, 2, 10.0))
    centres = distance * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    n = 3000
    x = np.concatenate([centres[k] + rng.randn(n, 2) @ factors[k].T for k in range(3)]).astype(np.float32)
    packed = pack([x], [None], chunks.length([3 * n], 3 * 2))
    truth = np.stack([np.cov(x[k * n : (k + 1) * n].astype(np.float64).T, ddof=0) for k in range(3)])
    variances = np.diagonal(truth, axis1=1, axis2=2)
    scale = np.sqrt(variances[:, :, None] * variances[:, None])
    floors = jnp.zeros((1, 2), jnp.float32)
    for shift, steps in ((0.0, 1), (2.0, 1 if distance < 1e4 else 2)):
        # Rounding grows with the distance between clusters times how far a mean moves: at 1e4, the next step repairs it.
        fitted = Parameters(
            *(jnp.asarray(a, jnp.float32)[None] for a in (centres + shift, factors, np.log(np.full(3, 1 / 3))))
        )
        for _ in range(steps):
            found = matrices.precise(e_step)(fitted, packed, floors)  # as in a fit's program
            fitted, _ = matrices.precise(maximiser)(found, floors)
        np.testing.assert_allclose(found.masses[0], 1 / 3, rtol=1e-5)
        np.testing.assert_allclose(found.scatters[0] / scale, truth / scale, atol=1e-3)
        np.testing.assert_allclose(
            fitted.factors[0] @ fitted.factors[0].swapaxes(1, 2) / scale, truth / scale, atol=1e-3
        )


def perturbed(rng, parameters, size):
    """Other parameters nearby: any means, definite covariances, weights that sum to 1."""
    means, factors, log_weights = (np.asarray(a) for a in parameters)
    means = means + size * rng.randn(*means.shape)
    step = np.tril(size * rng.randn(*factors.shape), -1) + np.exp(size * rng.randn(*factors.shape)) * np.eye(
        means.shape[-1]
    )
    factors = factors @ step
    log_weights = log_weights + size * rng.randn(*log_weights.shape)
    log_weights = log_weights - np.logaddexp.reduce(log_weights, axis=-1, keepdims=True)
    return Parameters(jnp.asarray(means), jnp.asarray(factors), jnp.asarray(log_weights))


@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 2)])
def test_q_equals_the_direct_sum_and_peaks_at_the_maximiser(x64, k, d):
    rng = np.random.RandomState(k)
    problem = Problem(k, k, d)
    floors = jnp.asarray(problem.floors)
    found = e_step(problem.parameters(), problem.chunks(97), floors)

    def q(parameters, i):
        one = jax.tree.map(lambda a: a[i], (parameters, found))
        return float(expected_log_likelihood(*one, floors[i]))

    best, gains = maximiser(found, floors)
    for i in range(2):
        r, masses, means, scatters, log_likelihood = problem.direct(i)
        np.testing.assert_allclose(best.means[i], means, atol=1e-12)
        np.testing.assert_allclose(jnp.exp(best.log_weights[i]), masses, atol=1e-12)
        covariances = best.factors[i] @ best.factors[i].swapaxes(1, 2)
        np.testing.assert_allclose(covariances, scatters + np.diag(problem.floors[i]), atol=1e-12)
        for size in (0.0, 1e-3, 0.1, 1.0):
            other = perturbed(rng, best, size)
            covariances = np.asarray(other.factors[i] @ other.factors[i].swapaxes(1, 2))
            terms = [
                np.asarray(other.log_weights[i, j])
                + log_normal(problem.clouds[i], np.asarray(other.means[i, j]), covariances[j], problem.floors[i])
                for j in range(k)
            ]
            np.testing.assert_allclose(q(other, i), np.sum(r * np.stack(terms, 1)), rtol=1e-9)
            assert size == 0 or q(other, i) < q(best, i)
        np.testing.assert_allclose(gains[i], q(best, i) - q(problem.parameters(), i), rtol=1e-9)
        # EM's bound: likelihood rises by at least what Q does.
        problem.means[i], problem.weights[i] = best.means[i], jnp.exp(best.log_weights[i])
        problem.covariances[i] = np.asarray(best.factors[i] @ best.factors[i].swapaxes(1, 2))
        assert problem.direct(i)[-1] >= log_likelihood + q(best, i) - q(Problem(k, k, d).parameters(), i) - 1e-12


def test_empty_components_keep_their_parameters(x64):
    problem = Problem(3, 3, 2)
    problem.weights[0] = [0.5, 0.5, 0.0]
    problem.means[1, 0] = 1e6  # so far that no point belongs to it
    parameters, floors = problem.parameters(), jnp.asarray(problem.floors)
    found = e_step(parameters, problem.chunks(97), floors)
    best, _ = maximiser(found, floors)
    for i, j in ((0, 2), (1, 0)):
        assert found.masses[i, j] == 0 and np.isneginf(best.log_weights[i, j])
        np.testing.assert_array_equal(best.means[i, j], parameters.means[i, j])
        np.testing.assert_array_equal(best.factors[i, j], parameters.factors[i, j])
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], (best, found))
        value, gradient = jax.jit(jax.value_and_grad(statistics.expected_log_likelihood))(*one, floors[i])
        assert np.isfinite(value) and all(np.isfinite(np.asarray(g)).all() for g in gradient)


def test_coincident_points_are_held_by_the_floor():
    """A component on one point: its second moment is zero, and its covariance becomes the floor."""
    x = np.array([[0.0, 0.0]] * 5 + [[3.0, 1.0], [4.0, -1.0], [3.5, 0.5]])
    packed = pack([x], [None], 8)
    floors = jnp.asarray([[1e-4, 1e-5]])
    factors = np.stack([np.diag([1e-2, 10**-2.5]), np.eye(2)])
    parameters = Parameters(
        *(jnp.asarray(a)[None] for a in (np.array([[0.0, 0], [3.5, 0]]), factors, np.log([0.5, 0.5])))
    )
    found = e_step(parameters, packed, floors)
    best, _ = maximiser(found, floors)
    np.testing.assert_allclose(best.factors[0, 0], np.sqrt(np.diag([1e-4, 1e-5])), rtol=1e-4)
    np.testing.assert_allclose(found.masses[0, 0], 5 / 8, rtol=1e-6)


def test_gradient_of_the_likelihood_equals_finite_differences(x64):
    problem = Problem(5, 3, 2)
    problem.weights[0] = [0.4, 0.0, 0.6]
    parameters, packed, floors = problem.parameters(), problem.chunks(30), jnp.asarray(problem.floors)

    def value(p):
        return jnp.sum(statistics.likelihood(p, packed, floors))

    gradient = jax.jit(jax.grad(value))(parameters)
    assert all(np.isfinite(np.asarray(g)).all() for g in gradient)
    rng = np.random.RandomState(0)
    h = 1e-6
    for _ in range(3):
        step = Parameters(rng.randn(2, 3, 2), np.tril(rng.randn(2, 3, 2, 2)), rng.randn(2, 3))
        sides = []
        for sign in (1, -1):
            moved = Problem(5, 3, 2)
            moved.means = problem.means + sign * h * step.means
            factors = np.linalg.cholesky(problem.covariances) + sign * h * step.factors
            moved.covariances = factors @ factors.swapaxes(2, 3)
            moved.weights = problem.weights * np.exp(sign * h * step.log_weights)
            sides.append(moved.direct(0)[-1] + moved.direct(1)[-1])
        slope = sum(np.sum(np.asarray(g) * s) for g, s in zip(gradient, step))
        np.testing.assert_allclose(slope, (sides[0] - sides[1]) / (2 * h), rtol=1e-6)
    with pytest.raises(TypeError, match="once only"):
        jax.hessian(value)(parameters)


def test_many_chunks_lose_nothing_in_float32():
    """Thousands of chunks are added with compensation: the mean log-likelihood keeps its last digits."""
    x = np.random.RandomState(0).randn(30_000, 1).astype(np.float32)
    parameters = Parameters(jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1)))
    found = e_step(parameters, pack([x], [None], 10), jnp.zeros((1, 1)))
    expected = direct(x.astype(np.float64), None, np.zeros((1, 1)), np.ones((1, 1, 1)), np.ones(1), np.zeros(1))
    np.testing.assert_allclose(found.log_likelihood[0], expected[-1], rtol=5e-7)
    np.testing.assert_allclose(found.masses[0], 1, rtol=5e-7)
    np.testing.assert_allclose(found.scatters[0], expected[3], rtol=2e-6)
