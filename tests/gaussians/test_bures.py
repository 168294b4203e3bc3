"""Bures-Wasserstein costs against closed forms in NumPy float64 and against POT; gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from problems import random_covariances, random_mixture
from scipy.linalg import polar as scipy_polar

import coupled_gmm as cg
from coupled_gmm.core import matrices
from coupled_gmm.gaussians import bures


def root(s: np.ndarray) -> np.ndarray:
    """Symmetric square root, float64."""
    values, frame = np.linalg.eigh(np.asarray(s, np.float64))
    return (frame * np.sqrt(np.maximum(values, 0))) @ frame.T


def closed_form(s0: np.ndarray, s1: np.ndarray, root1: np.ndarray | None = None) -> float:
    """Squared Bures distance; the trace of (S0^1/2 S1 S0^1/2)^1/2 as singular values of S0^1/2 R1, where R1 R1^T = S1."""
    product = root(s0) @ (root(s1) if root1 is None else root1)
    return np.trace(s0) + np.trace(s1) - 2 * np.linalg.svd(product, compute_uv=False).sum()


def mixture_of(covariances: np.ndarray, means: np.ndarray | None = None) -> cg.GaussianMixture:
    k, d = covariances.shape[:2]
    return cg.GaussianMixture.from_moments(np.zeros((k, d)) if means is None else means, covariances, np.full(k, 1 / k))


cost_matrix = jax.jit(cg.bures_cost_matrix)


@pytest.mark.parametrize("d", [1, 2, 3, 16, pytest.param(64, marks=pytest.mark.slow)])
def test_cost_equals_the_closed_form(precision, d):
    """Self-distance at most 1e-5 of the trace, relative error at most 1e-4, up to condition number 1e4 (1e8 in float64)."""
    rng = np.random.RandomState(d)
    n = 3
    conditions = (1.0, 1e2, 1e4) if precision > 1e-8 else (1e2, 1e8)
    covariances = np.concatenate(
        [random_covariances(rng, n, d, c) * scale for c in conditions for scale in (1.0, 1e-2)]
    )
    covariances[0] *= 0.7  # at condition number 1 all would be equal
    covariances = np.asarray(jnp.asarray(covariances), np.float64)  # as rounded
    gmm = mixture_of(covariances)
    cost = np.asarray(cost_matrix(gmm, gmm))
    traces = np.trace(covariances, axis1=1, axis2=2)
    assert (np.diag(cost) <= 1e-5 * traces).all()
    assert (np.diag(cost) <= 500 * precision * traces).all()
    roots = [root(s) for s in covariances]
    nuclear = np.linalg.svd(np.array([[r0 @ r1 for r1 in roots] for r0 in roots]), compute_uv=False).sum(-1)
    expected = traces[:, None] + traces - 2 * nuclear
    different = expected > 1e-6 * (traces[:, None] + traces)
    assert different.sum() >= n
    np.testing.assert_allclose(cost[different], expected[different], rtol=min(1e-4, 1e6 * precision))
    assert (cost[~different] <= 1e-5 * traces.max()).all()


def test_cost_equals_pot(x64):
    gmm0, gmm1 = random_mixture(0, 3, 3), random_mixture(1, 4, 3)  # the shapes below, for one compilation
    arrays = (np.asarray(a) for a in (gmm0.means, gmm1.means, gmm0.covariances, gmm1.covariances))
    expected = ot.gmm.dist_bures_squared(*arrays)
    np.testing.assert_allclose(cost_matrix(gmm0, gmm1), expected, rtol=1e-10)


@pytest.mark.parametrize("d", [1, 3])
def test_ott_sees_the_same_costs(x64, d):
    pair = cg.GaussianMixturePair(random_mixture(2, 3, d), random_mixture(3, 4, d), epsilon=0.1)
    expected = cost_matrix(pair.gmm0, pair.gmm1)
    np.testing.assert_allclose(jax.jit(lambda p: p.geometry().cost_matrix)(pair), expected, rtol=1e-9)
    cost = cg.BuresCost(d)
    x, y = (np.asarray(jax.jit(bures.pack)(gmm)) for gmm in (pair.gmm0, pair.gmm1))
    if d == 1:
        np.testing.assert_allclose(jax.jit(cost)(x[1], y[2]), expected[1, 2], rtol=1e-9)
    norms = np.asarray(jax.jit(cost.norm)(np.concatenate([x, np.zeros((1, d + d * d))])))
    np.testing.assert_allclose(norms[:3], cost_matrix(pair.gmm0, mixture_of(np.zeros((4, d, d))))[:, 0], rtol=1e-9)
    assert norms[3] == 0
    leaves, structure = jax.tree.flatten(cost)
    assert jax.tree.unflatten(structure, leaves).dimension == d
    assert structure == jax.tree.structure(cg.BuresCost(d)), "a new cost of the same size would recompile"
    assert cost._padder(d + d * d).shape == (1, d + d * d)


@jax.jit
def both_ways_gradient(mean, covariance, other):
    def value(mean, covariance):
        gmm = cg.GaussianMixture(mean, covariance, jnp.ones(1))
        return cg.bures_cost_matrix(gmm, other)[0, 0] + cg.bures_cost_matrix(other, gmm)[0, 0]

    return jax.grad(value, (0, 1))(mean, covariance)


@pytest.mark.parametrize("d", [1, 2, 3, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["different", "equal", "singular", "zero"])
def test_gradient_equals_finite_differences(x64, d, kind):
    """In a definite covariance; the other one is whatever it is."""
    rng = np.random.RandomState(10 * d)
    s0 = random_covariances(rng, 1, d)[0]
    rank = d - 1 if kind == "singular" else 0
    singular = rng.randn(d, rank)
    root1 = {"different": root(random_covariances(rng, 1, d)[0]), "equal": root(s0)}.get(kind, singular)
    s1 = s0 if kind == "equal" else root1 @ root1.T
    m0, m1 = rng.randn(1, d), rng.randn(1, d)
    other = mixture_of(s1[None], m1)
    in_mean, in_covariance = both_ways_gradient(jnp.asarray(m0), jnp.asarray(s0)[None], other)
    np.testing.assert_allclose(in_mean, 4 * (m0 - m1), rtol=1e-12)
    h = 1e-5
    for _ in range(6):
        direction = rng.randn(d, d)
        direction = direction + direction.T
        direction *= np.linalg.eigvalsh(s0)[0] / np.abs(np.linalg.eigvalsh(direction)).max()  # stays definite
        slope = (closed_form(s0 + h * direction, s1, root1) - closed_form(s0 - h * direction, s1, root1)) / h
        np.testing.assert_allclose(np.sum(np.asarray(in_covariance[0]) * direction), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_nothing_is_nan(d):
    """Zero, singular, equal, tiny and huge covariances, in values and gradients in either mixture."""
    rng = np.random.RandomState(d)
    line = rng.randn(d, 1)
    regular = random_covariances(rng, 1, d)[0]
    corner = np.diag(np.r_[1.0, np.zeros(d - 1)])
    covariances = np.stack(
        [np.zeros((d, d)), line @ line.T, regular, regular, np.eye(d), corner, 1e-12 * regular, 1e8 * regular]
    )
    gmm = mixture_of(covariances)

    def value(one, other):
        cost = cg.bures_cost_matrix(one, other)
        return jnp.sum(jnp.sqrt(1 + cost)), cost

    gradients, cost = jax.jit(jax.grad(value, (0, 1), has_aux=True))(gmm, gmm)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients))
    assert np.isfinite(np.asarray(cost)).all() and (np.asarray(cost) >= 0).all()
    traces = np.trace(covariances, axis1=1, axis2=2)
    np.testing.assert_allclose(cost[0], traces, rtol=1e-5)
    np.testing.assert_allclose(cost, cost.T, atol=1e-5 * traces.max())


@pytest.mark.parametrize("n", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_cost_of_rank_deficient_covariances(precision, n):
    """As products of their factors they are singular up to rounding only: no pivot of that size may spoil the others."""
    d = 32
    rng = np.random.RandomState(d)
    factors = [rng.randn(d, rng.randint(1, d)) for _ in range(n)]
    regular = random_covariances(rng, 1, d, 10.0)
    dtype = np.float64 if precision < 1e-8 else np.float32
    gmms = [
        cg.GaussianMixture(np.zeros((len(s), d), dtype), s.astype(dtype), np.full(len(s), 1 / len(s), dtype))
        for s in (regular, np.stack([factor @ factor.T for factor in factors]))
    ]
    nuclear = np.array([np.linalg.svd(root(regular[0]) @ factor, compute_uv=False).sum() for factor in factors])
    traces = np.trace(regular[0]) + np.array([np.sum(factor**2) for factor in factors])
    error = np.abs(np.asarray(cost_matrix(*gmms), np.float64)[0] - (traces - 2 * nuclear)) / traces
    assert error.max() <= precision**0.5 / 3, error.max()


def test_large_offsets_do_not_spoil_the_cost():
    rng = np.random.RandomState(0)
    covariances, means = random_covariances(rng, 4, 3), rng.randn(4, 3)
    near, far = mixture_of(covariances, means), mixture_of(covariances, means + 1e4)
    expected = np.asarray(cost_matrix(near, near))
    np.testing.assert_allclose(cost_matrix(far, far), expected, atol=0.02)  # the float32 means themselves moved by 1e-3
    np.testing.assert_allclose(cost_matrix(near, far), 3e8, rtol=1e-2)


@pytest.mark.parametrize("d", [3, 32])
def test_polar_factor_equals_scipy(precision, d):
    rng = np.random.RandomState(d)
    left, right = np.linalg.qr(rng.randn(2, 3, d, d))[0]
    values = np.geomspace(1, 1e-2, d) * np.array([1.0, 1e-6, 1e6])[:, None]
    m = np.asarray(jnp.asarray(np.einsum("nij,nj,njk->nik", left, values, right)), np.float64)
    expected = np.stack([scipy_polar(one)[0] for one in m])

    for smallest in (np.zeros(3), 0.5 * values[:, -1]):
        factor = np.asarray(jax.jit(bures.polar)(jnp.asarray(m), jnp.asarray(smallest)), np.float64)
        np.testing.assert_allclose(factor, expected, atol=2e3 * precision)
        np.testing.assert_allclose(np.sum(factor * m, axis=(1, 2)), values.sum(1), rtol=100 * precision)


def test_polar_factor_of_singular_matrices(precision):
    rng = np.random.RandomState(0)
    m = np.stack([np.zeros((4, 4)), np.outer(rng.randn(4), rng.randn(4)), rng.randn(4, 2) @ rng.randn(2, 4)])
    factor = np.asarray(jax.jit(bures.polar)(jnp.asarray(m), jnp.zeros(3)), np.float64)
    assert np.isfinite(factor).all()
    nuclear = np.linalg.svd(m, compute_uv=False).sum(-1)
    np.testing.assert_allclose(np.sum(factor * m, axis=(1, 2)), nuclear, rtol=1e3 * precision)
    assert (np.linalg.norm(factor, 2, axis=(1, 2)) <= 1 + 1e3 * precision).all()


def test_polar_factor_is_accurate_whatever_the_singular_values(precision):
    """No singular value may land where a step cancels it: the largest does at the first step where the rank is one."""
    rng = np.random.RandomState(0)
    m = rng.randn(300, 4, 4) * (np.arange(4) <= np.arange(300)[:, None, None] % 4)  # ranks 1 to 4
    m = np.asarray(jnp.asarray(m), np.float64)
    left, values, right = np.linalg.svd(m)
    expected = np.einsum("nij,nj,njk->nik", left, values > 1e-10, right)
    factor = np.asarray(jax.jit(bures.polar)(jnp.asarray(m), jnp.zeros(300)), np.float64)
    least = np.min(np.where(values > 1e-10, values, np.inf), axis=1) / values[:, 0]
    error = np.abs(factor - expected).max(axis=(1, 2))
    assert (error * least <= 30 * precision).all()
    np.testing.assert_allclose(np.sum(factor * m, axis=(1, 2)), values.sum(1), rtol=30 * precision)


def test_vmap_equals_loop(x64):
    stacked = [
        jax.tree.map(lambda *a: np.stack(a), *(random_mixture(s + i, k, 3) for i in range(4)))
        for s, k in ((0, 3), (10, 4))
    ]
    batched = jax.jit(jax.vmap(cg.bures_cost_matrix))(*stacked)
    for i in range(4):
        one, other = (jax.tree.map(lambda a, i=i: a[i], gmm) for gmm in stacked)
        np.testing.assert_allclose(batched[i], cost_matrix(one, other), rtol=1e-9)


def test_blocked_path_equals_the_small_one(monkeypatch, x64):
    gmm0, gmm1 = random_mixture(0, 7, 2), random_mixture(1, 5, 2)

    def value(one, other):
        cost = cg.bures_cost_matrix(one, other)
        return jnp.sum(cost**2), cost

    expected = jax.jit(jax.grad(value, (0, 1), has_aux=True))(gmm0, gmm1)
    rows = 3  # 7 has no divisor that small but 1
    monkeypatch.setattr(bures, "block_bytes", lambda: rows * 4 * gmm1.covariances.size * 8)
    blocked = jax.jit(
        jax.grad(lambda one, other: value(one, other), (0, 1), has_aux=True)
    )  # a new function, traced anew
    assert "scan" in str(blocked.trace(gmm0, gmm1).jaxpr)
    got = blocked(gmm0, gmm1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, expected)


def test_inverse_norm_bounds_the_least_singular_value(precision):
    s = random_covariances(np.random.RandomState(0), 5, 6, 1e3)
    s[0] = 0
    norms = np.asarray(jax.jit(bures.inverse_norm)(matrices.cholesky(jnp.asarray(s))))
    assert np.isinf(norms[0])
    lowest = np.sqrt(np.linalg.eigvalsh(s[1:])[:, 0])
    assert (1 / norms[1:] <= lowest * (1 + 1e-3)).all() and (1 / norms[1:] >= lowest / 6**0.5).all()
