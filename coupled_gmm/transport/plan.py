"""Transport plans between mixtures, with their certificates and what their cost is made of."""

import dataclasses
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from coupled_gmm.core import checks, matrices
from coupled_gmm.core.expansions import Words
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import Outcome, Status, first_status
from coupled_gmm.core.tree import Stackable, counted, mapped, number, pytree, saved
from coupled_gmm.transport import duals
from coupled_gmm.transport.entropic import Potentials
from coupled_gmm.transport.exact import Vertex
from coupled_gmm.transport.links import shares
from coupled_gmm.transport.marginals import distance, feasible
from coupled_gmm.transport.pair import GaussianMixturePair, transport_problem
from coupled_gmm.transport.problem import TransportProblem

_JUMPS = (
    "an exact plan's matrix can't be differentiated: it jumps from vertex to vertex; differentiate plan.transport_cost, use "
    "an entropic plan, or jax.lax.stop_gradient(plan)"
)
_COMPOSED = "a composed plan can't be differentiated: use jax.lax.stop_gradient(plan)"


@saved
@pytree
class CostParts:
    """What a plan's regularised cost is the sum of, in squared data units."""

    transport: Float[Array, "*b"]  # <P, C>
    entropy: Float[Array, "*b"]  # epsilon KL(P | a b^T)
    outflow: Float[Array, "*b"]  # rho0 KL(P 1 | a), the price of reweighting what leaves gmm0's components
    inflow: Float[Array, "*b"]  # rho1 KL(P^T 1 | b), of what enters gmm1's

    @property
    def total(self) -> Float[Array, ""]:
        return self.transport + self.entropy + self.outflow + self.inflow


