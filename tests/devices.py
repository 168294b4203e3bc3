"""Checks of clouds on eight simulated devices, in a process of their own: JAX has as many as it started with.

Run as a program it writes what became of each check, "" or its traceback, as JSON. The twin of a fit is that of one device, and
NumPy's in float64.
"""

import functools
import json
import os
import re
import sys
import traceback
import warnings

DEVICES = 8
if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import install_import_hook

with install_import_hook("coupled_gmm" if __name__ == "__main__" else "nothing", "typed.arrays"):
    import coupled_gmm as cg
    from coupled_gmm.core import chunks, meshes
    from coupled_gmm.fits import gmm, pairs, shards
    from coupled_gmm.fits.gmm import _cloud
    from coupled_gmm.fits.request import FitOptions, FitRequest, view_of
    from coupled_gmm.transport import solvers

# What coupling has cost is told in test_fidelity, and compiled there.
fit_pair = functools.partial(cg.fit_pair, fidelity=False)
fit_graph = functools.partial(cg.fit_graph, fidelity=False)

P = PartitionSpec
SLOW = set()


def mesh(*shape):
    """Of axes that JAX lays out; `jax.make_mesh` has explicit ones."""
    names = "abc"[: len(shape) or 1]
    return Mesh(np.array(jax.devices()).reshape(shape or DEVICES), tuple(names))


