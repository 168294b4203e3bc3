r"""From clouds to sufficient statistics, and the likelihood as a function of them.

Points enter a fit here and nowhere else. With r the probability of a component given a point, a cloud is reduced to each
component's mass, mean and centred second moment; the expected log-likelihood of any other parameters is a closed form of
these, so an M-step costs the same for ten points and ten million.

Points lie feature by feature in chunks (d, B), and a loop runs over those of each cloud. Each chunk costs two matrix
products: whitening by all components at once, :math:`y_k = W_k x - W_k m_k`, and the moments :math:`\sum r y_k x^T`. What is
kept of them is whitened on both sides, :math:`\sum r y_k y_k^T`: each component is seen from its present self, where it is
nearly a standard Gaussian. So a direction in which it is a thousand times thinner than in another is as precise as that
one, and no number depends on the features' units.

Sums of log-densities are taken about a reference, the last value: what an EM step gains is then known to far less than
a rounding unit of the value itself.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from coupled_gmm.core import checks, matrices, meshes
from coupled_gmm.core.chunks import Chunks
from coupled_gmm.core.tree import AnyArray, pytree, take
from coupled_gmm.gaussians.density import LOG_2PI

_FEW_FEATURES = 64


class Parameters(NamedTuple):
    """Mixtures as a fit carries them: lower triangular factors, and log-weights of which -inf is valid."""

    means: Float[Array, "*V K d"]
    factors: Float[Array, "*V K d d"]
    log_weights: Float[Array, "*V K"]


class Base(NamedTuple):
    """The parameters that points are seen from, with the inverses of their factors."""

    parameters: Parameters
    whitening: Float[Array, "*V K d d"]

    @classmethod
    def of(cls, parameters: Parameters) -> "Base":
        return cls(parameters, matrices.invert_triangular(parameters.factors))


@pytree
class Statistics:
    """What a cloud says of each component, as seen from the present parameters, the `base`.

    Masses sum to 1 in a cloud; shift and scatter are the points' mean and centred second moment in the whitened coordinates
    of the base. Log-likelihoods are those above the reference: `log_likelihood` of the density itself, `penalized` with
    the ridge's term.
    """

    base: Parameters
    whitening: Float[Array, "*V K d d"]  # the inverses of its factors
    masses: Float[Array, "*V K"]
    shift: Float[Array, "*V K d"]
    scatter: Float[Array, "*V K d d"]
    penalized: Float[Array, "*V"]
    log_likelihood: Float[Array, "*V"]

    @property
    def means(self) -> Float[Array, "*V K d"]:
        return self.base.means + jnp.einsum("...kij,...kj->...ki", self.base.factors, self.shift)

    @property
    def scatters(self) -> Float[Array, "*V K d d"]:
        """Centred second moments in the coordinates of the points."""
        return self.base.factors @ self.scatter @ matrices.transpose(self.base.factors)


class Sums(NamedTuple):
    """Additive over points: chunks, files, devices and hosts add theirs, as long as the parameters are the same."""

    penalized: Float[Array, "*V"]
    log_likelihood: Float[Array, "*V"]
    masses: Float[Array, "*V K"]
    whitened: Float[Array, "*V K d"]
    cross: Float[Array, "*V K d d"]


class Source(Protocol):
    """Points in chunks of one length, as an E-step reads them: `chunks.Chunks`, or `rows.Rows`."""

    @property
    def ends(self) -> Int[AnyArray, " V"]:
        """Where the chunks of each cloud end."""
        ...

    @property
    def first(self) -> Any:
        """Where those of the first begin."""
        ...

    def at(self, index: Int[Array, ""]) -> tuple[Float[Array, "d B"], Float[Array, " B"]]:
        """Points of a chunk, and their parts of the mass of their cloud."""
        ...


class _Component(NamedTuple):
    """What the E-step needs of each component."""

    whitening: Float[Array, "*V K d d"]
    offsets: Float[Array, "*V K d"]  # W m
    constants: Float[Array, "*V K"]  # what of the log-density does not depend on the point, with log-weight and ridge
    penalties: Float[Array, "*V K"]  # the ridge's part of that


def e_step(
    parameters: Parameters,
    chunks: Chunks,
    floors: Float[Array, "V d"],
    reference: Float[Array, " V"] | None = None,
) -> Statistics:
    """Statistics of every node's cloud under its mixture (V nodes stacked); zero for nodes that own no chunk.

    Arguments as of `additive_sums`, with the parameters of V nodes, stacked.
    """
    base = Base.of(parameters)
    return centred(additive_sums(base, chunks, floors, reference), base)


def likelihood(parameters: Parameters, chunks: Chunks, floors: Float[Array, "V d"]) -> Float[Array, " V"]:
    """Log-likelihoods with the ridge's term, differentiable once in the parameters.

    By Fisher's identity the derivative is that of the expected log-likelihood under the present probabilities: no points are
    looked at again for it.
    """
    parameters = _once(parameters)
    held = jax.lax.stop_gradient(parameters)
    found = e_step(held, chunks, floors)
    expected = jax.vmap(expected_log_likelihood)(parameters, found, floors)
    return found.penalized + (expected - jax.lax.stop_gradient(expected))


@jax.custom_jvp
def _once(x: Any) -> Any:
    """`x` itself, whose derivative can't be differentiated."""
    return x


