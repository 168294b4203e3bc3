"""Coupled fits of many pairs of clouds, of any sizes, in few programs.

All clouds of a part of a batch lie in one buffer of chunks; mixtures of similar sizes are padded to one. A program of a few lanes
goes through the pairs: each is fitted step by step as `fit_pair` does, and where one has ended the next begins, so that nobody
waits for the slowest. On a CPU parts go to a thread for each core.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.batch import executors, lanes, parts
from coupled_gmm.batch.parts import Part, Problem
from coupled_gmm.core import chunks, report
from coupled_gmm.core.chunks import Chunks
from coupled_gmm.core.errors import ArgumentError, reason
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import Outcome, Status
from coupled_gmm.core.tree import AnyArray, counted, number, pytree, saved, static, take
from coupled_gmm.fits import em
from coupled_gmm.fits.frame import Sight
from coupled_gmm.fits.graph import MixtureGraph, unpadded
from coupled_gmm.fits.pairs import frozen_sides, pair_fit
from coupled_gmm.fits.request import Controls, FitOptions, FitRequest
from coupled_gmm.fits.results import PairFit, trimmed
from coupled_gmm.gaussians.mixture import alike
from coupled_gmm.transport.pair import stated


@saved
@pytree
class PairFits(Outcome):
    """Fits of many pairs: `fits[i]` is what `fit_pair` returns of the i-th; status, J and steps are those of all, (B,)."""

    stacks: list[PairFit]  # of each part, padded
    places: Int[AnyArray, "B 2"]  # of each pair its part, and its row there
    sizes: Int[AnyArray, "B 2"]  # components of both its mixtures
    reasons: tuple[str, ...] = static()  # why a part was lost; "" where it was not

    @property
    def status(self) -> Int[Array, " B"]:
        return self._read("status")

    @property
    def penalized_log_likelihood(self) -> Float[Array, " B"]:
        return self._read("penalized_log_likelihood")

    @property
    def n_steps(self) -> Int[Array, " B"]:
        return self._read("n_steps")

    def _read(self, name: str) -> Array:
        starts = np.cumsum([0, *(len(part.status) for part in self.stacks)])[:-1]
        every = jnp.concatenate([getattr(part, name) for part in self.stacks])
        return every[jnp.asarray(starts)[self.places[:, 0]] + self.places[:, 1]]

    def reason(self, i: int) -> str:
        """Why the i-th pair was lost by an executor; empty where it was not."""
        return self.reasons[int(self.places[i, 0])]

    def __len__(self) -> int:
        return len(self.places)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, i: int) -> PairFit:
        index = range(len(self))[i]
        (part, row), (k0, k1) = (np.asarray(one[index]).tolist() for one in (self.places, self.sizes))
        fit = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf)[row], self.stacks[part]))
        balanced = bool(np.all(np.isinf(np.asarray(fit.pair.rho))))
        plan = trimmed(fit.plan, unpadded(fit.pair.gmm0, k0), unpadded(fit.pair.gmm1, k1))
        plan = dataclasses.replace(plan, pair=stated(plan.pair, balanced))
        return dataclasses.replace(fit, pair=plan.pair, plan=plan)

    def __iter__(self) -> Iterator[PairFit]:
        return (self[i] for i in range(len(self)))

    def _words(self) -> list[str]:
        return [*counted(len(self), "pair"), f"J {number(self.penalized_log_likelihood)}", *self._ended()]


def fit_pairs(
    clouds0: Sequence[Any],
    clouds1: Sequence[Any],
    pairs: Any,
    *,
    transport_weight: Any,
    point_weights0: Sequence[Any] | None = None,
    point_weights1: Sequence[Any] | None = None,
    em_steps: int = 30,
    m_steps: int = 20,
    optimizer: Any = None,
    learning_rate: Any = None,
    tol: Any = 0.0,
    freeze: Sequence[str] = (),
    ridge: Any = 1e-6,
    method: str = "entropic",
    chunk_size: int | None = None,
    progress: Any = False,
    executor: Any = None,
) -> PairFits:
    r"""`fit_pair` of many pairs of clouds, of any numbers of points and components.

    .. math:: J_i = \overline{\log p_{i0}} + \overline{\log p_{i1}} - \lambda_i T(p_{i0}, p_{i1})

    Nothing is padded but the last chunk of each cloud (256 or 1,024 points on a CPU), and mixtures up to three times as large as
    they are. A program is compiled for each such size, not for each pair.

    Args:
      clouds0, clouds1: B clouds each, (n, d).
      pairs: a `GaussianMixturePair` to start all fits from, or B.
      transport_weight: lambda, one or (B,).
      point_weights0, point_weights1: None, or for each pair (n,) or None.
      progress: True draws a bar; a callable gets a dict of what is ``done`` and ``of`` how many, in parts of at most 64 pairs.
      executor: None works in this process; or a `concurrent.futures.Executor`, which gets whole parts. The pairs of one that it
        loses have the status ``LOST``, and a reason.
      em_steps, m_steps, optimizer, learning_rate, tol, freeze, ridge, method, chunk_size: as in `fit_pair`, the same for all.

    Returns:
      `PairFits`: `fits[i]` is what `fit_pair` returns, and ends by itself.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range; it says of which pair.

    >>> start = cg.GaussianMixture.from_moments([[0.0], [7.0]], [[[1.0]], [[1.0]]], [0.5, 0.5])
    >>> clouds0, clouds1 = [[[0.0], [1.0], [7.0], [8.0]], [[0.0], [9.0]]], [[[1.0], [2.0], [8.0]], [[2.0], [3.0], [8.0], [9.0]]]
    >>> fits = cg.fit_pairs(clouds0, clouds1, cg.GaussianMixturePair(start, start), transport_weight=0.01, em_steps=5)
    >>> print(len(fits), fits[1].pair.gmm1.means.round(1).tolist())
    2 [[2.5], [8.5]]
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
    for name, leaf in request.controls._asdict().items():
        if np.ndim(leaf):
            raise ArgumentError(name, f"expected one number for all pairs, got shape {np.shape(leaf)}", "pass one")
    executors.check(executor)
    frozen = frozen_sides(freeze)
    given = parts.checked(
        clouds0,
        clouds1,
        pairs,
        transport_weight,
        (point_weights0, point_weights1),
        frozen,
        request.controls.ridge,
        method,
    )
    asked = [
        (part, numbers, FitOptions(chunks.rows(em_steps), some[0].solver, optimizer, progress=False), some[0].view.far)
        for some in parts.alike(given)
        for part, numbers in parts.parts(some, chunk_size, executor)
    ]
    controls = jax.tree.map(np.asarray, request.controls)
    tasks = [(part, frozen, controls, options, far) for part, _, options, far in asked]
    places, sizes = np.zeros((len(given), 2), np.int32), np.zeros((len(given), 2), np.int32)
    for one in given:
        sizes[one.number] = one.pair.gmm0.n_components, one.pair.gmm1.n_components
    found: list[Any] = [None] * len(tasks)
    reasons = [""] * len(tasks)
    for index, (_, numbers, _, _) in enumerate(asked):
        places[numbers] = np.stack([np.full(len(numbers), index), np.arange(len(numbers))], axis=1)
    with report.counting(progress, len(tasks), "fitting pairs") as advance:
        for index, fits in _done(tasks, executor):
            if isinstance(fits, BaseException):
                reasons[index] = reason(fits)
                warnings.warn(f"executor: it lost {tasks[index][0].count} pairs ({reasons[index]})", stacklevel=2)
                fits = _lost(*tasks[index])
            count = int(tasks[index][0].count)
            fits = jax.device_put(jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], fits))
            history = chunks.first(fits.history, count, em_steps)
            found[index] = dataclasses.replace(fits, history=history)
            advance()
    places, sizes = jax.device_put((places, sizes))
    return PairFits(found, places, sizes, tuple(reasons))


