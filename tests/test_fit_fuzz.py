"""Clouds as people have them, hundreds of them: no fit that says it converged is wrong, whatever the units and offsets."""

import warnings

import jax
import numpy as np
import pytest
import scipy.special
from sklearn.mixture import GaussianMixture

import coupled_gmm as cg

TOL, STEPS = 1e-5, 300
# (n, d, K): each is one program.
SHAPES = [(4, 1, 3), (7, 2, 3), (60, 60, 2), (40, 3, 5), (300, 1, 2), (500, 2, 3), (400, 20, 3), (1000, 5, 4)]
LARGE = [(10_000, 2, 3), (2000, 40, 4)]
KINDS = ("plain", "units", "offset", "constant", "rare", "ties", "heavy", "thin", "weights")


class Cloud:
    """A cloud in its own units, the scale and offset that bring it to O(1), its weights, and what is odd about it."""

    def __init__(self, seed, shape, kind):
        rng = np.random.RandomState(seed)
        n, d, k = shape
        centres = rng.uniform(-6, 6, (k, d))
        self.z = centres[rng.randint(k, size=n)] + rng.randn(n, d) * np.exp(rng.uniform(-1, 0.5, d))
        self.w, self.scale, self.offset = np.ones(n), np.ones(d), np.zeros(d)
        if kind in ("units", "rare", "thin"):
            self.scale = 10.0 ** rng.uniform(-6, 6, d)
        if kind == "offset":
            self.offset = 10.0 ** rng.uniform(2, 8, d) * rng.choice([-1, 1], d)
        if kind == "constant" and d > 1:
            self.z[:, rng.randint(d)] = rng.choice([0.0, 1.0, 0.1, 255.0])
        if kind == "rare" and d > 1:
            flag = np.zeros(n)
            flag[rng.choice(n, max(1, n // 100), replace=False)] = 1
            self.z[:, rng.randint(d)] = flag
        if kind == "ties":
            self.z = np.round(self.z)
        if kind == "heavy":
            self.z = self.z + 0.3 * rng.standard_t(2, (n, d))
        if kind == "thin" and d > 1:
            self.z[:, 0] = self.z[:, 1] + 1e-3 * self.z[:, 0]
        if kind == "weights":
            self.w = rng.rand(n) * 10.0 ** rng.uniform(-30, 30)
        self.k = k
        self.x = self.offset + self.scale * self.z

    def fit(self, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # names the constant features
            start = cg.init_gmm(jax.random.key(0), self.x, self.k, n_init=1, point_weights=self.w)
            fit = cg.fit_gmm(self.x, start, point_weights=self.w, max_steps=STEPS, tol=TOL, **options)
        return start, fit


def moments(gmm):
    """Means with their remainders, covariances, weights: float64."""
    means = np.asarray(gmm.means, np.float64)
    if gmm.remainders is not None:
        means = means + np.asarray(gmm.remainders, np.float64)
    return means, np.asarray(gmm.covariances, np.float64), np.asarray(gmm.weights, np.float64)


def log_joint(x, w, gmm, floor):
    """Of points and components, lowered by tr(floor S^-1) / 2; in units in which variances are of order 1."""
    means, covariances, weights = moments(gmm)
    unit = np.sqrt(np.einsum("k,kii->i", weights, covariances) + np.average((x - x[0]) ** 2, axis=0, weights=w) * 1e-6)
    columns = []
    for m, s, p in zip(means, covariances, weights, strict=True):
        if p == 0:
            columns.append(np.full(len(x), -np.inf))
            continue
        factor = np.linalg.cholesky(s / unit / unit[:, None])
        y = scipy.linalg.solve_triangular(factor, ((x - m) / unit).T, lower=True)
        ridge = np.sum(scipy.linalg.solve_triangular(factor, np.diag(np.sqrt(floor) / unit), lower=True) ** 2)
        norm = np.sum(np.log(np.diag(factor))) + np.sum(np.log(unit)) + 0.5 * len(unit) * np.log(2 * np.pi)
        columns.append(np.log(p) - 0.5 * np.sum(y**2, 0) - 0.5 * ridge - norm)
    return np.stack(columns, 1)


def floors(cloud, eps):
    """Ridge's part of each variance; a constant feature's is absolute."""
    w = cloud.w / cloud.w.sum()
    centred = cloud.x - cloud.x[0]
    variance = w @ (centred - w @ centred) ** 2
    return max(1e-6, 2 * len(variance) * eps) * np.where(variance > 0, variance, 1)


def problem(cloud, start, fit):
    """What is wrong with a fit that says it converged; None if nothing is."""
    eps = float(np.finfo(fit.gmm.dtype).eps)
    history = np.asarray(fit.history.penalized_log_likelihood, np.float64)[: int(fit.n_steps)]
    values = np.append(history, float(fit.penalized_log_likelihood))
    # J is summed in the frame's unit, and rounds there.
    volume = cloud.x.shape[1] * np.abs(np.log(np.maximum(cloud.x.std(0).max(), 1e-30)))
    if (np.diff(values) < -64 * eps * (1 + np.abs(values[1:]) + volume)).any():
        return f"the objective fell by {np.diff(values).min():.3g}"
    if not fit.converged:
        return None
    w, floor = cloud.w / cloud.w.sum(), floors(cloud, eps)
    joint = log_joint(cloud.x, w, fit.gmm, 0 * floor)
    truth = w @ scipy.special.logsumexp(joint, axis=1)
    error = abs(float(fit.log_likelihood) - truth)
    if not error < 2e-3 * (1 + abs(truth) * 1e-2) + 0.02 * (len(floor) > 10):
        return f"log-likelihood {float(fit.log_likelihood):.5f}, right {truth:.5f}"
    return None


def scikit_learn(cloud, start, eps):
    """Mean log-likelihood where scikit-learn's EM ends from the same start, the features standardised."""
    x = np.repeat(cloud.x, 1, axis=0)
    mean, deviation = x.mean(0), x.std(0)
    used = deviation > 1e-9 * np.abs(mean).max()
    z = (x - mean)[:, used] / deviation[used]
    means, covariances, weights = moments(start)
    means = (means - mean)[:, used] / deviation[used]
    covariances = covariances[:, used][:, :, used] / deviation[used] / deviation[used][:, None]
    model = GaussianMixture(
        cloud.k,
        max_iter=STEPS,
        tol=TOL,
        reg_covar=max(1e-6, 2 * x.shape[1] * eps),
        weights_init=weights / weights.sum(),
        means_init=means,
        precisions_init=np.linalg.inv(covariances),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(z)
    constant = 0.5 * np.sum(~used) * np.log(2 * np.pi * max(1e-6, 2 * x.shape[1] * eps))
    return model.score(z) - np.log(deviation[used]).sum() - constant


def run(seed, shape, kind):
    cloud = Cloud(seed, shape, kind)
    try:
        start, fit = cloud.fit()
    except ValueError as refusal:
        return str(refusal)[:80], None, cloud, None
    return fit.message.split(":")[0], problem(cloud, start, fit), cloud, (start, fit)


CASES = [(seed, SHAPES[seed % len(SHAPES)], KINDS[seed % len(KINDS)]) for seed in range(24)]


@pytest.mark.parametrize(("seed", "shape", "kind"), CASES)
def test_no_fit_that_converged_is_wrong(seed, shape, kind):
    said, wrong, cloud, found = run(seed, shape, kind)
    assert wrong is None, (said, wrong)
    assert found is not None, said
    start, fit = found
    if kind != "weights" and fit.converged:
        twin = scikit_learn(cloud, start, float(np.finfo(np.float32).eps))
        assert float(fit.log_likelihood) > twin - 0.05 * (1 + shape[1] / 10), (said, float(fit.log_likelihood), twin)
