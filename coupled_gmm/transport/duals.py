r"""The dual objective and the potentials of a transport problem, with the derivatives of its solution.

What is derived here holds at the solution, however it was found: of the value by the envelope theorem, of the potentials by the
implicit function theorem.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coupled_gmm.core import matrices
from coupled_gmm.transport.problem import Potential, TransportProblem, largest_exponent, value


@jax.custom_jvp
def dual_value(problem: TransportProblem, f: Potential, g: Potential) -> Float[Array, ""]:
    r"""The dual objective :math:`\langle \phi(f), a \rangle + \langle \phi(g), b \rangle + \epsilon (|a||b| - |P|)`.

    :math:`\phi(f) = \rho (1 - e^{-f / \rho})` at its side's price, or f where that is infinite. Differentiated, it is the optimal
    value: its derivatives at fixed potentials are right (envelope theorem), with an error of the potentials' own order, and theirs
    follow by `implicit`.
    """
    return problem.dual_objective(f, g)


@dual_value.defjvp
@matrices.precise
def _dual_value_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    problem, f, g = primals
    f, g = implicit(problem, f, g)
    return jax.jvp(lambda problem: problem.dual_objective(f, g), (problem,), tangents[:1])


@jax.custom_jvp
def implicit(problem: TransportProblem, f: Potential, g: Potential) -> tuple[Potential, Potential]:
    """The potentials f and g themselves; their derivatives, of any order, are those of the problem's solution.

    By the implicit function theorem, from the same linear system as the solver's Newton step. Where balanced, masses move
    against each other: a derivative in one mass alone is that with the missing mass taken from all in proportion.
    """
    del problem
    return f, g


@implicit.defjvp
@matrices.precise
def _implicit_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    problem, f, g = primals
    f, g = implicit(problem, f, g)

    def kernels(problem: TransportProblem) -> tuple[Array, Array]:
        """P / (a b^T) over the row sums, and over the column sums, that are wanted."""
        inverse_rho0, inverse_rho1 = problem.inverse_rhos
        log_kernel = problem.log_kernel(f, g)
        by_row, by_column = log_kernel + (value(f) * inverse_rho0)[:, None], log_kernel + value(g) * inverse_rho1
        largest = largest_exponent(problem.cost)
        return jnp.exp(jnp.minimum(by_row, largest)), jnp.exp(jnp.minimum(by_column, largest))

    def log_marginals(problem: TransportProblem) -> tuple[Array, Array]:
        """Logarithms of actual over wanted row and column sums: zero, for absent components as well."""
        rows, columns = kernels(problem)
        return jnp.log(_some(problem, rows @ problem.b)), jnp.log(_some(problem, problem.a @ columns))

    _, missed = jax.jvp(log_marginals, (problem,), tangents[:1])
    rows, columns = kernels(problem)
    a, b, epsilon, inverse_rhos = problem.a, problem.b, problem.epsilon, problem.inverse_rhos
    u, v = rows * b, a[:, None] * columns
    flow = a * jnp.sum(u, axis=1), b * jnp.sum(v, axis=0)
    u, v = u / _some(problem, jnp.sum(u, axis=1, keepdims=True)), v / _some(problem, jnp.sum(v, axis=0))
    tau0, tau1 = (1 / (1 + epsilon * inverse) for inverse in inverse_rhos)
    # Where balanced, a common shift of f is free (of each block of links); masses weigh it, as they do the sum of the equations,
    # which is empty.
    free = (inverse_rhos[0] == 0) & (inverse_rhos[1] == 0)
    weights = tuple(jnp.where(free, mass / jnp.sum(mass), 0) for mass in flow)
    present = a > 0, b > 0
    right0, right1 = -epsilon * missed[0], -epsilon * missed[1]
    if len(a) <= len(b):
        in_f, in_g = _eliminated(u, v, right0, right1, (tau0, tau1), problem.shifts(*present, weights[0]))
    else:
        shifts = problem.transpose().shifts(*present[::-1], weights[1])
        in_g, in_f = _eliminated(v.T, u.T, right1, right0, (tau1, tau0), shifts)
    return (f, g), (_in_first_word(f, in_f), _in_first_word(g, in_g))


def _some(problem: TransportProblem, sums: Array) -> Array:
    """Sums that may be logarithms' and denominators': 1 for a component without mass that has no link to any."""
    return sums if problem.links is None else jnp.where(sums > 0, sums, 1)


def _in_first_word(potential: Potential, tangent: Array) -> Potential:
    return (tangent, jnp.zeros_like(tangent)) if isinstance(potential, tuple) else tangent


def _eliminated(
    u: Array, v: Array, right0: Array, right1: Array, tau: tuple[Array, Array], shifts: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """The x and y with x / tau0 + U y = right0 and V^T x + y / tau1 = right1."""
    tau0, tau1 = tau
    matrix = jnp.eye(len(u), dtype=u.dtype) / tau0 - tau1 * u @ v.T
    damped = matrix + 10 * jnp.finfo(u.dtype).eps * jnp.eye(len(u), dtype=u.dtype)
    right = right0 - tau1 * u @ right1
    x = jax.lax.custom_linear_solve(
        lambda x: matrix @ x,
        right - shifts(right),
        lambda _, right: matrices.solve_dominant(damped, right),
        lambda _, right: matrices.solve_dominant(damped.T, right),
    )
    x = x - shifts(x)
    return x, tau1 * (right1 - v.T @ x)
