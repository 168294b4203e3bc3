"""Barycenters against POT, against a plain NumPy twin of the fixed point, linear programmes, grids and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from problems import random_covariances, random_mixture
from scipy.linalg import sqrtm
from scipy.optimize import linprog

import coupled_gmm as cg
from coupled_gmm.barycenters.problem import BarycenterProblem

PROJECTIONS = ("joint", "bures", "euclidean")
SIZES = (5, 6, 7)
POT_OBJECTIVE = {"euclidean": 8.740154, "bures": 8.744934}
POT_LARGE = {20: (12.461767, 12.460696), 50: (22.855751, 22.759069)}  # objectives, euclidean and bures
BEST_KNOWN = 8.7198210  # of the seed's problem: the best end of 2,000 random starts of two kinds


def seed_mixture(n, d, seed=0, least=1.0, scale=1e-2):
    """POT's example's random mixtures."""
    rng = np.random.RandomState(seed)
    means, roots = rng.randn(n, d), rng.randn(n, d, d) * scale
    weights = rng.random_sample(n)
    return means, np.einsum("kab,kcb->kac", roots, roots) + least * np.eye(d), weights / weights.sum()


def seed_problem(sizes=SIZES, d=2, n=6):
    """POT's example, or one like it: moments of the mixtures, and of the start, whose weights are uniform."""
    moments = []
    for seed, size in enumerate(sizes):
        means, covariances, weights = seed_mixture(size, d, seed, 0.25, 0.5)
        offset = np.zeros(d)
        offset[:2] = [(-3, 0), (2, 0), (0, 4)][seed % 3]
        moments.append((means / 2 + offset, covariances, weights))
    means, covariances, _ = seed_mixture(n, d)
    return moments, (means, covariances, np.full(n, 1 / n))


def mixture(moments):
    return cg.GaussianMixture.from_moments(*moments)


def mixtures(moments):
    return [mixture(m) for m in moments]


def host(gmm):
    """Moments in float64, the weights summing to one."""
    means, covariances, weights = (np.asarray(x, np.float64) for x in (gmm.means, gmm.covariances, gmm.weights))
    return means, covariances, weights / weights.sum()


def root(s):
    return np.real(sqrtm(s)) if len(s) > 1 else np.sqrt(s)


def bures_cost(one, other):
    """Squared distances between the components, by matrix square roots."""
    (m0, c0, _), (m1, c1, _) = one, other
    cost = np.empty((len(m0), len(m1)))
    for i, j in np.ndindex(*cost.shape):
        r = root(c0[i])
        cross = np.trace(root(r @ c1[j] @ r))
        cost[i, j] = np.sum((m0[i] - m1[j]) ** 2) + np.trace(c0[i]) + np.trace(c1[j]) - 2 * cross
    return cost


def objective(gmm, moments, coefficients=None):
    """The sum of squared distances, by POT's linear programme."""
    free = host(gmm) if isinstance(gmm, cg.GaussianMixture) else gmm
    values = [ot.emd2(free[2], m[2], bures_cost(free, m)) for m in moments]
    return np.average(values, weights=coefficients)


def middle(covariances, shares, start):
    """The Bures barycenter of covariances, by the fixed point with matrix square roots."""
    s = start
    for _ in range(500):
        r = root(s)
        inverse = np.linalg.inv(r)
        inner = sum(a * root(r @ c @ r) for a, c in zip(shares, covariances) if a > 0)
        moved = inverse @ inner @ inner @ inverse
        if np.abs(moved - s).max() < 1e-14 * np.abs(s).max():
            break
        s = moved
    return moved


def average(means, covariances, shares, exactly=True):
    mean = shares @ means
    covariance = np.einsum("j,jab->ab", shares, covariances)
    return mean, middle(covariances, shares, covariance) if exactly else covariance


def twin(moments, start, coefficients, projection, steps):
    """The fixed point, by ot.emd and matrix square roots; each component's shares are of its own weight."""
    means, covariances, weights = (x.copy() for x in start)
    for _ in range(steps):
        plans = [ot.emd(weights, m[2], bures_cost((means, covariances, weights), m)) for m in moments]
        for i in np.flatnonzero(weights):
            shares = [plan[i] / weights[i] for plan in plans]
            if projection == "joint":
                shares = np.concatenate([c * s for c, s in zip(coefficients, shares)])
                gaussians = [np.concatenate([m[part] for m in moments]) for part in (0, 1)]
            else:
                each = [average(m[0], m[1], s, projection == "bures") for m, s in zip(moments, shares)]
                gaussians, shares = [np.stack(part) for part in zip(*each)], coefficients
            means[i], covariances[i] = average(*gaussians, shares)
    return means, covariances, weights


def falls(history, n_steps, rounding=1e-12):
    values = np.asarray(history.objective)
    assert np.isfinite(values[: n_steps + 1]).all() and np.isnan(values[n_steps + 1 :]).all()
    return np.all(np.diff(values[: n_steps + 1]) <= rounding * np.abs(values[0]))


