"""Mixtures against SciPy in float64, quadrature, finite differences and their own laws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from problems import random_covariances, random_mixture

import coupled_gmm as cg

K, D, N = 4, 3, 50  # one shape throughout: eager operations compile once


def host(gmm):
    """Means, covariances and weights in float64."""
    return tuple(np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights))


def scipy_component_log_prob(x, means, covariances):
    densities = [scipy.stats.multivariate_normal(m, s) for m, s in zip(means, covariances, strict=True)]
    return np.stack([np.atleast_1d(density.logpdf(x)) for density in densities], axis=1)


def scipy_log_prob(x, means, covariances, weights):
    return scipy.special.logsumexp(scipy_component_log_prob(x, means, covariances), b=weights, axis=1)


def points(seed=0, n=N, d=D):
    return 3 * np.random.RandomState(seed).randn(n, d)


@functools.partial(jax.jit, static_argnames="names")
def densities(gmm, x, names=("log_prob",)):
    """Compiled: one compilation instead of one per operation. That it equals the eager call is a test below."""
    values = tuple(getattr(gmm, name)(x) for name in names)
    return values if len(values) > 1 else values[0]


def with_zero_weight(gmm, index, **changes):
    """The same mixture, without the mass of one component, and with what else changes about that."""
    weights = np.asarray(gmm.weights).copy()
    weights[index] = 0
    leaves = {"means": gmm.means, "covariances": gmm.covariances} | {
        name: getattr(gmm, name).at[index].set(value) for name, value in changes.items()
    }
    return cg.GaussianMixture.from_moments(**leaves, weights=weights / weights.sum())


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(np.asarray(leaf)).all(), jax.tree_util.keystr(path)


class TestDensities:
    @pytest.mark.parametrize("condition", [1e2, 1e8])
    def test_scipy(self, x64, condition):
        gmm, x = random_mixture(0, K, D, condition=condition), points()
        means, covariances, weights = host(gmm)
        components = scipy_component_log_prob(x, means, covariances)
        total = scipy_log_prob(x, means, covariances, weights)
        rtol = 1e-14 * condition + 1e-12
        found = densities(gmm, x, names=("component_log_prob", "log_prob", "log_posterior"))
        np.testing.assert_allclose(found[0], components, rtol=rtol)
        np.testing.assert_allclose(found[1], total, rtol=rtol)
        posterior = components + np.log(weights) - total[:, None]
        np.testing.assert_allclose(found[2], posterior, rtol=rtol, atol=rtol * abs(components).max())

    @pytest.mark.parametrize("d", [1, 6])
    def test_other_dimensions(self, x64, d):
        gmm, x = random_mixture(1, 2, d), points(1, 10, d)
        np.testing.assert_allclose(densities(gmm, x), scipy_log_prob(x, *host(gmm)), rtol=1e-12)

    def test_many_features(self):
        """A determinant of 1e-340 underflows, in float64 too; its logarithm does not."""
        d, variance = 170, 0.01
        means, weights = points(0, 2, d), np.array([0.25, 0.75])
        gmm = cg.GaussianMixture.from_moments(means, np.stack([variance * np.eye(d)] * 2), weights)
        x = means[[0, 1, 1]] + 0.1 * points(1, 3, d) / 3
        squares = ((x[:, None] - means) ** 2).sum(-1) / variance
        expected = scipy.special.logsumexp(-0.5 * squares - 0.5 * d * np.log(2 * np.pi * variance), b=weights, axis=1)
        assert (expected > 100).all()
        np.testing.assert_allclose(densities(gmm, x), expected, rtol=1e-4)

    def test_float32(self):
        gmm, x = random_mixture(0, K, D), points()
        assert densities(gmm, x).dtype == np.float32
        np.testing.assert_allclose(densities(gmm, x), scipy_log_prob(x, *host(gmm)), rtol=2e-5)

    def test_far_from_the_origin(self):
        """An offset of 1e4 standard deviations that float32 holds exactly changes no density."""
        means, x = np.round(64 * points(2, K)) / 64, np.round(64 * points()) / 64
        covariances, weights = random_covariances(np.random.RandomState(0), K, D), np.full(K, 1 / K)
        near = cg.GaussianMixture.from_moments(means, covariances, weights)
        far = cg.GaussianMixture.from_moments(means + 2**14, covariances, weights)
        np.testing.assert_array_equal(densities(far, x + 2**14), densities(near, x))

    def test_posteriors_sum_to_one(self):
        """Far out too, where every density underflows."""
        gmm = random_mixture(0, K, D)
        np.testing.assert_allclose(
            np.exp(densities(gmm, 1e3 * points(), names=("log_posterior",))).sum(1), 1, rtol=1e-6
        )

    def test_zero_weight(self, x64):
        """Absent, whatever its other parameters are: singular, and where the points are."""
        gmm, x = random_mixture(0, K, D), points()
        absent = with_zero_weight(gmm, 1, means=x[0], covariances=0.0)
        means, covariances, weights = (np.delete(leaf, 1, axis=0) for leaf in host(absent))
        components, total, posterior = densities(absent, x, names=("component_log_prob", "log_prob", "log_posterior"))
        np.testing.assert_allclose(total, scipy_log_prob(x, means, covariances, weights), rtol=1e-12)
        assert np.isneginf(posterior[:, 1]).all()
        assert np.isnan(components[:, 1]).all()
        np.testing.assert_allclose(np.exp(posterior).sum(1), 1, rtol=1e-12)

    @pytest.mark.parametrize("name", ["log_prob", "component_log_prob", "log_posterior"])
    @pytest.mark.parametrize("singular", [np.diag([1, 0, 1]), np.zeros((3, 3)), np.ones((3, 3))])
    def test_singular_ones_raise(self, name, singular):
        gmm = random_mixture(0, K, D)
        covariances = gmm.covariances.at[2].set(singular)
        gmm = cg.GaussianMixture.from_moments(gmm.means, covariances, gmm.weights)
        with pytest.raises(ValueError, match="component 2 has a singular covariance"):
            getattr(gmm, name)(points())


class TestMoments:
    def test_mean_and_covariance(self, x64):
        """The second moment about the origin minus the square of the mean: another formula."""
        gmm = random_mixture(0, K, D)
        means, covariances, weights = host(gmm)
        mean = np.average(means, axis=0, weights=weights)
        second = sum(w * (s + np.outer(m, m)) for m, s, w in zip(means, covariances, weights, strict=True))
        np.testing.assert_allclose(gmm.mean(), mean, rtol=1e-12)
        np.testing.assert_allclose(gmm.covariance(), second - np.outer(mean, mean), rtol=1e-10)

    def test_weights_are_normalised(self, x64):
        gmm = cg.GaussianMixture.from_moments(np.zeros((2, 1)), np.ones((2, 1, 1)), [0.5, 0.5004])
        np.testing.assert_allclose(gmm.weights, np.array([0.5, 0.5004]) / 1.0004, rtol=1e-14)

    def test_factors(self, precision):
        gmm = random_mixture(0, K, D)
        factor = np.asarray(gmm.cholesky, np.float64)
        np.testing.assert_array_equal(factor, np.tril(factor))
        np.testing.assert_allclose(factor @ factor.swapaxes(1, 2), gmm.covariances, atol=8 * precision)
        assert (gmm.n_components, gmm.n_features, gmm.dtype) == (K, D, gmm.means.dtype)

    def test_legal_kinds_of_input(self):
        """Lists, integers, NumPy and JAX arrays make the same mixture."""
        means, covariances, weights = [[0, 1], [2, 3]], [[[2, 1], [1, 2]], [[1, 0], [0, 1]]], [0.5, 0.5]
        lists = cg.GaussianMixture.from_moments(means, covariances, weights)
        arrays = cg.GaussianMixture.from_moments(*map(np.asarray, (means, covariances, weights)))
        jaxes = cg.GaussianMixture.from_moments(*map(jnp.asarray, (means, covariances, weights)))
        for other in (arrays, jaxes):
            jax.tree.map(np.testing.assert_array_equal, lists, other)
        assert {leaf.dtype for leaf in jax.tree.leaves(lists)} == {np.dtype("float32")}


class TestSampling:
    N = 100_000

    def test_moments(self):
        """Mean and covariance of a sample, each entry within five of its own standard errors."""
        gmm = random_mixture(0, K, D)
        x = np.asarray(gmm.sample(jax.random.key(0), self.N), np.float64)
        error = np.sqrt(x.var(0) / self.N)
        assert (abs(x.mean(0) - gmm.mean()) < 5 * error).all()
        products = np.einsum("ni,nj->nij", x - x.mean(0), x - x.mean(0))
        error = np.sqrt(products.var(0) / self.N)
        assert (abs(products.mean(0) - gmm.covariance()) < 5 * error).all()

    def test_distribution_function(self):
        """Kolmogorov's test of a projection, whose distribution function is a mixture of normal ones."""
        gmm, direction = random_mixture(0, K, D), np.array([1.0, -2.0, 0.5])
        means, covariances, weights = host(gmm)
        centres, scales = means @ direction, np.sqrt(np.einsum("i,kij,j->k", direction, covariances, direction))
        x = np.asarray(gmm.sample(jax.random.key(1), self.N), np.float64) @ direction
        test = scipy.stats.kstest(x, lambda t: scipy.stats.norm.cdf((t[:, None] - centres) / scales) @ weights)
        assert test.pvalue > 1e-4

    def test_the_key_decides(self):
        gmm = random_mixture(0, K, D)
        x, same, other = (gmm.sample(key, N) for key in (jax.random.key(3), jax.random.key(3), jax.random.PRNGKey(4)))
        np.testing.assert_array_equal(x, same)
        assert (x != other).any()

    def test_zero_weights_and_singular_ones(self):
        """An absent component is never drawn; a singular one is drawn from its plane."""
        gmm = random_mixture(0, K, D)
        covariances = gmm.covariances.at[0].set(np.diag([1, 0, 1])).at[1:].set(0)
        weights, means = np.array([0.5, 0, 0.5, 0]), np.arange(K)[:, None] * 100 * np.ones(D)
        x = np.asarray(cg.GaussianMixture.from_moments(means, covariances, weights).sample(jax.random.key(0), N))
        first = x[:, 1] == 0
        assert 0 < first.sum() < N
        np.testing.assert_array_equal(x[~first], np.full((N - first.sum(), D), 200.0))
        assert x[first][:, 0].std() > 0.5


