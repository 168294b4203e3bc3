"""Pictures of barycenters and flows: what they draw can be read back."""

import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Ellipse
from PIL import Image

import coupled_gmm as cg
from coupled_gmm.plot import barycenters


def mixture(n_components, d, seed):
    draw = np.random.default_rng(seed)
    roots = draw.normal(size=(n_components, d, d))
    covariances = roots @ roots.swapaxes(1, 2) + 0.1 * np.eye(d)
    weights = draw.dirichlet(np.ones(n_components))
    return cg.GaussianMixture.from_moments(3 * draw.normal(size=(n_components, d)), covariances, weights)


def flow(d, steps=6, sizes=(3, 2)):
    """A path along which means, covariances and weights go straight to the target's, no solver asked."""
    source, target = mixture(sizes[0], d, 0), mixture(sizes[0], d, 1)
    path = jax.tree.map(lambda a, b: jnp.stack([a + t * (b - a) for t in np.linspace(0, 1, steps + 1)]), source, target)
    losses = np.geomspace(1, 1e-3, steps + 1)
    return SimpleNamespace(path=path, gmm=target, loss=losses[-1], history=SimpleNamespace(loss=losses[:-1])), mixture(
        sizes[1], d, 2
    )


def ellipses(ax):
    return [patch for patch in ax.patches if isinstance(patch, Ellipse)]


def inside(ax, gmm, axes=(0, 1)):
    """Whether the axes hold every ellipse of a mixture: mean plus and minus a standard deviation in both features."""
    reach = np.sqrt(np.diagonal(gmm.covariances, axis1=1, axis2=2))
    corners = np.concatenate([gmm.means - reach, gmm.means + reach])[:, list(axes)]
    return all(ax.viewLim.contains(*corner) for corner in corners)


def save(figure, tmp_path):
    figure.savefig(tmp_path / "p.png", dpi=40)
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(("d", "axes"), [(2, (0, 1)), (4, (3, 1))])
def test_barycenters_and_mixtures_are_told_apart(d, axes, tmp_path):
    gmms, middle = [mixture(size, d, size) for size in (3, 4, 2)], mixture(5, d, 9)
    figure = barycenters.plot_barycenter(middle, gmms, axes=axes)
    (ax,) = figure.axes
    drawn = ellipses(ax)
    assert len(drawn) == 3 + 4 + 2 + 5
    first = 0
    for gmm in [*gmms, middle]:
        mine = drawn[first : first + gmm.n_components]
        first += gmm.n_components
        np.testing.assert_allclose([e.get_center() for e in mine], gmm.means[:, list(axes)], rtol=1e-6)
        ink = np.array([e.get_edgecolor()[3] for e in mine])
        np.testing.assert_allclose(ink / ink.sum(), gmm.weights, rtol=1e-5)
        np.testing.assert_allclose([e.get_facecolor()[3] for e in mine], ink / 2)
        assert inside(ax, gmm, axes)
    assert len({to_hex(e.get_facecolor()) for e in drawn}) == 4
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["mixture 0", "mixture 1", "mixture 2", "barycenter"]
    save(figure, tmp_path)


def test_ellipses_lie_at_one_standard_deviation():
    gmm = mixture(3, 2, 0)
    (ax,) = barycenters.plot_barycenter(gmm, [gmm]).axes
    for patch, mean, covariance in zip(ellipses(ax), np.tile(gmm.means, (2, 1)), np.tile(gmm.covariances, (2, 1, 1))):
        offset = patch.get_patch_transform().transform(patch.get_path().vertices[:-1:3]) - mean
        np.testing.assert_allclose(np.einsum("ni,ij,nj->n", offset, np.linalg.inv(covariance), offset), 1, rtol=1e-3)


def test_many_mixtures_have_colours_of_their_own():
    figure = barycenters.plot_barycenter(mixture(1, 2, 0), [mixture(1, 2, i) for i in range(20)])
    assert len({to_hex(e.get_facecolor()) for e in ellipses(figure.axes[0])}) == 21