def cloud(n, d, k=2, seed=0, offset=0.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    centres = 4 * rng.normal(size=(k, d))
    return (rng.normal(size=(n, d)) + centres[rng.integers(k, size=n)] + offset).astype(dtype), rng.random(n).astype(
        dtype
    )


def start(x, k, dtype=np.float32):
    """Broad components about some of the points."""
    d = x.shape[1]
    covariances = np.broadcast_to(4 * np.eye(d), (k, d, d)).astype(dtype)
    return cg.GaussianMixture.from_moments(x[:k], covariances, np.full(k, 1 / k, dtype))


def numpy_em(x, w, start, steps):
    """Plain EM in float64, and the mean log-likelihood where it ends."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64) / np.sum(w, dtype=np.float64)
    means, covariances, weights = (
        np.asarray(leaf, np.float64) for leaf in (start.means, start.covariances, start.weights)
    )
    for step in range(steps + 1):
        solved = np.linalg.solve(np.linalg.cholesky(covariances)[:, None], (x - means[:, None])[..., None])[..., 0]
        logs = (
            np.log(weights)[:, None]
            - 0.5 * (solved**2).sum(-1)
            - 0.5 * np.linalg.slogdet(2 * np.pi * covariances)[1][:, None]
        )
        total = np.log(np.exp(logs - logs.max(0)).sum(0)) + logs.max(0)
        if step == steps:
            return means, covariances, weights, w @ total
        share = w * np.exp(logs - total)
        weights = share.sum(1)
        means = share @ x / weights[:, None]
        covariances = (
            np.einsum("kn,kni,knj->kij", share, x - means[:, None], x - means[:, None]) / weights[:, None, None]
        )


def in_one_number(tree):
    """Leaves in float64, where statistics have their means in two floats."""

    def whole(node):
        if not isinstance(node, cg.MixtureStatistics):
            return node
        means = np.asarray(node.means, np.float64) + np.asarray(node.remainders, np.float64)
        return {**vars(node), "means": means, "remainders": None}

    return jax.tree.leaves(jax.tree.map(whole, tree, is_leaf=lambda node: isinstance(node, cg.MixtureStatistics)))


def close(found, expected, rtol):
    """Numbers of two trees, to a part of the largest of each array."""
    for one, other in zip(in_one_number(found), in_one_number(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.abs(other).max(initial=1e-300))


def slow(check):
    SLOW.add(check.__name__)
    return check


def refused(text, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        assert re.search(text, str(error)), f"{error!r} does not say {text!r}"
    else:
        raise AssertionError(f"not refused: {text}")


def check_cut():
    """Every point once, in order, and real points with weight zero behind them."""
    for n, shape, w in ((1003, (8,), None), (1003, (4, 2), "given"), (8, (2, 2, 2), None), (3, (8,), "given")):
        x, weights = cloud(n, 3)
        points, shares = cg.shard_cloud(x, mesh(*shape), point_weights=w and weights)
        total = -(-n // 8) * 8
        assert points.shape == (total, 3) and shares.shape == (total,)
        assert {shard.data.shape for shard in points.addressable_shards} == {(total // 8, 3)}
        assert len(points.sharding.device_set) == len(shares.sharding.device_set) == 8
        np.testing.assert_array_equal(np.asarray(points)[:n], x)
        np.testing.assert_array_equal(np.asarray(points)[n:], np.broadcast_to(x[-1], (total - n, 3)))
        np.testing.assert_array_equal(np.asarray(shares)[:n], weights if w else 1)
        np.testing.assert_array_equal(np.asarray(shares)[n:], 0)
    alone = Mesh(np.array(jax.devices()[:1]), ("a",))
    x, weights = cg.shard_cloud([[0.0], [1.0]], alone)
    assert cg.fit_gmm(x, start(np.zeros((1, 1)), 1), point_weights=weights).gmm.means == 0.5


def check_one_mixture():
    """Eight steps of EM, uneven parts and weights, as on one device and as NumPy does them."""
    for dtype, rtol in ((np.float32, 1e-5), (np.float64, 1e-11)):
        with jax.enable_x64(dtype == np.float64):
            x, w = cloud(1003, 3, dtype=dtype)
            init = start(x, 2, dtype)
            points, weights = cg.shard_cloud(x, mesh(4, 2), point_weights=w)
            options = {"max_steps": 8, "tol": 0, "ridge": 0}
            fit = cg.fit_gmm(points, init, point_weights=weights, **options)
            close(fit, cg.fit_gmm(x, init, point_weights=w, **options), rtol)
            means, covariances, shares, value = numpy_em(x, w, init, 8)
            found = fit.gmm.means, fit.gmm.covariances, fit.gmm.weights, fit.log_likelihood
            close(found, (means, covariances, shares, value), rtol)
            assert fit.n_steps == 8 and fit.gmm.means.devices() == {jax.devices()[0]}
            later = {"statistics": fit.statistics, "forgetting": 0.2, **options}
            on = cg.fit_gmm(points + 0.3, fit.gmm, point_weights=weights, **later)
            close(on, cg.fit_gmm(x + dtype(0.3), fit.gmm, point_weights=w, **later), 3 * rtol)


def check_one_feature_and_one_component():
    """A weighted mean and variance, a hundred thousand standard deviations from 0."""
    for n, offset in ((5, 0.0), (2001, 0.0), (2001, 1e5)):
        x, w = cloud(n, 1, k=1, offset=offset)
        points, weights = cg.shard_cloud(x, mesh(), point_weights=w)
        init = cg.GaussianMixture.from_moments(x[:1], [[[1.0]]], [1.0])
        fit = cg.fit_gmm(points, init, point_weights=weights, max_steps=2, ridge=0)
        exact, share = np.asarray(x, np.float64)[:, 0], np.asarray(w, np.float64) / w.sum(dtype=np.float64)
        mean = share @ exact
        np.testing.assert_allclose(fit.gmm.means[0, 0], mean, rtol=1e-6)
        np.testing.assert_allclose(fit.gmm.covariances[0, 0, 0], share @ (exact - mean) ** 2, rtol=1e-5)


def check_pairs():
    """One cloud sharded, or both, in other meshes; through a path, from several starts and in J and its gradient."""
    (x, w), (y, v) = cloud(1003, 2), cloud(700, 2, seed=1)
    pair = cg.GaussianMixturePair(start(x, 3), start(y, 2), 0.05, 0.9)
    points, weights = cg.shard_cloud(x, mesh(), point_weights=w)
    others, theirs = cg.shard_cloud(y, mesh(2, 4), point_weights=v)
    options = {"transport_weight": 0.05, "em_steps": 6}
    expected = fit_pair(x, y, pair, point_weights0=w, point_weights1=v, **options)
    for given in (
        (points, others, weights, theirs),
        (points, y, weights, v),
        (x, others, w, theirs),
        (np.asarray(points), y, weights, v),
    ):
        fit = fit_pair(*given[:2], pair, point_weights0=given[2], point_weights1=given[3], **options)
        close(fit.penalized_log_likelihood, expected.penalized_log_likelihood, 1e-6)
        close((fit.pair.gmm0, fit.pair.gmm1), (expected.pair.gmm0, expected.pair.gmm1), 1e-4)

    def value(pair, x, w):
        return cg.penalized_log_likelihood(pair, x, y, transport_weight=0.1, point_weights0=w)

    there, here = (jax.value_and_grad(value)(pair, *given) for given in ((points, weights), (x, w)))
    close(there[0], here[0], 1e-6)
    for side in ("gmm0", "gmm1"):
        close(getattr(there[1], side), getattr(here[1], side), 1e-4)


@slow
def check_graphs():
    """Of three mixtures, one sharded cloud, one in memory, and none."""
    (x, w), (y, v) = cloud(1003, 2), cloud(700, 2, seed=1)
    points, weights = cg.shard_cloud(x, mesh(), point_weights=w)
    pair = cg.GaussianMixturePair(start(x, 3), start(y, 2), 0.05)
    graph = cg.MixtureGraph.from_mixtures([pair.gmm1, pair.gmm0, pair.gmm1], [(0, 1), (1, 2)], edge_weights=0.1)
    for one, two in zip(
        fit_graph([y, points, None], graph, point_weights=[v, weights, None], em_steps=4).gmms,
        fit_graph([y, x, None], graph, point_weights=[v, w, None], em_steps=4).gmms,
        strict=True,
    ):
        close(one, two, 1e-4)


@slow
def check_several_starts():
    x, _ = cloud(520, 2)
    points = jax.device_put(x, NamedSharding(mesh(), P("a")))
    pair, options = cg.GaussianMixturePair(start(x, 2), start(x, 2), 0.1), {"em_steps": 3, "key": jax.random.key(0)}
    fits = [fit_pair(cloud, x, pair, transport_weight=0.1, n_init=2, **options) for cloud in (x, points)]
    close(fits[1].penalized_log_likelihood, fits[0].penalized_log_likelihood, 1e-5)
    rows = []
    fit = fit_pair(points, x, pair, transport_weight=0.1, em_steps=3, progress=rows.append)
    assert len(rows) == 3 and np.isfinite(fit.penalized_log_likelihood)


def check_starts():
    """Small clouds are drawn from as on one device; of large ones, whose sample alone travels, so much as is of use."""
    x, w = cloud(403, 2)
    points, weights = cg.shard_cloud(x, mesh(), point_weights=w)
    key = jax.random.key(0)
    given = ((x, w), (points, weights))
    here, there = (cg.init_gmm(key, cloud, 2, point_weights=share, n_init=1) for cloud, share in given)
    close(there, here, 1e-5)
    x, _ = cloud(60_003, 2)
    x = x[:60_000]
    sharded = jax.device_put(x, NamedSharding(mesh(), P("a")))
    places = (np.arange(50_000) + 0.5) / 50_000
    rows = shards.drawn(sharded, None, places)
    np.testing.assert_array_equal(rows, x[(places * 60_000).astype(int)])
    w = np.where(np.arange(len(x)) < 40_000, 0, np.arange(len(x))).astype(np.float32)
    points, weights = cg.shard_cloud(x, mesh(), point_weights=w)
    rows = shards.drawn(points, weights, places)
    upto = np.cumsum(w, dtype=np.float64)
    expected = np.searchsorted(upto, places * upto[-1], side="right")
    order = {row.tobytes(): i for i, row in enumerate(x)}
    found = np.array([order[row.tobytes()] for row in rows])
    assert found.min() >= 40_000 and np.abs(found - expected).max() <= 2
    refused("n_components: 3 components need", cg.init_gmm, key, np.repeat(sharded[:2], 4, 0), 3)
    same = jax.device_put(np.repeat(x[:2], 4, 0), NamedSharding(mesh(), P("a")))
    refused("n_components: 3 components need as many distinct points", cg.init_gmm, key, same, 3)


@slow
def check_any_layout():
    """However a mesh holds a cloud, as rows, features, copies or in another order, the fit is that of the cloud."""
    x, _ = cloud(800, 4)
    init, options = start(x, 2), {"max_steps": 4, "tol": 0}
    expected = cg.fit_gmm(x, init, **options)
    two, backwards = mesh(4, 2), Mesh(np.array(jax.devices()[::-1]), ("a",))
    explicit = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    layouts = [(two, P(("a", "b"))), (two, P(("b", "a"))), (two, P("a")), (two, P("b", None)), (two, P(None, "a"))]
    layouts += [(two, P("b", "a")), (two, P()), (backwards, P("a")), (explicit, P("a"))]
    for where, spec in layouts:
        fit = cg.fit_gmm(jax.device_put(x, NamedSharding(where, spec)), init, **options)
        close(fit.gmm, expected.gmm, 1e-5)
    odd = cloud(803, 4)[0]  # copies, or features, of a number of points that eight devices can't share
    for spec in (P(), P(None, "a")):
        fit = cg.fit_gmm(jax.device_put(odd, NamedSharding(two, spec)), init, **options)
        close(fit.gmm, cg.fit_gmm(odd, init, **options).gmm, 1e-5)
    with jax.set_mesh(two):
        close(cg.fit_gmm(jax.device_put(x, NamedSharding(two, P(("a", "b")))), init, **options).gmm, expected.gmm, 1e-5)


def check_far_from_zero():
    """Constant features, and an offset of 1e5 standard deviations: as one device says, and as NumPy does of the same points."""
    x, w = cloud(1001, 2, offset=1e5)
    points, weights = cg.shard_cloud(x, mesh(), point_weights=w)
    mean, variance = shards.moments(*shards.on_one_mesh(["x"], [points], [weights])[0], weights)
    exact = np.asarray(x, np.float64)
    share = np.asarray(w, np.float64) / w.sum(dtype=np.float64)
    np.testing.assert_allclose(mean, share @ exact, rtol=1e-9)
    np.testing.assert_allclose(variance, share @ (exact - share @ exact) ** 2, rtol=1e-5)
    init = start(x, 2)
    close(cg.fit_gmm(points, init, point_weights=weights).gmm, cg.fit_gmm(x, init, point_weights=w).gmm, 1e-5)
    flat = np.concatenate([x, np.full((len(x), 1), 0.1, np.float32)], axis=1)
    points, weights = cg.shard_cloud(flat, mesh())
    _, variance = shards.moments(points, weights)
    assert variance[2] == 0
    refused(r"x: features \[2\] are constant, and ridge is 0", cg.fit_gmm, points, start(flat, 2), ridge=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cg.fit_gmm(points, start(flat, 2), point_weights=weights, max_steps=1)
    assert any("features [2] are constant" in str(warning.message) for warning in said)
    tiny = (1e-25 * cloud(800, 1)[0]).astype(np.float32)
    refused("x: values of feature 0 differ by up to", cg.fit_gmm, cg.shard_cloud(tiny, mesh())[0], start(x[:, :1], 1))


def check_sums():
    """Sums over devices are as good as one float can hold them."""
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            x = (1 + np.random.default_rng(0).random((8 * 100_003, 2))).astype(dtype)
            there = jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()), (meshes.AXIS,)), P(meshes.AXIS)))
            found = jax.jit(meshes.on_each(meshes.of(there), lambda own, _: meshes.total(own)))(there, None)
            exact = x.astype(np.longdouble).sum(0)
            assert np.abs(np.asarray(found) / exact - 1).max() < 4 * np.finfo(dtype).eps
            few = x[:8_000].reshape(8, 1000, 2)  # of each device one: their sums have all digits that a float holds
            there = jax.device_put(few, there.sharding)
            found = jax.jit(meshes.on_each(meshes.of(there), lambda own, _: meshes.over_devices(own[0])))(there, None)
            wrong = np.abs(np.asarray(found) - few.astype(np.longdouble).sum(0)) / np.spacing(np.asarray(found))
            assert wrong.max() < 0.51


def collectives(text):
    """Each collective of a compiled program, with the shapes of what it sends and the computation that it stands in."""
    found, inside = [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            inside = line.split()[0]
        match = re.search(
            r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(", line
        )
        if match:
            found.append((match[2], match[1], inside))
    return found


def check_one_collective_an_e_step():
    """In the loop of a compiled fit, of twice the sums' numbers; no other collective anywhere, and before it none of points."""
    (x, w), (y, v) = cloud(1003, 3), cloud(700, 3, seed=1)
    points, weights = cg.shard_cloud(x, mesh(), point_weights=w)
    request = FitRequest.checked(ridge=1e-6, tol=0.0, em_steps=5)
    controls = meshes.whole(request.controls)
    options = FitOptions(chunks.rows(5), solvers.ENTROPIC, None, progress=False)
    k, d = 4, 3
    alone = cg.GaussianMixture.from_moments(x[:k], np.stack([np.eye(3)] * k), np.full(k, 0.25))
    view = view_of([_cloud(points, weights)], [alone], request.controls.ridge)
    one = gmm._fit.lower(gmm.stack([alone]), view.in_chunks(k * d), controls, options)
    clouds = pairs.two_clouds(points, y, weights, v)
    pair = cg.GaussianMixturePair(alone, alone, 0.1)
    sight = view_of(clouds, [alone, alone], request.controls.ridge).in_chunks(k * d)
    asked = jax.tree.map(np.asarray, (pair, np.float32(0.1), np.zeros(2, bool)))
    begun = jax.eval_shape(lambda: pairs._begin_pair(*asked, sight, controls, options))
    two = pairs._go_on_with_pair.lower(*asked, sight, controls, options, begun, np.int32(5))
    for n_nodes, lowered in ((1, one), (2, two)):
        text = lowered.compile().as_text()
        ((kind, sent, inside),) = collectives(text)
        n = n_nodes * (2 + k + k * d + k * d * d)
        sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"f32\[([\d,]+)\]", sent)]
        assert kind == "all-reduce" and sum(sizes) == 2 * n, (kind, sent, n)
        assert inside != "ENTRY" and " while(" in text
    own = [(meshes.cut(meshes.of(points), points, weights))]
    where = meshes.of(points)
    before = [
        chunks._packed_on_each.lower(own, [None], where, 256, 1, np.float32),
        shards._extremes.lower(points, where),
        shards._moments.lower(points, weights, where),
        shards._together.lower(own, where),
    ]
    for lowered in before:
        for kind, sent, _ in collectives(lowered.compile().as_text()):
            assert kind == "all-reduce", (kind, sent)
            assert all(np.prod([int(n) for n in s.split(",") if n]) <= 8 for s in re.findall(r"\[([\d,]*)\]", sent)), (
                sent
            )


