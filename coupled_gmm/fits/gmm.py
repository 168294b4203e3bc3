"""One mixture for one cloud: where to start, and the plain EM fit."""

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from coupled_gmm.core import checks, meshes
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import Outcome, Status
from coupled_gmm.core.tree import counted, number, pytree, saved, take
from coupled_gmm.fits import em, external, frame, online, shards, starts
from coupled_gmm.fits.external import External
from coupled_gmm.fits.frame import Sight, View
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.online import MixtureStatistics
from coupled_gmm.fits.request import Controls, FitOptions, FitRequest, GivenCloud, Stretches, view_of
from coupled_gmm.fits.statistics import Sums
from coupled_gmm.gaussians.mixture import GaussianMixture, stack
from coupled_gmm.transport import solvers

N_INIT = 10


def init_gmm(
    key: PRNGKeyArray,
    x: Any,
    n_components: int,
    *,
    point_weights: Any = None,
    n_init: int = N_INIT,
    ridge: Any = 1e-6,
) -> GaussianMixture:
    """A mixture to start a fit from: k-means, then the moments of the points closest to each centre; the best of several.

    Centres are drawn by k-means++ (Arthur & Vassilvitskii 2007), distances being measured in standard deviations of each
    feature, and moved by some of Lloyd's steps: four times `n_init` draws. The likelier half of them after three steps of EM goes
    on for three more, the likelier half of these for six, and so on (successive halving); the last is returned, as it is then.
    Clouds of more than 50,000 points are represented by that many, drawn by their weights.

    Args:
      key: decides the draws.
      x: cloud (n, d).
      n_components: K, at most the number of distinct points of positive weight.
      point_weights: (n,), at least 0, not all 0; None weighs points equally.
      n_init: starts, of which the best is kept; each is the best of four draws.
      ridge: added to the covariances, relative to each feature's variance, as in `fit_gmm`.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range.
    """
    key = checks.key("key", key)
    n_components = checks.integer("n_components", n_components, 1)
    n_init = checks.integer("n_init", n_init, 1, checks.MOST_STARTS)
    ridge = checks.scalar("ridge", ridge, at_least=0)
    view = view_of([_cloud(x, point_weights)], [], ridge)
    check_distinct("x", key, view, n_components)
    return draws(key, view, ridge, n_components, n_init, None)


def _cloud(x: Any, point_weights: Any) -> GivenCloud:
    return GivenCloud("x", x, "point_weights", point_weights)


def check_distinct(name: str, key: Array, view: View, n_components: int) -> None:
    """Refuse more components than a cloud has distinct points; a small sample usually settles it."""
    if meshes.is_spread(view.clouds[0]) or view.external:
        view = _representatives(key, view)
    (x,), (w,) = view.clouds, view.weights
    if not checks.known(x, w):
        return
    x = np.asarray(x) if w is None else np.asarray(x)[np.asarray(w) > 0]
    for n in (16 * n_components, len(x)):
        n_distinct = len(np.unique(x[:n], axis=0))
        if n_distinct >= n_components:
            return
    raise ArgumentError(
        "n_components",
        f"{n_components} components need as many distinct points of positive weight, {name} has {n_distinct}",
        "lower n_components",
    )


def draws(
    key: Array, view: View, ridge: Array, n_components: int, n_init: int, n: int | None, present: int | None = None
) -> GaussianMixture:
    """The n best of n_init starts, stacked; None is the best alone.

    Of their components so many are `present`, and the others have weight zero: one program for all numbers up to one.
    """
    some = None if present is None else np.int32(present)
    return _init(key, _represented(key, view, n_components), ridge, n_components, n_init, n, some)


def pooled_draws(key: Array, view: View, ridge: Array, n_components: int, n: int) -> list[GaussianMixture]:
    """Starts for the points of all clouds together, each cloud counting as much."""
    found = draws(key, sampled(key, view).together(), ridge, n_components, n, n)
    return [take(found, i) for i in range(n)]


def _represented(key: Array, view: View, n_components: int) -> Sight:
    """The points that starts are drawn from, as a program takes them."""
    return _representatives(key, view).in_chunks(n_components * len(view.pooled))