@functools.cache
def starts_of_components(n_starts, n=6, seed=0):
    """Starts of n of the seed problem's own components."""
    means, covariances, _ = (np.concatenate(part) for part in zip(*seed_problem()[0]))
    rng = np.random.RandomState(seed)
    chosen = [rng.choice(len(means), n, replace=False) for _ in range(n_starts)]
    return [(means[k], covariances[k], np.full(n, 1 / n)) for k in chosen]


@pytest.mark.parametrize("projection", ["euclidean", "bures"])
def test_seed_problem_equals_pot(x64, projection):
    moments, start = seed_problem()
    found = cg.barycenter(mixtures(moments), mixture(start), projection=projection, max_steps=3, tol=0)
    assert int(found.status) == cg.Status.STEPS_DONE and int(found.n_steps) == 3
    parts = [list(part) for part in zip(*moments)]
    means, covariances = ot.gmm.gmm_barycenter_fixed_point(
        *parts,
        start[0].copy(),
        start[1].copy(),
        np.full(3, 1 / 3),
        iterations=3,
        barycentric_proj_method=projection,
    )
    np.testing.assert_allclose(found.gmm.means, means, atol=1e-5)
    np.testing.assert_allclose(found.gmm.covariances, covariances, atol=1e-5)
    free = host(found.gmm)
    losses = [ot.gmm.gmm_ot_loss(free[0], m[0], free[1], m[1], free[2], m[2]) for m in moments]
    np.testing.assert_allclose(np.mean(losses), POT_OBJECTIVE[projection], atol=1e-6)
    np.testing.assert_allclose(found.objective, np.mean(losses), atol=1e-9)


