"""Transport plans between mixtures, with their certificates."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coupled_gmm import checks, entropic
from coupled_gmm.entropic import Potentials
from coupled_gmm.pair import GaussianMixturePair
from coupled_gmm.result import Outcome, Status
from coupled_gmm.tree import pytree

METHODS = ("entropic", "sinkhorn")
MAX_ITERATIONS = {"entropic": 500, "sinkhorn": 20_000}


def _xlogy_ratio(p: Array, q: Array) -> Array:
    """p log(p / q), zero where p is."""
    safe = jnp.where((p > 0) & (q > 0), p, 1) / jnp.where((p > 0) & (q > 0), q, 1)
    return p * jnp.log(safe)


def _kl(p: Array, q: Array) -> Array:
    """Generalised Kullback-Leibler divergence: sum p log(p / q) - p + q."""
    return jnp.sum(_xlogy_ratio(p, q) - p + q)


_NO_DERIVATIVE = (
    "a plan's matrix and what is read off it can't be differentiated: its potentials are held fixed, and the result would "
    "be wrong; differentiate plan.regularized_cost, or use jax.lax.stop_gradient(plan)"
)


@pytree
class Plan(Outcome):
    r"""A solved transport problem: :math:`P = a b^T \exp((f + g - C) / \epsilon)`, raw, never rounded to its marginals."""

    pair: GaussianMixturePair
    cost: Float[Array, "K0 K1"]
    potentials: tuple[Float[Array, " K0"], Float[Array, " K1"]]
    status: Int[Array, ""]
    n_iterations: Int[Array, ""]

    @property
    def matrix(self) -> Float[Array, "K0 K1"]:
        """Mass from each component of gmm0 to each of gmm1."""
        return jnp.exp(self._log_matrix())

    @property
    def normalized_matrix(self) -> Float[Array, "K0 K1"]:
        """The plan divided by its total mass, however little that is."""
        return jax.nn.softmax(self._log_matrix(), axis=(0, 1))

    @property
    def total_mass(self) -> Float[Array, ""]:
        """F: 1 when balanced, at most 1 otherwise."""
        return jnp.sum(self.matrix)

    @property
    def transport_cost(self) -> Float[Array, ""]:
        """<P, C>, squared data units."""
        return jnp.sum(self.matrix * self.cost)

    @property
    def regularized_cost(self) -> Float[Array, ""]:
        r""":math:`\langle P, C \rangle + \epsilon KL(P | a b^T) + \rho KL(P 1 | a) + \rho KL(P^T 1 | b)`, the primal objective.

        Differentiable in both mixtures, by the envelope theorem.
        """
        # With potentials held fixed the derivatives of the dual are right, those of the balanced primal are not.
        fixed = jax.lax.stop_gradient(self)
        return self._dual() + fixed._primal(fixed.matrix) - fixed._dual()

    @property
    def marginal_error(self) -> Float[Array, ""]:
        r"""L1 distance of the raw plan's marginals from a and b, or from :math:`a e^{-f/\rho}` and :math:`b e^{-g/\rho}`."""
        pair, (f, g) = self.pair, self.potentials
        log_a, log_b = pair.gmm0.log_weights, pair.gmm1.log_weights
        return entropic.marginal_error(self.cost, log_a, log_b, f, g, pair.epsilon, pair.rho, pair.balanced)

    @property
    def duality_gap(self) -> Float[Array, ""]:
        """Primal minus dual objective, at least 0 up to rounding: a bound on how far the cost is from optimal.

        A balanced plan is first rounded to its marginals (Altschuler, Weed & Rigollet 2017), so that the primal value is
        that of a legal plan.
        """
        pair = self.pair
        matrix = _rounded(self.matrix, pair.gmm0.weights, pair.gmm1.weights) if pair.balanced else self.matrix
        return self._primal(matrix) - self._dual()

    def reweighting(self) -> tuple[Float[Array, " K0"], Float[Array, " K1"]]:
        """Outflow over mass of gmm0's components, inflow over mass of gmm1's; 1 where a component has no mass."""
        matrix = self.matrix

        def ratio(flow: Array, mass: Array) -> Array:
            return jnp.where(mass > 0, flow / jnp.where(mass > 0, mass, 1), 1)

        return ratio(matrix.sum(1), self.pair.gmm0.weights), ratio(matrix.sum(0), self.pair.gmm1.weights)

    def point_reweighting(self, x: Any) -> Float[Array, " n"]:
        r"""Factor by which the weight of each point changes on its way from gmm0 to gmm1.

        Leaving component k a point takes its outflow factor; entering l it is divided by the inflow factor, so that the
        points that enter carry the mass of l. This is the mean over k given the point, and over l by the rows of the plan;
        over points of gmm0 its mean is the mass of the components of gmm1 that anything enters.
        """
        outflow, inflow = self.reweighting()
        matrix = self.matrix
        rows = matrix.sum(1, keepdims=True)
        conditional = jnp.where(rows > 0, matrix / jnp.where(rows > 0, rows, 1), 0)
        arrival = jnp.where(inflow > 0, 1 / jnp.where(inflow > 0, inflow, 1), 1)
        return jnp.exp(self.pair.gmm0.log_posterior(x)) @ (outflow * (conditional @ arrival))

    def _log_matrix(self) -> Array:
        (f, g), pair = self.potentials, self.pair
        log_weights = pair.gmm0.log_weights, pair.gmm1.log_weights
        return checks.value_only(entropic.log_plan(self.cost, *log_weights, f, g, pair.epsilon), _NO_DERIVATIVE)

    def _dual(self) -> Array:
        (f, g), pair = self.potentials, self.pair
        a, b = pair.gmm0.weights, pair.gmm1.weights
        return entropic.dual_value(self.cost, a, b, f, g, pair.epsilon, pair.rho, pair.balanced)

    def _primal(self, matrix: Array) -> Array:
        a, b = self.pair.gmm0.weights, self.pair.gmm1.weights
        value = jnp.sum(matrix * self.cost) + self.pair.epsilon * _kl(matrix, a[:, None] * b)
        if self.pair.balanced:
            return value
        marginals = _kl(matrix.sum(1), a) + _kl(matrix.sum(0), b)
        return value + jnp.where(jnp.isinf(self.pair.rho), 0, self.pair.rho) * marginals


