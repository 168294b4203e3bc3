"""The E-step of a cloud that is not in memory: a pass, in which every chunk is reduced to its part of the sums where it lies.

A chunk enters the program as it was read, row by row; the program brings some points at a time into the fit's coordinates, so that
no copy of the chunk is made. In memory or not, what is summed is the same (`statistics.additive_sums`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from coupled_gmm.core import chunks, meshes
from coupled_gmm.core.chunks import Chunks
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import AnyArray, pytree, static, take, unchecked
from coupled_gmm.fits import statistics
from coupled_gmm.fits.frame import Frame, View
from coupled_gmm.fits.statistics import Base, Sums

_LONG, _NUMBERS = 2**12, 2**15  # points of longer chunks, where they are few numbers: no buffer is filled up for them


@pytree
class Rows:
    """Points of one cloud as they were read, a source for an E-step; those past `count` fill up."""

    points: Float[AnyArray, "m d"]
    weights: Float[AnyArray, " m"] | None
    share: Float[AnyArray, ""]  # of each point in the mass of the cloud, or of each unit of weight
    count: Int[AnyArray, ""]
    frame: Frame | None  # None: they are in its coordinates already
    size: int = static()  # points in a chunk, at most m
    first = 0

    @property
    def ends(self) -> Int[Array, "1"]:
        return jnp.reshape(-(-self.count // self.size), 1).astype(jnp.int32)

    def at(self, index: Int[Array, ""]) -> tuple[Float[Array, "d B"], Float[Array, " B"]]:
        """Points and weights of a chunk. The last one may begin before its turn: what was seen already weighs nothing."""
        start = jnp.minimum(index * self.size, len(self.points) - self.size)
        number = start + jnp.arange(self.size)
        points = jax.lax.dynamic_slice_in_dim(self.points, start, self.size)
        points = points if self.frame is None else self.frame.points(points)
        share = self.share
        if self.weights is not None:
            share = share * jax.lax.dynamic_slice_in_dim(self.weights, start, self.size)
        weights = jnp.where((number >= index * self.size) & (number < self.count), share, 0)
        return points.T.astype(share.dtype), weights


class _Asked(NamedTuple):
    """What an E-step asks of every chunk: under which parameters of one node, and how points become those of the fit."""

    base: Base
    floor: Any  # (d,)
    reference: Any
    frame: Frame
    mass: float
    size: int
    most: int  # points of a chunk as it is read
    x64: bool


def e_step(
    view: View, here: Chunks, base: Base, floors: Array, reference: Array, numbers: int, chunk_size: int | None
) -> Sums:
    """The sums of all nodes, as `statistics.additive_sums` gives them, of which some have clouds that are not in memory.

    Args:
      here: the clouds that are in memory.
      base: of V nodes, stacked.
      numbers: that a program holds of each point.
      chunk_size: points that it holds so at once; None suits the machine.
    """
    if chunk_size is None and jax.default_backend() == "cpu" and _LONG * numbers <= _NUMBERS:
        chunk_size = _LONG
    base, floors, reference, frame = meshes.whole((base, floors, reference, view.frame))
    found = jax.tree.map(lambda leaf: np.array(leaf, np.float64), _sums_here(base, here, floors, reference))
    x64 = bool(jax.config.read("jax_enable_x64"))
    for node, cloud in view.external.items():
        size = chunks.length([cloud.most], numbers, chunk_size)
        own = take((base, floors, reference), node)
        asked = _Asked(*own, frame, float(cloud.moments.mass), size, cloud.most, x64)
        for total, part in zip(found, cloud.cloud.reduce(sums_of_chunk, asked, threads=True), strict=True):
            total[node] = part
    return jax.device_put(jax.tree.map(lambda leaf: leaf.astype(floors.dtype), found))


def sums_of_chunk(points: np.ndarray, weights: np.ndarray | None, first: int, asked: _Asked) -> Sums:
    """What a chunk adds to the sums, wherever it lies."""
    del first
    base, floor, reference, frame, mass, size, most, x64 = asked
    dtype, n = floor.dtype, len(points)
    if points.dtype.itemsize > dtype.itemsize:
        points, frame = frame.points_on_host(points).astype(dtype), None
    room = n if n == most and n >= size else chunks.rounded(max(n, size))
    if room > n:
        points = meshes.padded(points, room)
    share = np.asarray(1 / mass, dtype)
    if weights is not None:  # of their mass, before they lose digits
        weights, share = meshes.padded((weights / mass).astype(dtype), room, 0), np.ones((), dtype)
    with jax.enable_x64(x64):  # which threads and processes don't take over from each other
        rows = unchecked(
            Rows, points=points, weights=weights, share=share, count=np.asarray(n, np.int32), frame=frame, size=size
        )
        return jax.tree.map(np.asarray, _sums(rows, base, floor, reference))


@program()
def _sums_here(base: Base, here: Chunks, floors: Float[Array, "V d"], reference: Float[Array, " V"]) -> Sums:
    return statistics.additive_sums(base, here, floors, reference)


@program()
def _sums(rows: Rows, base: Base, floor: Float[Array, " d"], reference: Float[Array, ""]) -> Sums:
    node = jax.tree.map(lambda leaf: leaf[None], (base, floor, reference))
    return take(statistics.additive_sums(node[0], rows, *node[1:]), 0)
