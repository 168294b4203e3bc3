"""Points on their way through a chain: maps chained by hand, SciPy's splines through them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import TIMES, chain_fit, fit_of, mixtures
from problems import points, random_mixture
from scipy.interpolate import CubicSpline

import coupled_gmm as cg

T = np.array([0, 0.3, 1, 2.2, 3, 3.9, 4])


@pytest.fixture(scope="module")
def fit():
    return chain_fit()


def images(fit, x, key=None):
    found = [np.asarray(x)]
    for v in range(len(fit.gmms) - 1):
        how = {} if key is None else {"method": "random", "key": jax.random.fold_in(key, v)}
        found.append(np.asarray(cg.map_points(fit.plan((v, v + 1)), found[-1], **how)))
    return np.stack(found)


def test_a_spline_through_the_chained_maps(fit):
    x = points(fit.gmms[0], 30)
    found = images(fit, x)
    for ends in ("natural", "not-a-knot"):
        got = cg.trajectories(fit, x, T, ends=ends)
        np.testing.assert_allclose(got, CubicSpline(TIMES, found, bc_type=ends)(T), atol=2e-5)
    np.testing.assert_allclose(cg.trajectories(fit, x, TIMES), found, atol=2e-5)
    line = [[np.interp(T, TIMES, path) for path in paths] for paths in found.transpose(1, 2, 0)]
    np.testing.assert_allclose(cg.trajectories(fit, x, T, method="geodesic"), np.moveaxis(line, 2, 0), atol=2e-5)
    key = jax.random.key(3)
    got = cg.trajectories(fit, x, TIMES, key=key)
    np.testing.assert_allclose(got, images(fit, x, key), atol=2e-5)
    assert np.abs(got[-1] - found[-1]).max() > 0.1


def test_points_are_pushed_and_pulled(fit):
    """Those of a node in the middle: back by reverse plans, on by the others."""
    x = points(fit.gmms[1], 30)
    back = cg.map_points(fit.plan((1, 0)), x)
    on = cg.map_points(fit.plan((1, 2)), x)
    found = np.stack([back, x, on, cg.map_points(fit.plan((2, 3)), on)])
    got = cg.trajectories(fit, x, T, node=1, ends="not-a-knot")
    np.testing.assert_allclose(got, CubicSpline(TIMES, found, bc_type="not-a-knot")(T), atol=2e-5)
    with pytest.raises(ValueError, match=r"^node: there is no node 4; use indices from 0 to 3"):
        cg.trajectories(fit, x, T, node=4)


def test_any_order_of_nodes_and_edges(fit):
    """Nodes in the order of their times, however they are numbered and edges are written."""
    order = [2, 0, 3, 1]
    gmms, times = [fit.gmms[i] for i in order], [TIMES[i] for i in order]
    edges = [(order.index(j), order.index(i)) for i, j in ((2, 3), (0, 1), (1, 2))]
    other = fit_of(cg.MixtureGraph.from_mixtures(gmms, edges, epsilon=2.0, times=times))
    x = points(fit.gmms[0], 30)
    np.testing.assert_allclose(cg.trajectories(other, x, T), cg.trajectories(fit, x, T), atol=1e-2)
    one, same = (cg.mixture_at(each, 2.2) for each in (other, fit))
    np.testing.assert_allclose(one.log_prob(x), same.log_prob(x), atol=2e-2)


def test_a_pair_and_a_chain_inside_jit(fit):
    x = points(fit.gmms[0], 30)
    two = fit_of(cg.chain(fit.gmms[:2], epsilon=2.0))
    inside = jax.jit(lambda x, t: cg.trajectories(two, x, t))(jnp.asarray(x, jnp.float32), jnp.asarray([0.25, 1.0]))
    image = np.asarray(cg.map_points(two.plan(0), x))
    np.testing.assert_allclose(inside, [0.75 * x + 0.25 * image, image], atol=2e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((1, 3, 1), marks=pytest.mark.slow)])
def test_one_component_or_one_feature(sizes):
    """K = 1 in one feature: the map is m1 + (s1 / s0) (x - m0)."""
    fit = chain_fit(mixtures(sizes, d=1), times=(0, 1, 2))
    x = points(fit.gmms[0], 20)
    got = cg.trajectories(fit, x, [0, 0.5, 2])
    assert got.shape == (3, 20, 1) and np.isfinite(got).all()
    if sizes == (1, 1, 1):
        means, deviations = ([float(getattr(g, name).ravel()[0]) for g in fit.gmms] for name in ("means", "cholesky"))
        np.testing.assert_allclose(got[2], means[2] + deviations[2] / deviations[0] * (x - means[0]), atol=1e-5)


@pytest.mark.slow
def test_a_chain_far_from_the_origin_loses_nothing():
    """At an offset of 1e4 in float32, weights that sum to 1 in exact numbers only would cost all digits."""
    near, far = (chain_fit(mixtures((1, 2, 1), shift=shift), times=(0, 1, 3)) for shift in (0.0, 1e4))
    x = points(near.gmms[0], 20)
    got = np.asarray(cg.trajectories(far, x + 1e4, [0.4, 2.0]), np.float64) - 1e4
    np.testing.assert_allclose(got, cg.trajectories(near, x, [0.4, 2.0]), atol=2e-2)


X = np.zeros((3, 2))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda fit: cg.trajectories(fit, X, [0, 4.5]), "^times: 4.5 is outside of the chain's times, 0 to 4"),
        (lambda fit: cg.trajectories(fit, X, [-0.1]), "^times: -0.1 is outside"),
        (lambda fit: cg.trajectories(fit, X, [np.nan]), "^times: nan is outside"),
        (lambda fit: cg.trajectories(fit, X, 1.0), r"^times: expected shape \(T,\)"),
        (lambda fit: cg.trajectories(fit, X, [1.0], method="cubic"), "^method: expected one of 'spline', 'geodesic'"),
        (
            lambda fit: cg.trajectories(fit, X, [1.0], ends="clamped"),
            "^ends: expected one of 'parabolic', 'not-a-knot'",
        ),
        (lambda fit: cg.trajectories(fit, X[:, :1], [1.0]), r"^x: expected shape \(n, 2\)"),
        (lambda fit: cg.trajectories(fit, X + np.inf, [1.0]), "^x: 6 of 6 values are NaN or infinite"),
        (lambda fit: cg.mixture_at(fit, 4.5), "^t: 4.5 is outside of the chain's times, 0 to 4"),
        (lambda fit: cg.mixture_at(fit, 1.0, ends="clamped"), "^ends: expected one of"),
    ],
)
def test_refused(fit, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(fit)


def test_what_is_no_chain_is_refused():
    gmms = [random_mixture(seed, 2, 2) for seed in range(3)]
    star = fit_of(cg.star(gmms[0], gmms[1:], epsilon=1.0, names=["a", "b", "c"]))
    with pytest.raises(
        ValueError, match=r"^fit: is no chain in time: node 'b' and node 'c' follow .* no edge joins them"
    ):
        cg.trajectories(star, X, [0.5])
    with pytest.raises(ValueError, match=r"^fit: is no chain in time: node 0 and node 1 have one time"):
        cg.mixture_at(fit_of(cg.MixtureGraph.from_mixtures(gmms, [(0, 1), (1, 2)], epsilon=1.0, times=[0, 0, 1])), 0.5)
    with pytest.raises(TypeError, match=r"^fit: expected a GraphFit or a PairFit, got GaussianMixture"):
        cg.mixture_at(gmms[0], 0.5)
    with pytest.raises(ValueError, match=r"under a transformation"):
        jax.eval_shape(lambda fit: cg.mixture_at(fit, 0.5), fit_of(cg.chain(gmms[:2], epsilon=1.0)))
