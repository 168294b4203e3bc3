r"""What a plan does to points and to mixtures: transport maps, displacement interpolation, density.

A plan between components is a plan between mixtures: mass :math:`P_{kl}` moves from component k to l along the Gaussian map

.. math:: T_{kl}(x) = m_1^l + L_1 U^T L_0^{-1} (x - m_0^k)

with the Cholesky factors of both and U from `bures.coupling`. Singular covariances are valid: T is then the mean of what x
goes with. See Delon & Desolneux (2020), sections 4.4 and 6.
"""

import dataclasses
from os import PathLike
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from coupled_gmm.core import checks, chunks, foreign, matrices, passes
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import unchecked
from coupled_gmm.gaussians import bures, mixture
from coupled_gmm.gaussians.density import LOG_2PI
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.plan import Plan


class _Moves(NamedTuple):
    """The pairs of components between which a plan moves mass: all of them, or those of an exact plan's vertex."""

    source: Int[Array, " n"]
    target: Int[Array, " n"]
    aligned: Float[Array, "n d d"]  # L1 U^T: what a whitened point becomes
    coupling: Float[Array, "n d d"]  # U


@overload
def map_points(
    plan: Plan, x: Any, *, method: str = "barycentric", key: PRNGKeyArray | None = None, out: None = None
) -> Float[Array, "n d"]: ...


@overload
def map_points(
    plan: Plan, x: Any, *, method: str = "barycentric", key: PRNGKeyArray | None = None, out: str | PathLike[str]
) -> Any: ...


def map_points(
    plan: Plan, x: Any, *, method: str = "barycentric", key: PRNGKeyArray | None = None, out: Any = None
) -> Any:
    r"""Images of points of gmm0 in gmm1.

    "barycentric" is the mean of where a point goes, :math:`T_{mean}(x) = \sum_{kl} p_k(x) \pi_{kl} T_{kl}(x)`, with the
    posterior p of the component given the point, and the rows of the plan over their own sums, :math:`\pi`. "random" is one
    draw of it: :math:`T_{kl}(x)` with probability :math:`p_k(x) \pi_{kl}`. Only its images of gmm0's points are distributed
    as gmm1 (reweighted, where the plan is unbalanced).

    Args:
      plan: a solved plan.
      x: (n, d), data units. Worked through in chunks: memory does not grow with n beyond the points, their images and, if
        random, two numbers each. Of a cloud that is not in memory (`open_cloud`) all of these stay on disk, in `out`.
      method: "barycentric" or "random".
      key: a random key, for "random". It decides a point's draw by its row: points in a file go where they go from memory.
      out: the file for the images of a cloud that is not in memory: a .npy or .parquet, written whole or not at all, as by the
        cloud's `write`, which says what becomes of weights.

    Returns:
      The images (n, d), or the open cloud of those in `out`.

    Singular components of gmm0 have no density. Where there are some, all covariances are widened to tell which component a
    point belongs to, and only for that: by 3e-4 (float32) or 1e-8 (float64) of each feature's mean variance within components (of
    the whole mixture, where there is none).

    Raises:
      TypeError, ValueError: points of another number of features, or not finite; an unknown method; no key; a cloud that is not in
        memory and no `out`, or the reverse.
      OSError: `out` can't be written.
    """
    checks.instance("plan", plan, Plan)
    checks.choice("method", method, ("barycentric", "random"))
    if method == "random" and key is None:
        raise ArgumentError("key", "method 'random' draws at random", "pass a key such as jax.random.key(0)")
    key = None if method == "barycentric" else checks.key("key", key)
    x = passes.points("x", x, plan.pair.n_features, plan, key)
    near, centre = _about_one_point(plan)
    if not foreign.is_open(x):
        if out is not None:
            raise ArgumentError("out", "is for clouds that are not in memory", "save what is returned without it")
        return _images(near, centre, x, None, key)
    if not isinstance(out, (str, PathLike)):
        problem = f"the images of {x!r} need a file, got {checks.brief(out)}"
        raise ArgumentError("out", problem, 'name one, such as "images.npy"')
    return x.write(out, lambda points, first: _images(near, centre, points, first, key))


