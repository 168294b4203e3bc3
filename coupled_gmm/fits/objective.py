r"""What the M-step raises: sum v_i Q_i - sum lambda_ij T_ij, all of whose terms are functions of the parameters alone.

The transport cost enters by its dual value. Potentials are carried from one evaluation to the next and never
differentiated: by the envelope theorem the derivative at fixed potentials is that of the cost.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coupled_gmm.core.tree import take
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.statistics import Parameters, Statistics, expected_log_likelihood
from coupled_gmm.gaussians import bures
from coupled_gmm.transport import duals, entropic, limits
from coupled_gmm.transport.problem import TransportProblem
from coupled_gmm.transport.solvers import PlanSolver


class Terms(NamedTuple):
    """What an evaluation of the objective leaves: its parts, the cost matrices, the plans' potentials and errors."""

    q: Float[Array, " V"]
    transport: Float[Array, " E"]
    costs: Float[Array, "E K K"]
    potentials: entropic.Potentials

    @property
    def marginal_error(self) -> Float[Array, ""]:
        return jnp.max(self.potentials.marginal_error, initial=0)

    def total(self, graph: MixtureGraph) -> Float[Array, ""]:
        """sum v_i Q_i - sum lambda_ij T_ij."""
        return graph.node_weights @ self.q - graph.edge_weights @ self.transport

    def scaled(self, square: Float[Array, ""]) -> "Terms":
        """Those of transport in another unit, in which costs are so many times larger."""
        potentials = self.potentials.scaled(square)
        return self._replace(transport=self.transport * square, costs=self.costs * square, potentials=potentials)


def no_terms(graph: MixtureGraph) -> Terms:
    """Terms before any evaluation, with the potentials that the first plans start from."""
    n, k = graph.n_edges, graph.nodes.means.shape[1]
    zeros = jnp.zeros((n, k), graph.nodes.dtype)
    flags = jnp.zeros(n, bool)
    count = jnp.zeros(n, jnp.int32)
    potentials = entropic.Potentials(zeros, zeros, (zeros, zeros), zeros, zeros, zeros[:, 0], count, flags, flags)
    return Terms(jnp.zeros(graph.n_nodes, zeros.dtype), zeros[:, 0], jnp.zeros((n, k, k), zeros.dtype), potentials)


class Objective(NamedTuple):
    """An M-step's objective: what the points said of the components, and the graph that prices their differences."""

    statistics: Statistics
    floors: Float[Array, "V d"]
    graph: MixtureGraph
    solver: PlanSolver

    def terms(self, parameters: Parameters, potentials: entropic.Potentials) -> Terms:
        """Of these parameters, with plans found from potentials of nearby ones."""
        transport, costs, solved = transport_terms(parameters, self.graph, potentials, self.solver)
        return Terms(self.q(parameters), transport, costs, solved)

    def q(self, parameters: Parameters) -> Float[Array, " V"]:
        """The expected log-likelihood of every node."""
        return jax.vmap(expected_log_likelihood)(parameters, self.statistics, self.floors)


def transport_terms(
    parameters: Parameters,
    graph: MixtureGraph,
    potentials: entropic.Potentials,
    solver: PlanSolver,
) -> tuple[Float[Array, " E"], Float[Array, "E K K"], entropic.Potentials]:
    """Regularised transport cost of every edge, differentiable in the parameters; costs, and certifying potentials."""
    if not graph.n_edges:
        empty = no_terms(graph)
        return empty.transport, empty.costs, potentials

    def edge(one: Parameters, other: Parameters, prices: dict, start: entropic.Potentials):
        cost = bures.pairwise_cost(one.means, one.factors, other.means, other.factors)
        tol = jnp.asarray(limits.fit_tolerance(cost.dtype), cost.dtype)
        problem = TransportProblem.of_log_masses(cost, one.log_weights, other.log_weights, **prices)
        fixed, init = jax.lax.stop_gradient((problem, start.words))
        solved = solver(fixed, init, tol, limits.MAX_ITERATIONS_IN_FITS)
        value = duals.dual_value(problem, *solved.words)
        return value, *jax.lax.stop_gradient((cost, solved))

    sources, targets = take(parameters, graph.sources), take(parameters, graph.targets)
    prices = {"epsilon": graph.epsilon, "rho": graph.rho, "links": graph.links}
    return jax.vmap(edge)(sources, targets, prices, potentials)


def all_costs(parameters: Parameters, graph: MixtureGraph) -> Float[Array, "E K K"]:
    """The costs of all pairs of components, of every edge."""
    one, other = take(parameters, graph.sources), take(parameters, graph.targets)
    return jax.vmap(bures.pairwise_cost)(one.means, one.factors, other.means, other.factors)
