"""Pictures of plans: links between components, mixtures on the way, masses as a heat map."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.plot.mixtures import draw_densities, draw_inked, plot_mixture
from coupled_gmm.plot.style import PALETTE, tidy, two_features
from coupled_gmm.transport import maps

_SMALL_PLAN = 12  # up to here a plan's cells have room for numbers


def plot_links(
    ax: Axes,
    plan: Any,
    *,
    axes: tuple[int, int] = (0, 1),
    n_sds: Sequence[float] = (2,),
    colors: Sequence[Any] = PALETTE[:2],
    width: float = 14,
    least: float = 1e-3,
    labels: bool = True,
) -> None:
    """Draw a plan's two mixtures, and the mass between their components as straight links from mean to mean.

    Where d = 1, mixture 0 stands upright, mixture 1 hangs below it upside down, each scaled to its peak, and links cross
    the gap between them.

    Args:
      ax: matplotlib axes to draw on.
      plan: a solved plan.
      axes: where d > 2, the two features to show.
      n_sds: standard deviations at which ellipses are drawn.
      colors: one for each mixture.
      width: of a link, in points per unit of mass.
      least: links of a smaller part of all that the plan moves are left out.
      labels: whether components' numbers are written at their means.

    Raises:
      ValueError: axes that do not fit the features.
    """
    gmms, matrix = (plan.pair.gmm0, plan.pair.gmm1), np.asarray(plan.matrix, np.float64)
    for i, gmm in enumerate(gmms):
        shades = [colors[i]] * gmm.n_components
        if gmm.n_features == 1:
            draw_densities(ax, gmm, shades, base=-i, height=1 - 2 * i)
            ax.set_yticks([])
        else:
            plot_mixture(ax, gmm, axes=axes, n_sds=n_sds, colors=shades, labels=labels)
    if plan.pair.n_features == 1:
        ends = [np.stack([np.asarray(gmm.means)[:, 0], np.full(gmm.n_components, -i)], 1) for i, gmm in enumerate(gmms)]
    else:
        ends = [np.asarray(gmm.means)[:, list(axes)] for gmm in gmms]
    cells = [(k, m) for k, m in np.argwhere(matrix > 0) if matrix[k, m] >= least * matrix.sum()]
    lines = [(ends[0][k], ends[1][m]) for k, m in cells]
    style = {"colors": "black", "alpha": 0.6, "capstyle": "round"}
    ax.add_collection(LineCollection(lines, linewidths=[width * matrix[cell] for cell in cells], **style))
    ax.autoscale_view()


def plot_interpolation(
    plan: Any,
    times: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    *,
    axes: tuple[int, int] = (0, 1),
    n_sds: Sequence[float] = (1, 2),
    colors: Sequence[Any] = PALETTE[:2],
) -> Figure:
    """The mixtures on the way from gmm0 to gmm1: a panel a time, the fuller a component's ink the greater its weight.

    Args:
      plan: a solved plan.
      times: each in [0, 1].
      axes: where d > 2, the two features to show.
      n_sds: standard deviations at which ellipses are drawn; densities where d = 1.
      colors: of gmm0 and gmm1; in between they are mixed.

    Returns:
      The figure.

    Raises:
      ValueError: no times, or times out of range; axes that do not fit the features.
    """
    if len(times) == 0:
        raise ArgumentError("times", "expected at least one number between 0 and 1, got none")
    d = plan.pair.n_features
    first, last = (np.array(to_rgb(color)) for color in colors)
    figure = Figure(figsize=(max(2.6 * len(times), 4), 3), layout="constrained")
    panels = figure.subplots(1, len(times), sharex=True, sharey=True, squeeze=False)[0]
    for ax, t in zip(panels, times, strict=True):
        gmm = maps.interpolate(plan, t)
        color = tuple((1 - t) * first + t * last)
        if d == 1:
            draw_densities(ax, gmm, [color] * gmm.n_components)
        else:
            draw_inked(ax, gmm.marginal(two_features(axes, d)), color, n_sds)
        tidy(ax)
        ax.set_title(f"t = {t:g}", fontsize=11)
    return figure


def plot_plan(plan: Any) -> Figure:
    """A plan as a heat map, with the masses of both mixtures beside what flows out of and into their components.

    Returns:
      The figure; its title carries the marginal error, and the total mass where the plan is unbalanced.
    """
    matrix = np.asarray(plan.matrix, np.float64)
    a, b = (np.asarray(gmm.weights, np.float64) for gmm in (plan.pair.gmm0, plan.pair.gmm1))
    k0, k1 = matrix.shape
    cell = min(0.75, 9 / max(k0, k1))
    figure = Figure(figsize=(max(k1 * cell, 2.4) + 3.2, max(k0 * cell, 2.4) + 2.6), layout="constrained")
    grid = figure.subplots(
        2, 3,
        width_ratios=[1.3, max(k1 * cell, 2.4), 0.15], height_ratios=[1.3, max(k0 * cell, 2.4)],
        gridspec_kw={"wspace": 0.02, "hspace": 0.02},
    )  # fmt: skip
    (corner, top, corner2), (left, heat, bar) = grid
    corner.axis("off")
    corner2.axis("off")
    image = heat.imshow(matrix, cmap="Blues", vmin=0, vmax=matrix.max() or 1, aspect="auto")
    _label_cells(heat, matrix)
    heat.set_xticks(np.arange(k1 + 1) - 0.5, minor=True)
    heat.set_yticks(np.arange(k0 + 1) - 0.5, minor=True)
    heat.grid(which="minor", color="white", linewidth=1)
    heat.tick_params(which="minor", bottom=False, left=False)
    heat.set_xlabel("to component of mixture 1")
    heat.tick_params(left=False, labelleft=False)
    _draw_marginals(top, b, matrix.sum(0), horizontal=False)
    _draw_marginals(left, a, matrix.sum(1), horizontal=True)
    top.set_xlim(heat.get_xlim())
    left.set_ylim(heat.get_ylim())
    left.set_ylabel("from component of mixture 0")
    handles = top.get_legend_handles_labels()
    corner.legend(*handles, loc="center", frameon=False, fontsize=9)
    figure.colorbar(image, cax=bar, label="mass")
    total = "" if plan.pair.balanced else f", total mass {matrix.sum():.4f}"
    error = f"marginal error {float(plan.marginal_error):.1e}"
    figure.suptitle(f"Mass transfer between components\n{error}{total}", fontsize=12)
    return figure


def _label_cells(ax: Axes, matrix: np.ndarray) -> None:
    k0, k1 = matrix.shape
    for set_ticks, size in ((ax.set_xticks, k1), (ax.set_yticks, k0)):
        set_ticks(range(0, size, 1 if size <= _SMALL_PLAN else math.ceil(size / 10)))
    if max(k0, k1) > _SMALL_PLAN:
        return
    middle = matrix.max() / 2
    for (k, m), mass in np.ndenumerate(matrix):
        if mass >= 5e-4:
            color = "white" if mass > middle else "black"
            ax.text(m, k, f"{mass:.3f}", ha="center", va="center", fontsize=9, color=color)


def _draw_marginals(ax: Axes, mass: np.ndarray, flow: np.ndarray, *, horizontal: bool) -> None:
    """Bars of the masses, a mark at what the plan moves: they differ where components are reweighted."""
    where = np.arange(len(mass))
    if horizontal:
        ax.barh(where, mass, color="0.8", height=0.8, label="mass")
        ax.plot(flow, where, "|", color=PALETTE[1], markersize=9, markeredgewidth=2, label="flow")
        ax.invert_xaxis()
        ax.set_yticks(where if len(mass) <= _SMALL_PLAN else where[:: math.ceil(len(mass) / 10)])
    else:
        ax.bar(where, mass, color="0.8", width=0.8, label="mass")
        ax.plot(where, flow, "_", color=PALETTE[1], markersize=9, markeredgewidth=2, label="outflow or inflow")
        ax.set_xticks([])
    ax.spines[["top", "left" if horizontal else "right"]].set_visible(False)