class TestMarginalsAndConditionals:
    def test_marginal_is_an_integral(self, x64):
        """The trapezoid rule over the feature that is left out converges geometrically."""
        gmm = random_mixture(0, K, D, condition=10)
        kept = points(1, 5, 2)
        grid = np.linspace(-30, 30, 4001)
        x = np.stack([np.repeat(kept[:, 1], 4001), np.tile(grid, 5), np.repeat(kept[:, 0], 4001)], axis=1)
        density = np.exp(scipy_log_prob(x, *host(gmm))).reshape(5, 4001).sum(1) * (grid[1] - grid[0])
        np.testing.assert_allclose(densities(gmm.marginal([2, 0]), kept), np.log(density), rtol=1e-9)

    @pytest.mark.parametrize("axes", [[1], [2, 0]])
    def test_condition_is_a_ratio_of_densities(self, x64, axes):
        gmm, x = random_mixture(0, K, D), points()
        means, covariances, weights = host(gmm)
        rest = [axis for axis in range(D) if axis not in axes]
        given = x[0, axes]
        x[:, axes] = given
        evidence = scipy_log_prob(given[None], means[:, axes], covariances[:, axes][:, :, axes], weights)
        conditional = jax.jit(lambda gmm: gmm.condition(axes, given))(gmm)
        expected = scipy_log_prob(x, means, covariances, weights) - evidence
        np.testing.assert_allclose(densities(conditional, x[:, rest]), expected, rtol=1e-10, atol=1e-10)

    def test_total_probability(self):
        """The mean of the conditional means over draws of the given feature is the mean."""
        gmm = random_mixture(0, K, D)
        given = gmm.marginal([1]).sample(jax.random.key(0), 20_000)
        means = np.asarray(jax.jit(jax.vmap(lambda value: gmm.condition([1], value).mean()))(given), np.float64)
        error = means.std(0) / np.sqrt(len(means))
        assert (abs(means.mean(0) - gmm.mean()[jnp.array([0, 2])]) < 5 * error).all()

    def test_zero_weight(self, x64):
        gmm = with_zero_weight(random_mixture(0, K, D), 1, covariances=0.0)
        conditional = gmm.condition([1], [0.5])
        assert conditional.weights[1] == 0
        assert_finite(conditional)
        jax.tree.map(np.testing.assert_array_equal, gmm.marginal([0, 1, 2]), gmm)

    def test_many_values_at_once(self, precision):
        """Against the closed form of NumPy, value by value; other numbers of values share the program."""
        gmm = with_zero_weight(random_mixture(0, K, D, condition=10), 1, covariances=0.0)
        values = points(2, 37, 2)
        stacked = gmm.condition([2, 0], values)
        assert stacked.batch_shape == (37,) and len(gmm.condition([2, 0], values[:2])) == 2
        present, tolerance = np.asarray(gmm.weights) > 0, 1e4 * precision
        for i in (0, 36):
            expected = conditional(*host(gmm), [2, 0], np.asarray(values[i], gmm.dtype))
            for got, wanted in zip(host(stacked[i]), expected, strict=True):
                np.testing.assert_allclose(got[present], wanted[present], rtol=tolerance, atol=tolerance)
        assert_finite(stacked)
        for alone in (gmm.condition([2, 0], values[5]), gmm.condition([2, 0], values[5:6])[0]):
            jax.tree.map(np.testing.assert_array_equal, alone, stacked[5])

    def test_many_values_under_transformations(self, x64):
        gmm, values = random_mixture(0, K, D, condition=10), points(2, 5, 1)
        stacked = gmm.condition([1], values)

        def close(got):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), got, stacked)

        close(jax.jit(lambda gmm, values: gmm.condition([1], values))(gmm, values))
        close(jax.jit(jax.vmap(lambda value: gmm.condition([1], value)))(values))
        batched = jax.jit(jax.vmap(lambda values: gmm.condition([1], values)))(values[:, None])
        close(jax.tree.map(lambda leaf: leaf[:, 0], batched))

    def test_values_of_another_shape(self):
        gmm = random_mixture(0, K, D)
        for values, says in ((np.zeros((4, 3)), "axis 1 must have size 2"), (np.zeros((0, 2)), "axis 0 is empty")):
            with pytest.raises(ValueError, match=f"^values: .*{says}"):
                gmm.condition([0, 1], values)


