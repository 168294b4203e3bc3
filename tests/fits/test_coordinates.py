"""Coordinates of the M-step: where they begin, what they can't leave, and that a first step is EM's own, by NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import points, random_mixture
from twins import posterior

import coupled_gmm as cg
from coupled_gmm.fits.coordinates import log_cholesky_coordinates, natural_coordinates
from coupled_gmm.fits.objective import Objective
from coupled_gmm.fits.statistics import Parameters, Statistics
from coupled_gmm.transport.solvers import ENTROPIC

UNIT = 2.0  # of the coordinates that a fit works in
BOTH = pytest.mark.parametrize("coordinates", [natural_coordinates, log_cholesky_coordinates])


def seen(gmm, x):
    """Base and statistics of one node, as the E-step of NumPy and SciPy has them."""
    means, covariances, weights = (np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    share = posterior(x, means, covariances, weights) / len(x)
    factors = np.linalg.cholesky(covariances)
    whitening = np.linalg.inv(factors)
    masses = share.sum(0)
    some = np.where(masses > 0, masses, 1)
    whitened = np.einsum("kij,nkj->nki", whitening, x[:, None] - means)
    shift = np.einsum("nk,nki->ki", share, whitened) / some[:, None]
    away = whitened - shift
    scatter = np.einsum("nk,nki,nkj->kij", share, away, away) / some[:, None, None]
    with np.errstate(divide="ignore"):
        return (means, factors, np.log(weights)), (whitening, masses, shift, scatter)


def problem(edge_weight=0.0, frozen=(), absent=False):
    """A pair of nodes, as natural and log-Cholesky coordinates take it: base, statistics and graph; and the clouds."""
    gmms, clouds = [], []
    for seed, n in ((0, 400), (1, 500)):
        gmm = random_mixture(seed, 3, 2, condition=10)
        clouds.append(points(gmm, n))
        # The mixture that the cloud is of, a little off: a step from there is short.
        weights = np.asarray(gmm.weights) * ([1, 0, 1] if absent and seed else [1, 1, 1])
        gmms.append(cg.GaussianMixture.from_moments(gmm.means + 0.03, gmm.covariances, weights / weights.sum()))
    bases, said = zip(*(seen(gmm, x) for gmm, x in zip(gmms, clouds)))
    base = Parameters(*(jnp.stack(leaves) for leaves in zip(*bases)))
    nothing = jnp.zeros(2)
    statistics = Statistics(base, *(jnp.stack(leaves) for leaves in zip(*said)), nothing, nothing)
    graph = cg.MixtureGraph.from_mixtures(gmms, [(0, 1)], edge_weights=edge_weight, frozen=frozen)
    return base, statistics, graph, clouds


@BOTH
def test_they_begin_at_the_base(x64, coordinates):
    base, statistics, graph, _ = problem(absent=True)
    found = coordinates(base, statistics, graph, jnp.asarray(UNIT), jnp.zeros_like(base.means[:, 0]))
    start = found.parameters(found.start, base.log_weights)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-12), start, base)


@BOTH
def test_wherever_they_lead_there_are_mixtures(x64, coordinates):
    """Lower triangular factors with a positive diagonal, weights that sum to 1; what is frozen or absent stays."""
    base, statistics, graph, _ = problem(frozen=[0], absent=True)
    found = coordinates(base, statistics, graph, jnp.asarray(UNIT), jnp.zeros_like(base.means[:, 0]))
    x = found.start + np.random.RandomState(0).randn(len(found.start))
    moved = found.parameters(x, base.log_weights)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one[0], other[0]), moved, base)
    factors, weights = np.asarray(moved.factors), np.exp(np.asarray(moved.log_weights))
    np.testing.assert_array_equal(factors, np.tril(factors))
    assert (np.diagonal(factors, axis1=-2, axis2=-1) > 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)
    assert weights[1, 1] == 0 and (weights[1, [0, 2]] > 0).all()
    assert (np.asarray(moved.means)[1, [0, 2]] != np.asarray(base.means)[1, [0, 2]]).all()


def test_a_first_step_is_ems_own(x64):
    """Without transport, one of length 1 up the gradient of Q in natural coordinates: means and weights by NumPy's EM."""
    base, statistics, graph, clouds = problem()
    objective = Objective(statistics, jnp.zeros((2, 2)), graph, ENTROPIC)
    natural = natural_coordinates(base, statistics, graph, jnp.asarray(UNIT), jnp.zeros_like(base.means[:, 0]))

    def q(x):
        return jnp.sum(objective.q(natural.parameters(x, base.log_weights)))

    moved = natural.parameters(jax.grad(q)(natural.start), base.log_weights)
    for node, x in enumerate(clouds):
        means, factors, log_weights = (np.asarray(leaf[node]) for leaf in base)
        share = posterior(x, means, factors @ factors.swapaxes(1, 2), np.exp(log_weights))
        wanted = share.T @ x / share.sum(0)[:, None]
        step = np.abs(wanted - means).max()
        assert step > 0.01, "nothing to see"
        np.testing.assert_allclose(moved.means[node], wanted, atol=0.02 * step)
        np.testing.assert_allclose(np.exp(moved.log_weights[node]), share.mean(0), atol=1e-3)