def _done(tasks: list[tuple], executor: Any) -> Iterator[tuple[int, Any]]:
    """The number and fits of each part; here an exception is an error of ours, there it stands for what is lost."""
    if executor is not None:
        yield from executors.outcomes(fit_part, tasks, executor)
        return
    shapes = {}
    for task in tasks:  # compiled once for each shape, by a call that fits nothing: threads would each compile it
        shapes.setdefault(str(jax.tree.map(np.shape, task[0])) + repr(task[3:]), task)
    for part, *rest in shapes.values():
        fit_part(part._replace(count=np.int32(0)), *rest)
    yield from executors.outcomes(fit_part, tasks)


def fit_part(part: Part, frozen: np.ndarray, controls: Controls, options: FitOptions, far: bool) -> PairFit:
    """The fits of a part, stacked, by its program."""
    return jax.block_until_ready(_fit(part, frozen, controls, options, far))


@program("options", "far", over_matrices=True)
def _fit(part: Part, frozen: Array, controls: Controls, options: FitOptions, far: bool) -> PairFit:
    def task(problem: Problem) -> tuple[MixtureGraph, Sight]:
        graph = MixtureGraph.from_pair(problem.pair, problem.transport_weight, frozen)
        packed = Chunks(part.points, part.weights, problem.ends, problem.first)
        has_cloud = jnp.ones(2, bool)
        return graph, Sight(packed, problem.frame, problem.variances, problem.pooled, has_cloud, far)

    def prepared(problem: Problem) -> em.Task:
        return em.prepare(*task(problem), controls, options)

    def sums(problem: Problem, underway: em.Underway) -> Any:
        return em.e_step(prepared(problem), underway.state)

    def step(problems: Problem, underway: em.Underway, runs: Bool[Array, " L"]) -> em.Underway:
        if jax.default_backend() == "cpu":  # clouds one by one, each as long as it is
            nothing = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                jax.eval_shape(sums, take(problems, 0), take(underway, 0)),
            )
            found = jax.lax.map(
                lambda one: jax.lax.cond(one[2], lambda: sums(*one[:2]), lambda: nothing), (problems, underway, runs)
            )
        else:
            found = jax.vmap(sums)(problems, underway)
        return jax.vmap(lambda problem, *one: em.advanced(prepared(problem), *one))(problems, underway, found)

    def finish(problem: Problem, underway: em.Underway) -> PairFit:
        return pair_fit(task(problem)[0], em.finish(prepared(problem), *underway))

    work = lanes.Work(
        lambda problem: em.begin(*task(problem), controls, options),
        step,
        lambda underway: underway.state.running,
        finish,
    )
    return lanes.ends(work, part.problems, part.count)


def _lost(part: Part, frozen: np.ndarray, controls: Controls, options: FitOptions, far: bool) -> PairFit:
    """What stands for the fits of a part that was lost: NaN, at the mixtures that they should have started from."""
    shapes = jax.eval_shape(
        lambda part, frozen, controls: _fit(part, frozen, controls, options, far), part, frozen, controls
    )
    nothing: PairFit = jax.device_put(
        jax.tree.map(
            lambda leaf: np.full(leaf.shape, np.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0, leaf.dtype),
            shapes,
        )
    )
    status, start = jnp.full_like(nothing.status, Status.LOST), jax.device_put(part.problems.pair)
    if far:
        start = start.replace(*alike([start.gmm0, start.gmm1, nothing.pair.gmm0])[:2])
    plan = dataclasses.replace(nothing.plan, pair=start, status=status)
    return dataclasses.replace(nothing, pair=start, plan=plan, status=status)
