"""What is asked of a fit, checked once and packed as its program takes it: clouds, what a user sweeps, what recompiles."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from coupled_gmm.core import checks, chunks, foreign, meshes, passes, report
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import take
from coupled_gmm.fits import frame, rows
from coupled_gmm.fits.frame import Sight, View
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.solvers import ENTROPIC_METHODS, PlanSolver

_BLINK = 0.05  # seconds; of rows that come more often none can be read


class GivenCloud(NamedTuple):
    """A cloud as a user gave it, or None, with its weights; and what the arguments are called."""

    name: str
    points: Any
    weights_name: str
    weights: Any

    def checked(self, n_features: int | None, in_memory: str | None, *others: Any) -> tuple[Any, Any]:
        if self.points is None:
            return None, None
        if foreign.is_open(self.points):
            if in_memory is not None:
                raise ArgumentError(self.name, f"expected points in memory, got {self.points!r}", in_memory)
            if self.weights is not None:
                problem = f"{self.name} is not in memory, and its weights are where it is opened"
                raise ArgumentError(self.weights_name, problem, "give them to open_cloud(..., weights=...)")
            return passes.points(self.name, self.points, n_features or self.points.shape[1], *others), None
        points = checks.points(self.name, self.points, n_features)
        if self.weights is None:
            return points, None
        return points, checks.relative_weights(self.weights_name, self.weights, len(points))


def view_of(
    clouds: Sequence[GivenCloud], starts: Sequence[GaussianMixture], ridge: Any, in_memory: str | None = None
) -> View:
    """The clouds, checked against each other and the mixtures to start from, in the frame in which a fit is to see them.

    `in_memory`: where clouds must be, what to do with one that is not; before it is read.

    Raises:
      TypeError, ValueError: a cloud or weights of the wrong kind, shape or range; features of other names or number.
    """
    names = [cloud.name for cloud in clouds]
    points = foreign.same_features(names, [cloud.points for cloud in clouds])
    n_features = starts[0].n_features if starts else None
    checked = [
        cloud._replace(points=x).checked(n_features, in_memory, starts, clouds)
        for cloud, x in zip(clouds, points, strict=True)
    ]
    return frame.seen(names, [x for x, _ in checked], [w for _, w in checked], starts, ridge)


class Controls(NamedTuple):
    """What a user sweeps: leaves, whose change recompiles nothing."""

    ridge: Float[Array, ""]
    tol: Float[Array, ""]
    em_steps: Int[Array, ""]
    m_steps: Int[Array, ""]
    learning_rate: Float[Array, ""] | None
    listener: Any = None  # the number that rows are delivered to


class FitOptions(NamedTuple):
    """What a fit's program depends on: their change recompiles."""

    rows: int  # of the history, at least as many as steps
    solver: PlanSolver
    optimizer: Any
    progress: bool
    refits: bool = False  # whether the program of several runs is to say what coupling has cost


class Stretches(NamedTuple):
    """Two programs of a fit that may be shown: one begins it, and one goes on, of the same, what is underway, and up to which step.

    It is called once for a fit without progress, and again and again with it: compiled once for both, and without a host callback,
    with which JAX would not keep it on disk.
    """

    begin: Callable[..., Any]
    go_on: Callable[..., Any]


