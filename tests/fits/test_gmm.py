"""One mixture for one cloud: against scikit-learn, a plain NumPy EM and the laws that any EM keeps."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.mixture
from problems import random_mixture

import coupled_gmm as cg
from coupled_gmm.fits import gmm as gmm_module

N, D, K, STEPS = 60, 2, 3, 5  # one shape and few numbers of steps: few compilations


@functools.cache
def cloud(seed=0):
    rng = np.random.RandomState(seed)
    frames = rng.randn(K, D, D)
    labels = rng.randint(K, size=N)
    return 3 * rng.randn(K, D)[labels] + np.einsum("nij,nj->ni", frames[labels], rng.randn(N, D))


def start(seed=1):
    return random_mixture(seed, K, D, condition=4)


def host(gmm):
    return [np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights)]


def assert_same_mixture(gmm, expected, **tolerance):
    for leaf, other in zip(host(gmm), expected, strict=True):
        np.testing.assert_allclose(leaf, other, **tolerance)


def scikit_learn(x, gmm, steps):
    """scikit-learn's EM from the same start, and its mean log-likelihood after each number of steps up to `steps`."""
    x = np.asarray(x, np.float64)  # of integers scikit-learn 1.9.1 returns other scores
    means, covariances, weights = host(gmm)
    scores = [np.average(scipy_log_joint(x, means, covariances, weights)[1])]
    for n in range(1, steps + 1):
        model = sklearn.mixture.GaussianMixture(
            K,
            tol=0,
            reg_covar=0,
            max_iter=n,
            init_params="random",
            random_state=0,
            weights_init=weights,
            means_init=means,
            precisions_init=np.linalg.inv(covariances),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
            model.fit(x)
        scores.append(model.score(x))
    return (model.means_, model.covariances_, model.weights_), scores


def scipy_log_joint(x, means, covariances, weights, floor=0.0):
    """Joint log-probabilities of points and components, lowered by tr(floor S^-1) / 2; and of points."""
    joint = np.stack(
        [
            scipy.stats.multivariate_normal(m, s).logpdf(x)
            + np.log(w)
            - 0.5 * np.sum(floor * np.diag(np.linalg.inv(s)))
            for m, s, w in zip(means, covariances, weights, strict=True)
        ],
        axis=1,
    )
    return joint, scipy.special.logsumexp(joint, axis=1)


def numpy_em(x, w, gmm, ridge, steps):
    """The textbook's loop, with the floor in the objective: parameters after the steps, and the objective at each."""
    w = w / w.sum()
    floor = ridge * (w @ (x - w @ x) ** 2)
    parameters, values = host(gmm), []
    for _ in range(steps + 1):
        joint, total = scipy_log_joint(x, *parameters, floor)
        values.append(w @ total)
        reached = parameters
        shares = w[:, None] * np.exp(joint - total[:, None])
        masses = shares.sum(0)
        means = shares.T @ x / masses[:, None]
        centred = x - means[:, None]
        scatters = np.einsum("nk,kni,knj->kij", shares, centred, centred) / masses[:, None, None]
        parameters = means, scatters + np.diag(floor), masses
    return reached, values


class TestTwins:
    def test_scikit_learn(self, x64):
        fit = cg.fit_gmm(cloud(), start(), max_steps=STEPS, tol=0, ridge=0)
        expected, scores = scikit_learn(cloud(), start(), STEPS)
        assert_same_mixture(fit.gmm, expected, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose([*fit.history.log_likelihood, fit.log_likelihood], scores, rtol=1e-10)

    def test_scikit_learn_with_repeated_points(self, x64):
        """An integer weight is that many points."""
        repeats = np.random.RandomState(0).randint(0, 4, N)
        fit = cg.fit_gmm(cloud(), start(), point_weights=repeats, max_steps=STEPS, tol=0, ridge=0)
        expected, scores = scikit_learn(np.repeat(cloud(), repeats, axis=0), start(), STEPS)
        assert_same_mixture(fit.gmm, expected, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose([*fit.history.log_likelihood, fit.log_likelihood], scores, rtol=1e-10)

    @pytest.mark.parametrize("ridge", [0, 1e-6, 1e-1])
    def test_weights_and_ridge(self, x64, ridge):
        w = np.random.RandomState(2).rand(N)
        fit = cg.fit_gmm(cloud(), start(), point_weights=w, max_steps=STEPS, tol=0, ridge=ridge)
        expected, values = numpy_em(cloud(), w, start(), ridge, STEPS)
        assert_same_mixture(fit.gmm, expected, rtol=1e-9, atol=1e-11)
        found = [*fit.history.penalized_log_likelihood, fit.penalized_log_likelihood]
        np.testing.assert_allclose(found, values, rtol=1e-11)
        plain = [
            np.average(scipy_log_joint(cloud(), *mixture)[1], weights=w) for mixture in (host(start()), host(fit.gmm))
        ]
        np.testing.assert_allclose([fit.history.log_likelihood[0], fit.log_likelihood], plain, rtol=1e-11)

    def test_ridge_adds_the_floor(self, x64):
        """From components of equal shape the floor moves no responsibility: a step adds it, and nothing else."""
        gmm = cg.GaussianMixture.from_moments(start().means, np.broadcast_to(np.eye(D), (K, D, D)), np.full(K, 1 / K))
        w = np.ones(N)
        plain, raised = (
            cg.fit_gmm(cloud(), gmm, point_weights=w, max_steps=1, tol=0, ridge=ridge).gmm for ridge in (0.0, 0.1)
        )
        np.testing.assert_allclose(raised.means, plain.means, rtol=1e-10)
        np.testing.assert_allclose(raised.weights, plain.weights, rtol=1e-10)
        floor = np.diag(0.1 * cloud().var(0))
        np.testing.assert_allclose(raised.covariances, plain.covariances + floor, rtol=1e-10, atol=1e-12)

    def test_float32(self):
        """Five steps agree with float64 to a few roundings."""
        fit = cg.fit_gmm(cloud(), start(), max_steps=STEPS, tol=0, ridge=1e-3)
        expected, values = numpy_em(cloud(), np.ones(N), start(), 1e-3, STEPS)
        assert fit.gmm.dtype == np.float32
        assert_same_mixture(fit.gmm, expected, rtol=1e-4, atol=1e-4)
        found = [*fit.history.penalized_log_likelihood, fit.penalized_log_likelihood]
        np.testing.assert_allclose(found, values, rtol=1e-5)


class TestLaws:
    @pytest.mark.parametrize("seed", range(6))
    def test_log_likelihood_never_falls(self, precision, seed):
        w = np.random.RandomState(seed).rand(N)
        init = cg.init_gmm(jax.random.key(seed), cloud(seed), K, point_weights=w, n_init=1, ridge=1e-2)
        fit = cg.fit_gmm(cloud(seed), init, point_weights=w, tol=0, ridge=(0.0, 1e-6, 1e-2)[seed % 3])
        values = np.array([*fit.history.penalized_log_likelihood, fit.penalized_log_likelihood], np.float64)
        slack = 1e-9 if precision < 1e-9 else 1e-6 * (1 + abs(values[:-1]))
        assert (np.diff(values) >= -slack).all()

    def test_moments_are_kept(self, x64):
        """After any step the whole mixture has the mean and the covariance of the cloud."""
        fit = cg.fit_gmm(cloud(), start(), max_steps=STEPS, tol=0, ridge=0)
        np.testing.assert_allclose(fit.gmm.mean(), cloud().mean(0), rtol=1e-9)
        np.testing.assert_allclose(fit.gmm.covariance(), np.cov(cloud().T, bias=True), rtol=1e-9)

    def test_final_log_likelihood_is_that_of_the_mixture(self, x64):
        fit = cg.fit_gmm(cloud(), start(), max_steps=STEPS, tol=0, ridge=0)
        np.testing.assert_allclose(fit.log_likelihood, np.mean(scipy_log_joint(cloud(), *host(fit.gmm))[1]), rtol=1e-12)

    def test_one_component_is_the_cloud(self, x64):
        """The first step goes all the way, from anywhere."""
        fit = cg.fit_gmm(cloud(), random_mixture(3, 1, D), ridge=1e-2)
        assert (int(fit.n_steps), bool(fit.converged)) == (2, True)
        floor = np.diag(1e-2 * cloud().var(0))
        np.testing.assert_allclose(fit.gmm.means[0], cloud().mean(0), rtol=1e-10)
        np.testing.assert_allclose(fit.gmm.covariances[0], np.cov(cloud().T, bias=True) + floor, rtol=1e-10)

    def test_vmap_equals_a_loop(self):
        def fit(x, gmm):
            return cg.fit_gmm(x, gmm, max_steps=STEPS, tol=1e-2)

        gmms = [start(seed) for seed in range(3)]
        batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gmms)
        together = jax.vmap(fit)(jnp.stack([cloud(seed) for seed in range(3)]), batch)
        for seed, gmm in enumerate(gmms):
            alone = jax.tree.leaves(fit(cloud(seed), gmm))
            for leaf, other in zip(jax.tree.leaves(together), alone, strict=True):
                np.testing.assert_allclose(leaf[seed], other, rtol=1e-3, atol=1e-4)

    def test_a_fit_has_no_derivative(self):
        with pytest.raises(TypeError, match=r"a fit can't be differentiated.*penalized_log_likelihood"):
            jax.grad(lambda x: cg.fit_gmm(x, start(), max_steps=STEPS).log_likelihood)(jnp.asarray(cloud()))

    def test_reproducible(self):
        first, second = (cg.fit_gmm(cloud(), start(), max_steps=STEPS) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, first, second)


class TestStatus:
    """Status, history and number of steps tell one story; all with one compiled program."""

    def fit(self, tol, max_steps=100):
        return cg.fit_gmm(cloud(), start(), point_weights=np.ones(N), max_steps=max_steps, tol=tol)

    @pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-5])
    def test_converged_only_where_the_tolerance_was_met(self, x64, tol):
        fit = self.fit(tol)
        n = int(fit.n_steps)
        values = np.asarray(fit.history.penalized_log_likelihood)
        assert fit.status == cg.Status.CONVERGED
        assert fit.converged
        assert 0 < n < 100
        assert np.isfinite(values[:n]).all()
        assert np.isnan(values[n:]).all()
        gains = np.diff([*values[:n], fit.penalized_log_likelihood])
        assert gains[-1] <= tol
        assert (gains[:-1] > tol).all()
        fit.raise_if_failed()

    def test_no_tolerance_asked_for(self, x64):
        fit = self.fit(0)
        assert fit.status == cg.Status.STEPS_DONE
        assert not fit.converged
        assert fit.n_steps == 100
        assert np.isfinite(fit.history.log_likelihood).all()
        fit.raise_if_failed()

    def test_out_of_steps(self, x64):
        fit = self.fit(1e-12, STEPS)
        assert fit.status == cg.Status.NOT_CONVERGED
        assert not fit.converged
        assert fit.n_steps == STEPS
        assert np.isfinite(fit.history.log_likelihood).all()
        with pytest.raises(cg.FitError, match="allow more steps, or a larger tol"):
            fit.raise_if_failed()

    def test_nothing_is_compiled_anew(self, x64):
        self.fit(0)
        before = gmm_module._fit._cache_size()
        for tol, ridge, seed in [(1e-1, 1e-6, 1), (1e-4, 0.0, 2), (0, 1e-2, 3)]:
            cg.fit_gmm(cloud(seed), start(seed), point_weights=np.ones(N), tol=tol, ridge=ridge)
        assert gmm_module._fit._cache_size() == before


