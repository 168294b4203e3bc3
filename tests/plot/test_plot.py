"""Pictures: what they draw can be read back from their axes."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

import coupled_gmm as cg
from coupled_gmm.plot import fits, mixtures, plans, style


def mixture(n_components, d, seed):
    draw = np.random.default_rng(seed)
    roots = draw.normal(size=(n_components, d, d))
    covariances = roots @ roots.swapaxes(1, 2) + 0.1 * np.eye(d)
    return cg.GaussianMixture.from_moments(
        3 * draw.normal(size=(n_components, d)), covariances, draw.dirichlet(np.ones(n_components))
    )


def pair_and_clouds(d, sizes=(3, 2), n=40):
    pair = cg.GaussianMixturePair(mixture(sizes[0], d, 0), mixture(sizes[1], d, 1), 0.1)
    x0, x1 = np.random.default_rng(2).uniform(size=(2, n, d))
    return pair, x0, x1


def ellipses(ax):
    return [patch for patch in ax.patches if isinstance(patch, Ellipse)]


def save(figure, tmp_path):
    figure.savefig(tmp_path / "p.png", dpi=40)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_ellipses_lie_at_whole_standard_deviations():
    """Every point of the ellipse at s deviations has Mahalanobis distance s: a twin without eigenvalues."""
    gmm = mixture(3, 2, 0)
    ax = Figure().subplots()
    mixtures.plot_mixture(ax, gmm)
    drawn = ellipses(ax)
    assert len(drawn) == 6
    for patch, (k, sds) in zip(drawn, [(k, s) for k in range(3) for s in (1, 2)], strict=True):
        outline = patch.get_patch_transform().transform(patch.get_path().vertices[:-1:3])
        offset = outline - np.asarray(gmm.means[k])
        distance = np.sqrt(np.einsum("ni,ij,nj->n", offset, np.linalg.inv(gmm.covariances[k]), offset))
        np.testing.assert_allclose(distance, sds, rtol=1e-3)
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2"]


def test_zero_weights_are_not_drawn_and_singular_components_are():
    covariances = [np.diag([1.0, 0.0]), np.eye(2)]
    gmm = cg.GaussianMixture.from_moments(np.zeros((2, 2)), covariances, [1.0, 0.0])
    ax = Figure().subplots()
    mixtures.plot_mixture(ax, gmm)
    assert [patch.width for patch in ellipses(ax)] == [0, 0]
    assert [patch.height for patch in ellipses(ax)] == [2, 4]


def test_other_features_are_integrated_out():
    gmm = mixture(2, 4, 3)
    ax, marginal = Figure().subplots(1, 2)
    mixtures.plot_mixture(ax, gmm, axes=(3, 1))
    mixtures.plot_mixture(marginal, gmm.marginal([3, 1]))
    for one, other in zip(ellipses(ax), ellipses(marginal), strict=True):
        assert (one.width, one.height, one.angle) == (other.width, other.height, other.angle)


def test_densities_in_one_dimension_have_mass_one(tmp_path):
    pair, x0, x1 = pair_and_clouds(1)
    ax = Figure().subplots()
    mixtures.plot_mixture(ax, pair.gmm0)
    x, y = ax.lines[-1].get_data()
    assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-3)
    save(fits.plot_clouds(pair, x0, x1), tmp_path)


def test_points_have_the_colour_of_their_component(tmp_path):
    pair, x0, x1 = pair_and_clouds(2)
    figure = fits.plot_clouds(SimpleNamespace(pair=pair), x0, x1)
    for ax, gmm, x in zip(figure.axes, (pair.gmm0, pair.gmm1), (x0, x1), strict=True):
        (points,) = ax.collections
        found = {
            tuple(p): to_hex(c).upper() for p, c in zip(points.get_offsets(), points.get_facecolors(), strict=True)
        }
        wanted = np.argmax(np.asarray(gmm.log_posterior(x)), axis=1)
        assert [found[tuple(p)] for p in x] == [style.PALETTE[k] for k in wanted]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    save(figure, tmp_path)


def test_large_clouds_are_thinned():
    pair, x0, x1 = pair_and_clouds(2)
    figure = fits.plot_clouds(pair, x0, x1, max_points=10)
    assert [len(ax.collections[0].get_offsets()) for ax in figure.axes] == [10, 10]
    assert "40 points, 10 shown" in figure.axes[0].get_title()


def test_pixels_may_keep_their_own_colours(tmp_path):
    pair, x0, x1 = pair_and_clouds(3)
    figure = fits.plot_clouds(pair, x0, x1, axes=(0, 2), point_colors="own", feature_names=("red", "green", "blue"))
    points = figure.axes[0].collections[0]
    shown = np.asarray(points.get_facecolors())
    np.testing.assert_allclose(shown[:, [0, 2]], points.get_offsets())
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("red", "blue")
    save(figure, tmp_path)


def test_names_of_features_are_text_and_no_mathematics(tmp_path):
    """A run was lost when its pictures were drawn: matplotlib could not parse a column's name."""
    pair, x0, x1 = pair_and_clouds(2)
    save(fits.plot_clouds(pair, x0, x1, feature_names=("a$^{b$", "price in $")), tmp_path)


