"""Clouds over the devices of a mesh: which devices, who has which rows, and sums over all of them.

A sharded cloud lies evenly, as many rows on each device as on any other. Whatever mesh its owner gave it, here it has one
axis, along the rows; so a cloud that is cut so stays where it is. What devices compute of their own rows (`on_each`) they add
up (`total`), and each has the sum: no row travels.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

T = TypeVar("T")
AXIS = "shards"
_ROWS, _WHOLE = PartitionSpec(AXIS), PartitionSpec()
_AT_ONCE = 32  # rows that are added in a row: rounding grows with that, and with the logarithm of their number


def of(*trees: Any) -> Mesh | None:
    """The devices over which arrays of some trees lie, in the order of their rows; None where each lies on one device."""
    for leaf in jax.tree.leaves(trees):
        if is_spread(leaf):
            first_rows = leaf.sharding.devices_indices_map(leaf.shape)
            return Mesh(np.array(sorted(first_rows, key=lambda device: first_rows[device][0].start or 0)), (AXIS,))
    return None


def is_spread(value: Any) -> bool:
    """Whether it is an array, of values, that lies on several devices."""
    return isinstance(value, jax.Array) and not isinstance(value, Tracer) and len(value.sharding.device_set) > 1


def cut(mesh: Mesh, x: Any, weights: Any) -> tuple[Array, Array | None]:
    """A cloud and its weights, None for equal ones, evenly over the devices of a mesh.

    Where their number leaves some over, the last point fills up, with weight zero.
    """
    missing = -len(x) % mesh.size
    if missing:
        weights = np.ones(len(x), x.dtype) if weights is None else weights
        x, weights = padded(x, len(x) + missing), padded(weights, len(x) + missing, 0)
    return laid(mesh, x), None if weights is None else laid(mesh, weights)


def padded(values: Any, n: int, filling: float | None = None) -> Any:
    """Values (m, ...) up to n of them: with a number, or the last of them again."""
    xp, width = np if isinstance(values, np.ndarray) else jnp, [(0, n - len(values)), *[(0, 0)] * (values.ndim - 1)]
    return xp.pad(values, width, mode="edge") if filling is None else xp.pad(values, width, constant_values=filling)


def laid(mesh: Mesh, values: Any) -> Array:
    """Values (n, ...), as many on each device; nothing moves of what lies so already."""
    sharding = NamedSharding(mesh, _ROWS)
    if is_spread(values) or sharding.is_fully_addressable:
        return jax.device_put(values, sharding)
    host = np.asarray(values)  # the same in all processes, of which each puts some of it on its devices
    return jax.make_array_from_callback(host.shape, sharding, lambda rows: host[rows])


def on_each(mesh: Mesh, function: Callable[[Any, Any], T], *, by_rows: bool = False) -> Callable[[Any, Any], T]:
    """A function (own, shared), that each device calls with its own rows of `own` and the whole of `shared`.

    It returns what is the same everywhere, such as a `total`; or, `by_rows`, its own rows of a result.
    """
    out = _ROWS if by_rows else _WHOLE
    # What is the same everywhere is ours to know: the check would ask for marks in code that serves a single device too.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(_ROWS, _WHOLE), out_specs=out, check_vma=False)

    def on_this_mesh(own: Any, shared: Any) -> T:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # not on one that the caller may have set
            return cast(T, mapped(own, shared))

    return on_this_mesh


def total(values: Float[Array, "n ..."]) -> Float[Array, "..."]:
    """The sum over the rows of all devices, from inside a function `on_each`: pairwise on a device, then `over_devices`."""
    while len(values) > 1:
        whole = padded(values, len(values) + -len(values) % _AT_ONCE, 0)
        values = jnp.sum(whole.reshape(-1, _AT_ONCE, *values.shape[1:]), axis=1)
    return over_devices(values[0])


def over_devices(value: Array) -> Array:
    """The sum of what each device has, in one collective, from inside a function `on_each`.

    Numbers travel in two halves: the sum of high ones, of half the digits, rounds nothing while devices have like shares.
    """
    digits = jnp.finfo(value.dtype)
    high = jax.lax.reduce_precision(value, digits.nexp, digits.nmant // 2)
    sums = jax.lax.psum(jnp.stack([high, value - high]), AXIS)
    return sums[0] + sums[1]


def whole(tree: T) -> T:
    """What is the same on all devices, as arrays of NumPy, which go to whatever devices a program runs on; tracers as they are."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Tracer) else np.asarray(leaf), tree)
