"""A fitted chain, in the order of its times: what paths through it are made of."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import pytree
from coupled_gmm.fits.nodes import NodeNames
from coupled_gmm.fits.results import GraphFit, PairFit
from coupled_gmm.gaussians import mixture
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.plan import Plan


@pytree
class Chain:
    """Nodes in the order of their times, and what the plans between neighbours say."""

    nodes: GaussianMixture  # stacked on a leading axis V, padded with components of weight zero
    times: Float[Array, " V"]
    forward: Float[Array, "E K K"]  # where the mass of a component goes, of each in a row
    backward: Float[Array, "E K K"]  # where it comes from, of each in a column


def ordered(fit: Any) -> tuple[list[int], Float[Array, " V"]]:
    """The nodes of a fit in the order of their times, and these.

    Raises:
      TypeError, ValueError: not a fit of several mixtures, or a batch of them; its graph is no chain.
    """
    if not isinstance(fit, (GraphFit, PairFit)):
        raise ArgumentTypeError("fit", f"expected a GraphFit or a PairFit, got {type(fit).__name__}")
    checks.instance("fit", fit, type(fit))
    if isinstance(fit, PairFit):
        return [0, 1], jnp.arange(2, dtype=fit.pair.gmm0.dtype)
    course = fit.course()
    if len(fit.gmms) < 2:
        raise ArgumentError("fit", "has one node, and no path", "fit a chain of at least two")
    order = course.in_order
    for i, j in pairwise(order):
        if course.places[i] == course.places[j] or not {(i, j), (j, i)} & set(course.edges):
            one, other = course.called.said(i), course.called.said(j)
            problem = f"is no chain in time: {one} and {other} follow one another, and no edge joins them"
            if course.places[i] == course.places[j]:
                problem = f"is no chain in time: {one} and {other} have one time"
            raise ArgumentError(
                "fit", problem, "fit a chain (coupled_gmm.chain), or name the plans' path by compose(i, j)"
            )
    dtype = fit.gmms[0].dtype
    times = jnp.arange(len(order), dtype=dtype) if fit.times is None else fit.times[np.asarray(order)]
    return order, times


def n_features(fit: Any) -> int:
    return fit.pair.n_features if isinstance(fit, PairFit) else fit.gmms[0].n_features


def place(fit: Any, order: list[int], node: Any) -> int:
    """Where a node is in that order; None is the first.

    Raises:
      ValueError: there is no such node.
    """
    called = NodeNames(2) if isinstance(fit, PairFit) else fit.course().called
    return 0 if node is None else order.index(called.index("node", node))


def plans(fit: Any, order: list[int]) -> list[Plan]:
    """Those along the chain, each forward in time."""
    return [fit.plan] if isinstance(fit, PairFit) else [fit.plan(edge) for edge in pairwise(order)]


def of_fit(fit: Any, order: list[int], times: Float[Array, " V"]) -> Chain:
    """The chain that `ordered` has found in a fit."""
    if isinstance(fit, PairFit):
        gmms, edges, turned = [fit.pair.gmm0, fit.pair.gmm1], [0], [False]
        conditionals = jax.tree.map(lambda leaf: leaf[None], fit.plan.conditionals())
    else:
        gmms, found = [fit.gmms[i] for i in order], [fit.edge_index(edge) for edge in pairwise(order)]
        edges, turned = (list(each) for each in zip(*found, strict=True))
        conditionals = fit.plans.conditionals()
    return _chain(mixture.stack(gmms), times, *conditionals, np.array(edges, np.int32), np.array(turned))


@program()
def _chain(nodes: GaussianMixture, times: Array, rows: Array, columns: Array, edges: Array, turned: Array) -> Chain:
    """From the conditionals of all edges, in their own order and directions."""
    size = nodes.n_components
    rows, columns = (
        jnp.pad(c, ((0, 0), (0, size - c.shape[1]), (0, size - c.shape[2])))[edges] for c in (rows, columns)
    )
    turned = turned[:, None, None]
    forward = jnp.where(turned, columns.swapaxes(1, 2), rows)
    return Chain(nodes, times, forward, jnp.where(turned, rows.swapaxes(1, 2), columns))


def checked_times(name: str, value: Any, times: Float[Array, " V"], *shape: str) -> Array:
    """Times within the chain's, in its precision.

    Raises:
      TypeError, ValueError: not real numbers of this shape; one outside of the chain, where that is known.
    """
    t = checks.array(name, value, *shape) if shape else checks.scalar(name, value)
    if checks.known(value, times):
        ends, given = np.asarray(times)[[0, -1]], np.asarray(value, np.float64).astype(times.dtype)
        outside = given[~((given >= ends[0]) & (given <= ends[1]))]
        if outside.size:
            problem = f"{outside.ravel()[0]:g} is outside of the chain's times, {ends[0]:g} to {ends[1]:g}"
            raise ArgumentError(name, problem, "a path is known between its first and its last node")
    return t.astype(times.dtype)
