"""Legal but hard: every case goes through both fits without a NaN, and equal problems have equal ends."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

import coupled_gmm as cg
from coupled_gmm.transport import limits

# What coupling has cost is told in test_fidelity, and compiled there.
fit_pair = functools.partial(cg.fit_pair, fidelity=False)
fit_graph = functools.partial(cg.fit_graph, fidelity=False)

N, D, K, STEPS, EVALUATIONS = 60, 2, 3, 5, 10


@dataclasses.dataclass(frozen=True)
class Way:
    """A compiled program: precision, balanced or not, optimiser. Four cover every pair of choices."""

    x64: bool
    tau: float
    optimizer: Any

    def __str__(self):
        kind = "balanced" if self.tau == 1 else "unbalanced"
        return f"{'float64' if self.x64 else 'float32'}-{kind}-{'adam' if self.optimizer else 'default'}"


WAYS = [
    Way(False, 1.0, None),
    Way(False, 0.9, optax.adam),
    Way(True, 1.0, optax.adam),
    Way(True, 0.9, None),
]
UNBALANCED = Way(False, 0.9, None)
# Each is a program that takes seconds to compile: the float32 ones run always.
MARKED = [pytest.param(way, id=str(way), marks=[pytest.mark.slow] if way.x64 else []) for way in WAYS]


@dataclasses.dataclass
class Problem:
    """Two clouds with weights, and the (means, covariances, weights) where their mixtures start."""

    x0: np.ndarray
    x1: np.ndarray
    start0: tuple
    start1: tuple
    w0: np.ndarray
    w1: np.ndarray
    epsilon: float | None = None
    transport_weight: float = 0.1

    def fit_pair(self, way: Way):
        gmms = [cg.GaussianMixture.from_moments(*start) for start in (self.start0, self.start1)]
        rate = {} if way.optimizer is None else {"optimizer": way.optimizer, "learning_rate": 1e-2}
        return fit_pair(
            self.x0,
            self.x1,
            cg.GaussianMixturePair(*gmms, self.epsilon, way.tau),
            transport_weight=self.transport_weight,
            point_weights0=self.w0,
            point_weights1=self.w1,
            em_steps=STEPS,
            m_steps=EVALUATIONS,
            **rate,
        )

    def fit_gmm(self, **options):
        gmm = cg.GaussianMixture.from_moments(*self.start0)
        options = {"max_steps": STEPS, "tol": 0, **options}
        return cg.fit_gmm(self.x0, gmm, point_weights=self.w0, **options)


def clusters(seed: int, n: int = N, d: int = D, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Points about k centres of a lattice, and their labels."""
    rng = np.random.RandomState(seed)
    labels = np.arange(n) % k
    centres = 4 * np.stack([np.arange(k), *rng.rand(d - 1, k)], axis=1)
    return centres[labels] + rng.randn(n, d) * np.linspace(0.5, 1, d), labels


def moments(x: np.ndarray, labels: np.ndarray, floor: float = 0.1) -> tuple:
    """A start: moments of labelled points, with a floor."""
    parts = [x[labels == k] for k in range(labels.max() + 1)]
    covariances = [np.cov(part.T, bias=True).reshape(x.shape[1], -1) + floor * np.eye(x.shape[1]) for part in parts]
    return np.stack([part.mean(0) for part in parts]), np.stack(covariances), np.bincount(labels) / len(labels)


def plain(n: int = N, d: int = D, k0: int = K, k1: int = K, **changes) -> Problem:
    (x0, labels0), (x1, labels1) = clusters(0, n, d, k0), clusters(1, n, d, k1)
    starts = moments(x0, labels0), moments(x1, labels1)
    return dataclasses.replace(Problem(x0, x1, *starts, np.ones(n), np.ones(n)), **changes)


def duplicates() -> Problem:
    """Every point equals one of K."""
    problem = plain()
    points = [start[0][np.arange(N) % K] for start in (problem.start0, problem.start1)]
    return dataclasses.replace(problem, x0=points[0], x1=points[1])


def one_value() -> Problem:
    """All but one of the points of the first cloud are the same."""
    x0 = np.zeros((N, D))
    x0[0] = 1
    return dataclasses.replace(plain(), x0=x0)


