r"""Entropic transport between small discrete measures, balanced or not, by Newton's method on log-marginals.

The problem, for a cost C, masses a and b, and P >= 0:

.. math:: \min_P \langle P, C \rangle + \epsilon KL(P | a b^T) + \rho_0 KL(P 1 | a) + \rho_1 KL(P^T 1 | b)

(a price :math:`\rho` that is infinite holds its marginals to a, or b; one number `rho` stands for both prices). Its solution is
:math:`P = a b^T \exp((f + g - C) / \epsilon)`. The potential g is eliminated; what remains is, in the unknowns f, that the row sums
equal :math:`a e^{-f / \rho_0}`. Sinkhorn's iteration is the Jacobi step of these equations in the logarithm of the row sums. Here
is their Newton step: with U and V the row- and column-stochastic forms of P, R the logarithm of wanted over actual row sums, and
:math:`\tau_1 = \rho_1 / (\rho_1 + \epsilon)`,

.. math:: ((1 + \epsilon / \rho_0 + \mu) I - \tau_1 U V^T) \delta = R, \qquad f \leftarrow f + \epsilon \delta .

Where masses may change, little may move; errors of marginals count as a part of what does. The matrix is a diagonally dominant
M-matrix whose row sums are at least :math:`\mu`, so a damping :math:`\mu = \min(1, |R|_\infty / r)` bounds the step: it is never
longer than r epsilon, or |R| if that is more, and it becomes Newton's own near the solution. To first order a step never makes
:math:`|R|_\infty` larger; one that doubles it has overshot: it is halved, and r with it. Otherwise r grows back to 8, and beyond
where steps come near it: nearly equal weights at a small epsilon make potentials that hardly matter, and R a plateau many epsilon
wide.

A step at its bound says that the potentials are far, in units of epsilon, from the solution. Epsilon is then heated until
the step is short, and annealed back stage by stage. Potentials of a nearby problem need neither. Components of mass zero
are legal: U and V do not see them, and they get their c-transform.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import matrices
from coupled_gmm.core.tree import pytree
from coupled_gmm.transport.problem import TransportProblem

_TRUST = 8.0  # the step's first bound, in units of epsilon
_FAR = 4.0  # a step longer than this is limited by the bound, not by the distance to the solution; so is any at this many bounds
_HEATING, _COOLING = 8.0, 4.0  # epsilon rises, then falls, by these factors
_TRIES = 4  # iterations within rounding of the solution, of which the best is kept
_NEAR = 0.25  # a stage is done when its step is no longer than this


@pytree
class Potentials:
    """Dual potentials of a plan between the masses a and b, with the solver's certificate."""

    f: Float[Array, " K0"]
    g: Float[Array, " K1"]
    log_a: Float[Array, " K0"]
    log_b: Float[Array, " K1"]
    marginal_error: Float[Array, ""]
    n_iterations: Int[Array, ""]
    converged: Bool[Array, ""]  # the marginal error is at most the tolerance, as a part of the mass that moves
    stalled: Bool[Array, ""]  # at what the precision can reach, above the tolerance

    def swap(self) -> "Potentials":
        """The same for the transposed problem."""
        return dataclasses.replace(self, f=self.g, g=self.f, log_a=self.log_b, log_b=self.log_a)


class Look(NamedTuple):
    """Log-marginal equations at some unknowns: residuals, L1 error of the marginals as a part of all mass, and the matrix of
    their Newton step."""

    residual: Float[Array, " n"]
    error: Float[Array, ""]
    matrix: Float[Array, "n n"]
    rounding: Float[Array, ""]  # that of the error: a unit of rounding of the exponents, where the mass is
    memory: Any = ()  # carried to the next look
    merit: Any = None  # a convex function that the solution minimises, and the sum of its terms' sizes


class _State(NamedTuple):
    x: Float[Array, " n"]
    last: Float[Array, " n"]  # where the step to x was taken from
    worst: Float[Array, ""]  # |R| there
    merit: Float[Array, ""]
    trust: Float[Array, ""]
    best: Float[Array, " n"]  # of those seen at the target epsilon
    error: Float[Array, ""]
    epsilon: Float[Array, ""]
    iteration: Int[Array, ""]
    tries: Int[Array, ""]
    cooling: Bool[Array, ""]
    done: Bool[Array, ""]
    memory: Any


class Annealed(NamedTuple):
    """Where the annealed iteration ended, and whether that is the solution up to rounding."""

    x: Float[Array, " n"]
    n_iterations: Int[Array, ""]
    at_floor: Bool[Array, ""]
    memory: Any