@_once.defjvp
def _once_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    message = "the likelihood can be differentiated once only; take differences of its gradient"
    return checks.value_only(primals[0], message), checks.value_only(tangents[0], message)


def additive_sums(
    base: Base,
    source: Source,
    floors: Float[Array, "V d"],
    reference: Float[Array, " V"] | None = None,
) -> Sums:
    """What the points of a source add to the sums of their nodes; what others add under the same parameters may be added.

    Args:
      base: of V nodes, stacked.
      source: of points, with their parts of the whole cloud's mass as weights.
      floors: the variance that ridge adds to each feature: component log-densities are lowered by tr(floor S^-1) / 2.
      reference: log-likelihoods are summed above it; None is zero.
    """
    components = _components(base, floors)
    reference = jnp.zeros(len(floors), floors.dtype) if reference is None else reference
    one = take(components, 0)
    zero = one.penalties[0]
    flat, unravel = ravel_pytree(Sums(zero, zero, one.constants, one.offsets, one.whitening))
    mesh = source.mesh if isinstance(source, Chunks) else None
    if mesh is None:
        return jax.vmap(unravel)(_totals(source, (components, reference), jnp.zeros_like(flat)))

    def own_sums(points: tuple[Array, Array], shared: tuple) -> Array:  # all that devices tell each other in an E-step
        ends, nodes, zeros = shared
        return meshes.over_devices(_totals(Chunks(*points, ends), nodes, zeros))

    assert isinstance(source, Chunks)
    shared = source.ends, (components, reference), jnp.zeros_like(flat)
    totals = meshes.on_each(mesh, own_sums)((source.points, source.weights), shared)
    return jax.vmap(unravel)(totals)


def log_densities(base: Base, chunks: Chunks, owner: Int[Array, " C"]) -> Float[Array, "C B"]:
    """Of each point, under the mixture of the node that its chunk belongs to; 0 past the last chunk in use."""
    components = _components(base, jnp.zeros(base.parameters.means.shape[::2], base.whitening.dtype))

    def set_chunk(index: Array, found: Float[Array, "C B"]) -> Float[Array, "C B"]:
        log_joint, _ = _log_joint(chunks.at(index)[0], take(components, owner[index]))
        return found.at[index].set(jax.nn.logsumexp(log_joint, axis=0))

    return jax.lax.fori_loop(0, chunks.ends[-1], set_chunk, jnp.zeros_like(chunks.weights))


