r"""A mixture that flows to others down the sum of its squared distances MW2, its path kept.

By default steps follow the Bures-Wasserstein geometry. A component of mean m and covariance :math:`S = L L^T` goes a part s
of the way to where the plans send it,

.. math:: m \leftarrow (1 - s) m + s \bar m, \qquad L \leftarrow (1 - s) L + s \sum_j \alpha_j L_j U_j^T :

at the present plans that lowers the loss, and covariances stay positive definite by themselves. Weights then go a part of their
way to the best ones, at which each component of a target goes to the nearest: the loss is convex in them, and falls. Where
that is no step (of several targets, or of entropic plans), they take a multiplicative one down their potentials,
:math:`w \propto w e^{-\eta \phi}`, halved until the loss falls.

With an optax optimiser the parameters are means, covariances (projected back to positive definite) and logits of weights,
as in POT's example of a flow.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.barycenters.problem import (
    BarycenterProblem,
    FreeMixture,
    PlansToFixed,
    build_problem,
    check_problem,
    one_precision,
)
from coupled_gmm.core import checks, chunks, matrices
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import Outcome, Status, first_status
from coupled_gmm.core.tree import chosen, counted, number, pytree, saved, take, unchecked
from coupled_gmm.gaussians import bures
from coupled_gmm.gaussians.mixture import GaussianMixture, about_one_point, check_features, moved_back

_HALVINGS = 12
_FLOOR = 1e-6  # of the source's mean variance, feature by feature: no covariance is projected to less
_NO_DERIVATIVE = (
    "a flow can't be differentiated: its plans are held fixed; differentiate mw2_squared, or use jax.lax.stop_gradient"
)


@saved
@pytree
class FlowHistory:
    """The loss before each step."""

    loss: Float[Array, "*b steps"]


@saved
@pytree
class FlowFit(Outcome):
    """Where a flow ended, its loss there, and the mixtures on its way, stacked: the source first."""

    gmm: GaussianMixture
    loss: Float[Array, "*b"]
    path: GaussianMixture
    status: Int[Array, "*b"]
    history: FlowHistory

    _remedies = MappingProxyType(
        {
            Status.STEPS_DONE: "all steps were done",
            Status.PLAN_NOT_CONVERGED: (
                "a transport plan missed its marginals, or its optimum, on the way: use float64, or, of entropic plans, raise "
                "epsilon"
            ),
            Status.NOT_FINITE: (
                "a value was not finite: lower step_size, or check the mixtures for moments that are not, or too large"
            ),
        }
    )

    def _words(self) -> list[str]:
        value = [f"loss {said}" for said in [number(self.loss)] if said]
        return [*self.gmm._words(), *value, *counted(self.history.loss.shape[-1], "step"), *self._ended()]

    def _facts(self) -> dict[str, str]:
        return {
            "loss at the start": number(self.history.loss[..., 0]),
            "loss at the end": number(self.loss),
            "steps": str(self.history.loss.shape[-1]),
        }


def flow(
    source: GaussianMixture,
    target: GaussianMixture | Sequence[GaussianMixture],
    *,
    steps: int = 100,
    step_size: Any = 0.1,
    optimizer: Any = None,
    method: str = "exact",
    epsilon: Any = None,
    coefficients: Any = None,
    mean_rate: Any = 1.0,
) -> FlowFit:
    r"""Steps of a mixture down :math:`\sum_b \lambda_b MW_2^2(p, p_b)`; one target is the usual case.

    Args:
      source: where the flow starts.
      target: a mixture, or several.
      steps: at least 1.
      step_size: above 0. By default, at most 1: the part of the way that a component goes to where the plans send it. With an
        optax factory, the learning rate. A leaf: sweeping it recompiles nothing.
      optimizer: None for Bures-Wasserstein steps, down which the loss never rises; an optax factory (``optax.adam``), or a
        built optax transformation, which has its own rate, of parameters (means, covariances, logits of weights).
      method: "exact" plans, or "entropic" ones: the loss is then the regularised cost.
      epsilon: for entropic plans, above 0, squared data units; None is 1e-2 of the mean cost at the start.
      coefficients: one per target, at least 0, not all 0, divided by their sum; None counts all equally.
      mean_rate: above 0; the optimiser's updates of means are multiplied by it (POT's example has 2).

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range.
    """
    checks.instance("source", source, GaussianMixture)
    targets, coefficients, epsilon = check_problem("target", target, coefficients, method, epsilon)
    check_features("source", source, ", and the target has", targets[0].n_features)
    built = checks.is_built_optimizer("optimizer", optimizer)
    at_most = 1 if optimizer is None else None
    rates = (
        checks.scalar("step_size", step_size, above=0, at_most=at_most),
        checks.scalar("mean_rate", mean_rate, above=0),
    )
    steps = _steps(steps, source)
    options = _Options(chunks.rows(steps), optimizer, built, method)
    (source, *targets), centre = about_one_point(source, *targets)
    fit = _flow(source, targets, coefficients, epsilon, rates, jax.device_put(np.int32(steps)), options)
    path = chunks.first(moved_back(fit.path, centre), steps + 1)
    return dataclasses.replace(
        fit, gmm=moved_back(fit.gmm, centre), path=path, history=chunks.first(fit.history, steps)
    )


def _steps(steps: Any, source: GaussianMixture) -> int:
    """As many as there is room for in the path, one mixture per step."""
    n_components, n_features = source.means.shape
    most = min(checks.MOST_STEPS, checks.MOST_NUMBERS // (n_components * n_features**2) - 1)
    return checks.integer("steps", steps, 1, most)


class _Options(NamedTuple):
    rows: int  # of the path, at least as many as steps
    optimizer: Any
    built: bool
    method: str


@program("options", over_matrices=True)
def _flow(
    source: GaussianMixture,
    targets: list[GaussianMixture],
    coefficients: Array,
    epsilon: Array | None,
    rates: tuple[Array, Array],
    steps: Array,
    options: _Options,
) -> FlowFit:
    arguments = source, targets, coefficients, epsilon
    source, targets, coefficients, epsilon = one_precision(arguments, _NO_DERIVATIVE)
    rates = rates[0].astype(source.dtype), rates[1].astype(source.dtype)
    problem = build_problem(targets, coefficients, epsilon, FreeMixture.of(source), options.method)
    descent = _bures_descent if options.optimizer is None else _optax_descent
    advance, start = descent(problem, source, rates, options)
    path, losses, solved = _recorded(advance, start, steps, options.rows)
    path = jax.tree.map(lambda path, source: path.at[0].set(source), path, source)
    taken_steps = jnp.arange(len(losses)) <= steps
    sound = jnp.isfinite(losses) & _covariant(path)
    ends = [
        (jnp.any(taken_steps & ~sound), Status.NOT_FINITE),
        (jnp.any(taken_steps & ~solved), Status.PLAN_NOT_CONVERGED),
    ]
    status = first_status(ends, Status.STEPS_DONE)
    return FlowFit(take(path, steps), losses[steps], path, status, FlowHistory(losses))


def _recorded(advance: Callable, start: tuple, steps: Array, rows: int) -> tuple[GaussianMixture, Array, Array]:
    """What is seen before each step and at the end, in rows of which the last may be empty: (mixtures, losses, solved)."""

    def record(index: Array, carry: tuple) -> tuple:
        state, seen = carry
        state, now = advance(state, index == 0)
        return state, jax.tree.map(lambda column, value: column.at[index].set(value), seen, now)

    now = jax.eval_shape(advance, start, jnp.asarray(True))[1]
    empty = jax.tree.map(lambda leaf: jnp.zeros((rows + 1, *leaf.shape), leaf.dtype), now)
    return jax.lax.fori_loop(0, steps + 1, record, (start, empty))[1]


def _covariant(path: GaussianMixture) -> Bool[Array, " steps"]:
    """Whether, step by step, no covariance exceeds the deviations it is between: rounding leaves none to what diverges."""
    variances = jnp.maximum(jnp.diagonal(path.covariances, axis1=-2, axis2=-1), 0)
    largest = 1.001 * jnp.sqrt(variances[..., None]) * jnp.sqrt(variances[..., None, :])
    fine = (jnp.abs(path.covariances) <= largest) | (path.weights == 0)[..., None, None]
    return jnp.all(fine, axis=(-3, -2, -1))


def _bures_descent(
    problem: BarycenterProblem, source: GaussianMixture, rates: tuple[Array, Array], options: _Options
) -> tuple[Callable, tuple]:
    """Bures-Wasserstein steps: how to look at where the flow is and step on, and the start.

    What is seen: the mixture, the loss, whether plans were solved.
    """
    part, _ = rates

    def advance(carry: tuple, first: Array) -> tuple[tuple, tuple]:
        """Plans where the last step has led and, but for the source's, weights that lower the objective; then the next step."""
        free, plans, eta = carry
        halvings = jnp.where(first, 0, _HALVINGS)
        cost = problem.costs(free)
        # The loss is linear in how far they have to go, and quadratic in how far components have.
        rest = (1 - part) ** 2
        best = rest * free.weights + (1 - rest) * problem.nearest_weights(cost, free.weights > 0)
        weights, plans, eta = _reweighted(problem, cost, free.weights, best, plans, eta, halvings)
        free = free._replace(weights=weights)
        seen = free.mixture(), plans.objective, plans.solved
        return (_step(problem, free, plans, part), plans, eta), seen

    start = FreeMixture.of(source), problem.no_plans(source.n_components), jnp.ones_like(part)
    return advance, start


