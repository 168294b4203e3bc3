"""Random pairs of every trouble: no plan that says it converged may be wrong.

Twins: POT's network simplex in float64 on the same costs, a plain Sinkhorn and Bures distances by NumPy's eigh and svd in
float64. Components are padded to a few sizes with absent ones, so that few programs are compiled.
"""

import collections
import functools

import jax
import numpy as np
import ot
import pytest
from problems import random_covariances
from twins import log_sum_exp

import coupled_gmm as cg

KINDS = ("plain", "far", "tied", "equal", "absent", "uniform")
PRICES = ("balanced", "unbalanced", "two prices", "one side")
TOL = 1e-4  # of solve_plan, unless another one is asked for
COST_ROUNDINGS = 4


def weights_of(rng, k, size, kind):
    weights = np.ones(k) if kind in ("uniform", "tied") else rng.dirichlet(np.full(k, 1.0)) + 1e-6
    if kind == "absent":
        weights[rng.permutation(k)[: k // 2]] = 0
    return np.append(weights / weights.sum(), np.zeros(size - k))


def random_pair(seed, size, d, dtype):
    """A kind, and two mixtures of at most `size` components over d features, of conditions up to 1e4."""
    rng = np.random.RandomState(seed)
    kind, scale = KINDS[seed % len(KINDS)], 10.0 ** rng.uniform(-6, 6)
    sizes = rng.randint(1, size + 1, 2)
    means = [2 * rng.randn(size, d) for _ in sizes]
    weights = [weights_of(rng, k, size, kind) for k in sizes]
    spreads = [0.1 * rng.uniform(0.5, 1, (size, 1, 1)) for _ in sizes]
    spreads = [spread * random_covariances(rng, size, d, 10.0 ** rng.uniform(0, 4)) for spread in spreads]
    if kind == "tied":
        means, spreads = [np.round(m) for m in means], [spreads[0][:1].repeat(size, 0)] * 2
    if kind == "equal":
        order = rng.permutation(size)
        means[1], weights[1], spreads[1] = means[0][order], weights[0][order], spreads[0][order]
    if kind == "far":
        distance = 10.0 ** rng.uniform(2, 5)
        for m in means:
            m[0] += distance
    return kind, [
        cg.GaussianMixture.from_moments(*(v.astype(dtype) for v in (scale * m, scale**2 * spread, w)))
        for m, spread, w in zip(means, spreads, weights)
    ]


@functools.partial(jax.jit, static_argnames="method")
def solved(pair, method):
    plan = cg.solve_plan(pair, method=method)
    return plan, plan.matrix, plan.transport_cost, plan.total_mass


def cost_is_right(plan, eps):
    """Within rounding of the twin's: W2 is a metric, in which rounding S moves a Gaussian by eps sqrt(tr S cond S) or so."""
    gmms = plan.pair.gmm0, plan.pair.gmm1
    roots, sizes, moved = [], [], []
    for gmm in gmms:
        values, frames = np.linalg.eigh(np.asarray(gmm.covariances, np.float64))
        roots.append((frames * np.sqrt(values)[:, None]) @ frames.swapaxes(1, 2))
        sizes.append(values.sum(1))
        moved.append(np.sqrt(sizes[-1] * values[:, -1] / values[:, 0]))
    nuclear = np.linalg.svd(roots[0][:, None] @ roots[1], compute_uv=False).sum(-1)
    means = [np.asarray(gmm.means, np.float64) for gmm in gmms]
    right = np.sum((means[0][:, None] - means[1]) ** 2, -1)
    both = sizes[0][:, None] + sizes[1]
    right = right + np.maximum(both - 2 * nuclear, 0)
    distance = np.sqrt(right)
    error = COST_ROUNDINGS * eps * (distance + moved[0][:, None] + moved[1])
    return np.all(np.abs(np.asarray(plan.cost) - right) <= (2 * distance + error) * error + 1e-14 * both)


def exact_is_right(plan, cost_of_plan, eps):
    """Within the tolerance of POT's, and what rounding of the masses costs at POT's potentials."""
    a, b, cost = (np.asarray(v, np.float64) for v in (plan.pair.gmm0.weights, plan.pair.gmm1.weights, plan.cost))
    a, b = a / a.sum(), b / b.sum()
    rows, columns = a > 0, b > 0
    cost, a, b = cost[np.ix_(rows, columns)], a[rows], b[columns]
    scale = cost.max() or 1.0
    right, log = ot.emd2(a, b, cost / scale, log=True, numItermax=1_000_000)
    u, v = log["u"] - np.median(log["u"]), log["v"] + np.median(log["u"])
    noise = 16 * eps * (a @ np.abs(u) + b @ np.abs(v)) + 1e-13
    return bool(abs(float(cost_of_plan) / scale - right) <= TOL * right + noise)


def sinkhorn(cost, a, b, epsilon, rhos, limit=20_000):
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
    """Within twice the tolerance, which is of marginals, of the twin's, as a part of the mass that moves.

    None where the twin gives up, or nothing moves.
    """
    pair = plan.pair
    a, b, cost = (np.asarray(v, np.float64) for v in (pair.gmm0.weights, pair.gmm1.weights, plan.cost))
    rhos = float(pair.rho0), float(pair.rho1)
    if np.isinf(rhos).all():
        a, b = a / a.sum(), b / b.sum()
    rows, columns = a > 0, b > 0
    right = sinkhorn(cost[np.ix_(rows, columns)], a[rows], b[columns], float(pair.epsilon), rhos)
    if right is None or right.sum() < 1e-30:
        return None
    return bool(np.abs(np.asarray(matrix)[np.ix_(rows, columns)] - right).sum() <= 2 * TOL * right.sum())


def fuzz(seeds, size, d, dtype, table):
    """Counts by kind, price, what the plan said and whether it was right, and the seeds of those that were wrong."""
    eps = float(np.finfo(dtype).eps)
    wrong = []

    def judge(seed, kind, prices, plan, is_right, *args):
        said = bool(plan.converged)
        right = is_right(plan, *args) if said else None
        table[kind, prices, said, right] += 1
        wrong.extend([(seed, prices)] if right is False else [])

    for seed in seeds:
        kind, gmms = random_pair(seed, size, d, dtype)
        prices = PRICES[(seed // len(KINDS)) % len(PRICES)]
        rng = np.random.RandomState(seed + 1_000_000)
        share = 10.0 ** rng.uniform(-4, 1)
        if prices == "balanced":
            plan, _, value, _ = solved(cg.GaussianMixturePair(*gmms, 1.0), "exact")
            judge(seed, kind, "exact", plan, exact_is_right, value, eps)
        epsilon = 100 * share * float(cg.GaussianMixturePair(*gmms).epsilon)
        rho = {"balanced": np.inf, "unbalanced": epsilon * 10.0 ** rng.uniform(-1, 2)}.get(prices)
        if rho is None:
            rho = epsilon * 10.0 ** rng.uniform(-1, 2, 2)
            rho[0] = np.inf if prices == "one side" else rho[0]
        plan, matrix, *_ = solved(cg.GaussianMixturePair(*gmms, epsilon, rho=rho), "entropic")
        judge(seed, kind, prices, plan, entropic_is_right, matrix)
        wrong += [] if cost_is_right(plan, eps) else [(seed, "cost")]
    return wrong


def test_a_sample():
    wrong = fuzz(range(48), 6, 3, np.float32, collections.Counter())
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("size", "d", "count"),
    [(6, 1, 150), (6, 2, 150), (6, 3, 150), (20, 2, 100), (20, 4, 100), (20, 7, 100), (60, 3, 100), (60, 10, 150)],
)
def test_two_thousand_pairs(precision, size, d, count):
    table = collections.Counter()
    wrong = fuzz(range(1000, 1000 + count), size, d, np.float32 if precision > 1e-8 else np.float64, table)
    for (kind, prices, said, right), n in sorted(table.items(), key=str):
        print(f"{kind:8} {prices:10} converged {said!s:5} right {right!s:5} {n}")
    assert not wrong
    assert sum(n for key, n in table.items() if key[2]) > 0.9 * sum(table.values())
