"""Fits of clouds that are not in memory, beside those of the same points in memory, and their moments beside NumPy's."""

import functools

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coupled_gmm as cg
from coupled_gmm.fits.external import External

# What coupling has cost is told in test_fidelity, and compiled there.
fit_pair = functools.partial(cg.fit_pair, fidelity=False)
fit_graph = functools.partial(cg.fit_graph, fidelity=False)
fit_path = functools.partial(cg.fit_path, fidelity=False)

N = 3000
FIT = {"transport_weight": 0.05, "em_steps": 6, "m_steps": 10}


def points(seed=0, n=N, d=2, dtype=np.float32):
    rng = np.random.RandomState(seed)
    centres = 5 * rng.randn(3, d)
    return (centres[rng.randint(3, size=n)] + rng.randn(n, d)).astype(dtype)


def start(x, k=3):
    chosen = np.asarray(x, np.float64)[:k]
    d = x.shape[1]
    return cg.GaussianMixture.from_moments(chosen, np.tile(np.var(x, axis=0) * np.eye(d), (k, 1, 1)), np.full(k, 1 / k))


def in_file(tmp_path, x, name="x.npy", **options):
    np.save(tmp_path / name, x)
    return cg.open_cloud(tmp_path / name, **options)


def assert_alike(found, expected, rtol):
    """Two fits: structure, types, status, steps, J and history; mixtures as precise as steps make them."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert int(found.status) == int(expected.status) and int(found.n_steps) == int(expected.n_steps)
    for field in dataclass_fields(found.history):
        one, other = getattr(found.history, field), getattr(expected.history, field)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol, err_msg=field)
    np.testing.assert_allclose(found.penalized_log_likelihood, expected.penalized_log_likelihood, rtol=rtol, atol=rtol)


def dataclass_fields(tree):
    return [name for name, value in vars(tree).items() if value is not None and name != "marginal_error"]


@given(
    st.integers(1, 40),
    st.integers(1, 13),
    st.integers(1, 3),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from(["none", "some", "mostly zero"]),
    st.sampled_from([0.0, 1e6]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_moments_are_those_of_numpy(tmp_path_factory, n, size, d, dtype, kind, offset, seed):
    rng = np.random.RandomState(seed)
    x = (offset + rng.randn(n, d)).astype(dtype)
    constant = rng.rand(d) < 0.3
    x[:, constant] = x[0, constant]
    weights = None if kind == "none" else rng.rand(n) * (rng.rand(n) < (0.7 if kind == "some" else 0.1))
    if weights is not None:
        weights[rng.randint(n)] = 1.0
        x[weights == 0] += 3.0  # which the extremes see, and moments do not
    found = External.read("x", in_file(tmp_path_factory.mktemp("cloud"), x, chunk_size=size, weights=weights))
    mean, variance = found.scales
    w = np.ones(n) if weights is None else weights
    exact = x.astype(np.longdouble)
    truth = np.average(exact, axis=0, weights=w.astype(np.longdouble))
    np.testing.assert_allclose(mean, truth.astype(float), rtol=1e-14, atol=1e-14)
    spread = np.average((exact - truth) ** 2, axis=0, weights=w.astype(np.longdouble)).astype(float)
    np.testing.assert_allclose(variance, spread, rtol=1e-9, atol=1e-18 * max(offset, 1) ** 2)
    seen = x[w > 0]
    np.testing.assert_array_equal(variance == 0, (seen == seen[0]).all(0))
    np.testing.assert_array_equal(found.extremes, (x.min(0), x.max(0)))
    assert len(found) == n and np.isclose(found.moments.mass, w.sum(), rtol=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 700, 1])
def test_one_mixture(tmp_path, precision, weighted, chunk_size):
    n = 60 if chunk_size == 1 else N
    x = points(n=n, dtype=jnp.result_type(float))
    weights = np.random.RandomState(1).rand(n) if weighted else None
    cloud = in_file(tmp_path, x, weights=weights, chunk_size=chunk_size)
    gmm = cg.init_gmm(jax.random.key(0), x, 3, n_init=1, point_weights=weights)
    again = cg.init_gmm(jax.random.key(0), cloud, 3, n_init=1)
    np.testing.assert_allclose(again.means, gmm.means, rtol=100 * precision)
    options = {"max_steps": 8, "tol": 1e-4}
    expected = cg.fit_gmm(x, start(x), point_weights=weights, **options)
    assert_alike(cg.fit_gmm(cloud, start(x), **options), expected, 32 * precision)


def test_pairs_and_graphs(tmp_path, precision):
    dtype = jnp.result_type(float)
    x, y = points(dtype=dtype), points(1, 2000, dtype=dtype)
    cloud, other = in_file(tmp_path, x, chunk_size=1000), in_file(tmp_path, y, "y.npy", chunk_size=999)
    pair = cg.GaussianMixturePair(start(x), start(y), 0.1)
    expected = fit_pair(x, y, pair, **FIT)
    for clouds in ((cloud, other), (cloud, y), (x, other)):
        assert_alike(fit_pair(*clouds, pair, **FIT), expected, 200 * precision)
    graph = cg.MixtureGraph.from_mixtures([start(x)] * 3, [(0, 1), (2, 1)], epsilon=0.1)
    expected = fit_graph([x, None, y], graph, em_steps=3)
    assert_alike(fit_graph([cloud, None, other], graph, em_steps=3), expected, 200 * precision)


def test_unbalanced_with_an_optimiser_and_frozen(tmp_path):
    import optax

    x, y = points(), points(1, 2000)
    clouds = in_file(tmp_path, x, chunk_size=1000), in_file(tmp_path, y, "y.npy")
    pair = cg.GaussianMixturePair(start(x), start(y), 0.1, rho=1.0)
    for more in ({"optimizer": optax.adam, "learning_rate": 1e-2}, {"freeze": ["gmm1"]}):
        options = {**FIT, "em_steps": 3, "m_steps": 5, **more}
        assert_alike(fit_pair(*clouds, pair, **options), fit_pair(x, y, pair, **options), 1e-5)


@pytest.mark.slow
def test_several_starts(tmp_path):
    x, y = points(n=600), points(1, 500)
    clouds = in_file(tmp_path, x, chunk_size=200), in_file(tmp_path, y, "y.npy")
    key = jax.random.key(3)
    found, expected = (cg.fit_gmm(each, 3, key=key, n_init=2, tol=1e-3, max_steps=10) for each in (clouds[0], x))
    assert int(found.start) == int(expected.start)
    assert_alike(found, expected, 1e-5)
    pair, options = cg.GaussianMixturePair(start(x), start(y), 0.1), {**FIT, "em_steps": 3, "n_init": 2, "key": key}
    assert_alike(fit_pair(*clouds, pair, **options), fit_pair(x, y, pair, **options), 1e-5)


def test_far_from_zero_in_more_digits(tmp_path):
    """A float64 file for a float32 fit, a million standard deviations away: centred before digits are lost."""
    x = 1e6 + points(dtype=np.float64)
    cloud = in_file(tmp_path, x, chunk_size=700)
    gmm = cg.init_gmm(jax.random.key(0), cloud, 2, n_init=1)
    fit, near = cg.fit_gmm(cloud, gmm, max_steps=5, tol=0), cg.fit_gmm(x, gmm, max_steps=5, tol=0)
    assert_alike(fit, near, 1e-5)
    assert fit.gmm.dtype == np.float32 and fit.gmm.remainders is not None


def test_a_large_cloud_is_represented_as_in_memory(tmp_path, monkeypatch):
    from coupled_gmm.fits import starts

    monkeypatch.setattr(starts, "MOST_POINTS", 500)
    x, key = points(n=1700), jax.random.key(5)
    weights = np.random.RandomState(2).rand(len(x)) * (np.random.RandomState(3).rand(len(x)) < 0.5)
    for w in (None, weights):
        there = cg.init_gmm(key, x, 3, n_init=1, point_weights=w)
        for cloud in (
            in_file(tmp_path, x, chunk_size=400, weights=w),
            cg.open_cloud(da.from_array(x, chunks=(300, 2)), weights=w),
        ):
            found = cg.init_gmm(key, cloud, 3, n_init=1)
            np.testing.assert_allclose(found.means, there.means, rtol=1e-5)


def test_tables_blocks_and_several_files(tmp_path):
    """Features are paired by name; blocks of Dask's arrays, cut anywhere, are summed where they lie."""
    x, y = points(dtype=np.float64), points(1, 2000, dtype=np.float64)
    pair = cg.GaussianMixturePair(start(x), start(y), 0.1)
    expected = fit_pair(x, y, pair, **FIT)
    pl.DataFrame({"a": x[:, 0], "b": x[:, 1]}).write_parquet(tmp_path / "x.parquet", row_group_size=700)
    turned = pl.DataFrame({"b": y[:, 1], "a": y[:, 0]})
    turned[:900].write_parquet(tmp_path / "y0.parquet")
    turned[900:].write_csv(tmp_path / "y1.csv")
    tables = cg.open_cloud(tmp_path / "x.parquet"), cg.open_cloud([tmp_path / "y0.parquet", tmp_path / "y1.csv"])
    assert_alike(fit_pair(*tables, pair, **FIT), expected, 2e-5)
    frame, turned_pair = (
        pl.DataFrame({"b": x[:, 1], "a": x[:, 0]}),
        cg.GaussianMixturePair(turn(start(x)), turn(start(y)), 0.1),
    )
    first = fit_pair(frame, tables[1], turned_pair, **FIT).history.penalized_log_likelihood[0]
    np.testing.assert_allclose(first, expected.history.penalized_log_likelihood[0], rtol=1e-5)
    blocks = (
        cg.open_cloud(da.from_array(x, chunks=((1, 1300, 1699), 2))),
        cg.open_cloud(da.from_array(y, chunks=(333, 1))),
    )
    assert_alike(fit_pair(*blocks, pair, **FIT), expected, 2e-5)