def sampled(key: Array, view: View) -> View:
    """The same view of all clouds, where of those that are not in memory representatives are."""
    seen = [view._replace(clouds=[x], weights=[w]) for x, w in zip(view.clouds, view.weights, strict=True)]
    seen = [_representatives(key, one) if one.external else one for one in seen]
    return view._replace(clouds=[one.clouds[0] for one in seen], weights=[one.weights[0] for one in seen])


def _representatives(key: Array, view: View) -> View:
    """All points of a cloud, or so many of them, drawn by their weights; in memory."""
    (x,), (w,), n = view.clouds, view.weights, starts.MOST_POINTS
    elsewhere: Any = shards if meshes.is_spread(x) else external if isinstance(x, External) else None
    if len(x) <= n:
        x, w = elsewhere.all_of(x, w) if elsewhere else (x, w)
        return view._replace(clouds=[x], weights=[w])
    draws = jax.random.uniform(jax.random.fold_in(key, 0), (n,))
    # One in each of as many equal parts of the mass.
    if elsewhere:
        places = (np.arange(n) + np.asarray(draws, np.float64)) / n
        return view._replace(clouds=[elsewhere.drawn(x, w, places)], weights=[None])
    xp = np if checks.at_hand(x, w, draws) else jnp
    x, draws = xp.asarray(x), xp.asarray(draws)
    places = (xp.arange(n) + draws) / n
    if w is None:
        index = (places * len(x)).astype(int)
    else:
        upto = xp.cumsum(xp.asarray(w))
        index = xp.searchsorted(upto, places * upto[-1], side="right")
    return view._replace(clouds=[x[xp.minimum(index, len(x) - 1)]], weights=[None])


@program("n_components", "n_init", "n", over_matrices=True)
def _init(
    key: Array,
    sight: Sight,
    ridge: Array,
    n_components: int,
    n_init: int,
    n: int | None,
    present: Int[Array, ""] | None = None,
) -> GaussianMixture:
    """The n best of n_init starts, stacked; None is the best alone."""
    floor, pooled = sight.floors(ridge)[0], sight.pooled
    deviations = jnp.where(pooled > 0, jnp.sqrt(pooled), 1)
    found = starts.draws(key, sight.chunks, deviations, floor, n_components, starts.DRAWS * n_init, present)
    best = sight.frame.mixture(starts.race(found, sight.chunks, floor, n or 1), sight.far)
    return best if n else take(best, 0)


@saved
@pytree
class MixtureHistory:
    """A row per EM step, before it; NaN past the last. Mean per point, without the ridge's term and with it."""

    log_likelihood: Float[Array, "*b steps"]
    penalized_log_likelihood: Float[Array, "*b steps"] | None = None


@saved
@pytree
class MixtureFit(Outcome):
    """A fitted mixture and how the fit went.

    `log_likelihood` is the density's own at the end, mean per point; `penalized_log_likelihood` has the ridge's term in, and is
    what the fit raised. Of several starts, the one that ended best, and which it was. `statistics` are those of all data so far:
    `fit_gmm` goes on from them. Of a fit that has gone on from others, likelihoods are the lower bounds that its docstring gives.
    """

    gmm: GaussianMixture
    log_likelihood: Float[Array, "*b"]
    status: Int[Array, "*b"]
    n_steps: Int[Array, "*b"]
    history: MixtureHistory
    penalized_log_likelihood: Float[Array, "*b"] | None = None
    start: Int[Array, "*b"] | None = None
    statistics: MixtureStatistics | None = None  # files of before have none

    _remedies = MappingProxyType(
        {
            Status.PRECISION: (
                "stopped at what this precision can reach, above the tolerance: in float32, enable float64 "
                "(jax.config.update('jax_enable_x64', True)); in float64, raise tol"
            ),
            Status.NOT_FINITE: "a value was not finite: raise ridge, or check the start for singular covariances",
            Status.STALLED: (
                "stalled: no step raised the likelihood, though the next promises more than the tolerance: go on in float64, or "
                "raise tol"
            ),
        }
    )

    def _words(self) -> list[str]:
        value = [f"log-likelihood {said}" for said in [number(self.log_likelihood)] if said]
        return [*self.gmm._words(), *value, *counted(self.n_steps, "step"), *self._ended()]

    def _facts(self) -> dict[str, str]:
        return {
            "log-likelihood, mean per point": number(self.log_likelihood),
            "with the ridge's term": number(self.penalized_log_likelihood),
            "EM steps": number(self.n_steps),
            "best start, from 0": number(self.start),
        }