def aligned(array):
    """A copy that starts at a multiple of 64 bytes, as JAX takes over without copying."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mixtures_do_not_share_memory_with_the_arrays_given(dtype):
    """POT writes its answer over its arguments: nothing of ours may change with them."""
    with jax.enable_x64(dtype == "float64"):
        given = [aligned(part.astype(dtype)) for part in seed_problem()[1]]
        kept = [part.copy() for part in given]
        gmm = mixture(given)
        for part in given:
            part *= 7
        for part, ours in zip(kept, (gmm.means, gmm.covariances, gmm.weights)):
            np.testing.assert_allclose(ours, part, rtol=1e-6)


def test_caller_arrays_are_untouched(x64):
    moments, start = seed_problem()
    given = [aligned(part) for m in (*moments, start) for part in m]
    kept = [part.copy() for part in given]
    cg.barycenter([mixture(given[3 * b : 3 * b + 3]) for b in range(3)], mixture(given[9:]), max_steps=100)
    for ours, before in zip(given, kept):
        np.testing.assert_array_equal(ours, before)


def test_joint_falls_below_both_of_pot(x64):
    moments, start = seed_problem()
    found = cg.barycenter(mixtures(moments), mixture(start))
    assert found.converged and float(found.objective) <= POT_OBJECTIVE["bures"]
    assert falls(found.history, int(found.n_steps))
    np.testing.assert_allclose(objective(found.gmm, moments), found.objective, rtol=1e-9)
    np.testing.assert_allclose(found.history.objective[int(found.n_steps)], found.objective, rtol=1e-15)
    starts = [mixture(s) for s in (start, *starts_of_components(7))]
    best = cg.barycenter(mixtures(moments), starts)
    assert best.converged and float(best.objective) <= POT_OBJECTIVE["euclidean"]
    ends = [float(cg.barycenter(mixtures(moments), s).objective) for s in starts]
    assert int(best.start) == np.argmin(ends)
    np.testing.assert_allclose(best.objective, min(ends), rtol=1e-12)
    np.testing.assert_allclose(objective(best.gmm, moments), best.objective, rtol=1e-9)
    assert falls(best.history, int(best.n_steps))


@pytest.mark.slow
def test_best_of_many_starts(x64):
    moments, start = seed_problem()
    starts = [mixture(s) for s in (start, *starts_of_components(400))]
    best = cg.barycenter(mixtures(moments), starts)
    assert float(best.objective) <= BEST_KNOWN
    np.testing.assert_allclose(objective(best.gmm, moments), best.objective, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "d", "steps"), [(20, 8, 10), (50, 16, 3)])
def test_large_problems_are_no_worse_than_pot(x64, k, d, steps):
    moments, start = seed_problem((k,) * 5, d, k)
    ends = {}
    for projection in PROJECTIONS:
        found = cg.barycenter(mixtures(moments), mixture(start), projection=projection, max_steps=steps, tol=0)
        free = host(found.gmm)
        losses = [ot.gmm.gmm_ot_loss(free[0], m[0], free[1], m[1], free[2], m[2]) for m in moments]
        ends[projection] = np.mean(losses)
        np.testing.assert_allclose(found.objective, ends[projection], rtol=1e-8)
        assert projection != "joint" or falls(found.history, steps)
    print(ends)
    assert ends["euclidean"] <= POT_LARGE[k][0] + 1e-5
    assert ends["bures"] <= POT_LARGE[k][1] + 1e-5
    assert ends["joint"] < min(POT_LARGE[k])


UNEVEN = np.array([0.3, 0.25, 0.2, 0.15, 0.07, 0.03])
COEFFICIENTS = np.array([0.5, 0.3, 0.2])


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_uneven_weights_equal_the_twin(x64, projection):
    """POT's euclidean projection divides by 1/n, not by the component's weight: here the twin is ours."""
    moments, (means, covariances, _) = seed_problem()
    start = means, covariances, UNEVEN
    options = {"projection": projection, "max_steps": 3, "tol": 0}
    found = cg.barycenter(mixtures(moments), mixture(start), coefficients=2 * COEFFICIENTS, **options)
    expected = twin(moments, start, COEFFICIENTS, projection, 3)
    np.testing.assert_allclose(found.gmm.weights, UNEVEN, rtol=1e-12)
    np.testing.assert_allclose(found.gmm.means, expected[0], atol=1e-7)
    np.testing.assert_allclose(found.gmm.covariances, expected[1], atol=1e-7)
    np.testing.assert_allclose(found.objective, objective(expected, moments, COEFFICIENTS), rtol=1e-8)


def test_joint_fixed_point_is_stationary(x64):
    moments, (means, covariances, _) = seed_problem()
    options = {"coefficients": COEFFICIENTS, "tol": 1e-14}
    found = cg.barycenter(mixtures(moments), mixture((means, covariances, UNEVEN)), **options)
    assert found.converged and falls(found.history, int(found.n_steps))
    end = host(found.gmm)
    again = twin(moments, end, COEFFICIENTS, "joint", 1)
    np.testing.assert_allclose(again[0], end[0], atol=1e-6)
    np.testing.assert_allclose(again[1], end[1], atol=1e-6)
    # No small move of means or covariances lowers the objective, to first order.
    rng, least = np.random.RandomState(0), objective(end, moments, COEFFICIENTS)
    for _ in range(5):
        turn = np.eye(2) + 1e-4 * rng.randn(6, 2, 2)
        moved = end[0] + 1e-4 * rng.randn(6, 2), turn @ end[1] @ turn.swapaxes(1, 2), end[2]
        assert objective(moved, moments, COEFFICIENTS) >= least - 1e-9


def tiny_problem(seed, sizes, d=2):
    return [host(random_mixture(10 * seed + b, size, d, shift=b)) for b, size in enumerate(sizes)]


def weight_programme(costs, masses, coefficients):
    """The least objective over plans of any row sums that agree, dense and with the weights substituted."""
    n = costs[0].shape[0]
    sizes = [c.shape[1] for c in costs]
    price = np.concatenate([a * c.ravel() for a, c in zip(coefficients, costs)])
    ends = np.cumsum([0, *(n * k for k in sizes)])
    equal, right = [], []
    for b, k in enumerate(sizes):
        for j in range(k):
            row = np.zeros(len(price))
            row[ends[b] + j : ends[b + 1] : k] = 1
            equal.append(row)
            right.append(masses[b][j])
        for i in range(n if b else 0):  # the same row sums as the first plan
            row = np.zeros(len(price))
            row[ends[b] + i * k : ends[b] + (i + 1) * k] = 1
            row[i * sizes[0] : (i + 1) * sizes[0]] = -1
            equal.append(row)
            right.append(0.0)
    found = linprog(price, A_eq=np.array(equal), b_eq=right, method="highs")
    assert found.status == 0
    return found.fun


def widened(moments, k):
    """The same mixture beside absent copies of its components, k in all."""
    index, n = np.arange(k), len(moments[2])
    return (*(part[index % n] for part in moments[:2]), np.where(index < n, moments[2][index % n], 0))


def learnt(moments, start, coefficients):
    """A barycenter of other sizes in the seed problem's shapes, for one compilation: what is added has no mass, or counts zero."""
    missing = 3 - len(moments)
    counts = np.append(np.zeros(missing), coefficients)
    wide = [widened(m, k) for m, k in zip([*seed_problem()[0][:missing], *moments], SIZES)]
    found = cg.barycenter(
        mixtures(wide), mixture(widened(start, 6)), coefficients=counts, learn_weights=True, tol=1e-12
    )
    n = len(start[2])
    np.testing.assert_array_equal(found.gmm.weights[n:], 0)
    assert found.converged and falls(found.history, int(found.n_steps))
    return found, tuple(part[:n] for part in host(found.gmm))


@pytest.mark.parametrize("sizes", [(2, 3), pytest.param((3, 2, 2), marks=pytest.mark.slow)])
def test_learnt_weights_are_the_best(x64, sizes):
    """At the supports that came out, no weights on a grid do better, and a linear programme written apart agrees."""
    coefficients = np.arange(1, len(sizes) + 1) / sum(range(1, len(sizes) + 1))
    for seed in range(3):
        moments = tiny_problem(seed, sizes)
        start = (*host(random_mixture(100 + seed, 3, 2))[:2], np.full(3, 1 / 3))
        found, end = learnt(moments, start, coefficients)
        np.testing.assert_allclose(np.sum(found.gmm.weights), 1, rtol=1e-12)
        np.testing.assert_allclose(objective(end, moments, coefficients), found.objective, rtol=1e-9)
        costs = [bures_cost(end, m) for m in moments]
        best = weight_programme(costs, [m[2] for m in moments], coefficients)
        np.testing.assert_allclose(found.objective, best, rtol=1e-9)
        grid = [np.array([i, j, 20 - i - j]) / 20 for i in range(21) for j in range(21 - i)]
        values = [sum(a * ot.emd2(w, m[2], c) for a, m, c in zip(coefficients, moments, costs)) for w in grid]
        assert min(values) >= float(found.objective) - 1e-9


