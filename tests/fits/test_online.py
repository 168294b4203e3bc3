"""Online EM: against a plain NumPy one in float64, fits of all data at once, and the laws of a bound that EM raises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from problems import random_mixture

import coupled_gmm as cg
from coupled_gmm.fits import gmm as gmm_module

N, D, K, STEPS, RIDGE = 60, 2, 3, 4, 1e-3  # one shape: few compilations
FIELDS = ("mass", "masses", "means", "remainders", "scatters", "entropy")


def cloud(seed, n=N, d=D, apart=4.0, drift=0.0):
    """Points of three clusters, whose middles are the same for all seeds but for a drift."""
    rng, places = np.random.RandomState(seed), np.random.RandomState(7)
    middles, frames = apart * places.randn(K, d) + drift, places.randn(K, d, d) + 0.5 * np.eye(d)
    labels = rng.randint(K, size=n)
    return middles[labels] + np.einsum("nij,nj->ni", frames[labels], rng.randn(n, d))


def start(seed=1, k=K, d=D):
    return random_mixture(seed, k, d, condition=4)


def host(statistics):
    """The fields in float64, means in one number."""
    found = {name: np.asarray(getattr(statistics, name), np.float64) for name in FIELDS}
    return {**found, "means": found["means"] + found["remainders"]}


def moments(gmm):
    lost = 0 if gmm.remainders is None else np.asarray(gmm.remainders, np.float64)
    means, covariances, weights = (np.asarray(x, np.float64) for x in (gmm.means, gmm.covariances, gmm.weights))
    return means + lost, covariances, weights


class Twin:
    """Online EM by raw second moments in float64."""

    def __init__(self, gmm, x, w=None, earlier=None, forgetting=0.0, ridge=RIDGE):
        self.x, w = np.asarray(x, np.float64), np.ones(len(x)) if w is None else np.asarray(w, np.float64)
        self.theta, self.w, self.earlier = moments(gmm), w / w.sum(), earlier
        kept = 0.0 if earlier is None else (1 - forgetting) * earlier["mass"]
        self.mass, self.share = kept + w.sum(), kept / (kept + w.sum())
        every = self.raw(self.w[:, None] * np.ones((1, K if gmm is None else gmm.n_components)) / gmm.n_components)
        if earlier is not None:
            every = [(1 - self.share) * one + self.share * other for one, other in zip(every, self.before, strict=True)]
        mean = every[1].sum(0)
        self.floor = ridge * (np.diag(every[2].sum(0)) - mean**2)

    def raw(self, r):
        return [r.sum(0), r.T @ self.x, np.einsum("nk,ni,nj->kij", r, self.x, self.x)]

    @property
    def before(self):
        n, m, s = (self.earlier[name] for name in ("masses", "means", "scatters"))
        return [n, n[:, None] * m, n[:, None, None] * (s + m[:, :, None] * m[:, None, :])]

    def q(self, floor):
        """Of earlier data, with their entropy."""
        total = float(self.earlier["entropy"])
        for n, m, a, mean, s, w in zip(
            *(self.earlier[i] for i in ("masses", "means", "scatters")), *self.theta, strict=True
        ):
            second = a + np.diag(floor) + np.outer(m - mean, m - mean)
            total += n * (
                np.log(w) - 0.5 * np.linalg.slogdet(2 * np.pi * s)[1] - 0.5 * np.trace(np.linalg.inv(s) @ second)
            )
        return total

    def e_step(self):
        """J with the ridge's term and without, and the sums; and the entropy of all."""
        joint = np.stack(
            [
                scipy.stats.multivariate_normal(m, s).logpdf(self.x) + np.log(w)
                for m, s, w in zip(*self.theta, strict=True)
            ],
            1,
        )
        penalty = np.array([0.5 * self.floor @ np.diag(np.linalg.inv(s)) for s in self.theta[1]])
        log_r = joint - penalty - scipy.special.logsumexp(joint - penalty, axis=1, keepdims=True)
        values = [self.w @ scipy.special.logsumexp(each, axis=1) for each in (joint - penalty, joint)]
        entropy = -self.w @ (np.exp(log_r) * log_r).sum(1)
        sums = self.raw(np.exp(log_r) * self.w[:, None])
        if self.earlier is not None:
            a = self.share
            values = [
                (1 - a) * v + a * self.q(floor) for v, floor in zip(values, (self.floor, 0 * self.floor), strict=True)
            ]
            entropy = (1 - a) * entropy + a * self.earlier["entropy"]
            sums = [(1 - a) * one + a * other for one, other in zip(sums, self.before, strict=True)]
        return values, sums, entropy

    def fit(self, steps=STEPS):
        rows = []
        for step in range(steps + 1):
            values, (n, first, second), entropy = self.e_step()
            rows.append(values)
            mean = first / n[:, None]
            scatters = second / n[:, None, None] - mean[:, :, None] * mean[:, None, :]
            if step < steps:
                self.theta = mean, scatters + np.diag(self.floor), n
        found = {"mass": self.mass, "masses": n, "means": mean, "scatters": scatters, "entropy": entropy}
        return self.theta, np.array(rows), found