def _step(problem: BarycenterProblem, free: FreeMixture, plans: PlansToFixed, part: Array) -> FreeMixture:
    """A part of the way to where the plans send each component."""
    cells = problem.cells(plans)
    shares = problem.shares(cells, len(free.weights))
    means, factors = problem.means[cells.problem, cells.target], problem.factors[cells.problem, cells.target]
    middle = jax.ops.segment_sum(shares[:, None] * means, cells.source, len(free.weights))
    average = bures.averaged(free.factors, factors, cells.source, shares)
    moved = matrices.gram((1 - part) * free.factors + part * average)
    present = free.weights > 0
    return FreeMixture(
        jnp.where(present[:, None], (1 - part) * free.means + part * middle, free.means),
        jnp.where(present[:, None, None], matrices.cholesky(moved), free.factors),
        free.weights,
    )


def _reweighted(
    problem: BarycenterProblem,
    cost: Float[Array, "B n K"],
    weights: Float[Array, " n"],
    best: Float[Array, " n"],
    last: PlansToFixed,
    eta: Array,
    halvings: Array,
) -> tuple[Float[Array, " n"], PlansToFixed, Array]:
    """Weights that lower the objective, with their plans, or the ones that were; and the step to try next.

    A solver is most of a program, so there is one: the first round of the loop solves for the weights as they were, the second
    for those on the way to the best ones, further ones for steps down the potentials.
    """

    def rejected(carry: tuple) -> Bool[Array, ""]:
        _, plans, (_, found), _, count = carry
        return (count <= halvings) & ~(found.objective < plans.objective)

    def attempt(carry: tuple) -> tuple:
        slope, plans, _, eta, count = carry
        first, second = count == 0, count == 1
        tried = weights * jnp.exp(-eta * slope)
        tried = jnp.where(first, weights, jnp.where(second, best, tried / jnp.sum(tried)))
        found = problem.solve(cost, tried, plans.warm_start)
        plans = chosen(first, found, plans)
        slope = problem.coefficients @ plans.potentials
        slope = jnp.where(weights > 0, slope - weights @ jnp.where(weights > 0, slope, 0), 0)
        steepest = jnp.max(jnp.abs(slope))
        slope = slope / jnp.where(steepest > 0, steepest, 1)
        return slope, plans, (tried, found), jnp.where(first | second, eta, 0.5 * eta), count + 1

    before = last._replace(objective=jnp.full_like(last.objective, jnp.inf))
    start = jnp.zeros_like(weights), before, (weights, before), eta, jnp.zeros((), jnp.int32)
    _, plans, (tried, found), eta, _ = jax.lax.while_loop(rejected, attempt, start)
    better = found.objective < plans.objective
    return *chosen(better, (tried, found), (weights, plans)), jnp.minimum(4 * eta, 1)


