"""The M-step's searches, one evaluation at a time: against SciPy's L-BFGS and Adam's formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize, rosen, rosen_der

from coupled_gmm.fits.optimisers import lbfgs_optimiser, optax_optimiser

START = np.array([-1.2, 1.0, -0.7, 0.4])


def searches(optimiser, value, gradient, start, budget=300):
    """Every state of a search for the least value, the first one included."""
    update = jax.jit(optimiser.update)
    search = optimiser.init(jnp.asarray(start))
    yield search
    for _ in range(budget):
        if search.done:
            return
        trial = np.asarray(search.trial)
        search = update(search, jnp.asarray(value(trial)), jnp.asarray(gradient(trial)))
        yield search


def test_lbfgs_finds_rosenbrocks_minimum_and_never_rises(x64):
    """With no more than twice the evaluations that SciPy's takes."""
    found = list(searches(lbfgs_optimiser(patience=1e-12), rosen, rosen_der, START))
    values = np.array([rosen(np.asarray(search.best)) for search in found])
    assert (np.diff(values) <= 0).all() and found[-1].done
    assert values[-1] < 1e-6
    theirs = minimize(rosen, START, jac=rosen_der, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-8})
    assert theirs.success and len(found) <= 2 * theirs.nfev


def test_what_a_search_accepts_is_what_it_vouches_for(x64):
    for before, after in zip(found := list(searches(lbfgs_optimiser(), rosen, rosen_der, START)), found[1:]):
        moved = before.trial if after.accepted else before.best
        np.testing.assert_array_equal(after.best, moved)
        if after.accepted and before is not found[0]:
            assert rosen(np.asarray(before.trial)) < rosen(np.asarray(before.best))


@pytest.mark.parametrize("patience", [1e-1, 1e-3])
def test_it_stops_where_little_is_promised(x64, patience):
    """A quadratic form of condition 100: the slope that it stops at is that part of the first one, and no step before."""
    curvature = np.array([1.0, 10.0, 100.0])
    found = list(
        searches(lbfgs_optimiser(patience), lambda x: 0.5 * x @ (curvature * x), lambda x: curvature * x, np.ones(3))
    )
    promised = [float(search.left) for search in found[1:] if search.accepted]
    assert found[-1].done and promised[-1] <= patience * promised[0]
    assert all(left > patience * promised[0] for left in promised[1:-1])


def test_a_wall_is_not_walked_through(x64):
    """Trials at which there is no value are rejected, and what is vouched for is always finite."""

    def value(x):
        return np.sum(100 * x - np.log(x)) if (x > 0).all() else np.nan

    found = list(searches(lbfgs_optimiser(patience=1e-10), value, lambda x: 100 - 1 / x, np.array([1.0, 3.0])))
    assert any(not np.isfinite(value(np.asarray(search.trial))) for search in found), "the wall was never met"
    assert all(np.isfinite(value(np.asarray(search.best))) for search in found)
    np.testing.assert_allclose(found[-1].best, [0.01, 0.01], rtol=1e-4)


@pytest.mark.parametrize("start", [0.0, np.nan])
def test_nowhere_to_go(start):
    """At the minimum, and where there is no value: it stops at once, where it is."""
    _, search = searches(lbfgs_optimiser(), lambda x: np.sum(x**2), lambda x: 2 * x, np.full(2, start, np.float32))
    assert search.done
    np.testing.assert_array_equal(search.best, np.full(2, start, np.float32))


def test_every_step_of_optax_is_taken(x64):
    """Adam, by its formulas."""
    curvature, rate = np.array([1.0, 10.0]), 0.1
    optimiser = optax_optimiser(optax.adam(rate))
    found = list(searches(optimiser, lambda x: 0.5 * x @ (curvature * x), lambda x: curvature * x, np.ones(2), 20))
    x, first, second = np.ones(2), np.zeros(2), np.zeros(2)
    for t in range(1, 21):
        gradient = curvature * x
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        x = x - rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(found[t].best, x, rtol=1e-9)
        assert found[t].accepted and not found[t].done
    assert not optimiser.monotone and lbfgs_optimiser().monotone
