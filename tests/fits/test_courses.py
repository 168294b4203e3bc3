"""Reading a fitted course: plans between any nodes, growth, ancestors, descendants, against sums over matrices in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import TIMES, chain_fit, fit_of, mixtures
from problems import random_mixture

import coupled_gmm as cg
from coupled_gmm.core.status import Status
from coupled_gmm.core.tree import unchecked

NAMES = ("dawn", "noon", "dusk", "night")


@pytest.fixture(scope="module", params=[1.0, 0.7], ids=["balanced", "unbalanced"])
def course(request):
    with jax.enable_x64(True):
        yield chain_fit(mixtures(), tau=request.param, names=NAMES)


def parts(fit):
    """Of each edge the matrix, and of each node the masses, in NumPy."""
    matrices = [np.asarray(fit.plan((i, i + 1)).matrix) for i in range(3)]
    return matrices, [np.asarray(gmm.weights) for gmm in fit.gmms]


def test_composed_plans(course, x64):
    """The law of the ends of a Markov chain, whose columns are kept; and the product of the factors by which masses change."""
    (p, q, r), masses = parts(course)
    plan = course.compose("dawn", "night")
    expected = np.einsum("ij,jk,kl->il", p, q / p.sum(0)[:, None], r / q.sum(0)[:, None])
    np.testing.assert_allclose(plan.matrix, expected, rtol=1e-9)
    np.testing.assert_allclose(plan.matrix.sum(0), r.sum(0), rtol=1e-9)
    jax.tree.map(np.testing.assert_array_equal, (plan.pair.gmm0, plan.pair.gmm1), (course.gmms[0], course.gmms[3]))
    going = [b * (m / m.sum(0)) / a[:, None] for m, a, b in zip((p, q, r), masses, masses[1:])]
    change = (going[0] @ going[1] @ going[2]).sum(1)
    np.testing.assert_allclose(plan.mass_change(), change, rtol=1e-3 if plan.pair.balanced else 1e-9)
    assert plan.pair.balanced == (course.plans.pair.balanced)
    back = course.compose(3, 0)
    np.testing.assert_array_equal(back.matrix, plan.matrix.T)
    for one, other in ((plan.reverse(), back), (course.compose(0, 1), course.plan((0, 1)))):
        np.testing.assert_array_equal(one.matrix, other.matrix)
    if plan.pair.balanced:
        np.testing.assert_allclose(plan.matrix.sum(1), masses[0], atol=2e-4)
        assert plan.marginal_error < 3e-4
        again = course.compose(0, 2).matrix / masses[2] @ course.plan((2, 3)).matrix
        np.testing.assert_allclose(again, plan.matrix, atol=1e-3)


def test_a_composed_plan_claims_no_optimality(course, x64):
    plan = course.compose(0, 2)
    assert plan.status == Status.COMPOSED and not plan.converged and plan.potentials is None
    plan.raise_if_failed()
    assert np.isinf(plan.duality_gap) and "composed" in repr(plan) and "not the optimal one" in plan.message
    np.testing.assert_allclose(plan.transport_cost, np.sum(np.asarray(plan.matrix) * cg.bures_cost_matrix(*ends(plan))))
    np.testing.assert_array_equal(plan.regularized_cost, plan.transport_cost)
    if plan.pair.balanced:
        assert plan.transport_cost >= cg.mw2_squared(*ends(plan)) - 1e-9
    with pytest.raises(TypeError, match="composed plan can't be differentiated"):
        jax.grad(lambda shift: jax.tree.map(lambda leaf: leaf + shift, plan).matrix.sum())(0.0)
    missed = unchecked(cg.GraphFit, **{**vars(course), "plans": short(course.plans)})
    assert missed.compose(0, 3).status == Status.NOT_CONVERGED


def short(plans):
    return unchecked(cg.Plan, **{**vars(plans), "status": plans.status.at[1].set(Status.NOT_CONVERGED)})


def ends(plan):
    return plan.pair.gmm0, plan.pair.gmm1


def test_a_composed_plan_maps_points(course, x64):
    """By its own rows, with the posteriors of its first mixture and maps from SciPy's matrix square roots."""
    from scipy.linalg import sqrtm
    from scipy.stats import multivariate_normal

    plan, x = course.compose(0, 2), np.random.RandomState(0).randn(5, 2)
    gmm0, gmm1 = (jax.tree.map(np.asarray, gmm) for gmm in ends(plan))
    rows = np.asarray(plan.matrix) / np.asarray(plan.matrix).sum(1, keepdims=True)
    density = [w * multivariate_normal.pdf(x, m, s) for w, m, s in zip(gmm0.weights, gmm0.means, gmm0.covariances)]
    posterior = (np.array(density) / np.sum(density, axis=0)).T
    expected = np.zeros_like(x)
    for k, (m0, s0) in enumerate(zip(gmm0.means, gmm0.covariances)):
        root, inverse = sqrtm(s0), np.linalg.inv(sqrtm(s0))
        for j, (m1, s1) in enumerate(zip(gmm1.means, gmm1.covariances)):
            image = m1 + (x - m0) @ np.real(inverse @ sqrtm(root @ s1 @ root) @ inverse)
            expected += (posterior[:, k] * rows[k, j])[:, None] * image
    np.testing.assert_allclose(cg.map_points(plan, x), expected, atol=1e-7)
    assert cg.interpolate(plan, 0.5).n_components == 4


