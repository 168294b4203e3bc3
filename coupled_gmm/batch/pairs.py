"""Coupled fits of many pairs of clouds, of any sizes, in few programs.

All clouds of a part of a batch lie in one buffer of chunks; mixtures of similar sizes are padded to one. A program of a few lanes
goes through the pairs: each is fitted step by step as `fit_pair` does, and where one has ended the next begins, so that nobody
waits for the slowest. On a CPU parts go to a thread for each core.
"""

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.batch import executors, lanes
from coupled_gmm.core import checks, chunks, report
from coupled_gmm.core.chunks import Chunks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import Outcome, Status
from coupled_gmm.core.tree import AnyArray, counted, number, pytree, static, take, unchecked
from coupled_gmm.fits import em, frame
from coupled_gmm.fits.frame import Frame, Sight, View
from coupled_gmm.fits.graph import MixtureGraph, unpadded
from coupled_gmm.fits.pairs import pair_fit
from coupled_gmm.fits.request import Controls, FitOptions, FitRequest, GivenCloud, view_of
from coupled_gmm.fits.results import PairFit, trimmed
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport import solvers
from coupled_gmm.transport.pair import GaussianMixturePair, stated

_ALIKE = 3  # times the components of another: mixtures of no larger ratio are padded to one size
_MOST = 64  # pairs of a part
_FLOATS = 2**25  # numbers in the clouds of a part, or one pair


@pytree
class PairFits(Outcome):
    """Fits of many pairs: `fits[i]` is what `fit_pair` returns of the i-th; status, J and steps are those of all, (B,)."""

    parts: list[PairFit]  # stacked and padded
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
        starts = np.cumsum([0, *(len(part.status) for part in self.parts)])[:-1]
        every = jnp.concatenate([getattr(part, name) for part in self.parts])
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
        fit = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf)[row], self.parts[part]))
        balanced = bool(np.all(np.isinf(np.asarray(fit.pair.rho))))
        plan = trimmed(fit.plan, unpadded(fit.pair.gmm0, k0), unpadded(fit.pair.gmm1, k1))
        plan = dataclasses.replace(plan, pair=stated(plan.pair, balanced))
        return dataclasses.replace(fit, pair=plan.pair, plan=plan)

    def __iter__(self) -> Iterator[PairFit]:
        return (self[i] for i in range(len(self)))

    def _words(self) -> list[str]:
        return [*counted(len(self), "pair"), f"J {number(self.penalized_log_likelihood)}", *self._ended()]


class _Problem(NamedTuple):
    """A pair of a part, as its program takes it; its points lie in the part's buffer."""

    pair: GaussianMixturePair  # padded
    transport_weight: Any
    ends: Any
    first: Any
    frame: Frame
    variances: Any
    pooled: Any


class _Part(NamedTuple):
    """Problems, stacked, of which the first `count` are asked for, and the points of all."""

    problems: _Problem
    count: np.int32
    points: np.ndarray
    weights: np.ndarray


class _Given(NamedTuple):
    """What was asked for of one pair, checked."""

    number: int
    pair: GaussianMixturePair  # of NumPy's arrays
    transport_weight: np.ndarray
    view: View
    solver: solvers.PlanSolver

    @property
    def size(self) -> int:
        return max(self.pair.gmm0.n_components, self.pair.gmm1.n_components)

    @property
    def n_points(self) -> int:
        return sum(map(len, self.view.clouds))

    @property
    def kind(self) -> tuple:
        """What pairs of one program share, but for their sizes."""
        leaves, tree = jax.tree.flatten(self.pair)
        return tree, leaves[0].dtype, self.pair.n_features, self.pair.rho.shape, self.view.far, self.solver


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
    frozen = np.array([name in freeze for name in ("gmm0", "gmm1")])
    given = _checked(
        clouds0, clouds1, pairs, transport_weight, (point_weights0, point_weights1), freeze, request.controls.ridge, method
    )
    alike = _alike(given)
    asked = [
        (part, numbers, FitOptions(chunks.rows(em_steps), some[0].solver, optimizer, progress=False), some[0].view.far)
        for some in alike
        for part, numbers in _parts(some, chunk_size, executor)
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
            if isinstance(fits, Exception):
                reasons[index] = (str(fits).strip() or type(fits).__name__).splitlines()[0]
                warnings.warn(f"executor: it lost {tasks[index][0].count} pairs ({reasons[index]})", stacklevel=2)
                fits = _lost(*tasks[index])
            count = int(tasks[index][0].count)
            fits = jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], fits)
            history = jax.tree.map(lambda leaf: leaf[:, :em_steps], fits.history)
            found[index] = jax.device_put(dataclasses.replace(fits, history=history))
            advance()
    return PairFits(found, *jax.device_put((places, sizes)), tuple(reasons))