def check_nothing_is_compiled_again():
    """For another cloud of like size, other weights, other tolerances and numbers of steps."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    for seed in (0, 1):
        x, w = cloud(1003, 2, seed=seed)
        points, weights = cg.shard_cloud(x, mesh(), point_weights=w)
        before = len(compiled)
        cg.fit_gmm(points, start(x, 2), point_weights=weights, max_steps=5 + seed, tol=1e-3 * seed)
        assert seed == 0 or len(compiled) == before
    cg.fit_gmm(points, start(x, 5), point_weights=weights)
    assert len(compiled) > before, "no compilation would be seen"


@slow
def check_batches_over_devices():
    """`vmap` of a fit whose batch lies over the mesh: each device fits its own pairs."""
    clouds = np.stack([cloud(60, 2, seed=seed)[0] for seed in range(8)])
    others = np.stack([cloud(50, 2, seed=seed + 100)[0] for seed in range(8)])
    pair = cg.GaussianMixturePair(start(clouds[0], 2), start(others[0], 2), 0.1)

    def fit(x, y):
        fit = fit_pair(x, y, pair, transport_weight=0.05, em_steps=3)
        return fit.pair.gmm0, fit.pair.gmm1

    there = [jax.device_put(x, NamedSharding(mesh(), P("a"))) for x in (clouds, others)]
    found = jax.jit(jax.vmap(fit))(*there)
    assert len(found[0].means.sharding.device_set) == 8 and not found[0].means.is_fully_replicated
    close(found, jax.jit(jax.vmap(fit))(clouds, others), 1e-4)


def check_points_are_mapped_where_they_lie():
    x, _ = cloud(1003, 2)
    points, _ = cg.shard_cloud(x, mesh(4, 2))
    mixture = start(x, 2)
    plan = cg.solve_plan(cg.GaussianMixturePair(mixture, start(x + 1, 2), 0.1))
    for function in (mixture.log_prob, mixture.log_posterior, mixture.predict, lambda x: cg.map_points(plan, x)):
        found, expected = function(points), np.asarray(function(x), np.float64)
        assert len(found.sharding.device_set) == 8 and not found.is_fully_replicated
        np.testing.assert_allclose(np.asarray(found, np.float64)[:1003], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixture.score(points[:1000]), mixture.score(x[:1000]), rtol=1e-6)
    even = jax.device_put(x[:1000], NamedSharding(mesh(), P("a")))
    np.testing.assert_allclose(mixture.bic(even), mixture.bic(x[:1000]), rtol=1e-6)


def check_refusals():
    x, w = cloud(800, 2)
    points, weights = cg.shard_cloud(x, mesh(), point_weights=w)
    spoilt = x.copy()
    spoilt[700, 1] = np.nan
    refused(r"points: 1 of 1600 values are NaN or infinite", cg.shard_cloud, spoilt, mesh())
    refused(r"mesh: expected a jax.sharding.Mesh, got int", cg.shard_cloud, x, 8)
    refused(r"point_weights: expected shape \(800,\)", cg.shard_cloud, x, mesh(), point_weights=w[:5])
    refused(r"point_weights: 800 weights are negative", cg.shard_cloud, x, mesh(), point_weights=-w - 1)
    refused(r"point_weights: all weights are zero", cg.shard_cloud, x, mesh(), point_weights=0 * w)
    refused(r"points: lie on several devices already", cg.shard_cloud, points, mesh())
    refused(r"points: .* exceed what float32 holds", cg.shard_cloud, np.full((8, 1), 1e300), mesh())
    there, init = NamedSharding(mesh(), P("a")), start(x, 2)
    refused("x: 1 of 1600 values are NaN", cg.fit_gmm, jax.device_put(spoilt, there), init)
    refused("point_weights: 800 weights are negative", cg.fit_gmm, points, init, point_weights=-weights - 1)
    refused("point_weights: all weights are zero", cg.fit_gmm, points, init, point_weights=0 * weights)
    refused(r"point_weights: expected shape \(800,\)", cg.fit_gmm, points, init, point_weights=np.ones(5))
    refused("x: expected shape", cg.fit_gmm, points, start(cloud(9, 3)[0], 2))
    pair, half = cg.GaussianMixturePair(init, init, 0.1), Mesh(np.array(jax.devices()[:4]), ("a",))
    other = jax.device_put(x, NamedSharding(half, P("a")))
    refused("x1: lies on 4 devices", cg.fit_pair, points, other, pair, transport_weight=0.1)
    refused(r"clouds0\[0\]: lies on several devices", cg.fit_pairs, [points], [x], pair, transport_weight=0.1)
    refused(
        "explicit axes", jax.jit(lambda x: cg.fit_gmm(x, init).gmm), cg.shard_cloud(x, jax.make_mesh((8,), ("a",)))[0]
    )
    with jax.enable_x64(True):
        exact = jax.device_put(x.astype(np.float64), there)
    refused("x: was made in float64", cg.fit_gmm, exact, init)


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


def outcome(check):
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    import time

    assert jax.device_count() == DEVICES and jnp.zeros(1).devices() == {jax.devices()[0]}
    report = {}
    for name in sys.argv[2:] or CHECKS:
        began = time.perf_counter()
        report[name] = outcome(CHECKS[name])
        print(name, round(time.perf_counter() - began, 2), report[name], file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        json.dump(report, file)