def test_growth(course, x64, tmp_path):
    matrices, masses = parts(course)
    for i, (growth, m) in enumerate(zip(course.growth(), matrices, strict=True)):
        expected = (m / m.sum(0)) @ masses[i + 1] / masses[i]
        if course.plans.pair.balanced:
            expected = np.ones_like(expected)
        assert (growth.source, growth.target) == (i, i + 1)
        np.testing.assert_allclose(growth.change, expected, rtol=1e-9)
        np.testing.assert_allclose(growth.rate, np.log(expected) / (TIMES[i + 1] - TIMES[i]), rtol=1e-9)
    if not course.plans.pair.balanced:
        assert min(float(growth.rate.min()) for growth in course.growth()) < -0.01, "something dies here"
    path = tmp_path / "growth.npz"
    cg.save(path, course.growth())
    jax.tree.map(np.testing.assert_array_equal, cg.load(path), course.growth())
    timeless = unchecked(cg.GraphFit, **{**vars(course), "times": None})
    assert [growth.rate for growth in timeless.growth()] == [None] * 3


def test_ancestors_and_descendants(course, x64):
    for component in range(3):
        found = course.ancestors("night", component)
        for i, shares in enumerate(found):
            matrix = np.asarray(course.compose(i, 3).matrix)
            np.testing.assert_allclose(shares, matrix[:, component] / matrix[:, component].sum(), rtol=1e-9)
        assert len(found) == 3
    found = course.descendants(1, 2)
    assert len(found) == 2 and course.ancestors(0, 1) == course.descendants(3, 1) == []
    for j, shares in zip((2, 3), found):
        row = np.asarray(course.compose(1, j).matrix)[2]
        np.testing.assert_allclose(shares, row / row.sum(), rtol=1e-9)


def test_growth_multiplies_forward_in_time_however_nodes_are_numbered(course, x64):
    """The same course, its nodes numbered from its end."""
    turned = fit_of(
        cg.MixtureGraph.from_mixtures(
            course.gmms[::-1], [(1, 0), (2, 1), (3, 2)], epsilon=2.0, times=TIMES[::-1],
            rho=None if course.plans.pair.balanced else course.plans.pair.rho[::-1],
        )
    )  # fmt: skip
    np.testing.assert_allclose(turned.compose(3, 0).matrix, course.compose(0, 3).matrix, atol=1e-4)
    np.testing.assert_allclose(turned.compose(3, 0).mass_change(), course.compose(0, 3).mass_change(), atol=1e-3)
    for mine, theirs in zip(turned.ancestors(0, 1), course.ancestors(3, 1), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-3)


@functools.cache
def other_graphs():
    """A star, a cycle of four, two parts: of one size, so that all have one program for plans."""
    gmms, options = [random_mixture(seed, 2, 2) for seed in range(4)], {"epsilon": 1.0}
    square = [(0, 1), (1, 3), (3, 2), (0, 2)]
    return (
        fit_of(cg.star(gmms[0], gmms[1:], **options)),
        fit_of(cg.MixtureGraph.from_mixtures(gmms, square, **options)),
        fit_of(cg.MixtureGraph.from_mixtures(gmms, [(0, 1), (2, 3)], names=NAMES, **options)),
    )


def test_paths_through_other_graphs():
    star, cycle, parts = other_graphs()
    through = np.asarray(star.plan((1, 0)).matrix)
    expected = through / through.sum(0) @ np.asarray(star.plan((0, 3)).matrix)
    np.testing.assert_allclose(star.compose(1, 3).matrix, expected, rtol=1e-5)
    assert [shares is not None for shares in star.descendants(0, 0)] == [True] * 3
    assert [shares is not None for shares in star.ancestors(3, 0)] == [True, False, False]
    np.testing.assert_array_equal(cycle.compose(0, 2).matrix, cycle.plan((0, 2)).matrix)
    for ask, message in (
        (lambda: cycle.compose(0, 3), "^j: several shortest paths join node 0 and node 3; compose along"),
        (lambda: cycle.descendants(0, 0), "^node: several shortest paths join node 0 and node 3"),
        (lambda: parts.compose("dawn", "night"), "^j: no path of edges joins node 'dawn' and node 'night'"),
        (lambda: parts.compose("dawn", "nigth"), "^j: no node is called 'nigth'; the nodes are 'dawn', 'noon'"),
        (lambda: parts.plan(("dawn", "dusk")), "^edge: no edge joins nodes dawn and dusk"),
        (lambda: parts.plan(("dawn", "midday")), "^edge: no node is called 'midday'"),
        (lambda: parts.compose(1, 1), "^j: node 'noon' is i as well"),
        (lambda: parts.compose(-1, 1), "^i: there is no node -1"),
        (lambda: parts.ancestors(1, 2), "^component: node 'noon' has 2 components, and no number 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    assert parts.plan(("noon", "dawn")).matrix.shape == (2, 2)


def test_batches_and_traced_fits_are_refused():
    star = other_graphs()[0]
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), star)
    for ask in (lambda: batch.compose(0, 1), batch.growth, lambda: batch.ancestors(0, 0)):
        with pytest.raises(ValueError, match="holds several"):
            ask()
    with pytest.raises(ValueError, match="under a transformation"):
        jax.eval_shape(lambda fit: fit.compose(0, 1).matrix, star)
