"""What fits of several mixtures return: the mixtures, their plans, and how the fit went."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.status import Outcome, Status
from coupled_gmm.core.tree import Stackable, counted, listed, number, pytree, saved, single, static
from coupled_gmm.fits.contest import StartEnds
from coupled_gmm.fits.courses import Course
from coupled_gmm.fits.fidelity import Fidelity, overruled
from coupled_gmm.fits.growth import Growth
from coupled_gmm.fits.history import History
from coupled_gmm.fits.nodes import NodeNames
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport.pair import GaussianMixturePair
from coupled_gmm.transport.plan import Plan


def trimmed(padded: Plan, gmm0: GaussianMixture, gmm1: GaussianMixture) -> Plan:
    """A plan between padded mixtures as one between the mixtures themselves."""
    k0, k1, sides = gmm0.n_components, gmm1.n_components, (padded.potentials, padded.rests)
    potentials, rests = (None if side is None else (side[0][:k0], side[1][:k1]) for side in sides)
    pair = padded.pair.replace(gmm0, gmm1)
    return dataclasses.replace(padded, pair=pair, cost=padded.cost[:k0, :k1], potentials=potentials, rests=rests)


@saved
@pytree
class GraphFit(Stackable, Outcome):
    """A fitted graph: its mixtures, its plans edge by edge, and how it went. Of a batch of fits, `fit[i]` is one."""

    gmms: list[GaussianMixture]
    plans: Plan  # of the padded mixtures, stacked on a leading axis E
    penalized_log_likelihood: Float[Array, "*b"]
    status: Int[Array, "*b"]
    n_steps: Int[Array, "*b"]
    history: History
    log_likelihoods: Float[Array, "*b V"] | None = None  # of each cloud, mean per point, without ridge
    edges: Int[Array, "*b E 2"] | None = None  # as given; files of before have none
    edge_weights: Float[Array, "*b E"] | None = None
    feature_variance: Float[Array, "*b"] | None = None  # mean within clouds, by which a weight has no unit
    penalized_log_likelihoods: Float[Array, "*b V"] | None = None  # the same with the ridge's term
    fidelity: Fidelity | None = None
    node_weights: Float[Array, "*b V"] | None = None
    starts: StartEnds | None = None  # where several were asked for
    times: Float[Array, "*b V"] | None = None  # the graph's, and
    names: tuple[str, ...] | None = static(default=None)  # of its nodes

    def _words(self) -> list[str]:
        sizes = listed(gmm.n_components for gmm in self.gmms)
        sizes = f"{len(self.gmms)} mixtures of {sizes} components, {self.gmms[0].n_features} features"
        return [*self._stacked(), sizes, *counted(self.plans.cost.shape[-3], "edge"), *_went(self)]

    def _facts(self) -> dict[str, str]:
        return _facts(self)

    def _plans(self) -> Plan:
        return self.plans

    def _warnings(self) -> list[str]:
        if self.fidelity is None or self.edges is None:
            return []
        names = list(self.names or (f"node {i}" for i in range(len(self.gmms))))
        weights = self.edge_weights, self.node_weights
        return overruled(self.fidelity, self.plans, np.asarray(self.edges), names, *weights, self.feature_variance)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.status)

    @property
    def relative_weights(self) -> Float[Array, "*b E"] | None:
        """lambda of each edge times the clouds' mean variance of a feature: without a unit."""
        return _relative(self.edge_weights, self.feature_variance)

    @single
    def plan(self, edge: Any) -> Plan:
        """The plan of one edge, between the mixtures in `gmms` without padding.

        Args:
          edge: its index, from 0; or its nodes (i, j), by index or name, whichever it was written from: mass goes from i to j.

        Raises:
          TypeError, ValueError: there is no such edge, or the fit is a batch, or traced.
        """
        index, reverse = self.edge_index(edge)
        i, j = np.asarray(self.edges)[index].tolist()
        plan = trimmed(self.plans[index], self.gmms[i], self.gmms[j])
        return plan.reverse() if reverse else plan

    @single
    def compose(self, i: Any, j: Any) -> Plan:
        r"""The plan from node i to node j, of those along the path of edges between them: on a chain any two nodes.

        .. math:: P_{02} = P_{01} \, diag(1 / c_1) \, P_{12} , \qquad c_1 = P_{01}^T 1

        the law of the ends of a Markov chain of components, whose marginals hold where the edges' do; where masses change, so do
        they along the way, by the product of what they do on each edge. `compose(j, i)` is its reverse. It has the matrix and all
        that is read off that, and claims no optimality: its status is `COMPOSED`, its gap infinite. Of neighbours, the edge's plan.
        Node 0 stands for the earlier end (in time; by index, where there are no times), whichever is i.

        Args:
          i, j: two nodes, by index or name. In a graph with cycles the path is the shortest in edges.

        Raises:
          ValueError: there is no such node, or no path, or several shortest ones; the fit is a batch, or traced.
        """
        return self.course().compose(i, j)

    @single
    def growth(self) -> list[Growth]:
        """What becomes of the mass of each component along each edge, from its earlier node to its later: factor, and rate."""
        return self.course().growth()

    @single
    def ancestors(self, node: Any, component: Any) -> list[Any]:
        """Where the mass of a component comes from: its distribution over the components of each earlier node.

        Args:
          node: by index or name.
          component: its index.

        Returns:
          For each node of an earlier time (of a lower index, where there are no times), in their order, shares (K,) that sum to 1:
          a column of `compose(i, node)` over its sum. Edges are followed back in time; None for a node that they don't lead to.

        Raises:
          TypeError, ValueError: there is no such node or component; several shortest paths lead to a node; a batch, or traced.
        """
        return self.course().ancestors(node, component)

    @single
    def descendants(self, node: Any, component: Any) -> list[Any]:
        """Where the mass of a component goes: as `ancestors`, over each later node: a row of `compose(node, j)` over its sum."""
        return self.course().descendants(node, component)

    def course(self) -> Course:
        """The fit's nodes, edges and plans, to be read along paths."""
        sizes = tuple(gmm.n_components for gmm in self.gmms)
        return Course(self._called(), sizes, self.gmms[0].dtype, self._written(), self.times, self.plan)

    def _called(self) -> NodeNames:
        return NodeNames(len(self.gmms), self.names)

    def _written(self) -> list[tuple[int, int]]:
        """The edges as given, where they can be read."""
        if self.edges is None:
            raise ArgumentError("edge", "the fit was saved before fits kept their edges", "read plans[i], or fit again")
        if not checks.known(self.edges):
            raise ArgumentError(
                "edge",
                "under a transformation a fit's edges are not known",
                "read plans[i], or ask outside of it",
            )
        return [(i, j) for i, j in np.asarray(self.edges).tolist()]

    def edge_index(self, edge: Any) -> tuple[int, bool]:
        """The index of an edge, and whether it was asked for against its direction."""
        written = self._written()
        if isinstance(edge, (tuple, list)) and len(edge) == 2:
            called = self._called()
            i, j = (called.index("edge", node) if isinstance(node, str) else node for node in edge)
            for reverse, nodes in ((False, (i, j)), (True, (j, i))):
                if nodes in written:
                    return written.index(nodes), reverse
            raise ArgumentError("edge", f"no edge joins nodes {edge[0]} and {edge[1]}", f"the edges are {written}")
        index = checks.integer("edge", edge, 0)
        if index >= len(written):
            raise ArgumentError("edge", f"there is no edge {index}", f"the edges from 0 are {written}")
        return index, False


