"""Growth and death along an edge: by which factor the masses of components change, and how fast."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from coupled_gmm.core.tree import number, pytree, saved, static
from coupled_gmm.transport.plan import Plan


@saved
@pytree
class Growth:
    r"""What becomes of the mass of each component of a node on its way to another.

    `change` is the plan's `mass_change`: the mass of `target` that comes from a component, over that component's own; 1 where
    transport is balanced. `rate` is :math:`\log(change) / (t_1 - t_0)`, per unit of the nodes' times: below 0 for what dies, -inf
    for what leaves nothing; None where the nodes have no times, or equal ones.
    """

    change: Float[Array, " K"]
    rate: Float[Array, " K"] | None
    source: int = static()
    target: int = static()

    @classmethod
    def of(cls, plan: Plan, source: int, target: int, elapsed: Any | None) -> "Growth":
        """Of the plan from one node to the other, and the time between them."""
        change = plan.mass_change()
        return cls(change, None if elapsed is None else jnp.log(change) / elapsed, source, target)

    def _words(self) -> list[str]:
        rate = [] if self.rate is None else [f"rate {number(self.rate)}"]
        return [f"node {self.source} to {self.target}", f"change {number(self.change)}", *rate]
