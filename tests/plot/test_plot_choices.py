"""Pictures of choices and intervals: what they draw can be read back from their axes."""

import numpy as np
import pytest

import coupled_gmm as cg
from coupled_gmm.core.tree import unchecked
from coupled_gmm.plot import choices
from coupled_gmm.selection.bootstrap import Intervals


def choice(failed=False):
    """Of two numbers of components, two epsilons and three weights, without a fit."""
    rng = np.random.RandomState(0)
    sizes, epsilons, weights = np.meshgrid([1, 2], [0.1, 0.2], [0.0, 0.01, 1.0], indexing="ij")
    n = sizes.size
    scores = rng.randn(n, 4) + 3 * sizes.reshape(n, 1)
    if failed:
        scores[sizes.ravel() == 1] = -np.inf
    numbers = {
        name: np.zeros(n)
        for name in (
            "transport_weights",
            "log_likelihoods",
            "transport",
            "bic",
            "aic",
            "n_failed",
            "standard_errors",
            "lost",
            "dear",
        )
    }
    fields = {"n_components": sizes.ravel(), "epsilons": epsilons.ravel(), "relative_weights": weights.ravel()}
    fields |= {"rhos": np.full(n, np.inf), "groups": np.arange(n) // 3, "scores": scores, "row": np.array(7)}
    return unchecked(cg.Choice, fit=None, rule="one_standard_error", **numbers, **fields)


def test_a_line_for_each_number_of_components(tmp_path):
    made = choice()
    figure = choices.plot_choice(made)
    (ax,) = figure.axes
    lines = {container.get_label(): container[0] for container in ax.containers}
    assert set(lines) == {"K 1", "K 2"}
    means = made.scores.mean(axis=1).reshape(2, 2, 3)
    for size, label in enumerate(("K 1", "K 2")):
        best = means[size, np.argmax(means[size].max(axis=1))]
        np.testing.assert_allclose(lines[label].get_ydata(), best)
        np.testing.assert_allclose(lines[label].get_xdata(), [0.001, 0.01, 1.0])
    (ring,) = [line for line in ax.lines if line.get_label() == "chosen"]
    np.testing.assert_allclose([ring.get_xdata()[0], ring.get_ydata()[0]], [0.01, means.ravel()[7]])
    assert next(tick.get_text() for tick in ax.get_xticklabels()) == "0"
    figure.savefig(tmp_path / "choice.png", dpi=40)


def test_failed_rows_are_not_drawn():
    (ax,) = choices.plot_choice(choice(failed=True)).axes
    assert [container.get_label() for container in ax.containers] == ["K 2"]
    assert np.isfinite(ax.get_ylim()).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_intervals_stand_at_their_estimates(shape, tmp_path):
    rng = np.random.RandomState(1)
    plan, change = (Intervals.of(rng.rand(*s), rng.rand(20, *s), 0.9) for s in (shape, shape[:1]))
    sure = unchecked(cg.Bootstrap, plan=plan, mass_change=change, level=np.array(0.9))
    figure = choices.plot_intervals(sure)
    ax_plan, ax_change = figure.axes
    drawn = np.array([line.get_ydata() for line in ax_plan.lines])
    np.testing.assert_allclose(drawn, plan.estimate, rtol=1e-6)
    ends = np.array([[segment[:, 1] for segment in lines.get_segments()] for lines in ax_plan.collections])
    np.testing.assert_allclose(ends, np.stack([plan.low, plan.high], axis=-1), rtol=1e-6)
    np.testing.assert_allclose([line.get_ydata()[0] for line in ax_change.lines], change.estimate, rtol=1e-6)
    assert "90 % intervals" in ax_plan.get_title()
    figure.savefig(tmp_path / "intervals.png", dpi=40)