def _rounded(matrix: Array, a: Array, b: Array) -> Array:
    def shrink(flow: Array, mass: Array) -> Array:
        return jnp.minimum(1, jnp.where(flow > 0, mass / jnp.where(flow > 0, flow, 1), 1))

    matrix = matrix * shrink(matrix.sum(1), a)[:, None]
    matrix = matrix * shrink(matrix.sum(0), b)
    rows, columns = jnp.maximum(a - matrix.sum(1), 0), jnp.maximum(b - matrix.sum(0), 0)
    missing = jnp.sum(rows)
    return matrix + rows[:, None] * columns / jnp.where(missing > 0, missing, 1)


def solve_plan(
    pair: GaussianMixturePair,
    *,
    method: str = "entropic",
    init: Any = None,
    tol: Any = 1e-4,
    max_iterations: int | None = None,
) -> Plan:
    r"""The optimal plan between the components of a pair, to a marginal error of at most `tol`.

    Minimises :math:`\langle P, C \rangle + \epsilon KL(P | a b^T) + \rho KL(P 1 | a) + \rho KL(P^T 1 | b)`; the last two are
    constraints when balanced.

    Args:
      pair: the mixtures, epsilon and rho.
      method: "entropic", Newton's method on log-marginals with annealed epsilon (`coupled_gmm.entropic`), or "sinkhorn",
        OTT's, on the same costs.
      init: potentials (f, g) of a nearby plan to start from, as in `plan.potentials`; None starts from zero.
      tol: above 0, L1 error of the marginals, as a part of the total mass.
      max_iterations: at least 1; None is 500 (entropic) or 20,000 (sinkhorn).

    Returns:
      A `Plan`; read ``converged``, ``marginal_error`` and ``message`` before you trust it.

    Raises:
      TypeError, ValueError: an argument of the wrong kind or out of range.
    """
    checks.instance("pair", pair, GaussianMixturePair)
    checks.choice("method", method, METHODS)
    tol = checks.scalar("tol", tol, above=0, batched=True)
    limit = MAX_ITERATIONS[method] if max_iterations is None else checks.integer("max_iterations", max_iterations, 1)
    k0, k1 = pair.gmm0.n_components, pair.gmm1.n_components
    if init is None:
        init = (jnp.zeros(k0), jnp.zeros(k1))
    if not isinstance(init, (tuple, list)) or len(init) != 2:
        raise TypeError(f"init: expected potentials (f, g) as in plan.potentials, got {type(init).__name__}")
    init = [checks.array(f"init[{i}]", init[i], size).astype(pair.gmm0.dtype) for i, size in enumerate((k0, k1))]
    for i, potential in enumerate(init):
        checks.finite(f"init[{i}]", potential, "pass None to start from zero")
    return _solve_plan(pair, init, tol, solver_for(method, pair), limit)


