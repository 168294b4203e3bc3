"""A graph of mixtures: nodes are mixtures, some with a cloud to explain; edges keep two of them close."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import counted, listed, pytree, saved, static, take
from coupled_gmm.fits.nodes import NodeNames
from coupled_gmm.gaussians.mixture import GaussianMixture, alike, in_one_space, stack
from coupled_gmm.transport.links import padded, per_edge
from coupled_gmm.transport.pair import GaussianMixturePair, given_epsilon, given_rho, mean_cost
from coupled_gmm.transport.problem import BALANCED, Prices


@saved
@pytree
class MixtureGraph:
    r"""Mixtures and the price of their differences.

    .. math:: J = \sum_i v_i \, \overline{\log p_i} - \sum_{(i, j)} \lambda_{ij} T(p_i, p_j)

    Mixtures of unequal size are stacked with components of weight zero. Everything that a user sweeps is a leaf; sizes and
    whether transport is balanced are structure. Which of its two nodes an edge names first says how its plan is read, and
    changes nothing else.
    """

    nodes: GaussianMixture  # stacked on a leading axis V
    sources: Int[Array, " E"]
    targets: Int[Array, " E"]
    edge_weights: Float[Array, " E"]
    epsilon: Float[Array, " E"]
    rho: Float[Array, "E *sides"]  # (E,), or (E, 2): of changes at the source and at the target
    node_weights: Float[Array, " V"]
    frozen: Bool[Array, " V"]
    sizes: tuple[int, ...] = static()
    balanced: bool = static()
    links: Bool[Array, "E K K"] | None = None  # where mass may go, of padded mixtures; None is everywhere
    times: Float[Array, " V"] | None = None
    names: tuple[str, ...] | None = static(default=None)

    @classmethod
    def from_mixtures(
        cls,
        gmms: Sequence[GaussianMixture],
        edges: Sequence[tuple[Any, Any]],
        *,
        edge_weights: Any = 1.0,
        epsilon: Any = None,
        tau: Any = BALANCED,
        rho: Any = None,
        relative_epsilon: Any = None,
        relative_rho: Any = None,
        node_weights: Any = None,
        frozen: Sequence[Any] = (),
        links: Sequence[Any] | None = None,
        times: Any = None,
        names: Sequence[str] | None = None,
    ) -> "MixtureGraph":
        r"""A graph from mixtures and pairs of their indices; `chain`, `star` and `grid` build the common ones.

        Args:
          gmms: V mixtures over the same features.
          edges: E pairs (i, j) of distinct nodes, each pair of nodes at most once; a fit's plan of it goes from i to j.
          edge_weights: lambda, at least 0, one or (E,).
          epsilon: above 0, one or (E,), squared data units; None takes 1e-2 of each edge's mean starting cost.
          tau: in (0, 1], 1 is balanced: :math:`\rho = \epsilon \tau / (1 - \tau)`. So with epsilon None every edge gets
            a rho of its own; give `rho` where a change of mass shall cost the same on all. One number; one per edge, (E,);
            or two per edge, (E, 2): of changes at i and at j, where (1, 2) is a pair for all edges. (2,) is one per edge.
          rho: in place of tau: above 0, squared data units, infinite is balanced; shapes as of tau.
          relative_epsilon, relative_rho: in place of epsilon, and of rho and tau: as parts of each edge's mean starting cost.
          node_weights: v, at least 0, (V,); None is 1 each.
          frozen: nodes that a fit leaves as they are.
          links: for each edge (i, j) a mask, True where components of i may send mass to those of j, or None, as in
            `GaussianMixturePair`; None is everywhere, on all edges.
          times: when each node was seen, (V,); None where that is not known. A fit passes them on, and does not use them.
          names: V distinct strings, by which nodes can be asked for wherever an index is, here and of a fit.

        Raises:
          TypeError, ValueError: an argument of the wrong kind, shape or range; tau and rho both given.
        """
        gmms = in_one_space("gmms", gmms, "a graph needs at least one mixture")
        n_nodes = len(gmms)
        called = NodeNames.checked(n_nodes, names)
        edges = _check_edges(edges, called)
        frozen = [called.index("frozen", node) for node in checks.sequence("frozen", frozen)]
        ends = [(gmms[min(edge)], gmms[max(edge)]) for edge in edges]  # in one order, for roundings of epsilon

        def costs() -> Array:
            return jnp.stack([mean_cost(*end) for end in ends]) if ends else jnp.ones(0)

        def one_each(name: str, value: Any, **bounds: Any) -> Array:
            return _per_edge(name, checks.scalar(name, value, batched=True, **bounds), len(edges))

        def one_or_two_each(name: str, value: Any, **bounds: Any) -> Array:
            return _per_edge(name, checks.scalar(name, value, batched=True, **bounds), len(edges), two=True)

        epsilon = given_epsilon(epsilon, relative_epsilon, one_each, costs)
        prices = Prices.given(tau, given_rho(tau, rho, relative_rho, one_or_two_each, costs), one_or_two_each)
        edge_weights = checks.scalar("edge_weights", edge_weights, at_least=0, batched=True)
        v = jnp.ones(n_nodes) if node_weights is None else checks.weights("node_weights", node_weights, n_nodes)
        if times is not None:
            with jax.ensure_compile_time_eval():
                times = checks.array("times", times, n_nodes)
                checks.finite("times", times)
        nodes = stack(gmms)
        with jax.ensure_compile_time_eval():  # what it joins can be read, inside somebody's program too
            sources, targets = (jax.device_put(np.array([edge[end] for edge in edges], np.int32)) for end in (0, 1))
            still = jax.device_put(np.array([node in frozen for node in range(n_nodes)]))
        return cls(
            nodes=nodes,
            sources=sources,
            targets=targets,
            edge_weights=_per_edge("edge_weights", edge_weights, len(edges)).astype(nodes.dtype),
            epsilon=epsilon.astype(nodes.dtype),
            rho=prices.rho(epsilon).astype(nodes.dtype),
            node_weights=v.astype(nodes.dtype),
            frozen=still,
            sizes=tuple(gmm.n_components for gmm in gmms),
            balanced=prices.balanced,
            links=per_edge(links, [(gmms[i].weights, gmms[j].weights) for i, j in edges], nodes.weights.shape[-1]),
            times=None if times is None else times.astype(nodes.dtype),
            names=called.names,
        )

    @classmethod
    def from_pair(cls, pair: GaussianMixturePair, transport_weight: Array, frozen: Any) -> "MixtureGraph":
        """The graph of two nodes and one edge."""
        dtype, nodes = pair.epsilon.dtype, stack([pair.gmm0, pair.gmm1])
        return cls(
            nodes=nodes,
            sources=jnp.zeros(1, jnp.int32),
            targets=jnp.ones(1, jnp.int32),
            edge_weights=jnp.reshape(transport_weight, 1).astype(dtype),
            epsilon=jnp.reshape(pair.epsilon, 1),
            rho=pair.rho[None],
            node_weights=jnp.ones(2, dtype),
            frozen=jnp.asarray(frozen),
            sizes=(pair.gmm0.n_components, pair.gmm1.n_components),
            balanced=pair.balanced,
            links=None if pair.links is None else padded(pair.links, nodes.weights.shape[-1])[None],
        )

    @classmethod
    def single(cls, gmm: GaussianMixture) -> "MixtureGraph":
        """The graph of one node and no edge."""
        return cls.unjoined(stack([gmm]), jnp.zeros(1, bool))

    @classmethod
    def unjoined(cls, nodes: GaussianMixture, frozen: Any) -> "MixtureGraph":
        """The graph of stacked nodes and no edge."""
        none, no_node = jnp.zeros(0, nodes.dtype), jnp.zeros(0, jnp.int32)
        n_nodes, n_components = nodes.weights.shape
        return cls(
            nodes=nodes,
            sources=no_node,
            targets=no_node,
            edge_weights=none,
            epsilon=none,
            rho=none,
            node_weights=jnp.ones(n_nodes, nodes.dtype),
            frozen=jnp.asarray(frozen),
            sizes=(n_components,) * n_nodes,
            balanced=True,
        )

    def _words(self) -> list[str]:
        sizes = f"{self.n_nodes} nodes of {listed(self.sizes)} components, {self.nodes.n_features} features"
        return [sizes, *counted(self.sources.shape[-1], "edge"), "balanced" if self.balanced else "unbalanced"]

    @property
    def n_nodes(self) -> int:
        return len(self.sizes)

    @property
    def n_edges(self) -> int:
        return self.sources.shape[0]

    @property
    def turned(self) -> Bool[Array, " E"]:
        """Edges that are written from the later of their nodes to the earlier."""
        return self.sources > self.targets

    def in_node_order(self) -> tuple["MixtureGraph", Int[Array, " E"]]:
        """The same graph with its edges in the order of their nodes, each from the earlier to the later; and that order."""
        sources, targets = jnp.minimum(self.sources, self.targets), jnp.maximum(self.sources, self.targets)
        order = jnp.argsort(sources * self.n_nodes + targets) if self.n_edges > 1 else jnp.arange(self.n_edges)
        rho = self.rho if self.rho.ndim == 1 else jnp.where(self.turned[:, None], self.rho[:, ::-1], self.rho)
        edges = {"sources": sources, "targets": targets, "rho": rho}
        edges |= {"edge_weights": self.edge_weights, "epsilon": self.epsilon}
        if self.links is not None:
            edges["links"] = jnp.where(self.turned[:, None, None], jnp.swapaxes(self.links, 1, 2), self.links)
        return dataclasses.replace(self, **take(edges, order)), order

    def fitted(self, fitted: GaussianMixture) -> GaussianMixture:
        """The nodes after a fit; frozen nodes and absent components come back untouched."""
        nodes, fitted = alike([self.nodes, fitted])
        kept = self.frozen[:, None] | (self.nodes.weights == 0)

        def keep(old: Array, new: Array) -> Array:
            return jnp.where(jnp.expand_dims(kept, range(2, old.ndim)), old, new)

        return jax.tree.map(keep, nodes, fitted)

    def split(self, nodes: GaussianMixture) -> list[GaussianMixture]:
        """Stacked nodes as mixtures of their own sizes."""
        return [unpadded(take(nodes, i), size) for i, size in enumerate(self.sizes)]


def _check_edges(edges: Any, called: NodeNames) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for edge in checks.sequence("edges", edges):
        pair = tuple(edge) if isinstance(edge, (tuple, list, np.ndarray)) else ()
        if len(pair) != 2 or not all(map(called.has, pair)) or pair[0] == pair[1]:
            problem = f"{checks.brief(edge)} does not join two of the {called.n_nodes} nodes"
            raise ArgumentError("edges", problem, "use indices from 0, two per edge")
        i, j = (called.index("edges", node) for node in pair)
        if i == j:
            raise ArgumentError("edges", f"{edge!r} joins a node to itself", "leave it out")
        if (i, j) in pairs or (j, i) in pairs:
            raise ArgumentError(
                "edges",
                f"{edge!r} joins two nodes that are joined already",
                "keep one edge, with the sum of the weights",
            )
        pairs.append((i, j))
    return pairs


def _per_edge(name: str, value: Array, size: int, two: bool = False) -> Array:
    """One number for each edge, or two where two are allowed."""
    pairs = ((1, 2), (size, 2)) if two else ()
    if value.shape not in ((), (size,), *pairs):
        choices = f"one number or one for each of the {size} edges" + (
            f", or two: (1, 2) or ({size}, 2)" if two else ""
        )
        raise ArgumentError(name, f"expected {choices}, got shape {value.shape}")
    return jnp.broadcast_to(value, (size, 2) if value.ndim == 2 else (size,))


def unpadded(gmm: GaussianMixture, size: int) -> GaussianMixture:
    return jax.tree.map(lambda leaf: leaf[:size], gmm)