def _checked(
    clouds0: Any, clouds1: Any, pairs: Any, weight: Any, weights: tuple, freeze: Any, ridge: Any, method: str
) -> list[_Given]:
    """Every pair with its clouds, in the frame that its fit sees them in."""
    clouds = [checks.sequence(name, some) for name, some in (("clouds0", clouds0), ("clouds1", clouds1))]
    n = len(clouds[0])
    if not n:
        raise ArgumentError("clouds0", "the list is empty", "give at least one cloud")
    pairs = [pairs] * n if isinstance(pairs, GaussianMixturePair) else checks.sequence("pairs", pairs)
    lists = [[None] * n if some is None else checks.sequence(f"point_weights{i}", some) for i, some in enumerate(weights)]
    named = {"clouds1": clouds[1], "pairs": pairs, "point_weights0": lists[0], "point_weights1": lists[1]}
    for name, some in named.items():
        if len(some) != n:
            raise ArgumentError(name, f"expected one for each of the {n} clouds of clouds0, got {len(some)}")
    weight = np.asarray(checks.scalar("transport_weight", weight, at_least=0, batched=True))
    if weight.shape not in ((), (n,)):
        raise ArgumentError("transport_weight", f"expected one number or ({n},), got shape {weight.shape}")
    names = ("gmm0", "gmm1")
    if not isinstance(freeze, (tuple, list, set, frozenset)) or any(name not in names for name in freeze):
        raise ArgumentError("freeze", f"expected a collection of 'gmm0' and 'gmm1', got {checks.brief(freeze)}")
    given = []
    for i, (pair, *cloud, w0, w1) in enumerate(zip(pairs, *clouds, *lists, strict=True)):
        checks.instance(f"pairs[{i}]", pair, GaussianMixturePair)
        if not checks.known(pair, cloud, w0, w1, weight):
            raise ArgumentError("clouds0", "arguments are traced", "call it outside of jit; there map over fit_pair")
        for name, gmm in zip(names, (pair.gmm0, pair.gmm1), strict=True):
            if name in freeze or not frame.raises(ridge):
                gmm.check_densities(f"pairs[{i}].{name}")
        seen = [
            GivenCloud(f"clouds{side}[{i}]", x, f"point_weights{side}[{i}]", w)
            for side, (x, w) in enumerate(zip(cloud, (w0, w1), strict=True))
        ]
        view = view_of(seen, [pair.gmm0, pair.gmm1], ridge)
        solver = solvers.solver_for(method, pair)
        pair = jax.tree.map(np.asarray, stated(pair, balanced=False))
        given.append(_Given(i, pair, np.broadcast_to(weight, n)[i], view, solver))
    return given


def _alike(given: list[_Given]) -> list[list[_Given]]:
    """Pairs that share a program: of one kind, and of mixtures that are padded to the largest of them."""
    kinds: dict[tuple, list[_Given]] = {}
    for one in given:
        kinds.setdefault(one.kind, []).append(one)
    groups: list[list[_Given]] = []
    for some in kinds.values():
        for one in sorted(some, key=lambda one: -one.size):
            if groups and groups[-1][0].kind == one.kind and groups[-1][0].size <= _ALIKE * one.size:
                groups[-1].append(one)
            else:
                groups.append([one])
    return groups


