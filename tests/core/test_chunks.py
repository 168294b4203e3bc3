"""Points in chunks: every point once, whatever the size; few programs for many sizes; nothing for what is not in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coupled_gmm as cg
from coupled_gmm.core import chunks
from coupled_gmm.gaussians.density import densities

# An accelerator has other lengths of chunks, and a small program for each number of points.
by_host = pytest.mark.skipif(jax.default_backend() != "cpu", reason="of clouds that the host packs")
SIZES = (1, 2, 15, 16, 17, 511, 512, 513, 1500, 9000)


def cloud(n, d=2, seed=0):
    return np.random.RandomState(seed).randn(n, d)


def in_a_row(packed, owner):
    """Points and weights of one cloud, from its chunks in use."""
    first, last = (0, *np.asarray(packed.ends))[owner : owner + 2]
    mine = slice(first, last)
    points = np.asarray(packed.points)[mine].swapaxes(1, 2).reshape(-1, packed.points.shape[1])
    return points, np.asarray(packed.weights)[mine].ravel()


@pytest.mark.parametrize("traced", [False, True])
def test_every_point_is_there_once(precision, traced):
    dtype = jnp.result_type(float)
    clouds = [cloud(60, 3), None, cloud(37, 3, seed=1), cloud(16, 3, seed=2)]
    weights = [None, None, np.random.RandomState(3).rand(37), None]
    pack = chunks.pack
    if traced:
        given = [jnp.asarray(x) if x is not None else None for x in clouds]
        packed = jax.jit(lambda x, w: pack(x, w, 16, dtype))(
            given, [w if w is None else jnp.asarray(w) for w in weights]
        )
        assert len(packed.points) == packed.count == 4 + 3 + 1, "under a transformation chunks fit exactly"
    else:
        packed = pack(clouds, weights, 16, dtype)
        assert len(packed.points) == (64 if jax.default_backend() == "cpu" else 8) and packed.count == 8
        np.testing.assert_array_equal(packed.weights[8:], 0)
    for owner, (x, w) in enumerate(zip(clouds, weights, strict=True)):
        points, shares = in_a_row(packed, owner)
        if x is None:
            assert not len(points)
            continue
        w = np.ones(len(x)) if w is None else w
        np.testing.assert_allclose(points[: len(x)], x, rtol=precision)
        np.testing.assert_allclose(shares[: len(x)], w / w.sum(), rtol=100 * precision)
        np.testing.assert_array_equal(shares[len(x) :], 0)
        assert (points[len(x) :] == points[len(x) - 1]).all(), "padding is a point of the cloud: no new number"


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("size", [1, 7, 16, 512])
def test_points_come_back_in_order(n, size):
    x = cloud(n, 3).astype(np.float32)
    points = chunks.zeros((chunks.capacity(-(-n // size)), 3, size), np.float32)
    chunks.fill(points[: -(-n // size)], x)
    np.testing.assert_array_equal(points.swapaxes(1, 2).reshape(-1, 3)[:n], x)


def test_large_clouds_are_filled_block_by_block(monkeypatch):
    monkeypatch.setattr(chunks, "_BLOCK", 40)
    for n in (39, 40, 41, 80, 95):
        x = cloud(n).astype(np.float32)
        points = chunks.zeros((16, 2, 10), np.float32)
        chunks.fill(points[: -(-n // 10)], x, lambda rows: rows + 1)
        np.testing.assert_array_equal(points.swapaxes(1, 2).reshape(-1, 2)[:n], x + 1)


@by_host
@pytest.mark.parametrize("numbers", [1, 6, 200, 5000])
def test_few_shapes_for_many_sizes(numbers):
    shapes = set()
    for n in range(1, 100_000, 37):
        size = chunks.length([n], numbers)
        count = -(-n // size)
        shapes.add((size, chunks.capacity(count)))
        assert size * count < min(n + 1024, 2 * n + 256), "little is computed for nothing"
    assert len(shapes) <= 9
    assert all(n <= chunks.rounded(n) <= max(n + 15, 1.25 * n) for n in range(1, 5000))
    assert len({chunks.rounded(n) for n in range(1, 2**16)}) <= 4 * 16


def test_chunks_in_use_are_all_that_is_computed():
    """What lies beyond is not read: infinite points there leave no trace."""
    x = cloud(700).astype(np.float32)
    packed = chunks.pack([x], [None], 512, np.float32)
    poisoned = packed.points.at[2:].set(jnp.nan)
    gmm = cg.GaussianMixture.from_moments([[0.0, 0.0], [1.0, 1.0]], [np.eye(2)] * 2, [0.5, 0.5])
    arguments = packed.count, (gmm.means, gmm.covariances, gmm.weights), None, "mixture"
    found, expected = (densities(points, *arguments) for points in (poisoned, packed.points))
    np.testing.assert_array_equal(found, expected)
    gradient = jax.grad(lambda points: jnp.sum(densities(points, *arguments)))(poisoned)
    assert np.isfinite(gradient).all()


@by_host
def test_sizes_of_a_bucket_share_every_program():
    """Fits, densities, draws and maps at other numbers of points and of steps compile nothing."""
    rng, key = np.random.RandomState(0), jax.random.key(0)

    def everything(n, steps):
        x0, x1 = (rng.randn(size, 2) + 3 * rng.randint(2, size=(size, 1)) for size in (n, n + 1))
        start = cg.init_gmm(key, x0, 3, n_init=1)
        found = cg.fit_gmm(x0, start, max_steps=steps, point_weights=rng.rand(n)).gmm
        coupled = cg.fit_pair(
            x0, x1, cg.GaussianMixturePair(found, found, 0.1), transport_weight=0.1, em_steps=steps, m_steps=steps
        )
        assert coupled.history.objective.shape == (steps,)
        cg.penalized_log_likelihood(coupled.pair, x0, x1, transport_weight=0.1)
        for method in (found.log_prob, found.component_log_prob, found.log_posterior):
            method(x0)
        images = cg.map_points(coupled.plan, x0), cg.map_points(coupled.plan, x0, method="random", key=key)
        assert all(image.shape == (n, 2) for image in images)
        coupled.plan.point_reweighting(x0)
        cg.plan_density(coupled.plan, x0[: n // 50], x1[: n // 50 + 1], atol=0.1)

    everything(300, 2)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **about: compiled.append((name, about)))
    everything(301, 3)
    everything(317, 5)
    assert not [about for name, about in compiled if name.endswith("backend_compile_duration")]


def test_draws_are_those_of_the_row():
    """Whichever others are asked for, inside a program and outside; no two blocks have the same."""
    key, block = jax.random.key(2), chunks._DRAWN
    n = 2 * block + 100
    whole = chunks.draws(key, n, 2, np.float32)
    assert whole.shape == (n, 2) and (whole >= 0).all() and (whole < 1).all()
    assert abs(whole.mean() - 0.5) < 5 / (24 * n) ** 0.5
    for first, count in ((0, 1), (0, 100), (0, block), (1, 1), (block - 3, 7), (block, 5), (block + 1, block), (0, n)):
        np.testing.assert_array_equal(chunks.draws(key, count, 2, np.float32, first), whole[first : first + count])
    for count in (100, block + 9):
        compiled = jax.jit(lambda key, count=count: chunks.draws(key, count, 2, np.float32))
        np.testing.assert_array_equal(compiled(key), whole[:count])
        compiled = jax.jit(lambda count=count: chunks.draws(key, count, 2, np.float32))
        np.testing.assert_array_equal(compiled(), whole[:count])
    assert (whole[:block] != whole[block : 2 * block]).mean() > 0.99
    assert (whole != chunks.draws(jax.random.key(3), n, 2, np.float32)).mean() > 0.99


def test_samples_do_not_depend_on_the_bucket():
    """More draws begin with the same ones, and a program around the call draws the same."""
    gmm, key = cg.GaussianMixture.from_moments([[0.0, 0.0], [5.0, 1.0]], [np.eye(2)] * 2, [0.5, 0.5]), jax.random.key(1)
    drawn = gmm.sample(key, 1000)
    assert drawn.shape == (1000, 2)
    np.testing.assert_allclose(drawn, jax.jit(lambda key: gmm.sample(key, 1000))(key), rtol=1e-6)
    np.testing.assert_array_equal(gmm.sample(key, 990), drawn[:990])
