r"""The transport problem between two discrete measures, and what potentials say about it.

.. math:: \min_{P \ge 0} \langle P, C \rangle + \epsilon KL(P | a b^T) + \rho_0 KL(P 1 | a) + \rho_1 KL(P^T 1 | b)

A price :math:`\rho` that is infinite holds its marginal. The solution is :math:`P = a b^T \exp((f + g - C) / \epsilon)`.

Potentials are of the size of the costs, and at a small epsilon a plan's exponents are thousands of times smaller: they cancel. So
potentials may be sums of two floats, and no more is lost of an exponent than its own rounding.

Where there are `links`, P has mass in the cells of these alone; what the cost is elsewhere changes nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from coupled_gmm.core import checks, expansions
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.core.expansions import Words, two_sum
from coupled_gmm.core.programs import program
from coupled_gmm.core.tree import pytree
from coupled_gmm.gaussians.mixture import log_weights
from coupled_gmm.transport.links import blocks, transposed

BALANCED = float("1")  # an object of its own, to tell a tau that was given
Potential = Float[Array, "..."] | Words  # of a side; of one float or of two


@pytree
class TransportProblem:
    """Costs, masses and prices. Derivatives are those in the masses, since a mass of zero has none in its logarithm."""

    cost: Float[Array, "*b K0 K1"]
    a: Float[Array, "*b K0"]
    b: Float[Array, "*b K1"]
    log_masses: tuple[Float[Array, "*b K0"], Float[Array, "*b K1"]] | None  # where they are what is given
    epsilon: Float[Array, "*b"]
    rho0: Float[Array, "*b"]  # the price of changing a
    rho1: Float[Array, "*b"]  # the price of changing b
    links: Bool[Array, "*b K0 K1"] | None = None  # where mass may go; None is everywhere

    @classmethod
    def of_masses(
        cls, cost: Array, a: Array, b: Array, *, epsilon: Array, rho: Array | None = None, links: Array | None = None
    ) -> "TransportProblem":
        """From masses; `rho` is one price or two, None is infinite."""
        return cls._of(cost, (a, b), None, epsilon, rho, links)

    @classmethod
    def of_log_masses(
        cls,
        cost: Array,
        log_a: Array,
        log_b: Array,
        *,
        epsilon: Array,
        rho: Array | None = None,
        links: Array | None = None,
    ) -> "TransportProblem":
        """From logarithms of masses, -inf where there is none; `rho` is one price or two, None is infinite."""
        return cls._of(cost, (jnp.exp(log_a), jnp.exp(log_b)), (log_a, log_b), epsilon, rho, links)

    @classmethod
    def _of(
        cls,
        cost: Array,
        masses: tuple,
        log_masses: tuple | None,
        epsilon: Array,
        rho: Array | None,
        links: Array | None,
    ) -> "TransportProblem":
        rho0, rho1 = both_sides(jnp.full_like(epsilon, jnp.inf) if rho is None else rho, jnp.ndim(epsilon))
        a, b = masses
        return cls(cost=cost, a=a, b=b, log_masses=log_masses, epsilon=epsilon, rho0=rho0, rho1=rho1, links=links)

    @property
    def log_a(self) -> Float[Array, " K0"]:
        """-inf where there is no mass."""
        return log_weights(self.a) if self.log_masses is None else self.log_masses[0]

    @property
    def log_b(self) -> Float[Array, " K1"]:
        """-inf where there is no mass."""
        return log_weights(self.b) if self.log_masses is None else self.log_masses[1]

    def transpose(self) -> "TransportProblem":
        """The same problem from b to a."""
        return TransportProblem(
            cost=self.cost.T,
            a=self.b,
            b=self.a,
            log_masses=None if self.log_masses is None else (self.log_masses[1], self.log_masses[0]),
            epsilon=self.epsilon,
            rho0=self.rho1,
            rho1=self.rho0,
            links=transposed(self.links),
        )

    def at(self, epsilon: Array) -> "TransportProblem":
        """The same problem at another epsilon."""
        return dataclasses.replace(self, epsilon=epsilon)

    def in_unit(self, unit: Array, cost: Array) -> "TransportProblem":
        """The same problem at costs that are in another unit."""
        return dataclasses.replace(
            self, cost=cost, epsilon=self.epsilon / unit, rho0=self.rho0 / unit, rho1=self.rho1 / unit
        )

    def with_log_masses(self, log_a: Array, log_b: Array) -> "TransportProblem":
        """The same problem between other masses."""
        return dataclasses.replace(self, a=jnp.exp(log_a), b=jnp.exp(log_b), log_masses=(log_a, log_b))

    @property
    def balanced(self) -> Bool[Array, "*b"]:
        """Whether both prices are infinite."""
        return jnp.isinf(self.rho0) & jnp.isinf(self.rho1)

    @property
    def inverse_rhos(self) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """1 / rho of both sides: zero where a mass is held."""
        return 1 / self.rho0, 1 / self.rho1

    def usable(self, present0: Array, present1: Array) -> Bool[Array, "K0 K1"]:
        """Cells of a plan that may have mass, where these components have some."""
        both = present0[:, None] & present1
        return both if self.links is None else both & self.links

    @property
    def longest_way(self) -> int:
        """By how many costs potentials may differ: each is as far from another's as the links between them are long."""
        return 1 if self.links is None else sum(self.links.shape[-2:])

    def shifts(self, present0: Array, present1: Array, weights: Array) -> Callable[[Array], Array]:
        """Of values of gmm0's components the means, by weights, over those that may exchange mass: what is free of potentials."""
        if self.links is None:
            return lambda x: jnp.sum(jnp.where(weights > 0, weights * x, 0))
        joined = blocks(self.links, present0, present1).astype(weights.dtype)
        total = joined @ weights
        return lambda x: joined @ jnp.where(weights > 0, weights * x, 0) / jnp.where(total > 0, total, 1)

    def exponent(self, f: Potential, g: Potential) -> Float[Array, "K0 K1"]:
        """f + g - C, of which only the result is rounded; of any cell, linked or not."""
        one, other = expansions.words(f), expansions.words(g)
        total, rest = two_sum(one[0][:, None], other[0])
        total, more = two_sum(total, -self.cost)
        return total + (rest + more + (one[1][:, None] + other[1]))

    def log_kernel(self, f: Potential, g: Potential) -> Float[Array, "K0 K1"]:
        """(f + g - C) / epsilon, the logarithm of the plan over the masses; -inf where there is no link."""
        scaled = self.exponent(f, g) / self.epsilon
        return scaled if self.links is None else jnp.where(self.links, scaled, -jnp.inf)

    def log_plan(self, f: Potential, g: Potential) -> Float[Array, "K0 K1"]:
        """The logarithm of `plan`, from those of the masses."""
        return self.log_a[:, None] + self.log_b + self.log_kernel(f, g)

    def plan(self, f: Potential, g: Potential) -> Float[Array, "K0 K1"]:
        r""":math:`a b^T \exp((f + g - C) / \epsilon)`, differentiable in a mass of zero too, where the logarithm is not.

        At such a mass potentials may be so large that the exponential must be kept finite, so that it vanishes in the product.
        """
        kernel = jnp.exp(jnp.minimum(self.log_kernel(f, g), largest_exponent(self.cost)))
        return self.a[:, None] * self.b * kernel

    def c_transform(self, g: Potential, near: Potential | None = None) -> Words:
        """The f that is optimal for a given g, at its own side's price: a half-step of Sinkhorn's iteration.

        Rounded least about one that is `near`. The g that is optimal for f is that of the transposed problem.
        """
        near = expansions.words(jnp.zeros(len(self.cost), self.cost.dtype) if near is None else near)
        total = jax.nn.logsumexp(self.log_b + self.log_kernel(near, g), axis=1)
        if self.links is not None:  # what has no link to any mass has no such f, and keeps the one that it has
            total = jnp.where(jnp.isneginf(total), -self.inverse_rhos[0] * value(near), total)
        paid = self.epsilon * self.inverse_rhos[0]
        return expansions.moved(near, -(self.epsilon * total + paid * value(near)) / (1 + paid))

    def marginal_error(self, f: Potential, g: Potential) -> Float[Array, ""]:
        """L1 distance of the plan's marginals from a and b, or from a e^(-f / rho0) and b e^(-g / rho1) when unbalanced."""
        part, log_mass = self.relative_marginal_error(f, g)
        return part * jnp.exp(log_mass)

    def relative_marginal_error(self, f: Potential, g: Potential) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The marginal error as a part of the mass that moves (of 1, if balanced), and the logarithm of that mass."""
        inverse_rho0, inverse_rho1 = self.inverse_rhos
        log_plan = self.log_plan(f, g)
        log_mass = jnp.where(self.balanced, 0, jax.nn.logsumexp(log_plan))
        plan = jnp.exp(log_plan - log_mass)
        # A mass of zero stays zero whatever its potential is, which may be too large for the exponential.
        rows = jnp.exp(self.log_a - value(f) * inverse_rho0 - log_mass)
        columns = jnp.exp(self.log_b - value(g) * inverse_rho1 - log_mass)
        part = jnp.sum(jnp.abs(plan.sum(1) - rows)) + jnp.sum(jnp.abs(plan.sum(0) - columns))
        return jnp.where(jnp.isnan(part), jnp.inf, part), log_mass  # no bound that it is compared with is met

    def dual_objective(self, f: Potential, g: Potential) -> Float[Array, ""]:
        r""":math:`\langle \phi(f), a \rangle + \langle \phi(g), b \rangle + \epsilon (|a||b| - |P|)`, by the formula:
        :math:`\phi(f) = \rho (1 - e^{-f / \rho})` at its side's price, or f where that is infinite."""
        mass = jnp.sum(self.plan(f, g))
        f, g = _worth(f, self.rho0), _worth(g, self.rho1)
        # Potentials may be as large as the costs of pairs between which nothing moves.
        both = jnp.concatenate([f[0], g[0]]), jnp.concatenate([f[1], g[1]])
        paid = expansions.dot(jnp.concatenate([self.a, self.b]), both)
        return paid + self.epsilon * (jnp.sum(self.a) * jnp.sum(self.b) - mass)