def fit_gmm(
    x: Any,
    init: GaussianMixture | Sequence[GaussianMixture] | int,
    *,
    key: PRNGKeyArray | None = None,
    n_init: int | None = None,
    point_weights: Any = None,
    max_steps: int = 100,
    tol: Any = 1e-5,
    ridge: Any = 1e-6,
    statistics: MixtureStatistics | None = None,
    forgetting: Any = 0.0,
) -> MixtureFit:
    r"""Fit one mixture to one cloud by EM: the coupled fit of a graph of one node.

    With `statistics` of earlier data it goes on from these, without their points (online EM): it raises

    .. math:: J = (1 - a) L + a (Q_0 + H_0), \quad a = (1 - f) M_0 / ((1 - f) M_0 + M),

    with L the mean log-likelihood of the cloud, of mass M (its points, or the sum of their weights), and of earlier data, of mass
    M0, the expected log-likelihood Q0 under the probabilities of components that were found then, and their mean entropy H0:
    :math:`L_0 \ge Q_0 + H_0`, with equality where the earlier fit ended (Neal & Hinton 1998). So J is a lower bound of the mean
    log-likelihood of all data, which no step lowers; a step a batch is the online EM of Cappé & Moulines (2009).

    Args:
      x: cloud (n, d). Given in more digits than the mixture has, it is centred in its own precision first.
      init: where to start, as from `init_gmm`; or several mixtures of one size, all fitted to the end, of which the best is
        kept; or a number of components, which takes a key.
      key: of a number of components, decides the starts.
      n_init: of a number of components, how many starts are fitted; None is 10.
      point_weights: (n,), at least 0, not all 0; None weighs points equally.
      max_steps: EM steps, at most.
      tol: at least 0; converged when a step raises the mean log-likelihood by no more, and the next promises no more. Gains are
        known to less than a rounding unit of the log-likelihood, with `statistics` to some. 0 does all steps.
      ridge: floor of the covariances relative to each feature's variance, as in `fit_pair`. A start is floored as the fit is.
        With earlier statistics variances are those of all data.
      statistics: of all data so far, as in an earlier fit's `statistics`, for one mixture to start from: that fit's own, as a rule.
        None begins anew.
      forgetting: f, from 0 to 1, the part of earlier data's mass that is forgotten: 0 weighs all points alike, 1 leaves the new
        ones only.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range; statistics of another size than the mixture's.

    >>> yesterday = cg.fit_gmm([[0.0], [1.0], [7.0], [8.0]], 2, key=jax.random.key(0))
    >>> today = cg.fit_gmm([[0.5], [9.5]], yesterday.gmm, statistics=yesterday.statistics, forgetting=0.5)
    >>> print(float(today.statistics.mass), sorted(today.gmm.means.ravel().round(2).tolist()))
    4.0 [0.5, 8.5]
    """
    request = FitRequest.checked(ridge=ridge, tol=tol, em_steps=max_steps, steps_name="max_steps")
    ridge = request.controls.ridge
    if statistics is not None:
        init = _going_on(init)
    earlier = online.checked(statistics, forgetting, init if isinstance(init, GaussianMixture) else None)
    if isinstance(init, (int, np.integer)) and not isinstance(init, bool):
        key, n_init = _check_draws(key, n_init)
        n_components = checks.integer("init", int(init), 1)
        view = view_of([_cloud(x, point_weights)], [], ridge)
        check_distinct("x", key, view, n_components)
        inits = draws(key, view, ridge, n_components, n_init, n_init)
    else:
        inits = _given(init, key, n_init, ridge)
        view = view_of([_cloud(x, point_weights)], [inits], ridge)
    (cloud,) = view.clouds
    mass = cloud.moments.mass if isinstance(cloud, External) else online.total_weight(point_weights, len(cloud))
    view = view._replace(update=online.Update.of(mass, inits.dtype, *earlier))
    seen = {"view": view, "numbers": inits.n_components * inits.n_features, "solver": solvers.ENTROPIC}
    if not view.external:
        return request.fit(_fit, inits, **seen)
    ends = [request.fit(Stretches(_begin_fit, _go_on_with_fit), init, **seen) for init in inits]
    best = highest(np.array([float(end.penalized_log_likelihood) for end in ends]))
    return dataclasses.replace(ends[best], start=jax.device_put(np.int32(best)))