@pytest.mark.parametrize("coefficients", [(0.5, 0.5), (0.9, 0.1), (0, 1)])
def test_learnt_weights_between_two_are_the_best(precision, coefficients):
    """A transport problem in their place: against the linear programme of both plans, with absent components on all sides."""
    rng, shape = np.random.RandomState(0), (2, 4, 5)
    best = jax.jit(BarycenterProblem.weights_between)
    for _ in range(20):
        cost = rng.rand(*shape) * 10.0 ** rng.uniform(-3, 3)
        masses = rng.dirichlet(np.ones(5), 2) * [np.ones(5), [1, 1, 1, 1, 0]]
        masses /= masses.sum(1, keepdims=True)
        means, factors = jnp.zeros((2, 5, 1)), jnp.ones((2, 5, 1, 1))
        problem = BarycenterProblem(
            means, factors, jnp.asarray(masses), jnp.asarray(coefficients, float), jnp.ones(()), "exact"
        )
        allowed = np.array([True, False, True, True])
        weights, known = best(problem, jnp.asarray(cost), jnp.asarray(allowed))
        value = sum(a * ot.emd2(spread(weights), spread(b), c) for a, b, c in zip(coefficients, masses, cost))
        expected = weight_programme(list(cost[:, allowed]), masses, coefficients)
        assert known and weights[1] == 0 and np.min(weights) >= 0
        np.testing.assert_allclose(value, expected, rtol=30 * precision, atol=30 * precision * cost.max())


def spread(weights):
    """In float64, summing to 1 there."""
    weights = np.asarray(weights, float)
    return weights / weights.sum()


def test_learnt_weights_between_two_mixtures_call_no_host(x64):
    moments, start = seed_problem()
    gmms = mixtures(moments)[:2]
    found = cg.barycenter(gmms, [mixture(start), gmms[0]], learn_weights=True, tol=1e-12)
    assert found.converged and falls(found.history, int(found.n_steps))
    end = host(found.gmm)
    costs = [bures_cost(end, m) for m in moments[:2]]
    best = weight_programme(costs, [m[2] for m in moments[:2]], (0.5, 0.5))
    np.testing.assert_allclose(found.objective, best, rtol=1e-9)
    program = jax.make_jaxpr(lambda start: cg.barycenter(gmms, start, learn_weights=True))(mixture(start))
    assert "callback" not in str(program)


def test_learnt_weights_on_the_seed_problem(x64):
    moments, start = seed_problem()
    kept = cg.barycenter(mixtures(moments), mixture(start))
    found = cg.barycenter(mixtures(moments), mixture(start), learn_weights=True)
    assert found.converged and falls(found.history, int(found.n_steps))
    assert float(found.objective) < float(kept.objective) - 0.05
    # Without a tolerance, or with too few steps to meet it, they are learnt as well.
    for tol in (0.0, 1e-30):
        found = cg.barycenter(mixtures(moments), mixture(start), learn_weights=True, tol=tol)
        assert float(found.objective) < float(kept.objective) - 0.05
    # A component of weight zero stays without.
    absent = mixture((*start[:2], np.array([0, 1, 1, 1, 1, 1]) / 5))
    found = cg.barycenter(mixtures(moments), absent, learn_weights=True)
    assert found.gmm.weights[0] == 0
    np.testing.assert_array_equal(found.gmm.means[0], start[0][0])


def test_learnt_weights_in_few_steps(x64):
    moments, start = seed_problem()
    found = cg.barycenter(mixtures(moments), mixture(start), learn_weights=True, max_steps=2)
    kept = np.asarray(cg.barycenter(mixtures(moments), mixture(start)).history.objective)[2]
    assert int(found.status) == cg.Status.NOT_CONVERGED and float(found.objective) < kept - 1e-3


def test_one_mixture_is_assigned_exactly(x64):
    """Each component of a single mixture goes to its nearest: k-means among Gaussians."""
    moments = [host(random_mixture(3, 7, 2))]
    start = (*(part[:3] for part in moments[0][:2]), np.full(3, 1 / 3))
    found, end = learnt(moments, start, [1])
    cost = bures_cost(end, moments[0])
    nearest = cost.argmin(0)
    np.testing.assert_allclose(end[2], np.bincount(nearest, moments[0][2], 3), rtol=1e-9)
    np.testing.assert_allclose(found.objective, moments[0][2] @ cost.min(0), rtol=1e-9)
    for i in range(3):
        shares = np.where(nearest == i, moments[0][2], 0) / end[2][i]
        mean, covariance = average(*moments[0][:2], shares)
        np.testing.assert_allclose(end[0][i], mean, atol=1e-7)
        np.testing.assert_allclose(end[1][i], covariance, atol=1e-6)


