"""Pictures of time courses: clouds with their mixtures at each time, and how masses flow from node to node of a fitted chain."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.courses import chains
from coupled_gmm.fits.results import GraphFit
from coupled_gmm.plot import fits
from coupled_gmm.plot.mixtures import plot_mixture
from coupled_gmm.plot.style import component_colors, tidy

_BAR = 0.045  # of a bar, as a part of the shortest stretch between two nodes
_WRITTEN = 0.03  # masses from which on a component's number is written
_COLUMNS = 5  # of panels
_PART = np.linspace(0, 1, 41)
_SMOOTH = _PART**2 * (3 - 2 * _PART)


def plot_mass_flow(fit: Any, *, least: float = 1e-3, labels: bool = True) -> Figure:
    """The masses of components at each node of a chain, as bars, and the plans between them, as ribbons (a Sankey diagram).

    A ribbon from k to l leaves the bar of k as wide as the part of its mass that goes to l, and enters that of l as wide as the
    part of its mass that comes from k. Where masses change the two differ: what is born on the way is hatched, what dies is grey.
    Bars are stacked so that ribbons cross little. The component that most of another's mass goes to keeps its colour; others have
    new ones.

    Args:
      fit: of a chain or a pair, as for `trajectories`.
      least: ribbons are left out whose mass is smaller, at both ends.
      labels: whether components' numbers are written on their bars.

    Returns:
      The figure.

    Raises:
      TypeError, ValueError: a fit of something else, or a batch; least out of range.
    """
    least = float(checks.scalar("least", least, at_least=0))
    order, times = chains.ordered(fit)
    plans, x = chains.plans(fit, order), np.asarray(times, np.float64)
    gmms = [plans[0].pair.gmm0, *(plan.pair.gmm1 for plan in plans)]
    masses = [np.asarray(gmm.weights, np.float64) for gmm in gmms]
    conditionals = [[np.asarray(c, np.float64) for c in plan.conditionals()] for plan in plans]
    bases = _stacked(masses, [backward for _, backward in conditionals])
    tracks = _tracks(masses, [backward for _, backward in conditionals])
    palette = component_colors(1 + max(max(track) for track in tracks))
    colors = [[palette[k] for k in track] for track in tracks]
    figure = Figure(figsize=(min(2.4 + 1.9 * len(plans), 24), 4.8), layout="constrained")
    ax, half = figure.subplots(), _BAR * np.diff(x).min()
    changes = False
    for v, (forward, backward) in enumerate(conditionals):
        leaving, entering = masses[v][:, None] * forward, masses[v + 1] * backward
        stretch = x[v] + half, x[v + 1] - half
        changes |= _draw_ribbons(ax, stretch, bases[v : v + 2], leaving, entering, colors[v], least)
    for v, (mass, base) in enumerate(zip(masses, bases, strict=True)):
        ax.bar(np.full(len(mass), x[v]), mass, 2 * half, base, color=colors[v], edgecolor="white", zorder=3)
        for k in np.flatnonzero(mass >= _WRITTEN) if labels else ():
            ax.annotate(
                str(k),
                (x[v], base[k] + mass[k] / 2),
                ha="center",
                va="center",
                fontsize=9,
                color="white",
                weight="bold",
                zorder=4,
            )
    _finish(ax, fit, order, x)
    if changes:
        entries = [Patch(facecolor="white", edgecolor="0.3", hatch="////", label="born on the way")]
        entries += [Patch(facecolor="0.75", label="died on the way")]
        figure.legend(handles=entries, frameon=False, loc="outside lower center", ncols=2)
    return figure


def plot_nodes(
    fit: Any,
    clouds: Sequence[Any],
    *,
    axes: tuple[int, int] = (0, 1),
    max_points: int = 5000,
    seed: int = 0,
    feature_names: Sequence[str] | None = None,
) -> Figure:
    """The clouds of a fitted graph with their mixtures, a panel for each node, in the order of their times.

    Along a chain components have the colours of `plot_mass_flow`; of other graphs those of their numbers.

    Args:
      fit: of a graph.
      clouds: for each node (n, d), or None.
      axes, max_points, seed, feature_names: as in `plot_clouds`.

    Raises:
      TypeError, ValueError: a fit of something else, or a batch; clouds or axes that do not fit it.
    """
    order, colors = _colors(fit)
    d, nodes = fit.gmms[0].n_features, len(order)
    if len(clouds) != nodes:
        raise ArgumentError("clouds", f"expected one for each of the {nodes} nodes (or None), got {len(clouds)}")
    names, columns = fits.feature_names_of(feature_names, d), min(nodes, _COLUMNS)
    rows = -(-nodes // columns)
    figure = Figure(figsize=(1 + 3.1 * columns, 0.8 + 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    draw = np.random.default_rng(seed)
    for ax, i in zip(panels, order, strict=False):
        shown = "no cloud"
        if clouds[i] is None:
            plot_mixture(ax, fit.gmms[i], axes=axes, colors=colors[i])
            tidy(ax)
        else:
            some = {"axes": axes, "max_points": max_points}
            shown = fits.draw_cloud(ax, fit.gmms[i], np.asarray(clouds[i]), draw, colors[i], **some)
        ax.set_title(f"{_called(fit, i)}\n{shown}{fits.overruled(fit, i)}", fontsize=10, parse_math=False)
        ax.set_xlabel(names[0 if d == 1 else axes[0]])
    for ax in panels[nodes:]:
        ax.set_visible(False)
    for ax in panels[::columns]:
        ax.set_ylabel("density" if d == 1 else names[axes[1]])
    return figure


def _called(fit: Any, node: int) -> str:
    name = f"node {node}" if fit.names is None else fit.names[node]
    return name if fit.times is None else f"{name}, time {float(fit.times[node]):g}"


def _colors(fit: Any) -> tuple[list[int], dict[int, list[Any]]]:
    """The nodes in their order, and the colours of the components of each."""
    checks.instance("fit", fit, GraphFit)
    try:
        order, _ = chains.ordered(fit)
    except ArgumentError:  # no chain in time
        order = list(range(len(fit.gmms)))
        palette = component_colors(max(gmm.n_components for gmm in fit.gmms))
        return order, {i: palette[: fit.gmms[i].n_components] for i in order}
    plans = chains.plans(fit, order)
    masses = [np.asarray(fit.gmms[i].weights, np.float64) for i in order]
    tracks = _tracks(masses, [np.asarray(plan.conditionals()[1], np.float64) for plan in plans])
    palette = component_colors(1 + max(map(max, tracks)))
    return order, {i: [palette[k] for k in track] for i, track in zip(order, tracks, strict=True)}


def _stacked(masses: list[np.ndarray], origins: list[np.ndarray]) -> list[np.ndarray]:
    """Where each component's bar begins: in the order of the mean height of what it comes from."""
    places = [np.arange(len(masses[0]), dtype=float)]
    bases = []
    for v, mass in enumerate(masses):
        if v:
            middle = bases[-1] + masses[v - 1] / 2
            places.append(origins[v - 1].T @ middle)
        rank = np.argsort(places[-1], kind="stable")
        base = np.empty(len(mass))
        base[rank] = np.cumsum(mass[rank]) - mass[rank]
        bases.append(base)
    return bases


