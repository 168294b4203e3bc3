r"""The frame in which a fit sees its data: about their centre, in a unit of their own size.

Far from 0, or in units of 1e18, a float keeps little of a cloud's shape. A fit therefore works on
:math:`z = (x - origin) / unit`; the unit is a power of two, so that going there and back rounds nothing. Clouds that are given
in more digits than the fit keeps (float64 for a float32 fit) go there in their own precision, on the host.

The mean of a mixture far from 0 does not fit one float either. What is left over is a second one, the mixture's
`remainders`; so is the origin's.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from coupled_gmm.core import checks, chunks, foreign, matrices, meshes
from coupled_gmm.core.chunks import Chunks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.expansions import two_sum
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import AnyArray, pytree, static, unchecked
from coupled_gmm.fits import shards
from coupled_gmm.fits.external import External
from coupled_gmm.fits.online import Earlier, MixtureStatistics, Moments, Update
from coupled_gmm.fits.statistics import Parameters
from coupled_gmm.gaussians.mixture import GaussianMixture

_FAR = 32.0  # standard deviations from 0, beyond which means are kept in two floats
_THIN = 2.0  # a start thinner than the floor by more than this gets the floor added
_BLOCK = 2**16  # points that the host reads at a time


@pytree
class Frame:
    """Origin (in two floats) and unit of a fit's coordinates, in data units."""

    origin: Float[AnyArray, " d"]
    remainder: Float[AnyArray, " d"]
    unit: Float[AnyArray, ""]

    def points(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return ((x - self.origin) - self.remainder) / self.unit

    def points_on_host(self, x: np.ndarray) -> np.ndarray:
        """The same by NumPy, in float64."""
        origin = np.asarray(self.origin, np.float64) + np.asarray(self.remainder, np.float64)
        return (x - origin) / np.asarray(self.unit, np.float64)

    def parameters(self, gmm: GaussianMixture, floors: Float[Array, "*V d"]) -> Parameters:
        """Stacked mixtures as a fit carries them; covariances that are thinner than the floor get it added."""
        absent = jnp.expand_dims(gmm.weights == 0, (-2, -1))
        identity = jnp.eye(gmm.n_features, dtype=gmm.dtype)
        covariances = jnp.where(absent, identity, gmm.covariances / self.unit / self.unit)
        raised = covariances + floors[..., None, :, None] * identity
        factors, thicker = matrices.cholesky(jnp.stack([covariances, raised]))
        whitening = matrices.invert_triangular(factors)
        regular = jnp.all(jnp.diagonal(whitening, axis1=-2, axis2=-1) > 0, axis=-1)
        seen = (whitening * floors[..., None, None, :]) @ matrices.transpose(whitening)
        # At least the largest eigenvalue's fourth power, and at most d times that.
        size = jnp.sum((seen @ seen) ** 2, axis=(-2, -1))
        thin = ~regular | (size > _THIN**4 * gmm.n_features)
        factors = jnp.where(thin[..., None, None] & ~absent, thicker, factors)
        remainders = 0 if gmm.remainders is None else gmm.remainders
        means = (gmm.means - self.origin) + (remainders - self.remainder)
        return Parameters(means / self.unit, factors, gmm.log_weights)

    def mixture(self, parameters: Parameters, far: bool) -> GaussianMixture:
        """Parameters as mixtures in data units, with remainders where the frame is far from 0."""
        means, remainders = self._moved_back(parameters.means)
        return unchecked(
            GaussianMixture,
            means=means,
            covariances=matrices.gram(self.unit * parameters.factors),
            weights=jnp.exp(parameters.log_weights),
            remainders=remainders if far else None,
        )

    def _moved_back(self, means: Array) -> tuple[Array, Array]:
        """Means in data units, in two floats."""
        means, lost = two_sum(self.origin, self.unit * means)
        return means, lost + self.remainder

    def statistics(self, base: Parameters, seen: Moments, entropy: Array, mass: Array) -> MixtureStatistics:
        """What points say of the components of V nodes, in data units, as seen from the base."""
        shift = jnp.einsum("vkij,vkj->vki", base.factors, seen.shift)
        means, remainders = self._moved_back(base.means + shift)
        factors = self.unit * base.factors
        scatters = factors @ seen.scatter @ matrices.transpose(factors)
        present = jnp.maximum(jnp.sum(seen.masses > 0, axis=-1), 1).astype(entropy.dtype)
        return unchecked(
            MixtureStatistics,
            mass=jnp.broadcast_to(mass, entropy.shape),
            masses=seen.masses,
            means=means,
            remainders=remainders,
            scatters=0.5 * (scatters + matrices.transpose(scatters)),
            entropy=jnp.clip(entropy, 0, jnp.log(present)),
        )

    def earlier(self, update: Update | None, dtype: Any) -> Earlier | None:
        """What data of before said of one mixture's components; None where a fit does not go on from any."""
        if update is None or update.statistics is None:
            return None
        found, total = update.statistics, update.kept + update.mass
        means = ((found.means - self.origin) + (found.remainders - self.remainder)) / self.unit
        scatters = found.scatters / self.unit / self.unit
        one = Earlier(update.kept / total, update.mass / total, found.masses, means, scatters, found.entropy)
        return jax.tree.map(lambda leaf: leaf[None].astype(dtype), one)


def apart(parameters: Parameters, moving: Bool[Array, " V"]) -> Parameters:
    """Equal components of a mixture moved apart by a standard deviation: EM never tells them apart.

    The points' pull on both is the same, so that the likelihood is at a saddle, where no gradient says so.
    """
    means, factors, log_weights = parameters
    k, d = means.shape[-2:]
    equal = jnp.all(means[:, :, None] == means[:, None], axis=-1)
    equal &= jnp.all(factors[:, :, None] == factors[:, None], axis=(-2, -1))
    present = jnp.isfinite(log_weights)
    earlier = equal & present[:, None] & np.tri(k, k, -1, dtype=bool)
    twin = jnp.any(earlier, axis=-1) & present & moving[:, None]
    direction = np.random.RandomState(0).choice([-1.0, 1.0], (k, d)).astype(means.dtype)
    step = jnp.einsum("vkij,kj->vki", factors, direction)
    return parameters._replace(means=jnp.where(twin[..., None], means + step, means))


class Scales(NamedTuple):
    """Of clouds together: their centre, a unit of their size, and the variances of their features, each cloud's and pooled."""

    origin: Any
    unit: Any
    variances: list[Any]
    pooled: Any


def scales(clouds: Sequence[Any], weights: Sequence[Any], xp: Any) -> Scales:
    """Scales of clouds with weights (None is equal), by NumPy in float64 or by jax.numpy as they are.

    Each cloud is read about one of its own points: a feature that is constant in it has a variance of exactly 0.
    """
    return _scales([_moments(x, w, xp) for x, w in zip(clouds, weights, strict=True)], xp)


def _moments(x: Any, w: Any, xp: Any) -> tuple[Any, Any]:
    """Means and variances of a cloud's features."""
    reference = x[0 if w is None else xp.argmax(w)].astype(_exact(x, xp))
    centred = sum(share @ (rows - reference) for rows, share in _blocks(x, w, xp))
    return reference + centred, sum(share @ ((rows - reference) - centred) ** 2 for rows, share in _blocks(x, w, xp))


def _scales(moments: Sequence[tuple[Any, Any]], xp: Any) -> Scales:
    means, variances = [mean for mean, _ in moments], [variance for _, variance in moments]
    origin = sum(means) / len(means)
    pooled = sum(v + (m - origin) ** 2 for v, m in zip(variances, means, strict=True)) / len(means)
    largest = xp.max(pooled)
    unit = xp.where(largest > 0, xp.exp2(xp.round(0.5 * xp.log2(xp.where(largest > 0, largest, 1)))), 1)
    return Scales(origin, unit, variances, pooled)


def _blocks(x: Any, w: Any, xp: Any) -> Iterator[tuple[Any, Any]]:
    """Rows with their parts of the mass; on the host some at a time: a float64 copy of a whole cloud might not fit."""
    n, dtype = len(x), _exact(x, xp)
    step = _BLOCK if xp is np else n
    total = n if w is None else xp.sum(w.astype(dtype))
    for first in range(0, n, step):
        rows = x[first : first + step].astype(dtype)
        yield rows, (xp.ones(len(rows), dtype) if w is None else w[first : first + step].astype(dtype)) / total


def _exact(x: Any, xp: Any) -> Any:
    return np.float64 if xp is np else x.dtype


@pytree
class Sight:
    """Clouds as a fit's program takes them: in chunks, in the coordinates of a frame, with their variances there.

    `far`: whether fitted means need two floats. `update`: how the statistics of a cloud go into those of all data, where they are
    asked for.
    """

    chunks: Chunks
    frame: Frame
    variances: Float[AnyArray, "V d"]  # of each cloud
    pooled: Float[AnyArray, " d"]  # of all
    has_cloud: Bool[AnyArray, " V"]
    far: bool = static()
    update: Update | None = None

    @property
    def earlier(self) -> Earlier | None:
        return self.frame.earlier(self.update, self.pooled.dtype)

    def statistics(self, base: Parameters, seen: Moments | None, entropy: Array) -> MixtureStatistics | None:
        """Of all data, as `Frame.statistics`; None where they are not asked for."""
        if self.update is None or seen is None:
            return None
        return self.frame.statistics(base, seen, entropy, self.update.total)

    @property
    def n_features(self) -> int:
        return self.pooled.shape[-1]

    @property
    def feature_variance(self) -> Float[Array, ""]:
        """The mean variance of a feature within a cloud, squared data units."""
        return _feature_variance(self.variances, self.has_cloud, self.frame.unit)

    def floors(self, ridge: Array) -> Float[Array, "V d"]:
        """What ridge adds to the variances of each cloud, in the frame's coordinates.

        A part of the feature's variance in the cloud, with earlier data if there are any; where that is 0 of the one in all clouds,
        and where that is 0 too of 1 in data units. No ridge but 0 is less than what covariances of so many features in this
        precision can hold.
        """
        ridge = ridge.astype(self.pooled.dtype)
        least = 2 * len(self.pooled) * jnp.finfo(ridge.dtype).eps
        ridge = jnp.where(ridge > 0, jnp.maximum(ridge, least), 0)
        variances, pooled, earlier = self.variances, self.pooled, self.earlier
        if earlier is not None:
            variances = earlier.variances_of_all(variances)
            pooled = variances[0]
        otherwise = jnp.where(pooled > 0, pooled, 1 / self.frame.unit**2)
        floors = ridge * jnp.where(variances > 0, variances, otherwise)
        return jnp.where(self.has_cloud[:, None], floors, 0)


def _feature_variance(variances: Any, has_cloud: Any, unit: Any) -> Any:
    return has_cloud @ variances.mean(axis=1) / has_cloud.sum() * unit**2


class View(NamedTuple):
    """Checked clouds and weights, None where a node has none, and the frame in which a fit is to see them."""

    clouds: list[Any]
    weights: list[Any]
    frame: Frame
    variances: Float[AnyArray, "V d"]
    pooled: Float[AnyArray, " d"]
    far: bool
    update: Update | None = None

    @property
    def feature_variance(self) -> Any:
        """The mean variance of a feature within a cloud, squared data units."""
        return _feature_variance(self.variances, np.array([x is not None for x in self.clouds]), self.frame.unit)

    def together(self) -> "View":
        """All clouds as one, in which each counts as much as the others."""
        given = [(x, w) for x, w in zip(self.clouds, self.weights, strict=True) if x is not None]
        xp = np if checks.at_hand(*(x for x, _ in given), *(w for _, w in given)) else jnp
        if meshes.of(given) is not None:
            cloud, weights = shards.together(*zip(*given, strict=True))
        else:
            shares = [
                xp.full(len(x), 1 / len(x)) if w is None else xp.asarray(w) / xp.sum(xp.asarray(w)) for x, w in given
            ]
            cloud, weights = xp.concatenate([xp.asarray(x) for x, _ in given]), xp.concatenate(shares)
        return self._replace(clouds=[cloud], weights=[weights], variances=self.pooled[None])

    @property
    def external(self) -> dict[int, External]:
        """Nodes whose clouds are not in memory, and these."""
        return {node: cloud for node, cloud in enumerate(self.clouds) if isinstance(cloud, External)}

    def in_chunks(self, numbers: int, chunk_size: int | None = None) -> Sight:
        """What a program takes of those in memory, for so many numbers that it holds of each point."""
        clouds = [None if isinstance(x, External) else x for x in self.clouds]
        mesh = meshes.of(clouds)
        sizes = [len(x) if mesh is None else -(-len(x) // mesh.size) for x in clouds if x is not None]
        if sizes:
            size = chunks.length(sizes, numbers, chunk_size, shared=checks.known(clouds, self.weights))
            packed = chunks.pack(clouds, self.weights, size, self.pooled.dtype, self.frame)
        else:
            packed = chunks.none(len(clouds), self.pooled.shape[0], self.pooled.dtype)
        has_cloud: Any = np.array([cloud is not None for cloud in self.clouds])
        has_cloud = jax.device_put(has_cloud) if mesh is None else has_cloud
        return Sight(packed, self.frame, self.variances, self.pooled, has_cloud, self.far, self.update)


@program()
def floors(sight: Sight, ridge: Array) -> Float[Array, "V d"]:
    """As of `Sight`, outside of a fit's program."""
    return sight.floors(ridge)


def raises(ridge: Any) -> bool:
    """Whether a ridge may be counted on to give every component a density."""
    return not checks.known(ridge) or bool(np.all(np.asarray(ridge) > 0))


def seen(
    names: Sequence[str], clouds: Sequence[Any], weights: Sequence[Any], starts: Sequence[GaussianMixture], ridge: Any
) -> View:
    """Checked clouds in a frame of the precision of the mixtures a fit starts from, or of JAX if there are none.

    On the host they are read in float64, whatever they are given in.

    Raises:
      ValueError: a variance that this precision can't hold; a constant feature where there is no ridge.
    """
    dtype = jnp.result_type(*(gmm.dtype for gmm in starts)) if starts else _working_precision(clouds)
    clouds = [External.read(name, x) if foreign.is_open(x) else x for name, x in zip(names, clouds, strict=True)]
    clouds, weights = shards.on_one_mesh(names, clouds, weights)
    for name, x in zip(names, clouds, strict=True):
        if x is not None and checks.known(x):
            least, largest = _extremes(x)
            _check_range(name, least, largest, dtype)
            _name_constant_features(name, least == largest, len(x), ridge)
    far = any(gmm.remainders is not None for gmm in starts)
    given = [(x, w) for x, w in zip(clouds, weights, strict=True) if x is not None]
    some, theirs = [x for x, _ in given], [w for _, w in given]
    if (
        (some and checks.at_hand(*some, *theirs))
        or meshes.of(some) is not None
        or any(isinstance(x, External) for x in some)
    ):
        xp, finer = np, any(np.dtype(x.dtype).itemsize > np.dtype(dtype).itemsize for x in some)
        found = _scales([_moments_of(x, w) for x, w in given], np)
        far = far or (finer and bool((np.abs(found.origin) > _FAR * np.sqrt(found.pooled)).any()))
        origin = found.origin.astype(dtype)
        remainder = (found.origin - origin if finer else np.zeros_like(origin)).astype(dtype)
    elif not some:  # mixtures alone, of which the prices of transport are all there is
        xp, found = jnp, _scales_of_mixtures(starts)
        origin, remainder = found.origin, jnp.zeros_like(found.origin)
    else:
        xp, found = jnp, _scales_of_arrays(some, theirs, dtype)
        origin, remainder = found.origin, jnp.zeros_like(found.origin)
    frame, square, rows = Frame(origin, remainder, found.unit.astype(dtype)), found.unit**2, iter(found.variances)
    variances = xp.stack([xp.zeros_like(origin) if x is None else (next(rows) / square).astype(dtype) for x in clouds])
    return View(list(clouds), list(weights), frame, variances, (found.pooled / square).astype(dtype), far)


def _moments_of(x: Any, w: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of a cloud's features, in float64: by NumPy, by the devices on which it lies, or as they were found."""
    if isinstance(x, External):
        return x.scales
    if meshes.is_spread(x):
        return shards.moments(x, w)
    return _moments(np.asarray(x), None if w is None else np.asarray(w), np)


@program("dtype")
def _scales_of_arrays(clouds: list[Array], weights: list[Any], dtype: Any) -> Scales:
    return scales([x.astype(dtype) for x in clouds], [None if w is None else w.astype(dtype) for w in weights], jnp)


def _scales_of_mixtures(gmms: Sequence[GaussianMixture]) -> Scales:
    """Of the nodes of a graph, stacked."""
    return _scales([(gmm.mean(), jnp.diagonal(gmm.covariance())) for stacked in gmms for gmm in stacked], jnp)


def _working_precision(clouds: Sequence[Any]) -> Any:
    dtypes = [jax.dtypes.canonicalize_dtype(x.dtype) for x in clouds if x is not None]
    return jnp.result_type(jnp.float32, *dtypes)


def _extremes(x: Any) -> tuple[Any, Any]:
    """The least and the largest value of each feature."""
    if isinstance(x, External):
        return x.extremes
    if meshes.is_spread(x):
        return shards.extremes(x)
    x, xp = checks.where_it_lies(x)
    columns = np.ascontiguousarray(x.T) if xp is np else x.T  # NumPy reads columns of two numbers twenty times slower
    return np.asarray(xp.min(columns, axis=1)), np.asarray(xp.max(columns, axis=1))


def _check_range(name: str, least: np.ndarray, largest: np.ndarray, dtype: Any) -> None:
    """Refuse features whose variance is no number of this precision."""
    with np.errstate(over="ignore"):
        ranges, limits = (largest - least).astype(np.float64), np.finfo(dtype)
    held = (np.sqrt(float(limits.tiny)) < ranges) & (ranges < np.sqrt(float(limits.max)))
    wrong = np.flatnonzero((ranges > 0) & ~held)
    if wrong.size:
        size = ranges[wrong].max()
        raise ArgumentError(
            name,
            f"values of feature {wrong[0]} differ by up to {size:.3g}, and {np.dtype(dtype)} can't hold its square",
            f"divide it by {size:.0e}, or enable float64",
        )


def _name_constant_features(name: str, is_constant: np.ndarray, n: int, ridge: Any) -> None:
    """Say which features have one value only: their variance will be the floor alone."""
    constant = np.flatnonzero(is_constant).tolist()
    if not constant or n == 1:
        return
    if not raises(ridge):
        raise ArgumentError(name, f"features {constant} are constant, and ridge is 0", "drop them, or give a ridge")
    warnings.warn(
        f"{name}: features {constant} are constant; they do not tell components apart, and their variance is the ridge's "
        "floor: that part of their variance in the other clouds, or of 1",
        stacklevel=5,  # past `view_of`, to who calls the fit
    )