def assert_same(fit, twin, steps=STEPS, **tolerance):
    theta, rows, found = twin.fit(steps)
    for leaf, expected in zip(moments(fit.gmm), theta, strict=True):
        np.testing.assert_allclose(leaf, expected, **tolerance)
    ends = [fit.penalized_log_likelihood, fit.log_likelihood]
    np.testing.assert_allclose(np.asarray(ends), rows[-1], **tolerance)
    history = np.stack([fit.history.penalized_log_likelihood, fit.history.log_likelihood], axis=1)
    np.testing.assert_allclose(history[:steps], rows[:steps], **tolerance)
    for name, expected in found.items():
        np.testing.assert_allclose(host(fit.statistics)[name], expected, err_msg=name, **tolerance)


def batches(weighted=False):
    w = [np.random.RandomState(i).uniform(0.5, 3, N) * (np.arange(N) % 7 > 0) for i in range(3)]
    return [(cloud(i), w[i] if weighted else None) for i in range(3)]


@pytest.mark.parametrize(("weighted", "forgetting"), [(False, 0.0), (True, 0.3)])
def test_a_stream_equals_numpy(weighted, forgetting, precision):
    gmm, statistics, earlier = start(), None, None
    for x, w in batches(weighted):
        on = {} if statistics is None else {"statistics": statistics, "forgetting": forgetting}
        fit = cg.fit_gmm(x, gmm, point_weights=w, max_steps=STEPS, tol=0, ridge=RIDGE, **on)
        twin = Twin(gmm, x, w, earlier, forgetting)
        assert_same(fit, twin, rtol=1e-9 if precision < 1e-8 else 2e-4, atol=1e-10 if precision < 1e-8 else 2e-5)
        gmm, statistics, earlier = fit.gmm, fit.statistics, host(fit.statistics)
    expected = (
        3 * N if w is None else sum((1 - forgetting) ** (2 - i) * v.sum() for i, (_, v) in enumerate(batches(True)))
    )
    np.testing.assert_allclose(float(fit.statistics.mass), expected, rtol=4 * precision)


@pytest.mark.parametrize("d", [1, 3])
def test_one_component_has_the_moments_of_all_data(d, precision):
    """K = 1 is exact, whatever the batches are, down to batches of one point."""
    x = 3 + 2 * np.random.RandomState(0).randn(41, d)
    fit = cg.fit_gmm(x[:20], start(0, 1, d), max_steps=1, tol=0, ridge=0)
    for first, last in ((20, 40), (40, 41)):
        fit = cg.fit_gmm(x[first:last], fit.gmm, statistics=fit.statistics, max_steps=1, tol=0, ridge=0)
    found = host(fit.statistics)
    assert found["mass"] == 41 and found["entropy"] == 0
    means, covariances, weights = moments(fit.gmm)
    rtol = 100 * precision
    for mean, scatter in ((means, covariances), (found["means"], found["scatters"])):
        np.testing.assert_allclose(mean[0], x.mean(0), rtol=rtol)
        np.testing.assert_allclose(scatter[0], np.cov(x.T, bias=True).reshape(d, d), rtol=rtol, atol=rtol)
    assert weights == 1
    density = scipy.stats.multivariate_normal(x.mean(0), np.cov(x.T, bias=True)).logpdf(x).mean()
    np.testing.assert_allclose(float(fit.log_likelihood), density, rtol=rtol)


def test_nothing_is_left_of_what_is_forgotten(precision):
    (x, _), (y, w), _ = batches(True)
    old = cg.fit_gmm(x, start(), max_steps=STEPS, tol=0)
    options = {"point_weights": w, "max_steps": STEPS, "tol": 0}
    fit = cg.fit_gmm(y, old.gmm, statistics=old.statistics, forgetting=1, **options)
    plain = cg.fit_gmm(y, old.gmm, **options)
    for one, other in zip(jax.tree.leaves(fit), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=100 * precision, atol=100 * precision)