def empty_component() -> Problem:
    """No point has any probability of coming from the second component, in any precision."""
    problem = plain()
    means, *rest = problem.start0
    return dataclasses.replace(problem, start0=(means + np.array([[0, 0], [3e3, 0], [0, 0]]), *rest))


def zero_weights() -> Problem:
    """No mass in the middle component of the first mixture, the last of the second, and a fifth of the points."""
    problem = plain()
    (m0, s0, w0), (m1, s1, w1) = problem.start0, problem.start1
    w0, w1 = w0 * [1, 0, 1], w1 * [1, 1, 0]
    points = np.where(np.arange(N) % 5, 1.0, 0)
    starts = (m0, s0, w0 / w0.sum()), (m1, s1, w1 / w1.sum())
    return dataclasses.replace(problem, start0=starts[0], start1=starts[1], w0=points, w1=points[::-1].copy())


def singular_zero_weight() -> Problem:
    """The absent components have no density.

    Means are numbers of float32: beside no covariance the rest of a mean is kept as well, and that is another program.
    """
    problem = zero_weights()
    (m0, s0, w0), (m1, s1, w1) = problem.start0, problem.start1
    m0, m1 = (np.asarray(m, np.float32).astype(float) for m in (m0, m1))
    absent = np.array([1, 0, 1])[:, None, None], np.array([1, 1, 0])[:, None, None]
    return dataclasses.replace(problem, start0=(m0, s0 * absent[0], w0), start1=(m1, s1 * absent[1], w1))


def scales() -> Problem:
    """Standard deviations of 1e-4 beside 1e4."""
    problem, unit = plain(), np.array([1e-4, 1e4])

    def scaled(start):
        return start[0] * unit, start[1] * unit * unit[:, None], start[2]

    starts = scaled(problem.start0), scaled(problem.start1)
    return plain(x0=problem.x0 * unit, x1=problem.x1 * unit, start0=starts[0], start1=starts[1], transport_weight=1e-9)


def offset(by: float = 2.0**14) -> Problem:
    """1e4 standard deviations from the origin, on a grid that float32 holds there."""

    def moved(points):
        return np.round(2**8 * points) / 2**8 + by

    problem = plain()
    starts = [(moved(start[0]), *start[1:]) for start in (problem.start0, problem.start1)]
    return plain(x0=moved(problem.x0), x1=moved(problem.x1), start0=starts[0], start1=starts[1])


def one_cluster() -> Problem:
    """Three components for one cluster, all starting on it."""
    problem, rng = plain(), np.random.RandomState(0)
    means = 1e-3 * rng.randn(K, D)
    return dataclasses.replace(problem, x0=rng.randn(N, D), start0=(means, *problem.start0[1:]))


def equal_components() -> Problem:
    """Both mixtures are one Gaussian, three times: all costs are the same, and nothing tells components apart."""
    problem = plain()
    start = np.full((K, D), 2.0), np.broadcast_to(4 * np.eye(D), (K, D, D)), np.full(K, 1 / K)
    return dataclasses.replace(problem, start0=start, start1=start, epsilon=None)


def same_on_both_sides() -> Problem:
    problem = plain()
    return dataclasses.replace(problem, x1=problem.x0, start1=problem.start0)


def outlier() -> Problem:
    """A component that starts on a single point far out, and has nothing else to explain."""
    problem = plain()
    x0, (means, covariances, weights) = problem.x0.copy(), problem.start0
    x0[0], means = 100.0, means.copy()
    means[1] = 100.0
    return dataclasses.replace(problem, x0=x0, start0=(means, covariances, weights))


def far_start() -> Problem:
    """Both mixtures start thirty standard deviations from the points and from each other."""
    problem = plain()
    (m0, s0, w0), (m1, s1, w1) = problem.start0, problem.start1
    return dataclasses.replace(problem, start0=(m0 + 30, s0, w0), start1=(m1 - 30, s1, w1))


CASES = [
    plain,
    duplicates,
    one_value,
    empty_component,
    zero_weights,
    singular_zero_weight,
    scales,
    offset,
    one_cluster,
    equal_components,
    same_on_both_sides,
    outlier,
    far_start,
]
SHAPES = [
    pytest.param(functools.partial(plain, d=1, k0=1), WAYS[0], id="d1-one-against-three"),
    pytest.param(functools.partial(plain, d=1, k0=1, k1=1), WAYS[3], id="d1-one-component", marks=pytest.mark.slow),
    pytest.param(
        functools.partial(plain, n=10, d=3, k0=4, k1=2),
        WAYS[1],
        id="fewer-points-than-unknowns",
        marks=pytest.mark.slow,
    ),
]


