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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import expansions
from coupled_gmm.core.expansions import Words
from coupled_gmm.core.tree import chosen, pytree
from coupled_gmm.transport.annealing import FAR, RADIUS, Annealed, Goal, Merit, NewtonSystem, Unknowns, anneal
from coupled_gmm.transport.problem import Potential, TransportProblem, value

_ROUNDS = 8  # of looking for what rounding has left


@pytree
class Potentials:
    """Dual potentials of a plan between the masses a and b, with the solver's certificate."""

    f: Float[Array, "*b K0"]
    g: Float[Array, "*b K1"]
    rests: tuple[Float[Array, "*b K0"], Float[Array, "*b K1"]]  # of f and g, what rounding has left of them
    log_a: Float[Array, "*b K0"]
    log_b: Float[Array, "*b K1"]
    marginal_error: Float[Array, "*b"]
    n_iterations: Int[Array, "*b"]
    converged: Bool[Array, "*b"]  # the marginal error is at most the tolerance, as a part of the mass that moves
    stalled: Bool[Array, "*b"]  # at what the precision can reach, above the tolerance

    @property
    def words(self) -> tuple[Words, Words]:
        """f and g, not rounded."""
        return (self.f, self.rests[0]), (self.g, self.rests[1])

    def swap(self) -> "Potentials":
        """The same for the transposed problem."""
        return dataclasses.replace(self, f=self.g, g=self.f, rests=self.rests[::-1], log_a=self.log_b, log_b=self.log_a)

    def scaled(self, by: Float[Array, ""]) -> "Potentials":
        """The same where costs are so many times larger, a power of two."""
        rest_f, rest_g = self.rests
        return dataclasses.replace(self, f=self.f * by, g=self.g * by, rests=(rest_f * by, rest_g * by))


class _Round(NamedTuple):
    """Potentials that a round has reached: their rounding is none in the next."""

    found: Potentials
    count: Int[Array, ""]
    done: Bool[Array, ""]


def solve(problem: TransportProblem, init: Potential, tol: Float[Array, ""], max_iterations: int) -> Potentials:
    """Potentials whose plan misses its marginals by at most `tol` (L1, of the mass that moves), or as little as the precision
    allows.

    In units of a small epsilon potentials are large, and rounded coarsely. What they have not reached is looked for again as a
    change of them, at costs less the ones that there are: where mass moves those are a few epsilon.
    """
    present = problem.a > 0
    both = problem.usable(present, problem.log_b > -jnp.inf)
    scale = jnp.max(jnp.where(both, jnp.abs(problem.cost), 0))
    f, rest = expansions.words(init)
    far = jnp.abs(f) > FAR * problem.longest_way * scale  # of another problem, and farther away than zero
    f = jnp.where(far, 0, f), jnp.where(far, 0, rest)
    g = problem.transpose().c_transform(f)

    def once(now: _Round) -> _Round:
        f, g = now.found.words
        hottest = jnp.where(now.count > 0, problem.epsilon, scale)
        # Half of the tolerance leaves room for the rounding of g, which the certificate sees.
        goal = Goal(problem.epsilon, marginal_error=0.5 * tol, hottest=hottest, max_iterations=max_iterations)
        end = _annealed(problem, f, g, goal)
        f, near = expansions.moved(f, end.x), expansions.moved(g, end.warm_start)
        g = problem.transpose().c_transform(f, near)
        absent = problem.c_transform(g, f)
        f = jnp.where(present, f[0], absent[0]), jnp.where(present, f[1], absent[1])
        found = certified(problem, f, g, tol, end)
        iterations = now.found.n_iterations + end.n_iterations
        # On a plateau of nearly equal masses it is their way that counts.
        travels = jnp.max(jnp.where(present, jnp.abs(end.x), 0)) > RADIUS * problem.epsilon
        better = (now.count == 0) | (found.marginal_error < jnp.where(travels, 1.1, 1) * now.found.marginal_error)
        helps = better & (travels | (found.marginal_error < 0.5 * now.found.marginal_error))
        found = dataclasses.replace(chosen(better, found, now.found), n_iterations=iterations)
        return _Round(found, now.count + 1, ~found.stalled | ~helps | (now.count + 1 == _ROUNDS))

    none = Annealed(f[0], jnp.zeros((), jnp.int32), jnp.asarray(False), g[0])
    start = _Round(certified(problem, f, g, tol, none), jnp.zeros((), jnp.int32), jnp.asarray(False))
    return jax.lax.while_loop(lambda now: ~now.done, once, start).found