def anneal(
    look: Callable[[Array, Array, Any], Look],
    init: Float[Array, " n"],
    memory: Any,
    present: Bool[Array, " n"],
    centre: Float[Array, " n"],
    scale: Float[Array, ""],
    epsilon: Float[Array, ""],
    goal: Float[Array, ""],
    max_iterations: int,
    hottest: Float[Array, ""],
) -> Annealed:
    """Solve log-marginal equations ``look(x, epsilon, memory)`` by damped Newton steps, annealed in epsilon where they must be.

    `present` are the unknowns that count; `centre` weighs those whose common shift is free (all zero where none is); `scale`
    is the size of the costs; epsilon is not heated beyond `hottest`.
    """
    eps_machine = jnp.finfo(init.dtype).eps

    def longest(step: Array) -> Float[Array, ""]:
        return jnp.max(jnp.where(present, jnp.abs(step), 0))

    def centred(x: Array) -> Array:
        """Without the common shift that is free: potentials larger than they need be are rounded as coarsely."""
        return x - jnp.sum(jnp.where(centre > 0, centre * x, 0))

    def iterate(state: _State) -> _State:
        x, eps = state.x, state.epsilon
        found = look(x, eps, state.memory)
        worst = longest(found.residual)
        # Rounding of potentials and costs alone can leave an error of this size (measured, it is several times less),
        # in the residual that of the farthest component, whatever its mass.
        coarse = 2 * eps_machine * scale / eps
        floor = jnp.fmin(2 * found.rounding, coarse)

        overshot, merit, most = worst > jnp.maximum(2 * state.worst, 2 * coarse), state.merit, 1
        if found.merit is not None:  # decides where it is more than rounding
            (merit, size), most = found.merit, jnp.inf
            rise, noise = merit - state.merit, 4 * eps_machine * size
            overshot = (rise > noise) | (overshot & (rise > -noise))
        wider = (state.trust < _TRUST) | (longest(x - state.last) > 0.5 * eps * state.trust)
        trust = state.trust * jnp.where(overshot, 0.5, jnp.where(wider, 2, 1))
        damping = jnp.clip(worst / trust, 10 * eps_machine, most)
        step = matrices.solve_dominant(found.matrix + damping * jnp.eye(len(x), dtype=x.dtype), found.residual)
        step = centred(step)
        distance = longest(step)

        final = eps <= epsilon
        better = final & (found.error < state.error)
        tries = state.tries + (final & (found.error <= floor))
        far = (distance > _FAR) | (worst > _FAR * _TRUST)
        hot = ~overshot & far & ~state.cooling & (eps < hottest)
        stage_done = ~overshot & ~final & ((distance <= _NEAR) | (found.error <= jnp.maximum(goal, floor)))
        stays = hot | stage_done
        cooler = jnp.maximum(eps / _COOLING, epsilon)
        return _State(
            x=centred(jnp.where(overshot, 0.5 * (x + state.last), jnp.where(stays, x, x + eps * step))),
            last=jnp.where(overshot, state.last, x),
            worst=jnp.where(overshot, state.worst, jnp.where(stays, jnp.inf, worst)),
            merit=jnp.where(overshot, state.merit, jnp.where(stays, jnp.inf, merit)),
            trust=jnp.where(stays, _TRUST, trust),
            best=jnp.where(better, x, state.best),
            error=jnp.where(better, found.error, state.error),
            epsilon=jnp.where(hot, eps * _HEATING, jnp.where(stage_done, cooler, eps)),
            iteration=state.iteration + 1,
            tries=tries,
            cooling=state.cooling | stage_done,
            done=(final & (found.error <= goal)) | (tries >= _TRIES) | jnp.isnan(found.error),
            memory=found.memory,
        )

    def unfinished(state: _State) -> Bool[Array, ""]:
        return ~state.done & (state.iteration < max_iterations)

    # Potentials several times as large as the costs are those of another problem, and farther away than zeros.
    init = centred(init)
    init = centred(jnp.where(jnp.abs(init) <= _FAR * scale, init, 0))
    zero, no = jnp.zeros((), jnp.int32), jnp.asarray(False)
    infinite, trust = jnp.asarray(jnp.inf, init.dtype), jnp.asarray(_TRUST, init.dtype)
    start = _State(init, init, infinite, infinite, trust, init, infinite, epsilon, zero, zero, no, no, memory)
    end = jax.lax.while_loop(unfinished, iterate, start)
    return Annealed(end.best, end.iteration, (end.error <= goal) | (end.tries >= _TRIES), end.memory)


def solve(
    problem: TransportProblem, init: Float[Array, " K0"], tol: Float[Array, ""], max_iterations: int
) -> Potentials:
    """Potentials whose plan misses its marginals by at most `tol` (L1, of the mass that moves), or as little as the precision
    allows."""
    a, log_a, log_b, cost = problem.a, problem.log_a, problem.log_b, problem.cost
    present = a > 0
    inverse_rho0, inverse_rho1 = problem.inverse_rhos

    def look(f: Array, eps: Array, g: Array) -> Look:
        tau = 1 / (1 + eps * inverse_rho1)
        columns = problem.exponent(f, g) / eps + log_a[:, None]
        log_columns = jax.nn.logsumexp(columns, axis=0)
        v = jnp.exp(columns - log_columns)
        g = tau * (g - eps * log_columns)
        rows = problem.exponent(f, g) / eps + log_b
        log_rows = jax.nn.logsumexp(rows, axis=1)
        u = jnp.exp(rows - log_rows[:, None])
        log_all = 0 if problem.balanced else jax.nn.logsumexp(log_a + log_rows)
        flow = jnp.exp(log_a + log_rows - log_all)
        error = jnp.sum(jnp.abs(jnp.exp(log_a - f * inverse_rho0 - log_all) - flow))
        matrix = (1 + eps * inverse_rho0) * jnp.eye(len(a), dtype=cost.dtype) - tau * u @ v.T
        unit = rounding(u * flow[:, None], cost, f, eps)
        merit = None
        if problem.balanced:  # minus the dual objective, g eliminated
            worth = jnp.concatenate([jnp.where(present, a * f, 0), problem.b * g])
            merit = -jnp.sum(worth), jnp.sum(jnp.abs(worth))
        return Look(-f * inverse_rho0 - log_rows, error, matrix, unit, g, merit)

    goal = 0.5 * tol  # room for the rounding of g, which the certificate sees
    scale = jnp.max(jnp.where(present[:, None] & (log_b > -jnp.inf), jnp.abs(cost), 0))
    nothing, centre = jnp.zeros_like(log_b), a if problem.balanced else 0 * a
    end = anneal(look, init, nothing, present, centre, scale, problem.epsilon, goal, max_iterations, scale)
    g = problem.transpose().c_transform(end.x, end.memory)
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
