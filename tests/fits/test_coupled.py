"""The coupled fit: OTT's tutorial row by row, monotone ascent, compilation, transformations, gradients."""

import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import ot
import ott_tutorial
import pytest
from problems import DATA, points, random_mixture
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import coupled_gmm as cg
from coupled_gmm.core.tree import take
from coupled_gmm.fits import pairs as fit_module


@pytest.fixture(scope="module")
def tutorial():
    """OTT's clouds and start, as stored: drawing them runs two hundred small programs."""
    stored = np.load(DATA / "ott_tutorial.npz")
    start = cg.GaussianMixture.from_moments(stored["means"], stored["covariances"], stored["weights"])
    return types.SimpleNamespace(x0=stored["x0"], x1=stored["x1"], start=start)


def moments(gmm):
    return [np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights)]


def log_likelihood(gmm, x):
    joint = [np.log(w) + multivariate_normal(m, s).logpdf(x) for m, s, w in zip(*moments(gmm), strict=True)]
    return logsumexp(joint, axis=0).mean()


def exact_score(fit, x0, x1, weight):
    """Mean log-likelihoods minus weight times the exact MW2 squared: SciPy's densities, POT's costs and linear programme."""
    one, other = fit.pair.gmm0, fit.pair.gmm1
    (m0, s0, w0), (m1, s1, w1) = moments(one), moments(other)
    cost = [[ot.gaussian.bures_wasserstein_distance(m, n, s, t) ** 2 for n, t in zip(m1, s1)] for m, s in zip(m0, s0)]
    transport = ot.emd2(w0 / w0.sum(), w1 / w1.sum(), np.array(cost))
    x0, x1 = np.asarray(x0, np.float64), np.asarray(x1, np.float64)
    return log_likelihood(one, x0) + log_likelihood(other, x1) - weight * transport


def test_unbalanced_tutorial_follows_ott_row_by_row(tutorial):
    fit = ott_tutorial.our_fit(tutorial, "unbalanced", optimizer=optax.adam, learning_rate=1e-3)
    rows = np.loadtxt(DATA / "ott_unbalanced.csv", delimiter=",")
    history = fit.history
    assert rows.shape[0] == 30
    for column, ours in ((1, history.q0), (2, history.q1), (4, history.objective)):
        np.testing.assert_allclose(ours, rows[:, column], atol=2e-3, rtol=0)
    np.testing.assert_allclose(history.transport, rows[:, 3], atol=5e-3, rtol=0)
    likelihoods = log_likelihood(fit.pair.gmm0, tutorial.x0) + log_likelihood(fit.pair.gmm1, tutorial.x1)
    found = likelihoods - 0.1 * float(fit.plan.regularized_cost)
    np.testing.assert_allclose(fit.penalized_log_likelihood, found, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "at_least"), [({"optimizer": optax.adam, "learning_rate": 1e-3}, -7.2870), ({}, -7.2830)]
)
def test_balanced_tutorial_has_transport_plans_and_a_better_fit(tutorial, options, at_least):
    fit = ott_tutorial.our_fit(tutorial, "balanced", **options)
    assert float(jnp.max(fit.history.marginal_error)) <= 1e-3
    assert float(fit.plan.marginal_error) <= 1e-3
    assert exact_score(fit, tutorial.x0, tutorial.x1, 0.01) >= at_least
    assert int(fit.status) == cg.Status.STEPS_DONE and not bool(fit.converged)


def random_problem(seed, n=2000):
    rng = np.random.RandomState(seed)
    d, k0, k1 = rng.randint(1, 11), rng.randint(1, 13), rng.randint(1, 13)
    clouds = [points(random_mixture(seed + i, k, d), n, seed) for i, k in ((1, k0), (2, k1))]
    starts = [
        cg.GaussianMixture.from_moments(x[:k], np.broadcast_to(np.cov(x.T).reshape(d, d), (k, d, d)), np.full(k, 1 / k))
        for x, k in zip(clouds, (k0, k1))
    ]
    tau = 1.0 if seed % 2 else 0.9
    ridge = 1e-6 if seed % 4 < 2 else 0.0
    pair = cg.GaussianMixturePair(*starts, epsilon=0.1 * d, tau=tau)
    weight = 10.0 ** rng.uniform(-3, 0)
    return clouds, pair, {"transport_weight": weight, "ridge": ridge}


