r"""One Gaussian for all mixtures that edges join: what ever larger weights lead to, and no ascent finds.

With all components equal, transport costs nothing, entropy included. Mixtures whose components are apart pay about
:math:`\lambda \epsilon` times the entropy of their masses, and where that is more than several components are worth, one Gaussian
is better than they are. It is no neighbour of theirs: masses that transport empties keep their points, for which no other
component has a density.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coupled_gmm.core import matrices
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.statistics import Parameters, Statistics
from coupled_gmm.gaussians.density import LOG_2PI


def merged(
    statistics: Statistics,
    floors: Float[Array, "V d"],
    graph: MixtureGraph,
    likelihoods: Float[Array, " V"],
    transport: Float[Array, " E"],
) -> tuple[Parameters, Float[Array, " V"]]:
    """Every node's mixture as the likeliest Gaussian of its part of the graph; and by how much J of that part is then larger.

    Parts in which a node is frozen, or has no neighbour, or no cloud, would gain nothing: minus infinity. So would those with links
    that are forbidden: what may not mix pays for entropy, equal or not.
    """
    parts, n = _parts(graph), graph.n_nodes
    d = floors.shape[-1]
    sum_up = lambda x: jax.ops.segment_sum(x, parts, n)[parts]  # noqa: E731
    masses = statistics.masses
    weights = graph.node_weights * jnp.sum(masses, axis=-1)
    total = sum_up(weights)
    mean = sum_up(jnp.einsum("v,vk,vkd->vd", graph.node_weights, masses, statistics.means))
    mean = mean / jnp.where(total > 0, total, 1)[:, None]
    apart = statistics.means - mean[:, None]
    second = statistics.scatters + apart[..., :, None] * apart[..., None, :]
    second = jnp.einsum("v,vk,vkij->vij", graph.node_weights, masses, second)
    second = second + weights[:, None, None] * floors[:, :, None] * jnp.eye(d, dtype=floors.dtype)
    factor = matrices.cholesky(sum_up(second) / jnp.where(total > 0, total, 1)[:, None, None])
    value = -0.5 * total * (d * (LOG_2PI + 1) + 2 * matrices.log_diagonal_sum(factor))
    paid = jnp.zeros_like(weights).at[graph.sources].add(graph.edge_weights * transport)
    gain = value - sum_up(weights * likelihoods - paid)
    eligible = (total > 0) & (sum_up(jnp.ones(n)) > 1) & (sum_up(graph.frozen.astype(floors.dtype)) == 0)
    if graph.links is not None:
        bound = jnp.any(~graph.links, axis=(1, 2)).astype(floors.dtype)
        eligible &= sum_up(jnp.zeros(n).at[graph.sources].add(bound)) == 0
    k = masses.shape[1]
    parameters = statistics.base._replace(
        means=jnp.repeat(mean[:, None], k, axis=1), factors=jnp.repeat(factor[:, None], k, axis=1)
    )
    return parameters, jnp.where(eligible & jnp.isfinite(gain), gain, -jnp.inf)


def _parts(graph: MixtureGraph) -> Int[Array, " V"]:
    """For each node the first of those that edges of positive weight lead to."""

    def meet(_: Array, first: Array) -> Array:
        ends = first[graph.sources], first[graph.targets]
        least = jnp.minimum(*ends)
        one, other = (jnp.where(graph.edge_weights > 0, least, end) for end in ends)
        return first.at[graph.sources].min(one).at[graph.targets].min(other)

    return jax.lax.fori_loop(0, graph.n_nodes, meet, jnp.arange(graph.n_nodes))
