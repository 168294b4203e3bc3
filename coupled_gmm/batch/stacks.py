"""Fits of many problems of one kind, stacked: coupled fits of pairs, or mixtures for one cloud each.

All clouds of a part of a batch lie in one buffer of chunks; mixtures of similar sizes are padded to one. A program of a few lanes
goes through the problems: each is fitted step by step as it would be alone, and where one has ended the next begins, so that
nobody waits for the slowest. On a CPU parts go to a thread for each core.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.batch import executors, lanes, parts
from coupled_gmm.batch.parts import Given, Part, Problem
from coupled_gmm.core import chunks, report
from coupled_gmm.core.chunks import Chunks
from coupled_gmm.core.errors import ArgumentError, reason
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import Outcome, Status
from coupled_gmm.core.tree import AnyArray, counted, number, pytree, static, take
from coupled_gmm.fits import em, refits
from coupled_gmm.fits.frame import Sight
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.request import Controls, FitOptions, FitRequest
from coupled_gmm.gaussians.mixture import GaussianMixture

F = TypeVar("F")


@pytree
class StackedFits(Outcome, Generic[F]):
    """Fits of a batch, of which each is read by its number; what is asked of all is (B,)."""

    stacks: list[Any]  # of each part, padded
    places: Int[AnyArray, "B 2"]  # of each fit its part, and its row there
    sizes: Int[AnyArray, "B V"]  # components of its mixtures
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
        """Why the i-th was lost by an executor; empty where it was not."""
        return self.reasons[int(self.places[i, 0])]

    def __len__(self) -> int:
        return len(self.places)

    def __bool__(self) -> bool:
        return True

    @overload
    def __getitem__(self, i: int) -> F: ...
    @overload
    def __getitem__(self, i: slice) -> list[F]: ...
    def __getitem__(self, i: int | slice) -> F | list[F]:
        if isinstance(i, slice):
            return [self._alone(number) for number in range(len(self))[i]]
        return self._alone(range(len(self))[i])

    def __iter__(self) -> Iterator[F]:
        return (self._alone(i) for i in range(len(self)))

    def _alone(self, index: int) -> F:
        """The fit of this number, as it would be returned alone."""
        raise NotImplementedError

    def _row(self, index: int) -> tuple[Any, list[int]]:
        """The fit of this number, padded, and the sizes of its mixtures."""
        (part, row), sizes = (np.asarray(one[index]).tolist() for one in (self.places, self.sizes))
        return jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf)[row], self.stacks[part])), sizes

    def _went(self, noun: str, value: str) -> list[str]:
        return [*counted(len(self), noun), f"{value} {number(self.penalized_log_likelihood)}", *self._ended()]


class Kind(NamedTuple):
    """What is fitted: how one is called, its graph by what it starts from, what its fit returns, and what stands for a lost one."""

    noun: str
    graph: Callable[..., MixtureGraph]
    fit: Callable[[MixtureGraph, em.Solution], Any]
    lost: Callable[[Any, tuple], Any]  # of a fit without numbers, and what it starts from
    # What refits start from, by what fits started from, and they; and by these and the refits what coupling has cost.
    alone: Callable[[tuple, Any], tuple] | None = None
    fidelity: Callable[[tuple, Any, Any], Any] | None = None


def fitted(
    kind: Kind, given: list[Given], request: FitRequest, progress: Any, executor: Any
) -> tuple[list[Any], Array, Array, tuple[str, ...]]:
    """The fields of `StackedFits`."""
    for name, leaf in request.controls._asdict().items():
        if np.ndim(leaf):
            raise ArgumentError(
                name, f"expected one number for all {kind.noun}s, got shape {np.shape(leaf)}", "pass one"
            )
    executors.check(executor)
    controls = jax.tree.map(np.asarray, request.controls)
    tasks: list[tuple] = []
    places = np.zeros((len(given), 2), np.int32)
    for some in parts.alike(given):
        options = FitOptions(chunks.rows(request.em_steps), some[0].solver, request.optimizer, progress=False)
        for part, numbers in parts.parts(some, request.chunk_size, executor):
            places[numbers, 0], places[numbers, 1] = len(tasks), np.arange(len(numbers))
            tasks.append((kind, part, controls, options, some[0].view.far))
    found: list[Any] = [None] * len(tasks)
    reasons = [""] * len(tasks)
    with report.counting(progress, len(tasks), f"fitting {kind.noun}s") as advance:
        for index, fits in _done(tasks, executor):
            count = int(tasks[index][1].count)
            if isinstance(fits, BaseException):
                reasons[index] = reason(fits)
                warnings.warn(f"executor: it lost {count} {kind.noun}s ({reasons[index]})", stacklevel=3)
                fits = _lost(*tasks[index])
            fits = jax.device_put(jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], fits))
            found[index] = dataclasses.replace(fits, history=chunks.first(fits.history, count, request.em_steps))
            advance()
    sizes = np.array([[gmm.n_components for gmm in one.gmms] for one in given], np.int32)
    return found, *jax.device_put((places, sizes)), tuple(reasons)


def _done(tasks: list[tuple], executor: Any) -> Iterator[tuple[int, Any]]:
    """The number and fits of each part; here an exception is an error of ours, there it stands for what is lost."""
    if executor is None and executors.threads() > 1:
        shapes = {}
        for kind, part, *rest in tasks:  # compiled once for each shape, by a call that fits nothing: not by each thread
            blank = kind, part._replace(count=np.int32(0)), *rest
            shapes.setdefault(str(jax.tree.map(np.shape, part)) + repr(rest[1:]), blank)
        for _ in executors.outcomes(fit_part, list(shapes.values())):
            pass
    return executors.outcomes(fit_part, tasks, executor)


def fit_part(kind: Kind, part: Part, controls: Controls, options: FitOptions, far: bool) -> Any:
    """The fits of a part, stacked, by its program; and by the same what coupling has cost them."""
    plain = kind._replace(alone=None, fidelity=None)
    fits = jax.block_until_ready(_fits(plain, part, controls, options, far))
    if kind.alone is None or kind.fidelity is None:
        return fits
    free = part._replace(problems=part.problems._replace(start=kind.alone(part.problems.start, fits)))
    controls = refits.sparing(controls)._replace(learning_rate=None)
    refit = jax.block_until_ready(_fits(plain, free, controls, options._replace(optimizer=None), far))
    return dataclasses.replace(fits, fidelity=kind.fidelity(part.problems.start, fits, refit))


@program("kind", "options", "far", over_matrices=True)
def _fits(kind: Kind, part: Part, controls: Controls, options: FitOptions, far: bool) -> Any:
    def sight(problem: Problem, n_nodes: int) -> Sight:
        packed = Chunks(part.points, part.weights, problem.ends, problem.first)
        seen = problem.frame, problem.variances, problem.pooled, jnp.ones(n_nodes, bool), far, problem.update
        return Sight(packed, *seen)

    def task(problem: Problem) -> tuple[MixtureGraph, Sight]:
        graph = kind.graph(*problem.start)
        return graph, sight(problem, graph.n_nodes)

    def read(problem: Problem, end: em.Solution) -> Any:
        return kind.fit(task(problem)[0], end)

    return _ends(task, read, part.problems, part.count, controls, options)


def _ends(
    task: Callable[[Any], tuple[MixtureGraph, Sight]],
    read: Callable[[Any, em.Solution], Any],
    problems: Any,
    count: Any,
    controls: Controls,
    options: FitOptions,
) -> Any:
    """What is read of each problem's end, in lanes."""

    def prepared(problem: Any) -> em.Task:
        return em.prepare(*task(problem), controls, options)

    def sums(problem: Any, underway: em.Underway) -> Any:
        return em.e_step(prepared(problem), underway.state)

    def step(problems: Any, underway: em.Underway, runs: Bool[Array, " L"]) -> em.Underway:
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

    work = lanes.Work(
        lambda problem: em.begin(*task(problem), controls, options),
        step,
        lambda underway: underway.state.running,
        lambda problem, underway: read(problem, em.finish(prepared(problem), *underway)),
    )
    return lanes.ends(work, problems, count)


def _lost(kind: Kind, part: Part, controls: Controls, options: FitOptions, far: bool) -> Any:
    """What stands for the fits of a part that was lost: NaN, at the mixtures that they should have started from."""

    def blank(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.full(leaf.shape, np.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0, leaf.dtype)

    def start(gmm: Any) -> Any:
        if not far or not isinstance(gmm, GaussianMixture) or gmm.remainders is not None:
            return gmm
        return dataclasses.replace(gmm, remainders=jnp.zeros_like(gmm.means))

    shapes = jax.eval_shape(lambda part, controls: _fits(kind, part, controls, options, far), part, controls)
    nothing = jax.device_put(jax.tree.map(blank, shapes))
    nothing = dataclasses.replace(nothing, status=jnp.full_like(nothing.status, Status.LOST))
    return kind.lost(nothing, parts.over_mixtures(start, jax.device_put(part.problems.start)))