class FitRequest(NamedTuple):
    """How a fit shall go, checked."""

    controls: Controls
    em_steps: int  # the same as in the controls, where Python counts with it
    optimizer: Any
    chunk_size: int | None
    progress: Any
    rows: int  # of the history that its program has room for

    @classmethod
    def checked(
        cls,
        *,
        ridge: Any,
        tol: Any,
        em_steps: int,
        m_steps: int = 1,
        optimizer: Any = None,
        learning_rate: Any = None,
        method: str = "entropic",
        chunk_size: int | None = None,
        progress: Any = False,
        steps_name: str = "em_steps",
    ) -> "FitRequest":
        """Arguments as of `fit_pair`; `steps_name` is what its caller calls `em_steps`.

        Raises:
          TypeError, ValueError: one of the wrong kind or out of range.
        """
        learning_rate = _check_learning_rate(optimizer, learning_rate)
        controls = Controls(
            checks.scalar("ridge", ridge, at_least=0, batched=True),
            checks.scalar("tol", tol, at_least=0, batched=True),
            jax.device_put(np.int32(checks.integer(steps_name, em_steps, 1, checks.MOST_STEPS))),
            jax.device_put(np.int32(checks.integer("m_steps", m_steps, 1, checks.MOST_STEPS))),
            learning_rate,
        )
        checks.choice("method", method, ENTROPIC_METHODS)
        if chunk_size is not None:
            checks.integer("chunk_size", chunk_size, 1)
        return cls(controls, int(em_steps), optimizer, chunk_size, progress, chunks.rows(em_steps))

    def seen(self, view: View, numbers: int) -> Sight:
        """The clouds as a program takes them, which is worth making once for several."""
        return view.in_chunks(numbers, self.chunk_size)

    def fit(
        self,
        program: Callable[..., Any] | Stretches,
        *problem: Any,
        view: View,
        numbers: int,
        solver: PlanSolver,
        sight: Sight | None = None,
        refits: bool = False,
    ) -> Any:
        """What a program makes of a problem and what it sees, with a row of history for each step that was asked for.

        Args:
          program: (*problem, sight, controls, options) -> a fit; or stretches of one, each of these.
          numbers: that it holds of each point.
          sight: `seen` of the view, where it has been made before.
          refits: as in `FitOptions`.
        """
        sight = self.seen(view, numbers) if sight is None else sight
        options = FitOptions(self.rows, solver, self.optimizer, progress=False, refits=refits)
        sharded = sight.chunks.mesh is not None
        controls = self.controls
        if sharded:
            problem, controls, update = meshes.whole((problem, controls, sight.update))
            sight = dataclasses.replace(sight, update=update)
        asked = (*problem, sight, controls, options)
        if isinstance(program, Stretches):
            with report.listening(self.progress) as listener:
                if view.external:
                    fit = self._in_passes(program, asked, listener, view, numbers)
                else:
                    fit = self._in_stretches(program, asked, listener)
        else:
            fit = program(*asked)
        fit = jax.device_put(meshes.whole(fit)) if sharded else fit  # where whatever comes next may use it
        # Of several fits, stacked, each has its rows.
        return dataclasses.replace(fit, history=chunks.first(fit.history, *fit.status.shape, self.em_steps))

    def _in_stretches(self, program: Stretches, asked: tuple, listener: Any) -> Any:
        """A fit whose rows are shown as they come: step by step, and in longer stretches where steps are quick."""
        underway, last = program.begin(*asked), np.int32(self.em_steps + 1)
        if listener is None:
            return program.go_on(*asked, underway, last)[1]
        if not checks.known(asked, underway):  # inside somebody's program, which has to call the host
            *rest, controls, options = asked
            asked = (*rest, controls._replace(listener=listener), options._replace(progress=True))
            return program.go_on(*asked, underway, last)[1]
        done, stride, fit, running = 0, 1, None, True
        while running:
            began = time.perf_counter()
            underway, fit = program.go_on(*asked, underway, np.int32(min(done + stride, last)))
            done, running = self._delivered(listener, underway, done)
            stride *= 2 if time.perf_counter() - began < _BLINK else 1
        return fit

    def _in_passes(self, program: Stretches, asked: tuple, listener: Any, view: View, numbers: int) -> Any:
        """A fit of which some clouds are not in memory: a pass over these for each step's sums, from which a program goes on."""
        *problem, sight, controls, options = asked
        here, empty = sight.chunks, chunks.none(len(view.clouds), sight.n_features, sight.pooled.dtype)
        asked = (*problem, dataclasses.replace(sight, chunks=empty), controls, options)
        if not checks.known(asked):
            raise ValueError(
                "a cloud that is not in memory can't be fitted under a transformation (jit, vmap): call the fit outside"
            )
        underway, last = program.begin(*asked), np.int32(self.em_steps + 1)
        floors, done, fit, running = frame.floors(sight, controls.ridge), 0, None, True
        while running:
            base, reference = underway.state.base, underway.state.place.penalized
            sums = rows.e_step(view, here, base, floors, reference, numbers, self.chunk_size)
            underway, fit = program.go_on(*asked, underway, last, sums)
            done, running = self._delivered(listener, underway, done)
        return fit

    def _delivered(self, listener: Any, underway: Any, done: int) -> tuple[int, bool]:
        """How many steps a fit has done, after those that it had, and whether it runs on; their rows go to a listener."""
        step, running = int(underway.state.step), bool(underway.state.running)
        if listener is not None:
            history = jax.tree.map(np.asarray, underway.history)
            for row in range(done, step):
                report.deliver(listener, {"em_steps": self.em_steps, "step": row, **take(history, row).columns})
        return step, running


def _check_learning_rate(optimizer: Any, learning_rate: Any) -> Array | None:
    """Checked, with the optimiser that it goes with."""
    factory = not checks.is_built_optimizer("optimizer", optimizer) and optimizer is not None
    if factory and learning_rate is None:
        raise ArgumentError("learning_rate", "an optax factory needs one", "pass learning_rate=1e-2, say")
    if learning_rate is None:
        return None
    if not factory:
        raise ArgumentError("learning_rate", "goes with an optax factory only, such as optimizer=optax.adam", "drop it")
    return checks.scalar("learning_rate", learning_rate, above=0, batched=True)
