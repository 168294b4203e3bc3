"""What is compared: sizes of mixtures with their starts, prices of transport, weights."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.batch.parts import padded
from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import take
from coupled_gmm.fits.frame import View
from coupled_gmm.fits.gmm import check_distinct, draws
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.gaussians.mixture import GaussianMixture, alike
from coupled_gmm.transport.pair import mean_cost

RELATIVE_WEIGHTS = (0.0, *(float(f"{10 ** (power / 2):.0e}") for power in range(-8, 3)))
_MOST_COMPONENTS = 8  # that are tried where nobody says
_POINTS_EACH = 10  # of the smallest cloud, for each of them
_EPSILON = 1e-2  # of the mean cost, as a pair takes where nobody says
_DRAWS = 10  # starts that race, each the best of four, for those that are fitted


class Prices(NamedTuple):
    """Of transport along each edge, in squared data units."""

    epsilon: Float[Array, " E"]
    rho: Float[Array, "E *sides"]


class Starts(NamedTuple):
    """Mixtures for all nodes, from which fits of one size start."""

    nodes: GaussianMixture  # stacked on axes S V, padded
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is asked for, checked."""

    graph: MixtureGraph  # edges, frozen nodes and prices, where the grid has none
    key: Array | None
    n_components: tuple[int, ...] | None  # None: the graph's own mixtures are where fits start
    relative_weights: tuple[float, ...]
    epsilons: tuple[float, ...] | None  # parts of the mean cost
    rhos: tuple[float, ...] | None
    n_init: int

    @property
    def largest(self) -> int:
        return max(self.graph.sizes if self.n_components is None else (*self.n_components, *self._kept))

    @property
    def n_starts(self) -> int:
        return 1 if self.n_components is None else self.n_init

    @property
    def _kept(self) -> list[int]:
        """Sizes of frozen mixtures."""
        frozen = np.asarray(self.graph.frozen)
        return [size for size, still in zip(self.graph.sizes, frozen, strict=True) if still]

    def starts(self, view: View, ridge: Array, size: int | None) -> Starts:
        """Mixtures of so many components at each node, the best of several draws for all points that the view has.

        None takes the graph's own.
        """
        graph, largest = self.graph, self.largest
        own = padded(jax.device_get(graph.nodes), largest)
        if size is None or self.key is None:
            found, sizes = take(own, np.newaxis), graph.sizes
        else:
            key = jax.random.fold_in(self.key, size)
            pooled = view.together()
            check_distinct("the clouds", key, pooled, size)
            most, n_draws = max(self.n_components or ()), max(_DRAWS, self.n_init)
            drawn = draws(key, pooled, ridge, most, n_draws, self.n_init, present=size)
            drawn = padded(jax.device_get(drawn), largest)
            frozen = np.asarray(graph.frozen)
            own, drawn = alike([own, drawn])
            found = jax.tree.map(lambda new, old: _at_nodes(np.asarray(new), np.asarray(old), frozen), drawn, own)
            sizes = tuple(old if still else size for old, still in zip(graph.sizes, frozen, strict=True))
        if view.far and found.remainders is None:
            found = dataclasses.replace(found, remainders=np.zeros_like(found.means))
        return Starts(found, sizes)

    def prices(self, starts: Starts) -> Iterator[Prices]:
        """Every pair of an epsilon and a rho, for the first of some starts."""
        graph, first = self.graph, jax.device_put(take(starts.nodes, 0))
        scale = jnp.ones(0, graph.nodes.dtype)
        if graph.n_edges and (self.epsilons or self.rhos or self.n_components):
            edges = zip(np.asarray(graph.sources).tolist(), np.asarray(graph.targets).tolist(), strict=True)
            scale = jnp.stack([mean_cost(take(first, i), take(first, j)) for i, j in edges])
        epsilons = self.epsilons or ((_EPSILON,) if self.n_components else (None,))
        for epsilon, rho in itertools.product(epsilons, self.rhos or (None,)):
            yield Prices(
                graph.epsilon if epsilon is None else epsilon * scale, graph.rho if rho is None else rho * scale
            )


def _at_nodes(new: np.ndarray, old: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    """Drawn mixtures (S, ...) at all nodes (S, V, ...), but for those that are frozen."""
    kept = frozen.reshape(-1, *[1] * (new.ndim - 1))
    return np.where(kept, old, new[:, None])


def checked_sizes(n_components: Any, smallest: int) -> tuple[int, ...]:
    """Numbers of components in rising order; None is 1 to 8, or as many as the smallest cloud has points for."""
    if n_components is None:
        return tuple(range(1, max(1, min(_MOST_COMPONENTS, smallest // _POINTS_EACH)) + 1))
    listed = [n_components] if isinstance(n_components, (int, np.integer)) else _listed("n_components", n_components)
    sizes = tuple(sorted({checks.integer("n_components", value, 1) for value in listed}))
    if sizes[-1] > smallest // 2:
        problem = f"{sizes[-1]} components, and the smallest cloud has {smallest} points"
        raise ArgumentError("n_components", problem, "lower n_components: each needs two points at least")
    return sizes


def checked_numbers(name: str, values: Any, **bounds: Any) -> tuple[float, ...] | None:
    """Distinct numbers in rising order; None stays that."""
    if values is None:
        return None
    listed = [values] if np.ndim(values) == 0 else _listed(name, values)
    return tuple(sorted({float(checks.scalar(name, value, **bounds)) for value in listed}))


def _listed(name: str, values: Any) -> list:
    values = list(values) if isinstance(values, (range, jax.Array)) else checks.sequence(name, values)
    if not values:
        raise ArgumentError(name, "the list is empty", "give one number at least, or leave it out")
    return [value.item() if isinstance(value, (np.generic, jax.Array)) else value for value in values]
