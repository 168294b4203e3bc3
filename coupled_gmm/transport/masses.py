r"""Masses and plans of a graph of mixtures solved for together: the part of an M-step that is not smooth.

Given the costs of all edges, and masses n_i that the clouds ask for with weights v_i, maximise over the masses a_i

.. math:: \sum_i v_i \sum_k n_{ik} \log a_{ik} - \sum_{(i, j)} \lambda_{ij} T(a_i, a_j)

Balanced, T has kinks in the masses: where they agree, or nearly, no gradient says how far they should part. As a saddle point in
masses and potentials the problem is smooth. Its equations are those that `annealing` solves, with masses that answer to the
potentials of all edges of their node,

.. math:: a_i = n_i / (1 + \Phi_i - s_i), \qquad \Phi_i = \sum_{h} \lambda_h \phi(F_h) / v_i, \quad
   \phi(F) = \rho (1 - e^{-F / \rho})

(F where :math:`\rho` is infinite), :math:`s_i` being such that they sum to 1. With the masses put in, it is a convex function of
the potentials that is minimised: it tells good steps from bad, where the residual alone may go round in circles.

The entropy of a plan is taken against the marginals :math:`p_0 q_0^T` that the plan has for the present masses. That makes the
problem concave, and its value a lower bound that is exact at the start: balanced, T differs by
:math:`\epsilon (KL(a | a_0) + KL(b | b_0))`, never negative; else what a mass pays for being missed is
:math:`\rho + \epsilon`, since :math:`p \log a \ge p \log p_0 + p - p_0 - p \log (p / a)`. So the true objective rises.

Newton's step is one of all edges at once. An edge's own equations, with what its nodes answer to it, are a pair's: solved
directly. What nodes pass on from one edge to the next is left to a Krylov iteration that these precondition: its cost is linear
in the number of edges, and a pair needs none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import bicgstab
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import expansions, matrices
from coupled_gmm.core.expansions import Words
from coupled_gmm.core.tree import pytree
from coupled_gmm.transport import entropic
from coupled_gmm.transport.annealing import FAR, Goal, Merit, NewtonSystem, Unknowns, anneal
from coupled_gmm.transport.entropic import Potentials
from coupled_gmm.transport.problem import Potential, TransportProblem, largest_exponent, value, worth

# Of Newton's method for the normalizer, from the last one: the merit must be that of masses that sum to 1.
_NORMALIZER_STEPS, _LAST_NORMALIZER_STEPS = 4, 8
_KRYLOV_STEPS, _KRYLOV_TOLERANCE = 40, 1e-3  # between edges, of a Newton step


@pytree
class Response:
    """What masses answer with: the targets n (summing to 1), the weights v above 0, and which nodes are free to answer."""

    targets: Float[Array, "V K"]
    weights: Float[Array, " V"]
    free: Bool[Array, " V"]


@pytree
class Links:
    """The nodes that edges join, and the weights lambda of their transport costs."""

    ends: Int[Array, "2 E"]
    weights: Float[Array, " E"]


class _Nodes:
    """Masses as a function of what the edges' potentials pull with."""

    def __init__(self, response: Response, given: Float[Array, "V K"]):
        self.targets, self.weights = response.targets, response.weights
        self.free = response.free[:, None]
        self.present = jnp.where(self.free, self.targets > 0, jnp.isfinite(given))
        self.given = jnp.where(self.present, given, -jnp.inf)  # what no cloud asks for gives up what it has

    def answer(self, pull: Array, normalizer: Array, steps: int) -> tuple[Array, Array, Array]:
        """Log-masses, the slopes of their answer, and the improved normalizer, at which they sum to 1.

        That is the least denominator 1 + Phi - s. Newton's method on the reciprocal of the sum, which is concave and nearly
        linear in it, closes in from below.
        """
        targets = self.targets
        has = targets > 0
        excess = jnp.where(has, pull - self._lowest(pull), 0)
        # Of those that have no more excess than one, the masses would sum to more than 1 at any less.
        upto = jnp.sum(jnp.where(excess[..., None, :] <= excess[..., None], targets[..., None, :], 0), axis=-1)
        least = jnp.max(jnp.where(has, upto - excess, 0), axis=-1, keepdims=True)

        def newton(_, normalizer):
            share = jnp.where(has, targets / (normalizer + excess), 0)
            total = jnp.sum(share, axis=-1, keepdims=True)
            # No square of a tiny target's reciprocal.
            slope = jnp.sum(share / total / ((normalizer + excess) * total), axis=-1, keepdims=True)
            return jnp.clip(normalizer + (1 - 1 / total) / slope, least, 1)

        # The last normalizer may be that of another component's least excess, with quite another target.
        normalizer = jnp.clip(normalizer, least, 1)
        normalizer = jax.lax.fori_loop(0, steps, newton, normalizer, unroll=steps == _NORMALIZER_STEPS)
        denominator = normalizer + excess
        log_mass = jnp.where(has, jnp.log(jnp.where(has, targets, 1)) - jnp.log(denominator), -jnp.inf)
        return (
            jnp.where(self.free, log_mass, self.given),
            jnp.where(self.free & has, 1 / denominator, 0),
            normalizer,
        )

    def _lowest(self, pull: Array) -> Float[Array, "V 1"]:
        return jnp.min(jnp.where(self.targets > 0, pull, jnp.inf), axis=-1, keepdims=True)

    def worth(self, log_mass: Array, pull: Array, normalizer: Array) -> Float[Array, " n"]:
        r"""The terms of :math:`v (n \log a - a \Phi)`, which free masses have, but for a constant.

        As a Lagrangian in the normalizer, least where the masses sum to 1: one that is not quite there seems worth no less.
        """
        has = self.free & (self.targets > 0)
        one = jnp.where(has, self.targets * jnp.where(has, log_mass, 0), 0)
        common = jnp.where(self.free, normalizer - self._lowest(pull), 0)
        return (self.weights[:, None] * jnp.concatenate([one, common], axis=1)).ravel()