def conditional(means, covariances, weights, given, value):
    """The closed form, a component at a time: means, covariances, weights; NaN where the weight is zero."""
    rest = [axis for axis in range(means.shape[1]) if axis not in given]
    new = [np.full((len(weights), len(rest)), np.nan), np.full((len(weights), len(rest), len(rest)), np.nan)]
    evidence = np.zeros(len(weights))
    for k in np.flatnonzero(weights):
        inner, cross = covariances[k][np.ix_(given, given)], covariances[k][np.ix_(rest, given)]
        gain = cross @ np.linalg.inv(inner)
        new[0][k] = means[k, rest] + gain @ (value - means[k, given])
        new[1][k] = covariances[k][np.ix_(rest, rest)] - gain @ cross.T
        evidence[k] = weights[k] * scipy.stats.multivariate_normal(means[k, given], inner).pdf(value)
    return *new, evidence / evidence.sum()


class TestCriteria:
    """What scikit-learn's mixtures say of points."""

    @pytest.fixture
    def twin(self, x64):
        gmm, x = random_mixture(0, K, D, condition=10), points()
        return gmm, cg.to_sklearn(gmm), x

    def test_scikit_learn(self, twin):
        gmm, twin, x = twin
        np.testing.assert_array_equal(gmm.predict(x), twin.predict(x))
        np.testing.assert_allclose(gmm.score(x), twin.score(x), rtol=1e-12)
        np.testing.assert_allclose(gmm.bic(x), twin.bic(x), rtol=1e-12)
        np.testing.assert_allclose(gmm.aic(x), twin.aic(x), rtol=1e-12)
        assert gmm.n_parameters == twin._n_parameters()

    def test_components_without_weight_do_not_count(self, twin):
        gmm, twin, x = twin
        padded = with_zero_weight(gmm, 1, means=x[0])
        small = cg.GaussianMixture.from_moments(*(np.delete(leaf, 1, axis=0) for leaf in host(padded)))
        assert padded.n_parameters == small.n_parameters == K - 2 + (K - 1) * (D + D * (D + 1) // 2)
        assert 1 not in np.asarray(padded.predict(x))
        np.testing.assert_allclose(padded.bic(x), small.bic(x), rtol=1e-12)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), gmm, padded)
        np.testing.assert_array_equal(stacked.n_parameters, [gmm.n_parameters, padded.n_parameters])

    def test_transformations(self, twin):
        gmm, _, x = twin

        def said(gmm, x):
            return gmm.predict(x), gmm.score(x), gmm.bic(x), gmm.aic(x), gmm.n_parameters

        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), jax.jit(said)(gmm, x), said(gmm, x))
        batched = jax.jit(jax.vmap(said, (0, None)))(jax.tree.map(lambda leaf: leaf[None], gmm), x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-12), batched, said(gmm, x))

    def test_refused(self, twin):
        for method in ("predict", "score", "bic", "aic"):
            with pytest.raises(ValueError, match=r"^x: expected shape \(n, 3\)"):
                getattr(twin[0], method)(np.zeros(3))