def value(potential: Potential) -> Float[Array, "..."]:
    """A potential rounded to one float."""
    high, rest = expansions.words(potential)
    return high + rest


def largest_exponent(x: Array) -> Array:
    """An exponent that leaves room for a product."""
    return 0.5 * jnp.log(jnp.finfo(x.dtype).max)


def worth(potential: Array, rho: Array) -> Array:
    r""":math:`\phi(f) = \rho (1 - e^{-f / \rho})`, or f where :math:`\rho` is infinite."""
    finite = jnp.where(jnp.isinf(rho), 1, rho)
    changed = -finite * jnp.expm1(jnp.minimum(-potential / finite, largest_exponent(potential)))
    return jnp.where(jnp.isinf(rho), potential, changed)


def _worth(potential: Potential, rho: Array) -> Words:
    """The same, not rounded where it is the potential."""
    high, rest = expansions.words(potential)
    held = jnp.isinf(rho)
    return jnp.where(held, high, worth(high + rest, rho)), jnp.where(held, rest, 0)


def both_sides(rho: Array, batch_ndim: int = 0) -> tuple[Array, Array]:
    """rho of either side, from one number for both, or two on the axis behind those of a batch."""
    return (rho[..., 0], rho[..., 1]) if jnp.ndim(rho) > batch_ndim else (rho, rho)