def turn(gmm):
    return gmm.marginal([1, 0])


@pytest.mark.parametrize(("n", "d"), [(1, 2), (7, 1), (7, 2)])
def test_nothing_is_written_to_what_is_read(n, d):
    x = points(n=n, d=d, dtype=np.float64)
    kept, weights = x.copy(), np.ones(n)
    cg.fit_gmm(cg.open_cloud(da.from_array(x), weights=weights), start(points(n=9, d=d)), max_steps=1)
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(weights, 1)


def test_rows_are_shown_and_a_fit_ends_where_it_has_converged(tmp_path):
    x, rows, shown = points(n=900), [], []
    cloud, pair = in_file(tmp_path, x, chunk_size=400), cg.GaussianMixturePair(start(x), start(x), 0.1)
    options = {"transport_weight": 0.05, "em_steps": 40, "tol": 1e-3}
    fit = fit_pair(cloud, points(1, 800), pair, progress=rows.append, **options)
    fit_pair(x, points(1, 800), pair, progress=shown.append, **options)
    assert fit.converged and len(rows) == int(fit.n_steps) == len(shown)
    np.testing.assert_allclose([row["objective"] for row in rows], [row["objective"] for row in shown], rtol=1e-5)


def test_constant_features_and_ranges(tmp_path):
    x = points(n=500)
    x[:, 1] = 7.25
    cloud = in_file(tmp_path, x, chunk_size=99)
    with pytest.warns(UserWarning, match=r"x: features \[1\] are constant"):
        fit = cg.fit_gmm(cloud, start(x + points(3, 500)))
    np.testing.assert_allclose(fit.gmm.means[:, 1], 7.25, rtol=1e-6)
    with pytest.raises(ValueError, match=r"x: features \[1\] are constant, and ridge is 0"):
        cg.fit_gmm(cloud, start(points(n=500)), ridge=0)
    with pytest.raises(ValueError, match="x: values of feature 0 differ by up to 1e\\+30"):
        wide = in_file(tmp_path, np.array([[0.0, 0.0], [1e30, 1.0]]), "wide.npy")
        cg.fit_gmm(wide, start(points(n=500)))