def singles(means, covariances):
    """Gaussians, each with absent copies of itself; of three features as many as `test_singular_covariances` has."""
    sizes = (3, 4, 3) if means.shape[1] == 3 else (1, 1, 1)
    return [
        mixture((np.tile(m, (k, 1)), np.tile(s, (k, 1, 1)), np.eye(k)[0])) for k, m, s in zip(sizes, means, covariances)
    ]


SINGLE = [
    pytest.param(d, projection, marks=[] if (d, projection) == (3, "joint") else pytest.mark.slow)
    for d in (1, 3)
    for projection in PROJECTIONS
]


@pytest.mark.parametrize(("d", "projection"), SINGLE)
def test_commuting_covariances_average_their_roots(x64, d, projection):
    """Single Gaussians whose covariances share a frame: the barycenter's root is the average of the roots."""
    rng = np.random.RandomState(d)
    frame, deviations = np.linalg.qr(rng.randn(d, d))[0], 0.1 + rng.rand(3, d)
    means = rng.randn(3, d)
    gmms = singles(means, [frame * s**2 @ frame.T for s in deviations])
    start = singles(np.zeros((1, d)), [np.eye(d)])[0]
    found = cg.barycenter(gmms, start, coefficients=COEFFICIENTS, projection=projection, tol=1e-14)
    assert found.converged and int(found.n_steps) <= 2
    np.testing.assert_allclose(found.gmm.means[0], COEFFICIENTS @ means, atol=1e-9)
    deviation = COEFFICIENTS @ deviations
    np.testing.assert_allclose(found.gmm.covariances[0], frame * deviation**2 @ frame.T, atol=1e-9)
    spread = COEFFICIENTS @ (np.sum(means**2, 1) + np.sum(deviations**2, 1))
    least = spread - np.sum((COEFFICIENTS @ means) ** 2) - np.sum(deviation**2)
    np.testing.assert_allclose(found.objective, least, rtol=1e-8)


def test_one_dimension_equals_the_twin(x64):
    moments = tiny_problem(4, (4, 3, 2), d=1)
    start = host(random_mixture(44, 3, 1))
    found = cg.barycenter(mixtures(moments), mixture(start), coefficients=COEFFICIENTS, max_steps=3, tol=0)
    expected = twin(moments, start, COEFFICIENTS, "joint", 3)
    np.testing.assert_allclose(found.gmm.means, expected[0], atol=1e-9)
    np.testing.assert_allclose(found.gmm.covariances, expected[1], atol=1e-9)


@pytest.mark.parametrize(("d", "projection"), SINGLE[3:])
def test_single_gaussians_equal_pot(x64, d, projection):
    for condition in (10.0, 1e4):
        rng = np.random.RandomState(0)
        means, covariances = rng.randn(3, d), random_covariances(rng, 3, d, condition)
        gmms, start = singles(means, covariances), singles(np.zeros((1, d)), [np.eye(d)])[0]
        options = {"coefficients": COEFFICIENTS, "projection": projection, "tol": 1e-14}
        found = cg.barycenter(gmms, start, **options)
        expected = ot.gaussian.bures_wasserstein_barycenter(
            means, covariances, COEFFICIENTS, num_iter=10_000, eps=1e-14
        )
        np.testing.assert_allclose(found.gmm.means[0], expected[0], atol=1e-8)
        np.testing.assert_allclose(found.gmm.covariances[0], expected[1], atol=1e-8)


def test_coefficients(x64):
    """One coefficient alone: a mixture of as many components is reached; coefficient zero is as not being there."""
    moments, start = seed_problem()
    target = moments[1][0], moments[1][1], np.full(6, 1 / 6)
    far = moments[0][0] + 1e3, moments[0][1], moments[0][2]
    gmms = mixtures([far, target, moments[2]])
    found = cg.barycenter(gmms, mixture(start), coefficients=[0, 1, 0], tol=1e-14)
    assert found.converged and abs(float(found.objective)) < 1e-12
    order = np.lexsort(np.asarray(found.gmm.means).T), np.lexsort(target[0].T)
    np.testing.assert_allclose(found.gmm.means[order[0]], target[0][order[1]], atol=1e-9)
    np.testing.assert_allclose(found.gmm.covariances[order[0]], target[1][order[1]], atol=1e-9)
    with_far = cg.barycenter(gmms, mixture(start), coefficients=[np.int64(0), 1.0, 2])
    with_near = cg.barycenter(mixtures([moments[0], target, moments[2]]), mixture(start), coefficients=[0, 1, 2])
    np.testing.assert_allclose(with_far.gmm.means, with_near.gmm.means, atol=1e-9)
    np.testing.assert_allclose(with_far.objective, objective(with_far.gmm, [target, moments[2]], [1, 2]), rtol=1e-9)
    equal = cg.barycenter(gmms, mixture(start)), cg.barycenter(gmms, mixture(start), coefficients=[5, 5, 5])
    np.testing.assert_allclose(equal[0].gmm.means, equal[1].gmm.means, atol=1e-9)


