"""Plans, pairs and mixtures stacked on a leading axis: the right batched answer, or a refusal that names [i]; and reversal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_mixture

import coupled_gmm as cg

PROPERTIES = (
    "matrix", "normalized_matrix", "total_mass", "transport_cost", "regularized_cost", "normalized_cost", "mass_penalty",
    "cost_bound", "marginal_error", "duality_gap", "cost_parts", "converged",
)  # fmt: skip


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def pairs(n=2, **options):
    return [
        cg.GaussianMixturePair(random_mixture(s, 3, 2), random_mixture(s + 50, 3, 2), 1.0, **options) for s in range(n)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "method"), [({"rho": (1.0, 5.0)}, "entropic"), ({}, "exact")])
def test_a_stacked_plan_reads_as_its_plans(x64, options, method):
    plans = [cg.solve_plan(pair, method=method) for pair in pairs(**options)]
    stacked = stack(plans)
    assert len(stacked) == 2 and stacked.batch_shape == (2,) and bool(stacked)
    for name in PROPERTIES:
        expected = stack([getattr(plan, name) for plan in plans])
        jax.tree.map(np.testing.assert_allclose, getattr(stacked, name), expected)
    x = np.random.RandomState(0).randn(4, 2)
    for read in (
        lambda p: p.conditionals(),
        lambda p: p.reweighting(),
        lambda p: p.point_reweighting(x),
        lambda p: p.mass_change(),
        lambda p: p.reverse().matrix,
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), read(stacked), stack(map(read, plans)))
    for one, expected in zip(stacked, plans):
        jax.tree.map(np.testing.assert_array_equal, one, expected)
    jax.tree.map(np.testing.assert_array_equal, stacked[-1], plans[1])
    assert len(stacked[:1]) == 1
    np.testing.assert_allclose(stack([stacked, stacked]).matrix[1], stacked.matrix)
    with pytest.raises(IndexError, match="no number 2"):
        stacked[2]


def test_stacked_pairs_and_mixtures():
    both = pairs(rho=(1.0, 5.0))
    stacked = stack(both)
    np.testing.assert_allclose(stacked.cost_matrix()[1], both[1].cost_matrix(), rtol=1e-5)
    for name in ("rho0", "rho1", "tau"):
        np.testing.assert_allclose(getattr(stacked, name), stack([getattr(pair, name) for pair in both]))
    np.testing.assert_allclose(stacked.reverse().rho0, stacked.rho1)
    gmm = stacked.gmm0
    assert len(gmm) == 2 and [one.n_components for one in gmm] == [3, 3]
    np.testing.assert_allclose(gmm.mean()[1], gmm[1].mean())
    np.testing.assert_allclose(gmm.covariance()[1], gmm[1].covariance(), rtol=1e-6)
    path = cg.flow(both[0].gmm0, both[0].gmm1, steps=3).path
    assert len(path) == 4 and path[0].means.shape == (3, 2)


x = np.zeros((2, 2))
REFUSED = {
    "mw2_squared": lambda p: cg.mw2_squared(p.pair.gmm0, p.pair.gmm1[0]),
    "bures_cost_matrix": lambda p: cg.bures_cost_matrix(p.pair.gmm0[0], p.pair.gmm1),
    "pair": lambda p: cg.GaussianMixturePair(p.pair.gmm0, p.pair.gmm1),
    "solve_plan": lambda p: cg.solve_plan(p.pair),
    "map_points": lambda p: cg.map_points(p, x),
    "interpolate": lambda p: cg.interpolate(p, 0.5),
    "plan_density": lambda p: cg.plan_density(p, x, x, atol=1.0),
    "barycenter": lambda p: cg.barycenter([p.pair.gmm0], p.pair.gmm0[0]),
    "flow": lambda p: cg.flow(p.pair.gmm0, p.pair.gmm1[0]),
    "reduce_gmm": lambda p: cg.reduce_gmm(jax.random.key(0), p.pair.gmm0, 2),
    "to_sklearn": lambda p: cg.to_sklearn(p.pair.gmm0),
    "to_ott": lambda p: cg.to_ott(p.pair),
    "to_pot": lambda p: cg.to_pot(p.pair.gmm0),
    "log_prob": lambda p: p.pair.gmm0.log_prob(x),
    "sample": lambda p: p.pair.gmm0.sample(jax.random.key(0), 2),
    "marginal": lambda p: p.pair.gmm0.marginal([0]),
    "condition": lambda p: p.pair.gmm0.condition([0], [0.0]),
    "geometry": lambda p: p.pair.geometry(),
}


@pytest.fixture(scope="module")
def stacked_plan():
    return stack([cg.solve_plan(pair) for pair in pairs()])


@pytest.mark.parametrize("name", REFUSED)
def test_a_stack_is_refused_by_name(stacked_plan, name):
    with pytest.raises(ValueError, match=r"stacked in shape \(2,\); take one.*\[i\].*jax\.vmap"):
        REFUSED[name](stacked_plan)


def test_a_single_one_has_no_length(stacked_plan):
    for one in (stacked_plan[0], stacked_plan[0].pair, stacked_plan[0].pair.gmm0):
        for read in (len, iter, lambda tree: tree[0]):
            with pytest.raises(TypeError, match="stacked on a leading axis, and this is a single one"):
                read(one)
        assert bool(one)


@pytest.mark.parametrize(
    ("options", "method"), [({"rho": (0.5, 5.0)}, "entropic"), ({"tau": (1.0, 0.5)}, "entropic"), ({}, "exact")]
)
def test_reversed_is_solved_the_other_way(x64, options, method):
    (pair,) = pairs(1, **options)
    plan, other = cg.solve_plan(pair, method=method, tol=1e-9), cg.solve_plan(pair.reverse(), method=method, tol=1e-9)
    back = plan.reverse()
    np.testing.assert_allclose(back.matrix, other.matrix, atol=1e-9)
    for name in ("regularized_cost", "transport_cost", "total_mass", "cost_parts"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-12),
            getattr(back, name),
            getattr(other, name),
        )
    assert back.marginal_error <= 1e-8 and back.duality_gap <= 1e-7
    jax.tree.map(np.testing.assert_array_equal, back.reverse(), plan)
