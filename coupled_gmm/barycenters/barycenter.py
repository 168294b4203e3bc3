r"""Barycenters of mixtures, and the reduction of one to fewer components.

A barycenter minimises the sum of squared distances to given mixtures,

.. math:: F(p) = \sum_b \lambda_b MW_2^2(p, p_b) .

Plans and Gaussians take turns. Given the plans, each component moves to a Bures barycenter of those that it shares mass
with, one over all plans ("joint"), which is where F, at those plans, is least: so F never rises. The two-level projections
of Tanguy, Delon & Gozlan (2024), and of POT, first sum up what a component gets from each mixture, exactly ("bures") or by
averaging covariances ("euclidean"); F may then rise. Weights, where they are learnt, are the best at given costs: of one
mixture, what is nearest decides; of two, a transport problem between them; of more, a linear programme, on the host.
"""

import dataclasses
from collections.abc import Sequence
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
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.host import on_host
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import Outcome, Status, first_status
from coupled_gmm.core.tree import counted, number, pytree, saved, take
from coupled_gmm.gaussians import bures
from coupled_gmm.gaussians.mixture import GaussianMixture, about_one_point, check_features, moved_back, stack

PROJECTIONS = ("joint", "bures", "euclidean")
_NO_DERIVATIVE = (
    "a barycenter can't be differentiated: its plans are held fixed; differentiate mw2_squared to the mixtures, or use "
    "jax.lax.stop_gradient(fit)"
)


@saved
@pytree
class BarycenterHistory:
    """The objective at the start and after each step; NaN past the last."""

    objective: Float[Array, "*b values"]  # one more than steps


@saved
@pytree
class BarycenterFit(Outcome):
    """A barycenter, and how it was reached. Of several starts, the one that ended best, and which it was."""

    gmm: GaussianMixture
    objective: Float[Array, "*b"]
    status: Int[Array, "*b"]
    n_steps: Int[Array, "*b"]
    start: Int[Array, "*b"]
    history: BarycenterHistory

    _remedies = MappingProxyType(
        {
            Status.PLAN_NOT_CONVERGED: (
                "a transport plan missed its marginals, or its optimum: use float64, or, of entropic plans, raise epsilon"
            ),
            Status.NOT_FINITE: "a value was not finite: check the mixtures and the start for moments that are not, or too large",
        }
    )

    def _words(self) -> list[str]:
        value = [f"objective {said}" for said in [number(self.objective)] if said]
        return [*self.gmm._words(), *value, *counted(self.n_steps, "step"), *self._ended()]

    def _facts(self) -> dict[str, str]:
        return {
            "objective at the start": number(self.history.objective[..., 0]),
            "objective at the end": number(self.objective),
            "steps": number(self.n_steps),
            "best start, from 0": number(self.start),
        }


def barycenter(
    gmms: Sequence[GaussianMixture],
    init: GaussianMixture | Sequence[GaussianMixture],
    *,
    coefficients: Any = None,
    projection: str = "joint",
    method: str = "exact",
    epsilon: Any = None,
    learn_weights: bool = False,
    max_steps: int = 100,
    tol: Any = 1e-7,
) -> BarycenterFit:
    r"""The mixture closest to several: a local minimum of :math:`\sum_b \lambda_b MW_2^2(p, p_b)`.

    Args:
      gmms: mixtures over the same features, of any numbers of components.
      init: where to start, or several starts of one number of components, of which the best end wins. Its weights are kept
        unless learnt; components of weight zero stay where they are.
      coefficients: one per mixture, at least 0, not all 0, divided by their sum; None counts all equally.
      projection: "joint", which never raises the objective, or POT's "bures" and "euclidean".
      method: "exact" plans, or "entropic" ones: the objective is then the sum of regularised costs.
      epsilon: for entropic plans, above 0, squared data units; None is 1e-2 of the mean cost at the start.
      learn_weights: whether the weights are part of what is sought, once the barycenter for those of the start is found; with
        exact plans only. Components may end with none.
      max_steps: at least 1.
      tol: at least 0; converged when a step lowers the objective by no more than this part of it. 0 does all steps.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range.

    >>> gmm0, gmm1 = (cg.GaussianMixture.from_moments([[x], [x + 9]], [[[1.0]], [[1.0]]], [0.5, 0.5]) for x in (0.0, 2.0))
    >>> fit = cg.barycenter([gmm0, gmm1], gmm0)
    >>> print(fit.status_name, fit.gmm.means.round(3).tolist())
    converged [[1.0], [10.0]]
    """
    gmms, coefficients, epsilon = check_problem("gmms", gmms, coefficients, method, epsilon)
    checks.choice("projection", projection, PROJECTIONS)
    starts = _check_starts(init, gmms[0].n_features)
    if learn_weights and method != "exact":
        raise ArgumentError("learn_weights", "needs exact plans", "drop method='entropic', or keep the weights")
    tol = checks.scalar("tol", tol, at_least=0)
    (*gmms, starts), centre = about_one_point(*gmms, starts)
    fit = _descent(gmms, starts, coefficients, epsilon, tol, max_steps, (method, projection, bool(learn_weights)))
    return dataclasses.replace(fit, gmm=moved_back(fit.gmm, centre))


