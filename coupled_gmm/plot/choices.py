"""Pictures of choices and of how sure a fit is: held-out log-likelihood along weights, intervals of a plan's entries."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coupled_gmm.plot.style import component_colors, tidy


def plot_choice(choice: Any) -> Figure:
    """Held-out log-likelihood along the relative weights, a line for each number of components, and which row was chosen.

    Bars are one standard error of the difference to the best row, by folds in pairs: 0 at the best itself. Of several epsilons and
    rhos the line has those that did best for its number. Fits apart, at weight 0, stand at the left; rows of failed fits are left
    out.
    """
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    ax = figure.subplots()
    table = choice.table
    positive = [row["relative_weight"] for row in table if row["relative_weight"] > 0]
    apart = min(positive, default=1.0) / 10  # where weight 0 stands on a logarithmic axis
    sizes = sorted({row["n_components"] for row in table})
    for size, color in zip(sizes, component_colors(len(sizes)), strict=True):
        best = max((row for row in table if row["n_components"] == size), key=lambda row: row["held_out"])
        rows = [row for row in table if _alike(row, best) and np.isfinite(row["held_out"])]
        if rows:
            places = np.array([row["relative_weight"] or apart for row in rows])
            values, errors = (np.array([row[name] for row in rows]) for name in ("held_out", "loss_error"))
            ax.errorbar(places, values, errors, marker=".", color=color, capsize=2, label=f"K {size}")
    row = table[int(choice.row)]
    ax.plot(row["relative_weight"] or apart, row["held_out"], "o", ms=13, mfc="none", mec="black", label="chosen")
    if positive:
        ax.set_xscale("log")
        _name_zero(ax, apart)
    _show_upper(ax, [row["held_out"] for row in table])
    tidy(ax)
    ax.set_xlabel("relative weight of transport")
    ax.set_ylabel("held-out log-likelihood, mean per point, summed over clouds")
    ax.set_title(f"Chosen by {choice.rule.replace('_', ' ')}", fontsize=11)
    ax.legend(frameon=False)
    return figure


def _alike(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether rows differ in their weight alone."""
    return all(row[name] == other[name] for name in ("n_components", "epsilon", "rho"))


def _name_zero(ax: Axes, place: float) -> None:
    """A tick that says 0, left of those of the logarithmic axis."""
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if max(low, 3 * place) < tick < high]
    ax.set_xticks([place, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])


def _show_upper(ax: Axes, values: list[float]) -> None:
    """The rows that matter: what lies far below the upper half would press them into a line."""
    finite = np.asarray([value for value in values if np.isfinite(value)])
    if len(finite) > 1:
        top, middle = finite.max(), np.median(finite)
        room = max(top - middle, 1e-6 * (1 + abs(top)))
        ax.set_ylim(max(ax.get_ylim()[0], top - 3 * room), top + 0.3 * room)


def plot_intervals(sure: Any) -> Figure:
    """Intervals of the entries of a pair's plan and of its components' mass changes, with the fit's own numbers."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    ax_plan, ax_change = figure.subplots(1, 2, width_ratios=(2, 1))
    estimate = np.asarray(sure.plan.estimate)
    k0, k1 = estimate.shape
    colors = component_colors(k0)
    for i in range(k0):
        _draw_intervals(ax_plan, np.arange(k1) + (i - (k0 - 1) / 2) * 0.6 / k0, sure.plan, i, colors[i], f"from {i}")
        _draw_intervals(ax_change, np.array([i]), sure.mass_change, slice(i, i + 1), colors[i], "")
    level = f"{100 * float(sure.level):.4g} %"
    for ax, title, label in (
        (ax_plan, f"Mass of the plan, {level} intervals", "to component"),
        (ax_change, f"Factors of mass, {level} intervals", "component"),
    ):
        tidy(ax)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel(label)
    ax_plan.set_xticks(range(k1))
    ax_change.set_xticks(range(k0))
    ax_plan.legend(frameon=False)
    return figure


def _draw_intervals(ax: Axes, places: np.ndarray, intervals: Any, index: Any, color: Any, label: str) -> None:
    low, value, high = (np.asarray(leaf)[index] for leaf in (intervals.low, intervals.estimate, intervals.high))
    ax.vlines(places, low, high, color=color, linewidth=2)
    ax.plot(places, value, "o", color=color, label=label or None)