@pytest.mark.parametrize(
    ("seed", "wide"),  # each is a program of its own; one always: 1 against 4 components of 6 features, unbalanced
    [
        pytest.param(s, w, marks=[] if (s, w) == (0, False) else pytest.mark.slow)
        for s in range(20)
        for w in (False, True)
    ],
)
def test_penalized_log_likelihood_never_falls(seed, wide):
    with jax.enable_x64(wide):
        (x0, x1), pair, options = random_problem(seed)
        fit = cg.fit_pair(x0, x1, pair, em_steps=12, m_steps=10, **options)
        values = np.append(np.asarray(fit.history.penalized_log_likelihood), fit.penalized_log_likelihood)
    assert np.isfinite(values).all(), fit.message
    slack = 1e-9 if wide else 1e-6 * (1 + np.abs(values[:-1]))
    assert (np.diff(values) >= -slack).all(), np.diff(values).min()
    assert values[-1] > values[0]


def small_problem():
    """Of the shapes of the tutorial, whose programs fit it as well."""
    gmm0, gmm1 = random_mixture(0, 3, 2), random_mixture(1, 3, 2, shift=1.0)
    x0, x1 = (points(gmm, 600, seed) for seed, gmm in enumerate((gmm0, gmm1)))
    return x0, x1, gmm0, gmm1


STEPS = {"em_steps": 3, "m_steps": 4, "fidelity": False}
ADAM = {"optimizer": optax.adam, "learning_rate": 1e-2}


def test_one_compilation_over_everything_that_is_swept():
    x0, x1, gmm0, gmm1 = small_problem()
    sizes = []
    for epsilon, rho, weight, rate, tol in (
        (0.1, 1.0, 0.1, 1e-3, 0.0),
        (0.2, 2.0, 0.5, 1e-2, 1e-3),
        (1, np.inf, 0, 1, 1),
    ):
        pair = cg.GaussianMixturePair.from_rho(gmm0, gmm1, epsilon=epsilon, rho=rho)
        options = {"transport_weight": weight, "learning_rate": rate, "tol": tol, "ridge": tol * 1e-3}
        fit = cg.fit_pair(x0, x1, pair, optimizer=optax.adam, **options, **STEPS)
        assert fit.pair.balanced == fit.plan.pair.balanced == np.isinf(rho)
        sizes.append(sum(program._cache_size() for program in (fit_module._begin_pair, fit_module._go_on_with_pair)))
    assert 2 <= sizes[0] == sizes[1] == sizes[2]


def test_jit_and_vmap_equal_the_loop():
    """One program under both; `fit_gmm` has a test for vmap alone, graphs have one for jit alone."""
    x0, x1, gmm0, gmm1 = small_problem()
    x0, scales = jnp.asarray(x0), jnp.asarray([0.7, 1.0, 1.6])

    def run(scale, weight):
        pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.05 * scale)
        return cg.fit_pair(scale * x0, x1, pair, transport_weight=weight, **STEPS)

    weights = jnp.asarray([0.01, 0.1, 1.0])
    batch = jax.jit(jax.vmap(run))(scales, weights)
    for i in range(3):
        alone = run(scales[i], weights[i])
        chex.assert_trees_all_close(take(batch.pair, i), alone.pair, rtol=2e-3, atol=2e-4)
        chex.assert_trees_all_close(batch.penalized_log_likelihood[i], alone.penalized_log_likelihood, rtol=1e-5)