def assert_finite(tree: Any, n_steps: int) -> None:
    """Every leaf, and of a history its rows up to the last step; past it they are NaN, all of them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
        if ".history" in name:
            assert np.isfinite(leaf[:n_steps]).all(), name
            assert np.isnan(leaf[n_steps:]).all(), name
        elif name.endswith((".rho", ".f", ".g")):
            assert not np.isnan(leaf).any(), name
        else:
            assert np.isfinite(leaf).all(), name


def check_pair(fit, way: Way) -> None:
    assert fit.n_steps == STEPS
    assert_finite(fit, STEPS)
    plan = fit.plan
    assert_finite(
        (plan.matrix, plan.normalized_matrix, plan.transport_cost, plan.regularized_cost, plan.reweighting()), STEPS
    )
    for gmm in (fit.pair.gmm0, fit.pair.gmm1):
        np.testing.assert_allclose(np.sum(gmm.weights), 1, rtol=1e-5)
        assert (np.asarray(gmm.weights) >= 0).all()
        present = np.asarray(gmm.weights) > 0
        assert (np.linalg.eigvalsh(np.asarray(gmm.covariances, np.float64)[present]) > 0).all()
    if fit.status == cg.Status.SINGULAR:  # said only of what is: a variance within some roundings of nothing
        spectra = [
            np.linalg.eigvalsh(np.asarray(gmm.covariances, np.float64)) for gmm in (fit.pair.gmm0, fit.pair.gmm1)
        ]
        assert min((values[:, 0] / values[:, -1]).min() for values in spectra) < 20 * np.finfo(fit.pair.gmm0.dtype).eps
    else:
        assert fit.status == cg.Status.STEPS_DONE, fit.message
    if way.optimizer is None:
        values = np.array([*fit.history.penalized_log_likelihood, fit.penalized_log_likelihood], np.float64)
        slack = 1e-9 if way.x64 else 1e-6 * (1 + abs(values[:-1]))
        assert (np.diff(values) >= -slack).all(), values
        assert values[-1] > values[0] + 1e-3, "no start here is an optimum, and the fit did not move"


def rounding(way: Way) -> float:
    """How well two runs of equal problems agree: where an optimiser looks at values, a flat optimum hides sqrt(eps)."""
    if way.x64:
        return 1e-7
    return 1e-4 if way.optimizer else 5e-3


def assert_same_fit(fit, other, way: Way, components=(slice(None), slice(None)), location: float = 0) -> None:
    """Both ended in the same mixtures, plans and values; `components` picks those of the first to compare."""
    tolerance = rounding(way)
    pairs = [(fit.pair.gmm0, other.pair.gmm0), (fit.pair.gmm1, other.pair.gmm1)]
    for (gmm, expected), index in zip(pairs, components, strict=True):
        np.testing.assert_allclose(gmm.means[index], expected.means, rtol=tolerance, atol=max(tolerance, location))
        np.testing.assert_allclose(gmm.covariances[index], expected.covariances, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(gmm.weights[index], expected.weights, rtol=tolerance, atol=tolerance)
    matrix = np.asarray(fit.plan.matrix)[components[0]][:, components[1]]
    np.testing.assert_allclose(matrix, other.plan.matrix, rtol=tolerance, atol=tolerance)
    value = 1e-9 if way.x64 else 1e-5
    np.testing.assert_allclose(fit.penalized_log_likelihood, other.penalized_log_likelihood, rtol=value)
    np.testing.assert_allclose(fit.history.objective[0], other.history.objective[0], rtol=value)
    for name in ("q0", "q1", "transport"):
        rows = getattr(fit.history, name), getattr(other.history, name)
        np.testing.assert_allclose(*rows, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("case", "way"),
    [
        # Far from 0 is another program: always of single fits, and in test_offsets.py of a pair.
        pytest.param(case, way, id=f"{case.__name__}-{way}", marks=pytest.mark.slow if slow else ())
        for case in CASES
        for way in WAYS
        for slow in [way.x64 or case is offset]
    ],
)
def test_fit_pair(case, way):
    with jax.enable_x64(way.x64):
        check_pair(case().fit_pair(way), way)


def perturbed(problem: Problem, seed: int, unit: float) -> Problem:
    """Every input changed by up to four units of rounding: the same problem, other luck."""
    rng = np.random.RandomState(seed)

    def changed(values):
        return np.asarray(values) * (1 + unit * rng.randint(-4, 5, np.shape(values)))

    def start(means, covariances, weights):
        covariances, weights = changed(covariances), changed(weights)
        return changed(means), (covariances + np.swapaxes(covariances, -1, -2)) / 2, weights / weights.sum()

    return Problem(
        *(changed(x) for x in (problem.x0, problem.x1)),
        *(start(*s) for s in (problem.start0, problem.start1)),
        *(changed(w) for w in (problem.w0, problem.w1)),
        problem.epsilon and float(changed(problem.epsilon)),
        float(changed(problem.transport_weight)),
    )


def check_perturbed(case, way: Way, seeds) -> None:
    for seed in seeds:
        with jax.enable_x64(way.x64):
            fit = perturbed(case(), seed, float(np.finfo(np.float64 if way.x64 else np.float32).eps)).fit_pair(way)
            check_pair(fit, way)
            # Far inside the limit: what is near it passes by the luck of rounding.
            assert np.max(fit.history.marginal_error) < 0.3 * limits.MAX_MARGINAL_ERROR, seed


@pytest.mark.parametrize("way", [WAYS[0], UNBALANCED], ids=str)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.__name__, marks=[] if case is one_value else pytest.mark.slow) for case in CASES],
)
def test_three_perturbations(case, way):
    """Of `one_value` a component that has lost its points must not leave the data, nor end singular."""
    check_perturbed(case, way, range(3))


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, UNBALANCED], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_twenty_perturbations(case, way):
    check_perturbed(case, way, range(20))


@pytest.mark.parametrize(("case", "way"), SHAPES)
def test_fit_pair_of_other_shapes(case, way):
    with jax.enable_x64(way.x64):
        check_pair(case().fit_pair(way), way)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_fit_gmm(case, precision):
    fit = case().fit_gmm()
    assert_finite(fit, STEPS)
    assert fit.status == cg.Status.STEPS_DONE, fit.message
    np.testing.assert_allclose(np.sum(fit.gmm.weights), 1, rtol=1e-5)
    present = np.asarray(fit.gmm.weights) > 0
    assert (np.linalg.eigvalsh(np.asarray(fit.gmm.covariances, np.float64)[present]) > 0).all()


@pytest.mark.parametrize(("case", "way"), SHAPES[1:])
def test_fit_gmm_of_other_shapes(case, way):
    with jax.enable_x64(way.x64):
        fit = case().fit_gmm()
        assert_finite(fit, STEPS)
        assert fit.status == cg.Status.STEPS_DONE, fit.message


class TestEqualProblems:
    @pytest.mark.slow
    @pytest.mark.parametrize("way", WAYS[:2], ids=str)
    @pytest.mark.parametrize("case", [zero_weights, singular_zero_weight])
    def test_without_the_absent(self, case, way):
        """Components and points of weight zero change nothing; without them the program is another."""
        with jax.enable_x64(way.x64):
            problem = case()
            starts, clouds, weights, components = [], [], [], []
            for start, x, w in (
                (problem.start0, problem.x0, problem.w0),
                (problem.start1, problem.x1, problem.w1),
            ):
                components.append(np.flatnonzero(start[2]))
                starts.append(tuple(leaf[components[-1]] for leaf in start))
                clouds.append(x[w > 0])
                weights.append(w[w > 0])
            fit, alone = problem.fit_pair(way), Problem(*clouds, *starts, *weights).fit_pair(way)
            assert_same_fit(fit, alone, way, components)
            for gmm, index in zip((fit.pair.gmm0, fit.pair.gmm1), components, strict=True):
                np.testing.assert_array_equal(np.flatnonzero(gmm.weights), index)

    def test_single_fit_without_the_absent(self, x64):
        problem = singular_zero_weight()
        present, points = np.flatnonzero(problem.start0[2]), np.flatnonzero(problem.w0)
        fit = problem.fit_gmm()
        start = cg.GaussianMixture.from_moments(*(leaf[present] for leaf in problem.start0))
        alone = cg.fit_gmm(problem.x0[points], start, max_steps=STEPS, tol=0)
        for leaf, other in zip(jax.tree.leaves(fit.gmm), jax.tree.leaves(alone.gmm), strict=True):
            np.testing.assert_allclose(leaf[present], other, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(fit.history.log_likelihood, alone.history.log_likelihood, rtol=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("way", WAYS, ids=str)
    def test_offset(self, way):
        """Means carry the rounding of their own size; nothing else knows where the origin is."""
        with jax.enable_x64(way.x64):
            far, near = offset().fit_pair(way), offset(0.0).fit_pair(way)
            gmms = [dataclasses.replace(gmm, means=gmm.means - 2.0**14) for gmm in (far.pair.gmm0, far.pair.gmm1)]
            back = dataclasses.replace(far, pair=far.pair.replace(*gmms))
            assert_same_fit(back, near, way, location=0 if way.x64 else 2e-3)

    @pytest.mark.parametrize("way", [MARKED[0], MARKED[3]])
    def test_order_and_unit(self, way):
        """Points in another order, in a unit that is no power of two."""
        order, unit = np.random.RandomState(0).permutation(N), 2.54e3

        def scaled(means, covariances, weights):
            return unit * means, unit**2 * covariances, weights

        with jax.enable_x64(way.x64):
            problem, tolerance = plain(), rounding(way)
            near = problem.fit_pair(way)
            fit = dataclasses.replace(
                problem,
                x0=unit * problem.x0[order],
                x1=unit * problem.x1[order],
                start0=scaled(*problem.start0),
                start1=scaled(*problem.start1),
                transport_weight=problem.transport_weight / unit**2,
            ).fit_pair(way)
            value = fit.penalized_log_likelihood + 2 * D * np.log(unit)
            np.testing.assert_allclose(value, near.penalized_log_likelihood, rtol=1e-9 if way.x64 else 1e-5)
            np.testing.assert_allclose(fit.plan.matrix, near.plan.matrix, atol=tolerance)
            for gmm, expected in ((fit.pair.gmm0, near.pair.gmm0), (fit.pair.gmm1, near.pair.gmm1)):
                np.testing.assert_allclose(gmm.means / unit, expected.means, atol=tolerance)
                np.testing.assert_allclose(gmm.covariances / unit**2, expected.covariances, atol=tolerance)
                np.testing.assert_allclose(gmm.weights, expected.weights, atol=tolerance)

    def test_offset_of_a_single_fit(self):
        far, near = offset().fit_gmm(), offset(0.0).fit_gmm()
        np.testing.assert_allclose(far.gmm.means - 2.0**14, near.gmm.means, atol=2e-3)
        np.testing.assert_allclose(far.gmm.covariances, near.gmm.covariances, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(far.gmm.weights, near.gmm.weights, rtol=1e-4)
        np.testing.assert_allclose(far.history.log_likelihood, near.history.log_likelihood, rtol=1e-5)

    def test_feature_scales_of_a_single_fit(self):
        """EM does not know units: the fit of scaled features is the scaled fit."""
        unit = np.array([1e-4, 1e4])
        scaled, near = scales().fit_gmm(), plain().fit_gmm()
        np.testing.assert_allclose(scaled.gmm.means / unit, near.gmm.means, rtol=1e-4)
        np.testing.assert_allclose(
            scaled.gmm.covariances / unit / unit[:, None], near.gmm.covariances, rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(scaled.gmm.weights, near.gmm.weights, rtol=1e-4)

    @pytest.mark.parametrize("way", [MARKED[0], MARKED[3]])
    def test_sides_are_alike(self, way):
        """With the clouds and starts exchanged, the ends are exchanged too."""
        with jax.enable_x64(way.x64):
            problem = plain()
            fit = problem.fit_pair(way)
            other = Problem(problem.x1, problem.x0, problem.start1, problem.start0, problem.w1, problem.w0).fit_pair(
                way
            )
            exchanged = dataclasses.replace(
                other,
                pair=other.pair.replace(other.pair.gmm1, other.pair.gmm0),
                plan=dataclasses.replace(
                    other.plan,
                    pair=other.plan.pair.replace(other.plan.pair.gmm1, other.plan.pair.gmm0),
                    cost=other.plan.cost.T,
                    potentials=other.plan.potentials[::-1],
                ),
                history=dataclasses.replace(other.history, q=other.history.q[:, ::-1]),
            )
            assert_same_fit(exchanged, fit, way)


def frames(n_frames: int, seed: int) -> list[np.ndarray]:
    """Small clouds of three clusters that drift, of unequal sizes and shares."""
    rng = np.random.RandomState(seed)
    centres, drift, logits = 4 * rng.randn(K, D), 0.25 * rng.randn(K, D), 0.3 * rng.randn(K)
    clouds = []
    for t in range(n_frames):
        shares = np.exp(logits + 0.05 * t * np.linspace(1, -1, K))
        labels = rng.choice(K, rng.randint(30, 200), p=shares / shares.sum())
        noise = rng.randn(len(labels), D) * np.array([0.6, 1.0, 0.4])[labels][:, None]
        clouds.append(centres[labels] + t * drift[labels] + noise)
    return clouds


def fit_frames(clouds: list[np.ndarray], epsilon: float | None, weight: float):
    pooled = np.concatenate(clouds)
    start = cg.fit_gmm(pooled, cg.init_gmm(jax.random.key(0), pooled, K)).gmm
    edges = [(i, i + 1) for i in range(len(clouds) - 1)]
    graph = cg.MixtureGraph.from_mixtures([start] * len(clouds), edges, epsilon=epsilon, edge_weights=weight)
    return fit_graph(clouds, graph)


@pytest.mark.slow
def test_plans_between_small_frames_meet_their_marginals_in_float32():
    """A chain's plans are carried from step to step; their potentials must not drift away and be rounded coarsely."""
    clouds = frames(24, 0)
    for epsilon, weight in [(None, 0.1), (None, 1.0), (0.1, 0.1), (0.1, 1.0), (1.0, 1.0)]:
        fit = fit_frames(clouds, epsilon, weight)
        assert fit.status == cg.Status.STEPS_DONE, (epsilon, weight, fit.message)
        assert np.max(fit.history.marginal_error) < 0.5 * limits.MAX_MARGINAL_ERROR, (epsilon, weight)


