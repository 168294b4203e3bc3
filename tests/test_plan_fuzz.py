"""Random pairs of every trouble: no plan that says it converged may be wrong.

Twins: POT's network simplex in float64 on the same costs, a plain Sinkhorn in NumPy float64. Components are padded to a few sizes
with absent ones, so that few programs are compiled.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from test_plan import log_sum_exp

import coupled_gmm as cg

KINDS = ("plain", "far", "tied", "equal", "absent", "uniform")
PRICES = ("balanced", "unbalanced", "two prices", "one side")


def weights_of(rng, k, size, kind):
    weights = np.ones(k) if kind in ("uniform", "tied") else rng.dirichlet(np.full(k, 1.0)) + 1e-6
    if kind == "absent":
        weights[rng.permutation(k)[: k // 2]] = 0
    return np.append(weights / weights.sum(), np.zeros(size - k))


def random_pair(seed, size, dtype):
    """A kind, and two mixtures of at most `size` components over two features."""
    rng = np.random.RandomState(seed)
    kind, scale = KINDS[seed % len(KINDS)], 10.0 ** rng.uniform(-6, 6)
    sizes = rng.randint(1, size + 1, 2)
    means = [2 * rng.randn(size, 2) for _ in sizes]
    if kind == "tied":
        means = [np.round(m) for m in means]
    weights = [weights_of(rng, k, size, kind) for k in sizes]
    if kind == "equal":
        order = rng.permutation(size)
        means[1], weights[1] = means[0][order], weights[0][order]
    if kind == "far":
        distance = 10.0 ** rng.uniform(2, 5)
        for m in means:
            m[0] += distance
    gmms = []
    for m, w in zip(means, weights):
        spread = np.tile(0.1 * np.eye(2), (size, 1, 1)) * rng.uniform(0.5, 1, (size, 1, 1) if kind != "equal" else 1)
        gmms.append(
            cg.GaussianMixture.from_moments(
                (scale * m).astype(dtype), (scale**2 * spread).astype(dtype), w.astype(dtype)
            )
        )
    return kind, gmms


@functools.partial(jax.jit, static_argnames="method")
def solved(pair, method):
    plan = cg.solve_plan(pair, method=method)
    return plan, plan.matrix, plan.transport_cost, plan.total_mass


def exact_is_right(plan, cost_of_plan, eps):
    """Within 1e-4 of POT's, and what rounding of the masses costs at POT's potentials."""
    a, b, cost = (np.asarray(v, np.float64) for v in (plan.pair.gmm0.weights, plan.pair.gmm1.weights, plan.cost))
    a, b = a / a.sum(), b / b.sum()
    rows, columns = a > 0, b > 0
    cost, a, b = cost[np.ix_(rows, columns)], a[rows], b[columns]
    scale = cost.max() or 1.0
    right, log = ot.emd2(a, b, cost / scale, log=True, numItermax=1_000_000)
    u, v = log["u"] - np.median(log["u"]), log["v"] + np.median(log["u"])
    noise = 16 * eps * (a @ np.abs(u) + b @ np.abs(v)) + 1e-13
    return abs(float(cost_of_plan) / scale - right) <= 1e-4 * right + noise


def sinkhorn(cost, a, b, epsilon, rhos, limit=3_000):
    """The plan, or None where that many iterations do not find it."""
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)
    taus = [1 / (1 + epsilon / rho) for rho in rhos]
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(limit):
        last = g
        f = -epsilon * taus[0] * log_sum_exp(log_b + (g - cost) / epsilon, axis=1)
        g = -epsilon * taus[1] * log_sum_exp(log_a[:, None] + (f[:, None] - cost) / epsilon, axis=0)
        if np.abs(g - last).max() <= 1e-9 * epsilon:
            return np.exp(log_a[:, None] + log_b + (f[:, None] + g - cost) / epsilon)
    return None


def entropic_is_right(plan, matrix):
    """Within tolerance and rounding of the twin's, as a part of the mass that moves; None where the twin gives up."""
    pair = plan.pair
    a, b, cost = (np.asarray(v, np.float64) for v in (pair.gmm0.weights, pair.gmm1.weights, plan.cost))
    rhos = float(pair.rho0), float(pair.rho1)
    if np.isinf(rhos).all():
        a, b = a / a.sum(), b / b.sum()
    rows, columns = a > 0, b > 0
    right = sinkhorn(cost[np.ix_(rows, columns)], a[rows], b[columns], float(pair.epsilon), rhos)
    if right is None or right.sum() < 1e-30:
        return None
    return np.abs(np.asarray(matrix)[np.ix_(rows, columns)] - right).sum() <= 2e-2 * right.sum()


def fuzz(seeds, size, dtype, table):
    eps = float(np.finfo(dtype).eps)
    wrong = []
    for seed in seeds:
        kind, gmms = random_pair(seed, size, dtype)
        prices = PRICES[(seed // len(KINDS)) % len(PRICES)]
        rng = np.random.RandomState(seed + 1_000_000)
        share = 10.0 ** rng.uniform(-2, 1)
        if prices == "balanced":
            plan, matrix, value, _ = solved(cg.GaussianMixturePair(*gmms, 1.0), "exact")
            said = bool(plan.converged)
            right = exact_is_right(plan, value, eps) if said else None
            table[kind, "exact", said, right] += 1
            wrong += [(seed, "exact")] if said and not right else []
        epsilon = 100 * share * float(cg.GaussianMixturePair(*gmms).epsilon)
        rho = {"balanced": np.inf, "unbalanced": epsilon * 10.0 ** rng.uniform(-1, 2)}.get(prices)
        if rho is None:
            rho = epsilon * 10.0 ** rng.uniform(-1, 2, 2)
            rho[0] = np.inf if prices == "one side" else rho[0]
        plan, matrix, *_ = solved(cg.GaussianMixturePair(*gmms, epsilon, rho=rho), "entropic")
        said = bool(plan.converged)
        right = entropic_is_right(plan, matrix) if said else None
        table[kind, prices, said, right] += 1
        wrong += [(seed, prices)] if said and right is False else []
    return wrong


def test_a_sample():
    wrong = fuzz(range(48), 6, np.float32, collections.Counter())
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("size", "count"), [(6, 600), (20, 250), (60, 150)])
def test_two_thousand_pairs(precision, size, count):
    table = collections.Counter()
    wrong = fuzz(range(1000, 1000 + count), size, np.float32 if precision > 1e-8 else np.float64, table)
    for (kind, prices, said, right), n in sorted(table.items(), key=str):
        print(f"{kind:8} {prices:10} converged {said!s:5} right {right!s:5} {n}")
    assert not wrong
    assert jnp.sum(jnp.asarray([n for key, n in table.items() if key[2]])) > 0.9 * sum(table.values())
