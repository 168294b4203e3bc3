r"""Masses and plan solved for together: the part of a balanced pair's M-step that is not smooth.

Given costs and the masses n, m that the clouds ask for, maximise over masses a, b

.. math:: \sum_k n_k \log a_k / c_0 + \sum_l m_l \log b_l / c_1 - T(a, b)

T has kinks in the masses: where they agree, or nearly, no gradient says how far they should part. As a saddle point in
masses and potentials the problem is smooth, and its equations are those that `annealing` solves, with masses that answer to their
potentials, :math:`a = n / (1 + c_0 (F - s))`, s being such that they sum to 1. With the masses put in, it is a convex
function of the potentials that is minimised: it tells good steps from bad, where the residual alone may go round in circles.

The entropy of the plan is taken against the present masses :math:`a_0 b_0^T`, from which the answer starts. That makes the problem
concave, and its value a lower bound that is exact at the start: T differs by
:math:`\epsilon (KL(a | a_0) + KL(b | b_0))`, never negative. So the true objective rises. The plan that comes out is
optimal for the new masses as well, with potentials :math:`f = F - \epsilon \log (a / a_0)`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coupled_gmm.core.tree import pytree
from coupled_gmm.transport import entropic
from coupled_gmm.transport.annealing import Goal, Merit, NewtonSystem, Unknowns, anneal
from coupled_gmm.transport.entropic import Potentials
from coupled_gmm.transport.problem import TransportProblem

# Of Newton's method for the normalizer, from the last one: the merit must be that of masses that sum to 1.
_NORMALIZER_STEPS, _LAST_NORMALIZER_STEPS = 4, 8


@pytree
class Response:
    """What masses answer with: the targets n (summing to 1), the rates c, and whether a side is free to answer."""

    targets: tuple[Float[Array, " K0"], Float[Array, " K1"]]
    rates: tuple[Float[Array, ""], Float[Array, ""]]
    free: tuple[Bool[Array, ""], Bool[Array, ""]]


class _Side:
    """One side's masses as a function of its potentials."""

    def __init__(self, response: Response, side: int, given: Float[Array, " K"]):
        self.target, self.rate, self.free = response.targets[side], response.rates[side], response.free[side]
        self.given = given
        self.present = jnp.where(self.free, self.target > 0, jnp.exp(given) > 0)

    def answer(self, potential: Array, normalizer: Array, steps: int) -> tuple[Array, Array, Array]:
        """Log-masses, the slopes of their answer, and the improved normalizer, at which they sum to 1.

        That is the least denominator 1 + c (F - s). Newton's method on the reciprocal of the sum, which is concave
        and nearly linear in it, closes in from below.
        """
        has = self.target > 0
        # Subtracted first: fused with the product, the least excess would be rounded away from 0, and below it.
        lowest = jnp.min(jnp.where(has, potential, jnp.inf))
        excess = jnp.where(has, self.rate * (potential - lowest), 0)
        least = jnp.max(jnp.where(has & (excess == 0), self.target, 0))

        def newton(_, normalizer):
            share = jnp.where(has, self.target / (normalizer + excess), 0)
            total = jnp.sum(share)
            slope = jnp.sum(share / total / ((normalizer + excess) * total))  # no square of a tiny target's reciprocal
            return jnp.clip(normalizer + (1 - 1 / total) / slope, least, 1)

        # The last normalizer may be that of another component's least excess, with quite another target.
        normalizer = jnp.clip(normalizer, least, 1)
        normalizer = jax.lax.fori_loop(0, steps, newton, normalizer, unroll=steps == _NORMALIZER_STEPS)
        denominator = normalizer + excess
        log_mass = jnp.where(has, jnp.log(jnp.where(has, self.target, 1) / denominator), -jnp.inf)
        return jnp.where(self.free, log_mass, self.given), jnp.where(self.free, self.rate / denominator, 0), normalizer

    def worth(self, potential: Array, log_mass: Array) -> Float[Array, " two_each"]:
        r"""The terms of :math:`n \log a / c - \langle F, a \rangle`, which the answer a maximises: convex in F."""
        has = self.free & (self.target > 0)
        gain = jnp.where(has, self.target * jnp.where(has, log_mass, 0), 0) / self.rate
        return jnp.concatenate([gain, -jnp.where(self.present, jnp.exp(log_mass) * potential, 0)])


def _answer_matrix(mass: Float[Array, " K"], slope: Float[Array, " K"]) -> Float[Array, "K K"]:
    """How log-masses fall as potentials rise: slope (I - 1 pi^T), since they go on summing to 1."""
    pi = mass * slope
    total = jnp.sum(pi)
    return jnp.diag(slope) - slope[:, None] * (pi / jnp.where(total > 0, total, 1))


