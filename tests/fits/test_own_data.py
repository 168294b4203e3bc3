"""A stranger's file: units, constant and rare features, small clusters, starts that are no good. Right, or refused by name.

`tests/data` holds public data: diamonds_small.csv (ggplot2's diamonds: carat and price), galaxies.csv (R's MASS: velocities of 82
galaxies) and mfcc.npy (python_speech_features' English example, 13 coefficients a frame).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from problems import DATA
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture

import coupled_gmm as cg


def clusters(n=500, d=2, distance=5.0, seed=0):
    rng = np.random.RandomState(seed)
    return np.concatenate([rng.randn(n, d), distance + rng.randn(n, d)])


def fitted(x, k, seed=0, n_init=1, weights=None, **options):
    start = cg.init_gmm(jax.random.key(seed), x, k, n_init=n_init, point_weights=weights)
    return cg.fit_gmm(x, start, point_weights=weights, **options)


def standardised(x):
    """The cloud in standard deviations, and what that adds to a mean log-density."""
    return (x - x.mean(0)) / x.std(0), np.log(x.std(0)).sum()


class TestUnits:
    def test_carats_and_dollars(self):
        """One feature's unit is 10^4 times the other's: the answer is that of the standardised table."""
        x = np.genfromtxt(DATA / "diamonds_small.csv", delimiter=",", skip_header=1)
        z, volume = standardised(x)
        fits = fitted(x, 3, max_steps=300), fitted(z, 3, max_steps=300)
        assert all(fit.converged for fit in fits)
        np.testing.assert_allclose(fits[0].log_likelihood, fits[1].log_likelihood - volume, atol=1e-3)
        twin = GaussianMixture(3, random_state=0, n_init=5).fit(z)
        assert float(fits[0].log_likelihood) > twin.score(z) - volume - 0.01

    @pytest.mark.parametrize("unit", [1e-18, 1e-6, 1e6, 1e18])
    def test_any_unit(self, unit):
        fit = fitted(clusters() * unit, 2)
        twin = GaussianMixture(2, random_state=0).fit(clusters()).score(clusters()) - 2 * np.log(unit)
        assert fit.converged
        np.testing.assert_allclose(fit.log_likelihood, twin, rtol=1e-5)
        np.testing.assert_allclose(jnp.mean(fit.gmm.log_prob(clusters() * unit)), twin, rtol=1e-5)

    def test_what_float32_cannot_hold_is_refused(self):
        for scale, feature in (([1e40, 1], 0), ([1, 1e-30], 1)):
            with pytest.raises(
                ValueError, match=rf"x: values of feature {feature} differ by up to .*, or enable float64"
            ):
                fitted(clusters() * scale, 2)
        with pytest.raises(ValueError, match=r"means: 2 of 2 values, up to 1e\+40, exceed what float32 holds"):
            cg.GaussianMixture.from_moments([[1e40, 1e40]], np.eye(2)[None], [1.0])
        with pytest.raises(ValueError, match="covariances: all values vanish in float32"):
            cg.GaussianMixture.from_moments(np.zeros((1, 2)), 1e-60 * np.eye(2)[None], [1.0])

    @pytest.mark.parametrize("unit", [1e-41, 1e-12, 1e37])
    def test_any_size_of_point_weights(self, unit):
        weights = np.tile([1.0, 3.0], 500)
        fit, plain = (fitted(clusters(), 2, weights=w) for w in (unit * weights, weights))
        np.testing.assert_allclose(fit.log_likelihood, plain.log_likelihood, rtol=1e-6)

    def test_a_condition_that_float32_cannot_resolve_is_said(self):
        rng = np.random.RandomState(1)
        frame = np.linalg.qr(rng.randn(5, 5))[0]
        for condition, says in ((1e4, False), (1e8, True)):
            covariance = frame @ np.diag(np.geomspace(1, 1 / condition, 5)) @ frame.T
            covariance = (covariance + covariance.T) / 2
            gmm = cg.GaussianMixture.from_moments(np.zeros((1, 5)), covariance[None], [1.0])
            x = rng.multivariate_normal(np.zeros(5), covariance, 200)
            if says:
                with pytest.warns(UserWarning, match="log-densities are off by some .* enable float64"):
                    gmm.log_prob(x)
            else:
                expected = scipy.stats.multivariate_normal(np.zeros(5), covariance).logpdf(x)
                np.testing.assert_allclose(gmm.log_prob(x), expected, atol=0.01)


class TestDegenerateClouds:
    def test_a_rare_flag(self):
        """0/1, set in 100 of 30,000 rows; of the program of carats and dollars."""
        rng = np.random.RandomState(0)
        x = np.column_stack([rng.randn(30_000), np.zeros(30_000)])
        x[rng.choice(30_000, 100, replace=False), 1] = 1
        x[15_000:, 0] += 5
        fit = fitted(x, 3)
        assert fit.converged
        np.testing.assert_allclose(sorted(np.asarray(fit.gmm.weights)), [1 / 300, 0.5, 0.5], atol=0.01)
        twin = GaussianMixture(3, random_state=0, reg_covar=1e-6 * x[:, 1].var()).fit(x)
        assert float(fit.log_likelihood) > twin.score(x) - 0.05

    def test_constant_features_are_named(self):
        """Three of these five pixels of digits never change; the others fit as they do without them."""
        x = load_digits().data[:, [0, 21, 32, 39, 44]]
        with pytest.warns(UserWarning, match=r"x: features \[0, 2, 3\] are constant"):
            fit = fitted(x, 3, ridge=1e-3)
        same = fitted(x[:, [1, 4]], 3, ridge=1e-3)
        constant = -1.5 * np.log(2 * np.pi * 1e-3)
        np.testing.assert_allclose(fit.log_likelihood, same.log_likelihood + constant, rtol=2e-3)
        np.testing.assert_allclose(fit.gmm.covariances[:, 0, 0], 1e-3, rtol=1e-4)
        with pytest.raises(ValueError, match=r"x: features \[0, 2, 3\] are constant, and ridge is 0"):
            cg.fit_gmm(x, fit.gmm, ridge=0)

    def test_more_features_than_points_in_a_cluster(self):
        """Speech with its differences, 39 features, 16 components: defaults fit, and the mixture has a density."""
        x = np.load(DATA / "mfcc.npy").astype(float)
        first = np.gradient(x, axis=0)
        x = np.concatenate([x, first, np.gradient(first, axis=0)], axis=1)
        fit = fitted(x, 16)
        values = np.append(fit.history.penalized_log_likelihood[: int(fit.n_steps)], fit.penalized_log_likelihood)
        assert fit.converged and (np.diff(values) > -1e-3).all()
        with jax.enable_x64(True):  # what one precision says of its mixture the other says too
            wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), fit.gmm)
            np.testing.assert_allclose(jnp.mean(wide.log_prob(x)), fit.log_likelihood, atol=0.05)

    def test_a_start_thinner_than_the_floor(self):
        """Equal points, and a ridge raised after the start was made: no component dies of it."""
        rng = np.random.RandomState(1)
        x = np.concatenate([np.ones((360, 2)), 6 + rng.randn(600, 2)])
        start = cg.init_gmm(jax.random.key(0), x, 2, n_init=1)
        fit = cg.fit_gmm(x, start, ridge=1e-3)
        np.testing.assert_allclose(sorted(np.asarray(fit.gmm.weights)), [0.375, 0.625], atol=1e-4)
        same = cg.fit_gmm(x, cg.init_gmm(jax.random.key(0), x, 2, n_init=1, ridge=1e-3), ridge=1e-3)
        np.testing.assert_allclose(fit.log_likelihood, same.log_likelihood, atol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(3))
    def test_a_component_that_dies_stays_and_weighs_nothing(self, seed):
        """Two events far from all others, five components: what no point asks for has the mass that its plan holds."""
        rng = np.random.RandomState(seed)
        x0 = clusters(300, distance=6.0, seed=seed)
        x1 = np.concatenate([0.3 + rng.randn(300, 2), np.array([40.0, 0.0]) + rng.randn(2, 2)])
        pooled = np.concatenate([x0, x1])
        start = cg.init_gmm(jax.random.key(seed), pooled, 5)
        fit = cg.fit_pair(x0, x1, cg.GaussianMixturePair(start, start, tau=0.9), transport_weight=0.01, em_steps=60)
        for gmm in (fit.pair.gmm0, fit.pair.gmm1):
            assert (np.asarray(gmm.means) > pooled.min(0) - 5).all() and (
                np.asarray(gmm.means) < pooled.max(0) + 5
            ).all()
            assert np.linalg.eigvalsh(gmm.covariances).min() > 1e-7
        pair, weight = fit.pair, 0.01
        price = weight * float(pair.rho + pair.epsilon)
        for gmm, cloud, ratio in zip((pair.gmm0, pair.gmm1), (x0, x1), fit.plan.reweighting()):
            # What is stationary in masses: the clouds' pull and the plan's are worth the same wherever there is mass.
            shares = np.exp(gmm.log_posterior(cloud)).mean(0) / np.asarray(gmm.weights)
            np.testing.assert_allclose(
                shares + price * (np.asarray(ratio) - 1), 1 - price * (1 - fit.plan.total_mass), rtol=0.02
            )

    def test_both_log_likelihoods_are_reported(self):
        x = clusters()
        fit = fitted(x, 3, ridge=0.1)
        np.testing.assert_allclose(fit.log_likelihood, jnp.mean(fit.gmm.log_prob(x)), rtol=1e-5)
        inverse = np.linalg.inv(fit.gmm.covariances)
        floor = 0.1 * x.var(0)
        least = float(fit.log_likelihood) - 0.5 * np.max(np.einsum("kii,i->k", inverse, floor))
        assert least < float(fit.penalized_log_likelihood) < float(fit.log_likelihood) - 0.01


class TestClaims:
    def test_a_saddle_is_left(self):
        """Two equal components at the start: EM alone never tells them apart."""
        x = clusters(d=1, distance=8.0)
        start = cg.GaussianMixture.from_moments([[4.0], [4.0]], np.full((2, 1, 1), 16.0), [0.5, 0.5])
        fit = cg.fit_gmm(x, start)
        assert fit.converged
        np.testing.assert_allclose(fit.log_likelihood, GaussianMixture(2, random_state=0).fit(x).score(x), atol=1e-3)

    def test_a_start_far_away_is_said(self):
        start = cg.GaussianMixture.from_moments(
            [[1e3, 0], [0, 1e3], [500.0, 500.0]], np.tile(np.eye(2), (3, 1, 1)), [0.3, 0.3, 0.4]
        )
        fit = cg.fit_gmm(clusters(), start)
        assert fit.status == cg.Status.STARVED and not fit.converged
        with pytest.raises(cg.FitError, match="init_gmm"):
            fit.raise_if_failed()
        assert fitted(clusters(), 3).converged  # the remedy

    @pytest.mark.parametrize("tol", [1e-6, 1e-7])
    def test_gains_under_a_rounding_unit_count(self, tol):
        """Overlapping components, slow to part: float32 goes as far as float64 does with the same tolerance."""
        rng = np.random.RandomState(0)
        x = np.concatenate([rng.randn(1000, 1), 2.2 + rng.randn(1000, 1)])
        start = cg.GaussianMixture.from_moments([[-0.5], [2.0]], np.ones((2, 1, 1)), [0.3, 0.7])
        single = cg.fit_gmm(x, start, max_steps=3000, tol=tol)
        with jax.enable_x64(True):
            double = cg.fit_gmm(
                x,
                cg.GaussianMixture.from_moments([[-0.5], [2.0]], np.ones((2, 1, 1)), [0.3, 0.7]),
                max_steps=3000,
                tol=tol,
            )
            steps, value = int(double.n_steps), float(double.log_likelihood)
            assert double.converged
        assert single.converged
        assert 0.8 < int(single.n_steps) / steps < 1.25
        np.testing.assert_allclose(single.log_likelihood, value, atol=3e-6)

    @pytest.mark.slow
    def test_an_m_step_that_was_refused_is_no_convergence(self):
        """Clusters 80 units apart and a weight of 100: where no step rises, that is said; float64 goes on."""
        rng = np.random.RandomState(0)
        centres = 80 * np.array([[0, 0], [1, 0], [0.5, 0.87]])
        x0, x1 = (np.concatenate([c + rng.randn(100, 2) for c in centres + shift]) for shift in (0, [30, 25]))
        start = fitted(np.concatenate([x0, x1]), 3).gmm
        options = {"transport_weight": 100.0, "tol": 1e-5, "em_steps": 30}
        fit = cg.fit_pair(x0, x1, cg.GaussianMixturePair(start, start), **options)
        if fit.converged:
            with jax.enable_x64(True):
                wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), fit.pair)
                again = cg.fit_pair(x0, x1, wide, **options)
            gained = float(again.penalized_log_likelihood) - float(fit.penalized_log_likelihood)
            assert gained < 1e-3 * abs(float(fit.penalized_log_likelihood))
        else:
            assert fit.status in (cg.Status.STALLED, cg.Status.NOT_CONVERGED), fit.message


class TestStarts:
    def test_galaxies(self):
        """82 velocities, five components: the likelihood chooses among the starts."""
        x = np.genfromtxt(DATA / "galaxies.csv", delimiter=",", skip_header=1).reshape(-1, 1)
        ends = [float(fitted(x, 5, seed, n_init=20, max_steps=500).log_likelihood) for seed in range(3)]
        twins = [
            GaussianMixture(5, n_init=20, random_state=s, max_iter=500).fit(x / 1e3).score(x / 1e3) for s in range(3)
        ]
        assert np.mean(ends) > np.mean(twins) - np.log(1e3) - 0.02

    @pytest.mark.slow
    def test_speech(self):
        """Ten starts end no worse than scikit-learn's best of ten on average, at the ridge that float32 holds."""
        x = np.load(DATA / "mfcc.npy").astype(float)
        deviations = x.std(0)
        z = (x - x.mean(0)) / deviations
        n, ridge = 40, 2 * x.shape[1] * float(np.finfo(np.float32).eps)
        singles = sorted(GaussianMixture(16, reg_covar=ridge, random_state=s).fit(z).score(z) for s in range(n))
        largest_of_ten = np.diff([math.comb(i, 10) / math.comb(n, 10) for i in range(n + 1)])
        ends = [float(fitted(x, 16, seed, n_init=10).log_likelihood) for seed in range(10)]
        assert np.mean(ends) + np.log(deviations).sum() > singles @ largest_of_ten - 0.02

    def test_a_number_of_components(self):
        """Each start is fitted to the end; the best one wins, and the rest is as from that start alone."""
        x = clusters()
        fit = cg.fit_gmm(x, 3, key=jax.random.key(0), n_init=4)
        starts = [cg.init_gmm(jax.random.key(s), x, 3, n_init=1) for s in range(4)]
        several = cg.fit_gmm(x, starts)
        alone = [cg.fit_gmm(x, start) for start in starts]
        values = [float(one.penalized_log_likelihood) for one in alone]
        np.testing.assert_allclose(several.penalized_log_likelihood, max(values), rtol=1e-6)
        assert values[int(several.start)] == pytest.approx(max(values), rel=1e-6)
        assert fit.converged and 0 <= int(fit.start) < 4
        for arguments, options, match in (
            ((x, 3), {}, "key: a number of components is started at random"),
            ((x, starts[0]), {"n_init": 3}, "go with a number of components"),
            ((x, []), {}, "init: the list is empty"),
            (
                (x, [starts[0], cg.init_gmm(jax.random.key(0), x, 2, n_init=1)]),
                {},
                r"init\[1\]: differs from init\[0\]",
            ),
        ):
            with pytest.raises(ValueError, match=match):
                cg.fit_gmm(*arguments, **options)