def test_colours_are_distinct_and_shared_by_both_panels():
    for n_components in (1, 8, 9, 40):
        colors = style.component_colors(n_components)
        assert len({to_hex(color) for color in colors}) == n_components
    pair, x0, x1 = pair_and_clouds(2, sizes=(9, 3))
    left, right = (ellipses(ax) for ax in fits.plot_clouds(pair, x0, x1).axes)
    assert [e.get_edgecolor() for e in left[:6]] == [e.get_edgecolor() for e in right]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": (0, 0)}, "axes: expected two distinct features between 0 and 1, got (0, 0)"),
        ({"axes": (0, 2)}, "axes: expected two distinct features between 0 and 1, got (0, 2)"),
        ({"point_colors": "own"}, "point_colors: 'own' needs points of 3 features (red, green, blue), got 2"),
        ({"point_colors": "red"}, "point_colors: expected one of 'component', 'own', got 'red'"),
        ({"feature_names": ["x"]}, "feature_names: expected 2 names, got 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    pair, x0, x1 = pair_and_clouds(2)
    with pytest.raises(ValueError, match=re.escape(message)):
        fits.plot_clouds(pair, x0, x1, **options)


@pytest.mark.parametrize(("sizes", "numbers"), [((1, 1), True), ((5, 12), True), ((20, 13), False)])
def test_plans_show_numbers_where_there_is_room(sizes, numbers, tmp_path):
    pair, _, _ = pair_and_clouds(2, sizes)
    plan = cg.solve_plan(pair)
    figure = plans.plot_plan(plan)
    heat = next(ax for ax in figure.axes if ax.images)
    matrix = np.asarray(plan.matrix)
    np.testing.assert_allclose(heat.images[0].get_array(), matrix)
    shown = {tuple(map(int, t.get_position()[::-1])): float(t.get_text()) for t in heat.texts}
    wanted = {k: round(float(mass), 3) for k, mass in np.ndenumerate(matrix) if mass >= 5e-4}
    assert shown == pytest.approx(wanted if numbers else {})
    assert f"marginal error {float(plan.marginal_error):.1e}" in figure.get_suptitle()
    save(figure, tmp_path)


def test_unbalanced_plans_name_their_mass():
    pair, _, _ = pair_and_clouds(2)
    plan = cg.solve_plan(cg.GaussianMixturePair.from_rho(pair.gmm0, pair.gmm1, 0.1, 1.0))
    assert f"total mass {float(plan.total_mass):.4f}" in plans.plot_plan(plan).get_suptitle()


def links(ax):
    """Ends of the links and their widths."""
    (collection,) = (c for c in ax.collections if isinstance(c, LineCollection))
    return np.array(collection.get_segments()), np.array(collection.get_linewidths())


@pytest.mark.parametrize("method", ["exact", "entropic"])
@pytest.mark.parametrize(("d", "axes"), [(2, (0, 1)), (4, (3, 1))])
def test_links_carry_the_plan(d, axes, method, tmp_path):
    """Summed over the links that leave a component, widths are its mass: a twin that does not read the plan."""
    pair, _, _ = pair_and_clouds(d)
    plan = cg.solve_plan(pair, method=method)
    figure = Figure()
    ax = figure.subplots()
    plans.plot_links(ax, plan, axes=axes, width=10, least=0)
    ends, widths = links(ax)
    for end, gmm in enumerate((pair.gmm0, pair.gmm1)):
        for mean, weight in zip(np.asarray(gmm.means)[:, list(axes)], gmm.weights, strict=True):
            here = np.all(np.isclose(ends[:, end], mean), axis=1)
            assert widths[here].sum() == pytest.approx(10 * float(weight), rel=1e-3)
    assert len(ends) == np.sum(np.asarray(plan.matrix) > 0)
    assert len(ellipses(ax)) == 3 + 2
    assert len({e.get_edgecolor() for e in ellipses(ax)[:3]} & {e.get_edgecolor() for e in ellipses(ax)[3:]}) == 0
    for corner in ends.reshape(-1, 2):
        assert ax.viewLim.contains(*corner)
    save(figure, tmp_path)


def test_small_links_are_left_out():
    pair, _, _ = pair_and_clouds(2)
    plan = SimpleNamespace(pair=pair, matrix=np.array([[0.2, 0.0], [0.05, 0.00041], [0.1, 0.05]]))
    ax, fewer = Figure().subplots(1, 2)
    plans.plot_links(ax, plan, width=100)
    np.testing.assert_allclose(links(ax)[1], [20, 5, 0.041, 10, 5])  # more than a thousandth of 0.40041, which is all
    plans.plot_links(fewer, plan, width=100, least=0.01)
    np.testing.assert_allclose(links(fewer)[1], [20, 5, 10, 5])


def test_links_cross_between_densities_in_one_dimension(tmp_path):
    pair, _, _ = pair_and_clouds(1)
    plan = cg.solve_plan(pair, method="exact")
    figure = Figure()
    ax = figure.subplots()
    plans.plot_links(ax, plan)
    ends, widths = links(ax)
    assert np.all(ends[:, 0, 1] == 0) and np.all(ends[:, 1, 1] == -1)
    assert widths.sum() == pytest.approx(14, rel=1e-5)
    upper, lower = (line.get_ydata() for line in ax.lines if line.get_label() == "mixture")
    assert (upper.min() >= 0, upper.max(), lower.max() <= -1, lower.min()) == pytest.approx((True, 1, True, -2))
    save(figure, tmp_path)


def test_what_moves_nothing_has_no_links():
    pair, _, _ = pair_and_clouds(2)
    ax = Figure().subplots()
    plans.plot_links(ax, SimpleNamespace(pair=pair, matrix=np.zeros((3, 2))))
    assert len(links(ax)[0]) == 0


@pytest.mark.parametrize("axes", [(0, 0), (0, 2), (-1, 0)])
def test_axes_of_plans_are_checked(axes):
    plan = cg.solve_plan(pair_and_clouds(2)[0], method="exact")
    message = re.escape(f"axes: expected two distinct features between 0 and 1, got {axes}")
    with pytest.raises(ValueError, match=message):
        plans.plot_links(Figure().subplots(), plan, axes=axes)
    with pytest.raises(ValueError, match=message):
        plans.plot_interpolation(plan, axes=axes)


@pytest.mark.parametrize(("d", "axes"), [(2, (0, 1)), (3, (2, 0))])
def test_interpolation_begins_and_ends_with_the_mixtures(d, axes, tmp_path):
    """At both ends each ellipse is a component's own, and their ink is shared as the weights are."""
    pair, _, _ = pair_and_clouds(d)
    figure = plans.plot_interpolation(cg.solve_plan(pair, method="exact"), (0, 0.3, 1), axes=axes, n_sds=(1,))
    assert [ax.get_title() for ax in figure.axes] == ["t = 0", "t = 0.3", "t = 1"]
    first, between, last = (ellipses(ax) for ax in figure.axes)
    for drawn, gmm in ((first, pair.gmm0), (last, pair.gmm1)):
        ink = np.array([e.get_facecolor()[3] for e in drawn])
        centres = np.array([e.get_center() for e in drawn])
        for mean, weight in zip(np.asarray(gmm.means)[:, list(axes)], gmm.weights, strict=True):
            here = np.all(np.isclose(centres, mean, atol=1e-5), axis=1)
            assert ink[here].sum() / ink.sum() == pytest.approx(float(weight), rel=1e-4)
    assert 0 < len(between) <= 3 + 2 - 1
    assert to_hex(first[0].get_facecolor()).upper() == style.PALETTE[0]
    assert to_hex(last[0].get_facecolor()).upper() == style.PALETTE[1]
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    save(figure, tmp_path)


def test_interpolation_of_densities_has_mass_one(tmp_path):
    figure = plans.plot_interpolation(cg.solve_plan(pair_and_clouds(1)[0], method="exact"), [0.5])
    x, y = figure.axes[0].lines[-1].get_data()
    assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-3)
    save(figure, tmp_path)


