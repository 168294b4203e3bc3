"""Pictures of mixtures, coupled fits and plans.

Each function draws what it says and returns the matplotlib figure (or takes the axes to draw on). Figures are free of
pyplot's global state: nothing leaks when many are drawn. In a notebook,
`%matplotlib inline` makes them show themselves. `import coupled_gmm` does not import this module, nor matplotlib.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.ticker import MaxNLocator

from coupled_gmm.core import checks
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport import maps

# Okabe & Ito's palette: told apart with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")
_HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]
_NEGLIGIBLE = 1e-3  # components of less mass are dotted
_SMALL_PLAN = 12  # up to here a plan's cells have room for numbers


def component_colors(n_components: int) -> list[Any]:
    """A colour for each component; past the palette's eight, equal steps of viridis."""
    if n_components <= len(PALETTE):
        return list(PALETTE[:n_components])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.93, n_components)))


def plot_mixture(
    ax: Axes,
    gmm: GaussianMixture,
    *,
    axes: tuple[int, int] = (0, 1),
    n_sds: Sequence[float] = (1, 2),
    colors: Sequence[Any] | None = None,
    labels: bool = True,
) -> None:
    """Draw a mixture's components: ellipses at 1 and 2 standard deviations, or densities where d = 1.

    Components of less than a thousandth of the mass are dotted, those of none left out.

    Args:
      ax: matplotlib axes to draw on.
      gmm: the mixture.
      axes: where d > 2, the two features to show; the mixture over the others is integrated out.
      n_sds: standard deviations at which ellipses are drawn.
      colors: one a component; None takes `component_colors`.
      labels: whether components' numbers are written at their means.
    """
    colors = component_colors(gmm.n_components) if colors is None else colors
    if gmm.n_features == 1:
        _draw_densities(ax, gmm, colors)
        return
    axes = two_features(axes, gmm.n_features)
    shown = gmm.marginal(axes)
    means, covariances = np.asarray(shown.means), np.asarray(shown.covariances)
    for k in _present(shown):
        line = ":" if shown.weights[k] < _NEGLIGIBLE else "-"
        for sds in n_sds:
            style = {"edgecolor": colors[k], "facecolor": "none", "linewidth": 2, "linestyle": line}
            ax.add_patch(ellipse(means[k], covariances[k], sds, path_effects=_HALO, **style))
        if labels:
            ax.annotate(str(k), means[k], ha="center", va="center", fontsize=11, fontweight="bold", path_effects=_HALO)
    ax.autoscale_view()


def _present(gmm: GaussianMixture) -> list[int]:
    return np.flatnonzero(np.asarray(gmm.weights) > 0).tolist()


def ellipse(mean: np.ndarray, covariance: np.ndarray, sds: float, **style: Any) -> Ellipse:
    variances, directions = np.linalg.eigh(covariance)
    width, height = 2 * sds * np.sqrt(np.maximum(variances, 0))
    angle = math.degrees(math.atan2(directions[1, 0], directions[0, 0]))
    return Ellipse((mean[0], mean[1]), width, height, angle=angle, **style)


def _draw_densities(
    ax: Axes, gmm: GaussianMixture, colors: Sequence[Any], *, base: float = 0, height: float | None = None
) -> None:
    """Densities of one feature upon the level `base`; a height scales the mixture's peak to it, downward if negative."""
    means, variances = np.asarray(gmm.means)[:, 0], np.asarray(gmm.covariances)[:, 0, 0]
    weights, sds = np.asarray(gmm.weights), np.sqrt(variances)
    drawn = [k for k in _present(gmm) if variances[k] > 0]
    if not drawn:
        return
    x = np.unique(np.concatenate([np.linspace(means[k] - 4 * sds[k], means[k] + 4 * sds[k], 300) for k in drawn]))
    parts = {
        k: weights[k] * np.exp(-0.5 * ((x - means[k]) / sds[k]) ** 2) / (sds[k] * math.sqrt(2 * math.pi)) for k in drawn
    }
    whole = np.sum(list(parts.values()), axis=0)
    scale = 1 if height is None else height / whole.max()
    for k, density in parts.items():
        ax.fill_between(x, base, base + scale * density, color=colors[k], alpha=0.35, linewidth=0)
        ax.plot(x, base + scale * density, color=colors[k], linewidth=2, label=f"component {k}")
    ax.plot(x, base + scale * whole, color="black", linewidth=1, linestyle="--", label="mixture")


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
            _draw_densities(ax, gmm, shades, base=-i, height=1 - 2 * i)
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
        raise ValueError("times: expected at least one number between 0 and 1, got none")
    d = plan.pair.n_features
    first, last = (np.array(to_rgb(color)) for color in colors)
    figure = Figure(figsize=(max(2.6 * len(times), 4), 3), layout="constrained")
    panels = figure.subplots(1, len(times), sharex=True, sharey=True, squeeze=False)[0]
    for ax, t in zip(panels, times, strict=True):
        gmm = maps.interpolate(plan, t)
        color = tuple((1 - t) * first + t * last)
        if d == 1:
            _draw_densities(ax, gmm, [color] * gmm.n_components)
        else:
            _draw_inked(ax, gmm.marginal(two_features(axes, d)), color, n_sds)
        tidy(ax)
        ax.set_title(f"t = {t:g}", fontsize=11)
    return figure