class _Answers(NamedTuple):
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
    def of(cls, slope: Array, log_mass: Array, rate: Array) -> "_Answers":
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
    def of(cls, answers: _Answers, ends: Array, base: Array, masses: Array, u: Array, v: Array) -> "_Edges":
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


def solve(
    problems: TransportProblem,
    links: Links,
    log_masses: Float[Array, "V K"],
    init: tuple[Potential, Potential],
    tol: Float[Array, ""],
    max_iterations: int,
    response: Response,
) -> tuple[Potentials, Float[Array, "V K"]]:
    """Potentials and masses of the problems of all edges, stacked; masses of nodes that are not free stay the present ones.

    `init`: the potentials of the plans between the present masses, or of ones nearby where no node is free. Where unbalanced,
    those that are returned are optimal for masses that were free only once they no longer move.
    """
    ends, k = links.ends, log_masses.shape[-1]
    nodes = _Nodes(response, log_masses)
    given, present, free = nodes.given[ends], nodes.present[ends], response.free[ends]
    unit = jnp.exp2(jnp.round(jnp.log2(problems.epsilon)))  # in which potentials are unknowns: no rounding by it
    epsilon = problems.epsilon / unit
    price = _inverse_rhos(problems) * unit  # 1 / rho
    price = price / (1 + jnp.where(free, epsilon * price, 0))
    rho = jnp.where(price > 0, 1 / jnp.where(price > 0, price, 1), jnp.inf)[..., None]
    both = present[0][:, :, None] & present[1][:, None]
    # What is unknown is how potentials change, and costs are less those that there are: rounded as finely as the change is.
    near = _near(problems, both, init)
    reduced = -jax.vmap(TransportProblem.exponent)(problems, *near) / unit[:, None, None]
    anchored = TransportProblem.of_log_masses(reduced, given[0], given[1], epsilon=epsilon, balanced=problems.balanced)
    start = jnp.stack([value(side) for side in near]) / unit[:, None]
    start = jnp.where(free[..., None], start * (1 + epsilon * _inverse_rhos(problems) * unit)[..., None], start)
    # Where no node is free, edges have nothing to do with each other, and each counts.
    weights = jnp.where(jnp.any(response.free), links.weights * unit, 1)
    rates = jnp.where(free, links.weights * unit / response.weights[ends], 0)[..., None]
    kept = jnp.exp(jnp.minimum(-start * price[..., None], largest_exponent(start)))

    def summed(worths: Float[Array, "2 E K"]) -> Float[Array, "V K"]:
        return jnp.zeros_like(log_masses).at[ends].add(rates * worths)

    # A shift of all of a node's is free: masses sum to 1.
    pulled = summed(worth(start, rho))
    pulled = pulled - jnp.min(jnp.where(nodes.present, pulled, jnp.inf), axis=-1, keepdims=True)

    def pulls(x: Array) -> Float[Array, "V K"]:
        """phi of the whole potential is that of the start, and that of the change times what the start has left of masses."""
        return jnp.where(nodes.present, pulled, 0) + summed(kept * worth(x, rho))

    def equations(x: Array, heat: Array, normalizer: Array) -> NewtonSystem:
        x, eps = x.reshape(2, -1, k), epsilon * heat
        pull = pulls(x)
        log_mass, slope, normalizer = nodes.answer(pull, normalizer, _NORMALIZER_STEPS)
        wanted = log_mass[ends] - (start + x) * price[..., None]
        log_plan = jax.vmap(TransportProblem.log_plan)(anchored.at(eps), x[0], x[1])
        log_sums = jnp.stack([jax.nn.logsumexp(log_plan, axis=2), jax.nn.logsumexp(log_plan, axis=1)])
        centres = jnp.where(present, log_sums, 0)
        u, v = jnp.exp(log_plan - centres[0][..., None]), jnp.exp(log_plan - centres[1][:, None])
        log_total = 0 if problems.balanced else jax.nn.logsumexp(log_plan, axis=(1, 2))[:, None]
        part = lambda log_mass: jnp.exp(log_mass - log_total)  # noqa: E731
        missed = jnp.sum(jnp.abs(part(log_sums) - part(wanted)), axis=(0, 2))
        lost = jnp.max(jnp.abs(jnp.sum(jnp.exp(log_mass), axis=-1) - 1))
        plan = jnp.exp(log_plan - jnp.reshape(log_total, (-1, 1, 1)))
        # What rounding of the pulls is worth in masses.
        swayed = jnp.finfo(x.dtype).eps * jnp.exp(log_mass) * slope * summed(jnp.abs(kept * worth(x, rho)))
        moved = kept * jnp.exp(jnp.minimum(-x * price[..., None], largest_exponent(x)))  # the slope of worth
        answers = _Answers.of(slope, log_mass, rates * eps[:, None] * moved)
        paid = jnp.where(present & ~free[..., None], jnp.exp(log_mass[ends]) * kept * worth(x, rho), 0)
        mass = eps[:, None] * jnp.exp(log_sums[0])
        terms = [
            nodes.worth(log_mass, pull, normalizer),
            -weights[:, None] * paid[0],
            -weights[:, None] * paid[1],
            weights[:, None] * mass,
        ]
        terms = jnp.concatenate([term.ravel() for term in terms])
        residual = jnp.where(present, wanted - log_sums, 0)

        def step(mu: Array, careful: Array) -> Array:
            rows, masses = (jnp.where(careful, scale, 1) for scale in _row_scales(residual))
            base = jnp.maximum(1, rows) * (1 + mu) + masses * (eps * price)[..., None]
            across = u * rows[0][..., None], matrices.transpose(v) * rows[1][..., None]
            delta = _newton_step(answers, ends, base, masses, *across, residual)
            return (epsilon[:, None] * delta).ravel()

        return NewtonSystem(
            residual=residual.ravel(),
            matrix=step,
            marginal_error=jnp.max(missed) + lost,
            rounding=jnp.max(jax.vmap(entropic.rounding)(plan, reduced, x[0], eps)) + jnp.max(jnp.sum(swayed, axis=-1)),
            warm_start=normalizer,
            merit=Merit(jnp.sum(terms), jnp.sum(jnp.abs(terms))),
        )

    scales = jnp.max(jnp.where(both, jnp.abs(reduced), 0), axis=(1, 2)) / epsilon
    scale = jnp.max(scales)
    shift_weights = jnp.exp(given[0]) if problems.balanced else jnp.zeros_like(given[0])

    def centred(x: Array) -> Array:
        x = x.reshape(2, -1, k)
        shift = jnp.sum(jnp.where(shift_weights > 0, shift_weights * x[0], 0), axis=-1, keepdims=True)
        return (x + jnp.stack([-shift, shift])).ravel()

    # At an epsilon above v / lambda masses answer to a step in F by orders of magnitude.
    hottest = jnp.minimum(scale, 1 / jnp.maximum(jnp.max(rates * epsilon[:, None]), jnp.finfo(scale.dtype).tiny))
    # A part of the mass that goes astray costs what an edge weighs times its costs.
    heaviest = jnp.max(links.weights * unit * epsilon * scales) / jnp.max(response.weights)
    goal = Goal(
        jnp.ones((), scale.dtype),
        marginal_error=jnp.maximum(tol / (16 * jnp.maximum(1, heaviest)), 2 * jnp.finfo(scale.dtype).eps),
        hottest=jnp.maximum(1, hottest),
        max_iterations=max_iterations,
    )
    unknowns = Unknowns(present.ravel(), centred, scale)
    end = anneal(
        equations, jnp.zeros(start.size, start.dtype), jnp.ones((len(log_masses), 1), start.dtype), unknowns, goal
    )
    x = end.x.reshape(2, -1, k)
    new, _, _ = nodes.answer(pulls(x), end.warm_start, _LAST_NORMALIZER_STEPS)
    change = unit[:, None] * (x - epsilon[:, None] * _difference(new[ends], given))
    found = _potentials(problems, new[ends], present, near, change)
    return jax.vmap(entropic.certified, (0, 0, 0, None, None))(*found, tol, end), new