@saved
@pytree
class Plan(Stackable, Outcome):
    r"""A solved transport problem, raw: never rounded to its marginals.

    Entropic plans are :math:`P = a b^T \exp((f + g - C) / \epsilon)`, and everything read off them is differentiable in both
    mixtures, epsilon and rho. Exact ones are a vertex of the linear programme; their costs are differentiable. Composed ones have a
    matrix, no potentials, no gap and no derivatives: they are optimal for nothing. Of plans stacked on leading axes (a graph's
    edges, a batch) `plan[i]` is one; all that is read off them comes stacked too.
    """

    pair: GaussianMixturePair
    cost: Float[Array, "*b K0 K1"]
    potentials: tuple[Float[Array, "*b K0"], Float[Array, "*b K1"]] | None  # of a composed plan None
    status: Int[Array, "*b"]
    n_iterations: Int[Array, "*b"]
    vertex: Float[Array, "*b K0 K1"] | None = None  # the matrix of an exact plan, or of a composed one
    gap: Float[Array, "*b"] | None = None  # and its duality gap, from potentials more precise than `potentials`
    # Of an entropic plan's potentials, what rounding has left of them; files of before have none.
    rests: tuple[Float[Array, "*b K0"], Float[Array, "*b K1"]] | None = None

    _remedies = MappingProxyType(
        {
            Status.NOT_CONVERGED: (
                "the iterations ran out before the tolerance was met: allow more steps (max_iterations), or a larger tol"
            ),
            Status.PRECISION: (
                "stopped at what this precision can reach, above the tolerance: in float32, enable float64 "
                "(jax.config.update('jax_enable_x64', True)); in float64, raise the pair's epsilon, or tol"
            ),
            Status.NOT_FINITE: "a value was not finite: check the pair's mixtures, and that epsilon is no tiny part of their costs",
        }
    )

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.cost.shape[:-2]

    def _words(self) -> list[str]:
        k0, k1 = self.cost.shape[-2:]
        epsilon = [f"epsilon {said}" for said in [number(self.pair.epsilon)] if said and self.vertex is None]
        how = ["exact" if self.is_exact else "balanced" if self.pair.balanced else "unbalanced"]
        cost = [f"<P, C> {said}" for said in [number(self._cost_on_host())] if said]
        return [
            *self._stacked(),
            f"{k0} x {k1}",
            *how,
            *epsilon,
            *cost,
            *counted(self.n_iterations, "iteration"),
            *self._ended(),
        ]

    def _cost_on_host(self) -> Any:
        """<P, C> by NumPy, which compiles nothing; None where it is not known."""
        read = self.cost, self.vertex, self.vertex is None and self._whole, self.pair
        if not checks.known(read):
            return None
        cost, vertex, words, pair = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), read)
        if vertex is None:
            (f, g), (a, b) = (np.add(*side) for side in words), (pair.gmm0.weights, pair.gmm1.weights)
            exponents = (f[..., :, None] + g[..., None, :] - cost) / pair.epsilon[..., None, None]
            exponents = exponents if pair.links is None else np.where(pair.links, exponents, -np.inf)
            with np.errstate(all="ignore"):
                vertex = a[..., :, None] * b[..., None, :] * np.exp(exponents)
        with np.errstate(all="ignore"):
            return np.sum(np.where(vertex > 0, vertex * cost, 0), axis=(-2, -1))

    def _facts(self) -> dict[str, str]:
        return {
            "transport cost <P, C>": number(self.transport_cost),
            "regularised cost": number(self.regularized_cost),
            "total mass": number(self.total_mass),
            "marginal error": number(self.marginal_error),
            "duality gap": number(self.duality_gap),
        }

    def reverse(self) -> "Plan":
        """The plan of the same problem from gmm1 to gmm0."""
        vertex = None if self.vertex is None else matrices.transpose(self.vertex)
        return dataclasses.replace(
            self,
            pair=self.pair.reverse(),
            cost=matrices.transpose(self.cost),
            potentials=None if self.potentials is None else self.potentials[::-1],
            rests=None if self.rests is None else self.rests[::-1],
            vertex=vertex,
        )

    @property
    @mapped
    @program()
    def matrix(self) -> Float[Array, "K0 K1"]:
        """Mass from each component of gmm0 to each of gmm1."""
        if self.vertex is not None:
            # With what it depends on: a vertex alone carries no derivative that could be refused.
            return checks.value_only((self.vertex, self.cost, *self._masses), _JUMPS if self.is_exact else _COMPOSED)[0]
        return self._problem.plan(*self._whole)

    @property
    @mapped
    @program()
    def normalized_matrix(self) -> Float[Array, "K0 K1"]:
        """The plan divided by its total mass, however little that is."""
        if self.vertex is not None:
            return self.matrix / jnp.sum(self.matrix)
        return jax.nn.softmax(self._problem.log_plan(*self._whole), axis=(0, 1))

    @mapped
    @program()
    def conditionals(self) -> tuple[Float[Array, "K0 K1"], Float[Array, "K0 K1"]]:
        """The plan's rows over their own sums, and its columns over theirs: where mass goes, and where it comes from.

        Zero where an exact plan moves nothing; of an entropic one each row and column has a limit, however little it moves.
        """
        if self.vertex is not None:
            matrix = self.matrix
            rows, columns = matrix.sum(1, keepdims=True), matrix.sum(0)
            return matrix / jnp.where(rows > 0, rows, 1), matrix / jnp.where(columns > 0, columns, 1)
        pair = self.pair
        log_kernel = self._problem.log_kernel(*self._whole)
        forward, backward = log_kernel + pair.gmm1.log_weights, log_kernel + pair.gmm0.log_weights[:, None]
        if pair.links is None:
            return jax.nn.softmax(forward, axis=1), jax.nn.softmax(backward, axis=0)
        return shares(forward, axis=1), shares(backward, axis=0)

    @property
    @mapped
    @program()
    def total_mass(self) -> Float[Array, ""]:
        """F: 1 when balanced, at most 1 otherwise."""
        return jnp.sum(self.matrix)

    @property
    @mapped
    @program()
    def transport_cost(self) -> Float[Array, ""]:
        """<P, C>, squared data units."""
        if self.vertex is None or self.potentials is None:
            return jnp.sum(self.matrix * self.cost)
        # The envelope theorem: mass costs what the potentials say.
        (f, g), (a, b) = jax.lax.stop_gradient(self.potentials), self._masses
        change = f @ (a - jax.lax.stop_gradient(a)) + g @ (b - jax.lax.stop_gradient(b))
        return jnp.sum(jax.lax.stop_gradient(self.vertex) * self.cost) + change

    @property
    @mapped
    @program()
    def regularized_cost(self) -> Float[Array, ""]:
        r""":math:`\langle P, C \rangle + \epsilon KL(P | a b^T) + \rho_0 KL(P 1 | a) + \rho_1 KL(P^T 1 | b)`, the primal
        objective.

        Of an exact plan, <P, C>: what it minimises; of a composed one as well, which minimises nothing.
        """
        if self.vertex is not None:
            return self.transport_cost
        # The dual's derivatives do without those of the potentials.
        fixed = jax.lax.stop_gradient(self)
        return self._dual() + fixed._parts(fixed.matrix).total - fixed._dual()

    @property
    @mapped
    @program()
    def cost_parts(self) -> CostParts:
        """The terms of `regularized_cost`."""
        return self._parts(self.matrix)

    @property
    @mapped
    @program()
    def normalized_cost(self) -> Float[Array, ""]:
        r"""The objective at the normalised plan P / F.

        :math:`cost(P) = F \, cost(P / F) + (\epsilon + \rho_0 + \rho_1)(F \log F - F + 1)`: all that F does to it.
        """
        return self._parts(self.normalized_matrix).total

    @property
    @mapped
    @program()
    def mass_penalty(self) -> Float[Array, ""]:
        r""":math:`(\epsilon + \rho_0 + \rho_1)(F \log F - F + 1)`: the price of a total mass F, zero at 1; a lower bound of the
        cost. Zero where one side's masses are kept: F is then 1."""
        if self.pair.balanced:
            return jnp.zeros_like(self.pair.epsilon)
        mass, bound = self.total_mass, self.cost_bound
        kept = jnp.isinf(bound)
        return jnp.where(kept, 0, jnp.where(kept, 1, bound) * _kl(mass, jnp.ones_like(mass)))

    @property
    @mapped
    @program()
    def cost_bound(self) -> Float[Array, ""]:
        r""":math:`\epsilon + \rho_0 + \rho_1`, the cost of moving nothing: no optimal plan costs more. Infinite where a side's
        masses are kept."""
        return self.pair.epsilon + self.pair.rho0 + self.pair.rho1

    @property
    @mapped
    @program()
    def marginal_error(self) -> Float[Array, ""]:
        r"""L1 distance of the raw plan's marginals from a and b, or from :math:`a e^{-f/\rho_0}` and :math:`b e^{-g/\rho_1}`; a
        composed plan's from a and b."""
        if self.vertex is not None:
            return distance(self.vertex, *self._masses)
        return self._problem.marginal_error(*self._whole)

    @property
    @mapped
    @program()
    def duality_gap(self) -> Float[Array, ""]:
        """Primal minus dual objective, at least 0 up to rounding: a bound on how far `regularized_cost` is from optimal.

        Masses that are kept count as such: of a plan rounded to its marginals (Altschuler, Weed & Rigollet 2017). The optimum lies
        between that feasible plan's cost and the dual's; the raw plan's own may lie outside. Of an exact plan, a sum of mass times
        reduced cost, which does not cancel: a bound for the masses that the plan has; so it is where there are links, over which
        no plan may have others. Of a composed plan infinite: none is known.
        """
        if self.gap is not None:
            return jax.lax.stop_gradient(self.gap)
        fixed = jax.lax.stop_gradient(self)
        raw, dual = fixed._parts(fixed.matrix).total, fixed._dual()
        if self.pair.links is not None:
            return raw - jnp.minimum(dual, raw)
        near = fixed._parts(feasible(fixed.matrix, *fixed._masses, fixed.pair)).total
        return jnp.maximum(near, raw) - jnp.minimum(dual, raw)

    @mapped
    @program()
    def reweighting(self) -> tuple[Float[Array, " K0"], Float[Array, " K1"]]:
        """Outflow over mass of gmm0's components, inflow over mass of gmm1's; 1 where a component has no mass to speak of: no more
        than a rounding unit of all of it."""
        matrix, (a, b) = self.matrix, self._masses
        return _ratio(matrix.sum(1), a), _ratio(matrix.sum(0), b)

    @mapped
    @program()
    def mass_change(self) -> Float[Array, " K0"]:
        r"""Factor by which the mass of what leaves each component of gmm0 changes on its way to gmm1, along the plan.

        Leaving k it takes that component's outflow factor; entering l it is divided by the inflow factor, so that what enters
        carries the mass of l. With a and b the masses, so it is the mass of gmm1 that comes from k over that of k,

        .. math:: \frac{1}{a_k} \sum_l b_l \frac{P_{kl}}{\sum_i P_{il}} ,

        w1 / w0 on a diagonal plan: neither factor alone says so. 1 where masses are balanced, and where a component has none to
        speak of, as in `reweighting`. Weighted by a its sum is the mass of the components of gmm1 that anything enters.
        """
        a, b = self._masses
        if self.pair.balanced:
            return jnp.ones_like(a)
        _, backward = self.conditionals()
        return _ratio(backward @ b, a)

    @mapped
    def point_reweighting(self, x: Any) -> Float[Array, " n"]:
        """Factor by which the weight of each point changes on its way from gmm0 to gmm1: the mean of `mass_change` over the
        components given the point.

        Over points of gmm0 its mean is the mass of the components of gmm1 that anything enters.
        """
        return self.pair.gmm0.posterior_mean(x, self.mass_change())

    @property
    def is_exact(self) -> bool:
        """Whether it is a vertex of the linear programme."""
        return self.vertex is not None and self.potentials is not None

    @property
    def _whole(self) -> tuple[Words, Words]:
        """The potentials, not rounded."""
        f, g = self.potentials  # pyright: ignore[reportGeneralTypeIssues]
        rests = (f - f, g - g) if self.rests is None else self.rests
        return (f, rests[0]), (g, rests[1])

    @property
    def _problem(self) -> TransportProblem:
        return transport_problem(self.pair, self.cost)

    @property
    def _masses(self) -> tuple[Float[Array, " K0"], Float[Array, " K1"]]:
        return self.pair.gmm0.weights, self.pair.gmm1.weights

    @matrices.precise
    def _dual(self) -> Array:
        (a, b), (f, g) = self._masses, self.potentials  # pyright: ignore[reportGeneralTypeIssues]
        if self.vertex is not None:
            return f @ a + g @ b
        return duals.dual_value(self._problem, *self._whole)

    def _parts(self, matrix: Array) -> CostParts:
        (a, b), pair = self._masses, self.pair
        transport, zero = jnp.sum(matrix * self.cost), jnp.zeros_like(pair.epsilon)
        entropy = zero if self.vertex is not None else pair.epsilon * _kl(matrix, a[:, None] * b)
        if pair.balanced:
            return CostParts(transport, entropy, zero, zero)
        rho0, rho1 = (jnp.where(jnp.isinf(rho), 0, rho) for rho in (pair.rho0, pair.rho1))
        return CostParts(transport, entropy, rho0 * _kl(matrix.sum(1), a), rho1 * _kl(matrix.sum(0), b))