def reduced(gmm: GaussianMixture, starts: GaussianMixture, max_steps: int, tol: Any) -> BarycenterFit:
    """The barycenter of one mixture, its weights learnt, from stacked starts."""
    tol = checks.scalar("tol", tol, at_least=0)
    return _descent(
        [gmm], starts, jax.device_put(np.ones(1, gmm.dtype)), None, tol, max_steps, ("exact", "joint", True)
    )


def _descent(
    gmms: list[GaussianMixture],
    starts: GaussianMixture,
    coefficients: Array,
    epsilon: Any,
    tol: Array,
    max_steps: Any,
    how: tuple[str, str, bool],
) -> BarycenterFit:
    """The program's answer, its history as long as there were to be steps."""
    steps = checks.integer("max_steps", max_steps, 1, checks.MOST_STEPS)
    options = _Options(*how, chunks.rows(steps))
    fit = _barycenter(gmms, starts, coefficients, epsilon, tol, jax.device_put(np.int32(steps)), options)
    return dataclasses.replace(fit, history=chunks.first(fit.history, steps + 1))


def _check_starts(init: Any, n_features: int) -> GaussianMixture:
    """The starts, stacked; smaller ones padded."""
    starts = [init] if isinstance(init, GaussianMixture) else checks.sequence("init", init)
    if not starts:
        raise ArgumentError("init", "the list is empty", "give at least one start")
    for i, gmm in enumerate(starts):
        name = "init" if isinstance(init, GaussianMixture) else f"init[{i}]"
        checks.instance(name, gmm, GaussianMixture)
        check_features(name, gmm, ", and the mixtures have", n_features)
    return stack(starts)


class _Options(NamedTuple):
    method: str
    projection: str
    learn_weights: bool
    rows: int  # of the history, at least as many as steps


class _State(NamedTuple):
    free: FreeMixture
    warm_start: Any
    values: Float[Array, " values"]
    count: Int[Array, ""]  # of evaluations
    converged: Bool[Array, ""]
    solved: Bool[Array, ""]
    settled: Bool[Array, ""]  # the means of covariances that led here
    learning: Bool[Array, ""]
    done: Bool[Array, ""]


@program("options", over_matrices=True)
def _barycenter(
    gmms: list[GaussianMixture],
    starts: GaussianMixture,
    coefficients: Array,
    epsilon: Array | None,
    tol: Array,
    max_steps: Array,
    options: _Options,
) -> BarycenterFit:
    arguments = gmms, starts, coefficients, epsilon
    gmms, starts, coefficients, epsilon = one_precision(arguments, _NO_DERIVATIVE)
    problem = build_problem(gmms, coefficients, epsilon, FreeMixture.of(take(starts, 0)), options.method)
    ends = jax.lax.map(lambda gmm: _descend(problem, FreeMixture.of(gmm), tol, max_steps, options), starts)
    finals = jnp.take_along_axis(ends.values, ends.count[:, None] - 1, axis=1)[:, 0]
    best = jnp.argmin(jnp.where(jnp.isfinite(finals), finals, jnp.inf))
    end, value = take(ends, best), finals[best]
    ends = [
        (~jnp.isfinite(value), Status.NOT_FINITE),
        (~end.solved, Status.PLAN_NOT_CONVERGED),
        (~end.settled, Status.MEAN_NOT_CONVERGED),
        (end.converged, Status.CONVERGED),
    ]
    status = first_status(ends, jnp.where(tol > 0, Status.NOT_CONVERGED, Status.STEPS_DONE))
    return BarycenterFit(end.free.mixture(), value, status, end.count - 1, best, BarycenterHistory(end.values))


def _descend(problem: BarycenterProblem, free: FreeMixture, tol: Array, max_steps: Array, options: _Options) -> _State:
    """Plans and projections by turns, from one start; the last plans are those of the end."""
    allowed = free.weights > 0

    def step(state: _State) -> _State:
        free, count = state.free, state.count
        cost = problem.costs(free)
        solved = state.solved
        if options.learn_weights:
            weights, known = jax.lax.cond(
                state.learning,
                lambda: _best_weights(problem, cost, allowed),
                lambda: (free.weights, jnp.asarray(True)),
            )
            free, solved = free._replace(weights=weights), solved & known
        plans = problem.solve(cost, free.weights, state.warm_start)
        fall = state.values[count - 1] - plans.objective
        change, rounding = jnp.abs(fall), 16 * jnp.finfo(fall.dtype).eps * jnp.abs(plans.objective)
        # What rises has not converged, however little.
        still = (count > 0) & (tol > 0) & (change <= tol * jnp.abs(plans.objective)) & (fall >= -rounding)
        settled = still | (change <= rounding)
        converged = still & (state.learning | (not options.learn_weights))
        done = converged | (count == max_steps) | ~jnp.isfinite(plans.objective)
        moved, settled = _project(problem, free, plans, options.projection)
        return _State(
            free=jax.tree.map(lambda old, new: jnp.where(done, old, new), free, moved),
            warm_start=plans.warm_start,
            values=state.values.at[count].set(plans.objective),
            count=count + 1,
            converged=converged,
            solved=solved & plans.solved,
            settled=jnp.where(done, state.settled, settled),
            learning=state.learning | settled | (count + 1 == max_steps),
            done=done,
        )

    no, dtype = jnp.asarray(False), free.means.dtype
    values = jnp.full(options.rows + 1, jnp.nan, dtype)
    warm_start = problem.cold_start(len(free.weights))
    # Learnt at once, the weights of a start far off leave most components empty, and those can't move any more.
    learning = jnp.asarray(len(problem.weights) == 1)
    first = _State(free, warm_start, values, jnp.zeros((), jnp.int32), no, ~no, ~no, learning, no)
    return jax.lax.while_loop(lambda state: ~state.done, step, first)


