"""Several runs of a pair's fit: paths of weights, and starts beside the one that is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import DATA, points, random_mixture

import coupled_gmm as cg
from coupled_gmm.fits import pairs, request
from coupled_gmm.fits.contest import Schedule

OPTIONS = {"em_steps": 60, "tol": 1e-4, "fidelity": False}


@pytest.fixture(scope="module")
def problem():
    """Two clouds of four clusters, of which the start sees three."""
    clouds = [points(random_mixture(seed, 4, 2, condition=10), 300, seed) for seed in (0, 1)]
    start = cg.init_gmm(jax.random.PRNGKey(0), np.concatenate(clouds), 3)
    return *clouds, cg.GaussianMixturePair(start, start)


WEIGHTS = [0.001, 0.1, 1.0, 3.0]


@pytest.fixture(scope="module")
def path(problem):
    return cg.fit_path(*problem, transport_weights=WEIGHTS, **OPTIONS)


def test_no_weight_is_worse_than_alone_or_than_its_neighbours(problem, path):
    x0, x1, _ = problem
    assert len(path) == 4 and path.batch_shape == (4,)
    np.testing.assert_allclose(path.transport_weights, WEIGHTS)
    for i, weight in enumerate(WEIGHTS):
        value = float(path[i].penalized_log_likelihood)
        alone = cg.fit_pair(*problem, transport_weight=weight, **OPTIONS).penalized_log_likelihood
        near = [
            cg.penalized_log_likelihood(path[j].pair, x0, x1, transport_weight=weight)
            for j in (i - 1, i + 1)
            if 0 <= j < len(path)
        ]
        assert value >= max(alone, *near) - 2 * OPTIONS["tol"], (weight, value, alone, near)


def test_each_is_a_fit_of_its_weight(problem, path):
    x0, x1, _ = problem
    for weight, fit in zip(WEIGHTS, path):
        value = cg.penalized_log_likelihood(fit.pair, x0, x1, transport_weight=weight)
        np.testing.assert_allclose(fit.penalized_log_likelihood, value, rtol=1e-5)
        assert fit.converged and fit.plan.converged
        rows = np.asarray(fit.history.penalized_log_likelihood)
        assert np.isfinite(rows[: int(fit.n_steps)]).all() and np.isnan(rows[int(fit.n_steps) + 1 :]).all()


def test_each_has_a_row_for_every_step_that_was_asked_for(problem):
    """Also where steps are fewer than weights, and for the best of several starts."""
    found = cg.fit_path(*problem, transport_weights=WEIGHTS, em_steps=3, m_steps=2)
    assert [fit.history.objective.shape for fit in found] == [(3,)] * len(WEIGHTS)
    options = {"n_init": 2, "key": jax.random.key(0), "em_steps": 3, "m_steps": 2}
    assert cg.fit_pair(*problem, transport_weight=0.1, **options).history.q.shape == (3, 2)


def test_one_weight_is_one_fit(problem):
    (one,) = cg.fit_path(*problem, transport_weights=[0.1], **OPTIONS)
    alone = cg.fit_pair(*problem, transport_weight=0.1, **OPTIONS)
    np.testing.assert_allclose(one.pair.gmm0.means, alone.pair.gmm0.means, atol=1e-4)
    assert int(one.n_steps) == int(alone.n_steps)


def test_a_path_goes_forth_and_back():
    """Of two starts: each weight from both, and from the one before it; then from the one after it."""
    schedule = Schedule.along(3, 2)
    assert list(zip(*(side.tolist() for side in schedule))) == [
        (0, 0), (0, 1), (1, 0), (1, 1), (1, -1), (2, 0), (2, 1), (2, -2), (1, -3), (0, -2),
    ]  # fmt: skip


def test_a_path_is_saved_and_found_again(path, tmp_path):
    cg.save(tmp_path / "path.npz", path)
    found = cg.load(tmp_path / "path.npz")
    assert all(np.array_equal(*leaves, equal_nan=True) for leaves in zip(*map(jax.tree.leaves, (path, found))))


def test_more_starts_are_no_worse_and_find_what_one_does_not():
    """Galaxies' velocities, and the same moved: from three components in one place nothing parts them."""
    x0 = np.genfromtxt(DATA / "galaxies.csv", delimiter=",", skip_header=1).reshape(-1, 1) / 1000
    poor = cg.GaussianMixture.from_moments([[20.0]] * 3, [[[20.0]]] * 3, [0.2, 0.3, 0.5])
    problem = x0, x0 + 1, cg.GaussianMixturePair(poor, poor, epsilon=0.1)
    one = cg.fit_pair(*problem, transport_weight=0.01, **OPTIONS)
    best = cg.fit_pair(*problem, transport_weight=0.01, n_init=4, key=jax.random.PRNGKey(0), **OPTIONS)
    assert best.penalized_log_likelihood > one.penalized_log_likelihood + 0.1
    assert best.transport_weight == np.float32(0.01) and best.batch_shape == ()


