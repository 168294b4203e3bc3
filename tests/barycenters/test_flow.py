"""Flows against POT's published one, a plain NumPy step, and what must hold at every step of any."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ot
import pytest
from problems import DATA, random_covariances, random_mixture
from scipy.linalg import sqrtm

import coupled_gmm as cg
from coupled_gmm.barycenters.flow import _definite

FLOOR = 1e-6  # of the source's mean variance
POT_END = 0.0194  # the loss of POT's published flow after its 100 steps
PUBLISHED = {"steps": 100, "step_size": 3e-2, "optimizer": optax.adam, "mean_rate": 2.0}


@functools.cache
def seed_arrays():
    """POT's example of a flow (torch seed 3): its mixtures, its 100 losses and where it ended."""
    with np.load(DATA / "flow_seed3.npz") as arrays:
        return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def seed_problem():
    arrays = seed_arrays()
    source = arrays["source_means"], arrays["source_covariances"], softmax(arrays["source_logits"])
    target = (arrays[f"target_{part}"] for part in ("means", "covariances", "weights"))
    return cg.GaussianMixture.from_moments(*source), cg.GaussianMixture.from_moments(*target)


def host(gmm):
    means, covariances, weights = (np.asarray(x, np.float64) for x in (gmm.means, gmm.covariances, gmm.weights))
    return means, covariances, weights / weights.sum()


def losses(found):
    """Before each step, and at the end."""
    return np.append(found.history.loss, found.loss)


def pot_loss(one, other):
    (m0, c0, w0), (m1, c1, w1) = one, other
    return ot.gmm.gmm_ot_loss(m0, m1, c0, c1, w0, w1)


def absent(gmm, place):
    weights = np.asarray(gmm.weights).copy()
    weights[place] = 0
    return cg.GaussianMixture.from_moments(gmm.means, gmm.covariances, weights / weights.sum())


def random_pair(seed, k0, k1, d):
    """Some of their components have no mass, on the one side, the other or both."""
    source, target = random_mixture(seed, k0, d), random_mixture(seed + 1000, k1, d, shift=seed % 3)
    return absent(source, 1) if seed % 5 in (1, 3) else source, absent(target, 0) if seed % 5 in (2, 3) else target


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def flows(d, adam):
    """25 flows of 30 steps at once, in float64; call it under x64."""
    k0, k1 = (3, 4) if d == 2 else (4, 3)
    pairs = [random_pair(seed, k0, k1, d) for seed in range(25)]
    options = {"step_size": 0.3, "optimizer": optax.adam} if adam else {"step_size": 0.2}
    run = jax.jit(jax.vmap(lambda source, target: cg.flow(source, target, steps=30, **options)))
    sources, targets = (stack(side) for side in zip(*pairs))
    return pairs, jax.device_get(run(sources, targets))


def test_published_flow(precision):
    """With POT's setting, the losses of all steps and the end are POT's."""
    found = cg.flow(*seed_problem(), **PUBLISHED)
    arrays = seed_arrays()
    assert int(found.status) == cg.Status.STEPS_DONE and not found.converged
    assert found.history.loss.shape == (100,) and found.path.means.shape == (101, 3, 2)
    difference = np.abs(np.asarray(found.history.loss) - arrays["pot_loss"]).max()
    ends = [
        np.abs(np.asarray(getattr(found.gmm, part)) - arrays[f"pot_final_{part}"]).max()
        for part in ("means", "covariances")
    ]
    print(f"losses differ by {difference:.1e}, means and covariances at the end by {ends[0]:.1e}, {ends[1]:.1e}")
    bound = 1e-4 if found.gmm.dtype == jnp.float32 else 1e-5  # POT computed in float32 as well
    assert max(difference, *ends) < bound


def test_default_is_below_the_published_end_in_half_the_steps(precision):
    found = cg.flow(*seed_problem())
    values = losses(found)
    first = int(np.argmax(values < POT_END))
    print(f"below {POT_END} after {first} steps, {values[-1]:.2e} at the end")
    assert 0 < first <= 50
    assert np.all(np.diff(values) <= 10 * precision * values[0])