def solve(
    problem: TransportProblem,
    init: tuple[Float[Array, " K0"], Float[Array, " K1"]],
    tol: Float[Array, ""],
    max_iterations: int,
    response: Response,
) -> Potentials:
    """Potentials and masses of a balanced problem; its own are the present masses, which stay where a side is not free."""
    cost, epsilon = problem.cost, problem.epsilon
    one, other = _Side(response, 0, problem.log_a), _Side(response, 1, problem.log_b)
    k0 = len(problem.log_a)
    # A component that no cloud asks for gives up what it has.
    log_a, log_b = (jnp.where(side.present, side.given, -jnp.inf) for side in (one, other))
    present_masses = problem.with_log_masses(log_a, log_b)

    # The unknowns are F and -G: in these the Newton matrix has no positive entry off its diagonal.
    def equations(x: Array, epsilon: Array, normalizers: tuple[Array, Array]) -> NewtonSystem:
        F, G = x[:k0], -x[k0:]
        wanted_a, slope_a, normalizer_a = one.answer(F, normalizers[0], _NORMALIZER_STEPS)
        wanted_b, slope_b, normalizer_b = other.answer(G, normalizers[1], _NORMALIZER_STEPS)
        log_plan = present_masses.at(epsilon).log_plan(F, G)
        log_rows, log_columns = jax.nn.logsumexp(log_plan, axis=1), jax.nn.logsumexp(log_plan, axis=0)
        u = jnp.exp(log_plan - jnp.where(one.present, log_rows, 0)[:, None])
        v = jnp.exp(log_plan - jnp.where(other.present, log_columns, 0)).T
        a, b = jnp.exp(wanted_a), jnp.exp(wanted_b)
        residual_a = jnp.where(one.present, wanted_a - log_rows, 0)
        residual_b = jnp.where(other.present, wanted_b - log_columns, 0)
        error = jnp.sum(jnp.abs(jnp.exp(log_rows) - a)) + jnp.sum(jnp.abs(jnp.exp(log_columns) - b))
        answers = [[epsilon * _answer_matrix(a, slope_a), -u], [-v, epsilon * _answer_matrix(b, slope_b)]]
        terms = jnp.concatenate([one.worth(F, wanted_a), other.worth(G, wanted_b), epsilon * jnp.exp(log_rows)])
        return NewtonSystem(
            residual=jnp.concatenate([residual_a, -residual_b]),
            matrix=jnp.eye(len(x), dtype=x.dtype) + jnp.block(answers),
            marginal_error=error + jnp.abs(jnp.sum(a) - 1) + jnp.abs(jnp.sum(b) - 1),
            rounding=entropic.rounding(jnp.exp(log_plan), cost, F, epsilon),
            warm_start=(normalizer_a, normalizer_b),
            merit=Merit(jnp.sum(terms), jnp.sum(jnp.abs(terms))),
        )

    present = jnp.concatenate([one.present & jnp.isfinite(log_a), other.present & jnp.isfinite(log_b)])
    scale = jnp.max(jnp.where(present[:k0, None] & present[k0:], jnp.abs(cost), 0))
    unknowns = Unknowns(present, jnp.concatenate([jnp.exp(log_a), jnp.zeros_like(log_b)]), scale)
    # At an epsilon above 1 / c masses answer to a step in F by orders of magnitude.
    hottest = jnp.minimum(scale, 1 / jnp.maximum(jnp.max(jnp.stack(response.rates)), jnp.finfo(cost.dtype).tiny))
    goal = Goal(epsilon, marginal_error=0.5 * tol, hottest=hottest, max_iterations=max_iterations)
    unit = jnp.ones((), cost.dtype)
    end = anneal(equations, jnp.concatenate([init[0], -init[1]]), (unit, unit), unknowns, goal)
    F, G = end.x[:k0], -end.x[k0:]
    new_a, _, _ = one.answer(F, end.warm_start[0], _LAST_NORMALIZER_STEPS)
    new_b, _, _ = other.answer(G, end.warm_start[1], _LAST_NORMALIZER_STEPS)
    # Centred by the new masses, and g once more from f: they are rounded no more than they need be.
    f = jnp.where(one.present, F - epsilon * _difference(new_a, log_a), 0)
    shift = jnp.exp(new_a) @ f
    f = jnp.where(one.present, f - shift, 0)
    near = G - epsilon * _difference(new_b, log_b) + shift
    solved = problem.with_log_masses(new_a, new_b)
    g = jnp.where(other.present, solved.transpose().c_transform(f, near), 0)
    return entropic.certified(solved, f, g, tol, end)


def _difference(new: Array, old: Array) -> Array:
    both = jnp.isfinite(new) & jnp.isfinite(old)
    return jnp.where(both, jnp.where(both, new, 0) - jnp.where(both, old, 0), 0)