@pytest.mark.parametrize("balanced", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_of_the_objective_equal_finite_differences(x64, balanced):
    x0, x1, gmm0, gmm1 = small_problem()
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.5, tau=1.0 if balanced else 0.8)

    def value(gmm0, gmm1):
        return cg.penalized_log_likelihood(pair.replace(gmm0, gmm1), x0, x1, transport_weight=0.3)

    gradients = jax.grad(value, argnums=(0, 1))(gmm0, gmm1)
    rng = np.random.RandomState(0)
    for leaf in ("means", "covariances", "weights"):
        steps = [rng.randn(*np.shape(getattr(gmm, leaf))) for gmm in (gmm0, gmm1)]
        if leaf == "covariances":
            steps = [s + s.swapaxes(1, 2) for s in steps]
        if leaf == "weights":
            steps = [s - s.mean() for s in steps]

        def moved(t, leaf=leaf, steps=steps):
            def shift(gmm, step):
                fields = {name: getattr(gmm, name) for name in ("means", "covariances", "weights")}
                return cg.GaussianMixture(**(fields | {leaf: fields[leaf] + t * step}))

            return value(*(shift(gmm, step) for gmm, step in zip((gmm0, gmm1), steps)))

        expected = (moved(1e-6) - moved(-1e-6)) / 2e-6  # the thinnest component is 0.02 thick
        found = sum(np.sum(getattr(g, leaf) * s) for g, s in zip(gradients, steps))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_fit_refuses_to_be_differentiated():
    x0, x1, gmm0, gmm1 = small_problem()
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1)

    def through_fit(scale):
        return cg.fit_pair(scale * x0, x1, pair, transport_weight=0.1, **STEPS).penalized_log_likelihood

    for differentiate in (jax.grad, jax.jacfwd):
        with pytest.raises(TypeError, match="penalized_log_likelihood"):
            differentiate(through_fit)(1.0)


def test_a_frozen_mixture_is_untouched():
    x0, x1, gmm0, gmm1 = small_problem()
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1)
    for name, other in (("gmm0", "gmm1"), ("gmm1", "gmm0")):
        fit = cg.fit_pair(x0, x1, pair, transport_weight=0.1, freeze=(name,), **STEPS)
        chex.assert_trees_all_equal(getattr(fit.pair, name), getattr(pair, name))
        assert not np.allclose(getattr(fit.pair, other).means, getattr(pair, other).means)


@pytest.mark.slow
def test_without_transport_the_pair_is_two_fits_alone():
    x0, x1, gmm0, gmm1 = small_problem()
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1)
    fit = cg.fit_pair(x0, x1, pair, transport_weight=0.0, em_steps=60, m_steps=20)
    for gmm, x, start in ((fit.pair.gmm0, x0, gmm0), (fit.pair.gmm1, x1, gmm1)):
        alone = cg.fit_gmm(x, start, max_steps=60, tol=0.0)
        np.testing.assert_allclose(jnp.mean(gmm.log_prob(x)), alone.log_likelihood, atol=2e-4)


@pytest.fixture(scope="module")
def chunked():
    """A problem in float64, its points weighted and without a floor, and its fit in small chunks with the rows it told of."""
    with jax.enable_x64(True):
        x0, x1, gmm0, gmm1 = small_problem()
        weights = np.random.RandomState(0).rand(len(x0))
        pair, rows = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1), []
        options = {"transport_weight": 0.2, "point_weights0": weights, "ridge": 0.0}
        fit = cg.fit_pair(x0, x1, pair, chunk_size=13, progress=rows.append, **options, **STEPS)
    return x0, x1, pair, options, fit, rows