@pytest.mark.parametrize(
    ("d", "method"),
    [
        (3, "exact"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "exact"), (2, "entropic"), (3, "entropic"))),
    ],
)
def test_singular_covariances(x64, d, method):
    """Points, lines and planes are legal, also as starts: finite, and no rise."""
    moments = tiny_problem(6, (3, 4, 3), d)
    for b, rank in zip(range(3), (0, 1, d)):
        values, frames = np.linalg.eigh(moments[b][1])
        values[:, : d - rank] = 0
        moments[b] = moments[b][0], np.einsum("kij,kj,klj->kil", frames, values, frames), moments[b][2]
    for weights in (np.full(3, 1 / 3), np.array([0.5, 0.3, 0.2])):
        start = mixture((moments[2][0], np.zeros((3, d, d)), weights))
        found = cg.barycenter(mixtures(moments), start, method=method, tol=1e-6)
        assert found.converged, found.message
        assert all(np.isfinite(part).all() for part in jax.tree.leaves(found.gmm))
        assert falls(found.history, int(found.n_steps), 1e-9)
    if method == "entropic":
        return
    points = [(m[0], np.zeros_like(m[1]), m[2]) for m in moments]
    found = cg.barycenter(mixtures(points), start, tol=1e-12)
    np.testing.assert_allclose(found.gmm.covariances, 0, atol=1e-12)
    end = host(found.gmm)
    plans = [ot.emd(end[2], m[2], ot.dist(end[0], m[0])) for m in points]
    expected = np.mean([plan @ m[0] / end[2][:, None] for plan, m in zip(plans, points)], axis=0)
    np.testing.assert_allclose(end[0], expected, atol=1e-9)


def with_absent(moments, place=0):
    """The same mixture with one more component, of weight zero."""
    means, covariances, weights = moments
    extra = (np.insert(means, place, 1e3, 0), np.insert(covariances, place, np.eye(means.shape[1]), 0))
    return *extra, np.insert(weights, place, 0.0)


@pytest.mark.parametrize("method", ["exact", pytest.param("entropic", marks=pytest.mark.slow)])
def test_components_of_weight_zero(x64, method):
    """Against the twin without them, in the seed problem's shapes; of entropic plans against our own without them."""
    moments, start = seed_problem((4, 5, 6), n=5)
    gmms, init = mixtures([with_absent(m, place) for place, m in enumerate(moments)]), mixture(with_absent(start, 2))
    if method == "exact":
        wide = cg.barycenter(gmms, init, max_steps=3, tol=0)
        means, covariances, _ = bare = twin(moments, start, np.full(3, 1 / 3), "joint", 3)
        value = objective(bare, moments)
    else:
        options = {"method": method, "epsilon": 0.1}
        wide = cg.barycenter(gmms, init, **options)
        bare = cg.barycenter(mixtures(moments), mixture(start), **options)
        assert int(wide.status) == int(bare.status)
        (means, covariances, _), value = host(bare.gmm), bare.objective
    assert wide.gmm.weights[2] == 0
    np.testing.assert_allclose(wide.objective, value, rtol=1e-9)
    np.testing.assert_allclose(np.delete(wide.gmm.means, 2, 0), means, atol=1e-6)
    np.testing.assert_allclose(np.delete(wide.gmm.covariances, 2, 0), covariances, atol=1e-6)
    np.testing.assert_array_equal(wide.gmm.means[2], 1e3)
    np.testing.assert_allclose(wide.gmm.covariances[2], np.eye(2), rtol=1e-12)


def regularised(gmm, moments, epsilon, tol=1e-11):
    """The sum of entropic costs <P, C> + epsilon KL(P | a b^T), by POT's Sinkhorn."""
    end, values = host(gmm), []
    for m in moments:
        cost = bures_cost(end, m)
        plan = ot.sinkhorn(end[2], m[2], cost, epsilon, "sinkhorn_log", stopThr=tol, numItermax=100_000)
        relative = plan / np.outer(end[2], m[2])
        values.append(np.sum(plan * cost) + epsilon * np.sum(plan * np.log(np.maximum(relative, 1e-300))))
    return np.mean(values)


def test_entropic_barycenters(x64):
    moments, start = seed_problem()
    exact = cg.barycenter(mixtures(moments), mixture(start))
    objectives = []
    for epsilon in (1.0, 0.1, 1e-2, 1e-3):
        found = cg.barycenter(mixtures(moments), mixture(start), method="entropic", epsilon=epsilon)
        assert found.converged and falls(found.history, int(found.n_steps), 1e-10)
        if epsilon in (1.0, 0.1):
            np.testing.assert_allclose(found.objective, regularised(found.gmm, moments, epsilon), rtol=1e-7)
        objectives.append(objective(found.gmm, moments))
    assert objectives[0] > objectives[1] > 8.7
    np.testing.assert_allclose(objectives[3], exact.objective, rtol=1e-3)
    # From the exact end, a small epsilon leaves it where it is.
    close = cg.barycenter(mixtures(moments), exact.gmm, method="entropic", epsilon=1e-4)
    np.testing.assert_allclose(close.objective, exact.objective, rtol=1e-3)
    np.testing.assert_allclose(close.gmm.means, exact.gmm.means, atol=1e-2)


