"""What all pictures share: colours, ellipses, tidy axes, which features are shown."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

from coupled_gmm.core.errors import ArgumentError

# Okabe & Ito's palette: told apart with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")


def component_colors(n_components: int) -> list[Any]:
    """A colour for each component; past the palette's eight, equal steps of viridis."""
    if n_components <= len(PALETTE):
        return list(PALETTE[:n_components])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.93, n_components)))


def ellipse(mean: np.ndarray, covariance: np.ndarray, sds: float, **style: Any) -> Ellipse:
    """The ellipse at so many standard deviations; a line or a point where variances vanish."""
    variances, directions = np.linalg.eigh(covariance)
    width, height = 2 * sds * np.sqrt(np.maximum(variances, 0))
    angle = math.degrees(math.atan2(directions[1, 0], directions[0, 0]))
    return Ellipse((mean[0], mean[1]), width, height, angle=angle, **style)


def tidy(ax: Axes) -> None:
    """A faint grid, and no frame above and to the right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)


def two_features(axes: Sequence[int], d: int) -> tuple[int, int]:
    """`axes`, if they are two of d features."""
    if len(axes) != 2 or axes[0] == axes[1] or not all(0 <= axis < d for axis in axes):
        raise ArgumentError("axes", f"expected two distinct features between 0 and {d - 1}, got {tuple(axes)}")
    return int(axes[0]), int(axes[1])