@program()
def rho_of_tau(tau: Array, epsilon: Array) -> Array:
    r""":math:`\rho = \epsilon \tau / (1 - \tau)`; infinite where tau is 1."""
    return jnp.where(tau < 1, epsilon * tau / jnp.where(tau < 1, 1 - tau, 1), jnp.inf)


def tau_of_rho(rho: Any, epsilon: Any) -> Any:
    r""":math:`\tau = \rho / (\rho + \epsilon)`; 1 where rho is infinite."""
    return 1 / (1 + epsilon / rho)


class Prices(NamedTuple):
    """What changes of mass cost, checked: tau or rho as a user gave one of them."""

    value: Array
    is_tau: bool
    balanced: bool  # all are known to be infinite

    @classmethod
    def given(cls, tau: Any, rho: Any, check: Callable[..., Array]) -> "Prices":
        """`check(name, value, **bounds)` refuses what is out of range or of another shape."""
        if rho is not None and tau is not BALANCED:
            raise ArgumentError(
                "rho", "given beside tau, and both say what it costs to change masses", "keep one of them"
            )
        if rho is None:
            value, held = check("tau", tau, above=0, at_most=1), (tau, 1)
        else:
            value, held = check("rho", rho, above=0, infinite=True), (rho, np.inf)
        balanced = checks.known(held[0]) and bool(np.all(np.asarray(held[0]) == held[1]))
        return cls(value, rho is None, balanced)

    def rho(self, epsilon: Array) -> Array:
        """The prices themselves, by the epsilon of each."""
        if not self.is_tau:
            return self.value
        shape = jnp.shape(epsilon) + (1,) * (jnp.ndim(self.value) - jnp.ndim(epsilon))
        if self.balanced:
            return jax.device_put(np.full(np.broadcast_shapes(shape, jnp.shape(self.value)), np.inf, epsilon.dtype))
        return rho_of_tau(self.value, jnp.reshape(epsilon, shape))
