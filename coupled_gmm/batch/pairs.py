"""Coupled fits of many pairs of clouds, of any sizes, in few programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from coupled_gmm.batch import parts, stacks
from coupled_gmm.batch.parts import Given
from coupled_gmm.batch.stacks import Kind, StackedFits
from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import AnyArray, pytree, saved
from coupled_gmm.fits import refits
from coupled_gmm.fits.fidelity import Fidelity, many_overruled
from coupled_gmm.fits.graph import MixtureGraph, unpadded
from coupled_gmm.fits.linked import started
from coupled_gmm.fits.pairs import check_densities, ended, frozen_sides, pair_fit
from coupled_gmm.fits.request import FitRequest, GivenCloud, view_of
from coupled_gmm.fits.results import PairFit, trimmed
from coupled_gmm.fits.weights import Weight
from coupled_gmm.transport import solvers
from coupled_gmm.transport.pair import GaussianMixturePair, stated


@saved
@pytree
class PairFits(StackedFits[PairFit]):
    """Fits of many pairs: `fits[i]` is what `fit_pair` returns of the i-th; status, J and steps are those of all, (B,)."""

    stacks: list[PairFit]
    sizes: Int[AnyArray, "B 2"]

    def _alone(self, index: int) -> PairFit:
        fit, (k0, k1) = self._row(index)
        balanced = bool(np.all(np.isinf(np.asarray(fit.pair.rho))))
        plan = trimmed(fit.plan, unpadded(fit.pair.gmm0, k0), unpadded(fit.pair.gmm1, k1))
        plan = dataclasses.replace(plan, pair=stated(plan.pair, balanced))
        found = fit.fidelity
        if found is not None:
            found = dataclasses.replace(
                found, alone=[unpadded(*one) for one in zip(found.alone, (k0, k1), strict=True)]
            )
        return dataclasses.replace(fit, pair=plan.pair, plan=plan, fidelity=found)

    def _words(self) -> list[str]:
        return self._went("pair", "J")

    def _warnings(self) -> list[str]:
        found = [part.fidelity.overruled for part in self.stacks if part.fidelity is not None]
        many = sum(int(lost.any(axis=1).sum()) for lost in found)
        return [many_overruled(many, len(self))] if many else []


def fit_pairs(
    clouds0: Sequence[Any],
    clouds1: Sequence[Any],
    pairs: Any,
    *,
    transport_weight: Any = None,
    relative_weight: Any = None,
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
    fidelity: bool = True,
    executor: Any = None,
) -> PairFits:
    r"""`fit_pair` of many pairs of clouds, of any numbers of points and components.

    .. math:: J_i = \overline{\log p_{i0}} + \overline{\log p_{i1}} - \lambda_i T(p_{i0}, p_{i1})

    Nothing is padded but the last chunk of each cloud (256 or 1,024 points on a CPU), and mixtures up to three times as large as
    they are. A program is compiled for each such size, not for each pair.

    Args:
      clouds0, clouds1: B clouds each, (n, d).
      pairs: a `GaussianMixturePair` to start all fits from, or B.
      transport_weight: lambda, one or (B,); or
      relative_weight: in its place, one or (B,), without a unit: each pair has the variance of its own clouds.
      point_weights0, point_weights1: None, or for each pair (n,) or None.
      progress: True draws a bar; a callable gets a dict of what is ``done`` and ``of`` how many, in parts of at most 64 pairs.
      executor: None works in this process; or a `concurrent.futures.Executor`, which gets whole parts. The pairs of one that it
        loses have the status ``LOST``, and a reason.
      em_steps, m_steps, optimizer, learning_rate, tol, freeze, ridge, method, chunk_size, fidelity: as in `fit_pair`, the same
        for all.

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
    lists = _aligned(clouds0, clouds1, pairs, point_weights0, point_weights1)
    weight = Weight.given(transport_weight, relative_weight)
    given = _checked(lists, weight, frozen_sides(freeze), request, method)
    kind = _KIND if fidelity else _KIND._replace(alone=None, fidelity=None)
    return PairFits(*stacks.fitted(kind, given, request, progress, executor))


def _aligned(clouds0: Any, clouds1: Any, pairs: Any, weights0: Any, weights1: Any) -> list[list]:
    """Lists of one of each for every pair."""
    clouds0 = parts.at_least_one("clouds0", clouds0)

    def each(name: str, values: Any, alone: Any = None) -> list:
        return parts.one_each(name, values, len(clouds0), "clouds0", alone)

    given = each("clouds1", clouds1), each("pairs", pairs, GaussianMixturePair)
    none = type(None)
    return [clouds0, *given, each("point_weights0", weights0, none), each("point_weights1", weights1, none)]


def _checked(lists: list[list], weight: Weight, frozen: np.ndarray, request: FitRequest, method: str) -> list[Given]:
    """Every pair with its clouds, in the frame that its fit sees them in."""
    x0, x1, pairs, w0, w1 = lists
    n, ridge = len(pairs), request.controls.ridge
    if jnp.shape(weight.value) not in ((), (n,)):
        raise ArgumentError(weight.name, f"expected one number or ({n},), got shape {jnp.shape(weight.value)}")
    for i, pair in enumerate(pairs):
        checks.instance(f"pairs[{i}]", pair, GaussianMixturePair)
    parts.check_known("clouds0", "fit_pair", lists, weight.value)
    weights = np.broadcast_to(np.asarray(weight.value), n)
    pairs = jax.device_get(pairs)  # at once: an accelerator would be waited for at every leaf
    given = []
    for i, (pair, *sides) in enumerate(zip(pairs, zip(x0, w0, strict=True), zip(x1, w1, strict=True), strict=True)):
        check_densities(f"pairs[{i}]", pair, frozen, ridge)
        pair = started(pair, frozen)
        seen = [GivenCloud(f"clouds{s}[{i}]", x, f"point_weights{s}[{i}]", w) for s, (x, w) in enumerate(sides)]
        view = view_of(seen, [pair.gmm0, pair.gmm1], ridge, in_memory="fit_pair takes it")
        parts.check_whole(view, seen, "fit_pair")
        solver = solvers.solver_for(method, pair)
        price = np.asarray(weight._replace(value=weights[i]).of(view), pair.gmm0.dtype)
        given.append(Given(i, (stated(pair, balanced=False), price, frozen), view, solver))
    return given


def _lost(nothing: PairFit, start: tuple) -> PairFit:
    plan = dataclasses.replace(nothing.plan, pair=start[0], status=nothing.status)
    return dataclasses.replace(nothing, pair=start[0], plan=plan)


def _alone(start: tuple, fits: PairFit) -> tuple:
    pair, weight, frozen = start
    return refits.pair(pair, fits.pair.gmm0, fits.pair.gmm1), np.zeros_like(weight), np.zeros_like(frozen)


def _fidelity(start: tuple, fits: PairFit, alone: PairFit) -> Fidelity:
    return Fidelity.of(ended(fits), ended(alone), start[2], np.ones(2, bool))


_KIND = Kind("pair", MixtureGraph.from_pair, pair_fit, _lost, _alone, _fidelity)
