"""The mixture at any time: the node's at its time, the geodesic's on an edge, and all paths of components summed in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import chain_fit, mixtures
from problems import points
from scipy.interpolate import CubicSpline

import coupled_gmm as cg
from coupled_gmm.core.tree import unchecked
from coupled_gmm.courses import densities


@pytest.fixture
def no_floor(monkeypatch):
    """The law of spline paths alone, without what is left where they cross."""
    densities._mixture_at.clear_cache()
    monkeypatch.setattr(densities, "_LEAST", 0.0)
    yield
    densities._mixture_at.clear_cache()


def by_all_paths(fit, t):
    """Masses, means and covariances of X(t) given the two components around t, over all paths of components; couplings by SVD."""
    knots = np.asarray(fit.times)
    weights = CubicSpline(knots, np.eye(len(knots)), bc_type="not-a-knot")(t)
    i = int(np.searchsorted(knots, t, side="right")) - 1
    plans = [np.asarray(fit.plan((v, v + 1)).matrix) for v in range(len(knots) - 1)]
    forward, backward = [p / p.sum(1, keepdims=True) for p in plans], [p / p.sum(0) for p in plans]
    gmms = [jax.tree.map(np.asarray, gmm) for gmm in fit.gmms]
    factors = [[np.linalg.cholesky(s) for s in gmm.covariances] for gmm in gmms]

    def coupling(v, k, m):
        left, _, right = np.linalg.svd(factors[v][k].T @ factors[v + 1][m])
        return left @ right

    found = {}
    for path in itertools.product(*(range(gmm.n_components) for gmm in gmms)):
        mass = np.prod([backward[v][path[v], path[v + 1]] for v in range(i)])
        mass *= np.prod([forward[v][path[v], path[v + 1]] for v in range(i + 1, len(plans))])
        turns = {i: np.eye(gmms[0].n_features)}  # coordinates at each node, of those at node i
        for v in range(i - 1, -1, -1):
            turns[v] = coupling(v, path[v], path[v + 1]) @ turns[v + 1]
        for v in range(i, len(plans)):
            turns[v + 1] = coupling(v, path[v], path[v + 1]).T @ turns[v]
        factor = sum(weights[v] * factors[v][path[v]] @ turns[v] for v in range(len(knots)))
        mean = sum(weights[v] * gmms[v].means[path[v]] for v in range(len(knots)))
        found.setdefault((path[i], path[i + 1]), []).append((mass, mean, factor @ factor.T))
    moments = {}
    for pair, each in found.items():
        masses, means, covariances = (np.array(column) for column in zip(*each))
        masses = masses / masses.sum()
        mean = masses @ means
        spread = np.einsum("p,pi,pj->ij", masses, means - mean, means - mean)
        moments[pair] = mean, np.einsum("p,pij->ij", masses, covariances) + spread
    u = (t - knots[i]) / (knots[i + 1] - knots[i])
    a, b = gmms[i].weights, gmms[i + 1].weights
    return (1 - u) * a[:, None] * forward[i] + u * b * backward[i], moments


def check(gmm, fit, t, **tolerance):
    masses, moments = by_all_paths(fit, t)
    k = int(gmm.n_components**0.5)
    weights = np.asarray(gmm.weights).reshape(k, k)
    np.testing.assert_allclose(weights[: masses.shape[0], : masses.shape[1]], masses, **tolerance)
    assert weights.sum() == pytest.approx(1, abs=1e-3)
    for (one, other), (mean, covariance) in moments.items():
        np.testing.assert_allclose(gmm.means[one * k + other], mean, **tolerance)
        np.testing.assert_allclose(gmm.covariances[one * k + other], covariance, **tolerance)


@pytest.mark.parametrize("tau", [1.0, pytest.param(0.7, marks=pytest.mark.slow)])
def test_moments_of_all_paths(tau, x64, no_floor):
    fit = chain_fit(mixtures((2, 3, 1, 2), d=3), epsilon=20.0, tau=tau)  # plans that branch
    assert np.sort(np.asarray(fit.plan(0).conditionals()[0]))[:, -1].min() < 0.9
    at = jax.jit(lambda t: cg.mixture_at(fit, t, ends="not-a-knot"))
    for t in (0.4, 1.7, 3.2):
        check(at(t), fit, t, atol=1e-9)


QUICK = (3, "singular", "float32")
SLOW = [one for one in itertools.product((1, 2, 3), ("regular", "singular"), ("float32", "float64")) if one != QUICK]


@pytest.mark.parametrize(("d", "kind", "dtype"), [QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_nodes_and_geodesics(d, kind, dtype):
    """At a node's time the node's mixture; straight lines are `interpolate`; covariances semi-definite, singular ones too."""
    with jax.enable_x64(dtype == "float64"):
        check_nodes_and_geodesics(
            chain_fit(mixtures((2, 3, 2), d, kind == "singular"), times=(0, 1, 3)), np.finfo(dtype).eps
        )


def check_nodes_and_geodesics(fit, precision):
    definite = all((np.asarray(gmm.cholesky).diagonal(axis1=1, axis2=2) > 0).all() for gmm in fit.gmms)
    at = {
        method: jax.jit(lambda t, method=method: cg.mixture_at(fit, t, method=method))
        for method in ("spline", "geodesic")
    }
    for v, t in enumerate((0, 1, 3)):
        for method in at:
            same(at[method](t), fit.gmms[v], precision)
    for t, edge, u in ((0.3, 0, 0.3), (2.5, 1, 0.75)):
        same(at["geodesic"](t), cg.interpolate(fit.plan(edge), u), precision)
        spectra = np.linalg.eigvalsh(np.asarray(at["spline"](t).covariances, np.float64))
        assert (spectra >= -1e3 * precision * spectra.max()).all()
        assert not definite or (spectra > 0).all()


def same(gmm, other, eps):
    """The same measure, by the integrals of a few functions: densities don't exist where covariances are singular."""
    for one, two in zip(integrals(gmm), integrals(other)):
        np.testing.assert_allclose(one, two, atol=2e3 * eps * (1 + np.abs(two).max()))


