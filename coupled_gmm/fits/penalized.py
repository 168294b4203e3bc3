r"""J itself, the penalised log-likelihood that coupled fits raise, as a function that can be differentiated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks, matrices, meshes
from coupled_gmm.core.programs import program
from coupled_gmm.fits import statistics
from coupled_gmm.fits.em import in_frame, volume
from coupled_gmm.fits.frame import Sight
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.objective import no_terms, transport_terms
from coupled_gmm.fits.pairs import numbers, two_clouds
from coupled_gmm.fits.request import view_of
from coupled_gmm.fits.weights import Weight
from coupled_gmm.transport import solvers
from coupled_gmm.transport.pair import GaussianMixturePair, stated


def penalized_log_likelihood(
    pair: GaussianMixturePair,
    x0: Any,
    x1: Any,
    *,
    transport_weight: Any = None,
    relative_weight: Any = None,
    point_weights0: Any = None,
    point_weights1: Any = None,
    ridge: Any = 1e-6,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    r"""The objective of `fit_pair` at a pair, differentiable once in both mixtures.

    .. math:: J = \overline{\log p_0} + \overline{\log p_1} - \lambda T(p_0, p_1)

    Arguments and errors as in `fit_pair`.
    """
    checks.instance("pair", pair, GaussianMixturePair)
    weight = Weight.given(transport_weight, relative_weight)
    ridge = checks.scalar("ridge", ridge, at_least=0, batched=True)
    if chunk_size is not None:
        checks.integer("chunk_size", chunk_size, 1)
    pair.gmm0.check_densities("pair.gmm0")
    pair.gmm1.check_densities("pair.gmm1")
    clouds = two_clouds(x0, x1, point_weights0, point_weights1)
    otherwise = "the first row of a fit's history is J where it starts: fit_pair(..., em_steps=1)"
    view = view_of(clouds, [pair.gmm0, pair.gmm1], ridge, in_memory=otherwise)
    sight = view.in_chunks(numbers(pair), chunk_size)
    asked = stated(pair, balanced=False), weight.of(view)
    if sight.chunks.mesh is None:
        return _value_of_pair(*asked, sight, ridge)
    asked, ridge = meshes.whole((asked, ridge))
    found = _value_of_pair(*asked, sight, ridge)
    return jax.device_put(meshes.whole(found))


@program()
def _value_of_pair(pair: GaussianMixturePair, transport_weight: Array, sight: Sight, ridge: Array) -> Float[Array, ""]:
    problem = MixtureGraph.from_pair(pair, transport_weight, np.zeros(2, bool))
    return value(problem, sight, ridge)


@matrices.precise
def value(problem: MixtureGraph, sight: Sight, ridge: Array) -> Float[Array, ""]:
    """J at the graph's own nodes, differentiable once in them."""
    sight = jax.lax.stop_gradient(sight)
    floors, unit = jax.lax.stop_gradient(sight.floors(ridge)), sight.frame.unit
    graph = in_frame(problem, unit)
    parameters = sight.frame.parameters(problem.nodes, jnp.zeros_like(floors))
    penalized = statistics.likelihood(parameters, sight.chunks, floors)
    start = no_terms(graph).potentials
    transport, _, _ = transport_terms(parameters, graph, start, solvers.ENTROPIC)
    return problem.node_weights @ (penalized - volume(sight)) - graph.edge_weights @ transport