def _images(plan: Plan, centre: Array | None, x: Any, first: int | None, key: Array | None) -> Float[Array, "n d"]:
    """Of checked points from row `first` on, None: of a whole cloud; of a plan about one point, at random if there is a key."""
    x = _moved(plan, centre, passes.rows("x", first, len(x)), x, whole=first is None)
    shift: Any = np.zeros(x.shape[1], x.dtype) if centre is None else centre
    numbers = plan.pair.gmm0.n_components * x.shape[1]
    if key is None:
        return chunks.over_points(_map_barycentric, x, numbers, plan, shift)
    draws = chunks.draws(key, len(x), 2, x.dtype, first or 0)
    xp = np if checks.at_hand(x, draws) else jnp
    return chunks.over_points(_map_random, xp.concatenate([x, xp.asarray(draws)], axis=1), numbers, plan, shift)


def _about_one_point(plan: Plan) -> tuple[Plan, Array | None]:
    """A plan moved to where one float holds its means, and by how much; None is not at all."""
    (gmm0, gmm1), centre = mixture.about_one_point(plan.pair.gmm0, plan.pair.gmm1)
    return dataclasses.replace(plan, pair=plan.pair.replace(gmm0, gmm1)), centre


def _moved(plan: Plan, centre: Array | None, name: str, x: Any, whole: bool = True) -> Array:
    """Checked points moved with a plan, in its precision."""
    x = np.asarray(x) if checks.at_hand(x) else x
    if centre is not None:
        x = x - (np.asarray(centre, x.dtype) if checks.known(x, centre) else centre)
    return checks.representable(name, x, plan.pair.gmm0.dtype, whole)


@program()
def _map_barycentric(points: Float[Array, "C d B"], count: Array, plan: Plan, centre: Array) -> Array:
    moves, whitening = _moves(plan), _Whitening.of(plan.pair.gmm0)
    forward, _ = plan.conditionals()
    share = forward[moves.source, moves.target]
    aligned = jax.ops.segment_sum(share[:, None, None] * moves.aligned, moves.source, plan.pair.gmm0.n_components)
    aligned = aligned @ whitening.correction
    across = jnp.swapaxes(aligned, 0, 1).reshape(aligned.shape[1], -1)
    means = forward @ plan.pair.gmm1.means

    def images(x: Float[Array, "d B"]) -> Float[Array, "B d"]:
        whitened, posterior = whitening.of_points(x)
        moved = across @ (posterior[:, None] * whitened).reshape(-1, x.shape[1])
        return (means.T @ posterior + moved).T + centre

    return chunks.each(images, points, count)


@program()
def _map_random(points: Float[Array, "C e B"], count: Array, plan: Plan, centre: Array) -> Array:
    """Of points with two more numbers each, drawn from [0, 1)."""
    moves, whitening = _moves(plan), _Whitening.of(plan.pair.gmm0)
    forward, _ = plan.conditionals()
    index = (
        jnp.zeros(forward.shape, jnp.int32)
        .at[moves.source, moves.target]
        .set(jnp.arange(len(moves.source), dtype=jnp.int32))
    )
    aligned = moves.aligned @ whitening.correction[moves.source]
    means = plan.pair.gmm1.means

    def images(x_and_draws: Float[Array, "e B"]) -> Float[Array, "B d"]:
        x, draws = x_and_draws[:-2], x_and_draws[-2:]
        whitened, posterior = whitening.of_points(x)
        source = _drawn(posterior, draws[0])
        target = _drawn(forward[source].T, draws[1])
        seen = jnp.take_along_axis(whitened, source[None, None], axis=0)[0].T
        return means[target] + jnp.einsum("bij,bj->bi", aligned[index[source, target]], seen) + centre

    return chunks.each(images, points, count)