@functools.partial(jax.jit, static_argnames=("solver", "max_iterations"))
def _solve_plan(pair: GaussianMixturePair, init: Any, tol: Array, solver: "Solver", max_iterations: int) -> Plan:
    cost = pair.cost_matrix()
    problem = (cost, pair.gmm0.log_weights, pair.gmm1.log_weights, pair.epsilon, pair.rho, init, tol.astype(cost.dtype))
    return from_potentials(pair, cost, solver(*jax.lax.stop_gradient(problem), max_iterations, pair.balanced))


def from_potentials(pair: GaussianMixturePair, cost: Array, solution: Potentials) -> Plan:
    """The plan of potentials that a solver returned, with its status."""
    unmet = jnp.where(solution.stalled, Status.PRECISION, Status.NOT_CONVERGED)
    status = jnp.where(solution.converged, Status.CONVERGED, unmet)
    status = jnp.where(jnp.isfinite(solution.marginal_error), status, Status.NOT_FINITE)
    return Plan(pair, cost, jax.lax.stop_gradient((solution.f, solution.g)), status, solution.n_iterations)


Solver = Callable[..., Potentials]


def solver_for(method: str, pair: GaussianMixturePair) -> Solver:
    """The solver of a method, with what it needs to know before compilation; equal choices are equal (and hash so)."""
    if method == "entropic":
        return solve_entropic
    if not checks.known(pair.epsilon, pair.rho):
        raise ValueError(
            "method: 'sinkhorn' needs values of epsilon and rho that are known when it is compiled (OTT branches on tau); "
            "use 'entropic' under jit and vmap"
        )
    return _Sinkhorn(1.0 if pair.balanced else float(pair.tau))


def solve_entropic(
    cost: Array,
    log_a: Array,
    log_b: Array,
    epsilon: Array,
    rho: Array,
    init: Any,
    tol: Array,
    limit: int,
    balanced: bool,
) -> Potentials:
    """`entropic.solve`, from the side with fewer components: its linear systems are that large."""
    if cost.shape[0] <= cost.shape[1]:
        return entropic.solve(cost, log_a, log_b, epsilon, rho, init[0], tol, limit, balanced)
    return entropic.solve(cost.T, log_b, log_a, epsilon, rho, init[1], tol, limit, balanced).swap()


@dataclasses.dataclass(frozen=True)
class _Sinkhorn:
    r"""OTT's Sinkhorn on the same problem.

    Unbalanced, OTT measures the plan's entropy against the counting measure. On the masses :math:`a^{1 + \epsilon/\rho}` and
    :math:`b^{1 + \epsilon/\rho}` its optimality conditions are those of :math:`KL(P | a b^T)` on a and b.
    """

    tau: float

    def __call__(
        self,
        cost: Array,
        log_a: Array,
        log_b: Array,
        epsilon: Array,
        rho: Array,
        init: Any,
        tol: Array,
        limit: int,
        balanced: bool,
    ) -> Potentials:
        from ott.geometry import geometry  # slow to import, and only needed here
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn

        a, b = jnp.exp(log_a / self.tau), jnp.exp(log_b / self.tau)  # 1 / tau = 1 + epsilon / rho
        geom = geometry.Geometry(cost_matrix=cost, epsilon=epsilon)  # pyright: ignore[reportArgumentType]
        problem = linear_problem.LinearProblem(geom, a=a, b=b, tau_a=self.tau, tau_b=self.tau)
        offsets = epsilon * log_a, epsilon * log_b  # -inf where there is no mass: OTT's kernel then has no part of it
        limit = max(10, limit // 10 * 10)  # whole blocks of OTT's ten inner iterations
        solver = sinkhorn.Sinkhorn(threshold=tol, max_iterations=limit)  # pyright: ignore[reportArgumentType]
        output = solver(problem, init=(init[0] + offsets[0], init[1] + offsets[1]))
        g = jnp.where(jnp.isinf(log_b), 0, output.g - offsets[1])
        f = entropic.transform(cost, log_b, g, epsilon, rho, balanced)
        g = entropic.transform(cost.T, log_a, f, epsilon, rho, balanced)
        error = entropic.marginal_error(cost, log_a, log_b, f, g, epsilon, rho, balanced)
        return Potentials(f, g, log_a, log_b, error, jnp.asarray(output.n_iters), error <= tol, jnp.asarray(False))
