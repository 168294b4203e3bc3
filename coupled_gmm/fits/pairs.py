r"""Fits of a pair of mixtures to two clouds: one, the best of several starts, and a path of transport weights.

A fit is a run, not a value: it can't be differentiated; `penalized_log_likelihood`, its objective, can.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import take
from coupled_gmm.fits import contest, em, frame, refits
from coupled_gmm.fits.coupled import graph_fit, refitted_apart
from coupled_gmm.fits.fidelity import Ended, Fidelity
from coupled_gmm.fits.frame import Sight, View
from coupled_gmm.fits.gmm import pooled_draws
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.linked import started
from coupled_gmm.fits.request import Controls, FitOptions, FitRequest, GivenCloud, Stretches, view_of
from coupled_gmm.fits.results import PairFit, trimmed
from coupled_gmm.fits.statistics import Sums
from coupled_gmm.fits.weights import Weight
from coupled_gmm.gaussians.mixture import GaussianMixture, stack
from coupled_gmm.transport import solvers
from coupled_gmm.transport.pair import GaussianMixturePair, stated


@program("options", over_matrices=True)
def _begin_pair(
    pair: GaussianMixturePair,
    transport_weight: Array,
    frozen: Array,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
) -> em.Underway:
    return em.begin(MixtureGraph.from_pair(pair, transport_weight, frozen), sight, controls, options)


@program("options", over_matrices=True)
def _go_on_with_pair(
    pair: GaussianMixturePair,
    transport_weight: Array,
    frozen: Array,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
    underway: em.Underway,
    until: Array,
    sums: Sums | None = None,
) -> tuple[em.Underway, PairFit]:
    problem = MixtureGraph.from_pair(pair, transport_weight, frozen)
    underway, end = em.go_on(problem, sight, controls, options, underway, until, sums)
    return underway, pair_fit(problem, end)


def pair_fit(problem: MixtureGraph, end: em.Solution) -> PairFit:
    fit = graph_fit(problem, end, jnp.zeros(1, jnp.int32))
    whole = trimmed(take(fit.plans, 0), *fit.gmms)
    return PairFit(
        pair=whole.pair,
        plan=whole,
        penalized_log_likelihood=fit.penalized_log_likelihood,
        status=fit.status,
        n_steps=fit.n_steps,
        history=fit.history,
        log_likelihoods=fit.log_likelihoods,
        penalized_log_likelihoods=fit.penalized_log_likelihoods,
        transport_weights=problem.edge_weights[0],
        feature_variance=fit.feature_variance,
    )


def ended(fit: PairFit) -> Ended:
    """Where a fit, or each of some, ended."""
    return Ended([fit.pair.gmm0, fit.pair.gmm1], fit.log_likelihoods, fit.penalized_log_likelihoods)


@program("options", over_matrices=True)
def _fit_pairs(
    pairs: GaussianMixturePair,
    transport_weights: Array,
    frozen: Array,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
) -> PairFit:
    """The best for each of some weights, stacked, of runs from each of some pairs, stacked, and along the weights."""

    def graph(pair: GaussianMixturePair, weight: Array) -> MixtureGraph:
        return MixtureGraph.from_pair(pair, weight, frozen)

    nodes = jax.vmap(lambda pair: graph(pair, transport_weights[0]).nodes)(pairs)
    problem = graph(take(pairs, 0), transport_weights[0])
    schedule = contest.Schedule.along(len(transport_weights), len(pairs.epsilon))
    weights = transport_weights[:, None].astype(problem.edge_weights.dtype)
    ends, starts, fidelity = contest.best_ends(problem, nodes, weights, schedule, sight, controls, options)
    fits = jax.vmap(lambda end: pair_fit(problem, end))(ends)
    return dataclasses.replace(fits, starts=starts, fidelity=fidelity)


def _stretches() -> Stretches:
    return Stretches(_begin_pair, _go_on_with_pair)


def two_clouds(x0: Any, x1: Any, weights0: Any, weights1: Any) -> list[GivenCloud]:
    return [GivenCloud("x0", x0, "point_weights0", weights0), GivenCloud("x1", x1, "point_weights1", weights1)]


def numbers(pair: GaussianMixturePair) -> int:
    """That a program holds of each point."""
    return max(pair.gmm0.n_components, pair.gmm1.n_components) * pair.n_features


def fit_pair(
    x0: Any,
    x1: Any,
    pair: GaussianMixturePair,
    *,
    transport_weight: Any = None,
    relative_weight: Any = None,
    point_weights0: Any = None,
    point_weights1: Any = None,
    em_steps: int = 30,
    m_steps: int = 20,
    optimizer: Any = None,
    learning_rate: Any = None,
    tol: Any = 0.0,
    freeze: Sequence[str] = (),
    n_init: int = 1,
    key: PRNGKeyArray | None = None,
    ridge: Any = 1e-6,
    method: str = "entropic",
    chunk_size: int | None = None,
    progress: Any = False,
    fidelity: bool = True,
) -> PairFit:
    r"""Fit two mixtures to two clouds while a penalty on the transport cost between them keeps them close.

    .. math:: J = \overline{\log p_0} + \overline{\log p_1} - \lambda T(p_0, p_1)

    with the means over points, and T the regularised cost of `solve_plan` (MW2 squared, or its unbalanced version, plus the
    entropic term), by EM whose M-step raises the whole objective. With the default optimiser J never falls.

    Args:
      x0, x1: clouds (n0, d) and (n1, d).
      pair: where to start, with epsilon and rho.
      transport_weight: lambda, at least 0, per squared data unit; or
      relative_weight: in its place, lambda times the mean variance of a feature within the clouds, at least 0: it has no unit, and
        0.01 is a fair begin. One of them is given, and the fit reports both.
      point_weights0, point_weights1: (n0,), (n1,), at least 0, not all 0; None weighs points equally.
      em_steps: EM steps, at most.
      m_steps: evaluations of the M-step's objective, or of what bounds it from below, and its gradient in each, at most.
      optimizer: None solves for masses and plans, and moves means and factors by L-BFGS in natural coordinates; an optax
        factory (``optax.adam``) takes `learning_rate` as a leaf; a built optax transformation is used as it is. Both run in
        log-Cholesky coordinates, as OTT's fit does, and do every step.
      learning_rate: above 0, with a factory only.
      tol: at least 0; the fit has converged when an EM step raises J by no more. With 0 all steps are done.
      freeze: any of "gmm0", "gmm1", left as they are.
      n_init: starts, of which the fit of highest J is kept: the pair, and beside it mixtures of its sizes that are drawn for the
        points of both clouds together, as `init_gmm` does. `fit.starts` says where each ended.
      key: decides what is drawn; goes with an `n_init` above 1.
      ridge: at least 0, floor of the covariances relative to each feature's variance in its cloud: the component
        log-densities are lowered by :math:`tr(\Delta S^{-1}) / 2`, so the exact M-step at weight 0 is the second moment plus
        Delta, and J stays an objective that never falls. 0 turns it off.
      method: of the plans, as in `solve_plan`.
      chunk_size: points that are held in memory K d times over, at once; None suits the machine.
      progress: True draws a bar; a callable gets each row as a dict, between calls of the program that a fit without it runs too
        (inside somebody's ``jit``, by one host callback a step). After what a callable raises it gets no more rows, and the fit
        raises that at its end.
      fidelity: whether the mixtures are refitted without coupling at the end, by at most 100 steps of plain EM, to say what
        coupling has cost: `fit.fidelity`, and the message where the penalty has overruled the data.

    Returns:
      A `PairFit` with the fitted pair, its plan, J, the status and the history.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range, before anything is compiled.

    >>> start = cg.GaussianMixture.from_moments([[0.0], [7.0]], [[[1.0]], [[1.0]]], [0.5, 0.5])
    >>> clouds = [[0.0], [1.0], [7.0], [8.0]], [[1.0], [2.0], [8.0], [9.0]]
    >>> fit = cg.fit_pair(*clouds, cg.GaussianMixturePair(start, start), transport_weight=0.01, em_steps=5)
    >>> print(fit.status_name, fit.pair.gmm1.means.round(1).tolist())
    steps done [[1.5], [8.5]]
    """
    request = FitRequest.checked(
        ridge=ridge,
        tol=tol,
        em_steps=em_steps,
        m_steps=m_steps,
        optimizer=optimizer,
        learning_rate=learning_rate,
        method=method,
        chunk_size=chunk_size,
        progress=progress,
    )
    weight = Weight.given(transport_weight, relative_weight)
    clouds = two_clouds(x0, x1, point_weights0, point_weights1)
    asked = _PairRequest.checked(request, clouds, pair, freeze, method, n_init, key)
    transport_weight = weight.of(asked.view)
    if n_init == 1:
        return asked.single(transport_weight, fidelity)
    if jnp.ndim(transport_weight) or progress:
        raise ArgumentError(
            "n_init", f"fits of several starts take one {weight.name}, and have no progress", "see fit_path"
        )
    if asked.view.external:
        best = contest.best_of([asked.fit(_stretches(), start, transport_weight) for start in asked.starts()])
        return asked.measured(best) if fidelity else best
    return asked.several(transport_weight[None], fidelity)[0]


def fit_path(
    x0: Any,
    x1: Any,
    pair: GaussianMixturePair,
    *,
    transport_weights: Any = None,
    relative_weights: Any = None,
    point_weights0: Any = None,
    point_weights1: Any = None,
    em_steps: int = 30,
    m_steps: int = 20,
    optimizer: Any = None,
    learning_rate: Any = None,
    tol: Any = 0.0,
    freeze: Sequence[str] = (),
    n_init: int = 1,
    key: PRNGKeyArray | None = None,
    ridge: Any = 1e-6,
    method: str = "entropic",
    chunk_size: int | None = None,
    fidelity: bool = True,
) -> PairFit:
    """`fit_pair` for each of several transport weights, in one program: the best of what the pair and the neighbours lead to.

    For each weight in its order the fit starts from the pair, and from where the weight before it ended; then back along the list,
    from where the weight after it ended. Of each weight's fits the one of highest J is kept: none is worse than `fit_pair`, or than
    a neighbour's mixtures. So give weights in order, and a `tol` above 0, with which a start that is near costs few steps.

    Args:
      transport_weights: lambda (W,), at least 0, per squared data unit; or
      relative_weights: (W,), in their place, as in `fit_pair`.
      x0, x1, pair, point_weights0, point_weights1, em_steps, m_steps, optimizer, learning_rate, tol, freeze, n_init, key, ridge,
        method, chunk_size, fidelity: as in `fit_pair`.

    Returns:
      A `PairFit` of W fits, stacked: `fits[i]` is one. `fits.transport_weights` are their weights.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range, before anything is compiled.

    >>> start = cg.GaussianMixture.from_moments([[0.0], [7.0]], [[[1.0]], [[1.0]]], [0.5, 0.5])
    >>> clouds = [[0.0], [1.0], [7.0], [8.0]], [[1.0], [2.0], [8.0], [9.0]]
    >>> fits = cg.fit_path(*clouds, cg.GaussianMixturePair(start, start), transport_weights=[0.01, 1.0], em_steps=5)
    >>> print(len(fits), [fit.pair.gmm1.means.round(1).tolist() for fit in fits])
    2 [[[1.5], [8.5]], [[1.2], [8.2]]]
    """
    request = FitRequest.checked(
        ridge=ridge,
        tol=tol,
        em_steps=em_steps,
        m_steps=m_steps,
        optimizer=optimizer,
        learning_rate=learning_rate,
        method=method,
        chunk_size=chunk_size,
    )
    weights = Weight.given(transport_weights, relative_weights, plural="s")
    if jnp.ndim(weights.value) != 1 or not len(weights.value):
        raise ArgumentError(weights.name, f"expected a list of numbers, got shape {weights.value.shape}", "pass (W,)")
    clouds = two_clouds(x0, x1, point_weights0, point_weights1)
    otherwise = "call fit_pair for each weight, and start it where the one before ended"
    asked = _PairRequest.checked(request, clouds, pair, freeze, method, n_init, key, in_memory=otherwise)
    transport_weights = weights.of(asked.view)
    return dataclasses.replace(asked.several(transport_weights, fidelity), transport_weights=transport_weights)


def frozen_sides(freeze: Any) -> Bool[np.ndarray, "2"]:
    """Which mixtures of a pair are left as they are."""
    names = ("gmm0", "gmm1")
    if not isinstance(freeze, (tuple, list, set, frozenset)) or any(name not in names for name in freeze):
        raise ArgumentError("freeze", f"expected a collection of 'gmm0' and 'gmm1', got {checks.brief(freeze)}")
    return np.array([name in freeze for name in names])


def check_densities(called: str, pair: GaussianMixturePair, frozen: np.ndarray, ridge: Any) -> None:
    """Refuse a start without a density, where no ridge gives it one; `called` is what to call the pair."""
    for name, gmm, still in zip(("gmm0", "gmm1"), (pair.gmm0, pair.gmm1), frozen, strict=True):
        if still or not frame.raises(ridge):
            gmm.check_densities(f"{called}.{name}")


class _PairRequest(NamedTuple):
    """What is asked of fits of a pair, checked, and the clouds as they are to be seen."""

    request: FitRequest
    pair: GaussianMixturePair
    view: View
    frozen: np.ndarray
    solver: solvers.PlanSolver
    n_init: int
    key: Array | None

    @classmethod
    def checked(
        cls,
        request: FitRequest,
        clouds: list[GivenCloud],
        pair: Any,
        freeze: Any,
        method: str,
        n_init: Any,
        key: Any,
        in_memory: str | None = None,
    ) -> "_PairRequest":
        checks.instance("pair", pair, GaussianMixturePair)
        frozen, ridge = frozen_sides(freeze), request.controls.ridge
        check_densities("pair", pair, frozen, ridge)
        pair = started(pair, frozen)
        n_init = contest.check_starts(n_init, key)
        contest.check_drawn(n_init, "pair", pair.links)
        solver = solvers.solver_for(method, pair)
        view = view_of(clouds, [pair.gmm0, pair.gmm1], ridge, in_memory)
        return cls(request, pair, view, frozen, solver, n_init, None if key is None else checks.key("key", key))

    def fit(self, program: Any, pairs: GaussianMixturePair, weights: Any, **how: Any) -> PairFit:
        problem = stated(pairs, balanced=False), weights, self.frozen  # one program, whatever the prices are
        seen = {"view": self.view, "numbers": numbers(self.pair), "solver": self.solver}
        fit = self.request.fit(program, *problem, **seen, **how)
        balanced = self.pair.balanced
        plan = dataclasses.replace(fit.plan, pair=stated(fit.plan.pair, balanced))
        return dataclasses.replace(fit, pair=stated(fit.pair, balanced), plan=plan)

    def single(self, weight: Array, fidelity: bool) -> PairFit:
        """The fit from the pair, with what coupling has cost its mixtures where that is asked for.

        In somebody's program fit and refit are runs of one loop; elsewhere two calls of one program, which may be shown.
        """
        if not fidelity:
            return self.fit(_stretches(), self.pair, weight)
        known = checks.known(self.view, self.pair, weight, self.request.controls)
        if known or self.request.progress or self.request.optimizer is not None:
            sight = self.request.seen(self.view, numbers(self.pair))
            return self.measured(self.fit(_stretches(), self.pair, weight, sight=sight), sight)
        return dataclasses.replace(self.several(weight[None], fidelity)[0], starts=None)

    def several(self, weights: Array, fidelity: bool) -> PairFit:
        """The best fits from some starts at each weight, stacked."""
        in_program = self.request.optimizer is None  # which the refits, by EM, have not
        fits = self.fit(_fit_pairs, self.starts(), weights, refits=fidelity and in_program)
        if not fidelity or in_program:
            return fits
        each = [self.measured(fits[i]).fidelity for i in range(len(weights))]
        return dataclasses.replace(fits, fidelity=jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))

    def measured(self, fit: PairFit, sight: Sight | None = None) -> PairFit:
        """A fit with what coupling has cost its mixtures, by its own program."""
        end, has_cloud = ended(fit), np.ones(2, bool)
        if self.request.optimizer is None:
            free = refits.pair(self.pair, *end.gmms)
            asked = self._replace(request=refits.request(self.request), pair=free, frozen=np.zeros(2, bool))
            alone = ended(asked.fit(_stretches(), free, np.zeros((), self.pair.epsilon.dtype), sight=sight))
        else:
            starts = [self.pair.gmm0, self.pair.gmm1]
            alone = refitted_apart(end.gmms, starts, has_cloud, self.request, self.view)
        return dataclasses.replace(fit, fidelity=Fidelity.of(end, alone, self.frozen, has_cloud))

    def starts(self) -> GaussianMixturePair:
        """The pair, and pairs that are drawn, stacked; what is frozen is in all of them."""
        key, n_drawn, ridge = self.key, self.n_init - 1, self.request.controls.ridge

        @functools.cache  # sides of one size start alike
        def drawn(size: int) -> list[GaussianMixture]:
            assert key is not None
            return pooled_draws(key, self.view, ridge, size, n_drawn)

        def side(gmm: GaussianMixture, frozen: bool) -> GaussianMixture:
            if frozen or key is None:
                return stack([gmm] * self.n_init)
            return stack([gmm, *drawn(gmm.n_components)])

        sides = (side(gmm, still) for gmm, still in zip((self.pair.gmm0, self.pair.gmm1), self.frozen, strict=True))
        return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], self.n_init, 0), self.pair).replace(*sides)