@pytest.mark.parametrize(
    ("times", "message"), [((), "times: expected at least one"), ((0, 1.5), "t: must be at least 0")]
)
def test_times_are_checked(times, message):
    plan = cg.solve_plan(pair_and_clouds(2)[0], method="exact")
    with pytest.raises(ValueError, match=re.escape(message)):
        plans.plot_interpolation(plan, times)


def test_history_has_a_curve_for_each_column(tmp_path):
    steps = np.where(np.arange(6) < 4, np.arange(6.0), np.nan)
    columns = {"q0": steps, "q1": steps + 1, "penalized_log_likelihood": steps + 2, "transport": steps + 3}
    q = np.stack([steps, 0 * steps, steps + 1], axis=1)  # the second of three nodes has no cloud
    figure = fits.plot_history(SimpleNamespace(history=SimpleNamespace(q=q, **columns)))
    drawn = [line.get_ydata() for ax in figure.axes for line in ax.lines]
    for line, column in zip(drawn, [*columns.values(), [3, 2, 1, np.nan, np.nan, np.nan]], strict=True):
        np.testing.assert_array_equal(line, column)
    save(figure, tmp_path)


def test_importing_the_package_imports_no_faces():
    """OTT imports matplotlib by itself; ours is not to blame, and pictures, terminal and configuration stay out."""
    faces = "{'coupled_gmm.plot.style', 'coupled_gmm.cli', 'rich', 'typer', 'pydantic'}"
    program = f"import sys, coupled_gmm; assert not {faces} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
