"""What the plans of a graph's edges say of nodes that no edge joins: of a time course, from any time to any other."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.fits import routes
from coupled_gmm.fits.growth import Growth
from coupled_gmm.fits.nodes import NodeNames
from coupled_gmm.transport.composition import composed, product
from coupled_gmm.transport.plan import Plan

Edge = tuple[int, int]


class Course(NamedTuple):
    """The nodes and edges of a fit, with the plan of each edge in either direction."""

    called: NodeNames
    sizes: tuple[int, ...]
    dtype: Any
    edges: list[Edge]
    times: Float[Array, " V"] | None
    plan: Callable[[Edge], Plan]

    @property
    def places(self) -> list[float]:
        """By what nodes are earlier or later: their times, or their indices where these are not known."""
        if self.times is None or not checks.known(self.times):
            return list(range(self.called.n_nodes))
        return np.asarray(self.times).tolist()

    def compose(self, i: Any, j: Any) -> Plan:
        """The plans along the shortest path, composed from the earlier node to the later."""
        start, end = self.called.index("i", i), self.called.index("j", j)
        if start == end:
            raise ArgumentError("j", f"{self.called.said(end)} is i as well", "a plan is between two nodes")
        first, last = sorted((start, end), key=lambda node: (self.places[node], node))
        found, several = routes.shortest(routes.both_ways(self.edges), first)
        between = f"{self.called.said(start)} and {self.called.said(end)}"
        if last not in found:
            raise ArgumentError("j", f"no path of edges joins {between}", "compose between nodes that one joins")
        if last in several:
            problem = f"several shortest paths join {between}"
            raise ArgumentError("j", problem, "compose along the parts of one, between nodes that one path joins")
        plan = composed([self.plan(step) for step in pairwise(found[last])])
        return plan if start == first else plan.reverse()

    def growth(self) -> list[Growth]:
        """Of each edge, from its earlier node to its later; as written, where neither is."""
        return [self._growth(*edge) for edge in self.edges]

    def _growth(self, i: int, j: int) -> Growth:
        i, j = (j, i) if self.places[j] < self.places[i] else (i, j)
        elapsed = None
        if self.times is not None and not (checks.known(self.times) and self.places[i] == self.places[j]):
            elapsed = self.times[j] - self.times[i]
        return Growth.of(self.plan((i, j)), i, j, elapsed)

    def ancestors(self, node: Any, component: Any) -> list[Any]:
        """Where what is in a component comes from, at each earlier node; None where no path leads there."""
        start, share = self._of(node, component)
        earlier = [i for i in self.in_order if self.places[i] < self.places[start]]
        found = {start: share}
        for here, there in self._steps(start, earlier, routes.backward(self.edges, self.places)):
            _, origins = self.plan((there, here)).conditionals()
            found[there] = product(origins, found[here])
        return [found.get(i) for i in earlier]

    def descendants(self, node: Any, component: Any) -> list[Any]:
        """Where what is in a component goes, at each later node; None where no path leads there."""
        start, share = self._of(node, component)
        later = [i for i in self.in_order if self.places[i] > self.places[start]]
        found, carried = {}, {start: share}
        for here, there in self._steps(start, later, routes.forward(self.edges, self.places)):
            plan = self.plan((here, there))
            forward, origins = plan.conditionals()
            # The row of `compose` over its sum; of one step as the plan has it, however little goes there.
            found[there] = product(share, forward) if here == start else _shares(product(carried[here], plan.matrix))
            carried[there] = product(carried[here], origins)
        return [found.get(i) for i in later]

    @property
    def in_order(self) -> list[int]:
        return sorted(range(self.called.n_nodes), key=lambda i: self.places[i])

    def _of(self, node: Any, component: Any) -> tuple[int, Float[Array, " K"]]:
        """A node's index, and all of it in one component."""
        start = self.called.index("node", node)
        component, size = checks.integer("component", component, 0), self.sizes[start]
        if component >= size:
            problem = f"{self.called.said(start)} has {size} components, and no number {component}"
            raise ArgumentError("component", problem, f"use 0 to {size - 1}")
        return start, jnp.eye(size, dtype=self.dtype)[component]

    def _steps(self, start: int, nodes: list[int], steps: routes.Edges) -> list[Edge]:
        """The steps of the shortest paths from one node to others, each after those that lead to it."""
        found, several = routes.shortest(steps, start)
        fork = next((i for i in nodes if i in several), None)
        if fork is not None:
            problem = f"several shortest paths join {self.called.said(start)} and {self.called.said(fork)}"
            raise ArgumentError("node", problem, "read the plans along one of them, by compose(i, j)")
        return [(path[-2], path[-1]) for path in found.values() if len(path) > 1]


def _shares(flow: Float[Array, " K"]) -> Float[Array, " K"]:
    total = jnp.sum(flow)
    return flow / jnp.where(total > 0, total, 1)