@pytest.mark.parametrize("d", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_step_lowers_the_loss(x64, d):
    """Of 25 flows side by side: the loss falls, covariances stay definite, weights sum to one, the absent stay so."""
    pairs, found = flows(d, adam=False)
    values = np.concatenate([found.history.loss, found.loss[:, None]], axis=1)
    assert np.all(np.diff(values, axis=1) <= 1e-12 * values[:, :1])
    assert np.median(values[:, -1] / values[:, 0]) < 0.05
    assert np.linalg.eigvalsh(found.path.covariances).min() > 0
    np.testing.assert_allclose(found.path.weights.sum(-1), 1, rtol=1e-12)
    for i, (source, target) in enumerate(pairs):
        for part in ("means", "covariances", "weights"):
            np.testing.assert_array_equal(getattr(found.path, part)[i, 0], getattr(source, part))
            np.testing.assert_array_equal(getattr(found.path, part)[i, -1], getattr(found.gmm, part)[i])
        gone = np.asarray(source.weights) == 0
        assert np.all((found.path.weights[i] == 0) == gone)
        np.testing.assert_array_equal(found.path.means[i, -1][gone], np.asarray(source.means)[gone])
        # The loss that is said of a step is that of the mixture on the path.
        for step in (0, 7, 30):
            on_path = [getattr(found.path, part)[i, step] for part in ("means", "covariances", "weights")]
            np.testing.assert_allclose(values[i, step], pot_loss(on_path, host(target)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("d", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_adam_keeps_covariances_above_the_floor(x64, d):
    pairs, found = flows(d, adam=True)
    # In units of each feature's mean deviation within the components of the source.
    units = np.sqrt([np.diagonal(source.covariances, axis1=1, axis2=2).mean(0) for source, _ in pairs])
    scaled = np.asarray(found.path.covariances) / (units[:, :, None] * units[:, None])[:, None, None]
    lowest = np.linalg.eigvalsh(scaled)[..., 0].min(axis=(1, 2))
    assert np.all(lowest >= FLOOR * (1 - 1e-6))
    assert np.any(lowest <= FLOOR * 1.001), "no covariance came to the floor: the test shows nothing"
    assert np.isfinite(found.history.loss).all() and np.median(found.loss / found.history.loss[:, 0]) < 0.2
    np.testing.assert_allclose(found.path.weights.sum(-1), 1, rtol=1e-12)
    for i, (source, target) in enumerate(pairs):
        assert np.all((found.path.weights[i] == 0) == (np.asarray(source.weights) == 0))
        on_path = [getattr(found.path, part)[i, -1] for part in ("means", "covariances", "weights")]
        np.testing.assert_allclose(found.loss[i], pot_loss(on_path, host(target)), rtol=1e-6, atol=1e-9)


def test_vmap_equals_loop(x64):
    pairs, found = flows(2, adam=False)
    for i in (0, 1, 3):
        one = cg.flow(*pairs[i], steps=30, step_size=0.2)
        np.testing.assert_allclose(losses(one)[:-1], found.history.loss[i], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one.path.means, found.path.means[i], atol=1e-8)
        np.testing.assert_allclose(one.path.covariances, found.path.covariances[i], atol=1e-8)


def root(s):
    return np.real(sqrtm(s))


def maps(covariance, others):
    """Optimal maps between centred Gaussians."""
    r = root(covariance)
    inverse = np.linalg.inv(r)
    return np.stack([inverse @ root(r @ other @ r) @ inverse for other in others])


def test_one_step_equals_the_twin(x64):
    """A part of the way down the mean of the optimal maps, by ot.emd and matrix square roots; then better weights."""
    for i in (0, 4, 10):
        (source, target), part = flows(2, adam=False)[0][i], 0.2
        path = jax.tree.map(lambda leaf, i=i: leaf[i], flows(2, adam=False)[1].path)
        (means, covariances, weights), other = host(source), host(target)
        cost = ot.gmm.dist_bures_squared(means, other[0], covariances, other[1])
        shares = ot.emd(weights, other[2], cost) / weights[:, None]
        moved = (1 - part) * means + part * shares @ other[0]
        np.testing.assert_allclose(path.means[1], moved, atol=1e-9)
        for k in range(3):
            step = (1 - part) * np.eye(2) + part * np.einsum("j,jab->ab", shares[k], maps(covariances[k], other[1]))
            np.testing.assert_allclose(path.covariances[1, k], step @ covariances[k] @ step, atol=1e-9)
        after = path.means[1], path.covariances[1]
        kept, chosen = (pot_loss((*after, w), other) for w in (weights, path.weights[1]))
        assert chosen < kept


def test_one_gaussian_arrives_in_one_full_step(x64):
    source, target = random_mixture(0, 1, 3), random_mixture(1, 1, 3)
    found = cg.flow(source, target, steps=1, step_size=1)
    np.testing.assert_allclose(found.gmm.means, target.means, atol=1e-12)
    np.testing.assert_allclose(found.gmm.covariances, target.covariances, atol=1e-9)
    assert abs(float(found.loss)) < 1e-9 < float(found.history.loss[0])


def test_several_targets(x64):
    source, first = seed_problem()
    second = cg.GaussianMixture.from_moments(
        *(np.asarray(part) for part in (first.means + 3, first.covariances, [0.2, 0.8]))
    )
    found = cg.flow(source, [first, second], coefficients=[3, 1], steps=20)
    values = losses(found)
    assert np.all(np.diff(values) <= 1e-12 * values[0])
    for step in (0, 5, 20):
        on_path = host(jax.tree.map(lambda leaf, step=step: leaf[step], found.path))
        expected = 0.75 * pot_loss(on_path, host(first)) + 0.25 * pot_loss(on_path, host(second))
        np.testing.assert_allclose(values[step], expected, rtol=1e-9)
    alone = cg.flow(source, [first, second], coefficients=[1, 0], steps=20)
    np.testing.assert_allclose(losses(alone), losses(cg.flow(source, first))[:21], rtol=1e-9)


def test_entropic_flow(x64):
    source, target = seed_problem()
    exact = losses(cg.flow(source, target))
    for epsilon in (1.0, 1e-3):
        found = cg.flow(source, target, method="entropic", epsilon=epsilon)
        values = losses(found)
        assert int(found.status) == cg.Status.STEPS_DONE, found.message
        assert np.all(np.diff(values) <= 1e-9 * values[0])
        if epsilon == 1.0:
            for step in (0, 50):
                m, c, w = host(jax.tree.map(lambda leaf, step=step: leaf[step], found.path))
                other = host(target)
                cost = ot.gmm.dist_bures_squared(m, other[0], c, other[1])
                plan = ot.sinkhorn(w, other[2], cost, epsilon, "sinkhorn_log", stopThr=1e-10)
                entropy = np.sum(plan * np.log(plan / np.outer(w, other[2])))
                np.testing.assert_allclose(values[step], np.sum(plan * cost) + epsilon * entropy, rtol=1e-7)
        if epsilon == 1e-3:
            np.testing.assert_allclose(values[:10], exact[:10], atol=0.01)
    assert values[-1] < 0.01 * values[0]


@pytest.mark.slow
def test_default_epsilon_is_a_share_of_the_mean_cost(x64):
    source, target = seed_problem()
    (m0, c0, w0), (m1, c1, w1) = host(source), host(target)
    epsilon = 1e-2 * w0 @ ot.gmm.dist_bures_squared(m0, m1, c0, c1) @ w1
    default, given = (cg.flow(source, target, method="entropic", epsilon=e) for e in (None, epsilon))
    np.testing.assert_allclose(losses(default), losses(given), rtol=1e-6)


def test_built_transformation_equals_its_factory(x64):
    source, target = seed_problem()
    options = {"steps": 5, "mean_rate": 2.0}
    built = cg.flow(source, target, optimizer=optax.sgd(1e-2), **options)
    factory = cg.flow(source, target, optimizer=optax.sgd, step_size=1e-2, **options)
    np.testing.assert_allclose(losses(built), losses(factory), rtol=1e-12)
    # Gradient descent by hand on the means, whose gradient at a plan is 2 (w m - P m').
    (means, covariances, weights), other = host(source), host(target)
    plan = ot.emd(weights, other[2], ot.gmm.dist_bures_squared(means, other[0], covariances, other[1]))
    gradient = 2 * (weights[:, None] * means - plan @ other[0])
    np.testing.assert_allclose(factory.path.means[1], means - 2e-2 * gradient, atol=1e-9)
    # In the direction of a symmetric change D of a covariance the derivative is the sum of P tr (1 - T) D.
    for k in range(3):
        slope = np.einsum("j,jab->ab", plan[k], np.eye(2) - maps(covariances[k], other[1]))
        np.testing.assert_allclose(factory.path.covariances[1, k], covariances[k] - 1e-2 * slope, atol=1e-9)


def test_one_compilation_over_a_sweep():
    program = sys.modules["coupled_gmm.barycenters.flow"]._flow
    source, target = seed_problem()
    cg.flow(source, target)
    cg.flow(source, target, **PUBLISHED)
    before = program._cache_size()
    for step_size in (0.1, 0.5, 1, np.float32(0.2), jnp.asarray(0.3)):
        cg.flow(source, target, step_size=step_size)
        cg.flow(source, [target], step_size=step_size, coefficients=[2.0])
        cg.flow(source, target, **{**PUBLISHED, "step_size": step_size})
    cg.flow(source, target, **{**PUBLISHED, "mean_rate": 1})
    assert program._cache_size() == before


def test_numbers_that_are_not_finite_have_a_status(x64):
    source, target = seed_problem()
    far = cg.GaussianMixture.from_moments(source.means * 1e200, source.covariances, source.weights)
    found = cg.flow(far, target)
    assert int(found.status) == cg.Status.NOT_FINITE
    with pytest.raises(cg.FitError, match="not finite"):
        found.raise_if_failed()


def test_many_components_are_solved_on_the_host(x64):
    source, target = random_mixture(0, 3, 2), random_mixture(1, 70, 2, shift=2)
    found = cg.flow(source, target, steps=4)
    values = losses(found)
    assert np.all(np.diff(values) < 0)
    np.testing.assert_allclose(values[0], pot_loss(host(source), host(target)), rtol=1e-9)
    np.testing.assert_allclose(values[-1], pot_loss(host(found.gmm), host(target)), rtol=1e-9)


def test_singular_covariances_stay_finite(x64):
    """A source of points can't spread, its maps being undefined, but flows; so does any towards points."""
    source, target = seed_problem()
    points = [cg.GaussianMixture.from_moments(g.means, 0 * g.covariances, g.weights) for g in (source, target)]
    for start, goal in ((points[0], target), (source, points[1]), tuple(points)):
        found = cg.flow(start, goal)
        values = losses(found)
        assert int(found.status) == cg.Status.STEPS_DONE and np.all(np.diff(values) <= 1e-12 * values[0])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.path))
    assert values[-1] < 1e-2


definite = jax.jit(_definite)


@pytest.mark.parametrize(
    ("d", "dtype"), [(1, "float64"), (2, "float64"), (3, "float64"), (3, "float32"), (8, "float32")]
)
def test_definite_equals_clipped_eigenvalues(d, dtype):
    """Nearest in the Frobenius norm; what is definite already comes back to the last bit."""
    rng, floor, eps = np.random.RandomState(d), 0.1, float(np.finfo(dtype).eps)
    frames, values = np.linalg.qr(rng.randn(40, d, d))[0], rng.randn(40, d)
    values[:10] = floor + np.abs(values[:10]) + 0.01
    values[10:13], values[13:16], values[16:19, 0] = 0, -1, floor
    given = np.einsum("kij,kj,klj->kil", frames, values, frames)
    given = (0.5 * (given + given.swapaxes(1, 2))).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        found = np.asarray(definite(given, floor))
        expected = np.einsum("kij,kj,klj->kil", frames, np.maximum(values, floor), frames)
        np.testing.assert_allclose(found, expected, atol=50 * eps)
        np.testing.assert_array_equal(found[:10], given[:10])
        assert np.linalg.eigvalsh(found).min() >= floor - 50 * eps
        thin = random_covariances(rng, 40, d, 1e3).astype(dtype)
        np.testing.assert_array_equal(definite(thin, 1e-5), thin)


def test_a_flow_refuses_to_be_differentiated(x64):
    source, target = seed_problem()
    for options in ({}, PUBLISHED):
        with pytest.raises(TypeError, match=r"can't be differentiated.*mw2_squared"):
            jax.grad(lambda target, options=options: cg.flow(source, target, **options).loss)(target)


def bad(**changes):
    gmm, wide = random_mixture(0, 2, 2), random_mixture(0, 2, 3)
    changes = {k: v(gmm, wide) if k in ("source", "target") and callable(v) else v for k, v in changes.items()}
    arguments = {"source": gmm, "target": gmm, **changes}
    return cg.flow(arguments.pop("source"), arguments.pop("target"), **arguments)


@pytest.mark.slow
def test_a_flow_that_diverges_says_so(x64, tmp_path):
    """Its covariances are none any more, though its losses are finite; the run can be saved all the same."""
    ends = [random_mixture(seed, 2, 2) for seed in range(2)]
    fit = cg.flow(*ends, steps=4, optimizer=optax.sgd, step_size=1e38)
    assert fit.status == cg.Status.NOT_FINITE
    cg.save(tmp_path / "fit.npz", fit)
    assert cg.load(tmp_path / "fit.npz").status == cg.Status.NOT_FINITE


BAD = [
    ({"source": None}, TypeError, "^source: expected a GaussianMixture, got NoneType"),
    ({"source": lambda g, w: [g]}, TypeError, "^source: expected a GaussianMixture, got list"),
    ({"source": lambda g, w: w}, ValueError, "^source: has 3 features, and the target has 2"),
    ({"target": None}, TypeError, "^target: expected a list, got NoneType"),
    ({"target": []}, ValueError, "^target: the list is empty; give at least one"),
    ({"target": lambda g, w: [g, w]}, ValueError, r"^target\[1\]: has 3 features and target\[0\] has 2"),
    ({"target": lambda g, w: [g, 2]}, TypeError, r"^target\[1\]: expected a GaussianMixture, got int"),
    ({"steps": 10**12}, ValueError, "^steps: must be at most 1000000, got 1000000000000"),
    ({"steps": 0}, ValueError, "^steps: must be at least 1, got 0"),
    ({"steps": 10.0}, TypeError, "^steps: expected an integer, got 10.0"),
    ({"steps": True}, TypeError, "^steps: expected an integer, got True"),
    ({"step_size": 0}, ValueError, "^step_size: must be above 0 and at most 1, got 0"),
    ({"step_size": 1.5}, ValueError, "^step_size: must be above 0 and at most 1, got 1.5"),
    ({"step_size": -1.0, "optimizer": optax.adam}, ValueError, "^step_size: must be finite and above 0, got -1"),
    ({"step_size": np.inf, "optimizer": optax.adam}, ValueError, "^step_size: must be finite"),
    ({"step_size": [0.1, 0.2]}, TypeError, "^step_size: expected one real number"),
    ({"optimizer": "adam"}, TypeError, "^optimizer: expected None, an optax factory .* got str"),
    ({"optimizer": 3}, TypeError, "^optimizer: expected None, an optax factory .* got int"),
    ({"mean_rate": 0.0, "optimizer": optax.adam}, ValueError, "^mean_rate: must be finite and above 0"),
    ({"method": "sinkhorn"}, ValueError, "^method: expected one of 'exact', 'entropic', got 'sinkhorn'"),
    ({"epsilon": 0.1}, ValueError, "^epsilon: goes with method 'entropic' only"),
    ({"method": "entropic", "epsilon": -1}, ValueError, "^epsilon: must be finite and above 0, got -1"),
    ({"coefficients": [1, 2]}, ValueError, r"^coefficients: expected shape \(1,\), got \(2,\)"),
    ({"coefficients": [-1]}, ValueError, "^coefficients: 1 weights are negative"),
    ({"coefficients": [0]}, ValueError, "^coefficients: all weights are zero"),
]


@pytest.mark.parametrize(("changes", "error", "match"), BAD, ids=map(str, range(len(BAD))))
def test_bad_arguments(monkeypatch, changes, error, match):
    def entered(*_):
        raise AssertionError("a program was entered")

    monkeypatch.setattr(sys.modules["coupled_gmm.barycenters.flow"], "_flow", entered)
    with pytest.raises(error, match=match):
        bad(**changes)


@pytest.mark.parametrize("seed", range(12))
def test_weights_do_not_stick(seed):
    """To a target of fewer components: no higher than the barycenter whose weights are learnt from the same start ends."""
    n, k = [(3, 2), (5, 3), (6, 4), (4, 2)][seed % 4]
    rng = np.random.RandomState(seed)

    def mixture(k, shift):
        moments = 2 * rng.randn(k, 2) + shift, random_covariances(rng, k, 2, 10.0), rng.dirichlet(np.full(k, 2.0))
        return cg.GaussianMixture.from_moments(*map(np.float32, moments))

    source, target = mixture(n, 0), mixture(k, 2 * rng.randn(2))
    found, learnt = cg.flow(source, target), cg.barycenter([target], source, learn_weights=True)
    seen = losses(found)
    assert np.all(np.diff(seen) <= 1e-6 * seen[0])
    assert found.loss <= 1.01 * learnt.objective + 1e-5 * seen[0]
