"""Pictures of barycenters and flows; the functions return figures, or write an animation.

The fuller a component's ink, the greater its weight: full ink is the greatest weight of its mixture, or of a whole path.
Ellipses lie at one standard deviation. Where d = 1, densities are drawn in place of ellipses.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.plot.style import PALETTE, ellipse, tidy, two_features

_TIME = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))  # its yellow end is faint on white
_MIDDLE = PALETTE[1]
_OTHERS = tuple(color for color in PALETTE[:-1] if color != _MIDDLE)
_TARGETS = tuple(PALETTE[i] for i in (1, 3, 4, 6))  # unlike any colour of time
_LEGEND: Any = {"frameon": False, "loc": "outside lower center", "ncols": 5}


def plot_barycenter(gmm: GaussianMixture, gmms: Sequence[GaussianMixture], *, axes: tuple[int, int] = (0, 1)) -> Figure:
    """Mixtures, each in its own colour, and their barycenter upon them.

    Args:
      gmm: the barycenter.
      gmms: the mixtures.
      axes: where d > 2, the two features to show; the mixtures over the others are integrated out.

    Returns:
      The figure.

    Raises:
      TypeError, ValueError: not mixtures, none, or over other features than the barycenter; axes that do not fit them.
    """
    checks.instance("gmm", gmm, GaussianMixture)
    gmms = _mixtures("gmms", gmms, gmm.n_features)
    colors = _OTHERS if len(gmms) <= len(_OTHERS) else list(_TIME(np.linspace(0, 1, len(gmms))))
    names = [f"mixture {i}" for i in range(len(gmms))] if len(gmms) > 1 else ["mixture"]
    figure = Figure(figsize=(6.5, 5.4), layout="constrained")
    ax = figure.subplots()
    entries = [_draw(ax, *each, axes) for each in zip(gmms, colors, names, strict=False)]
    entries.append(_draw(ax, gmm, _MIDDLE, "barycenter", axes))
    _finish(ax, gmm.n_features, axes)
    figure.legend(handles=entries, **_LEGEND)
    return figure


def plot_flow(fit: Any, targets: Any, *, axes: tuple[int, int] = (0, 1)) -> Figure:
    """Every step of a flow, coloured by time, between its start and its end; its targets are dashed.

    Args:
      fit: a `FlowFit`.
      targets: where it flows to: a mixture, or several.
      axes: where d > 2, the two features to show; the mixtures over the others are integrated out.

    Returns:
      The figure.

    Raises:
      TypeError, ValueError: a batch of flows, or one that is not finite; targets that are no mixtures, none, or over other
        features than the flow; axes that do not fit them.
    """
    path, targets = _checked(fit, targets)
    full = max(float(np.max(gmm.weights)) for gmm in path)
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    ax = figure.subplots()
    _draw_path(ax, path, axes, full)
    ends = {"start": (path[0], _TIME(0.0)), "end": (path[-1], _TIME(1.0))}
    entries = [_draw(ax, gmm, color, name, axes, full) for name, (gmm, color) in ends.items()]
    figure.legend(handles=entries + _draw_targets(ax, targets, axes), **_LEGEND)
    _finish(ax, path[0].n_features, axes)
    figure.colorbar(ScalarMappable(Normalize(0, len(path) - 1), _TIME), ax=ax, label="step")
    return figure


def plot_loss(values: Any, *, title: str, ylabel: str, xlabel: str = "step") -> Figure:
    """A history, on a linear axis and, where it is positive, on a logarithmic one.

    Args:
      values: (steps,), such as `fit.history.loss` or `fit.history.objective`; NaNs are left out.
      title, ylabel, xlabel: what to write.

    Returns:
      The figure; one panel where nothing is positive, two otherwise.

    Raises:
      ValueError: values of another shape, or none that is finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise ArgumentError("values", f"expected shape (steps,), got {values.shape}", "take one row of a batch")
    if not np.isfinite(values).any():
        raise ArgumentError("values", "none is finite", "check the status of the fit")
    positive = np.where(values > 0, values, np.nan)
    panels = {"linear": values, "log": positive} if np.isfinite(positive).any() else {"linear": values}
    figure = Figure(figsize=(5 * len(panels), 3.4), layout="constrained")
    for ax, (scale, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        ax.plot(np.arange(len(shown)), shown, ".-", color=PALETTE[0])
        tidy(ax)
        ax.set(xlabel=xlabel, ylabel=ylabel + ", logarithmic" * (scale == "log"), yscale=scale)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=12)
    return figure