def _row_scales(residual: Float[Array, "2 E K"]) -> tuple[Float[Array, "2 E K"], Float[Array, "2 E K"]]:
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


def _newton_step(answers: _Answers, ends: Array, base: Array, masses: Array, u: Array, v: Array, right: Array) -> Array:
    edges = _Edges.of(answers, ends, base, masses, u, v)
    schur = edges.schur()
    if len(u) == 1:
        return edges.back(jax.vmap(matrices.solve_dominant)(schur, edges.reduced(right)), right)
    inverse = matrices.invert_dominant(schur)

    def apply(delta: Array) -> Array:
        return base * delta + edges.across(delta) + masses * answers.of_nodes(ends, delta)[ends]

    first = edges.solve(inverse, right)
    whole, _ = bicgstab(
        apply, right, x0=first, tol=_KRYLOV_TOLERANCE, maxiter=_KRYLOV_STEPS, M=lambda y: edges.solve(inverse, y)
    )
    miss = lambda delta: jnp.max(jnp.abs(right - apply(delta)))  # noqa: E731
    return jnp.where(miss(whole) <= miss(first), whole, first)


def _near(
    problems: TransportProblem, both: Bool[Array, "E K K"], init: tuple[Potential, Potential]
) -> tuple[Words, Words]:
    """Potentials to start from; those that are of another problem are farther away than zero."""
    scale = jnp.max(jnp.where(both, jnp.abs(problems.cost), 0), axis=(1, 2))[:, None]
    sides = [expansions.words(side) for side in init]
    f, g = (tuple(jnp.where(jnp.abs(side[0]) <= FAR * scale, word, 0) for word in side) for side in sides)
    return f, g


