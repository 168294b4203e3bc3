"""How a coupled fit went, step by step: J and its terms."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from coupled_gmm.core.tree import pytree, saved


@saved
@pytree
class History:
    """A row per EM step, before its M-step; NaN past the last.

    Of a graph, q, log-likelihoods and transport have a column per node and edge. `log_likelihoods` are the densities' own, mean
    per point; q, objective and `penalized_log_likelihood` contain the ridge's term.
    """

    q: Float[Array, "*b steps V"]
    transport_terms: Float[Array, "*b steps E"]
    objective: Float[Array, "*b steps"]
    penalized_log_likelihood: Float[Array, "*b steps"]
    marginal_error: Float[Array, "*b steps"]
    log_likelihoods: Float[Array, "*b steps V"] | None = None

    @property
    def q0(self) -> Float[Array, "*steps"]:
        return self.q[..., 0]

    @property
    def q1(self) -> Float[Array, "*steps"]:
        if self.q.shape[-1] == 1:
            raise AttributeError("history.q1: the graph has one node, and q0 is its column; read history.q0")
        return self.q[..., 1]

    @property
    def transport(self) -> Float[Array, "*steps"]:
        """Regularised transport cost, summed over edges."""
        return jnp.sum(self.transport_terms, axis=-1)

    @property
    def columns(self) -> dict[str, Any]:
        """Of one row, what is shown of it; NumPy's arrays stay that."""
        terms = {f"q{i}": q for i, q in enumerate(self.q)} | {"transport": self.transport_terms.sum()}
        return terms | {
            name: getattr(self, name) for name in ("objective", "penalized_log_likelihood", "marginal_error")
        }
