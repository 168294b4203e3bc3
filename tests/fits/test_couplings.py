"""Couplings of the components that exchange mass: exact where they are found, bounds elsewhere, against all costs at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_mixture

import coupled_gmm as cg
from coupled_gmm.fits.couplings import Couplings
from coupled_gmm.fits.objective import all_costs
from coupled_gmm.fits.statistics import Parameters
from coupled_gmm.gaussians import bures

# What coupling has cost is told in test_fidelity, and compiled there.
fit_pair = functools.partial(cg.fit_pair, fidelity=False)


def make(d, k=5):
    gmms = [random_mixture(seed, k, d) for seed in range(3)]
    graph = cg.MixtureGraph.from_mixtures(gmms, [(0, 1), (2, 1)])
    nodes = graph.nodes
    return Parameters(nodes.means, nodes.cholesky, nodes.log_weights), graph


def moved(parameters, size=0.3, seed=0):
    rng = np.random.RandomState(seed)
    noise = size * jnp.tril(jnp.asarray(rng.randn(*parameters.factors.shape)))
    means = parameters.means + size * rng.randn(*parameters.means.shape)
    return parameters._replace(means=means, factors=parameters.factors + noise)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_what_is_wanted_is_exact_and_the_rest_a_lower_bound(x64, d):
    parameters, graph = make(d)
    exact = np.asarray(all_costs(parameters, graph))
    wanted = np.random.RandomState(0).rand(*exact.shape) < 0.3
    first = jax.jit(Couplings.none)(parameters, graph)
    assert first.count == 0 and (np.asarray(first.costs) <= exact + 1e-9).all()
    more = jax.jit(Couplings.with_those)
    found = more(first, jnp.asarray(wanted), parameters, graph)
    for again in (found, more(found, jnp.asarray(wanted), parameters, graph)):  # what is known is not found twice
        assert again.count == wanted.sum()
        np.testing.assert_allclose(np.asarray(again.costs)[wanted], exact[wanted], rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(np.asarray(again.costs)[~wanted], np.asarray(first.costs)[~wanted])
    whole = more(found, jnp.ones_like(found.known), parameters, graph)
    assert whole.count == wanted.size
    np.testing.assert_allclose(whole.costs, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_the_price_bounds_that_of_transport_and_touches_it(x64, d):
    """With its derivatives where the couplings were found, by those of all costs."""
    parameters, graph = make(d)
    weights = jnp.asarray(np.random.RandomState(0).rand(2, 5, 5))
    none = Couplings.none(parameters, graph)
    known = none.with_those(jnp.ones_like(none.known), parameters, graph)
    price = jax.jit(lambda parameters: known.price(parameters, weights))
    cost = jax.jit(lambda parameters: jnp.sum(weights * all_costs(parameters, graph)))
    np.testing.assert_allclose(price(parameters), cost(parameters), rtol=1e-9)
    mine, theirs = jax.grad(price)(parameters), jax.grad(cost)(parameters)
    np.testing.assert_allclose(mine.means, theirs.means, atol=1e-8)
    np.testing.assert_allclose(jnp.tril(mine.factors), jnp.tril(theirs.factors), atol=1e-8)
    for seed in range(5):
        other = moved(parameters, seed=seed)
        assert price(other) >= cost(other) - 1e-9
    step = moved(parameters, 1e-6)
    change = jax.tree.map(jnp.subtract, step, parameters)
    slope = jnp.sum(mine.means * change.means) + jnp.sum(mine.factors * change.factors)
    np.testing.assert_allclose(price(step) - price(parameters), slope, rtol=1e-3)


def test_singular_factors_are_priced_by_what_their_couplings_leave(x64):
    factors0, factors1 = jnp.zeros((1, 3, 3)), jnp.eye(3)[None].at[0, 2, 2].set(0)
    rotations = bures.rotations(factors0, factors1, jnp.full(1, jnp.inf))
    wide = bures.widened(factors0), bures.widened(factors1)
    cost, _, _ = bures.coupled_cost(*wide, rotations, 3)
    np.testing.assert_allclose(cost, 2.0, rtol=1e-9)  # the whole variance of the other


def test_a_fit_returns_the_costs_of_all_pairs():
    """It has looked at few of them exactly."""
    rng = np.random.RandomState(0)
    centres = 6 * rng.randn(6, 3)
    clouds = [(centres[rng.randint(6, size=300)] + rng.randn(300, 3)).astype(np.float32) for _ in range(2)]
    start = cg.init_gmm(jax.random.key(0), np.concatenate(clouds), 6)
    fit = fit_pair(*clouds, cg.GaussianMixturePair(start, start), transport_weight=0.01, em_steps=3)
    expected = cg.bures_cost_matrix(*(fit.pair.gmm0, fit.pair.gmm1))
    np.testing.assert_allclose(fit.plan.cost, expected, rtol=1e-4, atol=1e-3)