def _annealed(problem: TransportProblem, f0: Words, g0: Words, goal: Goal) -> Annealed:
    """The change of these potentials that solves the problem, with that of g as what is kept warm."""
    reduced = dataclasses.replace(problem, cost=-problem.exponent(f0, g0))
    cost, a, log_a, log_b = reduced.cost, problem.a, problem.log_a, problem.log_b
    present = a > 0
    inverse_rho0, inverse_rho1 = problem.inverse_rhos
    paid0, paid1 = value(f0) * inverse_rho0, value(g0) * inverse_rho1

    def equations(f: Array, epsilon: Array, g: Array) -> NewtonSystem:
        """At f and the g that is optimal for it, found from one that is near."""
        tau1 = 1 / (1 + epsilon * inverse_rho1)
        columns = reduced.at(epsilon).log_kernel(f, g) + log_a[:, None]
        log_columns = summed(columns, axis=0)
        v = jnp.exp(columns - log_columns)
        g = tau1 * (g - epsilon * (log_columns + paid1))
        rows = reduced.at(epsilon).log_kernel(f, g) + log_b
        log_rows = summed(rows, axis=1)
        u = jnp.exp(rows - log_rows[:, None])
        log_mass = jnp.where(problem.balanced, 0, jax.nn.logsumexp(log_a + log_rows))
        flow = jnp.exp(log_a + log_rows - log_mass)
        terms = jnp.concatenate([jnp.where(present, a * f, 0), problem.b * g])
        size = jnp.where(problem.balanced, jnp.sum(jnp.abs(terms)), jnp.inf)
        paid = f * inverse_rho0 + paid0
        return NewtonSystem(
            residual=-paid - log_rows,
            matrix=(1 + epsilon * inverse_rho0) * jnp.eye(len(a), dtype=cost.dtype) - tau1 * u @ v.T,
            marginal_error=jnp.sum(jnp.abs(jnp.exp(log_a - paid - log_mass) - flow)),
            rounding=rounding(u * flow[:, None], cost, f, epsilon),
            warm_start=g,
            merit=Merit(jnp.where(problem.balanced, -jnp.sum(terms), 0), size),
        )

    def summed(logits: Array, axis: int) -> Array:
        """Logarithms of sums; 0 of a component that has no link to any mass, which has no part in the equations."""
        found = jax.nn.logsumexp(logits, axis=axis)
        return found if problem.links is None else jnp.where(jnp.isneginf(found), 0, found)

    scale = jnp.max(jnp.where(problem.usable(present, log_b > -jnp.inf), jnp.abs(cost), 0))
    shift = problem.shifts(present, log_b > -jnp.inf, jnp.where(problem.balanced, a, 0))

    def centred(f: Array) -> Array:
        return f - shift(f)

    return anneal(equations, jnp.zeros_like(a), jnp.zeros_like(log_b), Unknowns(present, centred, scale), goal)


def rounding(plan: Array, cost: Array, f: Array, epsilon: Array) -> Float[Array, ""]:
    """What a unit of rounding of costs and potentials is worth in the plan's marginals: far costs that no mass pays are nothing."""
    sizes = jnp.where(plan > 0, plan * (jnp.abs(cost) + jnp.abs(f)[:, None]), 0)
    return jnp.finfo(cost.dtype).eps * jnp.sum(sizes) / epsilon


def certified(problem: TransportProblem, f: Potential, g: Potential, tol: Array, end: Annealed) -> Potentials:
    """Potentials with the marginal error that they have as they are returned, after rounding."""
    part, log_mass = problem.relative_marginal_error(f, g)
    converged = part <= tol
    first, other = expansions.words(f), expansions.words(g)
    return Potentials(
        f=first[0],
        g=other[0],
        rests=(first[1], other[1]),
        log_a=problem.log_a,
        log_b=problem.log_b,
        marginal_error=part * jnp.exp(log_mass),
        n_iterations=end.n_iterations,
        converged=converged,
        stalled=~converged & end.at_floor,
    )
