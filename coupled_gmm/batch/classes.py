r"""Labelled clouds as mixtures: each class a component or several, and what a plan says of the classes of another cloud.

The labelled mixture is gmm0 of a pair, and held (``freeze=["gmm0"]``) while gmm1 is fitted to a cloud without labels. Of the plan
P between them the columns say from which classes a component of gmm1 comes:

.. math:: q_{cl} = \sum_{k \in c} P_{kl} / \sum_k P_{kl}

and with it the points, by the posterior of their components, :math:`p(c | y) = \sum_l p(l | y) \, q_{cl}`.
"""

import collections
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from coupled_gmm.batch.mixtures import fit_gmms, init_gmms
from coupled_gmm.core import checks, foreign, matrices
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.core.tree import AnyArray, pytree, saved, static
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.plan import Plan


@saved
@pytree
class Classes:
    """A mixture whose components belong to classes, in the order of `names`."""

    gmm: GaussianMixture
    of_component: Int[AnyArray, " K"]  # the class of each, as an index in names
    names: tuple[str | int, ...] = static()

    def _words(self) -> list[str]:
        return [f"{len(self.names)} classes", f"{self.gmm.n_components} components of {self.gmm.n_features} features"]

    @property
    def weights(self) -> Float[Array, " C"]:
        """The mass of each class in its own cloud."""
        return self._summed(self.gmm.weights)

    def links(
        self, others: "Classes | None" = None, *, forbidden: Iterable[tuple[Any, Any]] = ()
    ) -> Bool[np.ndarray, "K0 K1"]:
        """Links for a pair with another labelled mixture, or one that starts from this: a class goes to none but itself.

        With `forbidden`, pairs of names, all others are allowed instead.

        Raises:
          ValueError: a name that is no class.
        """
        others = self if others is None else others
        one, other = ([side.names[i] for i in np.asarray(side.of_component)] for side in (self, others))
        banned = {(self._known(a), others._known(b)) for a, b in forbidden}
        free = [[(a, b) not in banned if banned else a == b for b in other] for a in one]
        return np.array(free, bool)

    @matrices.precise
    def proportions(self, plan: Plan) -> Float[Array, " C"]:
        r"""The mass of each class in gmm1, as the plan has it from gmm0: :math:`\sum_l b_l q_{cl}`, summing to 1.

        Balanced, these are the masses of the classes themselves; unbalanced (tau below 1), what gmm1's cloud has of each.
        """
        self._check(plan)
        mass = self._origins(plan) @ plan.pair.gmm1.weights
        return mass / jnp.sum(mass)

    @matrices.precise
    def posterior(self, plan: Plan, y: Any) -> Float[Array, "n C"]:
        """The probability of each class given a point of gmm1's cloud, (n, C)."""
        self._check(plan)
        components = jnp.exp(plan.pair.gmm1.log_posterior(y))
        found = components @ self._origins(plan).T
        total = jnp.sum(found, axis=1, keepdims=True)
        # Where nothing comes from anywhere the classes are what they are in all of gmm1.
        return jnp.where(total > 0, found / jnp.where(total > 0, total, 1), self.proportions(plan))

    def predict(self, plan: Plan, y: Any) -> np.ndarray:
        """The most probable class of each point of gmm1's cloud, by name, (n,)."""
        return np.array(self.names)[np.asarray(jnp.argmax(self.posterior(plan, y), axis=1))]

    def _origins(self, plan: Plan) -> Float[Array, "C K1"]:
        _, backward = plan.conditionals()
        return self._summed(backward)

    def _summed(self, values: Float[Array, "K ..."]) -> Float[Array, "C ..."]:
        return jax.ops.segment_sum(jnp.asarray(values), jnp.asarray(self.of_component), len(self.names))

    def _check(self, plan: Any) -> None:
        checks.instance("plan", plan, Plan)
        k = plan.pair.gmm0.n_components
        if k != self.gmm.n_components:
            problem = f"is from {k} components, and the classes have {self.gmm.n_components}"
            raise ArgumentError("plan", problem, "let gmm0 be the labelled mixture (plan.reverse() where it is gmm1)")

    def _known(self, name: Any) -> Any:
        if name not in self.names:
            raise ArgumentError("forbidden", f"there is no class {name!r}", f"the classes are {list(self.names)}")
        return name