def test_no_step_leads_out_of_sight(x64):
    """However long: a mean ends within 4 of its component's deviations (or 4 times as far as its points), and
    no diagonal entry of its factor grows by more than e^3."""
    base, statistics, graph, _ = problem(0.1)
    natural = natural_coordinates(base, statistics, graph, jnp.asarray(UNIT), jnp.zeros_like(base.means[:, 0]))
    for size in (1e2, 1e6, 1e20):
        moved = natural.parameters(size * np.random.RandomState(1).randn(len(natural.start)), base.log_weights)
        away = np.einsum("vkij,vkj->vki", statistics.whitening, moved.means - base.means)
        farthest = 4 * np.sqrt(1 + np.sum(np.asarray(statistics.shift) ** 2, axis=-1))
        assert (np.linalg.norm(away, axis=-1) <= farthest * (1 + 1e-9)).all()
        before, after = (np.diagonal(np.asarray(p.factors), axis1=-2, axis2=-1) for p in (base, moved))
        assert (after <= np.exp(3) * before * (1 + 1e-9)).all()


def test_what_a_gradient_promises_in_log_cholesky_coordinates(x64):
    """The squared length of the gradient by means, in coordinates whitened and divided by the root of the curvature."""
    base, statistics, graph, _ = problem(0.1)
    found = log_cholesky_coordinates(base, statistics, graph, jnp.asarray(UNIT), jnp.zeros_like(base.means[:, 0]))
    gradient = np.zeros(len(found.start))
    gradient[: base.means.size] = np.random.RandomState(2).randn(base.means.size)
    weights = np.exp(np.asarray(base.log_weights))
    variance = np.mean(np.sum(np.asarray(base.factors) ** 2, axis=-1), axis=-1)
    curvature = np.asarray(statistics.masses) + 2 * 0.1 * weights * variance + 1e-6
    whitened = np.einsum(
        "vkij,vki->vkj", UNIT * np.asarray(base.factors), gradient[: base.means.size].reshape(base.means.shape)
    )
    expected = np.sum(np.sum(whitened**2, axis=-1) / curvature)
    np.testing.assert_allclose(found.promise(jnp.asarray(gradient)), expected, rtol=1e-9)


def test_a_component_without_points_keeps_the_floor(x64):
    """Whatever transport asks for; one with points has the likelihood for that, and shrinks as far as a step goes."""
    base, statistics, graph, _ = problem(0.1)
    masses = statistics.masses.at[1, 2].set(0)
    statistics = dataclasses.replace(statistics, masses=masses)
    floors = jnp.full((2, 2), 0.5 * jnp.min(jnp.diagonal(base.factors, axis1=-2, axis2=-1)) ** 2)
    natural = natural_coordinates(base, statistics, graph, jnp.asarray(UNIT), floors)
    moved = natural.parameters(jnp.full_like(natural.start, -1e9), base.log_weights)
    before, after = (np.diagonal(np.asarray(p.factors), axis1=-2, axis2=-1) for p in (base, moved))
    kept = np.maximum(before[1, 2] * np.exp(-0.7), np.sqrt(floors[1]))
    np.testing.assert_allclose(after[1, 2], kept)
    np.testing.assert_allclose(after[0], np.exp(-3) * before[0], rtol=1e-6)
