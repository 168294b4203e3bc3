r"""Entropic transport between small discrete measures, balanced or not, by Newton's method on log-marginals.

The problem, for a cost C, masses a and b, and P >= 0:

.. math:: \min_P \langle P, C \rangle + \epsilon KL(P | a b^T) + \rho KL(P 1 | a) + \rho KL(P^T 1 | b)

(:math:`\rho = \infty`: the marginals are a and b). Its solution is :math:`P = a b^T \exp((f + g - C) / \epsilon)`. The potential
g is eliminated; what remains is, in the unknowns f, that the row sums equal :math:`a e^{-f / \rho}`. Sinkhorn's iteration is
the Jacobi step of these equations in the logarithm of the row sums. Here is their Newton step: with U and V the row- and
column-stochastic forms of P, and R the logarithm of wanted over actual row sums,

.. math:: ((1 + \epsilon / \rho + \mu) I - \tau U V^T) \delta = R, \qquad f \leftarrow f + \epsilon \delta .

The matrix is a diagonally dominant M-matrix whose row sums are at least :math:`\mu`, so a damping
:math:`\mu = \min(1, |R|_\infty / 8)` bounds the step: it is never longer than 8 epsilon, or |R| if that is more, it becomes
Newton's own near the solution, and no line search is needed.

A step at its bound says that the potentials are far, in units of epsilon, from the solution. Epsilon is then heated until
the step is short, and annealed back stage by stage. Potentials of a nearby problem need neither. Components of mass zero
are legal: U and V do not see them, and they get their c-transform.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm import matrices
from coupled_gmm.tree import pytree

_TRUST = 8.0  # the step's bound, in units of epsilon
_FAR = 4.0  # a step longer than this is limited by the bound, not by the distance to the solution
_HEATING, _COOLING = 8.0, 4.0  # epsilon rises, then falls, by these factors
_TRIES = 4  # iterations within rounding of the solution, of which the best is kept
_NEAR = 0.25  # a stage is done when its step is no longer than this


@pytree
class Potentials:
    """Dual potentials of a plan, with the solver's certificate."""

    f: Float[Array, " K0"]
    g: Float[Array, " K1"]
    marginal_error: Float[Array, ""]
    n_iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    stalled: Bool[Array, ""]  # at what the precision can reach, above the tolerance

    def swap(self) -> "Potentials":
        """The same for the transposed problem."""
        return dataclasses.replace(self, f=self.g, g=self.f)


@pytree
class _State:
    f: Float[Array, " K0"]
    best: Float[Array, " K0"]  # of those seen at the target epsilon
    error: Float[Array, ""]
    epsilon: Float[Array, ""]
    iteration: Int[Array, ""]
    tries: Int[Array, ""]
    cooling: Bool[Array, ""]
    done: Bool[Array, ""]