def integrals(gmm):
    """Characteristic function at some frequencies, and the mean and covariance."""
    means, covariances, weights = (np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    weights = weights / weights.sum()
    w = np.random.RandomState(0).randn(40, means.shape[1])
    exponents = 1j * w @ means.T - 0.5 * np.einsum("fi,kij,fj->fk", w, covariances, w)
    return np.exp(exponents) @ weights, weights @ means


def test_where_paths_cross_a_density_is_left():
    """Narrow between wide: splines of factors overshoot through 0, and there alone a little of the geodesic's is left."""
    deviations = [3.0, 0.05, 0.05, 3.0]
    gmms = [cg.GaussianMixture.from_moments([[v]], [[[s**2]]], [1.0]) for v, s in enumerate(deviations)]
    fit = chain_fit(gmms, epsilon=0.1, times=range(4))
    t = jnp.linspace(0, 3, 301)
    got = np.sqrt(jax.vmap(lambda t: cg.mixture_at(fit, t).covariances.ravel())(t)).ravel()
    spline = CubicSpline(range(4), deviations, bc_type=((2, 2.95), (2, 2.95)))(t)
    assert spline.min() < 0 < 1e-3 < got.min(), "the paths cross, and the mixture does not vanish"
    away = np.abs(spline) > 0.3
    np.testing.assert_allclose(got[away], np.abs(spline)[away], rtol=3e-3)


@pytest.mark.slow
def test_the_law_of_random_trajectories(x64):
    """A hundred thousand of them, from points of the first node: mean and covariance of all, within five standard errors."""
    fit = chain_fit(mixtures((2, 2, 2)), epsilon=3.0, times=(0, 1, 3))
    x = points(fit.gmms[0], 100_000)
    gmm = cg.mixture_at(fit, 1.6)
    (y,) = np.asarray(cg.trajectories(fit, x, [1.6], key=jax.random.key(0)))
    covariance = np.asarray(gmm.covariance())
    errors = (y.mean(0) - np.asarray(gmm.mean())) / np.sqrt(np.diag(covariance) / len(y))
    assert np.abs(errors).max() < 5
    np.testing.assert_allclose(np.cov(y.T), covariance, atol=0.03 * covariance.max())


@pytest.mark.slow
def test_far_from_the_origin(x64):
    near, far = (chain_fit(mixtures((2, 2, 2), shift=shift), times=(0, 1, 3)) for shift in (0.0, 1e5))
    x = points(near.gmms[1], 30)
    np.testing.assert_allclose(
        cg.mixture_at(far, 1.5).log_prob(x + 1e5), cg.mixture_at(near, 1.5).log_prob(x), atol=1e-4
    )


def test_a_pair_of_unequal_sizes():
    """As `interpolate`, at any time and traced with the fit."""
    pair = cg.GaussianMixturePair(*mixtures((3, 2)), 1.0)
    fields = {"penalized_log_likelihood": None, "status": jnp.asarray(0), "n_steps": None, "history": None}
    fit = unchecked(cg.PairFit, pair=pair, plan=cg.solve_plan(pair), **fields)
    at = jax.jit(lambda fit, t: cg.mixture_at(fit, t))
    for t in (0.0, 0.4, 1.0):
        same(at(fit, t), cg.interpolate(fit.plan, t), 1e-7)


def test_a_fit_and_its_course_inside_one_program():
    """Clouds are traced, the graph is not: the fit can be read there by its edges and times, as it can outside."""
    rng = np.random.RandomState(0)
    clouds = np.float32([np.concatenate([rng.randn(30, 1) + i, rng.randn(20, 1) + 9]) for i in range(3)])
    start = cg.init_gmm(jax.random.key(0), np.concatenate(clouds), 2)

    def course(clouds):
        graph = cg.chain([start] * 3, times=[0, 1, 3])
        fit = cg.fit_graph(list(clouds), graph, relative_weight=0.1, em_steps=3, fidelity=False)
        return cg.mixture_at(fit, 0.5), cg.trajectories(fit, clouds[0], [0.5, 2.0]), fit.compose(0, 2).matrix

    for inside, outside in zip(jax.tree.leaves(jax.jit(course)(clouds)), jax.tree.leaves(course(clouds)), strict=True):
        np.testing.assert_allclose(inside, outside, rtol=1e-4, atol=1e-5)