@saved
@pytree
class PairFit(Stackable, Outcome):
    """A fitted pair with its plan, and how the fit went. Of a batch of fits, `fit[i]` is one."""

    pair: GaussianMixturePair
    plan: Plan
    penalized_log_likelihood: Float[Array, "*b"]
    status: Int[Array, "*b"]
    n_steps: Int[Array, "*b"]
    history: History
    log_likelihoods: Float[Array, "*b 2"] | None = None  # of each cloud, mean per point, without ridge
    transport_weights: Float[Array, "*b"] | None = None  # lambda; of a path's fits, or of a batch's, each its own
    feature_variance: Float[Array, "*b"] | None = None  # mean within clouds, by which a weight has no unit
    penalized_log_likelihoods: Float[Array, "*b 2"] | None = None  # the same with the ridge's term
    fidelity: Fidelity | None = None
    starts: StartEnds | None = None  # where several were asked for

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.status)

    @property
    def transport_weight(self) -> Float[Array, "*b"] | None:
        """lambda, per squared data unit."""
        return self.transport_weights

    @property
    def relative_weight(self) -> Float[Array, "*b"] | None:
        """lambda times the clouds' mean variance of a feature: without a unit."""
        return _relative(self.transport_weights, self.feature_variance)

    relative_weights = relative_weight

    def _words(self) -> list[str]:
        one, other = self.pair.gmm0, self.pair.gmm1
        sizes = f"{one.n_components} and {other.n_components} components of {one.n_features} features"
        return [*self._stacked(), sizes, *_went(self)]

    def _facts(self) -> dict[str, str]:
        return _facts(self)

    def _plans(self) -> Plan:
        return self.plan

    def _warnings(self) -> list[str]:
        if self.fidelity is None or self.transport_weights is None:
            return []
        plan = jax.tree.map(lambda leaf: leaf[None], self.plan) if not self.batch_shape else self.plan
        price = jnp.expand_dims(self.transport_weights, -1), jnp.ones(2), self.feature_variance
        return overruled(self.fidelity, plan, np.array([[0, 1]]), ["gmm0", "gmm1"], *price)


