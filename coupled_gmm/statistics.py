r"""From clouds to sufficient statistics, and the likelihood as a function of them.

Points enter a fit here and nowhere else. With r the probability of a component given a point, a cloud is reduced to each
component's mass, mean and centred second moment; the expected log-likelihood of any other parameters is a closed form of
these, so an M-step costs the same for ten points and ten million.

Points lie feature by feature in chunks (d, B), and one scan runs over the chunks of all clouds. Each chunk costs two matrix
products: whitening by all components at once, :math:`y_k = W_k x - W_k m_k`, and the moments :math:`\sum r y_k x^T`. The
reference point of the moments is each component's present mean. Whitened on one side, raw on the other, their rounding
error grows with the distance between clusters, not with its square as that of raw second moments does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from coupled_gmm import matrices
from coupled_gmm.mixture import LOG_2PI
from coupled_gmm.tree import pytree

_CPU_FLOATS, _GPU_FLOATS = 2**20, 2**26  # whitened coordinates of one chunk: what stays in cache, or fills a GPU


class Parameters(NamedTuple):
    """Mixtures as a fit carries them: lower triangular factors, and log-weights of which -inf is legal."""

    means: Float[Array, "*V K d"]
    factors: Float[Array, "*V K d d"]
    log_weights: Float[Array, "*V K"]


@pytree
class Chunks:
    """Clouds cut into equal chunks, feature by feature, each with the index of its cloud; padding has weight zero."""

    points: Float[Array, "C d B"]
    weights: Float[Array, "C B"]
    owners: Int[Array, " C"]


@pytree
class Statistics:
    """Per component: mass (all sum to 1 in a cloud), mean and centred second moment; and the cloud's log-likelihood."""

    masses: Float[Array, "*V K"]
    means: Float[Array, "*V K d"]
    scatters: Float[Array, "*V K d d"]
    log_likelihood: Float[Array, "*V"]


class _Sums(NamedTuple):
    """Additive over points: chunks, files, devices and hosts add theirs, as long as the parameters are the same."""

    log_likelihood: Float[Array, "*V"]
    masses: Float[Array, "*V K"]
    whitened: Float[Array, "*V K d"]
    cross: Float[Array, "*V K d d"]