@pytest.mark.slow
def test_plans_between_frames_at_small_epsilon(precision):
    """Down to 4e-7 of the costs: a fit whose plans missed their marginals says so, and the remedy of the message helps."""
    clouds = frames(24, 1)
    for epsilon in (0.1, 0.01, 1e-3, 1e-4):
        fit = fit_frames(clouds, epsilon, 0.01)
        met = np.max(missed(fit.plans)) <= limits.MAX_MARGINAL_ERROR
        assert fit.status == (cg.Status.STEPS_DONE if met else cg.Status.PLAN_NOT_CONVERGED), (epsilon, fit.message)
        assert met or epsilon < 1e-3, epsilon


def missed(plans: cg.Plan) -> np.ndarray:
    """L1 distance of plans' marginals from the masses, in NumPy."""
    matrix, pair = np.asarray(plans.matrix, np.float64), plans.pair
    rows, columns = matrix.sum(2) - pair.gmm0.weights, matrix.sum(1) - pair.gmm1.weights
    return np.abs(rows).sum(1) + np.abs(columns).sum(1)


class TestCollapse:
    """A component on two points: held by the floor, and without one a failure that says so."""

    def problem(self) -> Problem:
        problem = plain()
        means, covariances, weights = problem.start0
        x0, covariances = problem.x0.copy(), covariances.copy()
        x0[:2] = [[50, 50], [51, 52]]
        means = means.copy()
        means[1] = [50.5, 51]
        return dataclasses.replace(problem, x0=x0, start0=(means, covariances, weights))

    def test_with_a_floor(self, precision):
        fit = self.problem().fit_gmm(ridge=1e-6)
        assert_finite(fit, STEPS)
        assert fit.status == cg.Status.STEPS_DONE, fit.message
        lowest = np.linalg.eigvalsh(np.asarray(fit.gmm.covariances[1], np.float64))[0]
        floor = 1e-6 * self.problem().x0.var(0)
        assert 0.5 * floor.min() < lowest < 2 * floor.max()

    def test_without(self, x64):
        fit = self.problem().fit_gmm(ridge=0)
        assert fit.status == cg.Status.NOT_FINITE
        assert not fit.converged
        steps, values = int(fit.n_steps), np.asarray(fit.history.log_likelihood)
        assert np.isfinite(values[:steps]).all()
        assert np.isnan(values[steps:]).all()
        with pytest.raises(cg.FitError, match="raise ridge"):
            fit.raise_if_failed()
