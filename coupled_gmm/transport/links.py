"""Links: which component of one mixture may send mass to which of another.

Without links every component may send to every one. A link that is forbidden is no large cost but a cell that a plan does not have:
it carries exactly nothing, and none of the finite numbers that solvers add up knows of it.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import listed

_UNITS = 2**30  # that all mass is counted in, to tell whether links can carry it


def links(
    shape: Any, *, forbidden: Iterable[Any] = (), pinned: Iterable[Any] = (), one_to_one: bool = False
) -> Bool[np.ndarray, "K0 K1"]:
    """Which components of gmm0 may send mass to which of gmm1, as `GaussianMixturePair` takes it: True where they may.

    A pinned link carries all that its component of gmm0 sends: the other links of its row are forbidden. Of several pins of one
    component it may use each. Other components may still send to the pinned one of gmm1, unless links are `one_to_one`.

    A pin says where mass goes, not how much, since in a fit masses move. Where they are known, the exact plan that has an amount on
    a link is that of what is left: less the amount on both sides, with the link forbidden.

    Args:
      shape: (K0, K1), numbers of components.
      forbidden: pairs (i, j): component i of gmm0 sends nothing to j of gmm1.
      pinned: pairs (i, j): what component i of gmm0 sends goes to j.
      one_to_one: whether what a pinned component of gmm1 gets comes from its pins alone.

    Raises:
      TypeError, ValueError: indices out of range; a pin that is forbidden; a component that is left without any link.

    >>> print(cg.links((2, 3), pinned=[(0, 0)], forbidden=[(1, 0)]).astype(int).tolist())
    [[1, 0, 0], [0, 1, 1]]
    """
    sizes = _sizes(shape)
    banned, kept = (_cells(name, given, sizes) for name, given in (("forbidden", forbidden), ("pinned", pinned)))
    if both := sorted(set(banned) & set(kept)):
        raise ArgumentError("pinned", f"link {both[0]} is forbidden too", "keep one of them")
    pins = np.zeros(sizes, bool)
    pins[tuple(np.array(kept, int).reshape(-1, 2).T)] = True
    allowed = np.where(pins.any(1, keepdims=True), pins, True)
    if one_to_one:
        allowed &= np.where(pins.any(0), pins, True)
    allowed[tuple(np.array(banned, int).reshape(-1, 2).T)] = False
    _check_each_has_one("pinned" if kept else "forbidden", allowed, np.ones(sizes[0]), np.ones(sizes[1]))
    return allowed


def _sizes(shape: Any) -> tuple[int, int]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ArgumentError("shape", f"expected (K0, K1), numbers of components, got {checks.brief(shape)}")
    k0, k1 = (checks.integer("shape", size, 1) for size in shape)
    return k0, k1


def _cells(name: str, pairs: Any, sizes: tuple[int, int]) -> list[tuple[int, int]]:
    cells = []
    for pair in checks.sequence(name, list(pairs) if isinstance(pairs, (set, frozenset, np.ndarray)) else pairs):
        cell: tuple[Any, ...] = tuple(pair) if isinstance(pair, (tuple, list, np.ndarray)) else ()
        whole = len(cell) == 2 and all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in cell)
        if not whole or not all(0 <= i < size for i, size in zip(cell, sizes, strict=True)):
            problem = f"{checks.brief(pair)} is no pair (i, j) with i below {sizes[0]} and j below {sizes[1]}"
            raise ArgumentError(name, problem, "count components from 0")
        cells.append((int(cell[0]), int(cell[1])))
    return cells


def checked(name: str, given: Any, a: Array, b: Array) -> Bool[Array, "K0 K1"] | None:
    """A mask between components of such masses; None where it forbids nothing that is known.

    Raises:
      TypeError, ValueError: no mask of this shape; a component with mass and no link to one with mass.
    """
    if given is None:
        return None
    sizes = a.shape[-1], b.shape[-1]
    mask = given if isinstance(given, jax.Array) else np.asarray(given)
    if mask.dtype != bool:
        problem = f"expected a mask of bools, True where mass may go, got {mask.dtype}"
        raise ArgumentError(name, problem, "see coupled_gmm.links")
    if mask.shape != sizes:
        raise ArgumentError(name, f"expected shape {sizes}, the numbers of components, got {mask.shape}")
    if checks.known(mask, a, b):
        _check_each_has_one(name, np.asarray(mask), np.asarray(a), np.asarray(b))
    return jnp.asarray(mask)


def _check_each_has_one(name: str, allowed: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    for side, mask, masses, others in (("gmm0", allowed, a, b), ("gmm1", allowed.T, b, a)):
        alone = (masses > 0) & ~np.any(mask & (others > 0), axis=1)
        if alone.any():
            problem = f"component {np.argmax(alone)} of {side} has no link to any that has mass"
            raise ArgumentError(name, problem, "allow it one, or give it weight 0")


def check_carry(name: str, allowed: Any, a: Any, b: Any, most: Any) -> None:
    """Refuse balanced masses that links can't carry to a marginal error of at most `most`, where all is known.

    By Hall's condition: no components together may hold more than all that they are linked to. The largest flow tells.
    """
    if allowed is None or not checks.known(allowed, a, b, most):
        return
    missing, (rows, columns) = shortage(*(np.asarray(x) for x in (allowed, a, b)))
    if missing <= max(0.5 * float(np.max(most)), 1e-6):
        return
    held, room = (float(np.sum(np.asarray(m)[which])) for m, which in ((a, rows), (b, columns)))
    problem = (
        f"its links can't carry the masses: {_named(rows)} of gmm0 hold {held:.4g}, and all that they are linked to in gmm1, "
        f"{_named(columns)}, {room:.4g}"
    )
    raise ArgumentError(name, problem, "allow more links, change the weights, or let masses change (tau below 1)")


def _named(index: np.ndarray) -> str:
    return f"component{'' if len(index) == 1 else 's'} {listed(index.tolist())}" if len(index) else "nothing"


def shortage(allowed: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """How much of the mass no plan over these links can move; and the components that hold too much, and what they lead to."""
    from scipy.sparse import csr_array  # slow to import, and only needed here
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    (k0, k1), source, sink = allowed.shape, 0, sum(allowed.shape) + 1
    a, b = (np.asarray(m, np.float64) / np.sum(m, dtype=np.float64) for m in (a, b))
    units = [np.floor(_UNITS * m + 0.5).astype(np.int64) for m in (a, b)]
    rows, columns = np.nonzero(allowed & (a > 0)[:, None] & (b > 0))
    tails = np.r_[np.full(k0, source), 1 + rows, 1 + k0 + np.arange(k1)]
    heads = np.r_[1 + np.arange(k0), 1 + k0 + columns, np.full(k1, sink)]
    room = np.r_[units[0], np.full(len(rows), 2 * _UNITS - 1), units[1]]
    network = csr_array((room.astype(np.int32), (tails, heads)), shape=(sink + 1, sink + 1))
    found = maximum_flow(network, source, sink)
    left = csr_array(network - found.flow)
    left.eliminate_zeros()
    reached = breadth_first_order(left, source, return_predecessors=False)
    short = np.isin(np.arange(sink + 1), reached)
    return 1 - found.flow_value / _UNITS, (np.flatnonzero(short[1 : 1 + k0]), np.flatnonzero(short[1 + k0 : sink]))


def blocks(allowed: Bool[Array, "K0 K1"], present0: Array, present1: Array) -> Float[Array, "K0 K0"]:
    """1 where links between components that have mass lead from one component of gmm0 to another, in any number of steps.

    Between blocks no mass moves: balanced, each has a shift of its potentials that is free, and masses that must agree.
    """
    step = (allowed & present0[:, None] & present1).astype(jnp.float32)
    joined = ((step @ step.T > 0) | jnp.eye(len(step), dtype=bool)).astype(jnp.float32)
    for _ in range(max(1, (len(step) - 1).bit_length())):
        joined = (joined @ joined > 0).astype(jnp.float32)
    return joined


def per_edge(given: Any, masses: list[tuple[Array, Array]], size: int) -> Bool[Array, "E K K"] | None:
    """Masks of a graph's edges, padded to mixtures of one size; None where no edge has one.

    Raises:
      TypeError, ValueError: no list of one for each edge; as of `checked`.
    """
    if given is None:
        return None
    each = checks.sequence("links", given)
    if len(each) != len(masses):
        raise ArgumentError(
            "links", f"expected one for each of the {len(masses)} edges, got {len(each)}", "None has none"
        )
    masks = [checked(f"links[{i}]", mask, *sides) for i, (mask, sides) in enumerate(zip(each, masses, strict=True))]
    if all(mask is None for mask in masks):
        return None
    everywhere = jnp.ones((size, size), bool)
    return jnp.stack([everywhere if mask is None else padded(mask, size) for mask in masks])


def padded(allowed: Bool[Array, "K0 K1"], size: int) -> Bool[Array, "K K"]:
    """Between mixtures of one size: components that have no mass may send it anywhere."""
    room = [(0, size - k) for k in allowed.shape]
    return jnp.pad(allowed, room, constant_values=True)


def transposed(allowed: Bool[Array, "*b K0 K1"] | None) -> Bool[Array, "*b K1 K0"] | None:
    return None if allowed is None else jnp.swapaxes(allowed, -1, -2)


def shares(logits: Array, axis: int) -> Array:
    """A softmax; zero where nothing is linked."""
    some = jnp.any(logits > -jnp.inf, axis=axis, keepdims=True)
    return jnp.where(some, jax.nn.softmax(jnp.where(some, logits, 0), axis=axis), 0)
