"""Clouds put on the devices of a mesh, from one process or from each its own part."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from coupled_gmm.core import checks, meshes
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError


class _Part(NamedTuple):
    """What processes tell each other of their parts, in integers; all zero where a part was refused."""

    n_points: int
    n_features: int
    bits: int
    weighted: int
    n_devices: int

    def agreed(self, alone: bool) -> list["_Part"]:
        """Those of all processes that have devices of the mesh."""
        if alone:
            return [self]
        return [_Part(*row) for row in np.asarray(multihost_utils.process_allgather(np.array(self, np.int32))).tolist()]


def shard_cloud(
    points: Any, mesh: Mesh, *, point_weights: Any = None
) -> tuple[Float[Array, "N d"], Float[Array, " N"]]:
    """A cloud cut evenly over all devices of a mesh, as two arrays that go wherever a cloud and its weights go.

    A fit of them computes on each device what its points say, and adds up sums: 2 (2 + K + K d + K d^2) numbers, and no point,
    travel in an E-step. Where the number of points leaves some devices short, their last point is repeated with weight zero. Starts
    are drawn from at most 50,000 points, which each process gets.

    Among several processes (`jax.distributed.initialize`) each calls this with its own part, and gets the arrays of the whole;
    parts may differ in length.

    Args:
      points: (n, d), or in each process its part of the cloud.
      mesh: whose devices hold the cloud, along all its axes; `jax.make_mesh((jax.device_count(),), ("points",))`, say.
      point_weights: (n,), at least 0, not all 0; None weighs points equally.

    Returns:
      Points (N, d) and weights (N,), sharded; N is the next multiple of the number of devices, or more with parts of unequal
        length.

    Raises:
      TypeError, ValueError: an argument of the wrong kind, shape or range; a part that another process was given and could not use.

    >>> mesh = jax.make_mesh((jax.device_count(),), ("points",))
    >>> x, weights = cg.shard_cloud([[0.0], [1.0], [7.0], [8.0]], mesh)
    >>> print(cg.fit_gmm(x, 1, key=jax.random.key(0), point_weights=weights).gmm.means)
    [[4.]]
    """
    if not isinstance(mesh, Mesh):
        raise ArgumentTypeError(
            "mesh",
            f"expected a jax.sharding.Mesh, got {type(mesh).__name__}",
            "make one: jax.make_mesh((jax.device_count(),), ('points',))",
        )
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    alone = len(devices) == mesh.size
    if not alone and len({device.process_index for device in mesh.devices.flat}) < jax.process_count():
        raise ArgumentError("mesh", "has devices of some processes, and not of all", "make it of jax.devices()")
    try:
        x, w = _checked(points, point_weights)
    except (TypeError, ValueError):
        _Part(0, 0, 0, 0, 0).agreed(alone)  # the others wait for it
        raise
    n, d = x.shape
    parts = _Part(n, d, 8 * x.dtype.itemsize, point_weights is not None, len(devices)).agreed(alone)
    _check_alike(parts)
    each = max(-(-part.n_points // part.n_devices) for part in parts)
    rows = each * len(devices)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def placed(values: Any) -> Array:
        pieces = [jax.device_put(values[i * each : (i + 1) * each], device) for i, device in enumerate(devices)]
        return jax.make_array_from_single_device_arrays((each * mesh.size, *values.shape[1:]), sharding, pieces)

    return placed(meshes.padded(x, rows)), placed(meshes.padded(w, rows, 0))


def _checked(points: Any, point_weights: Any) -> tuple[Any, Any]:
    """Points and weights in the precision in which devices take them."""
    if meshes.is_spread(points) and not points.is_fully_replicated:
        raise ArgumentError("points", "lie on several devices already", "pass them to a fit as they are")
    x = checks.points("points", points)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    x = checks.representable("points", x, dtype)
    if point_weights is None:
        return x, np.ones(len(x), dtype)
    w = checks.own_weights("point_weights", point_weights, len(x))
    return x, checks.representable("point_weights", w, dtype)


def _check_alike(parts: list[_Part]) -> None:
    refused = [process for process, part in enumerate(parts) if not part.n_points]
    if refused:
        raise ArgumentError("points", f"processes {refused} could not use their parts", "see what they say")
    for field, what in (("n_features", "numbers of features"), ("bits", "precisions (bits)")):
        values = [getattr(part, field) for part in parts]
        if len(set(values)) > 1:
            raise ArgumentError("points", f"{what} differ between processes: {values}", "give parts of one cloud")
    if len({part.weighted for part in parts}) > 1:
        raise ArgumentError(
            "point_weights", "given in some processes, and not in others", "give them in all, or in none"
        )