def test_what_is_frozen_is_in_every_start(problem):
    x0, x1, pair = problem
    fit = cg.fit_pair(
        x0, x1, pair, transport_weight=0.1, freeze=["gmm0"], n_init=3, key=jax.random.PRNGKey(0), **OPTIONS
    )
    assert jnp.array_equal(fit.pair.gmm0.means, pair.gmm0.means)


@pytest.mark.slow
def test_sides_of_two_sizes(problem):
    x0, x1, pair = problem
    pair = cg.GaussianMixturePair(pair.gmm0, cg.init_gmm(jax.random.PRNGKey(1), x1, 2))
    fits = cg.fit_path(x0, x1, pair, transport_weights=[0.1, 1.0], n_init=2, key=jax.random.PRNGKey(0), **OPTIONS)
    assert [gmm.means.shape for gmm in (fits.pair.gmm0, fits.pair.gmm1)] == [(2, 3, 2), (2, 2, 2)]
    assert fits.plan.cost.shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transport_weights": []}, "transport_weights"),
        ({"transport_weights": 0.1}, "transport_weights"),
        ({"transport_weights": [0.1, -1]}, "transport_weights"),
        ({"transport_weights": [0.1], "n_init": 2}, "key"),
        ({"transport_weights": [0.1], "key": jax.random.PRNGKey(0)}, "key"),
        ({"transport_weights": [0.1], "n_init": 0, "key": jax.random.PRNGKey(0)}, "n_init"),
    ],
)
def test_refusals(problem, arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        cg.fit_path(*problem, **arguments)


def test_starts_of_a_single_fit_take_one_weight_and_show_no_rows(problem):
    drawn = {"n_init": 2, "key": jax.random.PRNGKey(0)}
    for wrong in ({"transport_weight": [0.1, 1.0]}, {"transport_weight": 0.1, "progress": True}):
        with pytest.raises(ValueError, match="n_init"):
            cg.fit_pair(*problem, **wrong, **drawn)


@pytest.mark.slow
def test_a_batch_may_hold_balanced_and_unbalanced_pairs(problem):
    """An infinite price is one like any other, in a batch as alone, in plans as in fits; and its slope is zero."""
    x0, x1, start = problem

    def fit(rho):
        pair = cg.GaussianMixturePair(start.gmm0, start.gmm1, 0.1, rho=rho)
        found = cg.fit_pair(x0, x1, pair, transport_weight=0.1, em_steps=10)
        return found.penalized_log_likelihood, found.status

    def cost(rho):
        pair = cg.GaussianMixturePair(random_mixture(0, 3, 2), random_mixture(1, 4, 2), 0.1, rho=rho)
        return cg.solve_plan(pair, tol=1e-6).regularized_cost

    rhos = [np.inf, 1.0, 0.1]
    several = jax.vmap(fit)(jnp.asarray(rhos))
    for i, rho in enumerate(rhos):
        for one, many in zip(fit(rho), several, strict=True):
            np.testing.assert_allclose(one, many[i], rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(cost)(jnp.asarray(rhos)), [cost(rho) for rho in rhos], rtol=1e-5)
    slopes = jax.vmap(jax.grad(cost))(jnp.asarray(rhos))
    assert slopes[0] == 0 and np.all(slopes[1:] > 0)


@pytest.mark.parametrize("blink", [0.0, 1e9])
def test_rows_cost_no_second_program_and_change_nothing(problem, blink, monkeypatch):
    """Step by step, and in stretches that double."""
    monkeypatch.setattr(request, "_BLINK", blink)
    alone = cg.fit_pair(*problem, transport_weight=0.1, **OPTIONS)
    before = [program._cache_size() for program in (pairs._begin_pair, pairs._go_on_with_pair)]
    rows = []
    shown = cg.fit_pair(*problem, transport_weight=0.1, progress=rows.append, **OPTIONS)
    after = [program._cache_size() for program in (pairs._begin_pair, pairs._go_on_with_pair)]
    assert before == after and alone.status_name == shown.status_name == "converged"
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(shown), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [row["step"] for row in rows] == list(range(int(shown.n_steps))) and rows[0]["em_steps"] == 60
    for name in ("q0", "q1", "transport", "objective", "penalized_log_likelihood", "marginal_error"):
        found = [row[name] for row in rows]
        np.testing.assert_allclose(found, getattr(shown.history, name)[: len(rows)], rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_rows_come_from_inside_somebody_elses_program(problem):
    x0, x1, pair = problem
    rows = []

    def fit(weight):
        return cg.fit_pair(x0, x1, pair, transport_weight=weight, em_steps=4, progress=rows.append)

    traced = jax.jit(fit)(0.1)
    jax.effects_barrier()
    assert not rows, "whose listener is gone when it runs"
    rows.clear()
    constant = jax.jit(lambda x: fit(0.1).penalized_log_likelihood + x)(0.0)
    np.testing.assert_allclose(constant, traced.penalized_log_likelihood, rtol=1e-5)
    vmapped = jax.vmap(fit)(jnp.asarray([0.1, 0.2]))
    assert len(rows) == 8
    np.testing.assert_allclose(vmapped.penalized_log_likelihood[0], traced.penalized_log_likelihood, rtol=1e-5)


@pytest.mark.slow
def test_every_start_tells_where_it_ended(problem):
    """Of a pair, a path and a graph: the best of them is the fit, the first is that from the mixtures which were given."""
    x0, x1, pair = problem
    drawn = {"n_init": 3, "key": jax.random.PRNGKey(0), **OPTIONS}
    fit = cg.fit_pair(x0, x1, pair, transport_weight=0.1, **drawn)
    path = cg.fit_path(x0, x1, pair, transport_weights=[0.1, 1.0], **drawn)
    graph = cg.MixtureGraph.from_mixtures([pair.gmm0, pair.gmm1], [(0, 1)], edge_weights=0.1, epsilon=pair.epsilon)
    several = cg.fit_graph([x0, x1], graph, **drawn)
    alone = cg.fit_pair(x0, x1, pair, transport_weight=0.1, **OPTIONS)
    for found in (fit, several):
        assert found.starts.status.shape == (3,)
        np.testing.assert_allclose(found.starts.penalized_log_likelihood[0], alone.penalized_log_likelihood, atol=1e-5)
        assert found.penalized_log_likelihood == found.starts.penalized_log_likelihood.max()
    np.testing.assert_allclose(several.starts.penalized_log_likelihood, fit.starts.penalized_log_likelihood, atol=1e-4)
    assert path.starts.penalized_log_likelihood.shape == (2, 3)
    assert "starts: 3 starts" in fit.summary() and alone.starts is None


@pytest.mark.slow
def test_starts_of_a_graph_keep_what_is_frozen(problem):
    x0, x1, pair = problem
    graph = cg.MixtureGraph.from_mixtures(
        [pair.gmm0, pair.gmm1, pair.gmm1], [(0, 1), (1, 2)], edge_weights=0.1, frozen=[0]
    )
    fit = cg.fit_graph([x0, None, x1], graph, n_init=2, key=jax.random.PRNGKey(0), em_steps=5)
    assert jnp.array_equal(fit.gmms[0].means, pair.gmm0.means)
    for wrong, name in (
        ({"n_init": 2}, "key"),
        ({"n_init": 2, "key": jax.random.PRNGKey(0), "progress": True}, "progress"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            cg.fit_graph([x0, None, x1], graph, **wrong)