def solve(
    cost: Float[Array, "K0 K1"],
    log_a: Float[Array, " K0"],
    log_b: Float[Array, " K1"],
    epsilon: Float[Array, ""],
    rho: Float[Array, ""],
    init: Float[Array, " K0"],
    tol: Float[Array, ""],
    max_iterations: int,
    balanced: bool,
) -> Potentials:
    """Potentials whose plan misses its marginals by at most `tol` (L1), or as little as the precision allows."""
    a = jnp.exp(log_a)
    scale = jnp.max(jnp.abs(cost))
    # Rounding of f, g and C alone can leave a marginal error of this size (measured, it is several times less).
    floor = 2 * jnp.finfo(cost.dtype).eps * scale / epsilon
    inverse_rho = jnp.zeros((), cost.dtype) if balanced else 1 / rho

    def iterate(state: _State) -> _State:
        f, eps = state.f, state.epsilon
        tau = 1 / (1 + eps * inverse_rho)
        kernel = (f[:, None] - cost) / eps
        columns = kernel + log_a[:, None]
        log_columns = jax.nn.logsumexp(columns, axis=0)
        v = jnp.exp(columns - log_columns)
        rows = kernel - tau * log_columns + log_b
        log_rows = jax.nn.logsumexp(rows, axis=1)
        u = jnp.exp(rows - log_rows[:, None])
        residual = -f * inverse_rho - log_rows
        worst = jnp.max(jnp.where(a > 0, jnp.abs(residual), 0))
        error = jnp.sum(a * jnp.abs(jnp.exp(-f * inverse_rho) - jnp.exp(log_rows)))

        damping = jnp.clip(worst / _TRUST, 10 * jnp.finfo(cost.dtype).eps, 1)
        system = (1 + eps * inverse_rho + damping) * jnp.eye(len(a), dtype=cost.dtype) - tau * u @ v.T
        step = matrices.solve_dominant(system, residual)
        if balanced:  # potentials are free up to a constant: f stays about zero
            step = step - jnp.sum(a * step)
        distance = jnp.max(jnp.where(a > 0, jnp.abs(step), 0))

        final = eps <= epsilon
        better = final & (error < state.error)
        tries = state.tries + (final & (error <= floor))
        hot = (distance > _FAR) & ~state.cooling & (eps < scale)
        stage_done = ~final & (distance <= _NEAR)
        cooler = jnp.maximum(eps / _COOLING, epsilon)
        return _State(
            f=jnp.where(hot | stage_done, f, f + eps * step),
            best=jnp.where(better, f, state.best),
            error=jnp.where(better, error, state.error),
            epsilon=jnp.where(hot, eps * _HEATING, jnp.where(stage_done, cooler, eps)),
            iteration=state.iteration + 1,
            tries=tries,
            cooling=state.cooling | stage_done,
            done=(final & (error <= tol)) | (tries >= _TRIES) | jnp.isnan(error),
        )

    def unfinished(state: _State) -> Bool[Array, ""]:
        return ~state.done & (state.iteration < max_iterations)

    zero, no = jnp.zeros((), jnp.int32), jnp.asarray(False)
    start = _State(init, init, jnp.asarray(jnp.inf, cost.dtype), epsilon, zero, zero, no, no)
    end = jax.lax.while_loop(unfinished, iterate, start)
    g = transform(cost.T, log_a, end.best, epsilon, rho, balanced)
    # The certificate is of the potentials as they are returned, after rounding.
    error = row_error(jnp.exp(log_plan(cost, log_a, log_b, end.best, g, epsilon)), a, end.best, rho, balanced)
    converged = error <= tol
    return Potentials(end.best, g, error, end.iteration, converged, ~converged & (end.tries >= _TRIES))


def transform(cost: Array, log_b: Array, g: Array, epsilon: Array, rho: Array, balanced: bool) -> Float[Array, " K0"]:
    """The f that is optimal for a given g: one half-step of Sinkhorn's iteration."""
    tau = 1.0 if balanced else 1 / (1 + epsilon / rho)
    return -epsilon * tau * jax.nn.logsumexp(log_b + (g - cost) / epsilon, axis=1)


def row_error(plan: Array, a: Array, f: Array, rho: Array, balanced: bool) -> Float[Array, ""]:
    """L1 distance of the row sums from a, or from a e^(-f / rho) when unbalanced."""
    wanted = a if balanced else a * jnp.exp(-f / rho)
    return jnp.sum(jnp.abs(plan.sum(1) - wanted))


def log_plan(cost: Array, log_a: Array, log_b: Array, f: Array, g: Array, epsilon: Array) -> Float[Array, "K0 K1"]:
    return log_a[:, None] + log_b + (f[:, None] + g - cost) / epsilon


def dual_value(
    cost: Float[Array, "K0 K1"],
    a: Float[Array, " K0"],
    b: Float[Array, " K1"],
    f: Float[Array, " K0"],
    g: Float[Array, " K1"],
    epsilon: Float[Array, ""],
    rho: Float[Array, ""],
    balanced: bool,
) -> Float[Array, ""]:
    r"""The dual objective :math:`\langle \phi(f), a \rangle + \langle \phi(g), b \rangle + \epsilon (|a||b| - |P|)`.

    :math:`\phi(f) = \rho (1 - e^{-f / \rho})`, or f when balanced. Its derivatives in C, a and b, at fixed potentials, are those of
    the optimal value (envelope theorem); its error is of second order in that of the potentials.
    """
    f, g = jax.lax.stop_gradient((f, g))
    # The masses stand outside the exponential, so that the derivative in a mass of zero is that of the formula.
    mass = a @ jnp.exp((f[:, None] + g - cost) / epsilon) @ b
    if not balanced:
        f, g = (jnp.where(jnp.isinf(rho), p, -rho * jnp.expm1(-p / rho)) for p in (f, g))
    return f @ a + g @ b + epsilon * (jnp.sum(a) * jnp.sum(b) - mass)
