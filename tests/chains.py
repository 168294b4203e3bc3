"""Fits of graphs without fitting: mixtures as they are, with the plans between them. Nothing but plans is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
from problems import random_mixture

import coupled_gmm as cg
from coupled_gmm.core.tree import unchecked


def fit_of(graph: cg.MixtureGraph) -> cg.GraphFit:
    """What `fit_graph` would return of a graph whose nodes are all frozen; without a history."""

    ends = zip(np.asarray(graph.sources).tolist(), np.asarray(graph.targets).tolist())
    nodes, rhos = jax.tree.map(np.asarray, (graph.nodes, graph.rho))
    plans = [
        cg.solve_plan(cg.GaussianMixturePair(at(nodes, i), at(nodes, j), epsilon, rho=rho))
        for (i, j), epsilon, rho in zip(ends, np.asarray(graph.epsilon), rhos)
    ]
    plans = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *plans)
    return unchecked(
        cg.GraphFit,
        gmms=graph.split(graph.nodes),
        plans=plans,
        penalized_log_likelihood=jnp.zeros(()),
        status=jnp.asarray(1),
        n_steps=jnp.asarray(1),
        history=None,
        edges=jnp.stack([graph.sources, graph.targets], axis=1),
        times=graph.times,
        names=graph.names,
    )


def at(nodes, i):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[i]), nodes)


def mixtures(sizes=(2, 3, 2, 3), d=2, singular=False, shift=0.0) -> list[cg.GaussianMixture]:
    gmms = [random_mixture(seed, k, d, shift=shift, condition=10) for seed, k in enumerate(sizes)]
    if not singular:
        return gmms
    flat = []
    for seed, gmm in enumerate(gmms):
        factor = np.random.RandomState(seed).randn(gmm.n_components, d, max(d - 1, 1)) * (d > 1)
        parts = (np.asarray(gmm.means), factor @ factor.transpose(0, 2, 1), np.asarray(gmm.weights))
        flat.append(cg.GaussianMixture.from_moments(*parts))
    return flat


TIMES = (0.0, 1.0, 3.0, 4.0)


def chain_fit(gmms=None, *, epsilon=2.0, times=TIMES, **options) -> cg.GraphFit:
    return fit_of(cg.chain(mixtures() if gmms is None else gmms, epsilon=epsilon, times=times, **options))