def _going_on(init: Any) -> GaussianMixture:
    """The one mixture from which a fit may go on from earlier statistics."""
    if isinstance(init, (tuple, list)) and len(init) == 1:
        (init,) = init
    if not isinstance(init, GaussianMixture):
        raise ArgumentError("init", "statistics go with one mixture to start from", "give the earlier fit's, fit.gmm")
    checks.instance("init", init, GaussianMixture)
    return init


def _given(init: Any, key: Any, n_init: Any, ridge: Array) -> GaussianMixture:
    """The mixtures to start from, stacked."""
    if key is not None or n_init is not None:
        raise ValueError("key, n_init: go with a number of components as init; drop them, or pass init=3, say")
    alone = not isinstance(init, (tuple, list))
    gmms = [init] if alone else checks.sequence("init", init)
    if not gmms:
        raise ArgumentError("init", "the list is empty", "give at least one start")
    for i, gmm in enumerate(gmms):
        name = "init" if alone else f"init[{i}]"
        check_start(name, gmm, ridge)
        if (gmm.n_components, gmm.n_features) != (gmms[0].n_components, gmms[0].n_features):
            raise ArgumentError(name, "differs from init[0] in its number of components or features", "give them alike")
    return stack(gmms)


def check_start(name: str, gmm: Any, ridge: Any) -> None:
    """Refuse what is no mixture, or has no density where no ridge gives it one."""
    checks.instance(name, gmm, GaussianMixture)
    if not frame.raises(ridge):
        gmm.check_densities(name)


def _check_draws(key: Any, n_init: Any) -> tuple[Array, int]:
    """What decides starts that are drawn, and how many of them are fitted."""
    if key is None:
        raise ArgumentError(
            "key", "a number of components is started at random", "pass a key such as jax.random.key(0)"
        )
    n_init = N_INIT if n_init is None else checks.integer("n_init", n_init, 1, checks.MOST_STARTS)
    return checks.key("key", key), n_init


@program("options", over_matrices=True)
def _fit(inits: GaussianMixture, sight: Sight, controls: Controls, options: FitOptions) -> MixtureFit:
    def one(init: GaussianMixture) -> MixtureFit:
        problem = MixtureGraph.single(init)
        return mixture_fit(problem, em.run(problem, sight, controls, options))

    if len(inits.weights) == 1:
        return one(take(inits, 0))
    ends = jax.lax.map(one, inits)
    best = highest(ends.penalized_log_likelihood)
    return dataclasses.replace(take(ends, best), start=best)


@program("options", over_matrices=True)
def _begin_fit(init: GaussianMixture, sight: Sight, controls: Controls, options: FitOptions) -> em.Underway:
    return em.begin(MixtureGraph.single(init), sight, controls, options)


@program("options", over_matrices=True)
def _go_on_with_fit(
    init: GaussianMixture,
    sight: Sight,
    controls: Controls,
    options: FitOptions,
    underway: em.Underway,
    until: Array,
    sums: Sums | None = None,
) -> tuple[em.Underway, MixtureFit]:
    problem = MixtureGraph.single(init)
    underway, end = em.go_on(problem, sight, controls, options, underway, until, sums)
    return underway, mixture_fit(problem, end)


def mixture_fit(problem: MixtureGraph, end: em.Solution) -> MixtureFit:
    """What a program returns of a graph of one node."""
    (gmm,) = problem.split(end.nodes)
    log_likelihoods = end.history.log_likelihoods
    assert log_likelihoods is not None
    history = MixtureHistory(log_likelihoods[:, 0], end.history.penalized_log_likelihood)
    only = jnp.zeros((), jnp.int32)
    statistics = None if end.statistics is None else take(end.statistics, 0)
    return MixtureFit(gmm, end.log_likelihoods[0], end.status, end.n_steps, history, end.value, only, statistics)


def highest(values: Any) -> Any:
    """The highest of some values, of which some may be none."""
    xp = np if isinstance(values, np.ndarray) else jnp
    return xp.argmax(xp.where(xp.isfinite(values), values, -xp.inf))