def _totals(source: Source, nodes: tuple[_Component, Array], zeros: Float[Array, " P"]) -> Float[Array, "V P"]:
    """Sums over the chunks of each of some nodes, components and reference, in a row."""

    def of_node(first: Array, node: tuple[Array, tuple[_Component, Array]]) -> tuple[Array, Array]:
        last, (component, reference) = node

        def add(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            total, lost = carry
            sums, _ = ravel_pytree(_chunk_sums(*source.at(index), component, reference))
            # Kahan's sum: thousands of chunks in float32 would lose what the M-step must gain.
            sums = sums - lost
            after = total + sums
            return after, (after - total) - sums

        return last, jax.lax.fori_loop(first, last, add, (zeros, zeros))[0]

    first = jnp.asarray(source.first, source.ends.dtype)
    return jax.lax.scan(of_node, first, (source.ends, nodes))[1]


def _components(base: Base, floors: Array) -> _Component:
    parameters, whitening = base
    d = parameters.means.shape[-1]
    offsets = jnp.einsum("vkij,vkj->vki", whitening, parameters.means)
    penalties = 0.5 * jnp.einsum("vkij,vj->vk", whitening**2, floors)
    constants = parameters.log_weights - matrices.log_diagonal_sum(parameters.factors) - penalties - 0.5 * d * LOG_2PI
    absent = jnp.isneginf(parameters.log_weights)
    return _Component(whitening, offsets, jnp.where(absent, -jnp.inf, constants), jnp.where(absent, 0, penalties))


def _chunk_sums(points: Array, weights: Array, components: _Component, reference: Array) -> Sums:
    log_joint, whitened = _log_joint(points, components)
    penalties, (k, d, length) = components.penalties, whitened.shape
    peak = jnp.max(log_joint, axis=0)
    joint = jnp.exp(log_joint[::-1] - peak)  # components in reverse: see `_log_totals`
    log_totals, total = _log_totals(penalties[::-1], log_joint[::-1] - peak, joint, d)
    log_likelihoods = jnp.sum(weights * (peak - reference + log_totals), axis=1)
    responsibility = joint * (weights / total)
    weighted = responsibility[:, None] * whitened[::-1]
    return Sums(
        log_likelihoods[0],
        log_likelihoods[1],
        jnp.sum(responsibility, axis=1)[::-1],
        jnp.sum(weighted, axis=2)[::-1],
        (weighted.reshape(k * d, length) @ points.T).reshape(k, d, d)[::-1],
    )


def _log_joint(points: Array, components: _Component) -> tuple[Float[Array, "K B"], Float[Array, "K d B"]]:
    """Log-densities of points and components, and the points as each component sees them."""
    whitening, offsets, constants, _ = components
    k, d = offsets.shape
    whitened = (whitening.reshape(k * d, d) @ points).reshape(k, d, points.shape[1]) - offsets[:, :, None]
    return constants[:, None] - 0.5 * jnp.sum(whitened**2, axis=1), whitened


def _log_totals(
    penalties: Array, log_joint: Array, joint: Array, n_features: int
) -> tuple[Float[Array, "2 B"], Float[Array, " B"]]:
    """Logarithms of the sums of joint densities, as they are and with the ridge's term taken back; and the sums as they are.

    In reverse, back and forth: where a result may lie in its argument's place, XLA's older kernels go number by number.
    """
    highest = jnp.max(penalties)
    if n_features <= _FEW_FEATURES:
        lifted = jnp.exp(penalties - highest)
        totals = jnp.stack([lifted, jnp.ones_like(lifted)]) @ joint
        return jnp.log(totals[::-1]) + jnp.stack([jnp.zeros_like(highest), highest])[:, None], totals[1]
    # A penalty is half the number of features at a floor: beyond, its exponential leaves a float's range.
    total = jnp.sum(joint, axis=0)
    return jnp.stack([jnp.log(total), jax.nn.logsumexp(log_joint + penalties[:, None], axis=0)]), total


def centred(sums: Sums, base: Base) -> Statistics:
    """Moments about the new means from a whole cloud's sums under `base`; none where a component has no mass to speak of."""
    parameters, whitening = base
    empty = _negligible(sums.masses)
    mass = jnp.where(empty, 1, sums.masses)
    shift = jnp.where(empty[..., None], 0, sums.whitened / mass[..., None])
    cross = sums.cross - sums.whitened[..., None] * parameters.means[..., None, :]
    second = cross @ matrices.transpose(whitening) / mass[..., None, None]
    second = 0.5 * (second + matrices.transpose(second)) - shift[..., :, None] * shift[..., None, :]
    second = jnp.where(empty[..., None, None], jnp.eye(shift.shape[-1], dtype=shift.dtype), second)
    return Statistics(parameters, whitening, sums.masses, shift, second, sums.penalized, sums.log_likelihood)


def _negligible(masses: Array) -> Array:
    """Masses that are rounding of the whole: their mean and shape say nothing."""
    return masses <= jnp.finfo(masses.dtype).eps


def expected_log_likelihood(
    parameters: Parameters, statistics: Statistics, floor: Float[Array, " d"]
) -> Float[Array, ""]:
    r"""The M-step's Q of one node: the mean log-likelihood of points and components under the E-step's probabilities.

    .. math:: \sum_k n_k (\log w_k - \frac12 \log |2 \pi S_k| - \frac12 tr(S_k^{-1} (A_k + \Delta + \delta_k \delta_k^T))),
       \quad \delta_k = \bar x_k - m_k

    with masses n, centred second moments A and Delta the floor.
    """
    base = statistics.base
    whitening = matrices.invert_triangular(parameters.factors)
    change = whitening @ base.factors  # from whitened by the base to whitened by the parameters
    shift = jnp.einsum("kij,kj->ki", change, statistics.shift)
    shift = shift + jnp.einsum("kij,kj->ki", whitening, base.means - parameters.means)
    trace = jnp.sum((change @ statistics.scatter) * change, axis=(-2, -1)) + jnp.sum(whitening**2 @ floor, axis=-1)
    log_norm = matrices.log_diagonal_sum(parameters.factors) + 0.5 * shift.shape[-1] * LOG_2PI
    present = statistics.masses > 0
    terms = jnp.where(present, parameters.log_weights, 0) - log_norm - 0.5 * (trace + jnp.sum(shift**2, axis=-1))
    return jnp.sum(jnp.where(present, statistics.masses * terms, 0))


def maximiser(statistics: Statistics, floors: Float[Array, "V d"]) -> tuple[Parameters, Float[Array, " V"]]:
    """The M-step without transport, and what Q gains by it.

    Mean, second moment plus floor, mass. A component without mass to speak of keeps its mean and shape. The gain is a sum of
    terms none of which is negative: it is right however small it is, and the log-likelihood rises by no less.
    """
    base, shift, empty = statistics.base, statistics.shift, _negligible(statistics.masses)
    whitening = statistics.whitening
    floor = (whitening * floors[..., None, None, :]) @ matrices.transpose(whitening)
    rounding = 16 * jnp.finfo(shift.dtype).eps * shift**2  # what the shift leaves of the scatter's last digits
    identity = jnp.eye(shift.shape[-1], dtype=shift.dtype)
    second = statistics.scatter + floor + rounding[..., None] * identity
    stretch = matrices.cholesky(jnp.where(empty[..., None, None], identity, second))
    masses = jnp.where(statistics.masses > 0, statistics.masses, 0)
    share = masses / jnp.sum(masses, axis=-1, keepdims=True)
    log_weights = jnp.where(masses > 0, jnp.log(jnp.where(masses > 0, share, 1)), -jnp.inf)
    excess = jnp.diagonal(stretch, axis1=-2, axis2=-1) ** 2 - 1
    gain = jnp.sum(excess - jnp.log1p(excess), axis=-1) + jnp.sum(jnp.tril(stretch, -1) ** 2, axis=(-2, -1))
    gain = 0.5 * statistics.masses * jnp.where(empty, 0, gain + jnp.sum(shift**2, axis=-1))
    moved = jnp.where(masses > 0, log_weights - base.log_weights, 0)
    gain = gain + share * moved - share + jnp.exp(base.log_weights)
    return Parameters(statistics.means, base.factors @ stretch, log_weights), jnp.sum(gain, axis=-1)
