"""Reductions against Runnalls' greedy merging, exact Bures barycenters of random assignments, and closed forms."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from problems import random_mixture

import coupled_gmm as cg

SEEDS, ALL_SEEDS, K, N = range(6), range(20), 10, 5


def host(gmm):
    means, covariances, weights = (np.asarray(x, np.float64) for x in (gmm.means, gmm.covariances, gmm.weights))
    return means, covariances, weights / weights.sum()


def distance(one, other):
    """MW2 squared by POT."""
    (m0, c0, w0), (m1, c1, w1) = one, other
    return ot.gmm.gmm_ot_loss(m0, m1, c0, c1, w0, w1)


def merged(means, covariances, weights):
    """The one Gaussian with the moments of a mixture."""
    total = weights.sum()
    mean = weights @ means / total
    spread = means - mean
    within = np.einsum("k,kij->ij", weights, covariances + spread[:, :, None] * spread[:, None]) / total
    return mean, within, total


def runnalls(means, covariances, weights, n):
    """Greedy: the pair whose merging, moments kept, raises an upper bound of the KL divergence least (Runnalls 2007)."""
    parts = list(zip(means, covariances, weights))
    while len(parts) > n:
        candidates = []
        for i in range(len(parts)):
            for j in range(i):
                pair = [np.stack(part) for part in zip(parts[i], parts[j])]
                one = merged(*pair)
                rise = one[2] * np.linalg.slogdet(one[1])[1] - pair[2] @ np.linalg.slogdet(pair[1])[1]
                candidates.append((rise, i, j, one))
        _, i, j, one = min(candidates, key=lambda candidate: candidate[0])
        parts = [part for k, part in enumerate(parts) if k not in (i, j)] + [one]
    return tuple(np.stack(part) for part in zip(*parts))


def random_assignments(moments, n, n_starts, seed):
    """Components thrown together at random, moments kept."""
    rng, starts = np.random.RandomState(seed), []
    while len(starts) < n_starts:
        group = rng.randint(0, n, len(moments[2]))
        if len(set(group)) == n:
            parts = zip(*(merged(*(part[group == k] for part in moments)) for k in range(n)))
            starts.append(cg.GaussianMixture.from_moments(*(np.stack(part) for part in parts)))
    return starts


@functools.cache
def reductions(seeds=SEEDS):
    """The mixtures, and what they were reduced to, in one program; call it under x64."""
    gmms = [random_mixture(seed, K, 2) for seed in seeds]
    return gmms, [cg.reduce_gmm(jax.random.key(seed), gmm, N) for seed, gmm in zip(seeds, gmms)]


@pytest.mark.parametrize("seeds", [SEEDS, pytest.param(ALL_SEEDS, marks=pytest.mark.slow)], ids=len)
def test_no_worse_than_greedy_merging(x64, seeds):
    gains = []
    for gmm, found in zip(*reductions(seeds)):
        assert found.converged and found.gmm.n_components == N
        np.testing.assert_allclose(found.objective, distance(host(found.gmm), host(gmm)), rtol=1e-8)
        values = np.asarray(found.history.objective)[: int(found.n_steps) + 1]
        assert np.all(np.diff(values) <= 1e-12 * values[0])
        gains.append(1 - float(found.objective) / distance(runnalls(*host(gmm), N), host(gmm)))
    print(f"below Runnalls by {min(gains):.1%} to {max(gains):.1%}, {np.mean(gains):.1%} on average")
    assert min(gains) >= 0


@pytest.mark.slow
def test_no_worse_than_random_assignments(x64):
    for seed, gmm, found in zip(ALL_SEEDS, *reductions(ALL_SEEDS)):
        starts = random_assignments(host(gmm), N, 20, seed)
        best = cg.barycenter([gmm], starts, learn_weights=True)
        assert best.converged
        assert float(found.objective) <= float(best.objective) * (1 + 1e-9), seed


def test_as_many_components_cost_nothing(x64):
    gmm = random_mixture(0, 4, 2)
    for changed in (gmm, cg.GaussianMixture.from_moments(gmm.means, gmm.covariances, [0.5, 0, 0.3, 0.2])):
        found = cg.reduce_gmm(jax.random.key(0), changed, 4)
        assert found.converged and abs(float(found.objective)) < 1e-12
        np.testing.assert_allclose(distance(host(found.gmm), host(changed)), 0, atol=1e-7)


@pytest.mark.parametrize("d", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_one_component_is_the_bures_barycenter(x64, d):
    gmm = random_mixture(2, 4, d)
    found = cg.reduce_gmm(jax.random.key(0), gmm, 1, n_init=2, tol=1e-12)
    means, covariances, weights = host(gmm)
    if d == 1:
        mean, covariance = weights @ means, (weights @ np.sqrt(covariances[:, 0, 0])) ** 2
    else:
        mean, covariance = ot.gaussian.bures_wasserstein_barycenter(
            means, covariances, weights, num_iter=10_000, eps=1e-14
        )[:2]
    np.testing.assert_allclose(found.gmm.means[0], np.ravel(mean), atol=1e-8)
    np.testing.assert_allclose(found.gmm.covariances[0], np.reshape(covariance, (d, d)), atol=1e-8)
    np.testing.assert_allclose(found.gmm.weights, [1], rtol=1e-12)


def test_components_of_weight_zero_do_not_matter(x64):
    """Far off, they draw no component to themselves."""
    bare, found = (part[0] for part in reductions())
    means, covariances, weights = host(bare)
    weights = np.where(np.arange(K) < 3, 0, weights)
    far = cg.GaussianMixture.from_moments(means + 1e3 * (weights == 0)[:, None], covariances, weights / weights.sum())
    near = cg.GaussianMixture.from_moments(means, covariances, weights / weights.sum())
    one, other = (cg.reduce_gmm(jax.random.key(0), gmm, N) for gmm in (far, near))
    assert one.converged and np.abs(one.gmm.means).max() < 100
    np.testing.assert_allclose(one.objective, other.objective, rtol=1e-9)
    np.testing.assert_allclose(one.objective, distance(host(one.gmm), [part[3:] for part in host(far)]), rtol=1e-8)
    few = np.zeros(K)
    few[[2, 7]] = 0.5
    found = cg.reduce_gmm(jax.random.key(1), cg.GaussianMixture.from_moments(means, covariances, few), N)
    assert found.converged and abs(float(found.objective)) < 1e-12


def test_the_key_decides(x64):
    gmms, found = reductions()
    again = cg.reduce_gmm(jax.random.key(3), gmms[3], N)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(found[3])):
        np.testing.assert_array_equal(one, other)
    other = cg.reduce_gmm(jax.random.key(4), gmms[3], N)
    assert not np.array_equal(other.gmm.means, again.gmm.means)


def test_jit_and_vmap_equal_the_loop(x64):
    gmms, found = reductions()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gmms[:3])
    keys = jnp.stack([jax.random.key(seed) for seed in range(3)])
    batched = jax.jit(jax.vmap(lambda key, gmm: cg.reduce_gmm(key, gmm, N)))(keys, stacked)
    for seed in range(3):
        np.testing.assert_allclose(batched.objective[seed], found[seed].objective, rtol=1e-9)
        weights = np.sort(batched.gmm.weights[seed]), np.sort(found[seed].gmm.weights)  # several starts end in the same
        np.testing.assert_allclose(*weights, rtol=1e-9)


@pytest.mark.slow
def test_float32_is_close():
    gmm = random_mixture(0, K, 2)
    single = cg.reduce_gmm(jax.random.key(0), gmm, N)
    assert single.converged and single.gmm.dtype == jnp.float32
    with jax.enable_x64(True):
        np.testing.assert_allclose(distance(host(single.gmm), host(gmm)), reductions()[1][0].objective, rtol=1e-4)


BAD = [
    ({"key": 0}, TypeError, "^key: expected a random key, got int; pass jax.random.key"),
    ({"gmm": None}, TypeError, "^gmm: expected a GaussianMixture, got NoneType"),
    ({"n_components": 4}, ValueError, "^n_components: 4 are more than the mixture's 3; ask for fewer"),
    ({"n_components": 0}, ValueError, "^n_components: must be at least 1, got 0"),
    ({"n_components": 2.0}, TypeError, "^n_components: expected an integer, got 2.0"),
    ({"n_init": 0}, ValueError, "^n_init: must be at least 1, got 0"),
    ({"max_steps": 0}, ValueError, "^max_steps: must be at least 1, got 0"),
    ({"tol": [1e-3, 1e-4]}, TypeError, "^tol: expected one real number"),
    ({"tol": -1}, ValueError, "^tol: must be finite and at least 0"),
]


@pytest.mark.parametrize(("changes", "error", "match"), BAD, ids=map(str, range(len(BAD))))
def test_bad_arguments(monkeypatch, changes, error, match):
    def entered(*_):
        raise AssertionError("a program was entered")

    monkeypatch.setattr(sys.modules["coupled_gmm.barycenters.reduction"], "_starts", entered)
    arguments = {"key": jax.random.key(0), "gmm": random_mixture(0, 3, 2), "n_components": 2, **changes}
    with pytest.raises(error, match=match):
        cg.reduce_gmm(arguments.pop("key"), arguments.pop("gmm"), arguments.pop("n_components"), **arguments)