def test_j_is_a_bound_of_all_data_and_never_falls(x64):
    x, y = cloud(0), cloud(1, drift=0.7)
    old = cg.fit_gmm(x, start(), tol=1e-9, max_steps=300, ridge=0)
    fit = cg.fit_gmm(y, old.gmm, statistics=old.statistics, tol=0, max_steps=40, ridge=0)
    rows = np.asarray(fit.history.log_likelihood)
    assert (np.diff(rows) > -1e-13).all() and rows[-1] - rows[0] > 1e-3
    every = np.concatenate([x, y])
    # It is the likelihood itself where the old E-step was, and below it elsewhere.
    np.testing.assert_allclose(rows[0], old.gmm.score(every), rtol=1e-12)
    assert float(fit.log_likelihood) < fit.gmm.score(every) < float(fit.log_likelihood) + 0.1


def test_a_fixed_point_of_all_data_is_one_of_either_half(x64):
    """With what the other half says there; and so is that of a third at a rate."""
    x, y = cloud(0), cloud(1)
    both = cg.fit_gmm(np.concatenate([x, y]), start(), tol=1e-14, max_steps=2000, ridge=RIDGE)
    for one, other in ((x, y), (y, x)):
        twin = Twin(both.gmm, other, ridge=0)
        twin.floor = RIDGE * np.concatenate([x, y]).var(0)
        _, (n, first, second), entropy = twin.e_step()
        mean = first / n[:, None]
        scatters = second / n[:, None, None] - mean[:, :, None] * mean[:, None, :]
        leaves = (np.float64(N), n, mean, 0 * mean, scatters, entropy)
        statistics = cg.MixtureStatistics(*map(jnp.asarray, leaves))
        fit = cg.fit_gmm(one, both.gmm, statistics=statistics, tol=0, max_steps=3, ridge=RIDGE)
        for leaf, expected in zip(moments(fit.gmm), moments(both.gmm), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6)
        ends = float(fit.penalized_log_likelihood), float(both.penalized_log_likelihood)
        np.testing.assert_allclose(*ends, rtol=1e-10)
        for name, expected in host(both.statistics).items():
            if name != "remainders":
                np.testing.assert_allclose(host(fit.statistics)[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_many_small_batches_come_near_the_fit_of_all(precision):
    """A step for each of sixty batches: as likely as the fit of all to 0.005, where the start is 1 worse."""
    x = cloud(3, 60 * N)
    begun = cg.init_gmm(jax.random.key(0), x[:N], K)
    fit = cg.fit_gmm(x[:N], begun)
    for i in range(1, 60):
        fit = cg.fit_gmm(x[i * N : (i + 1) * N], fit.gmm, statistics=fit.statistics, max_steps=1, tol=0)
    best = cg.fit_gmm(x, begun, max_steps=1000)
    assert best.gmm.score(x) - 0.005 < fit.gmm.score(x) <= best.gmm.score(x) + 1e-5
    np.testing.assert_allclose(float(fit.statistics.mass), len(x), rtol=1e-6)


def test_a_point_beside_a_million_keeps_its_weight():
    """In float32 one less the earlier share would be off by a twentieth of it."""
    x = np.random.RandomState(0).randn(N, 1)
    old = cg.fit_gmm(x, start(0, 1, 1), max_steps=1, tol=0, ridge=0)
    many = dataclasses.replace(old.statistics, mass=jnp.float32(1e6))
    fit = cg.fit_gmm([[2e3]], old.gmm, statistics=many, max_steps=1, tol=0, ridge=0)
    np.testing.assert_allclose(fit.gmm.covariances.ravel(), x.var() + 1e-6 * (2e3 - x.mean()) ** 2, rtol=1e-3)


def test_drift_is_followed_by_forgetting():
    first = cg.fit_gmm(cloud(0), cg.init_gmm(jax.random.key(0), cloud(0), K))
    ends = {}
    for rate in (0.0, 0.5):
        fit = first
        for i in range(1, 11):
            x = cloud(i, drift=0.5 * i)
            fit = cg.fit_gmm(x, fit.gmm, statistics=fit.statistics, forgetting=rate, max_steps=3, tol=0)
        ends[rate] = fit
    today = cloud(100, 600, drift=5.0)
    assert ends[0.5].gmm.score(today) > ends[0.0].gmm.score(today) + 0.5
    np.testing.assert_allclose(float(ends[0.5].statistics.mass), N * (2 - 0.5**10), rtol=1e-6)


def test_a_cloud_that_is_not_in_memory_is_as_one_that_is(tmp_path, precision):
    (x, _), (y, w), _ = batches(True)
    np.save(tmp_path / "y.npy", y)
    old = cg.fit_gmm(x, start())
    options = {"statistics": old.statistics, "forgetting": 0.2, "max_steps": STEPS, "tol": 0}
    here = cg.fit_gmm(y, old.gmm, point_weights=w, **options)
    there = cg.fit_gmm(cg.open_cloud(tmp_path / "y.npy", weights=w, chunk_size=17), old.gmm, **options)
    assert jax.tree.structure(here) == jax.tree.structure(there)
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(one, other, rtol=200 * precision, atol=200 * precision)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_far_from_0(offset, precision):
    """Data of float64, whose means one float32 would round by their deviations."""
    x, y = cloud(0), cloud(1, drift=0.5)
    near = cg.fit_gmm(x, start(), max_steps=STEPS, tol=0, ridge=RIDGE)
    near = cg.fit_gmm(y, near.gmm, statistics=near.statistics, max_steps=STEPS, tol=0, ridge=RIDGE)
    places = np.asarray(start().means, np.float64) + offset
    far = cg.GaussianMixture.from_moments(places, start().covariances, start().weights)
    far = cg.fit_gmm(x + offset, far, max_steps=STEPS, tol=0, ridge=RIDGE)
    far = cg.fit_gmm(y + offset, far.gmm, statistics=far.statistics, max_steps=STEPS, tol=0, ridge=RIDGE)
    atol = 1e-3 if precision > 1e-8 else 1e-7
    np.testing.assert_allclose(host(far.statistics)["means"] - offset, host(near.statistics)["means"], atol=atol)
    np.testing.assert_allclose(far.statistics.scatters, near.statistics.scatters, rtol=10 * atol, atol=atol)
    np.testing.assert_allclose(far.history.log_likelihood, near.history.log_likelihood, rtol=atol)


def test_means_far_from_0_do_not_stick():
    """Forty batches move the mean by less each than one float32 tells apart there."""
    x = np.float32(1e5 + np.random.RandomState(0).randn(40 * N, 1))
    fit = cg.fit_gmm(x[:N], cg.GaussianMixture.from_moments(x[:1], [[[1.0]]], [1.0]), max_steps=1, tol=0)
    for i in range(1, 40):
        x_now = x[i * N : (i + 1) * N]
        fit = cg.fit_gmm(x_now, fit.gmm, statistics=fit.statistics, max_steps=1, tol=0)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(host(fit.statistics)["means"][0], exact.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(host(fit.statistics)["scatters"][0, 0], exact.var(0), rtol=1e-4)


@pytest.mark.parametrize("start_first", [True, False])
def test_precisions_may_differ(start_first):
    """Statistics of float32 beside a start of float64, and the other way round: the fit is in the start's."""
    x = cloud(0)
    with jax.enable_x64(True):
        double = cg.fit_gmm(x, start(), max_steps=STEPS, tol=0)
        single = jax.tree.map(lambda leaf: leaf.astype("float32"), (double.gmm, double.statistics))
        gmm, statistics = (double.gmm, single[1]) if start_first else (single[0], double.statistics)
        fit = cg.fit_gmm(x, gmm, statistics=statistics, forgetting=0.5, max_steps=STEPS, tol=0)
        expected = cg.fit_gmm(x, double.gmm, statistics=double.statistics, forgetting=0.5, max_steps=STEPS, tol=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(fit.statistics)} == {gmm.dtype}
    for name, value in host(expected.statistics).items():
        if name != "remainders":
            np.testing.assert_allclose(host(fit.statistics)[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_do_not_matter(scale):
    x, y = cloud(0), cloud(1)
    gmm = start()
    scaled = cg.GaussianMixture.from_moments(gmm.means * scale, gmm.covariances * scale**2, gmm.weights)
    ends = []
    for begun, unit in ((gmm, 1.0), (scaled, scale)):
        fit = cg.fit_gmm(x * unit, begun, max_steps=STEPS, tol=0)
        ends.append(cg.fit_gmm(y * unit, fit.gmm, statistics=fit.statistics, max_steps=STEPS, tol=0))
    one, other = (host(fit.statistics) for fit in ends)
    np.testing.assert_allclose(other["means"] / scale, one["means"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(other["entropy"], one["entropy"], atol=1e-4)
    volume = D * np.log(scale)
    np.testing.assert_allclose(float(ends[1].log_likelihood) + volume, float(ends[0].log_likelihood), rtol=1e-4)


def test_precision_of_steps_that_gain_little():
    """In float32 a fit that goes on from very much earlier data converges to a tolerance below J's rounding, and says so."""
    x = np.float32(cloud(0, 40 * N))
    old = cg.fit_gmm(x, cg.init_gmm(jax.random.key(0), x, K), tol=1e-6, max_steps=1000)
    fit = cg.fit_gmm(np.float32(cloud(1)), old.gmm, statistics=old.statistics, tol=1e-6, max_steps=1000)
    assert fit.converged and float(fit.statistics.mass) == 41 * N


def test_a_starved_component_comes_back_by_new_data_only():
    x = cloud(0)
    old = cg.fit_gmm(x, start(), max_steps=STEPS, tol=0)
    masses = np.asarray(old.statistics.masses) * [0, 1, 1]
    means = old.statistics.means.at[0].set(np.nan)  # of what is not there anything may be said
    starved = dataclasses.replace(old.statistics, masses=jnp.asarray(masses / masses.sum()), means=means)
    fit = cg.fit_gmm(x, old.gmm, statistics=starved, max_steps=1, tol=0)
    twin = Twin(old.gmm, x, earlier=host(old.statistics) | {"masses": np.asarray(starved.masses)}, ridge=1e-6)
    assert_same(fit, twin, 1, rtol=1e-3, atol=1e-4)
    assert np.abs(np.asarray(fit.gmm.means[0])).max() < 100


@pytest.mark.parametrize("weight", [1e-41, 1e-30, 1e37])
def test_weights_of_any_size(weight):
    x = cloud(0)
    fit = cg.fit_gmm(x, start(), point_weights=np.full(N, weight), max_steps=STEPS, tol=0)
    again = cg.fit_gmm(x, fit.gmm, point_weights=np.full(N, weight), statistics=fit.statistics, max_steps=STEPS, tol=0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(again.statistics))
    assert float(again.statistics.mass) > 0


def test_saved_statistics_go_on(tmp_path):
    fit = cg.fit_gmm(cloud(0), start(), max_steps=STEPS, tol=0)
    cg.save(tmp_path / "fit.npz", fit)
    cg.save(tmp_path / "statistics.npz", fit.statistics)
    held, alone = cg.load(tmp_path / "fit.npz"), cg.load(tmp_path / "statistics.npz")
    for one, *others in zip(*(jax.tree.leaves(s) for s in (fit.statistics, held.statistics, alone)), strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)
    options = {"max_steps": 1, "tol": 0}
    expected = cg.fit_gmm(cloud(1), fit.gmm, statistics=fit.statistics, **options)
    np.testing.assert_array_equal(
        cg.fit_gmm(cloud(1), held.gmm, statistics=alone, **options).gmm.means, expected.gmm.means
    )


def test_the_best_of_several_starts_brings_its_statistics():
    inits = [start(1), start(2)]
    fit = cg.fit_gmm(cloud(0), inits, max_steps=STEPS, tol=0)
    alone = cg.fit_gmm(cloud(0), inits[int(fit.start)], max_steps=STEPS, tol=0)
    for one, other in zip(jax.tree.leaves(fit.statistics), jax.tree.leaves(alone.statistics), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_under_transformations():
    """vmap over batches, statistics and rates is a loop over them; and several are indexed as one is."""
    olds = [cg.fit_gmm(cloud(i), start(), max_steps=STEPS, tol=0) for i in range(2)]
    clouds, rates = [np.float32(cloud(5 + i)) for i in range(2)], [0.1, 0.6]

    def on(x, old, rate):
        return cg.fit_gmm(x, old.gmm, statistics=old.statistics, forgetting=rate, max_steps=STEPS, tol=0)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *olds)
    fits = jax.jit(jax.vmap(on))(jnp.stack(clouds), stacked, jnp.asarray(rates))
    assert fits.statistics.batch_shape == (2,) and "2 stacked" in repr(fits.statistics)
    for i in range(2):
        alone = on(clouds[i], olds[i], rates[i])
        for one, other in zip(jax.tree.leaves(fits.statistics[i]), jax.tree.leaves(alone.statistics), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_stream_is_two_programs():
    """One for the first batch, one for the others, whatever the rate and however many points a few fewer."""
    gmm_module._fit.clear_cache()
    fit = cg.fit_gmm(cloud(0), start(), max_steps=STEPS, tol=0)
    for i in range(1, 4):
        x = cloud(i)[: N - i]
        fit = cg.fit_gmm(x, fit.gmm, statistics=fit.statistics, forgetting=0.1 * i, max_steps=STEPS, tol=0)
    assert gmm_module._fit._cache_size() == 2