def _draw_inked(ax: Axes, gmm: GaussianMixture, color: Any, n_sds: Sequence[float]) -> None:
    means, covariances, weights = (np.asarray(leaf) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    for k in _present(gmm):
        ink = weights[k] / weights.max()
        style = {"facecolor": (*color, 0.5 * ink), "edgecolor": (*color, ink), "linewidth": 1}
        for sds in n_sds:
            ax.add_patch(ellipse(means[k], covariances[k], sds, **style))
    ax.autoscale_view()


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
        raise ValueError(f"point_colors: 'own' needs points of 3 features (red, green, blue), got {d}; use 'component'")
    names = _feature_names(feature_names, d)
    colors = component_colors(max(pair.gmm0.n_components, pair.gmm1.n_components))
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    draw = np.random.default_rng(seed)
    for i, (ax, gmm, cloud) in enumerate(zip(panels, (pair.gmm0, pair.gmm1), (x0, x1), strict=True)):
        cloud = np.asarray(cloud)
        chosen = cloud[draw.permutation(len(cloud))[:max_points]]
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
        shown = f", {len(chosen):,} shown" if d > 1 and len(chosen) < len(cloud) else ""
        ax.set_title(f"Cloud {i} and mixture {i}\n{len(cloud):,} points{shown}", fontsize=11)
        ax.set_xlabel(names[0 if d == 1 else axes[0]])
    panels[0].set_ylabel("density" if d == 1 else names[axes[1]])
    if d == 1:
        panels[int(pair.gmm1.n_components > pair.gmm0.n_components)].legend(frameon=False)
    else:
        how = "in their own colours" if point_colors == "own" else "in the colour of their most probable component"
        figure.suptitle(f"Points {how}, ellipses at 1 and 2 standard deviations", fontsize=12)
    return figure


def _component_shades(gmm: GaussianMixture, points: np.ndarray, colors: Sequence[Any]) -> np.ndarray:
    component = np.argmax(np.asarray(gmm.log_posterior(points)), axis=1)
    return np.array([to_rgb(color) for color in colors])[component]


def two_features(axes: Sequence[int], d: int) -> tuple[int, int]:
    if len(axes) != 2 or axes[0] == axes[1] or not all(0 <= axis < d for axis in axes):
        raise ValueError(f"axes: expected two distinct features between 0 and {d - 1}, got {tuple(axes)}")
    return int(axes[0]), int(axes[1])


def _feature_names(names: Sequence[str] | None, d: int) -> list[str]:
    if names is None:
        return [f"feature {i}" for i in range(d)]
    if len(names) != d:
        raise ValueError(f"feature_names: expected {d} names, got {len(names)}; give one a feature")
    return [name.replace("$", r"\$") for name in names]  # matplotlib reads what stands between two as mathematics


def tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)


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


def plot_history(fit: Any) -> Figure:
    """How a fit went, by EM step: expected and penalised log-likelihoods, the latter's gap to its best, transport."""
    history = fit.history
    value = np.asarray(history.penalized_log_likelihood)
    gap = np.nanmax(value, initial=-np.inf) - value
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    (ax_q, ax_value), (ax_transport, ax_gap) = figure.subplots(2, 2)
    _draw_steps(ax_q, "Expected log-likelihoods", "Q, mean per point", {"cloud 0": history.q0, "cloud 1": history.q1})
    ax_q.legend(frameon=False)
    _draw_steps(ax_value, "Penalised log-likelihood (maximised)", "sum of both clouds, less penalties", {"": value})
    _draw_steps(ax_transport, "Transport between the mixtures", "regularised cost", {"": history.transport})
    _draw_steps(
        ax_gap, "Gap to the best penalised log-likelihood", "best minus present", {"": np.where(gap > 0, gap, np.nan)}
    )
    if (gap > 0).any():
        ax_gap.set_yscale("log")
    return figure


def _draw_steps(ax: Axes, title: str, ylabel: str, lines: dict[str, Any]) -> None:
    for color, (label, values) in zip(PALETTE, lines.items(), strict=False):
        ax.plot(np.arange(len(values)), np.asarray(values), ".-", color=color, label=label)
    tidy(ax)
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("EM step")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.ticklabel_format(axis="y", useOffset=False)
