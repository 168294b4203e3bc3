r"""Cubic splines as weights: an interpolant is linear in its values, :math:`y(t) = \sum_v W_v(t) y_v`, with weights that sum to 1.

Between knots, in :math:`u = (t - t_i) / h_i` and with second derivatives M at the knots,

.. math:: y = (1 - u) y_i + u y_{i+1} + \frac{h_i^2}{6} (((1 - u)^3 - (1 - u)) M_i + (u^3 - u) M_{i+1}) ,

where M is a linear function of y, by continuity of the first derivative and what is asked at the ends.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coupled_gmm.core import matrices

METHODS = ("spline", "geodesic")
ENDS = ("parabolic", "not-a-knot", "natural")


def weights(knots: Float[Array, " V"], t: Float[Array, " T"], method: str, ends: str) -> Float[Array, "T V"]:
    """Of each knot at each time: 1 and 0 where t is a knot. Times outside are taken as the nearest end."""
    h = jnp.diff(knots)
    i, u = segment(knots, t)
    identity = jnp.eye(len(knots), dtype=knots.dtype)
    u = u[:, None]
    line = (1 - u) * identity[i] + u * identity[i + 1]
    if method == "geodesic" or len(knots) == 2:
        return line
    bends = _second_derivatives(h, ends)
    a = 1 - u
    return line + h[i][:, None] ** 2 / 6 * ((a**3 - a) * bends[i] + (u**3 - u) * bends[i + 1])


def segment(knots: Float[Array, " V"], t: Float[Array, " T"]) -> tuple[Int[Array, " T"], Float[Array, " T"]]:
    """Between which two knots, i and i + 1, a time is; and its part of the way."""
    t = jnp.clip(t, knots[0], knots[-1])
    i = jnp.clip(jnp.searchsorted(knots, t, side="right") - 1, 0, len(knots) - 2)
    return i, (t - knots[i]) / (knots[i + 1] - knots[i])


def _second_derivatives(h: Float[Array, " n"], ends: str) -> Float[Array, "V V"]:
    r"""The matrix of M as a function of y.

    Inside, :math:`h_{i-1} M_{i-1} + 2 (h_{i-1} + h_i) M_i + h_i M_{i+1} = 6 (s_i - s_{i-1})` with the slopes s. At the ends M is 0
    ("natural"), or goes on as a constant ("parabolic"), or along the line of the two next ("not-a-knot": the third derivative is
    continuous at the second knot and the last but one); of three knots the last two are one parabola. Eliminated, they leave a
    system that is row-diagonally dominant.
    """
    slopes = jnp.diff(jnp.eye(len(h) + 1, dtype=h.dtype), axis=0) / h[:, None]
    right = 6 * jnp.diff(slopes, axis=0)
    n = len(right)
    left = jnp.diag(2 * (h[:-1] + h[1:])) + jnp.diag(h[1:-1], 1) + jnp.diag(h[1:-1], -1)
    # M_0 = (1 + tilt) M_1 - tilt M_2, and so at the other end.
    tilts = [h[0] / h[1], h[-1] / h[-2]] if ends == "not-a-knot" and n > 1 else [jnp.zeros((), h.dtype)] * 2
    outer = []
    for (at, beside), step, tilt in zip(((0, 1), (n - 1, n - 2)), (h[0], h[-1]), tilts, strict=True):
        row = jnp.zeros(n, h.dtype)
        if ends != "natural":
            row = row.at[at].add(1 + tilt)
            row = row.at[beside].add(-tilt) if n > 1 else row
        left = left.at[at].add(step * row)
        outer.append(row)
    inner = matrices.invert_dominant(left) @ right
    return jnp.concatenate([outer[0][None] @ inner, inner, outer[1][None] @ inner])