def test_the_objective_is_what_the_fit_reports(chunked, x64):
    x0, x1, pair, options, fit, _ = chunked
    found = float(np.average(fit.pair.gmm0.log_prob(x0), weights=options["point_weights0"]))
    found += float(np.mean(fit.pair.gmm1.log_prob(x1))) - 0.2 * float(fit.plan.regularized_cost)
    np.testing.assert_allclose(fit.penalized_log_likelihood, found, rtol=1e-9)
    values = np.append(fit.history.penalized_log_likelihood, fit.penalized_log_likelihood)
    assert (np.diff(values) >= -1e-9).all()
    for value, mixtures in ((values[0], pair), (values[-1], fit.pair)):  # without chunks
        np.testing.assert_allclose(cg.penalized_log_likelihood(mixtures, x0, x1, **options), value, rtol=1e-9)


def test_the_log_likelihoods_are_those_of_the_densities():
    """Without the ridge's term, which J contains."""
    x0, x1, gmm0, gmm1 = small_problem()
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1)
    fit = cg.fit_pair(x0, x1, pair, transport_weight=0.01, ridge=0.1, **STEPS)
    expected = [log_likelihood(fit.pair.gmm0, x0), log_likelihood(fit.pair.gmm1, x1)]
    np.testing.assert_allclose(fit.log_likelihoods, expected, rtol=1e-4)
    assert float(fit.penalized_log_likelihood) < sum(expected) - 0.01 * float(fit.plan.regularized_cost) - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("tau", [1.0, 0.9])
def test_chunks_change_nothing(x64, tau):
    """That a step from the sums of small chunks is the whole's is in test_em.py."""
    x0, x1, gmm0, gmm1 = small_problem()
    weights = np.random.RandomState(0).rand(len(x0))
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1, tau=tau)
    options = {"transport_weight": 0.2, "point_weights0": weights, "ridge": 0.0}
    whole, chunked = (cg.fit_pair(x0, x1, pair, chunk_size=size, **options, **STEPS) for size in (None, 13))
    chex.assert_trees_all_close(whole.pair, chunked.pair, rtol=1e-8)
    for fit in (whole, chunked):
        found = cg.penalized_log_likelihood(fit.pair, x0, x1, **options)
        np.testing.assert_allclose(fit.penalized_log_likelihood, found, rtol=1e-9)


@pytest.mark.slow
def test_sinkhorn_gives_the_same_fit():
    x0, x1, gmm0, gmm1 = small_problem()
    for tau in (1.0, 0.8):
        pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.5, tau=tau)
        fits = [
            cg.fit_pair(x0, x1, pair, transport_weight=0.1, method=method, **ADAM, **STEPS)
            for method in ("entropic", "sinkhorn")
        ]
        np.testing.assert_allclose(fits[0].penalized_log_likelihood, fits[1].penalized_log_likelihood, rtol=1e-4)


@pytest.mark.slow
def test_tolerance_steps_and_history_agree():
    x0, x1, gmm0, gmm1 = small_problem()
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1)
    fit = cg.fit_pair(x0, x1, pair, transport_weight=0.1, em_steps=40, m_steps=4, tol=1e-3)
    n = int(fit.n_steps)
    assert bool(fit.converged) and 0 < n < 40
    for row in (fit.history.q0, fit.history.transport, fit.history.penalized_log_likelihood):
        assert np.isfinite(row[:n]).all() and np.isnan(row[n:]).all()
    gains = np.diff(np.append(fit.history.penalized_log_likelihood[:n], fit.penalized_log_likelihood))
    assert (gains[:-1] > 1e-3).all() and gains[-1] <= 1e-3
    strict = cg.fit_pair(x0, x1, pair, transport_weight=0.1, em_steps=2, m_steps=4, tol=1e-9)
    assert int(strict.status) == cg.Status.NOT_CONVERGED
    with pytest.raises(cg.FitError, match="more steps"):
        strict.raise_if_failed()


