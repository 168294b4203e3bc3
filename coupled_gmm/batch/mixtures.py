"""Mixtures for many clouds, one each: where to start, and the plain EM fits."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from coupled_gmm.batch import executors, parts, stacks
from coupled_gmm.batch.parts import Given
from coupled_gmm.batch.stacks import Kind, StackedFits
from coupled_gmm.core import checks, chunks, report
from coupled_gmm.core.tree import AnyArray, pytree, saved
from coupled_gmm.fits import gmm, starts
from coupled_gmm.fits.frame import View
from coupled_gmm.fits.gmm import N_INIT, MixtureFit, mixture_fit
from coupled_gmm.fits.graph import MixtureGraph, unpadded
from coupled_gmm.fits.online import Update, total_weight
from coupled_gmm.fits.request import FitRequest, GivenCloud, view_of
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport import solvers


@saved
@pytree
class MixtureFits(StackedFits[MixtureFit]):
    """Fits of a mixture to each of many clouds: `fits[i]` is what `fit_gmm` returns of the i-th; numbers of all are (B,)."""

    stacks: list[MixtureFit]
    sizes: Int[AnyArray, "B 1"]

    _remedies = MixtureFit._remedies

    @property
    def log_likelihood(self) -> Float[Array, " B"]:
        return self._read("log_likelihood")

    @property
    def gmms(self) -> list[GaussianMixture]:
        """The mixtures, as `mw2_matrix` takes them."""
        return [fit.gmm for fit in self]

    def _alone(self, index: int) -> MixtureFit:
        fit, (size,) = self._row(index)
        statistics = None if fit.statistics is None else fit.statistics.unpadded(size)  # files of before have none
        return dataclasses.replace(fit, gmm=unpadded(fit.gmm, size), statistics=statistics)

    def _words(self) -> list[str]:
        return self._went("cloud", "log-likelihood with the ridge's term")


def fit_gmms(
    clouds: Sequence[Any],
    inits: GaussianMixture | Sequence[GaussianMixture],
    *,
    point_weights: Sequence[Any] | None = None,
    max_steps: int = 100,
    tol: Any = 1e-5,
    ridge: Any = 1e-6,
    progress: Any = False,
    executor: Any = None,
) -> MixtureFits:
    """`fit_gmm` of many clouds, of any numbers of points and components: a program for each size of mixtures, not for each cloud.

    Args:
      clouds: B of them, (n, d).
      inits: a mixture to start all fits from, or B, as from `init_gmms`.
      point_weights: None, or for each cloud (n,) or None.
      max_steps, tol, ridge: as in `fit_gmm`, the same for all.
      progress, executor: as in `fit_pairs`.

    Returns:
      `MixtureFits`: `fits[i]` is what `fit_gmm` returns, and ends by itself.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range; it says of which cloud.

    >>> clouds = [[[0.0], [1.0], [7.0], [8.0]], [[0.0], [1.0], [9.0]]]
    >>> fits = cg.fit_gmms(clouds, cg.init_gmms(jax.random.key(0), clouds, 2))
    >>> print(len(fits), sorted(fits[0].gmm.means.ravel().round(1).tolist()), fits.status_name)
    2 [0.5, 7.5] 2 converged
    """
    request = FitRequest.checked(ridge=ridge, tol=tol, em_steps=max_steps, steps_name="max_steps")
    given_clouds = _clouds("fit_gmm", clouds, point_weights)
    begun = parts.one_each("inits", inits, len(given_clouds), "clouds", GaussianMixture)
    for i, start in enumerate(begun):
        gmm.check_start(f"inits[{i}]", start, request.controls.ridge)
    parts.check_known("inits", "fit_gmm", begun)
    begun = jax.device_get(begun)  # at once: an accelerator would be waited for at every leaf
    given = []
    for i, (cloud, start) in enumerate(zip(given_clouds, begun, strict=True)):
        view = view_of([cloud], [start], request.controls.ridge, in_memory="fit_gmm takes it")
        parts.check_whole(view, [cloud], "fit_gmm")
        update = Update.of(total_weight(cloud.weights, len(view.clouds[0])), start.dtype, None, None)
        given.append(Given(i, (start,), view._replace(update=update), solvers.ENTROPIC))
    return MixtureFits(*stacks.fitted(_KIND, given, request, progress, executor))


def init_gmms(
    key: PRNGKeyArray,
    clouds: Sequence[Any],
    n_components: int | Sequence[int],
    *,
    point_weights: Sequence[Any] | None = None,
    n_init: int = N_INIT,
    ridge: Any = 1e-6,
    progress: Any = False,
) -> list[GaussianMixture]:
    """`init_gmm` of many clouds, of any sizes, in a thread for each core.

    Args:
      key: decides the draws: `gmms[i]` is ``init_gmm(jax.random.fold_in(key, i), clouds[i], ...)``, whatever the other clouds are.
      clouds: B of them, (n, d).
      n_components: K of all, or (B,).
      point_weights: None, or for each cloud (n,) or None.
      n_init, ridge: as in `init_gmm`, the same for all.
      progress: True draws a bar; a callable gets a dict of what is ``done`` and ``of`` how many clouds.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range; it says of which cloud.
    """
    key = checks.key("key", key)
    given = _clouds("init_gmm", clouds, point_weights)
    sizes = parts.one_each("n_components", n_components, len(given), "clouds", (int, np.integer))
    n_init = checks.integer("n_init", n_init, 1, checks.MOST_STARTS)
    ridge = checks.scalar("ridge", ridge, at_least=0)
    parts.check_known("key", "init_gmm", key, ridge)
    tasks = []
    for i, (cloud, size) in enumerate(zip(given, sizes, strict=True)):
        size, view = checks.integer(f"n_components[{i}]", size, 1), view_of([cloud], [], ridge)
        each = jax.random.fold_in(key, i)
        gmm.check_distinct(cloud.name, each, view, size)
        tasks.append((each, view, ridge, size, n_init, None))
    found: list[Any] = [None] * len(tasks)
    with report.counting(progress, len(tasks), "drawing starts") as advance:
        for number, start in _drawn(tasks):
            found[number] = jax.device_put(start)
            advance()
    return found


def _drawn(tasks: list[tuple]) -> Iterator[tuple[int, GaussianMixture]]:
    """The number and start of each; first one of each shape, so that of threads not each compiles its program."""
    shapes = {_shape(view, size): number for number, (_, view, _, size, *_) in enumerate(tasks)}
    first = sorted(shapes.values())
    for numbers in (first, sorted({*range(len(tasks))} - {*first})):
        for index, start in executors.outcomes(gmm.draws, [tasks[number] for number in numbers]):
            yield numbers[index], start


def _shape(view: View, size: int) -> tuple:
    """What decides whether starts share a program."""
    n, d = min(len(view.clouds[0]), starts.MOST_POINTS), len(view.pooled)
    length = chunks.length([n], size * d)
    return size, d, view.pooled.dtype, view.far, length, chunks.capacity(-(-n // length))


def _clouds(single: str, clouds: Any, weights: Any) -> list[GivenCloud]:
    """Every cloud with its weights, by the names that they go by."""
    clouds = parts.at_least_one("clouds", clouds)
    weights = parts.one_each("point_weights", weights, len(clouds), "clouds", type(None))
    parts.check_known("clouds", single, clouds, weights)
    named = enumerate(zip(clouds, weights, strict=True))
    return [GivenCloud(f"clouds[{i}]", x, f"point_weights[{i}]", w) for i, (x, w) in named]


def _lost(nothing: MixtureFit, start: tuple) -> MixtureFit:
    return dataclasses.replace(nothing, gmm=start[0])


_KIND = Kind("cloud", MixtureGraph.single, mixture_fit, _lost)
