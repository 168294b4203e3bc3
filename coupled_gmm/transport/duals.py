r"""Plans of potentials, the dual objective, and their derivatives.

A plan of potentials f and g is :math:`P = a b^T \exp((f + g - C) / \epsilon)`. What is derived here holds at the solution,
however it was found: of the value by the envelope theorem, of the potentials by the implicit function theorem.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coupled_gmm.core import matrices


def prices(rho: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of changing masses on either side, from one number for both or two."""
    return (rho[0], rho[1]) if jnp.ndim(rho) else (rho, rho)


def inverse_prices(rho: Array, balanced: bool) -> tuple[Float[Array, ""], Float[Array, ""]]:
    zero = jnp.zeros((), jnp.result_type(rho))
    return (zero, zero) if balanced else prices(1 / rho)


def log_plan(cost: Array, log_a: Array, log_b: Array, f: Array, g: Array, epsilon: Array) -> Float[Array, "K0 K1"]:
    return log_a[:, None] + log_b + exponent(cost, f, g) / epsilon


def exponent(cost: Array, f: Array, g: Array) -> Float[Array, "K0 K1"]:
    """f + g - C, the smallest of the three added last: where mass moves the other two nearly cancel, and are exact."""
    f = f[:, None]
    size_f, size_g, size = jnp.abs(f), jnp.abs(g), jnp.abs(cost)
    one_last = jnp.where(size_f < size_g, (g - cost) + f, (f - cost) + g)
    return jnp.where(size < jnp.minimum(size_f, size_g), (f + g) - cost, one_last)


def plan_matrix(cost: Array, a: Array, b: Array, f: Array, g: Array, epsilon: Array) -> Float[Array, "K0 K1"]:
    r""":math:`a b^T \exp((f + g - C) / \epsilon)`, differentiable in a mass of zero too, where the logarithm is not.

    At such a mass potentials may be so large that the exponential must be kept finite, so that it vanishes in the product.
    """
    return a[:, None] * b * jnp.exp(jnp.minimum(exponent(cost, f, g) / epsilon, _largest(cost)))


def _largest(x: Array) -> Array:
    """An exponent that leaves room for a product."""
    return 0.5 * jnp.log(jnp.finfo(x.dtype).max)


@functools.partial(jax.custom_jvp, nondiff_argnums=(7,))
def dual_value(
    cost: Float[Array, "K0 K1"],
    a: Float[Array, " K0"],
    b: Float[Array, " K1"],
    f: Float[Array, " K0"],
    g: Float[Array, " K1"],
    epsilon: Float[Array, ""],
    rho: Float[Array, "*two"],
    balanced: bool,
) -> Float[Array, ""]:
    r"""The dual objective :math:`\langle \phi(f), a \rangle + \langle \phi(g), b \rangle + \epsilon (|a||b| - |P|)`.

    :math:`\phi(f) = \rho (1 - e^{-f / \rho})` at its side's price, or f where that is infinite. Differentiated, it is the optimal
    value: its derivatives at fixed potentials are right (envelope theorem), with an error of the potentials' own order, and theirs
    follow by `implicit`.
    """
    mass = jnp.sum(plan_matrix(cost, a, b, f, g, epsilon))
    if not balanced:
        f, g = (_worth(potential, price) for potential, price in zip((f, g), prices(rho), strict=True))
    return f @ a + g @ b + epsilon * (jnp.sum(a) * jnp.sum(b) - mass)


def _worth(potential: Array, price: Array) -> Array:
    finite = jnp.where(jnp.isinf(price), 1, price)
    changed = -finite * jnp.expm1(jnp.minimum(-potential / finite, _largest(potential)))
    return jnp.where(jnp.isinf(price), potential, changed)


