"""The steps and predicates of the annealed Newton iteration, one by one, against closed forms, NumPy and a plain Sinkhorn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coupled_gmm.transport import annealing, entropic
from coupled_gmm.transport.annealing import Accepted, Merit, NewtonSystem
from coupled_gmm.transport.problem import TransportProblem

newton_step = jax.jit(annealing.newton_step)
JUDGE, NO_JUDGE = (Merit(jnp.zeros(()), jnp.asarray(size)) for size in (1.0, np.inf))


def system_of(matrix, residual):
    zero = jnp.zeros(())
    return NewtonSystem(jnp.asarray(residual), jnp.asarray(matrix), zero, zero, (), NO_JUDGE)


def test_newton_step_is_numpys(x64):
    rng = np.random.RandomState(0)
    rows = rng.dirichlet(np.ones(5), 5)
    for mu in (1e-3, 0.5, 30.0):
        step = newton_step(system_of(np.eye(5) - rows, rows[0]), jnp.asarray(mu))
        np.testing.assert_allclose(step, np.linalg.solve((1 + mu) * np.eye(5) - rows, rows[0]), rtol=1e-10)


@pytest.mark.parametrize("radius", [0.5, 8.0])
def test_damping_keeps_the_step_within_the_radius(x64, radius):
    """Row sums of at least mu: no step is longer than |R| / mu."""
    rng = np.random.RandomState(1)
    for size in (1e-3, 1.0, 1e4):
        residual = size * rng.uniform(-1, 1, 6)
        norm = jnp.asarray(np.abs(residual).max())
        mu = annealing.damping(norm, jnp.asarray(radius), JUDGE)
        step = newton_step(system_of(np.eye(6) - rng.dirichlet(np.ones(6), 6), residual), mu)
        assert np.abs(step).max() <= radius * (1 + 1e-9)
        assert annealing.damping(norm, jnp.asarray(radius), NO_JUDGE) == min(float(mu), 1)


@pytest.mark.parametrize(
    ("residual_norm", "merit", "accepted"),
    [
        (1.9, None, True),
        (2.1, None, False),  # doubled, and nothing else to judge by
        (2.1, -1e-3, True),  # the merit fell
        (0.5, 1e-3, False),  # and rose
        (2.1, 0.0, False),  # no more than rounding: the residual judges
        (1.9, 0.0, True),
    ],
)
def test_accepts(residual_norm, merit, accepted):
    last = Accepted(jnp.zeros(2), jnp.asarray(1.0), jnp.asarray(5.0))
    judge = NO_JUDGE if merit is None else Merit(jnp.asarray(5.0 + merit), jnp.asarray(5.0))
    assert bool(annealing.accepts(last, jnp.asarray(residual_norm), judge, jnp.asarray(1e-7))) is accepted
    assert annealing.accepts(last, jnp.asarray(residual_norm), NO_JUDGE, jnp.asarray(2.0)), (
        "a residual that is rounding"
    )
    first = Accepted(jnp.zeros(2), jnp.asarray(jnp.inf), jnp.asarray(jnp.inf))
    assert annealing.accepts(first, jnp.asarray(residual_norm), judge, jnp.asarray(1e-7)), "a first step has no judge"


def test_next_radius():
    def after(radius, accepted, length, epsilon=0.1):
        return float(
            annealing.next_radius(jnp.asarray(radius), jnp.asarray(accepted), jnp.asarray(length), jnp.asarray(epsilon))
        )

    assert after(8.0, False, 0.8) == 4  # shrinks
    assert after(2.0, True, 0.01) == 4  # grows back
    assert after(8.0, True, 0.01) == 8  # stays
    assert after(8.0, True, 0.7) == 16  # a step that came near it


def test_next_epsilon_heats_cools_and_stops_at_the_goal():
    def following(epsilon, heats, cools):
        return float(
            annealing.next_epsilon(jnp.asarray(epsilon), jnp.asarray(heats), jnp.asarray(cools), jnp.asarray(1.0))
        )

    assert following(1.0, True, False) == 8
    assert following(8.0, False, True) == 2
    assert following(2.0, False, True) == 1
    assert following(2.0, False, False) == 2


@pytest.mark.parametrize(
    ("error", "at_goal", "n_at_floor", "done"),
    [
        (1e-5, True, 0, True),
        (1e-5, False, 0, False),
        (1e-3, True, 3, False),
        (1e-3, True, 4, True),
        (np.nan, False, 0, True),
    ],
)
def test_is_done(error, at_goal, n_at_floor, done):
    given = [jnp.asarray(x) for x in (error, at_goal, n_at_floor, 1e-4)]
    assert bool(annealing.is_done(*given)) is done


def test_is_far():
    assert annealing.is_far(jnp.asarray(4.1), jnp.asarray(0.0)) and annealing.is_far(
        jnp.asarray(0.0), jnp.asarray(33.0)
    )
    assert not annealing.is_far(jnp.asarray(4.0), jnp.asarray(32.0))


@pytest.mark.parametrize("rhos", [None, (0.7, 2.0), (0.7, np.inf)])
def test_the_solver_ends_where_sinkhorn_does(x64, rhos):
    """From far as well, and transposed."""
    rng = np.random.RandomState(2)
    cost, a, b, epsilon = rng.uniform(0, 3, (3, 4)), rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(4)), 0.05
    tau0, tau1 = (1.0, 1.0) if rhos is None else (1 / (1 + epsilon / np.array(rhos)))
    f = np.zeros(3)
    for _ in range(5000):
        g = -tau1 * epsilon * np.log(a @ np.exp((f[:, None] - cost) / epsilon))
        f = -tau0 * epsilon * np.log(np.exp((g - cost) / epsilon) @ b)
    expected = np.outer(a, b) * np.exp((f[:, None] + g - cost) / epsilon)
    rho = None if rhos is None else jnp.asarray(rhos)
    arrays = [jnp.asarray(x) for x in (cost, a, b)]
    problem = TransportProblem.of_masses(*arrays, epsilon=jnp.asarray(epsilon), rho=rho)
    run, turned = jax.jit(entropic.solve, static_argnums=3), problem.transpose()
    read = jax.jit(lambda problem, f, g: (problem.plan(f, g), problem.marginal_error(f, g)))
    for init in (np.zeros(3), np.array([5.0, -5.0, 0.0])):
        found = run(problem, jnp.asarray(init), jnp.asarray(1e-11), 200)
        assert found.converged and found.marginal_error < 1e-11
        plan, other = np.asarray(read(problem, found.f, found.g)[0]), read(turned, found.g, found.f)
        np.testing.assert_allclose(plan, expected, atol=1e-9)
        np.testing.assert_allclose(other[0], plan.T, rtol=1e-12)
        np.testing.assert_allclose(other[1], found.marginal_error, atol=1e-14)
