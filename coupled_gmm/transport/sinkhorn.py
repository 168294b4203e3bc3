r"""OTT's Sinkhorn on the same problem, and certified in the same way."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from coupled_gmm.transport import entropic
from coupled_gmm.transport.annealing import Annealed
from coupled_gmm.transport.entropic import Potentials
from coupled_gmm.transport.problem import TransportProblem, value


@dataclasses.dataclass(frozen=True)
class Sinkhorn:
    r"""OTT's Sinkhorn, which branches on :math:`\tau = \rho / (\rho + \epsilon)` of either side.

    Unbalanced, OTT measures the plan's entropy against the counting measure. On the masses :math:`a^{1 + \epsilon/\rho_0}` and
    :math:`b^{1 + \epsilon/\rho_1}` its optimality conditions are those of :math:`KL(P | a b^T)` on a and b.
    """

    tau0: float
    tau1: float
    solves_masses = False

    def __call__(self, problem: TransportProblem, init: Any, tol: Array, max_iterations: int) -> Potentials:
        from ott.geometry import geometry  # slow to import, and only needed here
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn

        epsilon, log_a, log_b = problem.epsilon, problem.log_a, problem.log_b
        a, b = jnp.exp(log_a / self.tau0), jnp.exp(log_b / self.tau1)  # 1 / tau = 1 + epsilon / rho
        cost = problem.cost if problem.links is None else jnp.where(problem.links, problem.cost, jnp.inf)
        geom = geometry.Geometry(cost_matrix=cost, epsilon=epsilon)  # pyright: ignore[reportArgumentType]
        linear = linear_problem.LinearProblem(geom, a=a, b=b, tau_a=self.tau0, tau_b=self.tau1)
        offsets = epsilon * log_a, epsilon * log_b  # -inf where there is no mass: OTT's kernel then has no part of it
        blocks = max(10, max_iterations // 10 * 10)  # whole blocks of OTT's ten inner iterations
        solver = sinkhorn.Sinkhorn(threshold=tol, max_iterations=blocks)  # pyright: ignore[reportArgumentType]
        output = solver(linear, init=(value(init[0]) + offsets[0], value(init[1]) + offsets[1]))
        f = problem.c_transform(jnp.where(jnp.isinf(log_b), 0, output.g - offsets[1]))
        g = problem.transpose().c_transform(f)
        end = Annealed(f[0], jnp.asarray(output.n_iters), at_floor=jnp.asarray(False), warm_start=())
        return entropic.certified(problem, f, g, tol, end)