@pytest.mark.parametrize("optimizer", [optax.adam, pytest.param(optax.sgd, marks=pytest.mark.slow)])
def test_a_run_that_blows_up_says_so(optimizer):
    x0, x1, gmm0, gmm1 = small_problem()
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1)
    fit = cg.fit_pair(x0, x1, pair, transport_weight=0.1, optimizer=optimizer, learning_rate=1e30, **STEPS)
    assert not bool(fit.converged)
    with pytest.raises(cg.FitError, match="learning rate"):
        fit.raise_if_failed()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_fresh_processes_fit_many_points_and_none_hangs(tmp_path):
    program = tmp_path / "fit.py"
    program.write_text(
        "import jax, coupled_gmm as cg\n"
        "from coupled_gmm.data.clouds import tutorial_clouds\n"
        "x0, x1 = tutorial_clouds(jax.random.key(0), 100_000)\n"
        "start = cg.fit_gmm(x0, cg.init_gmm(jax.random.key(1), x0, 3), max_steps=5).gmm\n"
        "fit = cg.fit_pair(x0, x1, cg.GaussianMixturePair(start, start, epsilon=0.01), transport_weight=0.01)\n"
        "fit.raise_if_failed()\n"
        "print(float(fit.penalized_log_likelihood))\n"
    )
    ends = [
        subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, check=True).stdout
        for _ in range(20)
    ]
    assert len(set(ends)) == 1 and np.isfinite(float(ends[0]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_stored_rows_are_otts(tutorial):
    drawn, rows = ott_tutorial.tutorial(), np.loadtxt(DATA / "ott_unbalanced.csv", delimiter=",")
    np.testing.assert_allclose(ott_tutorial.ott_rows(drawn, "unbalanced"), rows, atol=1.1e-3)
    for stored, now in ((tutorial.x0, drawn.x0), (tutorial.x1, drawn.x1)):
        np.testing.assert_allclose(stored, now, atol=1e-5)
    chex.assert_trees_all_close(tutorial.start, drawn.start, atol=1e-4)


def test_progress_delivers_every_row(chunked, x64):
    x0, x1, pair, options, fit, rows = chunked
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[0]["em_steps"] == 3
    np.testing.assert_allclose([row["objective"] for row in rows], fit.history.objective, rtol=1e-6)

    error = RuntimeError("mine")
    told = []

    def listen(row):
        told.append(row)
        raise error

    with pytest.raises(RuntimeError) as caught:
        cg.fit_pair(x0, x1, pair, chunk_size=13, progress=listen, **options, **STEPS)
    assert caught.value is error and len(told) == 1


@pytest.mark.slow
def test_a_chain_of_two_edges_and_a_node_without_a_cloud(x64):
    x0, x1, gmm0, gmm1 = small_problem()
    middle = random_mixture(7, 4, 2)
    graph = cg.MixtureGraph.from_mixtures([gmm0, middle, gmm1], [(0, 1), (1, 2)], edge_weights=0.5, epsilon=0.1)
    fit = cg.fit_graph([x0, None, x1], graph, em_steps=8, m_steps=10)
    values = np.append(fit.history.penalized_log_likelihood, fit.penalized_log_likelihood)
    assert (np.diff(values) >= -1e-9).all()
    assert [gmm.n_components for gmm in fit.gmms] == [gmm0.n_components, 4, gmm1.n_components]
    start, end = middle.mean(), fit.gmms[1].mean()
    centre = 0.5 * (x0.mean(0) + x1.mean(0))
    assert np.linalg.norm(end - centre) < np.linalg.norm(start - centre)


@pytest.mark.slow
def test_a_pair_is_the_graph_of_one_edge():
    x0, x1, gmm0, gmm1 = small_problem()
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1)
    graph = cg.MixtureGraph.from_mixtures([gmm0, gmm1], [(0, 1)], edge_weights=0.1, epsilon=0.1)
    fit = cg.fit_pair(x0, x1, pair, transport_weight=0.1, **STEPS)
    chex.assert_trees_all_close(cg.fit_graph([x0, x1], graph, **STEPS).gmms, [fit.pair.gmm0, fit.pair.gmm1], rtol=1e-5)
