"""What the nodes of a graph are called: indices from 0, and names where they have some."""

from typing import Any, NamedTuple

import numpy as np

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError


class NodeNames(NamedTuple):
    """The nodes of one graph, by whose names or indices a user asks for them."""

    n_nodes: int
    names: tuple[str, ...] | None = None

    @classmethod
    def checked(cls, n_nodes: int, names: Any) -> "NodeNames":
        """Names as a user gave them, one for each node, or None.

        Raises:
          TypeError, ValueError: not a list of strings, of another length, or one of them twice.
        """
        if names is None:
            return cls(n_nodes)
        names = checks.sequence("names", names)
        for i, name in enumerate(names):
            if not isinstance(name, str):
                raise ArgumentTypeError(f"names[{i}]", f"expected a string, got {checks.brief(name)}")
        if len(names) != n_nodes:
            raise ArgumentError("names", f"expected one for each of the {n_nodes} nodes, got {len(names)}")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ArgumentError("names", f"{twice!r} is the name of two nodes", "each needs one of its own")
        return cls(n_nodes, tuple(map(str, names)))

    def index(self, argument: str, node: Any) -> int:
        """The index of a node that is asked for by `argument`.

        Raises:
          ValueError: there is no such node.
        """
        if isinstance(node, str):
            if self.names is None:
                remedy = f"use indices from 0 to {self.n_nodes - 1}, or build the graph with names"
                raise ArgumentError(argument, f"no node is called {checks.brief(node)}: they have no names", remedy)
            if node not in self.names:
                listed = ", ".join(map(repr, self.names))
                raise ArgumentError(argument, f"no node is called {checks.brief(node)}", f"the nodes are {listed}")
            return self.names.index(node)
        if not self._is_index(node):
            raise ArgumentError(argument, f"there is no node {checks.brief(node)}", f"{self.choices}")
        return int(node)

    def has(self, node: Any) -> bool:
        """Whether a node is asked for by a string, which `index` looks up, or by an index that there is."""
        return isinstance(node, str) or self._is_index(node)

    def said(self, node: int) -> str:
        """A node as messages call it."""
        return f"node {node}" if self.names is None else f"node {self.names[node]!r}"

    @property
    def choices(self) -> str:
        names = "" if self.names is None else f", or names: {', '.join(map(repr, self.names))}"
        return f"use indices from 0 to {self.n_nodes - 1}{names}"

    def _is_index(self, node: Any) -> bool:
        whole = isinstance(node, (int, np.integer)) and not isinstance(node, bool)
        return whole and bool(0 <= node < self.n_nodes)
