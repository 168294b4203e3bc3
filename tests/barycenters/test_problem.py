"""A free mixture's plans to fixed ones, and what their cells count: against POT, singular values and loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from problems import random_moments
from twins import bures_costs, kl, sinkhorn

import coupled_gmm as cg
from coupled_gmm.barycenters.problem import BarycenterProblem, FreeMixture

N, SIZES, D = 4, (3, 5), 2  # components of the free mixture, and of the fixed ones
COEFFICIENTS, EPSILON = np.array([0.3, 0.7]), 0.8


@pytest.fixture(scope="module", params=["exact", "entropic"])
def found(request):
    """The method, moments, costs by singular values, the problem, its costs and plans. One component has no mass."""
    with jax.enable_x64(True):
        (free, first), (_, second) = (random_moments(seed, N, k, D, "absent") for seed, k in enumerate(SIZES))
        ends = (first, second)
        gmms = [cg.GaussianMixture(*map(jnp.asarray, end)) for end in (free, *ends)]

        @jax.jit
        def solved(free, gmms):
            free = FreeMixture.of(free)
            problem = BarycenterProblem.of(gmms, jnp.asarray(COEFFICIENTS), jnp.asarray(EPSILON), request.param)
            cost = problem.costs(free)
            plans = problem.solve(cost, free.weights, problem.cold_start(N))
            cells = problem.cells(plans)
            return cost, plans, cells, problem.shares(cells, N)

        expected = [bures_costs(*free[:2], *end[:2]) for end in ends]
        return request.param, free, ends, expected, jax.tree.map(np.asarray, solved(gmms[0], gmms[1:]))


def test_costs(found):
    *_, expected, (cost, *_) = found
    for mine, theirs in zip(cost, expected):
        np.testing.assert_allclose(mine[:, : theirs.shape[1]], theirs, rtol=1e-9, atol=1e-9)


def test_plans(found):
    """Each by itself, and the objective by coefficients."""
    method, free, ends, costs, (_, plans, *_) = found
    values = []
    for end, cost, matrix in zip(ends, costs, plans.matrix):
        if method == "exact":
            expected = ot.emd(free[2], end[2], cost)
            values.append(np.sum(expected * cost))
        else:
            expected = sinkhorn(cost, free[2], end[2], EPSILON, np.inf)
            values.append(np.sum(expected * cost) + EPSILON * kl(expected, np.outer(free[2], end[2])))
        np.testing.assert_allclose(matrix[:, : cost.shape[1]], expected, atol=1e-6)
        np.testing.assert_array_equal(matrix[:, cost.shape[1] :], 0)
    assert plans.solved
    np.testing.assert_allclose(plans.objective, COEFFICIENTS @ values, rtol=1e-8)


def test_cells_hold_all_mass(found):
    """In as many cells as a tree has, where plans are exact."""
    method, *_, (_, plans, cells, _) = found
    whole = np.zeros(plans.matrix.shape)
    np.add.at(whole, (cells.problem, cells.source, cells.target), cells.mass)
    np.testing.assert_array_equal(whole, plans.matrix)
    b, n, k = plans.matrix.shape
    assert len(cells.mass) == b * (n + k - 1 if method == "exact" else n * k)


def test_shares(found):
    """Of each source's cells, all plans together, by coefficients; they sum to 1 where it has mass."""
    _, free, *_, (_, plans, cells, shares) = found
    counted = COEFFICIENTS[:, None, None] * plans.matrix
    total = counted.sum((0, 2))
    for share, problem, source, target in zip(shares, cells.problem, cells.source, cells.target):
        expected = counted[problem, source, target] / total[source] if total[source] > 0 else 0
        np.testing.assert_allclose(share, expected, atol=1e-12)
    sums = np.bincount(cells.source, shares, N)
    np.testing.assert_allclose(sums, free[2] > 0, atol=1e-9)