def _drawn(probabilities: Float[Array, "K B"], draws: Float[Array, " B"]) -> Int[Array, " B"]:
    """The outcomes that numbers in [0, 1) stand for; never one of probability zero."""
    sums = jnp.cumsum(probabilities, axis=0)
    return jnp.sum(sums <= draws * (1 - 4 * jnp.finfo(draws.dtype).eps) * sums[-1], axis=0)


class _Whitening(NamedTuple):
    """How points are seen by the components of a mixture."""

    matrix: Float[Array, "K d d"]
    shift: Float[Array, "K d"]
    centre: Float[Array, " d"]
    log_scale: Float[Array, " K"]
    correction: Float[Array, "K d d"]  # to L^-1 of the component as it is, where it was widened

    @classmethod
    def of(cls, gmm: GaussianMixture) -> "_Whitening":
        d, factor, present = gmm.n_features, gmm.cholesky, gmm.weights > 0
        singular = jnp.any(jnp.diagonal(factor, axis1=-2, axis2=-1) == 0, axis=-1)
        floor = jnp.sqrt(jnp.finfo(gmm.dtype).eps) * _feature_variances(gmm)
        wide = jnp.any(singular & present) | ~present
        identity = jnp.eye(d, dtype=gmm.dtype)
        widened = matrices.cholesky(gmm.covariances + wide[:, None, None] * floor * identity)
        matrix = matrices.invert_triangular(widened)
        correction = jnp.where(singular[:, None, None], matrices.invert_triangular(factor) @ widened, identity)
        centre = gmm.mean()
        shift = jnp.einsum("kij,kj->ki", matrix, gmm.means - centre)
        log_norm = matrices.log_diagonal_sum(widened) + 0.5 * d * LOG_2PI
        return cls(matrix, shift, centre, gmm.log_weights - log_norm, correction)

    def of_points(self, x: Float[Array, "d B"]) -> tuple[Float[Array, "K d B"], Float[Array, "K B"]]:
        """The whitened points, and the probability of each component given the point."""
        k, d = self.shift.shape
        whitened = (self.matrix.reshape(k * d, d) @ (x - self.centre[:, None])).reshape(k, d, -1) - self.shift[
            :, :, None
        ]
        return whitened, jax.nn.softmax(self.log_scale[:, None] - 0.5 * jnp.sum(whitened**2, axis=1), axis=0)


def _feature_variances(gmm: GaussianMixture) -> Float[Array, " d"]:
    """Within components; where a feature has none, of the whole mixture. By feature: units may differ by orders of magnitude."""
    within = gmm.weights @ jnp.diagonal(gmm.covariances, axis1=-2, axis2=-1)
    between = gmm.weights @ (gmm.means - gmm.mean()) ** 2
    variance = jnp.where(within > 0, within, between)
    return jnp.where(variance > 0, variance, 1)


def _moves(plan: Plan) -> _Moves:
    gmm0, gmm1 = plan.pair.gmm0, plan.pair.gmm1
    k0, k1 = gmm0.n_components, gmm1.n_components
    # A vertex moves mass in no more cells than its tree has.
    exact = plan.vertex if plan.is_exact else None
    cells = jnp.arange(k0 * k1) if exact is None else jax.lax.top_k(exact.ravel(), k0 + k1 - 1)[1]
    source, target = cells // k1, cells % k1
    factors1 = gmm1.cholesky[target]
    coupling = bures.coupling(gmm0.cholesky[source], factors1)
    return _Moves(source, target, factors1 @ matrices.transpose(coupling), coupling)