def _tracks(masses: list[np.ndarray], origins: list[np.ndarray]) -> list[list[int]]:
    """Numbers that components keep from node to node, as long as each is the main heir of its main ancestor."""
    tracks = [list(range(len(masses[0])))]
    fresh = len(masses[0])
    for mass, shares in zip(masses[1:], origins, strict=True):
        flow, track = shares * mass, []
        for m, k in enumerate(flow.argmax(0).tolist()):
            heir = flow[k].argmax() == m
            track.append(tracks[-1][k] if heir else fresh)
            fresh += not heir
        tracks.append(track)
    return tracks


def _draw_ribbons(
    ax: Axes, stretch: tuple[float, float], bases: Any, leaving: Any, entering: Any, colors: Any, least: float
) -> bool:
    """The ribbons between two nodes; whether one of them changes its width."""
    x = stretch[0] + _PART * (stretch[1] - stretch[0])
    starts, ends = _offsets(bases[0], bases[1], leaving), _offsets(bases[1], bases[0], entering.T).T
    changes = False
    for k, m in np.argwhere(np.maximum(leaving, entering) >= max(least, 1e-12)):
        low = starts[k, m] + _SMOOTH * (ends[k, m] - starts[k, m])
        width = leaving[k, m] + _SMOOTH * (entering[k, m] - leaving[k, m])
        kept = min(leaving[k, m], entering[k, m])
        ax.fill_between(x, low, low + kept, color=colors[k], alpha=0.45, linewidth=0, label=f"{k} to {m}")
        if abs(entering[k, m] - leaving[k, m]) > 1e-3 * max(least, kept):
            born = entering[k, m] > leaving[k, m]
            how: dict[str, Any] = (
                {"facecolor": colors[k], "alpha": 0.45, "hatch": "////", "edgecolor": "0.3"}
                if born
                else {"color": "0.75"}
            )
            ax.fill_between(x, low + kept, low + width, linewidth=0, label=f"{k} to {m}, change", **how)
            changes = True
    return changes


def _offsets(bases: np.ndarray, others: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Where each ribbon begins on its component's bar: those to lower bars below."""
    rank = np.argsort(others, kind="stable")
    offsets = np.empty_like(widths)
    offsets[:, rank] = np.cumsum(widths[:, rank], axis=1) - widths[:, rank]
    return bases[:, None] + offsets


def _finish(ax: Axes, fit: Any, order: list[int], x: np.ndarray) -> None:
    names = getattr(fit, "names", None)
    ax.set_xticks(x, [f"{t:g}" for t in x] if names is None else [names[i] for i in order], parse_math=False)
    ax.set(xlabel="time" if names is None else "", ylabel="mass of components", ylim=(0, 1.02))
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(bottom=False)