class TestStart:
    def test_moments_are_those_of_the_cloud(self, precision):
        """Whatever the partition: the law of total expectation, and of total variance plus the floor."""
        w = np.random.RandomState(2).rand(N)
        gmm = cg.init_gmm(jax.random.key(0), cloud(), K, point_weights=w, n_init=1, ridge=1e-2)
        mean = np.average(cloud(), axis=0, weights=w)
        covariance = np.cov(cloud().T, aweights=w, bias=True)
        np.testing.assert_allclose(np.sum(gmm.weights), 1, rtol=4 * precision)
        np.testing.assert_allclose(gmm.mean(), mean, atol=30 * precision)
        floor = 1e-2 * np.diag(np.diag(covariance))
        np.testing.assert_allclose(gmm.covariance(), covariance + floor, atol=100 * precision)
        assert (np.linalg.eigvalsh(gmm.covariances) > 0).all()
        assert (np.asarray(gmm.weights) > 0).all()

    def test_every_cluster_gets_a_centre(self):
        """Clusters 1e4 standard deviations apart: a draw that is not weighted by distance misses one of them in 8 of 10."""
        rng = np.random.RandomState(0)
        centres = 1e4 * np.array([[0, 0], [1, 0], [2, 3]])
        x = np.repeat(centres, 20, axis=0) + rng.randn(N, 2)
        for seed in range(10):
            gmm = cg.init_gmm(jax.random.key(seed), x, K, n_init=1)
            distances = np.linalg.norm(np.asarray(gmm.means)[:, None] - centres, axis=-1)
            assert sorted(distances.argmin(1)) == list(range(K))
            np.testing.assert_allclose(gmm.weights, 1 / K, rtol=1e-5)
            assert distances.min(1).max() < 2

    def test_as_many_components_as_distinct_points(self, precision):
        """Each becomes a component with its share of the mass and the floor for a covariance."""
        values = np.round(8 * cloud()[:K]) / 8
        labels = np.arange(N) % 4 % K
        x = values[labels]
        gmm = cg.init_gmm(jax.random.key(1), x, K, n_init=1, ridge=1e-2)
        order, expected = np.lexsort(np.asarray(gmm.means).T), np.lexsort(values.T)
        np.testing.assert_allclose(gmm.means[order], values[expected], rtol=20 * precision)
        np.testing.assert_allclose(gmm.weights[order], (np.bincount(labels) / N)[expected], rtol=20 * precision)
        floor = np.diag(1e-2 * x.var(0))
        np.testing.assert_allclose(gmm.covariances, np.broadcast_to(floor, (K, D, D)), rtol=1e-4, atol=30 * precision)

    def test_points_of_weight_zero_are_never_drawn(self):
        x, w = cloud().copy(), np.ones(N)
        x[::3], w[::3] = 1e3 + np.arange(20)[:, None], 0
        gmm = cg.init_gmm(jax.random.key(0), x, K, point_weights=w)
        kept = x[w > 0]
        assert (np.asarray(gmm.means) >= kept.min(0)).all()
        assert (np.asarray(gmm.means) <= kept.max(0)).all()
        np.testing.assert_allclose(gmm.mean(), kept.mean(0), atol=1e-4)

    def test_the_key_decides(self):
        x = np.random.RandomState(0).rand(N, D)  # without clusters: no start is the best for every key
        one, same, other = (cg.init_gmm(jax.random.key(seed), x, K, n_init=1) for seed in (0, 0, 1))
        jax.tree.map(np.testing.assert_array_equal, one, same)
        assert (one.means != other.means).any()

    def test_more_draws_are_no_worse_on_average(self):
        """The best of the draws that are made unless told otherwise is likelier than single ones."""
        single, best = (
            np.mean([np.mean(cg.init_gmm(jax.random.key(s), cloud(), K, **n).log_prob(cloud())) for s in range(20)])
            for n in ({"n_init": 1}, {})
        )
        assert best > single