@functools.partial(jax.jit, static_argnames="name")
def slope_of_total(name, gmm, x):
    """The gradient of the sum of what is finite."""

    def total(gmm):
        values = getattr(gmm, name)(x)
        return jnp.sum(jnp.where(jnp.isneginf(values), 0, values))

    return jax.grad(total)(gmm)


class TestDerivatives:
    def test_finite_differences(self, x64):
        """Of the log-likelihood in all of a mixture, along random directions."""
        gmm, x = random_mixture(0, K, D, condition=10), points()
        gradient = jax.jit(jax.grad(lambda gmm: jnp.sum(gmm.log_prob(x))))(gmm)
        rng = np.random.RandomState(0)
        step = 1e-5
        for name in ("means", "covariances", "weights"):
            leaf, slope = getattr(gmm, name), np.asarray(getattr(gradient, name))
            direction = rng.randn(*leaf.shape)
            if name == "covariances":
                direction = direction + direction.swapaxes(1, 2)
            means, covariances, weights = host(gmm)
            ends = []
            for sign in (1, -1):
                moved = {"means": means, "covariances": covariances, "weights": weights}
                moved[name] = moved[name] + sign * step * direction
                ends.append(scipy_log_prob(x, **moved).sum())
            difference = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(np.sum(slope * direction), difference, rtol=1e-6)

    @pytest.mark.parametrize("covariance", [np.eye(3), np.zeros((3, 3)), np.diag([1, 0, 1])], ids=["I", "0", "plane"])
    @pytest.mark.parametrize("name", ["log_prob", "log_posterior"])
    def test_no_nan_from_a_zero_weight(self, name, covariance):
        """Neither in a value nor in a derivative, also where the absent component has no density."""
        gmm, x = with_zero_weight(random_mixture(0, K, D), 1, covariances=covariance), points()

        gradient = slope_of_total(name, gmm, x)
        assert_finite(gradient)
        assert not np.asarray(gradient.means[1]).any()
        assert not np.asarray(gradient.covariances[1]).any()

    def test_points(self, x64):
        gmm, x = random_mixture(0, K, D, condition=10), points()
        gradient = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(gmm.log_prob(x))))(jnp.asarray(x)))
        step = np.zeros(D)
        step[1] = 1e-5
        difference = (scipy_log_prob(x + step, *host(gmm)) - scipy_log_prob(x - step, *host(gmm))) / 2e-5
        np.testing.assert_allclose(gradient[:, 1], difference, rtol=1e-5, atol=1e-7)