@dual_value.defjvp
@matrices.precise
def _dual_value_jvp(balanced: bool, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    cost, a, b, f, g, epsilon, rho = primals
    f, g = implicit(cost, a, b, f, g, epsilon, rho, balanced)

    def value(cost: Array, a: Array, b: Array, epsilon: Array, rho: Array) -> Array:
        return dual_value.fun(cost, a, b, f, g, epsilon, rho, balanced)

    return jax.jvp(value, (cost, a, b, epsilon, rho), (*tangents[:3], *tangents[5:]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(7,))
def implicit(
    cost: Array, a: Array, b: Array, f: Array, g: Array, epsilon: Array, rho: Array, balanced: bool
) -> tuple[Float[Array, " K0"], Float[Array, " K1"]]:
    """The potentials f and g themselves; their derivatives, of any order, are those of the problem's solution.

    By the implicit function theorem, from the same linear system as the solver's Newton step. Where balanced, masses move
    against each other: a derivative in one mass alone is that with the missing mass taken from all in proportion.
    """
    del cost, a, b, epsilon, rho, balanced
    return f, g


@implicit.defjvp
@matrices.precise
def _implicit_jvp(balanced: bool, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    cost, a, b, f, g, epsilon, rho = primals
    f, g = implicit(cost, a, b, f, g, epsilon, rho, balanced)
    inverse_rho = inverse_prices(rho, balanced)
    rate = jax.tree.map(jnp.zeros_like, inverse_rho) if balanced else prices(-tangents[6] / rho**2)

    def kernels(cost: Array, epsilon: Array, inverse_rho: tuple[Array, Array]) -> tuple[Array, Array]:
        """P / (a b^T) over the row sums, and over the column sums, that are wanted."""
        log_kernel = exponent(cost, f, g) / epsilon
        by_row, by_column = log_kernel + (f * inverse_rho[0])[:, None], log_kernel + g * inverse_rho[1]
        return jnp.exp(jnp.minimum(by_row, _largest(cost))), jnp.exp(jnp.minimum(by_column, _largest(cost)))

    def log_marginals(cost: Array, a: Array, b: Array, epsilon: Array, inverse_rho: tuple) -> tuple[Array, Array]:
        """Logarithms of actual over wanted row and column sums: zero, for absent components as well."""
        rows, columns = kernels(cost, epsilon, inverse_rho)
        return jnp.log(rows @ b), jnp.log(a @ columns)

    given = cost, a, b, epsilon, inverse_rho
    _, missed = jax.jvp(log_marginals, given, (*tangents[:3], tangents[5], rate))
    rows, columns = kernels(cost, epsilon, inverse_rho)
    u, v = rows * b, a[:, None] * columns
    flow = a * jnp.sum(u, axis=1), b * jnp.sum(v, axis=0)
    u, v = u / jnp.sum(u, axis=1, keepdims=True), v / jnp.sum(v, axis=0)
    tau0, tau1 = (1 / (1 + epsilon * inverse) for inverse in inverse_rho)
    # Where balanced, a common shift of f is free; masses weigh it, as they do the sum of the equations, which is empty.
    free = (inverse_rho[0] == 0) & (inverse_rho[1] == 0)
    centre0, centre1 = (jnp.where(free, mass / jnp.sum(mass), 0) for mass in flow)
    right0, right1 = -epsilon * missed[0], -epsilon * missed[1]
    if len(a) <= len(b):
        in_f, in_g = _eliminated(u, v, right0, right1, (tau0, tau1), centre0)
    else:
        in_g, in_f = _eliminated(v.T, u.T, right1, right0, (tau1, tau0), centre1)
    return (f, g), (in_f, in_g)


def _eliminated(
    u: Array, v: Array, right0: Array, right1: Array, tau: tuple[Array, Array], centre: Array
) -> tuple[Array, Array]:
    """The x and y with x / tau0 + U y = right0 and V^T x + y / tau1 = right1."""
    tau0, tau1 = tau
    matrix = jnp.eye(len(u), dtype=u.dtype) / tau0 - tau1 * u @ v.T
    damped = matrix + 10 * jnp.finfo(u.dtype).eps * jnp.eye(len(u), dtype=u.dtype)
    right = right0 - tau1 * u @ right1
    x = jax.lax.custom_linear_solve(
        lambda x: matrix @ x,
        right - jnp.sum(centre * right),
        lambda _, right: matrices.solve_dominant(damped, right),
        lambda _, right: matrices.solve_dominant(damped.T, right),
    )
    x = x - jnp.sum(centre * x)
    return x, tau1 * (right1 - v.T @ x)
