"""One free mixture and the fixed ones that it is compared with: their plans, the objective, and where they pull it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from coupled_gmm.core import checks, matrices
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.tree import pytree, static, unchecked
from coupled_gmm.gaussians import bures
from coupled_gmm.gaussians.mixture import GaussianMixture, in_one_space, stack
from coupled_gmm.transport import duals, exact, limits, solvers
from coupled_gmm.transport.problem import TransportProblem

METHODS = ("exact", "entropic")


class FreeMixture(NamedTuple):
    """The free mixture, by its factors."""

    means: Float[Array, "n d"]
    factors: Float[Array, "n d d"]
    weights: Float[Array, " n"]

    @classmethod
    def of(cls, gmm: GaussianMixture) -> "FreeMixture":
        return cls(gmm.means, gmm.cholesky, gmm.weights)

    def mixture(self) -> GaussianMixture:
        return unchecked(
            GaussianMixture, means=self.means, covariances=matrices.gram(self.factors), weights=self.weights
        )


class PlansToFixed(NamedTuple):
    """Plans from the free mixture to each fixed one, and the objective: the sum of their costs by coefficients."""

    matrix: Float[Array, "B n K"]
    potentials: Float[Array, "B n"]  # of the free mixture's masses
    objective: Float[Array, ""]
    solved: Bool[Array, ""]
    warm_start: Any  # potentials or bases that the next solve starts from


class Cells(NamedTuple):
    """The cells of all plans that may hold mass, as flat lists."""

    problem: Array
    source: Array
    target: Array
    mass: Array


@pytree
class BarycenterProblem:
    """Fixed mixtures, padded to one size and stacked, and what each of their distances counts."""

    means: Float[Array, "B K d"]
    factors: Float[Array, "B K d d"]
    weights: Float[Array, "B K"]
    coefficients: Float[Array, " B"]
    epsilon: Float[Array, ""]
    method: str = static()

    @classmethod
    def of(cls, gmms: list[GaussianMixture], coefficients: Array, epsilon: Array, method: str) -> "BarycenterProblem":
        stacked = stack(gmms)
        return cls(
            means=stacked.means,
            factors=stacked.cholesky,
            weights=stacked.weights,
            coefficients=coefficients,
            epsilon=epsilon,
            method=method,
        )

    def costs(self, free: FreeMixture) -> Float[Array, "B n K"]:
        """Squared Bures-Wasserstein distances between the components of the free mixture and those of each fixed one."""
        b, k, d = self.means.shape
        flat = self.means.reshape(b * k, d), self.factors.reshape(b * k, d, d)
        return jnp.swapaxes(bures.pairwise_cost(free.means, free.factors, *flat).reshape(-1, b, k), 0, 1)

    def nearest_weights(self, cost: Float[Array, "B n K"], allowed: Bool[Array, " n"]) -> Float[Array, " n"]:
        """The masses of the components to which each of the free mixture's is the nearest, averaged: of one fixed mixture, the
        weights at which the exact objective is least."""
        nearest = jnp.argmin(jnp.where(allowed[:, None], cost, jnp.inf), axis=1)
        masses = self.coefficients[:, None] * self.weights
        return jax.ops.segment_sum(masses.ravel(), nearest.ravel(), len(allowed))

    def weights_between(
        self, cost: Float[Array, "two n K"], allowed: Bool[Array, " n"]
    ) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
        r"""Of two fixed mixtures, the weights at which the exact objective is least, and whether that is shown.

        Mass that goes from component i of the one to j of the other passes the free component by which it pays least: a transport
        problem between the two, at costs :math:`\min_k \lambda_0 C^0_{ki} + \lambda_1 C^1_{kj}`.
        """
        cost = jnp.where(allowed[:, None], self.coefficients[:, None, None] * cost, jnp.inf)

        def pass_by(so_far: tuple, k: Array) -> tuple[tuple, None]:
            least, by = so_far
            through = cost[0, k][:, None] + cost[1, k]
            return (jnp.minimum(least, through), jnp.where(through < least, k, by)), None

        n, size = cost.shape[1:]
        start = jnp.full((size, size), jnp.inf, cost.dtype), jnp.zeros((size, size), jnp.int32)
        (least, by), _ = jax.lax.scan(pass_by, start, jnp.arange(n, dtype=jnp.int32))
        limit = limits.MAX_ITERATIONS["exact"]
        vertex, _ = solvers.exact_vertex(least, self.weights[0], self.weights[1], limit)
        weights = jax.ops.segment_sum(vertex.matrix.ravel(), by.ravel(), n)
        return weights / jnp.sum(weights), vertex.optimal

    def cold_start(self, n: int) -> Any:
        """What the first solve starts from: nothing."""
        b, k = self.weights.shape
        if self.method == "entropic":
            f, g = jnp.zeros((b, n), self.means.dtype), jnp.zeros((b, k), self.means.dtype)
            return (f, f), (g, g)
        cells = jnp.zeros((b, n + k - 1), jnp.int32)
        return exact.Basis(cells, cells, jnp.zeros((b, n + k - 1, n + k), self.means.dtype))  # no feasible one

    def no_plans(self, n: int) -> PlansToFixed:
        """Plans before any: the first solve starts from nothing."""
        b, k = self.weights.shape
        zeros = jnp.zeros((b, n, k), self.means.dtype)
        return PlansToFixed(zeros, zeros[:, :, 0], zeros[0, 0, 0], jnp.asarray(True), self.cold_start(n))

    def solve(self, cost: Float[Array, "B n K"], weights: Float[Array, " n"], warm_start: Any) -> PlansToFixed:
        """The optimal plan to each fixed mixture, from what `warm_start` holds."""
        cost, weights, fixed = jax.lax.stop_gradient((cost, weights, self.weights))
        if self.method == "entropic":
            return self._solve_entropic(cost, weights, warm_start)
        limit = limits.MAX_ITERATIONS["exact"]
        vertex, warm_start = jax.vmap(lambda c, b, start: solvers.exact_vertex(c, weights, b, limit, start))(
            cost, fixed, warm_start
        )
        objective = self.coefficients @ jnp.sum(vertex.matrix * cost, axis=(1, 2))
        return PlansToFixed(vertex.matrix, vertex.f, objective, jnp.all(vertex.optimal), warm_start)

    def _solve_entropic(self, cost: Array, weights: Array, warm_start: Any) -> PlansToFixed:
        limit = limits.MAX_ITERATIONS["entropic"]
        tol = jnp.asarray(limits.barycenter_tolerance(cost.dtype), cost.dtype)

        def one(cost: Array, fixed: Array, init: Any) -> tuple[Any, ...]:
            problem = TransportProblem.of_masses(cost, weights, fixed, epsilon=self.epsilon)
            found = solvers.ENTROPIC(problem, init, tol, limit)
            value = duals.dual_value(problem, *found.words)
            return problem.plan(*found.words), found.f, found.words, value, found.marginal_error

        matrix, f, warm_start, values, errors = jax.vmap(one)(cost, self.weights, warm_start)
        solved = jnp.all(errors <= limits.MAX_MARGINAL_ERROR)
        return PlansToFixed(matrix, f, self.coefficients @ values, solved, warm_start)

    def cells(self, plans: PlansToFixed) -> Cells:
        """Where the plans may hold mass: everywhere, or in the cells of exact plans' trees."""
        b, n, k = plans.matrix.shape
        flat = plans.matrix.reshape(b, n * k)
        count = n + k - 1 if self.method == "exact" else n * k
        mass, cell = jax.lax.top_k(flat, count)
        problem = jnp.repeat(jnp.arange(b), count)
        return Cells(problem, cell.ravel() // k, cell.ravel() % k, mass.ravel())

    def shares(self, cells: Cells, n: int) -> Float[Array, " N"]:
        """What each cell counts for its source, all plans together, by coefficients; they sum to 1 for each source."""
        counted = self.coefficients[cells.problem] * cells.mass
        total = jax.ops.segment_sum(counted, cells.source, n)
        return counted / jnp.where(total > 0, total, 1)[cells.source]


def build_problem(
    gmms: list[GaussianMixture], coefficients: Array, epsilon: Array | None, free: FreeMixture, method: str
) -> BarycenterProblem:
    """A free mixture against these; epsilon None is 1e-2 of the mean cost between them."""
    problem = BarycenterProblem.of(
        gmms, coefficients, jnp.ones_like(coefficients[0]) if epsilon is None else epsilon, method
    )
    if method == "entropic" and epsilon is None:
        mean = jnp.einsum("n,bnk,bk,b->", free.weights, problem.costs(free), problem.weights, coefficients)
        problem = BarycenterProblem.of(gmms, coefficients, 1e-2 * mean, method)
    return problem


def one_precision(tree: Any, message: str) -> Any:
    """All numbers of a problem in the finest precision among them; refusing to be differentiated, with this message."""
    dtype = jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: checks.value_only(leaf.astype(dtype), message), tree)


def check_problem(
    gmms_name: str, gmms: Any, coefficients: Any, method: str, epsilon: Any
) -> tuple[list[GaussianMixture], Array, Array | None]:
    """The fixed mixtures, coefficients that sum to 1, and epsilon, checked."""
    if isinstance(gmms, GaussianMixture):
        gmms = [gmms]
    gmms = in_one_space(gmms_name, gmms)
    dtype = gmms[0].dtype
    if coefficients is None:
        coefficients = np.full(len(gmms), 1 / len(gmms))
    coefficients = checks.weights("coefficients", coefficients, len(gmms)).astype(dtype)
    checks.choice("method", method, METHODS)
    if method == "exact" and epsilon is not None:
        raise ArgumentError("epsilon", "goes with method 'entropic' only", "drop it, or pass method='entropic'")
    if epsilon is not None:
        epsilon = checks.scalar("epsilon", epsilon, above=0).astype(dtype)
    if checks.known(coefficients):  # on the host: a division alone would be a program
        shares = np.asarray(coefficients)
        return gmms, jax.device_put(shares / shares.sum()), epsilon
    return gmms, coefficients / jnp.sum(coefficients), epsilon