@matrices.precise
def from_potentials(pair: GaussianMixturePair, cost: Array, solution: Potentials) -> Plan:
    """The plan of potentials that a solver returned, with its status."""
    status = _status(jnp.isfinite(solution.marginal_error), solution.converged, solution.stalled)
    words = jax.lax.stop_gradient(solution.words)
    (f, f_rest), (g, g_rest) = duals.implicit(transport_problem(pair, cost), *words)
    return Plan(pair, cost, (f, g), status, solution.n_iterations, rests=(f_rest, g_rest))


def from_vertex(pair: GaussianMixturePair, cost: Array, vertex: Vertex, tol: Array) -> Plan:
    """The plan of an exact solver's vertex, with its status."""
    error = distance(vertex.matrix, pair.gmm0.weights, pair.gmm1.weights)
    finite = jnp.all(jnp.isfinite(vertex.f)) & jnp.all(jnp.isfinite(vertex.g)) & jnp.isfinite(vertex.gap)
    status = _status(finite & jnp.isfinite(error), (error <= tol) & vertex.optimal, vertex.done)
    return Plan(pair, cost, (vertex.f, vertex.g), status, vertex.n_iterations, vertex.matrix, vertex.gap)


def _status(finite: Array, converged: Array, stopped: Array) -> Int[Array, "*b"]:
    """How any plan's solver ended: it met the tolerance; or stopped by itself short of it; or else its iterations ran out."""
    ends = [(~finite, Status.NOT_FINITE), (converged, Status.CONVERGED), (stopped, Status.PRECISION)]
    return first_status(ends, Status.NOT_CONVERGED)


def _ratio(flow: Array, mass: Array) -> Array:
    """Flows over masses; 1 where there is no mass to speak of."""
    some = mass > jnp.finfo(mass.dtype).eps * jnp.sum(mass)
    return jnp.where(some, flow / jnp.where(some, mass, 1), 1)


def _kl(p: Array, q: Array) -> Array:
    """Generalised Kullback-Leibler divergence: sum p log(p / q) - p + q, which cancels where p is near q: there by log1p."""
    present = (p > 0) & (q > 0)
    ratio = jnp.where(present, p, 1) / jnp.where(present, q, 1)
    near = present & (jnp.abs(p - q) < 0.5 * q)
    x = jnp.where(near, p - q, 0) / jnp.where(near, q, 1)
    return jnp.sum(jnp.where(near, q * ((1 + x) * jnp.log1p(x) - x), p * jnp.log(ratio) - p + q))