class TestPytree:
    def test_immutable(self):
        gmm = random_mixture(0, K, D)
        with pytest.raises(dataclasses.FrozenInstanceError):
            gmm.means = gmm.means + 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            del gmm.weights

    def test_round_trip(self):
        gmm = random_mixture(0, K, D)
        leaves, structure = jax.tree.flatten(gmm)
        assert [leaf.shape for leaf in leaves] == [(K, D), (K, D, D), (K,)]
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is cg.GaussianMixture
        jax.tree.map(np.testing.assert_array_equal, gmm, again)
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(gmm)]
        assert names == [".means", ".covariances", ".weights"]

    def test_rebuilding_checks_nothing(self):
        """Transformations rebuild instances around placeholders."""
        structure = jax.tree.structure(random_mixture(0, K, D))
        assert jax.tree.unflatten(structure, [None, "anything", object()]).means is None

    def test_jit_equals_eager(self):
        gmm, x, names = random_mixture(0, K, D), points(), ("log_prob", "component_log_prob", "log_posterior")
        for name, compiled in zip(names, densities(gmm, x, names=names)):
            np.testing.assert_allclose(compiled, getattr(gmm, name)(x), rtol=1e-5, atol=1e-5)

    def test_constructor_under_jit(self):
        gmm = random_mixture(0, K, D)
        again = jax.jit(cg.GaussianMixture.from_moments)(gmm.means, gmm.covariances, gmm.weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), gmm, again)

    def test_vmap_equals_a_loop(self):
        gmms, x = [random_mixture(seed, K, D) for seed in range(3)], points()
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gmms)

        def call(gmm):
            return gmm.log_prob(x), gmm.condition([1], [0.5]), gmm.covariance()

        batched, one = jax.jit(jax.vmap(call))(stacked), jax.jit(call)
        for i, gmm in enumerate(gmms):
            member = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), member, one(gmm))