def save_animation(
    path: Any, fit: Any, targets: Any, *, axes: tuple[int, int] = (0, 1), n_frames: int = 50, fps: int = 12
) -> None:
    """Write a flow as an animation, with its step and loss; targets are dashed.

    Args:
      path: a file whose name ends in .gif.
      fit: a `FlowFit`.
      targets: where it flows to: a mixture, or several.
      axes: where d > 2, the two features to show.
      n_frames: at least 1: evenly spaced steps, the first and the last among them; at most all.
      fps: frames a second, at least 1.

    Raises:
      TypeError, ValueError: another ending; an argument out of range; otherwise as in `plot_flow`.
    """
    if Path(path).suffix.lower() != ".gif":
        raise ArgumentError("path", f"must end in .gif, got {str(path)!r}")
    flown, targets = _checked(fit, targets)
    n_frames, fps = checks.integer("n_frames", n_frames, 1), checks.integer("fps", fps, 1)
    steps, full = len(flown) - 1, max(float(np.max(gmm.weights)) for gmm in flown)
    losses = np.append(np.asarray(fit.history.loss), np.asarray(fit.loss))
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    ax = FigureCanvasAgg(figure).figure.subplots()
    _draw_path(ax, flown, axes, full)
    _draw_targets(ax, targets, axes)
    _finish(ax, flown[0].n_features, axes)
    ax.autoscale(False)  # limits that hold every frame
    ax.set_adjustable("box")
    writer = PillowWriter(fps)
    with writer.saving(figure, str(path), dpi=80):
        for i in np.unique(np.round(np.linspace(0, steps, n_frames)).astype(int)).tolist():
            for artist in [*ax.patches, *ax.collections, *ax.lines]:
                artist.remove()
            _draw(ax, flown[i], _TIME(i / steps), "flow", axes, full)
            _draw_targets(ax, targets, axes)
            ax.set_title(f"step {i} of {steps}, loss {losses[i]:.2e}", fontsize=11)
            writer.grab_frame()


def _checked(fit: Any, targets: Any) -> tuple[list[GaussianMixture], list[GaussianMixture]]:
    """The mixtures of a flow's path, one by one, and its targets."""
    if fit.path.means.ndim != 3:
        raise ArgumentError("fit", "holds a batch of flows", "take one, jax.tree.map(lambda leaf: leaf[i], fit)")
    leaves = [np.asarray(leaf) for leaf in (fit.path.means, fit.path.covariances, fit.path.weights)]
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise ArgumentError("fit", "its path holds values that are not finite", "see fit.message")
    path = [GaussianMixture(*parts) for parts in zip(*leaves, strict=True)]
    targets = [targets] if isinstance(targets, GaussianMixture) else targets
    return path, _mixtures("targets", targets, path[0].n_features)


def _mixtures(name: str, gmms: Any, d: int) -> list[GaussianMixture]:
    gmms = checks.sequence(name, gmms)
    if not gmms:
        raise ArgumentError(name, "the list is empty", "give at least one mixture")
    for i, gmm in enumerate(gmms):
        checks.instance(f"{name}[{i}]", gmm, GaussianMixture)
        if gmm.n_features != d:
            raise ArgumentError(f"{name}[{i}]", f"has {gmm.n_features} features, expected {d}", "take a marginal")
    return gmms


