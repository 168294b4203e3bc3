"""The hooks of EM, called one by one on the host: the same fit as the compiled loop; and sums that add up over parts of a cloud."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_mixture

import coupled_gmm as cg
from coupled_gmm.fits import em, frame
from coupled_gmm.fits.em import Controls, FitOptions
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.transport import solvers

STEPS, TOL, RIDGE, WEIGHT = 4, 1e-9, 1e-6, 0.1


@pytest.fixture(scope="module")
def problem():
    """Two clouds, a pair to start from, and the task of their fit."""
    with jax.enable_x64(True):
        gmm0, gmm1 = random_mixture(0, 2, 2), random_mixture(1, 3, 2)
        clouds = [np.asarray(gmm.sample(jax.random.key(i), 60)) for i, gmm in enumerate((gmm0, gmm1))]
        pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1)
        view = frame.seen(["x0", "x1"], clouds, [None, None], [gmm0, gmm1], RIDGE)
        controls = Controls(jnp.asarray(RIDGE), jnp.asarray(TOL), jnp.asarray(STEPS), jnp.asarray(5), None)
        graph = MixtureGraph.from_pair(pair, jnp.asarray(WEIGHT), np.zeros(2, bool))
        options = FitOptions(STEPS, solvers.ENTROPIC, None, False)
        yield clouds, pair, em.prepare(graph, view.in_chunks(6), controls, options)


def test_a_loop_on_the_host_is_the_compiled_fit(problem, x64):
    clouds, pair, task = problem
    e_step = jax.jit(lambda state: em.e_step(task, state))
    m_step = jax.jit(lambda state, sums: em.m_step(task, state, sums))
    state, values = em.start(task), []
    while state.running:
        state, row = m_step(state, e_step(state))
        values.append(row.penalized_log_likelihood)
    end = em.finish(task, state, em.no_rows(task, state))

    fit = cg.fit_pair(*clouds, pair, transport_weight=WEIGHT, em_steps=STEPS, m_steps=5, tol=TOL, ridge=RIDGE)
    assert end.status == fit.status and end.n_steps == fit.n_steps == STEPS
    np.testing.assert_allclose(
        values, [*fit.history.penalized_log_likelihood, fit.penalized_log_likelihood], rtol=1e-12
    )
    np.testing.assert_allclose(end.nodes.means[1], fit.pair.gmm1.means, rtol=1e-9)


def test_sums_of_parts_are_the_sums_of_the_whole(problem, x64):
    """Points of weight zero stand for those that lie elsewhere."""
    _, _, task = problem
    state, chunks = em.start(task), task.sight.chunks
    first = jnp.arange(chunks.points.shape[-1]) % 3 == 0
    parts = []
    for here in (first, ~first):
        weights = jnp.where(here, chunks.weights, 0)
        sight = dataclasses.replace(task.sight, chunks=dataclasses.replace(chunks, weights=weights))
        parts.append(em.e_step(task._replace(sight=sight), state))
    whole = em.e_step(task, state)
    for one, other, both in zip(*map(jax.tree.leaves, (*parts, whole))):
        np.testing.assert_allclose(one + other, both, rtol=1e-12, atol=1e-12)
