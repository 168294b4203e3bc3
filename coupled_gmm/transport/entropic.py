r"""Entropic transport between small discrete measures, balanced or not, by Newton's method on log-marginals.

The problem, for a cost C, masses a and b, and P >= 0:

.. math:: \min_P \langle P, C \rangle + \epsilon KL(P | a b^T) + \rho_0 KL(P 1 | a) + \rho_1 KL(P^T 1 | b)

(a price :math:`\rho` that is infinite holds its marginals to a, or b). Its solution is
:math:`P = a b^T \exp((f + g - C) / \epsilon)`. The potential g is eliminated; what remains is, in the unknowns f, that the row sums
equal :math:`a e^{-f / \rho_0}`. Sinkhorn's iteration is the Jacobi step of these equations in the logarithm of the row sums. Here
is their Newton step: with U and V the row- and column-stochastic forms of P, R the logarithm of wanted over actual row sums, and
:math:`\tau_1 = \rho_1 / (\rho_1 + \epsilon)`,

.. math:: ((1 + \epsilon / \rho_0 + \mu) I - \tau_1 U V^T) \delta = R, \qquad f \leftarrow f + \epsilon \delta .

The damping :math:`\mu`, which steps are good, and how epsilon is annealed: `annealing`. Of a balanced problem the judge is the dual
objective :math:`\langle f, a \rangle + \langle g, b \rangle`, with the g that is optimal for f: concave in f, and largest at the
solution.

Where masses may change, little may move; errors of marginals count as a part of what does. Components of mass zero are valid: U
and V do not see them, and they get their c-transform.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core.tree import pytree
from coupled_gmm.transport.annealing import Annealed, Goal, Merit, NewtonSystem, Unknowns, anneal
from coupled_gmm.transport.problem import TransportProblem


@pytree
class Potentials:
    """Dual potentials of a plan between the masses a and b, with the solver's certificate."""

    f: Float[Array, "*b K0"]
    g: Float[Array, "*b K1"]
    log_a: Float[Array, "*b K0"]
    log_b: Float[Array, "*b K1"]
    marginal_error: Float[Array, "*b"]
    n_iterations: Int[Array, "*b"]
    converged: Bool[Array, "*b"]  # the marginal error is at most the tolerance, as a part of the mass that moves
    stalled: Bool[Array, "*b"]  # at what the precision can reach, above the tolerance

    def swap(self) -> "Potentials":
        """The same for the transposed problem."""
        return dataclasses.replace(self, f=self.g, g=self.f, log_a=self.log_b, log_b=self.log_a)


def solve(
    problem: TransportProblem, init: Float[Array, " K0"], tol: Float[Array, ""], max_iterations: int
) -> Potentials:
    """Potentials whose plan misses its marginals by at most `tol` (L1, of the mass that moves), or as little as the precision
    allows."""
    cost, a, log_a, log_b = problem.cost, problem.a, problem.log_a, problem.log_b
    present = a > 0
    inverse_rho0, inverse_rho1 = problem.inverse_rhos

    def equations(f: Array, epsilon: Array, g: Array) -> NewtonSystem:
        """At f and the g that is optimal for it, found from one that is near."""
        tau1 = 1 / (1 + epsilon * inverse_rho1)
        columns = problem.exponent(f, g) / epsilon + log_a[:, None]
        log_columns = jax.nn.logsumexp(columns, axis=0)
        v = jnp.exp(columns - log_columns)
        g = tau1 * (g - epsilon * log_columns)
        rows = problem.exponent(f, g) / epsilon + log_b
        log_rows = jax.nn.logsumexp(rows, axis=1)
        u = jnp.exp(rows - log_rows[:, None])
        log_mass = 0 if problem.balanced else jax.nn.logsumexp(log_a + log_rows)
        flow = jnp.exp(log_a + log_rows - log_mass)
        merit = None
        if problem.balanced:
            terms = jnp.concatenate([jnp.where(present, a * f, 0), problem.b * g])
            merit = Merit(-jnp.sum(terms), jnp.sum(jnp.abs(terms)))
        return NewtonSystem(
            residual=-f * inverse_rho0 - log_rows,
            matrix=(1 + epsilon * inverse_rho0) * jnp.eye(len(a), dtype=cost.dtype) - tau1 * u @ v.T,
            marginal_error=jnp.sum(jnp.abs(jnp.exp(log_a - f * inverse_rho0 - log_mass) - flow)),
            rounding=rounding(u * flow[:, None], cost, f, epsilon),
            warm_start=g,
            merit=merit,
        )

    scale = jnp.max(jnp.where(present[:, None] & (log_b > -jnp.inf), jnp.abs(cost), 0))
    shift_weights = a if problem.balanced else 0 * a

    def centred(f: Array) -> Array:
        return f - jnp.sum(jnp.where(shift_weights > 0, shift_weights * f, 0))

    unknowns = Unknowns(present, centred, scale)
    # Half of the tolerance leaves room for the rounding of g, which the certificate sees.
    goal = Goal(problem.epsilon, marginal_error=0.5 * tol, hottest=scale, max_iterations=max_iterations)
    end = anneal(equations, init, jnp.zeros_like(log_b), unknowns, goal)
    g = problem.transpose().c_transform(end.x, near=end.warm_start)
    f = jnp.where(present, end.x, problem.c_transform(g))
    return certified(problem, f, g, tol, end)


def rounding(plan: Array, cost: Array, f: Array, epsilon: Array) -> Float[Array, ""]:
    """What a unit of rounding of costs and potentials is worth in the plan's marginals: far costs that no mass pays are nothing."""
    sizes = jnp.where(plan > 0, plan * (jnp.abs(cost) + jnp.abs(f)[:, None]), 0)
    return jnp.finfo(cost.dtype).eps * jnp.sum(sizes) / epsilon


def certified(problem: TransportProblem, f: Array, g: Array, tol: Array, end: Annealed) -> Potentials:
    """Potentials with the marginal error that they have as they are returned, after rounding."""
    part, log_mass = problem.relative_marginal_error(f, g)
    converged = part <= tol
    return Potentials(
        f=f,
        g=g,
        log_a=problem.log_a,
        log_b=problem.log_b,
        marginal_error=part * jnp.exp(log_mass),
        n_iterations=end.n_iterations,
        converged=converged,
        stalled=~converged & end.at_floor,
    )
