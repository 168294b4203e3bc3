"""Solvers of transport between mixtures: `solve_plan` with its methods, and the distance MW2."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import Status, raise_if_failed
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.transport import entropic, exact, limits, network_simplex
from coupled_gmm.transport.entropic import Potentials
from coupled_gmm.transport.links import check_carry
from coupled_gmm.transport.pair import GaussianMixturePair, stated, transport_problem
from coupled_gmm.transport.plan import Plan, from_potentials, from_vertex
from coupled_gmm.transport.problem import Potential, TransportProblem, tau_of_rho
from coupled_gmm.transport.sinkhorn import Sinkhorn

ENTROPIC_METHODS = ("entropic", "sinkhorn")
METHODS = (*ENTROPIC_METHODS, "exact")
Init = tuple[Potential, Potential]


class PlanSolver(Protocol):
    """What finds the potentials of a plan, from those of a nearby one.

    Programs hold solvers as static arguments, so equal ones are equal, and hash so.
    """

    @property
    def solves_masses(self) -> bool:
        """Whether masses that answer to potentials may be solved for with the plan (`masses`), in this one's place."""
        ...

    def __call__(self, problem: TransportProblem, init: Init, tol: Array, max_iterations: int) -> Potentials: ...


@dataclasses.dataclass(frozen=True)
class Entropic:
    """`entropic.solve`, from the side with fewer components: its linear systems are that large."""

    solves_masses = True

    def __call__(self, problem: TransportProblem, init: Init, tol: Array, max_iterations: int) -> Potentials:
        if problem.cost.shape[0] <= problem.cost.shape[1]:
            return entropic.solve(problem, init[0], tol, max_iterations)
        return entropic.solve(problem.transpose(), init[1], tol, max_iterations).swap()


ENTROPIC = Entropic()


def solve_plan(
    pair: GaussianMixturePair,
    *,
    method: str = "entropic",
    init: Any = None,
    tol: Any = 1e-4,
    max_iterations: int | None = None,
) -> Plan:
    r"""The optimal plan between the components of a pair, to a marginal error of at most `tol`.

    Minimises :math:`\langle P, C \rangle + \epsilon KL(P | a b^T) + \rho_0 KL(P 1 | a) + \rho_1 KL(P^T 1 | b)`; where a price
    is infinite, its term is a constraint. Exact plans minimise :math:`\langle P, C \rangle` alone.

    Args:
      pair: the mixtures, epsilon and rho.
      method: "entropic", Newton's method on log-marginals with annealed epsilon (`transport.entropic`), or "sinkhorn",
        OTT's, on the same costs; "exact", the linear programme of a balanced pair, by the simplex method: compiled up to 64
        components a side, so that it batches and runs on a GPU, by POT's network simplex on the host beyond.
      init: potentials (f, g) of a nearby plan to start from, as in `plan.potentials`; None starts from zero. An exact plan
        starts from a corner and does not read them.
      tol: above 0, L1 error of the marginals, as a part of the total mass that moves.
      max_iterations: at least 1; None is 500 (entropic), 20,000 (sinkhorn) or 100,000 (exact).

    Returns:
      A `Plan`; read ``converged``, ``marginal_error`` and ``message`` before you trust it.

    Raises:
      TypeError, ValueError: an argument of the wrong kind or out of range; balanced masses that the pair's links can't carry.
      ImportError: an exact plan of more than 64 components a side, without the extra "pot".

    >>> gmm0, gmm1 = (cg.GaussianMixture.from_moments([[0.0], [x]], [[[1.0]], [[1.0]]], [0.5, 0.5]) for x in (2.0, 4.0))
    >>> plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1), method="exact")
    >>> print(plan.status_name, round(float(plan.transport_cost), 3))  # half of the mass goes from 2 to 4
    converged 2.0
    """
    checks.instance("pair", pair, GaussianMixturePair)
    checks.choice("method", method, METHODS)
    tol = checks.scalar("tol", tol, above=0, batched=True)
    limit = (
        limits.MAX_ITERATIONS[method] if max_iterations is None else checks.integer("max_iterations", max_iterations, 1)
    )
    init = _potentials(init, pair)
    check_links("pair", pair, tol)
    if method == "exact":
        if not pair.balanced:
            raise ArgumentError(
                "method", "'exact' is for balanced transport", "build the pair with tau = 1, or use 'entropic'"
            )
        return _solve_exactly(pair, tol, limit)
    # One program, whatever the prices are.
    plan = _solve_plan(stated(pair, balanced=False), init, tol, solver_for(method, pair), limit)
    return dataclasses.replace(plan, pair=pair)


def check_links(name: str, pair: GaussianMixturePair, most: Any) -> None:
    """Refuse a pair of which both masses are held, and whose links can't carry them to a marginal error of `most`."""
    if pair.links is not None and pair.balanced:
        check_carry(name, pair.links, pair.gmm0.weights, pair.gmm1.weights, most)