@pytest.mark.slow
def test_default_epsilon_is_a_share_of_the_mean_cost(x64):
    moments, start = seed_problem()
    mean = np.mean([start[2] @ bures_cost(start, m) @ m[2] for m in moments])
    default = cg.barycenter(mixtures(moments), mixture(start), method="entropic")
    given = cg.barycenter(mixtures(moments), mixture(start), method="entropic", epsilon=1e-2 * mean)
    np.testing.assert_allclose(default.objective, given.objective, rtol=1e-9)


def test_statuses(x64):
    moments, start = seed_problem()
    gmms, init = mixtures(moments), mixture(start)
    found = cg.barycenter(gmms, init)
    steps = int(found.n_steps)
    assert int(found.status) == cg.Status.CONVERGED and found.converged and 0 < steps < 100
    assert found.history.objective.shape == (101,)
    assert falls(found.history, steps)
    found.raise_if_failed()
    all_done = cg.barycenter(gmms, init, tol=0)
    assert int(all_done.status) == cg.Status.STEPS_DONE and int(all_done.n_steps) == 100 and not all_done.converged
    assert np.isfinite(all_done.history.objective).all()
    all_done.raise_if_failed()
    # Started where it ended, there is nothing left to do.
    assert int(cg.barycenter(gmms, all_done.gmm).n_steps) == 1
    stopped = cg.barycenter(gmms, init, max_steps=1, tol=1e-300)
    assert int(stopped.status) == cg.Status.NOT_CONVERGED and int(stopped.n_steps) == 1
    np.testing.assert_allclose(stopped.history.objective, found.history.objective[:2], rtol=1e-12)
    with pytest.raises(cg.FitError, match="allow more steps"):
        stopped.raise_if_failed()


def test_one_start_that_is_not_finite_does_not_win(x64):
    moments, start = seed_problem()
    wild = mixture((start[0] * 1e200, *start[1:]))
    found = cg.barycenter(mixtures(moments), [wild, mixture(start), *[wild] * 6])  # eight, as above: one compilation
    assert int(found.start) == 1 and found.converged
    alone = cg.barycenter(mixtures(moments), wild)
    assert int(alone.status) == cg.Status.NOT_FINITE
    with pytest.raises(cg.FitError, match="not finite"):
        alone.raise_if_failed()


def test_starts_of_several_sizes(x64):
    """Smaller starts are padded: the best end is that of the larger one, alone."""
    moments, start = seed_problem()
    small = mixture((*(part[:2] for part in start[:2]), np.full(2, 0.5)))
    found = cg.barycenter(mixtures(moments), [small, mixture(start), *[small] * 6])
    alone = cg.barycenter(mixtures(moments), mixture(start))
    assert int(found.start) == 1 and found.gmm.n_components == 6
    np.testing.assert_allclose(found.objective, alone.objective, rtol=1e-12)


def test_vmap_and_jit_equal_the_loop(x64):
    problems = [[random_mixture(10 * s + b, k, 2, shift=b) for b, k in enumerate(SIZES)] for s in range(4)]
    starts = [mixture((*host(random_mixture(200 + s, 6, 2))[:2], np.full(6, 1 / 6))) for s in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(problems, starts))
    tols = np.array([1e-2, 1e-4, 1e-7, 1e-12])
    batched = jax.jit(jax.vmap(lambda gmms, init, tol: cg.barycenter(gmms, init, tol=tol)))(*stacked, tols)
    assert batched.message == cg.Status.CONVERGED.message
    for s, (gmms, init) in enumerate(zip(problems, starts)):
        one = cg.barycenter(gmms, init, tol=tols[s])
        assert int(one.n_steps) == int(batched.n_steps[s])
        np.testing.assert_allclose(batched.objective[s], one.objective, rtol=1e-10)
        np.testing.assert_allclose(batched.gmm.means[s], one.gmm.means, atol=1e-8)
        np.testing.assert_allclose(batched.gmm.covariances[s], one.gmm.covariances, atol=1e-8)
        np.testing.assert_allclose(batched.history.objective[s], one.history.objective, rtol=1e-10)


def test_one_compilation_over_a_sweep(x64):
    from coupled_gmm.barycenters.barycenter import _barycenter

    moments, start = seed_problem()
    gmms, init = mixtures(moments), mixture(start)
    cg.barycenter(gmms, init)
    before = _barycenter._cache_size()
    for coefficients in (None, [1, 2, 3], np.ones(3, np.float32)):
        for tol in (0, 1e-3, np.float32(1e-5)):
            cg.barycenter(gmms, init, coefficients=coefficients, tol=tol)
    cg.barycenter(tuple(gmms), [init])
    assert _barycenter._cache_size() == before


def test_float32_is_close():
    moments, start = seed_problem()
    single = cg.barycenter(mixtures(moments), mixture(start))
    assert single.gmm.dtype == jnp.float32 and single.converged
    assert falls(single.history, int(single.n_steps), 1e-6)
    with jax.enable_x64(True):
        double = cg.barycenter(mixtures(moments), mixture(start))
        np.testing.assert_allclose(objective(single.gmm, moments), double.objective, rtol=1e-6)
        np.testing.assert_allclose(single.gmm.means, double.gmm.means, atol=1e-4)
        np.testing.assert_allclose(single.gmm.covariances, double.gmm.covariances, atol=1e-4)
        mixed = jax.eval_shape(lambda: cg.barycenter([*mixtures(moments)[:2], single.gmm], mixture(start)))
        assert mixed.gmm.dtype == jnp.float64