def _shown(gmm: GaussianMixture, axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, covariances and weights over the features shown, of components that have weight."""
    index = np.array([0] if gmm.n_features == 1 else two_features(axes, gmm.n_features))
    means, covariances, weights = (np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    there = weights > 0
    return means[there][:, index], covariances[there][:, index[:, None], index], weights[there]


def _draw(
    ax: Axes,
    gmm: GaussianMixture,
    color: Any,
    name: str,
    axes: Sequence[int],
    full: float | None = None,
    line: Any = "-",
) -> Patch:
    """Draw a mixture in one colour, filled unless dashed; its entry for the legend."""
    color, filled = to_rgb(color), line == "-"
    means, covariances, weights = _shown(gmm, axes)
    if gmm.n_features == 1:
        x, density = _density(means, covariances, weights)
        ax.fill_between(x, density, color=color, alpha=0.25 * filled, linewidth=0)
        ax.plot(x, density, color=color, linewidth=2, linestyle=line)
    else:
        for mean, covariance, ink in zip(means, covariances, weights / (full or weights.max()), strict=True):
            style = {"edgecolor": (*color, ink), "facecolor": (*color, 0.5 * ink * filled), "linestyle": line}
            ax.add_patch(ellipse(mean, covariance, 1, linewidth=1.4, **style))
            ax.plot(*mean, "o" if filled else "x", color=(*color, ink), markersize=5)
    return Patch(facecolor=(*color, 0.5 * filled), edgecolor=color, linestyle=line, label=name)


def _draw_targets(ax: Axes, targets: list[GaussianMixture], axes: Sequence[int]) -> list[Patch]:
    names = [f"target {i}" for i in range(len(targets))] if len(targets) > 1 else ["target"]
    colors = [_TARGETS[i % len(_TARGETS)] for i in range(len(targets))]
    return [_draw(ax, *each, axes, line="--") for each in zip(targets, colors, names, strict=True)]


def _draw_path(ax: Axes, path: list[GaussianMixture], axes: Sequence[int], full: float) -> None:
    """The outlines of every mixture on a path, or its densities, coloured by time."""
    outlines, shades = [], []
    for gmm, color in zip(path, _TIME(np.linspace(0, 1, len(path))), strict=True):
        means, covariances, weights = _shown(gmm, axes)
        if gmm.n_features == 1:
            ax.plot(*_density(means, covariances, weights), color=color, linewidth=0.8)
            continue
        for mean, covariance, weight in zip(means, covariances, weights, strict=True):
            outlines.append(ellipse(mean, covariance, 1))
            shades.append((*color[:3], min(15 / len(path), 1) ** 0.5 * weight / full))
    ax.add_collection(PatchCollection(outlines, facecolors="none", edgecolors=shades, linewidths=0.8))
    ax.scatter(*np.array([outline.center for outline in outlines]).reshape(-1, 2).T, s=6, c=shades or None)


def _density(means: np.ndarray, covariances: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A density of one feature, where it matters; components without variance have none and are left out."""
    drawn = covariances[:, 0, 0] > 0
    mean, sd, weight = means[drawn, 0], np.sqrt(covariances[drawn, 0, 0]), weights[drawn]
    x = np.unique(np.linspace(mean - 4 * sd, mean + 4 * sd, 200))
    return x, np.exp(-0.5 * ((x[:, None] - mean) / sd) ** 2) @ (weight / (sd * math.sqrt(2 * math.pi)))


def _finish(ax: Axes, d: int, axes: Sequence[int]) -> None:
    tidy(ax)
    ax.autoscale_view()
    if d > 1:
        ax.set_aspect("equal", adjustable="datalim")
    first, second = ("feature 0", "density") if d == 1 else (f"feature {axis}" for axis in axes)
    ax.set(xlabel=first, ylabel=second)
