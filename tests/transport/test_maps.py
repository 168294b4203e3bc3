"""What plans do to points and mixtures: geodesics, laws of maps, closed forms, singular sources, chunks and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import KINDS, random_covariances, random_moments
from twins import gaussian_map, posterior, root

import coupled_gmm as cg
from coupled_gmm.core import chunks
from coupled_gmm.transport import maps

TIMES = np.array([0, 0.3, 0.8, 1])


def mixture(end):
    return cg.GaussianMixture(*map(jnp.asarray, end))


def padded(gmm, k):
    """The same mixture with absent copies of its components."""
    index = jnp.arange(k) % gmm.n_components
    weights = jnp.where(jnp.arange(k) < gmm.n_components, gmm.weights[index], 0)
    return cg.GaussianMixture(gmm.means[index], gmm.covariances[index], weights)


@jax.jit
def geodesic(gmm0, gmm1, times):
    """Interpolated mixtures, squared distances of the first and the last from the ends, and among all of them."""
    plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0), method="exact")
    between = jax.vmap(lambda t: cg.interpolate(plan, t))(times)
    ends = [padded(gmm, between.weights.shape[1]) for gmm in (gmm0, gmm1)]
    everything = jax.tree.map(lambda a, *b: jnp.concatenate([a, jnp.stack(b)]), between, *ends)
    n = len(times)
    first, second = jnp.triu_indices(n, 1)
    first, second = jnp.concatenate([jnp.array([0, n - 1]), first]), jnp.concatenate([jnp.array([n, n + 1]), second])
    one, other = (jax.tree.map(lambda leaf, i=index: leaf[i], everything) for index in (first, second))
    squared = jax.vmap(cg.mw2_squared)(one, other)
    return plan.transport_cost, between, squared[:2], jnp.sqrt(squared[2:])


def check_geodesic(gmm0, gmm1, precision):
    squared, between, errors, distances = geodesic(gmm0, gmm1, TIMES)
    first, second = np.triu_indices(len(TIMES), 1)
    expected = (TIMES[second] - TIMES[first]) * np.sqrt(squared)
    np.testing.assert_allclose(distances, expected, rtol=0, atol=1e-4 * np.sqrt(squared))
    np.testing.assert_allclose(between.weights.sum(1), 1, rtol=10 * precision)
    scale = sum(np.einsum("k,kii->", np.asarray(gmm.weights), np.asarray(gmm.covariances)) for gmm in (gmm0, gmm1))
    assert (errors <= 50 * precision * scale).all(), errors
    assert (np.linalg.eigvalsh(np.asarray(between.covariances, np.float64)) >= -50 * precision * scale).all()
    return between


@pytest.mark.parametrize(
    ("d", "single"),
    [
        (2, True),
        (5, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, True), (1, False), (2, False), (5, True))),
    ],
)
def test_interpolation_is_a_geodesic(d, single):
    """Distances are proportional to time, with singular covariances on either side, absent components, and both."""
    with jax.enable_x64(not single):
        for i, kind in enumerate(KINDS):
            check_geodesic(*map(mixture, random_moments(i, 3, 4, d, kind)), 1.2e-7 if single else 2.2e-16)


@pytest.mark.parametrize("sizes", [(3, 4), pytest.param((1, 1), marks=pytest.mark.slow)])
def test_interpolation_between_single_gaussians(x64, sizes):
    """Where the covariances are singular both ways the coupling leaves part of the noise open.

    Beside absent components: in the shapes of the test above, for one compilation.
    """
    flat, line, d = np.diag([1.0, 2.0, 0.0, 0.0, 0.0]), np.diag([0.0, 0.0, 3.0, 0.0, 0.0]), 5
    for s0, s1 in ((flat, line), (np.zeros((d, d)), flat), (flat, flat), (flat, np.eye(d))):
        ends = [
            mixture((np.full((k, d), float(side)), np.tile(s, (k, 1, 1)), np.eye(k)[0]))
            for side, (k, s) in enumerate(zip(sizes, (s0, s1)))
        ]
        between = check_geodesic(*ends, 2e-16)
    np.testing.assert_allclose(between.means[1, 0], 0.3 * np.ones(d))
    expected = np.diag((0.7 * np.sqrt(np.diag(flat)) + 0.3) ** 2)
    np.testing.assert_allclose(between.covariances[1, 0], expected, atol=1e-12)


@jax.jit
def unbalanced_way(gmm0, gmm1, times):
    plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0, 0.5), tol=1e-10)
    between = jax.vmap(lambda t: cg.interpolate(plan, t))(times)
    return plan.total_mass, between


def test_an_unbalanced_plan_leads_from_one_mixture_to_the_other(x64):
    """Each with its own masses, however little the plan moves; in between they change in proportion to time."""
    gmm0, gmm1 = map(mixture, random_moments(0, 3, 4, 2, "absent"))
    mass, between = unbalanced_way(gmm0, gmm1, TIMES)
    assert mass < 0.5
    rows = np.asarray(between.weights).reshape(-1, 3, 4)
    # A component for each pair: at either end those of that side, as often as there are partners.
    for name in ("means", "covariances"):
        found = np.asarray(getattr(between, name))
        found = found.reshape(-1, 3, 4, *found.shape[2:])
        starts, goals = (
            np.broadcast_to(g, found.shape[1:]) for g in (getattr(gmm0, name)[:, None], getattr(gmm1, name))
        )
        np.testing.assert_allclose(found[0][rows[0] > 0], starts[rows[0] > 0], atol=1e-8)
        np.testing.assert_allclose(found[-1][rows[-1] > 0], goals[rows[-1] > 0], atol=1e-8)
    for t, weights in zip(TIMES, rows):
        np.testing.assert_allclose(weights, (1 - t) * rows[0] + t * rows[-1], atol=1e-12)
    np.testing.assert_allclose(rows[0].sum(1), gmm0.weights, atol=1e-12)
    np.testing.assert_allclose(rows[-1].sum(0), gmm1.weights, atol=1e-12)


def solved(gmm0, gmm1, exact):
    """Of exact plans, and of entropic ones."""
    if exact:
        return cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0), method="exact")
    return cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0), tol=1e-5)


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_random_images_are_distributed_as_the_target(exact):
    """Mean and covariance within the sampling error; the same key gives the same images, another key others."""
    n = 20_000
    gmm0, gmm1 = map(mixture, random_moments(0, 3, 4, 2, "absent"))

    @jax.jit
    def images(keys):
        plan, x = solved(gmm0, gmm1, exact), gmm0.sample(jax.random.key(0), n)
        return jax.vmap(lambda key: cg.map_points(plan, x, method="random", key=key))(keys)

    keys = jax.random.split(jax.random.key(1), 2)[jnp.array([0, 0, 1])]
    y, same, other = np.asarray(images(keys), np.float64)
    np.testing.assert_array_equal(y, same)
    assert (y != other).any(axis=1).mean() > 0.1
    means, covariances, weights = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gmm1))
    mean = weights @ means
    covariance = np.tensordot(weights, covariances, 1) + np.cov(means.T, aweights=weights, ddof=0)
    assert (np.abs(y.mean(0) - mean) <= 5 * y.std(0) / n**0.5).all()
    products = (y - mean)[:, :, None] * (y - mean)[:, None]
    assert (np.abs(products.mean(0) - covariance) <= 5 * products.std(0) / n**0.5).all()


@jax.jit
def mapped(gmm0, gmm1, x):
    """Images by both maps of an exact plan, and its matrix."""
    plan = solved(gmm0, gmm1, True)
    return cg.map_points(plan, x), cg.map_points(plan, x, method="random", key=jax.random.key(0)), plan.matrix


def singles(*gaussians):
    """Of one feature one component each; of three features beside absent ones, in the shapes below: one compilation."""
    sizes = (3, 4) if len(gaussians[0][0]) == 3 else (1, 1)
    return [mixture((np.tile(m, (k, 1)), np.tile(s, (k, 1, 1)), np.eye(k)[0])) for k, (m, s) in zip(sizes, gaussians)]


@pytest.mark.parametrize("d", [1, 3])
def test_one_component_each_is_the_linear_map(precision, d):
    rng = np.random.RandomState(d)
    s0, s1 = np.asarray(jnp.asarray(random_covariances(rng, 2, d)), np.float64)
    m0, m1, x = (  # as many points as below, for one compilation
        np.asarray(jnp.asarray(rng.randn(d) if n is None else rng.randn(n, d)), np.float64) for n in (None, None, 8)
    )
    ends = singles((m0, s0), (m1, s1))
    for found in mapped(*ends, x)[:2]:
        np.testing.assert_allclose(found, gaussian_map(x, m0, s0, m1, s1), atol=1e3 * precision)


def test_derivatives_of_maps(x64):
    """In the points always; in the mixtures an exact plan refuses them, because its matrix jumps."""
    end0, end1 = random_moments(0, 1, 1, 2, "regular")
    ends, x = [mixture(end0), mixture(end1)], np.random.RandomState(0).randn(8, 2)

    def along(plan, direction):
        return jax.jvp(lambda x: cg.map_points(plan, x), (x,), (direction,))[1]

    plan = jax.jit(lambda *ends: solved(*ends, True))(*ends)
    expected = gaussian_map(x, *(part[0] for part in (*end0[:2], *end1[:2])))
    origin = gaussian_map(np.zeros((8, 2)), *(part[0] for part in (*end0[:2], *end1[:2])))
    np.testing.assert_allclose(jax.jit(along)(plan, x), expected - origin, rtol=1e-8)
    with pytest.raises(TypeError, match="an exact plan's matrix can't be differentiated"):
        jax.eval_shape(jax.grad(lambda gmm0: jnp.sum(cg.map_points(solved(gmm0, ends[1], True), x))), ends[0])


def cross_covariance(s0, s1):
    """Of the optimal coupling: S0^1/2 U V^T S1^1/2, with the singular vectors of S0^1/2 S1^1/2 that count."""
    left, values, right = np.linalg.svd(root(s0) @ root(s1))
    left = left * (values > 1e-9 * max(values[0], 1e-300))
    return root(s0) @ left @ right @ root(s1)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_singular_source_goes_to_the_conditional_mean(precision, rank):
    """One component: the map is linear with cross-covariance A S0; off the support it is finite, and so is a draw."""
    rng = np.random.RandomState(rank)
    for target in range(4):
        s0, s1 = (factor @ factor.T for factor in (rng.randn(3, rank), rng.randn(3, 3)[:, :target]))
        ends = singles((np.ones(3), s0), (-np.ones(3), s1))
        x = np.concatenate([np.ones((1, 3)), 1 + np.eye(3), 1 + s0, 10 * rng.randn(1, 3)])
        found, drawn, _ = (np.asarray(v, np.float64) for v in mapped(*ends, x))
        assert np.isfinite(found).all() and np.isfinite(drawn).all()
        np.testing.assert_allclose(found[0], -1, atol=10 * precision)
        np.testing.assert_allclose(found[4:7] + 1, cross_covariance(s0, s1), atol=1e4 * precision)


def conditional_means(x, likely, ends, matrix):
    """The mean map for given probabilities of the components, by pseudo-inverses."""
    (means0, covariances0, _), (means1, covariances1, _) = ends
    images = np.zeros(x.shape)
    for k, i in np.argwhere(matrix > 0):
        linear = np.linalg.pinv(covariances0[k], rcond=1e-6) @ cross_covariance(covariances0[k], covariances1[i])
        share = likely[:, k] * matrix[k, i] / matrix[k].sum()
        images += share[:, None] * (means1[i] + (x - means0[k]) @ linear)
    return images


@pytest.mark.parametrize("kind", ["some singular", pytest.param("one plane", marks=pytest.mark.slow)])
def test_several_singular_components(precision, kind):
    """In one plane the posterior is that within it; otherwise that of covariances widened as documented."""
    rng = np.random.RandomState(3)
    ends = random_moments(1, 3, 4, 3, "absent")
    plane = np.linalg.qr(rng.randn(3, 2))[0]
    means, covariances, weights = ends[0]
    if kind == "one plane":
        means, covariances = means @ plane @ plane.T, plane @ (plane.T @ covariances @ plane) @ plane.T
        covariances = 0.5 * (covariances + covariances.swapaxes(1, 2))
    else:
        covariances[np.argmax(weights)] = plane @ np.diag([1, 0.5]) @ plane.T
    ends[0] = (means, covariances, weights)
    noise = root(covariances) @ rng.randn(3, 3, 4)
    x = (means[:, :, None] + noise).transpose(0, 2, 1)[weights > 0].reshape(-1, 3)
    gmms = [mixture(end) for end in ends]
    found, _, matrix = (np.asarray(v, np.float64) for v in mapped(*gmms, x))
    assert all(np.isfinite(v).all() for v in mapped(*gmms, 100 * x)[:2])
    if kind == "one plane":
        likely = posterior(x @ plane, means @ plane, plane.T @ covariances @ plane, weights)
    else:
        variance = np.trace(np.cov(means.T, aweights=weights, ddof=0) + np.tensordot(weights, covariances, 1)) / 3
        likely = posterior(x, means, covariances + precision**0.5 * variance * np.eye(3), weights)
    expected = conditional_means(x, likely, ends, matrix)
    np.testing.assert_allclose(found, expected, atol=1e-6 if precision < 1e-8 else 1e-2)


def test_absent_components_do_not_matter(precision):
    """First, last and in between, wherever they are; singular ones too."""
    (means0, covariances0, a), (means1, covariances1, b) = random_moments(2, 3, 4, 3, "regular")
    a[2], b[2:] = 0, 0
    last = [mixture(end) for end in ((means0, covariances0, a / a.sum()), (means1, covariances1, b / b.sum()))]
    x = 2 * np.random.RandomState(0).randn(8, 3)
    order0, order1 = [2, 0, 1], [3, 0, 2, 1]
    means0[2], covariances0[2], covariances1[2], covariances1[3] = 1e3, np.ones((3, 3)), 0, 1e3 * np.eye(3)
    ends = (means0[order0], covariances0[order0], a[order0]), (means1[order1], covariances1[order1], b[order1])
    anywhere = [mixture((means, covariances, w / w.sum())) for means, covariances, w in ends]
    found, drawn, _ = mapped(*anywhere, x)
    np.testing.assert_allclose(found, mapped(*last, x)[0], atol=200 * precision)
    np.testing.assert_allclose(drawn, mapped(*last, x)[1], atol=200 * precision)


def test_offsets_cost_no_more_than_the_rounding_of_the_points():
    """Both mixtures and the points moved by 1e4, in float32."""
    x = 2 * np.random.RandomState(0).randn(8, 3)
    near = random_moments(0, 3, 4, 3, "regular")
    far = [(means + 1e4, covariances, weights) for means, covariances, weights in near]
    found = np.asarray(mapped(*map(mixture, far), x + 1e4)[0])
    with jax.enable_x64(True):
        rounded = [(np.float32(means).astype(float), *rest) for means, *rest in far]
        expected = np.asarray(mapped(*map(mixture, rounded), np.float32(x + 1e4).astype(float))[0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_chunks_do_not_matter(monkeypatch):
    """A chunk's points do not depend on each other, nor on the chunk's size; the last chunk is padded."""
    gmm0, gmm1 = map(mixture, random_moments(0, 3, 4, 2, "regular"))
    plan = jax.jit(lambda *ends: solved(*ends, True))(gmm0, gmm1)
    x, key = np.random.RandomState(0).randn(7, 2).astype(np.float32), jax.random.key(0)
    whole = cg.map_points(plan, x), cg.map_points(plan, x, method="random", key=key)
    monkeypatch.setattr(chunks, "_CPU_LENGTHS", (3,))
    chunked = cg.map_points(plan, x), cg.map_points(plan, x, method="random", key=key)
    np.testing.assert_allclose(chunked, whole, rtol=1e-6, atol=1e-6)


def test_memory_does_not_grow_with_the_points():
    """A million points need no more than themselves, their images, and two numbers each: as compiled, not run."""
    d, k = 3, 8
    ends = [mixture(end) for end in random_moments(0, k, k, d, "regular")]
    plan = jax.eval_shape(lambda *ends: solved(*ends, True), *ends)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    centre = jax.ShapeDtypeStruct((d,), jnp.float32)
    for program, numbers in ((maps._map_barycentric, d), (maps._map_random, d + 2)):
        points = jax.ShapeDtypeStruct((1024, numbers, 1024), jnp.float32)
        used = program.lower(points, count, plan, centre).compile().memory_analysis()
        assert used.output_size_in_bytes == 1024 * 1024 * d * 4
        assert used.temp_size_in_bytes <= 4 * 1024 * 1024 * (numbers + d) + 20e6, used.temp_size_in_bytes
