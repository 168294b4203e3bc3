r"""Newton's method on log-marginal equations, damped, and annealed in epsilon where it must be.

In units of epsilon the step :math:`\delta` solves :math:`(M + \mu I) \delta = R`, with the residual R, the logarithms of wanted
over actual marginals, and a diagonally dominant M-matrix M whose row sums are not negative. Those of :math:`M + \mu I` are at least
:math:`\mu`, so the damping :math:`\mu = |R|_\infty / r` keeps the step within the radius r of a trust region, and vanishes near the
solution.

Is a step good? Where the problem has a convex function that its solution minimises (minus the dual objective), that is the judge:
a step that raises it by more than rounding is not accepted; where all its change is rounding, and where there is no such function,
one that doubles :math:`|R|_\infty` is not. (To first order no step makes it larger. Without a judge of its own size, :math:`\mu` is
at most 1.) A step that is not accepted is halved, and r with it; otherwise r doubles back to 8, and beyond where steps come near
it: nearly equal weights at a small epsilon make potentials that hardly matter, and R a plateau many epsilon wide.

A step that is long says that the potentials are far, in units of epsilon, from the solution. Epsilon is then heated until the step
is short, and annealed back stage by stage. Potentials of a nearby problem need neither.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import matrices

RADIUS = 8.0  # of a stage's first step, in units of epsilon
FAR = 4.0  # epsilon: a step longer than this comes from far; so does a residual of more first radii
SHORT = 0.25  # epsilon: a stage ends with a step no longer than this
HEATING, COOLING = 8.0, 4.0  # epsilon rises, then falls, by these factors
AT_FLOOR = 4  # iterations within rounding of the solution, of which the best is kept


class Merit(NamedTuple):
    """A convex function that the solution minimises, and the sum of its terms' sizes, which its rounding is a part of: infinite
    where there is no such function, and the residual alone tells good steps from bad."""

    value: Float[Array, ""]
    magnitude: Float[Array, ""]

    @property
    def judges(self) -> Bool[Array, ""]:
        return ~jnp.isposinf(self.magnitude)


# (mu, careful) -> delta, what solves with a matrix; careful, it is one by whose step the merit falls if that is short enough.
Solve = Callable[[Array, Array], Array]


class NewtonSystem(NamedTuple):
    """Log-marginal equations at some unknowns: residuals and the matrix of their Newton step, and how far off the marginals are."""

    residual: Float[Array, " n"]
    matrix: Float[Array, "n n"] | Solve
    marginal_error: Float[Array, ""]  # L1, as a part of all mass
    rounding: Float[Array, ""]  # of the marginal error: a unit of rounding of the exponents, where the mass is
    warm_start: Any  # what is eliminated from the equations, for the next time
    merit: Merit


Equations = Callable[[Array, Array, Any], NewtonSystem]  # of unknowns, epsilon and a warm start


class Unknowns(NamedTuple):
    """What the unknowns are like."""

    present: Bool[Array, " n"]  # those that count
    centred: Callable[[Array], Array]  # without shifts that are free: larger potentials are rounded more coarsely
    scale: Float[Array, ""]  # the size of the costs

    def norm(self, x: Array) -> Float[Array, ""]:
        return jnp.max(jnp.where(self.present, jnp.abs(x), 0))


class Goal(NamedTuple):
    """What is asked for: at which epsilon, to which marginal error, heated no further than where, in how many iterations."""

    epsilon: Float[Array, ""]
    marginal_error: Float[Array, ""]
    hottest: Float[Array, ""]
    max_iterations: int


class Accepted(NamedTuple):
    """The last unknowns that were accepted, from which a step was taken; infinite where any next ones are."""

    x: Float[Array, " n"]
    residual_norm: Float[Array, ""]
    merit: Float[Array, ""]


class _State(NamedTuple):
    x: Float[Array, " n"]
    last: Accepted
    radius: Float[Array, ""]
    epsilon: Float[Array, ""]
    cooling: Bool[Array, ""]
    careful: Bool[Array, ""]  # since a step of this stage was not accepted
    retried: Bool[Array, ""]  # back at the last unknowns, for another step from there
    warm_start: Any
    best: Float[Array, " n"]  # of those seen at the goal's epsilon
    best_error: Float[Array, ""]
    n_at_floor: Int[Array, ""]
    n_iterations: Int[Array, ""]
    done: Bool[Array, ""]


class Annealed(NamedTuple):
    """Where the annealed iteration ended, and whether that is the solution up to rounding."""

    x: Float[Array, " n"]
    n_iterations: Int[Array, ""]
    at_floor: Bool[Array, ""]
    warm_start: Any


def anneal(equations: Equations, init: Float[Array, " n"], warm_start: Any, unknowns: Unknowns, goal: Goal) -> Annealed:
    """Solve log-marginal equations ``equations(x, epsilon, warm_start)`` from `init`."""

    def iterate(state: _State) -> _State:
        x, epsilon, last = state.x, state.epsilon, state.last
        system = equations(x, epsilon, state.warm_start)
        residual_norm = unknowns.norm(system.residual)
        rounding = residual_rounding(jnp.maximum(unknowns.scale, unknowns.norm(x)), epsilon)
        accepted = state.retried | accepts(last, residual_norm, system.merit, rounding)
        radius = next_radius(state.radius, accepted, unknowns.norm(x - last.x), epsilon)
        radius = jnp.where(state.retried, state.radius, radius)
        step = newton_step(system, damping(residual_norm, radius, system.merit), state.careful)
        step = unknowns.centred(step)
        length = unknowns.norm(step)
        # The matrix of several plans that share masses is no M-matrix, and bounds no step.
        longest = jnp.where(system.merit.judges, 2 * radius, jnp.inf)
        step = step * jnp.minimum(1, longest / jnp.where(length > 0, length, 1))

        floor = jnp.fmin(2 * system.rounding, rounding)
        at_goal = epsilon <= goal.epsilon
        better = at_goal & (system.marginal_error < state.best_error)
        n_at_floor = state.n_at_floor + (at_goal & (system.marginal_error <= floor))
        solved = system.marginal_error <= jnp.maximum(goal.marginal_error, floor)
        heats = accepted & is_far(length, residual_norm) & ~state.cooling & (epsilon < goal.hottest)
        cools = accepted & ~at_goal & ((length <= SHORT) | solved)
        stays = heats | cools  # the next epsilon's first step is judged by nothing before it
        retries = ~accepted & ~state.careful & callable(system.matrix)
        here = Accepted(x, jnp.where(stays, jnp.inf, residual_norm), jnp.where(stays, jnp.inf, system.merit.value))
        return _State(
            x=unknowns.centred(
                jnp.where(
                    accepted,
                    jnp.where(stays, x, x + epsilon * step),
                    jnp.where(retries, last.x, 0.5 * (x + last.x)),
                )
            ),
            last=Accepted(*(jnp.where(accepted, new, old) for new, old in zip(here, last, strict=True))),
            radius=jnp.where(stays, RADIUS, radius),
            epsilon=next_epsilon(epsilon, heats, cools, goal.epsilon),
            cooling=state.cooling | cools,
            careful=(state.careful | retries) & ~stays,
            retried=retries,
            warm_start=system.warm_start,
            best=jnp.where(better, x, state.best),
            best_error=jnp.where(better, system.marginal_error, state.best_error),
            n_at_floor=n_at_floor,
            n_iterations=state.n_iterations + 1,
            done=is_done(system.marginal_error, at_goal, n_at_floor, goal.marginal_error),
        )

    def unfinished(state: _State) -> Bool[Array, ""]:
        return ~state.done & (state.n_iterations < goal.max_iterations)

    # Potentials several times as large as the costs are those of another problem, and farther away than zeros.
    init = unknowns.centred(init)
    init = unknowns.centred(jnp.where(jnp.abs(init) <= FAR * unknowns.scale, init, 0))
    zero, no, infinite = jnp.zeros((), jnp.int32), jnp.asarray(False), jnp.asarray(jnp.inf, init.dtype)
    start = _State(
        x=init,
        last=Accepted(init, infinite, infinite),
        radius=jnp.asarray(RADIUS, init.dtype),
        epsilon=goal.epsilon,
        cooling=no,
        careful=no,
        retried=no,
        warm_start=warm_start,
        best=init,
        best_error=infinite,
        n_at_floor=zero,
        n_iterations=zero,
        done=no,
    )
    end = jax.lax.while_loop(unfinished, iterate, start)
    at_floor = (end.best_error <= goal.marginal_error) | (end.n_at_floor >= AT_FLOOR)
    return Annealed(end.best, end.n_iterations, at_floor, end.warm_start)


def residual_rounding(scale: Array, epsilon: Array) -> Float[Array, ""]:
    """What rounding of potentials and costs alone can leave of the residual (measured, it is several times less): that of the
    farthest component, whatever its mass. The marginal error has no more."""
    return 2 * jnp.finfo(scale.dtype).eps * scale / epsilon


def accepts(last: Accepted, residual_norm: Array, merit: Merit, rounding: Array) -> Bool[Array, ""]:
    """Whether the step from `last` has led to something better, or may have but for rounding."""
    doubled = residual_norm > jnp.maximum(2 * last.residual_norm, 2 * rounding)
    rise, noise = merit.value - last.merit, 4 * jnp.finfo(merit.value.dtype).eps * merit.magnitude
    return ~((rise > noise) | (doubled & (rise > -noise)))


def next_radius(radius: Array, accepted: Array, length: Array, epsilon: Array) -> Float[Array, ""]:
    """Half of it after a step that was not accepted; twice, where that is below the first one or the step came near it."""
    grows = (radius < RADIUS) | (length > 0.5 * epsilon * radius)
    return radius * jnp.where(accepted, jnp.where(grows, 2, 1), 0.5)


def damping(residual_norm: Array, radius: Array, merit: Merit) -> Float[Array, ""]:
    r""":math:`\mu = |R|_\infty / r`, which bounds the step by r; at most 1 where no merit judges it."""
    least = 10 * jnp.finfo(residual_norm.dtype).eps  # balanced, the matrix alone is singular
    return jnp.clip(residual_norm / radius, least, jnp.where(merit.judges, jnp.inf, 1))


def newton_step(system: NewtonSystem, mu: Array, careful: Array | bool = False) -> Float[Array, " n"]:
    r"""The :math:`\delta` with :math:`(M + \mu I) \delta = R`, in units of epsilon."""
    if callable(system.matrix):
        return system.matrix(mu, jnp.asarray(careful))
    identity = jnp.eye(len(system.residual), dtype=system.residual.dtype)
    return matrices.solve_dominant(system.matrix + mu * identity, system.residual)


def is_far(length: Array, residual_norm: Array) -> Bool[Array, ""]:
    """Whether the step is limited by the radius, not by the distance to the solution."""
    return (length > FAR) | (residual_norm > FAR * RADIUS)


def next_epsilon(epsilon: Array, heats: Array, cools: Array, goal: Array) -> Float[Array, ""]:
    """The next stage's: hotter, or cooler but not below the goal; the same within a stage."""
    return jnp.where(heats, epsilon * HEATING, jnp.where(cools, jnp.maximum(epsilon / COOLING, goal), epsilon))


def is_done(marginal_error: Array, at_goal: Array, n_at_floor: Array, goal: Array) -> Bool[Array, ""]:
    """Whether the goal is met, or no precision is left to come nearer; what is NaN gets no better."""
    return (at_goal & (marginal_error <= goal)) | (n_at_floor >= AT_FLOOR) | jnp.isnan(marginal_error)
