"""Pictures of one mixture, upon axes that are given."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes

from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.plot.style import component_colors, ellipse, two_features

_HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]
_NEGLIGIBLE = 1e-3  # components of less mass are dotted


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
      colors: one per component; None takes `component_colors`.
      labels: whether components' numbers are written at their means.
    """
    colors = component_colors(gmm.n_components) if colors is None else colors
    if gmm.n_features == 1:
        draw_densities(ax, gmm, colors)
        return
    axes = two_features(axes, gmm.n_features)
    shown = gmm.marginal(axes)
    means, covariances = np.asarray(shown.means), np.asarray(shown.covariances)
    for k in present(shown):
        line = ":" if shown.weights[k] < _NEGLIGIBLE else "-"
        for sds in n_sds:
            style = {"edgecolor": colors[k], "facecolor": "none", "linewidth": 2, "linestyle": line}
            ax.add_patch(ellipse(means[k], covariances[k], sds, path_effects=_HALO, **style))
        if labels:
            ax.annotate(str(k), means[k], ha="center", va="center", fontsize=11, fontweight="bold", path_effects=_HALO)
    ax.autoscale_view()


def draw_densities(
    ax: Axes, gmm: GaussianMixture, colors: Sequence[Any], *, base: float = 0, height: float | None = None
) -> None:
    """Densities of one feature upon the level `base`; a height scales the mixture's peak to it, downward if negative."""
    means, variances = np.asarray(gmm.means)[:, 0], np.asarray(gmm.covariances)[:, 0, 0]
    weights, sds = np.asarray(gmm.weights), np.sqrt(variances)
    drawn = [k for k in present(gmm) if variances[k] > 0]
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


def draw_inked(ax: Axes, gmm: GaussianMixture, color: Any, n_sds: Sequence[float]) -> None:
    """Ellipses of one colour, the fuller its ink the greater a component's weight."""
    means, covariances, weights = (np.asarray(leaf) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    for k in present(gmm):
        ink = weights[k] / weights.max()
        style = {"facecolor": (*color, 0.5 * ink), "edgecolor": (*color, ink), "linewidth": 1}
        for sds in n_sds:
            ax.add_patch(ellipse(means[k], covariances[k], sds, **style))
    ax.autoscale_view()


def present(gmm: GaussianMixture) -> list[int]:
    """The components that have weight."""
    return np.flatnonzero(np.asarray(gmm.weights) > 0).tolist()
