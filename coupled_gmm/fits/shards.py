"""What a fit asks of clouds that lie on several devices, before its program runs: their extremes, moments, some of their points.

Devices read their own rows. What leaves them are sums, extremes, and rows that were drawn.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from coupled_gmm.core import meshes
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.programs import program


def on_one_mesh(names: Sequence[str], clouds: Sequence[Any], weights: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Clouds and weights as they are, but those on several devices evenly over one mesh, each cloud with its weights.

    Raises:
      ValueError: one lies on other devices than another.
    """
    mesh = meshes.of(clouds, weights)
    if mesh is None:
        return list(clouds), list(weights)
    found, theirs, devices = [], [], set(mesh.devices.flat)
    for name, x, w in zip(names, clouds, weights, strict=True):
        for array in (x, w):
            if meshes.is_spread(array) and array.sharding.device_set != devices:
                raise ArgumentError(
                    name,
                    f"lies on {len(array.sharding.device_set)} devices, and another array on {len(devices)} that are not the same",
                    "shard all over one mesh, with shard_cloud",
                )
        spread = meshes.is_spread(x) or meshes.is_spread(w)
        x, w = meshes.cut(mesh, x, w) if spread else (x, w)
        found.append(x)
        theirs.append(w)
    return found, theirs


def extremes(x: Array) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """The least and the largest value of each feature."""
    found = meshes.whole(_extremes(x, meshes.of(x)))
    return -found[0], found[1]


@program("mesh")
def _extremes(x: Array, mesh: Mesh) -> Float[Array, "2 d"]:
    return meshes.on_each(mesh, lambda x, _: _largest(x))(x, None)


def _largest(x: Float[Array, "n d"]) -> Float[Array, "2 d"]:
    """Of negative values and of values, over all devices."""
    return jax.lax.pmax(jnp.stack([-jnp.min(x, axis=0), jnp.max(x, axis=0)]), meshes.AXIS)


def moments(x: Array, w: Array | None) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Means and variances of features in float64, to the precision of the points.

    As `frame.scales` does, from one of its own points: a feature that is constant in the cloud has a variance of exactly 0.
    """
    reference, size, centre, square = (np.asarray(each, np.float64) for each in _moments(x, w, meshes.of(x)))
    return reference + size * centre, size**2 * square


@program("mesh")
def _moments(x: Array, w: Array | None, mesh: Mesh) -> tuple[Array, Array, Array, Array]:
    """A point, and of all others the mean and variance from there, in units of their extent, whose squares a float holds."""

    def here(own: tuple, _: None) -> tuple[Array, Array, Array, Array]:
        x, w = own
        w = jnp.ones(len(x), x.dtype) if w is None else w.astype(x.dtype)
        heaviest = jnp.argmax(w)
        first = _first_with(w[heaviest])
        reference = jax.lax.psum(jnp.where(first, x[heaviest], 0), meshes.AXIS)
        size = jnp.sum(_largest(x), axis=0)
        size = jnp.where(size > 0, size, 1)
        share = w[:, None] / meshes.total(w)
        centre = meshes.total(share * ((x - reference) / size))
        return reference, size, centre, meshes.total(share * ((x - reference) / size - centre) ** 2)

    return meshes.on_each(mesh, here)((x, w), None)


def _first_with(value: Array) -> Array:
    """Whether this device is the first of those with the largest value."""
    here = jax.lax.axis_index(meshes.AXIS)
    largest = value == jax.lax.pmax(value, meshes.AXIS)
    return here == jax.lax.pmin(jnp.where(largest, here, jax.lax.axis_size(meshes.AXIS)), meshes.AXIS)


def all_of(x: Array, w: Array | None) -> tuple[np.ndarray, np.ndarray | None]:
    """All points of a cloud that is small, and their weights."""
    return rows(x), None if w is None else rows(w)


def rows(values: Array) -> np.ndarray:
    """All values (n,) or (n, d), of a cloud that is small."""
    columns = values.reshape(len(values), -1)
    return drawn(columns, None, (np.arange(len(values)) + 0.5) / len(values)).reshape(values.shape)


def drawn(x: Array, w: Array | None, places: Float[np.ndarray, " m"]) -> np.ndarray:
    """The points (m, d) at some places in [0, 1) of the mass, row after row."""
    mesh = meshes.of(x)
    assert mesh is not None
    if w is None:
        owners, rows = np.divmod((places * len(x)).astype(np.int64), len(x) // mesh.size)
        return meshes.whole(_rows(x, owners.astype(np.int32), rows.astype(np.int32), mesh))
    masses = np.asarray(_masses(w, mesh), np.float64)
    upto = np.cumsum(masses)
    places = places * upto[-1]
    owners = np.minimum(np.searchsorted(upto, places, side="right"), np.flatnonzero(masses)[-1])
    parts = (places - (upto - masses)[owners]) / masses[owners]
    last = 1 - np.finfo(w.dtype).eps  # below 1 in their precision too
    return meshes.whole(_rows_at(x, w, owners.astype(np.int32), np.clip(parts, 0, last).astype(w.dtype), mesh))


@program("mesh")
def _masses(w: Array, mesh: Mesh) -> Float[Array, " devices"]:
    def here(w: Array, _: None) -> Array:
        one = jnp.arange(mesh.size) == jax.lax.axis_index(meshes.AXIS)
        return meshes.over_devices(jnp.where(one, jnp.cumsum(w)[-1], 0))

    return meshes.on_each(mesh, here)(w, None)


@program("mesh")
def _rows(x: Array, owners: Array, rows: Array, mesh: Mesh) -> Float[Array, "m d"]:
    return meshes.on_each(mesh, lambda x, at: _given_to_all(x, *at))(x, (owners, rows))


@program("mesh")
def _rows_at(x: Array, w: Array, owners: Array, parts: Array, mesh: Mesh) -> Float[Array, "m d"]:
    def here(own: tuple, at: tuple) -> Array:
        (x, w), (owners, parts) = own, at
        upto = jnp.cumsum(w)
        rows = jnp.searchsorted(upto, parts * upto[-1], side="right")
        return _given_to_all(x, owners, jnp.minimum(rows, len(x) - 1))

    return meshes.on_each(mesh, here)((x, w), (owners, parts))


def _given_to_all(x: Float[Array, "n d"], owners: Array, rows: Array) -> Float[Array, "m d"]:
    mine = owners == jax.lax.axis_index(meshes.AXIS)
    return jax.lax.psum(jnp.where(mine[:, None], x[rows], 0), meshes.AXIS)


def together(clouds: Sequence[Any], weights: Sequence[Any]) -> tuple[Array, Array]:
    """Clouds, of which some lie on several devices, as one in which each counts as much as the others."""
    mesh = meshes.of(clouds, weights)
    assert mesh is not None
    return _together([meshes.cut(mesh, x, w) for x, w in zip(clouds, weights, strict=True)], mesh)


@program("mesh")
def _together(own: Any, mesh: Mesh) -> tuple[Array, Array]:
    def here(own: Any, _: None) -> tuple[Array, Array]:
        ones = [jnp.ones(len(x), x.dtype) if w is None else w for x, w in own]
        shares = [w / meshes.total(w) for w in ones]
        return jnp.concatenate([x for x, _ in own]), jnp.concatenate(shares)

    return meshes.on_each(mesh, here, by_rows=True)(own, None)