def _potentials(init: Any, pair: GaussianMixturePair) -> tuple[Any, Any]:
    sizes = pair.gmm0.n_components, pair.gmm1.n_components
    if init is None:
        return jax.device_put(tuple(np.zeros(size, pair.gmm0.dtype) for size in sizes))
    if not isinstance(init, (tuple, list)) or len(init) != 2:
        raise ArgumentTypeError("init", f"expected potentials (f, g) as in plan.potentials, got {type(init).__name__}")
    f, g = (checks.array(f"init[{i}]", init[i], size).astype(pair.gmm0.dtype) for i, size in enumerate(sizes))
    for i, potential in enumerate((f, g)):
        checks.finite(f"init[{i}]", potential, "pass None to start from zero")
    return f, g


@program("solver", "max_iterations")
def _solve_plan(pair: GaussianMixturePair, init: Any, tol: Array, solver: PlanSolver, max_iterations: int) -> Plan:
    cost = pair.cost_matrix()
    problem, init, tol = jax.lax.stop_gradient((transport_problem(pair, cost), init, tol.astype(cost.dtype)))
    return from_potentials(pair, cost, solver(problem, init, tol, max_iterations))


@program("max_iterations")
def _solve_exactly(pair: GaussianMixturePair, tol: Array, max_iterations: int) -> Plan:
    cost = pair.cost_matrix()
    problem = jax.lax.stop_gradient((cost, pair.gmm0.weights, pair.gmm1.weights))
    vertex, _ = exact_vertex(*problem, max_iterations, links=pair.links)
    return from_vertex(pair, cost, vertex, tol)


def exact_vertex(
    cost: Array,
    a: Array,
    b: Array,
    max_iterations: int,
    start: exact.Basis | None = None,
    links: Array | None = None,
) -> tuple[exact.Vertex, exact.Basis | None]:
    """An optimal vertex, inside XLA or on the host, and what the next one may start from."""
    if max(cost.shape) <= limits.MAX_SIZE_IN_XLA:
        return exact.solve(cost, a, b, max_iterations, start, links)
    return network_simplex.solve(cost, a, b, max_iterations, links), start


def mw2_squared(
    gmm0: GaussianMixture, gmm1: GaussianMixture, *, epsilon: Any = None, links: Any = None
) -> Float[Array, ""]:
    r"""The squared distance MW2 of Delon & Desolneux (2020) between two mixtures, in squared data units:

    .. math:: MW_2^2 = \min_{P \ge 0, P 1 = a, P^T 1 = b} \langle P, C \rangle

    with C the squared Bures-Wasserstein distances between components. Differentiable in all of both mixtures (weights
    along changes that keep their sum).

    Args:
      gmm0, gmm1: mixtures over the same features.
      epsilon: None for the exact distance; or above 0, squared data units: <P, C> of the entropic plan.
      links: where mass may go, as in `GaussianMixturePair`; None is everywhere. With links that forbid any it is no distance.

    Raises:
      TypeError, ValueError: not mixtures, features that disagree, epsilon out of range; masses that the links can't carry.
      FitError: an entropic plan missed its marginals by more than 1e-4. Inside ``jit`` and ``vmap`` nothing can be
        raised: there take `solve_plan`, and read its status.
    """
    pair = GaussianMixturePair(gmm0, gmm1, 1.0 if epsilon is None else epsilon, links=links)
    check_links("links", pair, limits.MAX_MW2_MARGINAL_ERROR)
    value, status = _mw2_squared(pair, epsilon is None)
    if checks.known(status):
        raise_if_failed(status, Plan._remedies)
    return value


@program("exactly")
def _mw2_squared(pair: GaussianMixturePair, exactly: bool) -> tuple[Array, Array]:
    if exactly:
        plan = _solve_exactly(pair, jnp.asarray(limits.MAX_MW2_MARGINAL_ERROR), limits.MAX_ITERATIONS["exact"])
        return plan.transport_cost, plan.status
    tol = limits.value_tolerance(pair.gmm0.dtype)
    init = jnp.zeros_like(pair.gmm0.weights), jnp.zeros_like(pair.gmm1.weights)
    plan = _solve_plan(pair, init, jnp.asarray(tol), ENTROPIC, limits.MAX_ITERATIONS["entropic"])
    good = (plan.status == Status.PRECISION) & (plan.marginal_error <= limits.MAX_MW2_MARGINAL_ERROR)
    return plan.transport_cost, jnp.where(good, Status.CONVERGED, plan.status)


def solver_for(method: str, pair: GaussianMixturePair) -> PlanSolver:
    """The solver of a method, with what it needs to know before compilation; equal choices are equal (and hash so)."""
    if method == "entropic":
        return ENTROPIC
    if not checks.known(pair.epsilon, pair.rho):
        raise ArgumentError(
            "method",
            "'sinkhorn' needs values of epsilon and rho that are known when it is compiled (OTT branches on tau)",
            "use 'entropic' under jit and vmap",
        )
    epsilon, rho0, rho1 = (float(jnp.reshape(x, ())) for x in (pair.epsilon, pair.rho0, pair.rho1))
    return Sinkhorn(tau_of_rho(rho0, epsilon), tau_of_rho(rho1, epsilon))