def _project(
    problem: BarycenterProblem, free: FreeMixture, plans: PlansToFixed, projection: str
) -> tuple[FreeMixture, Bool[Array, ""]]:
    """Each component to the middle of those that it shares mass with, and whether these have settled; those of weight zero stay."""
    n, b = len(free.weights), len(problem.weights)
    cells = problem.cells(plans)
    means, factors = problem.means[cells.problem, cells.target], problem.factors[cells.problem, cells.target]
    first_settled = jnp.asarray(True)
    if projection == "joint":
        group, shares = cells.source, problem.shares(cells, n)
    else:
        from_each = cells.problem * n + cells.source
        total = jax.ops.segment_sum(cells.mass, from_each, b * n)
        first = cells.mass / jnp.where(total > 0, total, 1)[from_each]
        means, factors, first_settled = _averages(means, factors, from_each, first, b * n, projection == "bures")
        group, shares = jnp.tile(jnp.arange(n), b), jnp.repeat(problem.coefficients, n)
    means, factors, settled = _averages(means, factors, group, shares, n, True)
    present = free.weights > 0
    moved = FreeMixture(
        jnp.where(present[:, None], means, free.means),
        jnp.where(present[:, None, None], factors, free.factors),
        free.weights,
    )
    return moved, settled & first_settled


def _averages(
    means: Array, factors: Array, group: Array, shares: Array, n_groups: int, exactly: bool
) -> tuple[Float[Array, "G d"], Float[Array, "G d d"], Bool[Array, ""]]:
    """Means and factors of each group's Bures barycenter, or of the average covariance, and whether these have settled."""
    covariances = jax.ops.segment_sum(shares[:, None, None] * matrices.gram(factors), group, n_groups)
    average = matrices.cholesky(covariances)
    middle, settled = bures.barycenter(average, factors, group, shares) if exactly else (average, jnp.asarray(True))
    return jax.ops.segment_sum(shares[:, None] * means, group, n_groups), middle, settled


def _best_weights(
    problem: BarycenterProblem, cost: Float[Array, "B n K"], allowed: Bool[Array, " n"]
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """The weights of the free mixture at which the objective is least, its components as they are; and whether it is."""
    if len(cost) == 1:
        return problem.nearest_weights(cost, allowed), jnp.asarray(True)
    if len(cost) == 2:
        return problem.weights_between(cost, allowed)
    arguments = cost, problem.weights, problem.coefficients, allowed.astype(cost.dtype)
    (weights,) = on_host(_linear_programme, [allowed.shape], *arguments)
    return weights, jnp.all(jnp.isfinite(weights))


def _linear_programme(
    cost: np.ndarray, masses: np.ndarray, coefficients: np.ndarray, allowed: np.ndarray
) -> list[np.ndarray]:
    """Least sum of lambda_b <P_b, C_b> over plans P_b with columns' sums b_b and rows' sums w, and over w."""
    from scipy import sparse
    from scipy.optimize import linprog

    b, n, k = cost.shape
    masses = masses / masses.sum(1, keepdims=True)
    # HiGHS's tolerances are absolute. Less what every plan pays, in units of what a plan might: far components count for nothing.
    cost = cost - np.min(np.where(allowed[:, None] > 0, cost, np.inf), axis=1, keepdims=True)
    cost = cost / (np.sum(masses * np.median(cost, axis=1)) or cost.max() or 1)
    row_sums = sparse.kron(sparse.identity(b * n), np.ones((1, k)))
    column_sums = sparse.kron(sparse.identity(b), sparse.kron(np.ones((1, n)), sparse.identity(k)))
    weights = sparse.vstack([-sparse.identity(n)] * b + [sparse.csr_matrix((b * k, n))])
    found = linprog(
        np.r_[(coefficients[:, None, None] * cost).ravel(), np.zeros(n)],
        A_eq=sparse.hstack([sparse.vstack([row_sums, column_sums]), weights]).tocsr(),
        b_eq=np.r_[np.zeros(b * n), masses.ravel()],
        bounds=[(0, None)] * (b * n * k) + [(0, None if allow else 0) for allow in allowed],
        method="highs",
    )
    if found.x is None:
        return [np.full(n, np.nan)]
    best = np.maximum(found.x[-n:], 0)
    return [best / best.sum()]