def _optax_descent(
    problem: BarycenterProblem, source: GaussianMixture, rates: tuple[Array, Array], options: _Options
) -> tuple[Callable, tuple]:
    """The same with an optax optimiser on means, covariances and logits."""
    step_size, mean_rate = rates
    optimizer = options.optimizer if options.built else options.optimizer(step_size)
    scale = jnp.sqrt(jnp.mean(jnp.diagonal(source.covariances, axis1=1, axis2=2), axis=0))
    scale = jnp.where(scale > 0, scale, jnp.where(jnp.any(scale > 0), jnp.max(scale), 1))
    units = scale[:, None] * scale
    present = source.weights > 0

    def mixture(parameters: tuple) -> GaussianMixture:
        means, covariances, logits = parameters
        # An absent component's logit is masked: infinite, it would make every gradient NaN.
        mass = jnp.where(present, jnp.exp(logits - jnp.max(jnp.where(present, logits, -jnp.inf))), 0)
        return unchecked(GaussianMixture, means=means, covariances=covariances, weights=mass / jnp.sum(mass))

    def evaluated(parameters: tuple, warm_start: Any) -> tuple[PlansToFixed, tuple]:
        free, pull_back = jax.vjp(lambda parameters: FreeMixture.of(mixture(parameters)), parameters)
        cost, costs_back = jax.vjp(lambda free: problem.costs(free), free)
        plans = problem.solve(cost, free.weights, warm_start)
        # By the envelope theorem: costs count by the plans, masses by their potentials.
        (in_free,) = costs_back(problem.coefficients[:, None, None] * plans.matrix)
        in_free = in_free._replace(weights=problem.coefficients @ plans.potentials)
        return plans, pull_back(in_free)[0]

    def advance(carry: tuple, _: Array) -> tuple[tuple, tuple]:
        parameters, state, warm_start = carry
        plans, gradient = evaluated(parameters, warm_start)
        seen = mixture(parameters), plans.objective, plans.solved
        updates, state = optimizer.update(gradient, state, parameters)
        moves: Any = updates  # optax's type hides that it is a tuple
        means, covariances, logits = (old + move for old, move in zip(parameters, moves, strict=True))
        means = means + (mean_rate - 1) * moves[0]
        parameters = means, _definite(covariances / units, _FLOOR) * units, logits
        return (parameters, state, plans.warm_start), seen

    logits = jnp.where(present, jnp.log(jnp.where(present, source.weights, 1)), 0)
    parameters = source.means, source.covariances, logits
    start = parameters, optimizer.init(parameters), problem.cold_start(source.n_components)
    return advance, start


def _definite(covariances: Float[Array, "n d d"], floor: Array | float) -> Float[Array, "n d d"]:
    """The nearest matrices with no eigenvalue under a floor: of X = S - floor, the positive part (X + |X|) / 2.

    |X| is U^T X with the polar factor U, so no eigenvectors are needed.
    """
    identity = jnp.eye(covariances.shape[-1], dtype=covariances.dtype)
    rest = 0.5 * (covariances + matrices.transpose(covariances)) - floor * identity
    factor = bures.polar(rest, jnp.zeros(len(rest), rest.dtype))
    positive = 0.5 * (rest + matrices.transpose(factor) @ rest)
    positive = 0.5 * (positive + matrices.transpose(positive)) + floor * identity
    definite = jnp.all(jnp.diagonal(matrices.cholesky(rest), axis1=-2, axis2=-1) > 0, axis=-1)
    return jnp.where(definite[:, None, None], covariances, positive)
