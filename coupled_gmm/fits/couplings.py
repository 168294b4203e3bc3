r"""Couplings of the components that exchange mass, and what transport costs while they are kept.

For a fixed plan P, and for each pair of components a fixed orthogonal U,

.. math:: \sum_{kl} P_{kl} (|m_k - m_l|^2 + |L_k - L_l U_{kl}^T|^2)

bounds the transport cost from above, and meets it where P and U are optimal. So an M-step needs plans and polar factors where it
begins, not at each of its evaluations.

Of K x K pairs some K exchange mass. Which they are, a lower bound of the others' costs tells: a plan that has no mass to speak of
where costs are bounds has none where they are larger. Couplings are found and kept for those alone, in blocks whose number
is that of the pairs: a dynamic amount of work in a static amount of memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import matrices
from coupled_gmm.core.tree import take
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.statistics import Parameters
from coupled_gmm.gaussians import bures

_BLOCKS = 16  # that fit where one of a cost matrix does


class Shapes(NamedTuple):
    """Components of all nodes in one row, their factors as wide as products like them."""

    means: Float[Array, "VK d"]
    factors: Float[Array, "VK D D"]

    @classmethod
    def of(cls, parameters: Parameters) -> "Shapes":
        means, factors = (x.reshape(-1, *x.shape[2:]) for x in (parameters.means, parameters.factors))
        return cls(means, bures.widened(factors) if means.shape[-1] > 2 else factors)


class Couplings(NamedTuple):
    """Pairs of components of all edges, those whose coupling is known first."""

    cells: Int[Array, " N"]  # where in the costs, laid out flat
    ends: Int[Array, "2 N"]  # which components of which nodes
    count: Int[Array, ""]
    rotations: Float[Array, "N D D"]
    known: Bool[Array, "E K K"]
    costs: Float[Array, "E K K"]  # where known; elsewhere a lower bound

    @classmethod
    def none(cls, parameters: Parameters, graph: MixtureGraph) -> "Couplings":
        width = Shapes.of(parameters).factors.shape[-1]
        one, other = take(parameters, graph.sources), take(parameters, graph.targets)
        costs = jax.vmap(bures.least_cost)(one.means, one.factors, other.means, other.factors)
        n = costs.size + _block_length(costs.size, width, costs.dtype)  # a block may begin at the last one
        return cls(
            cells=jnp.full(n, costs.size),
            ends=jnp.zeros((2, n), jnp.int32),
            count=jnp.zeros((), jnp.int32),
            rotations=jnp.zeros((n, width, width), costs.dtype),
            known=jnp.zeros(costs.shape, bool),
            costs=costs,
        )

    def with_those(self, wanted: Bool[Array, "E K K"], parameters: Parameters, graph: MixtureGraph) -> "Couplings":
        """These and those that are wanted."""
        new, d, k = (wanted & ~self.known).ravel(), parameters.means.shape[-1], parameters.means.shape[1]
        flat = jnp.arange(len(new), dtype=self.cells.dtype)
        places = jnp.where(new, self.count + jnp.cumsum(new) - 1, len(self.cells))
        edge, row, column = flat // k**2, flat // k % k, flat % k
        ends = jnp.stack([graph.sources[edge] * k + row, graph.targets[edge] * k + column])
        cells = self.cells.at[places].set(flat, mode="drop")
        ends = self.ends.at[:, places].set(ends.astype(self.ends.dtype), mode="drop")
        means, factors = Shapes.of(parameters)
        norms = bures.inverse_norm(parameters.factors).ravel() if d > 2 else jnp.ones(len(means), means.dtype)
        count = self.count + jnp.sum(new, dtype=self.count.dtype)
        length = _block_length(len(new), factors.shape[-1], factors.dtype)

        def block(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            begin, rotations, costs = carry
            one, other = (jax.lax.dynamic_slice_in_dim(side, begin, length) for side in ends)
            found = bures.rotations(factors[one], factors[other], norms[one] * norms[other])
            cost, _, _ = bures.coupled_cost(factors[one], factors[other], found, d)
            cost = cost + jnp.sum((means[one] - means[other]) ** 2, axis=-1)
            rotations = jax.lax.dynamic_update_slice_in_dim(rotations, found, begin, 0)
            here = jax.lax.dynamic_slice_in_dim(cells, begin, length)
            return begin + length, rotations, costs.at[here].set(cost, mode="drop")

        start = self.count, self.rotations, self.costs.ravel()
        _, rotations, costs = jax.lax.while_loop(lambda carry: carry[0] < count, block, start)
        return Couplings(cells, ends, count, rotations, self.known | wanted, costs.reshape(self.costs.shape))

    def price(self, parameters: Parameters, weights: Float[Array, "E K K"]) -> Float[Array, ""]:
        """What weights of the pairs pay with these couplings, differentiable in means and factors."""
        return _price(Shapes.of(parameters), self, weights, parameters.means.shape[-1])


def _block_length(n: int, width: int, dtype: jnp.dtype) -> int:
    """Pairs that are coupled at a time."""
    room = bures.block_bytes() // _BLOCKS // (4 * width**2 * dtype.itemsize)
    return min(n, max(8, room))


def _halves(
    shapes: Shapes, couplings: Couplings, weights: Array, d: int
) -> tuple[Float[Array, ""], Float[Array, "VK d"], Float[Array, "VK D D"]]:
    """The price, and half of its derivatives."""
    means, factors = shapes
    length = _block_length(weights.size, factors.shape[-1], factors.dtype)
    weights = weights.ravel()

    def block(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        begin, price, in_means, in_factors = carry
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, length)  # noqa: E731
        one, other = part(couplings.ends[0]), part(couplings.ends[1])
        weight = weights.at[part(couplings.cells)].get(mode="fill", fill_value=0)
        cost, half0, half1 = bures.coupled_cost(factors[one], factors[other], part(couplings.rotations), d)
        apart = means[one] - means[other]
        price = price + jnp.sum(weight * (cost + jnp.sum(apart**2, axis=-1)))
        in_means = in_means.at[one].add(weight[:, None] * apart).at[other].add(-weight[:, None] * apart)
        heavy = weight[:, None, None]
        in_factors = in_factors.at[one].add(heavy * half0).at[other].add(heavy * half1)
        return begin + length, price, in_means, in_factors

    start = jnp.zeros_like(couplings.count), jnp.zeros((), means.dtype), jnp.zeros_like(means), jnp.zeros_like(factors)
    _, price, in_means, in_factors = jax.lax.while_loop(lambda carry: carry[0] < couplings.count, block, start)
    return price, in_means, in_factors


_price = jax.custom_jvp(
    lambda shapes, couplings, weights, d: _halves(shapes, couplings, weights, d)[0], nondiff_argnums=(3,)
)


@_price.defjvp
@matrices.precise
def _price_jvp(d, primals, tangents):
    shapes, couplings, weights = primals
    price, in_means, in_factors = _halves(shapes, couplings, weights, d)
    return price, 2 * (jnp.sum(in_means * tangents[0].means) + jnp.sum(in_factors * tangents[0].factors))
