"""Points on smooth paths through the mixtures of a fitted chain."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from coupled_gmm.core import checks, foreign
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.programs import program
from coupled_gmm.courses import chains, splines
from coupled_gmm.transport.maps import map_points
from coupled_gmm.transport.plan import Plan


def trajectories(
    fit: Any,
    x: Any,
    times: Any,
    *,
    node: Any = None,
    method: str = "spline",
    ends: str = "parabolic",
    key: PRNGKeyArray | None = None,
) -> Float[Array, "T n d"]:
    r"""Where points of a node's cloud, the first's unless another is named, are at any times of a fitted chain.

    .. math:: x(t) = \sum_v W_v(t) x_v , \qquad x_0 = x, \quad x_{v+1} = T_v(x_v)

    with the maps :math:`T_v` of the chain's plans, as `map_points` has them, and the weights W of a cubic spline with the nodes'
    times as knots; of two nodes a straight line. At a node's time x(t) is the image there.

    Args:
      fit: of a chain (`fit_graph` of `chain(...)`, or of any graph with an edge between each two nodes that follow in time), or of
        a pair, whose times are 0 and 1. Nodes without times have their indices.
      x: (n, d), data units.
      times: (T,), within those of the chain.
      node: whose points they are, by index or name: pushed on to later nodes, and pulled back to earlier ones by the reverse plans.
      method: "spline", or "geodesic" for straight lines between nodes.
      ends: what the spline does in its first and last stretch: "parabolic" (its curvature is constant there), "not-a-knot" (its
        third derivative goes on from the stretch beside) or "natural" (the curvature falls to 0).
      key: a random key; with it points go by random couplings, as `map_points(..., method="random")`, and at every node they
        are distributed as its mixture. None: each goes where its mean goes, so that clouds become narrower from node to node.

    Returns:
      (T, n, d).

    Raises:
      TypeError, ValueError: a fit of something else; points of another number of features, or not finite; times outside.
    """
    checks.choice("method", method, splines.METHODS)
    checks.choice("ends", ends, splines.ENDS)
    key = None if key is None else checks.key("key", key)
    order, knots = chains.ordered(fit)
    times = chains.checked_times("times", times, knots, "T")
    if foreign.is_open(x):
        raise ArgumentError("x", f"expected points in memory, got {x!r}", "take some of them, by its rows(...)")
    x, start = checks.points("x", x, chains.n_features(fit)), chains.place(fit, order, node)
    plans = list(enumerate(chains.plans(fit, order)))
    later = _images(plans[start:], x, key)
    earlier = _images([(v, plan.reverse()) for v, plan in plans[:start][::-1]], x, key)
    own = jnp.asarray(x, (later or earlier)[0].dtype)
    return _along(jnp.stack([*earlier[::-1], own, *later]), knots, times, method, ends)


def _images(plans: list[tuple[int, Plan]], x: Any, key: PRNGKeyArray | None) -> list[Array]:
    """Of points at each node that plans lead to in turn, with the numbers of their edges."""
    images = []
    for v, plan in plans:
        how: dict[str, Any] = {} if key is None else {"method": "random", "key": jax.random.fold_in(key, v)}
        x = map_points(plan, x, **how)
        images.append(x)
    return images


@program("method", "ends")
def _along(images: Float[Array, "V n d"], knots: Array, times: Array, method: str, ends: str) -> Float[Array, "T n d"]:
    weights = splines.weights(knots, times, method, ends)
    # Weights sum to 1: of differences nothing is lost far from the origin.
    return images[0] + jnp.einsum("tv,vnd->tnd", weights[:, 1:], images[1:] - images[0])
