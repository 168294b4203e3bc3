"""The common graphs: chains in time, stars, grids of donors and times."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypedDict, Unpack

import jax.numpy as jnp
import numpy as np

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.gaussians.mixture import GaussianMixture, in_one_space


class GraphOptions(TypedDict, total=False):
    """What all take by keyword, as `MixtureGraph.from_mixtures` does; edges are in the order that each function names."""

    edge_weights: Any
    epsilon: Any
    tau: Any
    rho: Any
    node_weights: Any
    frozen: Sequence[Any]
    times: Any
    names: Sequence[str] | None


def chain(gmms: Sequence[GaussianMixture], **options: Unpack[GraphOptions]) -> MixtureGraph:
    r"""A time course: each mixture is joined to the next.

    Args:
      gmms: V mixtures over the same features, in the order of their times.
      options: edge_weights, epsilon, tau, rho, node_weights, frozen, times, names: by keyword, as in
        `MixtureGraph.from_mixtures`. times are strictly increasing, and 0, 1, ..., V - 1 if left out.

    Returns:
      The graph, with edges (0, 1), (1, 2), ...

    Raises:
      TypeError, ValueError: as `MixtureGraph.from_mixtures`; times that do not increase.
    """
    gmms = in_one_space("gmms", gmms, "a chain needs at least one mixture")
    if options.get("times") is None:
        options["times"] = np.arange(len(gmms))
    graph = MixtureGraph.from_mixtures(gmms, list(pairwise(range(len(gmms)))), **options)
    check_increasing(graph.times)
    return graph


def star(centre: GaussianMixture, gmms: Sequence[GaussianMixture], **options: Unpack[GraphOptions]) -> MixtureGraph:
    r"""One mixture joined to each of the others: of frozen ones, a barycenter.

    Args:
      centre: node 0.
      gmms: nodes 1 to V - 1, mixtures over the same features.
      options: edge_weights, epsilon, tau, rho, node_weights, frozen, times, names: by keyword, as in
        `MixtureGraph.from_mixtures`; those of nodes begin with the centre's.

    Returns:
      The graph, with edges (0, 1), (0, 2), ...

    Raises:
      TypeError, ValueError: as `MixtureGraph.from_mixtures`.
    """
    checks.instance("centre", centre, GaussianMixture)
    gmms = in_one_space("gmms", gmms, "a star needs at least one mixture around its centre")
    return MixtureGraph.from_mixtures([centre, *gmms], [(0, i + 1) for i in range(len(gmms))], **options)


def grid(rows: Sequence[Sequence[GaussianMixture]], **options: Unpack[GraphOptions]) -> MixtureGraph:
    r"""Mixtures in rows and columns, such as donors and times: each is joined to its neighbours in both.

    Args:
      rows: R lists of C mixtures; the one in row r and column c is node r C + c.
      options: edge_weights, epsilon, tau, rho, node_weights, frozen, times, names: by keyword, as in
        `MixtureGraph.from_mixtures`, nodes row by row. times may also be one for each column, (C,).

    Returns:
      The graph, with the edges along rows, row by row, before those along columns.

    Raises:
      TypeError, ValueError: as `MixtureGraph.from_mixtures`; rows of unequal length.
    """
    rows = [checks.sequence(f"rows[{r}]", row) for r, row in enumerate(checks.sequence("rows", rows))]
    lengths = [len(row) for row in rows]
    if not rows or not lengths[0]:
        raise ArgumentError("rows", "there is no mixture in them", "a grid needs at least one")
    odd = next((r for r, length in enumerate(lengths) if length != lengths[0]), None)
    if odd is not None:
        problem = f"are of unequal length: rows[0] has {lengths[0]} mixtures, and rows[{odd}] has {lengths[odd]}"
        raise ArgumentError("rows", problem, "name the edges yourself, by MixtureGraph.from_mixtures")
    index = np.arange(sum(lengths)).reshape(len(rows), lengths[0])
    edges = [pair for lines in (index, index.T) for line in lines.tolist() for pair in pairwise(line)]
    times = options.get("times")
    if times is not None and np.shape(times) == (lengths[0],):
        options["times"] = jnp.tile(checks.array("times", times, lengths[0]), len(rows))
    return MixtureGraph.from_mixtures([gmm for row in rows for gmm in row], edges, **options)


def check_increasing(times: Any) -> None:
    """Refuse times of a chain, where they are known, that do not increase in the precision that they are held in."""
    if checks.known(times):
        at = np.asarray(times)
        later = at[1:] > at[:-1]
        if not later.all():
            i = int(np.argmin(later))
            problem = f"must increase along a chain, and {times[i]:g} comes before {times[i + 1]:g}"
            raise ArgumentError("times", problem, "put the mixtures in the order of their times, from a near origin")