def _potentials(
    problems: TransportProblem, log_masses: Array, present: Array, near: tuple[Words, Words], change: Array
) -> tuple[TransportProblem, Words, Words]:
    """The problems between the new masses, with f centred by them, and g once more from f: rounded no more than they need be."""
    solved = problems.with_log_masses(log_masses[0], log_masses[1])
    f, g = (
        expansions.moved(side, jnp.where(here, by, 0)) for side, here, by in zip(near, present, change, strict=True)
    )
    if problems.balanced:
        shift = jnp.sum(jnp.exp(log_masses[0]) * jnp.where(present[0], value(f), 0), axis=-1, keepdims=True)
        f, g = expansions.moved(f, -shift), expansions.moved(g, shift)
    f = _where(present[0], f)
    g = jax.vmap(lambda problem, f, g: problem.transpose().c_transform(f, g))(solved, f, g)
    return solved, f, _where(present[1], g)


def _where(present: Array, words: Words) -> Words:
    return jnp.where(present, words[0], 0), jnp.where(present, words[1], 0)


def _inverse_rhos(problems: TransportProblem) -> Float[Array, "2 E"]:
    if problems.balanced:
        return jnp.zeros((2, *problems.epsilon.shape), problems.epsilon.dtype)
    return jnp.stack([1 / problems.rho0, 1 / problems.rho1])


def _difference(new: Array, old: Array) -> Array:
    both = jnp.isfinite(new) & jnp.isfinite(old)
    return jnp.where(both, jnp.where(both, new, 0) - jnp.where(both, old, 0), 0)
