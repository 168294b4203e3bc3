"""The mass-flow picture: bars and ribbons can be read back from the axes."""

import numpy as np
import pytest
from chains import chain_fit, mixtures

import coupled_gmm as cg
from coupled_gmm.plot.courses import plot_mass_flow, plot_nodes


def ribbons(ax):
    """Of each ribbon, by its label: the heights at its left and right end."""
    found = {}
    for drawn in ax.collections:
        x, y = drawn.get_paths()[0].vertices.T
        found[drawn.get_label(), float(x.min().round(3))] = [np.ptp(y[x == end]) for end in (x.min(), x.max())]
    return found


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_ribbons_fill_the_bars(tau, tmp_path):
    """All that leaves a node is its masses, and all that enters; hatched and grey is what masses change by."""
    fit = chain_fit(mixtures((2, 3, 2)), tau=tau, times=(0, 1, 3), names=["a", "b", "price in $"])
    figure = plot_mass_flow(fit, least=0.0)
    (ax,) = figure.axes
    assert sorted(patch.get_height() for patch in ax.patches) == pytest.approx(
        sorted(np.concatenate([gmm.weights for gmm in fit.gmms])), rel=1e-5
    )
    drawn = ribbons(ax)
    starts = sorted({start for _, start in drawn})
    assert len(starts) == 2
    for v, start in enumerate(starts):
        ends = np.array([ends for (_, begins), ends in drawn.items() if begins == start])
        np.testing.assert_allclose(ends.sum(0), 1, atol=1e-3)
        plan = fit.plan((v, v + 1))
        born = [ends for (label, begins), ends in drawn.items() if begins == start and label.endswith("change")]
        if tau == 1:
            assert not born
            continue
        forward, backward = plan.conditionals()
        leaving, entering = fit.gmms[v].weights[:, None] * forward, fit.gmms[v + 1].weights * backward
        np.testing.assert_allclose(np.sum(born, axis=0)[1], np.maximum(entering - leaving, 0).sum(), atol=1e-3)
    assert bool(figure.legends) == (tau < 1)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["a", "b", "price in $"]
    figure.savefig(tmp_path / "p.png", dpi=40)


def test_refused():
    gmm = mixtures((2,))[0]
    with pytest.raises(TypeError, match=r"^fit: expected a GraphFit or a PairFit"):
        plot_mass_flow(gmm)
    with pytest.raises(ValueError, match=r"^least: must be .*at least 0"):
        plot_mass_flow(chain_fit(mixtures((1, 1)), times=(0, 1)), least=-1)
    assert isinstance(gmm, cg.GaussianMixture)


def test_clouds_of_a_course_have_a_panel_each(tmp_path):
    """In the order of times; of a component its own colour, as in the picture of masses; a node may have no cloud."""
    fit = chain_fit(mixtures((2, 3, 2)), times=(0, 1, 3), names=["a", "b", "price in $"])
    d = fit.gmms[0].n_features
    clouds = [np.random.default_rng(0).normal(size=(20, d)), None, np.zeros((5, d))]
    figure = plot_nodes(fit, clouds, max_points=7)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["a, time 0\n20 points, 7 shown", "b, time 1\nno cloud", "price in $, time 3\n5 points"]
    assert [sum(len(drawn.get_offsets()) for drawn in ax.collections) for ax in figure.axes] == [7, 0, 5]
    bars = {tuple(patch.get_facecolor()) for patch in plot_mass_flow(fit).axes[0].patches}
    ellipses = {tuple(patch.get_edgecolor()) for ax in figure.axes for patch in ax.patches}
    assert ellipses == bars
    figure.savefig(tmp_path / "p.png", dpi=40)
    with pytest.raises(ValueError, match=r"^clouds: expected one for each of the 3 nodes"):
        plot_nodes(fit, clouds[:2])
