"""Paths through a graph's edges: along which plans are composed."""

from collections.abc import Sequence

Edges = Sequence[tuple[int, int]]


def shortest(edges: Edges, start: int) -> tuple[dict[int, list[int]], set[int]]:
    """Of each node that a path from `start` reaches, the shortest in edges; and nodes that several such paths lead to.

    Edges are followed from their first node to their second only: give both directions where both are meant.
    """
    routes, several, front = {start: [start]}, set(), [start]
    while front:
        found: dict[int, list[int]] = {}
        for here in front:
            for there in (j for i, j in edges if i == here and j not in routes):
                if there in found or here in several:
                    several.add(there)
                found.setdefault(there, [*routes[here], there])
        routes |= found
        front = list(found)
    return routes, several


def both_ways(edges: Edges) -> Edges:
    return [*edges, *((j, i) for i, j in edges)]


def forward(edges: Edges, places: Sequence[float]) -> Edges:
    """Each edge from the node whose place (a time, an index) is earlier; without those between equal ones."""
    written = [(i, j) if places[i] < places[j] else (j, i) for i, j in edges]
    return [(i, j) for i, j in written if places[i] != places[j]]


def backward(edges: Edges, places: Sequence[float]) -> Edges:
    return [(j, i) for i, j in forward(edges, places)]