def test_what_is_refused(tmp_path):
    x = points(n=300)
    cloud, gmm = in_file(tmp_path, x), start(x)
    pair = cg.GaussianMixturePair(gmm, gmm, 0.1)
    with pytest.raises(ValueError, match=r"point_weights: x is not in memory.*open_cloud\(\.\.\., weights=\.\.\.\)"):
        cg.fit_gmm(cloud, gmm, point_weights=np.ones(300))
    with pytest.raises(ValueError, match=r"x1: expected shape \(n, 2\), got \(300, 3\)"):
        fit_pair(cloud, in_file(tmp_path, points(n=300, d=3), "three.npy"), pair, transport_weight=0.1)
    with pytest.raises(ValueError, match=r"x0: expected points in memory, got OpenCloud.*fit_pair for each weight"):
        fit_path(cloud, x, pair, transport_weights=[0.1])
    with pytest.raises(ValueError, match=r"x1: expected points in memory.*J where it starts"):
        cg.penalized_log_likelihood(pair, x, cloud, transport_weight=0.1)
    with pytest.raises((TypeError, ValueError), match="under a transformation"):
        jax.jit(lambda gmm: cg.fit_gmm(cloud, gmm).log_likelihood)(gmm)
    for traced in (
        lambda y: fit_pair(cloud, y, pair, transport_weight=0.1),
        lambda y: fit_pair(y, cloud, pair, transport_weight=0.1),
    ):
        with pytest.raises((TypeError, ValueError), match=r"x[01]: OpenCloud.*under a transformation"):
            jax.jit(lambda y, fit=traced: fit(y).n_steps)(x)
    with pytest.raises((TypeError, ValueError), match="under a transformation"):
        jax.vmap(lambda weight: fit_pair(cloud, x, pair, transport_weight=weight).n_steps)(jnp.ones(2))
    with pytest.raises(ValueError, match=r"clouds0\[0\]: expected points in memory"):
        cg.fit_pairs([cloud], [x], pair, transport_weight=0.1)
    few = in_file(tmp_path, np.repeat(x[:2], 50, axis=0), "few.npy")
    with pytest.raises(ValueError, match="n_components: 3 components need as many distinct points"):
        cg.init_gmm(jax.random.key(0), few, 3)
    x[200, 1] = np.nan
    unread = in_file(tmp_path, x, "unread.npy")
    with pytest.raises(ValueError, match=r"x1: expected points in memory"):  # before it is read
        fit_path(x[:100], unread, pair, transport_weights=[0.1])
    with pytest.raises(ValueError, match=r"bad\.npy: column 1 .*row 201"):
        cg.fit_gmm(in_file(tmp_path, x, "bad.npy", chunk_size=64), gmm)


def test_a_pass_needs_no_more_programs(tmp_path):
    """Chunks of a cloud, and clouds of other sizes, share the programs of a fit."""
    x = points(n=5000)
    cloud = in_file(tmp_path, x, chunk_size=1024)
    cg.fit_gmm(cloud, start(x), max_steps=3)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **about: compiled.append(name))
    cg.fit_gmm(cloud, start(x), max_steps=7)
    cg.fit_gmm(in_file(tmp_path, x[:4800], "less.npy", chunk_size=1024), start(x), max_steps=3)
    assert not [name for name in compiled if name.endswith("backend_compile_duration")]
