"""Points in chunks: how clouds of any size share few programs.

A program of XLA knows the shapes of its arrays, and a new number of points is a new program: seconds to compile, a thousand
memory maps of the 65,530 that a process may have. Points therefore lie feature by feature in chunks of a few lengths, in a
buffer whose number of chunks grows by factors; how many are used is a number that the program reads. Nothing is computed
for the rest.

Under a transformation, where arrays are part of somebody's own program, chunks fit exactly. A cloud that lies on several devices
is cut into chunks on each of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, Shaped

from coupled_gmm.core import checks, meshes
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import AnyArray, pytree, static

T = TypeVar("T")
_CPU_FLOATS, _GPU_FLOATS = 2**21, 2**26  # numbers a chunk may hold: what stays in cache, or fills a GPU
_CPU_LENGTHS = (256, 1024)
_GPU_LENGTHS = (2**13, 2**17, 2**20, 2**23)
_CPU_PRICE, _GPU_PRICE = 200, 2**16  # of one more chunk, in points
_FEW, _MANY = 8, 64  # chunks of the smallest buffers; of the others, doubled from there
_LEAST = 16  # points that are drawn at least
_ALIGNED = 64  # bytes: such memory JAX takes over without a copy
_BLOCK = 2**16  # points that are copied at a time
_DRAWN = 2**16  # points whose random numbers have one key
_ROWS = 128  # of the shortest history


@pytree
class Chunks:
    """Clouds cut into equal chunks, feature by feature, one cloud after the other, and where the chunks of each end.

    Points that fill up the last chunk of a cloud have weight zero; chunks past the last end are not in use.
    """

    points: Float[AnyArray, "C d B"]
    weights: Float[AnyArray, "C B"]
    ends: Int[AnyArray, " V"]
    first: Int[AnyArray, ""] | int = 0  # where those of the first cloud begin: a batch has all its clouds in one buffer
    mesh: Mesh | None = static(default=None)  # of the devices that each have chunks of every cloud, with the same ends

    @property
    def count(self) -> Int[AnyArray, ""]:
        """How many are in use."""
        return self.ends[-1]

    def at(self, index: Int[Array, ""]) -> tuple[Float[Array, "d B"], Float[Array, " B"]]:
        """Points and weights of one."""
        return self.points[index], self.weights[index]


def length(
    sizes: Sequence[int], numbers: int, chunk_size: int | None = None, shared: bool = True, at_once: int = 1
) -> int:
    """Points in a chunk, for clouds of these sizes and so many numbers a point.

    Shared with other clouds, from a short list: as few points and chunks as may be. Otherwise as few chunks as fit the cache,
    evenly filled. It is the chunks that a program works on at once that fill an accelerator.
    """
    on_cpu, largest = jax.default_backend() == "cpu", max(sizes)
    floats, price = (_CPU_FLOATS, _CPU_PRICE) if on_cpu else (_GPU_FLOATS // at_once, _GPU_PRICE // at_once)
    lengths = _CPU_LENGTHS if on_cpu else _GPU_LENGTHS if at_once == 1 else _CPU_LENGTHS + _GPU_LENGTHS
    if chunk_size is not None and shared:
        return min(chunk_size, rounded(largest))
    if not shared:
        most = min(max(lengths[0], floats // numbers), lengths[-1]) if chunk_size is None else chunk_size
        return -(-largest // -(-largest // most))
    fitting = [each for each in lengths if each * numbers <= floats] or lengths[:1]
    return min(fitting, key=lambda each: sum(-(-n // each) for n in sizes) * (each + price))


def none(n_clouds: int, d: int, dtype: Any) -> Chunks:
    """Of so many clouds, no chunk in use."""
    empty = np.zeros((1, d, _LEAST), dtype), np.zeros((1, _LEAST), dtype), np.zeros(n_clouds, np.int32)
    return Chunks(*jax.device_put(empty))


def capacity(count: int, least: int = _MANY) -> int:
    """Chunks that a buffer for so many has: a power of two, and on the host, where what is not used costs nothing, at least 64."""
    size = 2 ** (count - 1).bit_length()
    if jax.default_backend() != "cpu":
        return size
    return max(size, least if count <= least else min(_MANY, 8 * least))


def rows(steps: int) -> int:
    """Rows of a history for so many steps: from a short list, so that other numbers of steps share the program."""
    size = _ROWS
    while size < steps:
        size *= 4
    return size


def rounded(n: int) -> int:
    """The next number of the form 4, 5, 6 or 7 times a power of two: what draws are made in, where n is not of it."""
    power = max(_LEAST, 2 ** (n.bit_length() - 3))
    return -(-n // power) * power


def filled(x: Any) -> Any:
    """Points (n, d) with the last one repeated up to a rounded number of them; under a transformation as they are."""
    return np.pad(np.asarray(x), ((0, rounded(len(x)) - len(x)), (0, 0)), mode="edge") if checks.at_hand(x) else x


def draws(key: Array, n: int, each: int, dtype: Any, first_row: int = 0) -> Any:
    """Numbers in [0, 1) for n points, so many for each: by the key and the point's row alone, whichever others are asked for."""
    blocks = np.arange(first_row // _DRAWN, -(-(first_row + n) // _DRAWN), dtype=np.uint32)
    on_host, skipped = checks.at_hand(key), first_row % _DRAWN
    size = _DRAWN if len(blocks) > 1 or skipped else rounded(n) if on_host else n
    if not on_host:
        return _uniform(key, blocks, (size, each), dtype).reshape(-1, each)[skipped : skipped + n]
    drawn = [_uniform(key, blocks[i : i + 1], (size, each), dtype) for i in range(len(blocks))]
    if not checks.at_hand(drawn):  # a known key in somebody else's program
        return jnp.concatenate(drawn, axis=1)[0, skipped : skipped + n]
    return np.concatenate([np.asarray(part)[0] for part in drawn])[skipped : skipped + n]


@program("shape", "dtype")
def _uniform(key: Array, blocks: Integer[Array, " m"], shape: tuple[int, int], dtype: Any) -> Float[Array, "m n e"]:
    return jax.vmap(lambda block: jax.random.uniform(jax.random.fold_in(key, block), shape, dtype))(blocks)


def pack(clouds: Sequence[Any], weights: Sequence[Any], size: int, dtype: Any, frame: Any = None) -> Chunks:
    """Clouds (n_i, d), or None, in chunks of `size` points.

    Args:
      weights: (n_i,), or None for equal ones; normalised here, by cloud.
      size: of a chunk.
      dtype: of the chunks.
      frame: None, or what brings the points into other coordinates first: a tree with methods `points` and `points_on_host`.
    """
    mesh = meshes.of(clouds, weights)
    if mesh is not None:
        return _packed_on_mesh(mesh, clouds, weights, size, dtype, frame)
    counts = [0 if cloud is None else -(-len(cloud) // size) for cloud in clouds]
    if checks.at_hand(*clouds, *weights):
        return _packed_on_host(clouds, weights, counts, size, dtype, frame)
    count = sum(counts)  # on an accelerator, a small program for each size
    return _packed(clouds, weights, frame, size, capacity(count) if checks.known(clouds, weights) else count, dtype)


def _packed_on_host(clouds: Any, weights: Any, counts: list[int], size: int, dtype: Any, frame: Any) -> Chunks:
    d = next(cloud.shape[1] for cloud in clouds if cloud is not None)
    total = capacity(sum(counts), _MANY if size <= _CPU_LENGTHS[-1] else 1)
    points, shares = zeros((total, d, size), dtype), zeros((total, size), dtype)
    ends = np.cumsum(counts, dtype=np.int32)
    for cloud, weight, count, last in zip(clouds, weights, counts, ends, strict=True):
        if cloud is not None:
            place = None if frame is None else frame.points_on_host
            lay(points[last - count : last], shares[last - count : last], np.asarray(cloud), weight, place)
    return Chunks(*jax.device_put((points, shares, ends)))


def lay(points: np.ndarray, shares: np.ndarray, cloud: np.ndarray, weights: Any, place: Any) -> None:
    """A cloud and its weights, None for equal ones, into chunks of points and of parts of its mass, on the host."""
    weights = None if weights is None else np.asarray(weights, np.float64)
    fill(points, cloud, place)
    shares.reshape(-1)[: len(cloud)] = 1 / len(cloud) if weights is None else weights / weights.sum()


def _packed_on_mesh(mesh: Mesh, clouds: Any, weights: Any, size: int, dtype: Any, frame: Any) -> Chunks:
    """Clouds of which some lie over a mesh: each device's rows in chunks of its own. Others are cut, brought into place before."""
    own, frames = [], []
    for cloud, weight in zip(clouds, weights, strict=True):
        in_memory = cloud is not None and not meshes.is_spread(cloud)
        if in_memory:
            host = np.asarray(cloud)
            cloud = (host if frame is None else frame.points_on_host(host)).astype(dtype)
        own.append((None, None) if cloud is None else meshes.cut(mesh, cloud, weight))
        frames.append(None if in_memory else frame)
    counts = [0 if cloud is None else -(-(len(cloud) // mesh.size) // size) for cloud, _ in own]
    points, shares = _packed_on_each(own, frames, mesh, size, capacity(sum(counts)), dtype)
    return Chunks(points, shares, cast(Any, np.cumsum(counts, dtype=np.int32)), mesh=mesh)


@program("mesh", "size", "total", "dtype")
def _packed_on_each(own: Any, frames: Any, mesh: Mesh, size: int, total: int, dtype: Any) -> tuple[Array, Array]:
    def packed(own: Any, frames: Any) -> tuple[Array, Array]:
        clouds, shares = [], []
        for (cloud, weight), frame in zip(own, frames, strict=True):
            if cloud is not None:
                cloud = cloud if frame is None else frame.points(cloud)
                n = mesh.size * len(cloud)
                weight = jnp.full(len(cloud), 1 / n, dtype) if weight is None else weight / meshes.total(weight)
            clouds.append(cloud)
            shares.append(weight)
        joined = _joined(clouds, shares, size, total, dtype)
        return joined.points, joined.weights

    return meshes.on_each(mesh, packed, by_rows=True)(own, frames)


@program("size", "total", "dtype")
def _packed(clouds: Any, weights: Any, frame: Any, size: int, total: int, dtype: Any) -> Chunks:
    placed, shares = [], []
    for cloud, weight in zip(clouds, weights, strict=True):
        if cloud is not None:
            weight = jnp.full(len(cloud), 1 / len(cloud), dtype) if weight is None else weight / jnp.sum(weight)
            cloud = cloud if frame is None else frame.points(cloud)
        placed.append(cloud)
        shares.append(weight)
    return _joined(placed, shares, size, total, dtype)


def _joined(clouds: Sequence[Any], parts: Sequence[Any], size: int, total: int, dtype: Any) -> Chunks:
    """Clouds in a program, and each point's part of the mass, one after the other in a buffer of so many chunks."""
    points, shares, ends = [], [], []
    for cloud, part in zip(clouds, parts, strict=True):
        if cloud is not None:
            points.append(_laid_out(cloud, size).astype(dtype))
            shares.append(jnp.pad(part.astype(dtype), (0, -len(cloud) % size)).reshape(-1, size))
        ends.append(sum(map(len, points)))
    unused = total - ends[-1]
    return Chunks(
        jnp.pad(jnp.concatenate(points), ((0, unused), (0, 0), (0, 0))),
        jnp.pad(jnp.concatenate(shares), ((0, unused), (0, 0))),
        jnp.asarray(ends, jnp.int32),
    )


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that cost nothing until they are touched, in memory that JAX takes over as it is."""
    dtype = np.dtype(dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(n_bytes + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def fill(chunks: np.ndarray, x: np.ndarray, place: Any = None) -> None:
    """Points (n, d) into chunks (C, d, B) on the host, block by block; what is left of the last one repeats the last point."""
    count, _, size = chunks.shape
    step = max(1, _BLOCK // size)
    for first in range(0, count, step):
        rows = x[first * size : (first + step) * size]
        rows = rows if place is None else place(rows)
        whole = len(rows) // size
        last = first + whole
        chunks[first:last] = rows[: whole * size].reshape(whole, size, rows.shape[1]).transpose(0, 2, 1)
        if last < count and whole < step:
            rest = rows[whole * size :]
            chunks[last, :, : len(rest)] = rest.T
            chunks[last, :, len(rest) :] = rest[-1][:, None]


def _laid_out(x: Float[Array, "n d"], size: int) -> Float[Array, "C d B"]:
    padded = jnp.pad(x, ((0, -len(x) % size), (0, 0)), mode="edge")
    return jnp.swapaxes(padded.reshape(-1, size, x.shape[1]), 1, 2)


def each(
    function: Callable[[Any], Any], points: Float[Array, "C d B"], count: Int[Array, ""]
) -> Shaped[Array, "C B ..."]:
    """A function of a chunk (d, B), whose values have a leading axis of points, over all chunks in use; 0 for others."""
    shape = jax.eval_shape(function, points[0])

    def value(_: None, index: Array) -> tuple[None, Array]:
        nothing = jnp.zeros(shape.shape, shape.dtype)
        return None, jax.lax.cond(index < count, lambda: function(points[index]), lambda: nothing)

    return jax.lax.scan(value, None, jnp.arange(len(points)))[1]


def over_points(program: Callable[..., Array], x: Any, numbers: int, *arguments: Any) -> Array:
    """A program (points (C, d, B), count, ...) -> (C, B, ...) at points (n, d), of so many numbers each: its values (n, ...)."""
    mesh = meshes.of(x)
    if mesh is not None:
        rows, _ = meshes.cut(mesh, x, None)
        size = length([len(rows) // mesh.size], numbers)
        values = _over_own_points(rows, meshes.whole(arguments), program, size, mesh)
        return values if len(values) == len(x) else values[: len(x)]
    n, size = len(x), length([len(x)], numbers, shared=checks.known(x))
    count = -(-n // size)
    if checks.at_hand(x):
        points = zeros((capacity(count, _FEW), x.shape[1], size), x.dtype)
        fill(points[:count], np.asarray(x))
    elif checks.known(x):
        points = _buffer(x, size, capacity(count, _FEW))
    else:
        points = _laid_out(x, size)
    values = program(jax.device_put(points), np.asarray(count, np.int32), *arguments)
    values: Any = np.asarray(values) if checks.at_hand(values) else values
    return first(values.reshape(-1, *values.shape[2:]), n)


@program("function", "size", "mesh")
def _over_own_points(x: Array, arguments: Any, function: Callable[..., Array], size: int, mesh: Mesh) -> Array:
    """Values at points that lie on several devices, each where its point is."""

    def values(x: Array, arguments: Any) -> Array:
        points = _laid_out(x, size)
        found = function(points, len(points), *arguments)
        return found.reshape(-1, *found.shape[2:])[: len(x)]

    return meshes.on_each(mesh, values, by_rows=True)(x, arguments)


def mean(values: Any) -> Any:
    """The mean of values (n,): in float64 where they are known, whatever their own precision."""
    mesh = meshes.of(values)
    if mesh is not None:
        return np.float64(meshes.whole(_total(values, mesh))) / len(values)
    return np.asarray(values, np.float64).mean() if checks.known(values) else jnp.mean(values)


@program("mesh")
def _total(values: Array, mesh: Mesh) -> Array:
    return meshes.on_each(mesh, lambda own, _: meshes.total(own))(values, None)


@program("size", "total")
def _buffer(x: Array, size: int, total: int) -> Array:
    points = _laid_out(x, size)
    return jnp.pad(points, ((0, total - len(points)), (0, 0), (0, 0)))


def first(tree: T, *sizes: int) -> T:
    """The first so many of each array, along its first axes: on the host without a program of their own."""
    corner = tuple(map(slice, sizes))
    if checks.at_hand(*jax.tree.leaves(tree)):
        return jax.device_put(jax.tree.map(lambda array: np.asarray(array)[corner], tree))
    return jax.tree.map(lambda array: array[corner], tree)