def _parts(some: list[_Given], chunk_size: int | None, executor: Any) -> list[tuple[_Part, list[int]]]:
    """Pairs of one program in parts of like work and one shape, and which pairs they are."""
    size, d = some[0].size, some[0].pair.n_features
    lengths = [len(x) for one in some for x in one.view.clouds]
    length = chunks.length(lengths, size * d, chunk_size)
    floats = sum(one.n_points for one in some) * d
    workers = 1 if executor is not None else _threads()
    n = max(min(workers, len(some)), -(-len(some) // _MOST), -(-floats // _FLOATS))
    ordered = sorted(some, key=lambda one: -one.n_points)  # the largest first: small ones fill what is left at the end
    dealt = [ordered[i::n] for i in range(n) if ordered[i::n]]
    total = chunks.capacity(max(sum(-(-len(x) // length) for one in part for x in one.view.clouds) for part in dealt))
    room = 2 ** (max(map(len, dealt)) - 1).bit_length()
    return [(_part(part, size, length, total, room), [one.number for one in part]) for part in dealt]


def _threads() -> int:
    """Programs at once: one for each core, and one on an accelerator."""
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _part(some: list[_Given], size: int, length: int, total: int, room: int) -> _Part:
    """Clouds one after the other in a buffer, and problems that know where theirs lie."""
    d, dtype = some[0].pair.n_features, some[0].pair.gmm0.dtype
    points, shares = chunks.zeros((total, d, length), dtype), chunks.zeros((total, length), dtype)
    problems, last = [], 0
    for one in some:
        first, ends = last, []
        place = jax.tree.map(np.asarray, one.view.frame)
        for x, w in zip(one.view.clouds, one.view.weights, strict=True):
            x, begin = np.asarray(x), last
            last += -(-len(x) // length)
            chunks.fill(points[begin:last], x, place.points_on_host)
            w = None if w is None else np.asarray(w, np.float64)
            shares[begin:last].reshape(-1)[: len(x)] = 1 / len(x) if w is None else w / w.sum()
            ends.append(last)
        pair = one.pair.replace(*(_padded(gmm, size) for gmm in (one.pair.gmm0, one.pair.gmm1)))
        seen = (np.asarray(one.view.variances), np.asarray(one.view.pooled))
        where = np.array(ends, np.int32), np.int32(first)
        problems.append(_Problem(pair, one.transport_weight.astype(dtype), *where, place, *seen))
    problems += [problems[-1]] * (room - len(problems))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *problems)
    return _Part(stacked, np.int32(len(some)), points, shares)


def _padded(gmm: GaussianMixture, size: int) -> GaussianMixture:
    """As `gaussians.mixture.padded`, by NumPy: a program for each size would cost more than the fit."""
    extra, d = size - gmm.n_components, gmm.n_features

    def more(leaf: np.ndarray, fill: Any) -> np.ndarray:
        return np.concatenate([leaf, np.broadcast_to(np.asarray(fill, leaf.dtype), (extra, *leaf.shape[1:]))])

    return unchecked(
        GaussianMixture,
        means=more(gmm.means, 0),
        covariances=more(gmm.covariances, np.eye(d)),
        weights=more(gmm.weights, 0),
        remainders=None if gmm.remainders is None else more(gmm.remainders, 0),
    )


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
    with ThreadPoolExecutor(_threads()) as pool:
        for number_, fits in executors.outcomes(fit_part, tasks, pool):
            if isinstance(fits, Exception):
                raise fits
            yield number_, fits


def fit_part(part: _Part, frozen: np.ndarray, controls: Controls, options: FitOptions, far: bool) -> PairFit:
    """The fits of a part, stacked, by its program."""
    return jax.block_until_ready(_fit(part, frozen, controls, options, far))


@program("options", "far", over_matrices=True)
def _fit(part: _Part, frozen: Array, controls: Controls, options: FitOptions, far: bool) -> PairFit:
    def task(problem: _Problem) -> tuple[MixtureGraph, Sight]:
        graph = MixtureGraph.from_pair(problem.pair, problem.transport_weight, frozen)
        packed = Chunks(part.points, part.weights, problem.ends, problem.first)
        has_cloud = jnp.ones(2, bool)
        return graph, Sight(packed, problem.frame, problem.variances, problem.pooled, has_cloud, far)

    def prepared(problem: _Problem) -> em.Task:
        return em.prepare(*task(problem), controls, options)

    def sums(problem: _Problem, underway: em.Underway) -> Any:
        return em.e_step(prepared(problem), underway.state)

    def step(problems: _Problem, underway: em.Underway, runs: Bool[Array, " L"]) -> em.Underway:
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

    def finish(problem: _Problem, underway: em.Underway) -> PairFit:
        return pair_fit(task(problem)[0], em.finish(prepared(problem), *underway))

    work = lanes.Work(
        lambda problem: em.begin(*task(problem), controls, options), step, lambda underway: underway.state.running, finish
    )
    return lanes.ends(work, part.problems, part.count)


def _lost(part: _Part, frozen: np.ndarray, controls: Controls, options: FitOptions, far: bool) -> PairFit:
    """What stands for the fits of a part that was lost: NaN, at the mixtures that they should have started from."""
    shapes = jax.eval_shape(lambda part, frozen, controls: _fit(part, frozen, controls, options, far), part, frozen, controls)
    nothing = jax.tree.map(
        lambda leaf: np.full(leaf.shape, np.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0, leaf.dtype), shapes
    )
    status = np.full_like(nothing.status, Status.LOST)
    plan = dataclasses.replace(nothing.plan, status=status)
    start = part.problems.pair
    remainders = nothing.pair.gmm0.remainders is not None

    def given(gmm: GaussianMixture) -> GaussianMixture:
        if remainders and gmm.remainders is None:
            return dataclasses.replace(gmm, remainders=np.zeros_like(gmm.means))
        return gmm

    pair = start.replace(given(start.gmm0), given(start.gmm1))
    return dataclasses.replace(nothing, pair=pair, plan=dataclasses.replace(plan, pair=pair), status=status)
