"""What tests hold the package against, in NumPy and SciPy in float64, sharing no code with it."""

import numpy as np
import scipy.special
import scipy.stats
from scipy.optimize import linprog


def log_sum_exp(x, axis):
    peak = np.max(x, axis=axis, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0)
    with np.errstate(divide="ignore"):
        return np.squeeze(peak, axis) + np.log(np.exp(x - peak).sum(axis))


def sinkhorn(cost, a, b, epsilon, rho, tol=1e-12, limit=100_000):
    """The plan by plain log-domain iterations."""
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)
    tau = 1.0 if np.isinf(rho) else rho / (rho + epsilon)
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(limit):
        before = g
        f = -epsilon * tau * log_sum_exp(log_b + (g - cost) / epsilon, axis=1)
        g = -epsilon * tau * log_sum_exp(log_a[:, None] + (f[:, None] - cost) / epsilon, axis=0)
        if np.abs(g - before).max() <= tol * epsilon:
            return np.exp(log_a[:, None] + log_b + (f[:, None] + g - cost) / epsilon)
    raise AssertionError("the twin did not converge")


def linear_programme(cost, a, b):
    """Exact balanced transport cost."""
    k0, k1 = cost.shape
    rows, columns = np.kron(np.eye(k0), np.ones(k1)), np.kron(np.ones(k0), np.eye(k1))
    found = linprog(cost.ravel(), A_eq=np.r_[rows, columns[:-1]], b_eq=np.r_[a, b[:-1]], method="highs")
    assert found.status == 0
    return found.fun


def kl(p, q):
    positive = p > 0
    return np.sum(p[positive] * np.log(p[positive] / q[positive])) - p.sum() + q.sum()


def primal(matrix, cost, a, b, epsilon, rho):
    value = np.sum(matrix * cost) + epsilon * kl(matrix, a[:, None] * b)
    return value if np.isinf(rho) else value + rho * (kl(matrix.sum(1), a) + kl(matrix.sum(0), b))


def root(s):
    """Symmetric square roots (..., d, d), with no part of what is rounding of a zero eigenvalue."""
    values, frame = np.linalg.eigh(s)
    values = np.where(values > 1e-14 * values[..., -1:], values, 0)
    return (frame * np.sqrt(values)[..., None, :]) @ np.swapaxes(frame, -1, -2)


def bures_costs(means0, covariances0, means1, covariances1):
    """Squared Bures-Wasserstein distances by singular values."""
    nuclear = np.linalg.svd(root(covariances0)[:, None] @ root(covariances1), compute_uv=False).sum(-1)
    traces = [np.trace(s, axis1=1, axis2=2) for s in (covariances0, covariances1)]
    return ((means0[:, None] - means1) ** 2).sum(-1) + traces[0][:, None] + traces[1] - 2 * nuclear


def gaussian_map(x, mean0, covariance0, mean1, covariance1):
    """m1 + S0^-1/2 (S0^1/2 S1 S0^1/2)^1/2 S0^-1/2 (x - m0), the inner root by singular values."""
    root0 = root(covariance0)
    frame, values, _ = np.linalg.svd(root0 @ root(covariance1))
    inverse = np.linalg.inv(root0)
    return mean1 + (x - mean0) @ (inverse @ (frame * values) @ frame.T @ inverse)


def component_densities(x, means, covariances, weights):
    """(n, K), zero where a component has no mass."""
    density = np.zeros((len(x), len(weights)))
    for k in np.flatnonzero(weights):
        density[:, k] = scipy.stats.multivariate_normal(means[k], covariances[k]).pdf(x)
    return density


def posterior(x, means, covariances, weights):
    log_joint = np.full((len(x), len(weights)), -np.inf)
    for k in np.flatnonzero(weights):
        log_joint[:, k] = np.log(weights[k]) + scipy.stats.multivariate_normal(means[k], covariances[k]).logpdf(x)
    return scipy.special.softmax(log_joint, axis=1)
