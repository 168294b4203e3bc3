"""Pictures of coupled fits: the clouds with their mixtures, and how the fit went."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.plot.mixtures import plot_mixture
from coupled_gmm.plot.style import component_colors, tidy, two_features


def plot_clouds(
    fit_or_pair: Any,
    x0: Any,
    x1: Any,
    *,
    axes: tuple[int, int] = (0, 1),
    max_points: int = 5000,
    seed: int = 0,
    point_colors: str = "component",
    feature_names: Sequence[str] | None = None,
) -> Figure:
    """Two clouds side by side with their mixtures, each point in the colour of its most probable component.

    Args:
      fit_or_pair: a fit with a field `pair`, or a `GaussianMixturePair`.
      x0, x1: clouds (n, d) and (m, d).
      axes: where d > 2, the two features to show.
      max_points: of each cloud, at most so many points are drawn, chosen at random.
      seed: decides which.
      point_colors: "component", or "own": the three features are red, green and blue in [0, 1], as of a photograph.
      feature_names: d names for the axes; None numbers the features.

    Returns:
      The figure.

    Raises:
      ValueError: axes or colours that do not fit the features; a singular covariance, which has no density.
    """
    pair = getattr(fit_or_pair, "pair", fit_or_pair)
    checks.choice("point_colors", point_colors, ("component", "own"))
    d = pair.n_features
    if point_colors == "own" and d != 3:
        raise ArgumentError(
            "point_colors", f"'own' needs points of 3 features (red, green, blue), got {d}", "use 'component'"
        )
    names = feature_names_of(feature_names, d)
    colors = component_colors(max(pair.gmm0.n_components, pair.gmm1.n_components))
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    draw = np.random.default_rng(seed)
    how: dict[str, Any] = {"axes": axes, "max_points": max_points, "point_colors": point_colors}
    for i, (ax, gmm, cloud) in enumerate(zip(panels, (pair.gmm0, pair.gmm1), (x0, x1), strict=True)):
        shown = draw_cloud(ax, gmm, np.asarray(cloud), draw, colors, **how)
        ax.set_title(f"Cloud {i} and mixture {i}\n{shown}{overruled(fit_or_pair, i)}", fontsize=11)
        ax.set_xlabel(names[0 if d == 1 else axes[0]])
    panels[0].set_ylabel("density" if d == 1 else names[axes[1]])
    if d == 1:
        panels[int(pair.gmm1.n_components > pair.gmm0.n_components)].legend(frameon=False)
    else:
        coloured = "in their own colours" if point_colors == "own" else "in the colour of their most probable component"
        figure.suptitle(f"Points {coloured}, ellipses at 1 and 2 standard deviations", fontsize=12)
    return figure


def draw_cloud(
    ax: Axes,
    gmm: GaussianMixture,
    cloud: np.ndarray,
    draw: np.random.Generator,
    colors: Sequence[Any],
    *,
    axes: tuple[int, int] = (0, 1),
    max_points: int = 5000,
    point_colors: str = "component",
) -> str:
    """A cloud with its mixture upon axes that are given, each point in the colour of its most probable component.

    Returns:
      How many points there are, and how many of them are shown.
    """
    chosen = cloud[draw.permutation(len(cloud))[:max_points]]
    d = cloud.shape[1]
    if d == 1:
        ax.hist(cloud[:, 0], bins=60, density=True, color="0.85", label="points")
    else:
        shades = np.clip(chosen, 0, 1) if point_colors == "own" else _component_shades(gmm, chosen, colors)
        horizontal, vertical = two_features(axes, d)
        alpha = 0.8 if point_colors == "own" else 0.35
        style = {"c": shades, "s": 6, "alpha": alpha, "linewidths": 0, "rasterized": True}
        ax.scatter(chosen[:, horizontal], chosen[:, vertical], **style)
    plot_mixture(ax, gmm, axes=axes, colors=colors)
    tidy(ax)
    return f"{len(cloud):,} points" + (f", {len(chosen):,} shown" if d > 1 and len(chosen) < len(cloud) else "")


def overruled(fit: Any, node: int) -> str:
    """A line that says where the penalty has overruled the data."""
    found = getattr(fit, "fidelity", None)
    if found is None or not found.overruled[node]:
        return ""
    return f"\noverruled by the penalty: {float(found.loss[node]):.2g} nats per point lost"


def _component_shades(gmm: GaussianMixture, points: np.ndarray, colors: Sequence[Any]) -> np.ndarray:
    component = np.argmax(np.asarray(gmm.log_posterior(points)), axis=1)
    return np.array([to_rgb(color) for color in colors])[component]


def plot_history(fit: Any) -> Figure:
    """How a fit went, by EM step: expected and penalised log-likelihoods, the latter's gap to its best, transport."""
    history = fit.history
    value = np.asarray(history.penalized_log_likelihood)
    gap = np.nanmax(value, initial=-np.inf) - value
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    (ax_q, ax_value), (ax_transport, ax_gap) = figure.subplots(2, 2)
    _draw_steps(ax_q, "Expected log-likelihoods", "Q, mean per point", _expected(fit))
    ax_q.legend(frameon=False)
    _draw_steps(ax_value, "Penalised log-likelihood (maximised)", "sum over clouds, less penalties", {"": value})
    _draw_steps(ax_transport, "Transport between the mixtures", "regularised cost", {"": history.transport})
    _draw_steps(
        ax_gap, "Gap to the best penalised log-likelihood", "best minus present", {"": np.where(gap > 0, gap, np.nan)}
    )
    if (gap > 0).any():
        ax_gap.set_yscale("log")
    return figure


def _expected(fit: Any) -> dict[str, Any]:
    """Q of each node that has a cloud, by its name."""
    q = np.asarray(fit.history.q)
    named = getattr(fit, "names", None) or [f"cloud {i}" for i in range(q.shape[1])]
    there = np.flatnonzero(np.nan_to_num(q).any(axis=0))  # 0 at every step where there is none
    return {named[i]: q[:, i] for i in there}


def _draw_steps(ax: Axes, title: str, ylabel: str, lines: dict[str, Any]) -> None:
    for color, (label, values) in zip(component_colors(len(lines)), lines.items(), strict=True):
        ax.plot(np.arange(len(values)), np.asarray(values), ".-", color=color, label=label)
    tidy(ax)
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("EM step")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.ticklabel_format(axis="y", useOffset=False)


def feature_names_of(names: Sequence[str] | None, d: int) -> list[str]:
    if names is None:
        return [f"feature {i}" for i in range(d)]
    if len(names) != d:
        raise ArgumentError("feature_names", f"expected {d} names, got {len(names)}", "give one per feature")
    return [name.replace("$", r"\$") for name in names]  # matplotlib reads what stands between two as mathematics
