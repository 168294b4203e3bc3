"""Labelled clouds: their mixtures against NumPy's and scikit-learn's, and what a plan says of another cloud's classes."""

import jax
import numpy as np
import pytest
import twins
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import coupled_gmm as cg

SIZES = {"b": 40, "a": 25, "rare": 2}
CENTRES = {"b": [0.0, 0, 0], "a": [5.0, 0, 1], "rare": [0.0, 6, 0]}


def cloud(sizes, seed=0, shift=0.0):
    rng = np.random.RandomState(seed)
    x = np.concatenate([np.array(CENTRES[name]) + shift + rng.randn(n, 3) * [1, 0.5, 2] for name, n in sizes.items()])
    return x, np.repeat(list(sizes), list(sizes.values()))


X, LABELS = cloud(SIZES)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_of_classes(offset):
    order = ["a", "b", "rare"]
    inside = [np.cov(X[name == LABELS].T, bias=True) for name in order]
    shares = np.array([SIZES[name] for name in order]) / len(X)
    pooled = LinearDiscriminantAnalysis(solver="lsqr").fit(X, LABELS).covariance_
    for tied, t in ((0, np.zeros(3)), (1, np.ones(3)), (None, 3 / (np.array([25, 40, 2]) + 3))):
        classes = cg.fit_classes(X + offset, list(LABELS), tied=tied, ridge=0.01)
        assert classes.names == ("a", "b", "rare")
        np.testing.assert_allclose(np.asarray(classes.weights), shares, rtol=1e-5)
        remainders = 0 if classes.gmm.remainders is None else np.asarray(classes.gmm.remainders, np.float64)
        means = np.asarray(classes.gmm.means, np.float64) + remainders - offset
        np.testing.assert_allclose(means, [X[name == LABELS].mean(0) for name in order], atol=1e-5 + 1e-7 * offset)
        expected = [(1 - u) * s + u * pooled + 0.01 * np.diag(X.var(0)) for u, s in zip(t, inside)]
        np.testing.assert_allclose(np.asarray(classes.gmm.covariances), expected, rtol=1e-4, atol=1e-5)


def test_a_point_of_weight_two_is_two_points():
    twice = LABELS == "b"
    by_weight = cg.fit_classes(X, LABELS, point_weights=1 + twice, tied=0.5)
    by_copy = cg.fit_classes(np.r_[X, X[twice]], np.r_[LABELS, LABELS[twice]], tied=0.5)
    for one, other in zip(jax.tree.leaves(by_weight.gmm), jax.tree.leaves(by_copy.gmm), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_plan_tells_proportions_and_labels():
    """Unbalanced, the classes of a cloud in which they have other parts; balanced, those of the labelled one."""
    classes = cg.fit_classes(X, LABELS)
    sizes = {"b": 15, "a": 120, "rare": 30}
    y, truth = cloud(sizes, seed=1, shift=0.5)
    found = {}
    for rho in (1.0, np.inf):
        pair = cg.GaussianMixturePair(classes.gmm, classes.gmm, rho=rho, links=classes.links())
        fit = cg.fit_pair(X, y, pair, transport_weight=1e-2, freeze=["gmm0"])
        plan, posterior = fit.plan, np.asarray(classes.posterior(fit.plan, y), np.float64)
        found[rho] = np.asarray(classes.proportions(plan), np.float64)
        matrix = np.asarray(plan.matrix, np.float64)
        gmm1 = [
            np.asarray(leaf, np.float64)
            for leaf in (fit.pair.gmm1.means, fit.pair.gmm1.covariances, fit.pair.gmm1.weights)
        ]
        origins = matrix / matrix.sum(0)  # a component a class: the twin needs no sums
        np.testing.assert_allclose(posterior, twins.posterior(y, *gmm1) @ origins.T, atol=2e-4)
        np.testing.assert_allclose(found[rho], origins @ gmm1[2] / gmm1[2].sum(), atol=1e-5)
        np.testing.assert_allclose(posterior.sum(1), 1, atol=1e-5)
        if rho == 1.0:
            assert np.mean(classes.predict(plan, y) == truth) > 0.97
    np.testing.assert_allclose(found[1.0], np.array([120, 15, 30]) / 165, atol=0.03)
    np.testing.assert_allclose(found[np.inf], np.asarray(classes.weights), atol=2e-5)


@pytest.mark.slow
def test_classes_of_several_components():
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.randn(60, 2) + shift for shift in ([0, 0], [6, 0], [0, 6])] + [[[9.0, 9.0]]])
    labels = np.r_[np.zeros(120, int), np.ones(60, int), 7]
    classes = cg.fit_classes(x, labels, n_components=2, key=jax.random.key(0))
    assert classes.names == (0, 1, 7) and np.asarray(classes.of_component).tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(np.asarray(classes.weights), np.array([120, 60, 1]) / 181, rtol=1e-4)
    means = np.asarray(classes.gmm.means)[:2]
    np.testing.assert_allclose(means[np.argsort(means[:, 0])], [[0, 0], [6, 0]], atol=0.5)
    kin = np.asarray(classes.of_component)
    np.testing.assert_array_equal(classes.links(), kin[:, None] == kin)
    plan = cg.solve_plan(cg.GaussianMixturePair(classes.gmm, classes.gmm, links=classes.links()))
    np.testing.assert_allclose(np.asarray(classes.proportions(plan)), np.asarray(classes.weights), atol=1e-4)
    assert np.mean(classes.predict(plan, x) == labels) > 0.97


def test_links_by_class(tmp_path):
    classes = cg.fit_classes(X, LABELS)
    cg.save(tmp_path / "classes.npz", {"words": classes, "numbers": cg.fit_classes(X, np.arange(67) % 3)})
    loaded = cg.load(tmp_path / "classes.npz")
    assert loaded["words"].names == ("a", "b", "rare") and loaded["numbers"].names == (0, 1, 2)
    np.testing.assert_array_equal(np.asarray(loaded["words"].of_component), [0, 1, 2])
    np.testing.assert_array_equal(classes.links(), np.eye(3, dtype=bool))
    np.testing.assert_array_equal(classes.links(forbidden=[("a", "rare")]), [[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="no class 'c'"):
        classes.links(forbidden=[("a", "c")])


@pytest.mark.parametrize(
    ("match", "labels", "kwargs"),
    [
        ("one for each of the 67 points", LABELS[1:], {}),
        ("labels: expected words or whole numbers, got float64", np.ones(67), {}),
        ("labels: expected words or whole numbers, got NoneType, str", [None, *LABELS[1:]], {}),
        ("class 'rare' has no point of positive weight", LABELS, {"point_weights": LABELS != "rare"}),
        ("tied", LABELS, {"tied": 1.5}),
        ("ridge", LABELS, {"ridge": -1.0}),
        ("key: goes with an n_components above 1", LABELS, {"n_components": 2}),
    ],
)
def test_what_is_refused(match, labels, kwargs):
    with pytest.raises((ValueError, TypeError), match=match):
        cg.fit_classes(X, labels, **kwargs)


def test_a_plan_of_other_components_is_refused():
    classes = cg.fit_classes(X, LABELS)
    plan = cg.solve_plan(
        cg.GaussianMixturePair(cg.GaussianMixture.from_moments([[0.0] * 3], [np.eye(3)], [1.0]), classes.gmm)
    )
    with pytest.raises(ValueError, match="from 1 components, and the classes have 3"):
        classes.proportions(plan)
    np.testing.assert_allclose(np.asarray(classes.proportions(plan.reverse())), np.asarray(classes.weights), atol=1e-4)