def _relative(weights: Any, variance: Any) -> Any:
    if weights is None or variance is None:
        return None
    return weights * jnp.expand_dims(variance, range(jnp.ndim(variance), jnp.ndim(weights)))


def _went(fit: GraphFit | PairFit) -> list[str]:
    """J, steps and status, for `repr`."""
    value = [f"J {said}" for said in [number(fit.penalized_log_likelihood)] if said]
    plans = fit._plans()
    short = not isinstance(plans.status, Tracer) and bool(np.any(np.asarray(plans.status) != Status.CONVERGED))
    return [
        *value,
        *counted(fit.n_steps, "step"),
        *fit._ended(),
        *([f"its plan: {plans.status_name}"] if short else []),
    ]


def _fidelity(found: Fidelity | None) -> dict[str, str]:
    """What coupling has cost."""
    if found is None:
        return {}
    means, covariances = number(found.mean_shift), number(found.covariance_shift)
    return {
        "lost to coupling, nats per point": number(found.loss),
        "off their clouds, in standard deviations": f"means {means}, covariances {covariances}",
    }


def _starts(ends: StartEnds | None) -> dict[str, str]:
    return {"starts": f"{', '.join(ends._words())}"} if ends is not None else {}


def _prices(fit: GraphFit | PairFit) -> dict[str, str]:
    """The weight of transport, in its unit and without one."""
    weights = fit.edge_weights if isinstance(fit, GraphFit) else fit.transport_weights
    relative = number(_relative(weights, fit.feature_variance))
    return {"transport weight": f"{number(weights)} per squared data unit, relative {relative}" if relative else ""}


def _facts(fit: GraphFit | PairFit) -> dict[str, str]:
    """What `summary` tells of a fit."""
    plans, each = fit._plans(), fit.log_likelihoods
    likelihoods = "" if each is None else ", ".join(number(each[..., i]) for i in range(each.shape[-1]))
    return {
        "J": number(fit.penalized_log_likelihood),
        **_prices(fit),
        "log-likelihoods, mean per point": likelihoods,
        "transport cost": number(plans.regularized_cost) if plans.status.size else "",
        "marginal error": number(plans.marginal_error) if plans.status.size else "",
        "EM steps": number(fit.n_steps),
        "plan": plans.status_name if plans.status.size else "",
        **_fidelity(fit.fidelity),
        **_starts(fit.starts),
    }