def interpolate(plan: Plan, t: Any) -> GaussianMixture:
    r"""The mixture at t on the way from gmm0 to gmm1: mass :math:`P_{kl}` on the Bures geodesic from component k to l.

    Of an exact plan it is the MW2 geodesic: :math:`MW_2(p_s, p_t) = |t - s| MW_2(p_0, p_1)`. Where masses of components change
    on the way (an unbalanced plan) they do so linearly, from those of gmm0 to those of gmm1.

    Args:
      plan: a solved plan.
      t: in [0, 1].

    Returns:
      A mixture of K0 + K1 - 1 components for an exact plan, K0 K1 for an entropic one; many may have weight zero.

    Raises:
      TypeError, ValueError: not a plan; t out of range.
    """
    checks.instance("plan", plan, Plan)
    t = checks.scalar("t", t, at_least=0, at_most=1).astype(plan.pair.gmm0.dtype)
    near, centre = _about_one_point(plan)
    return mixture.moved_back(_interpolate(near, t), centre)


@program()
def _interpolate(plan: Plan, t: Array) -> GaussianMixture:
    moves, (gmm0, gmm1) = _moves(plan), (plan.pair.gmm0, plan.pair.gmm1)
    source, target, aligned, coupling = moves
    forward, backward = plan.conditionals()
    weights = (1 - t) * gmm0.weights[:, None] * forward + t * gmm1.weights * backward
    factors1 = gmm1.cholesky[target]
    # What the coupling leaves open has a covariance of its own.
    gap = jnp.eye(gmm0.n_features, dtype=gmm0.dtype) - matrices.transpose(coupling) @ coupling
    rest = t**2 * factors1 @ gap @ matrices.transpose(factors1)
    covariances = matrices.gram((1 - t) * gmm0.cholesky[source] + t * aligned) + 0.5 * (rest + matrices.transpose(rest))
    return unchecked(
        GaussianMixture,
        means=(1 - t) * gmm0.means[source] + t * gmm1.means[target],
        covariances=covariances,
        weights=weights[source, target],
    )


def plan_density(plan: Plan, x: Any, y: Any, *, atol: Any) -> Float[Array, "n m"]:
    r"""Density of the plan between the mixtures, at x, of what goes to y or nearer to it than `atol`:

    .. math:: \sum_{kl} P_{kl} N(x; m_0^k, S_0^k) 1[|T_{kl}(x) - y| < atol]

    The plan lives on graphs of maps, hence the tolerance. As POT's ``gmm_ot_plan_density``.

    Args:
      plan: a solved plan.
      x, y: (n, d) and (m, d), data units.
      atol: above 0, data units.

    Raises:
      TypeError, ValueError: points of another number of features; atol out of range; gmm0 has a singular component of
        positive weight, and so no density.
    """
    checks.instance("plan", plan, Plan)
    near, centre = _about_one_point(plan)
    x, y = (
        _moved(near, centre, name, checks.points(name, given, plan.pair.n_features))
        for name, given in (("x", x), ("y", y))
    )
    plan.pair.gmm0.check_densities("plan.pair.gmm0")
    atol = checks.scalar("atol", atol, above=0)
    numbers = x.shape[1] * max(len(y), near.pair.gmm0.n_components)
    densities = chunks.over_points(_plan_density, x, numbers, chunks.filled(y), near, atol)
    return chunks.first(densities, len(x), len(y))


@program()
def _plan_density(points: Float[Array, "C d B"], count: Array, y: Array, plan: Plan, atol: Array) -> Array:
    moves, (gmm0, gmm1) = _moves(plan), (plan.pair.gmm0, plan.pair.gmm1)
    whitening, mass = matrices.invert_triangular(gmm0.cholesky), plan.matrix

    def of_chunk(chunk: Float[Array, "d B"]) -> Array:
        x = chunk.T
        density = jnp.where(gmm0.weights > 0, jnp.exp(gmm0.component_log_prob(x)), 0).T

        def add(total: Array, move: tuple) -> tuple[Array, None]:
            source, target, aligned = move
            image = gmm1.means[target] + (x - gmm0.means[source]) @ (aligned @ whitening[source]).T
            near = jnp.sum((image[:, None] - y) ** 2, axis=-1) < atol**2
            return total + mass[source, target] * density[source][:, None] * near, None

        return jax.lax.scan(add, jnp.zeros((len(x), len(y)), x.dtype), moves[:3])[0]

    return chunks.each(of_chunk, points, count)