def test_components_without_weight_are_not_drawn():
    gmm = cg.GaussianMixture.from_moments([[0.0, 0], [99, 99]], [np.eye(2), np.eye(2)], [1.0, 0])
    (ax,) = barycenters.plot_barycenter(gmm, [gmm]).axes
    assert len(ellipses(ax)) == 2
    assert not ax.viewLim.contains(99, 99)


@pytest.mark.parametrize(("d", "axes"), [(2, (0, 1)), (3, (2, 0))])
def test_flows_show_every_step_by_time_and_weight(d, axes, tmp_path):
    fit, target = flow(d)
    figure = barycenters.plot_flow(fit, target, axes=axes)
    ax, bar = figure.axes
    assert len(ellipses(ax)) == 3 + 3 + 2  # start, end, target
    (between,) = (c for c in ax.collections if isinstance(c, PatchCollection))
    assert len(between.get_paths()) == 7 * 3
    shades = np.asarray(between.get_edgecolors()).reshape(7, 3, 4)
    assert len({to_hex(color) for color in shades[:, 0]}) == 7
    weights = np.asarray(fit.path.weights)
    np.testing.assert_allclose(shades[..., 3], weights / weights.max(), rtol=1e-5)
    start, end, aims = ellipses(ax)[:3], ellipses(ax)[3:6], ellipses(ax)[6:]
    for drawn, gmm in ((start, jax.tree.map(lambda leaf: leaf[0], fit.path)), (end, fit.gmm), (aims, target)):
        np.testing.assert_allclose([e.get_center() for e in drawn], gmm.means[:, list(axes)], rtol=1e-5)
        ink = np.array([e.get_edgecolor()[3] for e in drawn])
        np.testing.assert_allclose(ink / ink.sum(), gmm.weights, rtol=1e-5)
        assert inside(ax, gmm, axes)
    assert {e.get_linestyle() for e in start + end} == {"-"} and {e.get_linestyle() for e in aims} == {"--"}
    assert bar.get_ylabel() == "step" and bar.get_ylim() == (0, 6)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["start", "end", "target"]
    save(figure, tmp_path)


def test_targets_may_be_several():
    fit, target = flow(2)
    figure = barycenters.plot_flow(fit, [target, mixture(4, 2, 5)])
    aims = ellipses(figure.axes[0])[6:]
    assert len(aims) == 2 + 4
    assert len({to_hex(e.get_edgecolor()) for e in aims}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["start", "end", "target 0", "target 1"]


def test_one_feature_is_drawn_as_densities(tmp_path):
    fit, target = flow(1)
    for figure, count in (
        (barycenters.plot_flow(fit, target), 7 + 3),
        (barycenters.plot_barycenter(target, [fit.gmm]), 2),
    ):
        lines = figure.axes[0].lines
        assert len(lines) == count
        for line in lines:
            x, y = line.get_data()
            assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-3)
        save(figure, tmp_path)


def test_a_solved_flow_is_drawn(tmp_path):
    target = mixture(2, 2, 1)
    fit = cg.flow(mixture(3, 2, 0), target, steps=4)
    save(barycenters.plot_flow(fit, target), tmp_path)
    save(barycenters.plot_loss(fit.history.loss, title="Loss", ylabel="loss"), tmp_path)


@pytest.mark.parametrize("values", [[3.0, 1.0, 0.5, np.nan, np.nan], [2.0, 0.0, -1.0], [1e-9, 1e-12, 0.0]])
def test_losses_are_shown_twice(values, tmp_path):
    figure = barycenters.plot_loss(values, title="Loss", ylabel="loss", xlabel="iteration")
    linear, log = figure.axes
    np.testing.assert_array_equal(linear.lines[0].get_ydata(), values)
    np.testing.assert_array_equal(log.lines[0].get_ydata(), np.where(np.array(values) > 0, values, np.nan))
    assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
    assert {ax.get_xlabel() for ax in figure.axes} == {"iteration"}
    assert figure.get_suptitle() == "Loss"
    save(figure, tmp_path)


def test_what_is_nowhere_positive_has_no_logarithm():
    assert len(barycenters.plot_loss([0.0, -1.0], title="Loss", ylabel="loss").axes) == 1