def test_many_components_are_solved_on_the_host(x64):
    """Beyond 64 components the plans come from POT, through a callback."""
    moments = [host(random_mixture(b, k, 2, shift=b)) for b, k in enumerate((70, 3))]
    start = host(random_mixture(9, 4, 2))
    found = cg.barycenter(mixtures(moments), mixture(start), max_steps=3, tol=0)
    assert falls(found.history, 3)
    expected = twin(moments, start, [0.5, 0.5], "joint", 3)
    np.testing.assert_allclose(found.gmm.means, expected[0], atol=1e-6)
    np.testing.assert_allclose(found.gmm.covariances, expected[1], atol=1e-6)


def test_a_barycenter_refuses_to_be_differentiated(x64):
    moments, start = seed_problem()
    gmms, init = mixtures(moments), mixture(start)
    with pytest.raises(TypeError, match=r"can't be differentiated.*mw2_squared"):
        jax.grad(lambda gmms: cg.barycenter(gmms, init, max_steps=3).objective)(gmms)
    with pytest.raises(TypeError, match="can't be differentiated"):
        jax.jvp(lambda init: cg.barycenter(gmms, init, max_steps=3).gmm.means, (init,), (init,))


def bad(**changes):
    gmm, wide = random_mixture(0, 2, 2), random_mixture(0, 2, 3)
    arguments = {"gmms": [gmm, gmm], "init": gmm, **{k: v(gmm, wide) if callable(v) else v for k, v in changes.items()}}
    return cg.barycenter(arguments.pop("gmms"), arguments.pop("init"), **arguments)


BAD = [
    ({"gmms": []}, ValueError, "^gmms: the list is empty; give at least one"),
    ({"gmms": lambda g, w: {"a": g}}, TypeError, "^gmms: expected a list, got dict"),
    ({"gmms": lambda g, w: [g, 1]}, TypeError, r"^gmms\[1\]: expected a GaussianMixture, got int"),
    ({"gmms": lambda g, w: [g, w]}, ValueError, r"^gmms\[1\]: has 3 features and gmms\[0\] has 2; .*marginal"),
    ({"init": lambda g, w: w}, ValueError, "^init: has 3 features, and the mixtures have 2"),
    ({"init": lambda g, w: [g, w]}, ValueError, r"^init\[1\]: has 3 features"),
    ({"init": []}, ValueError, "^init: the list is empty; give at least one start"),
    ({"init": None}, TypeError, "^init: expected a list, got NoneType"),
    ({"init": [None]}, TypeError, r"^init\[0\]: expected a GaussianMixture, got NoneType"),
    ({"projection": "wasserstein"}, ValueError, "^projection: expected one of 'joint', 'bures', 'euclidean', got"),
    ({"projection": None}, ValueError, "^projection: expected one of"),
    ({"method": "sinkhorn"}, ValueError, "^method: expected one of 'exact', 'entropic', got 'sinkhorn'"),
    ({"epsilon": 0.1}, ValueError, "^epsilon: goes with method 'entropic' only; drop it"),
    ({"method": "entropic", "epsilon": 0.0}, ValueError, "^epsilon: must be finite and above 0, got 0"),
    ({"method": "entropic", "epsilon": "x"}, TypeError, "^epsilon: expected a real number"),
    ({"method": "entropic", "learn_weights": True}, ValueError, "^learn_weights: needs exact plans; drop"),
    ({"coefficients": [1, -1]}, ValueError, "^coefficients: 1 weights are negative"),
    ({"coefficients": [0, 0]}, ValueError, "^coefficients: all weights are zero"),
    ({"coefficients": [1, 2, 3]}, ValueError, r"^coefficients: expected shape \(2,\), got \(3,\)"),
    ({"coefficients": [1, np.nan]}, ValueError, "^coefficients: 1 of 2 values are NaN"),
    ({"coefficients": "ab"}, TypeError, "^coefficients: expected real numbers|^coefficients: .*shape"),
    ({"max_steps": 0}, ValueError, "^max_steps: must be at least 1, got 0"),
    ({"max_steps": 10**12}, ValueError, "^max_steps: must be at most 1000000, got 1000000000000"),
    ({"max_steps": 2.0}, TypeError, "^max_steps: expected an integer, got 2.0"),
    ({"tol": -1e-3}, ValueError, "^tol: must be finite and at least 0"),
    ({"tol": np.nan}, ValueError, "^tol: must be"),
    ({"tol": [1e-3, 1e-4]}, TypeError, r"^tol: expected one real number, got list of shape \(2,\)"),
    ({"tol": "small"}, TypeError, "^tol: expected a real number"),
]


@pytest.mark.parametrize(("changes", "error", "match"), BAD, ids=map(str, range(len(BAD))))
def test_bad_arguments(monkeypatch, changes, error, match):
    import sys

    def entered(*_):
        raise AssertionError("a program was entered")

    monkeypatch.setattr(sys.modules["coupled_gmm.barycenters.barycenter"], "_barycenter", entered)
    with pytest.raises(error, match=match):
        bad(**changes)
