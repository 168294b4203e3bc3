r"""Newton's step for the plans of all edges and the masses of all nodes: what an edge's own equations are, and how they are solved.

An edge's equations, with what its nodes answer to it, are a pair's: half of the unknowns eliminated, a dominant matrix is left.
What nodes pass on from one edge to the next is left to a Krylov iteration that these precondition: its cost is linear in the
number of edges, and a pair needs none.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import matrices
from coupled_gmm.core.tree import chosen

_KRYLOV_STEPS, _KRYLOV_TOLERANCE = 40, 1e-3  # between edges, of a Newton step


class Answers(NamedTuple):
    """How log-masses fall as potentials rise, in units of epsilon: by slope (I - 1 pi^T) of the sum of rate delta.

    As differences, slope_k pi_l (rate_k delta_k - rate_l delta_l): a component whose slope is many orders above the others' is
    nearly all of pi.
    """

    slope: Float[Array, "V K"]
    pi: Float[Array, "V K"]
    rate: Float[Array, "2 E K"]

    @property
    def differences(self) -> Float[Array, "V K K"]:
        """slope pi^T, without its diagonal."""
        k = self.slope.shape[-1]
        return jnp.where(jnp.eye(k, dtype=bool), 0, self.slope[..., None] * self.pi[:, None])

    @classmethod
    def of(cls, slope: Array, log_mass: Array, rate: Array) -> "Answers":
        """They go on summing to 1."""
        pi = jnp.exp(log_mass) * slope
        total = jnp.sum(pi, axis=-1, keepdims=True)
        return cls(slope, pi / jnp.where(total > 0, total, 1), rate)

    def of_nodes(self, ends: Array, delta: Float[Array, "2 E K"]) -> Float[Array, "V K"]:
        pulls = jnp.zeros_like(self.slope).at[ends].add(self.rate * delta)
        return jnp.sum(self.differences * (pulls[..., None] - pulls[:, None]), axis=-1)


class _Edges(NamedTuple):
    """Every edge's own part of Newton's equations: [B0 U; V B1]."""

    own: Float[Array, "E K K"]  # B0
    diagonal: Float[Array, "E K"]
    slope: Float[Array, "E K"]
    share: Float[Array, "E K"]  # B1 = diag(diagonal) - slope share^T
    room: Float[Array, " E"]  # 1 - share^T slope / diagonal, not cancelled
    u: Float[Array, "E K K"]
    v: Float[Array, "E K K"]

    @classmethod
    def of(cls, answers: Answers, ends: Array, base: Array, masses: Array, u: Array, v: Array) -> "_Edges":
        identity = jnp.eye(u.shape[-1], dtype=u.dtype)
        differences = masses[0][..., None] * answers.differences[ends[0]]
        sums = base[0] + answers.rate[0] * jnp.sum(differences, axis=-1)
        own = sums[..., None] * identity - differences * answers.rate[0][:, None]
        slope, pi = masses[1] * answers.slope[ends[1]], answers.pi[ends[1]]
        diagonal = base[1] + slope * answers.rate[1]
        room = jnp.sum(pi * base[1] / diagonal, axis=-1)
        free = jnp.sum(pi, axis=-1) > 0
        return cls(own, diagonal, slope, pi * answers.rate[1], jnp.where(free, room, 1), u, v)

    def other_side(self, y: Float[Array, "E K n"]) -> Float[Array, "E K n"]:
        """B1^-1 y."""
        scaled = y / self.diagonal[..., None]
        common = jnp.sum(self.share[..., None] * scaled, axis=1, keepdims=True) / self.room[:, None, None]
        return scaled + (self.slope / self.diagonal)[..., None] * common

    def schur(self) -> Float[Array, "E K K"]:
        """B0 - U B1^-1 V: dominant, as the whole is."""
        return self.own - self.u @ self.other_side(self.v)

    def solve(self, inverse: Array, right: Float[Array, "2 E K"]) -> Float[Array, "2 E K"]:
        return self.back(_times(inverse, self.reduced(right)), right)

    def reduced(self, right: Float[Array, "2 E K"]) -> Float[Array, "E K"]:
        return right[0] - _times(self.u, self.other_side(right[1][..., None])[..., 0])

    def back(self, x: Float[Array, "E K"], right: Float[Array, "2 E K"]) -> Float[Array, "2 E K"]:
        return jnp.stack([x, self.other_side((right[1] - _times(self.v, x))[..., None])[..., 0]])

    def across(self, x: Float[Array, "2 E K"]) -> Float[Array, "2 E K"]:
        return jnp.stack([_times(self.u, x[1]), _times(self.v, x[0])])


def _times(matrices: Float[Array, "E K K"], vectors: Float[Array, "E K"]) -> Float[Array, "E K"]:
    return jnp.einsum("ekl,el->ek", matrices, vectors)


def row_scales(residual: Float[Array, "2 E K"]) -> tuple[Float[Array, "2 E K"], Float[Array, "2 E K"]]:
    r"""Of the plan's and of the masses' part of Newton's rows, that make their solution one that the merit falls along.

    Far from the solution the log-marginals' matrix is not symmetric in any metric. With R a row's residual, the logarithm of
    wanted over actual mass, and the logarithmic mean of these as the row's metric, residuals are minus the merit's gradient; the
    plan's part times R / (e^R - 1) and the masses' times R / (1 - e^-R) are symmetric.
    """
    size = jnp.abs(residual)
    small = size < 1e-3
    falling = jnp.where(small, 1 - size / 2, size / jnp.expm1(jnp.where(small, 1, size)))  # R / (e^R - 1) of |R|
    rising = falling + size
    return jnp.where(residual > 0, falling, rising), jnp.where(residual > 0, rising, falling)


def newton_step(answers: Answers, ends: Array, base: Array, masses: Array, u: Array, v: Array, right: Array) -> Array:
    edges = _Edges.of(answers, ends, base, masses, u, v)
    schur = edges.schur()
    if len(u) == 1:
        return edges.back(jax.vmap(matrices.solve_dominant)(schur, edges.reduced(right)), right)
    inverse = matrices.invert_dominant(schur)

    def apply(delta: Array) -> Array:
        return base * delta + edges.across(delta) + masses * answers.of_nodes(ends, delta)[ends]

    first = edges.solve(inverse, right)
    whole = _bicgstab(apply, right, first, lambda y: edges.solve(inverse, y))
    miss = lambda delta: jnp.max(jnp.abs(right - apply(delta)))  # noqa: E731
    return jnp.where(miss(whole) <= miss(first), whole, first)


class _Krylov(NamedTuple):
    x: Array
    residual: Array
    direction: Array
    image: Array  # of the preconditioned direction
    rho: Float[Array, ""]
    alpha: Float[Array, ""]
    omega: Float[Array, ""]
    n: Int[Array, ""]
    broken: Bool[Array, ""]


def _bicgstab(apply: Callable, right: Array, start: Array, precondition: Callable) -> Array:
    """x with apply(x) near `right`, by BiCGSTAB (van der Vorst 1992), preconditioned from the right.

    That of ``jax.scipy`` can't be batched inside a loop: as a linear solve, with derivatives that nobody needs here.
    """
    enough = _KRYLOV_TOLERANCE**2 * jnp.vdot(right, right)
    first = right - apply(start)

    def step(now: _Krylov) -> _Krylov:
        rho = jnp.vdot(first, now.residual)
        beta = rho / now.rho * now.alpha / now.omega
        direction = now.residual + beta * (now.direction - now.omega * now.image)
        along = precondition(direction)
        image = apply(along)
        alpha = rho / jnp.vdot(first, image)
        half = now.residual - alpha * image
        across = precondition(half)
        turned = apply(across)
        omega = jnp.vdot(turned, half) / jnp.vdot(turned, turned)
        there = jnp.vdot(half, half) <= enough
        omega = jnp.where(there, 0, omega)
        x, residual = now.x + alpha * along + omega * across, half - omega * turned
        broken = ~jnp.isfinite(jnp.vdot(x, x) + jnp.vdot(residual, residual))
        found = _Krylov(x, residual, direction, image, rho, alpha, omega, now.n + 1, broken | (omega == 0))
        return chosen(broken, now._replace(broken=broken), found)

    def unfinished(now: _Krylov) -> Bool[Array, ""]:
        return (jnp.vdot(now.residual, now.residual) > enough) & (now.n < _KRYLOV_STEPS) & ~now.broken

    one, nothing = jnp.ones((), right.dtype), jnp.zeros_like(right)
    begin = _Krylov(start, first, nothing, nothing, one, one, one, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    return jax.lax.while_loop(unfinished, step, begin).x