def chunk_length(n_points: int, n_components: int, n_features: int, chunk_size: int | None) -> int:
    """Points in a chunk: as few chunks as fit the cache, evenly filled."""
    if chunk_size is None:
        on_cpu = jax.default_backend() == "cpu"
        floats = _CPU_FLOATS if on_cpu else _GPU_FLOATS
        chunk_size = max(512, floats // (n_components * n_features))
        chunk_size = min(chunk_size, 4096) if on_cpu else chunk_size
    n_chunks = -(-n_points // chunk_size)
    return -(-n_points // n_chunks)


def pack(clouds: list[Array | None], point_weights: list[Array | None], length: int) -> Chunks:
    """Clouds (n_i, d) with weights (n_i,) or None as chunks of `length` points; weights are normalised by cloud."""
    points, weights, owners = [], [], []
    for owner, (cloud, weight) in enumerate(zip(clouds, point_weights, strict=True)):
        if cloud is None:
            continue
        n, d = cloud.shape
        n_chunks = -(-n // length)
        padding = n_chunks * length - n
        weight = jnp.full(n, 1 / n, cloud.dtype) if weight is None else weight / jnp.sum(weight)
        weights.append(jnp.pad(weight.astype(cloud.dtype), (0, padding)).reshape(n_chunks, length))
        blocks = jnp.pad(cloud, ((0, padding), (0, 0))).reshape(n_chunks, length, d)
        points.append(matrices.transpose(blocks))
        owners += [owner] * n_chunks
    return Chunks(jnp.concatenate(points), jnp.concatenate(weights), jnp.asarray(owners))


def variances(chunks: Chunks, n_clouds: int) -> Float[Array, "V d"]:
    """Variance of each feature of each cloud."""

    def total(values: Array) -> Array:
        return jnp.zeros((n_clouds, values.shape[-1]), values.dtype).at[chunks.owners].add(values)

    means = total(jnp.einsum("cdb,cb->cd", chunks.points, chunks.weights))
    centred = chunks.points - means[chunks.owners][:, :, None]
    return total(jnp.einsum("cdb,cb->cd", centred**2, chunks.weights))


def e_step(parameters: Parameters, chunks: Chunks, floors: Float[Array, "V d"]) -> Statistics:
    """Statistics of every node's cloud under its mixture (V nodes stacked); zero for nodes that own no chunk.

    `floors` is the variance that ridge adds to each feature: component log-densities are lowered by tr(floor S^-1) / 2.
    """
    whitening = matrices.invert_triangular(parameters.factors)
    offsets = jnp.einsum("vkij,vkj->vki", whitening, parameters.means)
    constants = _log_constants(parameters, whitening, floors)
    n_nodes = len(constants)
    flat, unravel = ravel_pytree(_Sums(constants[0, 0], constants[0], offsets[0], whitening[0]))

    def accumulate(carry, chunk):
        (totals, lost), (points, weights, owner) = carry, chunk
        sums, _ = ravel_pytree(_chunk_sums(points, weights, whitening[owner], offsets[owner], constants[owner]))
        # Kahan's sum: thousands of chunks in float32 would lose what the M-step must gain.
        before, sums = totals[owner], sums - lost[owner]
        after = before + sums
        return (totals.at[owner].set(after), lost.at[owner].set((after - before) - sums)), None

    zeros = jnp.zeros((n_nodes, flat.size), flat.dtype)
    columns = (chunks.points, chunks.weights, chunks.owners)
    (totals, _), _ = jax.lax.scan(jax.checkpoint(accumulate), (zeros, zeros), columns)
    return _centred(jax.vmap(unravel)(totals), parameters)


def _log_constants(parameters: Parameters, whitening: Array, floors: Array) -> Float[Array, "V K"]:
    """What of a component's log-density does not depend on the point, its log-weight included."""
    d = parameters.means.shape[-1]
    penalty = 0.5 * jnp.einsum("vkij,vj->vk", whitening**2, floors)
    constants = parameters.log_weights - matrices.log_diagonal_sum(parameters.factors) - penalty - 0.5 * d * LOG_2PI
    return jnp.where(jnp.isneginf(parameters.log_weights), -jnp.inf, constants)


def _chunk_sums(points: Array, weights: Array, whitening: Array, offsets: Array, constants: Array) -> _Sums:
    k, d, length = *offsets.shape, points.shape[1]
    whitened = (whitening.reshape(k * d, d) @ points).reshape(k, d, length) - offsets[:, :, None]
    log_joint = constants[:, None] - 0.5 * jnp.sum(whitened**2, axis=1)
    peak = jax.lax.stop_gradient(jnp.max(log_joint, axis=0))
    joint = jnp.exp(log_joint - peak)
    total = jnp.sum(joint, axis=0)
    responsibility = joint * (weights / total)
    weighted = responsibility[:, None] * whitened
    return _Sums(
        jnp.sum(weights * (peak + jnp.log(total))),
        jnp.sum(responsibility, axis=1),
        jnp.sum(weighted, axis=2),
        (weighted.reshape(k * d, length) @ points.T).reshape(k, d, d),
    )


def _centred(sums: _Sums, parameters: Parameters) -> Statistics:
    """Moments about the new means from sums about the present ones; a component without mass keeps its parameters."""
    empty = sums.masses <= 0
    mass = jnp.where(empty, 1, sums.masses)
    shift = jnp.einsum("vkij,vkj->vki", parameters.factors, sums.whitened) / mass[..., None]
    cross = sums.cross - sums.whitened[..., None] * parameters.means[..., None, :]
    second = parameters.factors @ cross / mass[..., None, None]
    second = 0.5 * (second + matrices.transpose(second)) - shift[..., :, None] * shift[..., None, :]
    return Statistics(sums.masses, parameters.means + shift, second, sums.log_likelihood)


def expected_log_likelihood(
    parameters: Parameters, statistics: Statistics, floor: Float[Array, " d"]
) -> Float[Array, ""]:
    r"""The M-step's Q of one node: the mean log-likelihood of points and components under the E-step's probabilities.

    .. math:: \sum_k n_k (\log w_k - \frac12 \log |2 \pi S_k| - \frac12 tr(S_k^{-1} (A_k + \Delta + \delta_k \delta_k^T))),
       \quad \delta_k = \bar x_k - m_k

    with masses n, centred second moments A and Delta the floor.
    """
    whitening = matrices.invert_triangular(parameters.factors)
    shift = jnp.einsum("kij,kj->ki", whitening, statistics.means - parameters.means)
    scatter = statistics.scatters + jnp.diag(floor)
    trace = jnp.sum((whitening @ scatter) * whitening, axis=(-2, -1)) + jnp.sum(shift**2, axis=-1)
    log_norm = matrices.log_diagonal_sum(parameters.factors) + 0.5 * shift.shape[-1] * LOG_2PI
    present = statistics.masses > 0
    terms = jnp.where(present, parameters.log_weights, 0) - log_norm - 0.5 * trace
    return jnp.sum(jnp.where(present, statistics.masses * terms, 0))


def maximiser(parameters: Parameters, statistics: Statistics, floors: Float[Array, "V d"]) -> Parameters:
    """The M-step without transport: mean, second moment plus floor, mass; kept where a component has no mass."""
    empty = statistics.masses <= 0
    shift = statistics.means - parameters.means
    rounding = 16 * jnp.finfo(shift.dtype).eps * jnp.sum(shift**2, axis=-1, keepdims=True)
    floor = floors[:, None] + rounding
    scatter = statistics.scatters + floor[..., None] * jnp.eye(floors.shape[-1], dtype=floors.dtype)
    factors = jnp.where(empty[..., None, None], parameters.factors, matrices.cholesky(scatter))
    masses = jnp.where(empty, 1, statistics.masses)
    total = jnp.sum(statistics.masses, axis=-1, keepdims=True)
    log_weights = jnp.where(empty, -jnp.inf, jnp.log(masses / jnp.where(total > 0, total, 1)))
    return Parameters(jnp.where(empty[..., None], parameters.means, statistics.means), factors, log_weights)