@pytest.mark.parametrize(("d", "n_frames", "shown"), [(2, 4, 4), (2, 1, 1), (2, 50, 7), (1, 3, 3)])
def test_animations_open_with_their_frames(d, n_frames, shown, tmp_path, capfd):
    fit, target = flow(d)
    barycenters.save_animation(tmp_path / "flow.gif", fit, target, n_frames=n_frames, fps=10)
    with Image.open(tmp_path / "flow.gif") as image:
        assert (image.format, image.n_frames) == ("GIF", shown)
        assert shown == 1 or image.info["duration"] == 100
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "n_frames"), [({"n_frames": 10}, 10), pytest.param({}, 50, marks=pytest.mark.slow)]
)
def test_animations_are_small_and_move(tmp_path, options, n_frames):
    """The fifty frames that they have by default take 1 MB at most."""
    fit, target = flow(2, steps=60, sizes=(6, 5))
    barycenters.save_animation(str(tmp_path / "flow.gif"), fit, target, **options)
    assert (tmp_path / "flow.gif").stat().st_size < 1e6 * n_frames / 50
    with Image.open(tmp_path / "flow.gif") as image:
        assert image.n_frames == n_frames
        frames = []
        for i in (0, n_frames // 2, n_frames - 1):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB"), float))
    assert all(np.abs(a - b).max() > 50 for a, b in itertools.pairwise(frames))


BAD = [
    (lambda fit, g: barycenters.plot_barycenter(g, []), ValueError, "gmms: the list is empty"),
    (lambda fit, g: barycenters.plot_barycenter(g, g), TypeError, "gmms: expected a list"),
    (lambda fit, g: barycenters.plot_barycenter(g, [g, 3]), TypeError, "gmms[1]: expected a GaussianMixture"),
    (lambda fit, g: barycenters.plot_barycenter(fit, [g]), TypeError, "gmm: expected a GaussianMixture"),
    (
        lambda fit, g: barycenters.plot_barycenter(g, [mixture(1, 3, 0)]),
        ValueError,
        "gmms[0]: has 3 features, expected 2",
    ),
    (
        lambda fit, g: barycenters.plot_barycenter(g, [g], axes=(0, 2)),
        ValueError,
        "axes: expected two distinct features",
    ),
    (lambda fit, g: barycenters.plot_flow(fit, []), ValueError, "targets: the list is empty"),
    (lambda fit, g: barycenters.plot_flow(fit, [g, mixture(1, 1, 0)]), ValueError, "targets[1]: has 1 features"),
    (lambda fit, g: barycenters.plot_flow(fit, g, axes=(1, 1)), ValueError, "axes: expected two distinct features"),
    (lambda fit, g: barycenters.plot_loss([[1.0]], title="", ylabel=""), ValueError, "values: expected shape (steps,)"),
    (lambda fit, g: barycenters.plot_loss([np.nan], title="", ylabel=""), ValueError, "values: none is finite"),
    (
        lambda fit, g: barycenters.save_animation("flow.mp4", fit, g),
        ValueError,
        "path: must end in .gif, got 'flow.mp4'",
    ),
    (
        lambda fit, g: barycenters.save_animation("f.gif", fit, g, n_frames=0),
        ValueError,
        "n_frames: must be at least 1",
    ),
    (lambda fit, g: barycenters.save_animation("f.gif", fit, g, fps=0), ValueError, "fps: must be at least 1"),
    (lambda fit, g: barycenters.save_animation("f.gif", fit, g, axes=(0, 2)), ValueError, "axes: expected two"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_arguments_are_refused(call, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        call(*flow(2))
    assert not list(tmp_path.iterdir())


def test_batches_of_flows_are_refused():
    fit, target = flow(2)
    batch = SimpleNamespace(path=jax.tree.map(lambda leaf: leaf[None], fit.path))
    with pytest.raises(ValueError, match="fit: holds a batch of flows; take one"):
        barycenters.plot_flow(batch, target)


def test_flows_that_failed_are_refused():
    fit, target = flow(2)
    failed = SimpleNamespace(path=jax.tree.map(lambda leaf: leaf.at[-1].set(jnp.nan), fit.path))
    with pytest.raises(ValueError, match="fit: its path holds values that are not finite"):
        barycenters.plot_flow(failed, target)