def fit_classes(
    x: Any,
    labels: Any,
    *,
    n_components: int = 1,
    point_weights: Any = None,
    ridge: float = 1e-6,
    tied: float | None = None,
    key: PRNGKeyArray | None = None,
) -> Classes:
    r"""The mixture of a labelled cloud: for each class its weight, and its moments or a mixture fitted to its points.

    A class of few points has a poor covariance, and one of fewer than features a singular one. Covariances are therefore drawn
    towards the mean of all, :math:`(1 - t) S_k + t \sum_j w_j S_j`, by :math:`t = d / (n_k + d)` for n_k points and d features.

    Args:
      x: a labelled cloud (n, d), in memory.
      labels: (n,), whole numbers or words; classes are in their order.
      n_components: components of each class, at most as many as it has points.
      point_weights: (n,), at least 0, not all 0 in any class; None weighs points equally.
      ridge: at least 0, added to covariances, relative to each feature's variance in the whole cloud.
      tied: t itself, from 0 (each class its own covariance) to 1 (one for all); None is by numbers of points.
      key: where classes have several components, it decides where their fits start.

    Returns:
      `Classes`, with the mixture `gmm`.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range.

    >>> x = [[0.0], [1.0], [8.0], [9.0], [10.0]]
    >>> classes = cg.fit_classes(x, ["a", "a", "b", "b", "b"])
    >>> pair = cg.GaussianMixturePair(classes.gmm, classes.gmm, rho=1.0)
    >>> fit = cg.fit_pair(x, [[1.0], [2.0], [3.0], [9.0], [10.0]], pair, transport_weight=0.01, freeze=["gmm0"])
    >>> print(classes.predict(fit.plan, [[2.0], [9.0]]).tolist(), classes.proportions(fit.plan).round(1))
    ['a', 'b'] [0.6 0.4]
    """
    if foreign.is_open(x):
        raise ArgumentError("x", f"expected points in memory, got {x!r}", "read the labelled points first")
    x = checks.points("x", x)
    n = len(x)
    weights = np.ones(n) if point_weights is None else checks.relative_weights("point_weights", point_weights, n)
    if not checks.known(x, weights, labels):
        raise ArgumentError("x", "arguments are traced", "labelled clouds are read outside of jit and vmap")
    ridge, tied = _number("ridge", ridge, np.inf), None if tied is None else _number("tied", tied, 1)
    n_components = checks.integer("n_components", n_components, 1)
    if (key is None) != (n_components == 1):
        raise ArgumentError("key", "goes with an n_components above 1", "pass both, or neither")
    names, of_point = _numbered(labels, n)
    x, weights = np.asarray(x), np.asarray(weights, np.float64)
    members = [np.flatnonzero((of_point == c) & (weights > 0)) for c in range(len(names))]
    for name, rows in zip(names, members, strict=True):
        if not len(rows):
            raise ArgumentError("point_weights", f"class {name!r} has no point of positive weight", "leave it out")
    if key is None:
        parts = [_moments(x[rows], weights[rows]) for rows in members]
    else:
        parts = _mixtures(checks.key("key", key), x, weights, members, n_components, ridge)
    masses = np.array([weights[rows].sum() for rows in members])
    sizes = [len(part[2]) for part in parts]
    of_component = np.repeat(np.arange(len(names), dtype=np.int32), sizes)
    means, covariances, shares = (np.concatenate([part[i] for part in parts]) for i in range(3))
    shares = shares * (masses / masses.sum())[of_component]
    counts = np.concatenate([part[2] * len(rows) for part, rows in zip(parts, members, strict=True)])
    variances = _moments(x, weights)[1][0].diagonal()
    covariances = _regular(covariances, shares, counts, tied) + ridge * np.diag(np.where(variances > 0, variances, 1))
    return Classes(GaussianMixture.from_moments(means, covariances, shares), jax.device_put(of_component), names)


def _number(name: str, value: Any, at_most: float) -> float:
    return float(checks.scalar(name, float(value), at_least=0, at_most=at_most))


def _numbered(labels: Any, n: int) -> tuple[tuple[Any, ...], Int[np.ndarray, " n"]]:
    """The names of classes, in order, and the class of each point."""
    given = np.asarray(labels)
    if given.dtype == object:
        kinds = collections.Counter(type(label).__name__ for label in given.ravel())
        if set(kinds) != {"str"}:
            raise ArgumentTypeError("labels", f"expected words or whole numbers, got {', '.join(sorted(kinds))}")
        given = given.astype(str)
    if given.dtype.kind not in "iuU":
        raise ArgumentTypeError(
            "labels", f"expected words or whole numbers, got {given.dtype}", "leave out what has none"
        )
    if given.shape != (n,):
        raise ArgumentError("labels", f"expected one for each of the {n} points, got shape {given.shape}")
    names, of_point = np.unique(given, return_inverse=True)
    return tuple(names.tolist()), of_point


def _moments(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one component: means (1, d), covariances (1, d, d), shares (1,), in float64."""
    share = w / w.sum()
    near = x[np.argmax(w)].astype(np.float64)
    mean = share @ (x - near)
    centred = (x - near) - mean
    return (near + mean)[None], ((centred.T * share) @ centred)[None], np.ones(1)


def _mixtures(
    key: Array, x: np.ndarray, weights: np.ndarray, members: list[np.ndarray], n_components: int, ridge: float
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The same of mixtures that are fitted to the points of each class."""
    clouds, theirs = [x[rows] for rows in members], [weights[rows] for rows in members]
    sizes = [min(n_components, len(np.unique(cloud, axis=0))) for cloud in clouds]
    starts = init_gmms(key, clouds, sizes, point_weights=theirs, ridge=max(ridge, 1e-6))
    fits = fit_gmms(clouds, starts, point_weights=theirs, ridge=max(ridge, 1e-6))
    read = lambda leaf: np.asarray(leaf, np.float64)  # noqa: E731
    return [(read(gmm.means), read(gmm.covariances), read(gmm.weights)) for gmm in fits.gmms]


def _regular(covariances: np.ndarray, shares: np.ndarray, counts: np.ndarray, tied: float | None) -> np.ndarray:
    """Covariances, each drawn towards the mean of all."""
    d = covariances.shape[-1]
    t = (d / (counts + d) if tied is None else np.full(len(counts), tied))[:, None, None]
    return (1 - t) * covariances + t * np.einsum("k,kij->ij", shares, covariances)
