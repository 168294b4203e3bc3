"""Small dense matrices against NumPy's LAPACK in float64, derivatives against finite differences, and no LAPACK inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_covariances, random_mixture
from jax.test_util import check_grads

import coupled_gmm as cg
from coupled_gmm import matrices, statistics

SIZES = (1, 2, 3, 8, 20)
LAPACK = {
    "cholesky", "cholesky_update", "triangular_solve", "eig", "eigh", "svd", "lu", "lu_pivots_to_permutation", "qr", "geqrf",
    "geqp3", "householder_product", "schur", "hessenberg", "tridiagonal", "tridiagonal_solve", "ffi_call", "custom_call",
    "pure_callback", "io_callback",
}  # fmt: skip


def covariances_of_rank(rng: np.random.RandomState, d: int, rank: int) -> np.ndarray:
    factor = rng.randn(4, d, rank)
    return factor @ factor.swapaxes(1, 2)


@jax.jit
def factorise(s):
    factor = matrices.cholesky(s)
    return factor, matrices.invert_triangular(factor), matrices.log_diagonal_sum(factor)


@pytest.mark.parametrize("d", SIZES)
def test_cholesky_and_inverse_equal_numpy(precision, d):
    condition = 1e4 if precision > 1e-8 else 1e8
    s = random_covariances(np.random.RandomState(d), 4, d, condition)
    s = np.asarray(jnp.asarray(s), np.float64)  # as rounded
    factor, inverse, log_norm = (np.asarray(a, np.float64) for a in factorise(jnp.asarray(s)))
    np.testing.assert_array_equal(factor, np.tril(factor))
    np.testing.assert_allclose(factor @ factor.swapaxes(1, 2), s, rtol=0, atol=4 * d * precision)
    # Forward errors grow with the condition number of the factor.
    np.testing.assert_allclose(factor, np.linalg.cholesky(s), rtol=0, atol=20 * condition**0.5 * precision)
    np.testing.assert_allclose(log_norm, 0.5 * np.linalg.slogdet(s)[1], rtol=1e-4, atol=1e-4)

    np.testing.assert_array_equal(inverse, np.tril(inverse))
    np.testing.assert_allclose(
        inverse @ factor, np.broadcast_to(np.eye(d), s.shape), atol=20 * condition**0.5 * precision
    )
    expected = np.linalg.inv(factor)
    scale = np.abs(expected).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(inverse / scale, expected / scale, atol=20 * condition**0.5 * precision)


@pytest.mark.parametrize("d", SIZES)
def test_singular_covariances_have_singular_factors(precision, d):
    rng = np.random.RandomState(d)
    for rank in sorted({0, 1, d // 2, d - 1} - {d}):
        s = np.array(jnp.asarray(covariances_of_rank(rng, d, rank)), np.float64)
        s[0] = 0
        s[1] = np.diag(np.arange(d) % 2)
        factor, inverse, _ = (np.asarray(a, np.float64) for a in factorise(jnp.asarray(s)))
        scale = max(1.0, np.abs(s).max())
        np.testing.assert_allclose(factor @ factor.swapaxes(1, 2), s, rtol=0, atol=20 * d * precision * scale)
        np.testing.assert_array_equal(factor[0], 0)
        assert np.isfinite(inverse).all()


def test_scale_does_not_matter(precision):
    s = random_covariances(np.random.RandomState(0), 3, 4)
    units = np.diag([1e-4, 1e4, 1.0, 1e3])
    factor = np.asarray(jax.jit(matrices.cholesky)(jnp.asarray(units @ s @ units)), np.float64)
    np.testing.assert_allclose(np.linalg.inv(units) @ factor, np.linalg.cholesky(s), atol=2e3 * precision)
    for scale in (1e-24, 1e24):
        scaled = np.asarray(jax.jit(matrices.cholesky)(jnp.asarray(scale * s)), np.float64)
        np.testing.assert_allclose(scaled / scale**0.5, np.linalg.cholesky(s), atol=2e3 * precision)


@pytest.mark.parametrize("d", [1, 3, 6])
def test_derivatives_equal_finite_differences(x64, d):
    factor = jnp.asarray(np.linalg.cholesky(random_covariances(np.random.RandomState(d), 2, d)))
    for function in (
        jax.jit(lambda a: matrices.cholesky(a @ a.swapaxes(-1, -2))),
        jax.jit(lambda a: matrices.invert_triangular(jnp.tril(a))),
    ):
        check_grads(function, (factor,), order=1, rtol=1e-5, atol=1e-6)


def test_derivatives_at_singular_covariances_are_finite(precision):
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(jnp.cos(matrices.cholesky(a)))))
    for rank in range(3):
        s = jnp.asarray(covariances_of_rank(np.random.RandomState(rank), 3, rank))
        assert np.isfinite(np.asarray(gradient(s))).all()


@pytest.mark.parametrize("k", [1, 2, 7, 30])
def test_solve_dominant_equals_numpy(precision, k):
    rng = np.random.RandomState(k)
    solve = jax.jit(matrices.solve_dominant)
    for excess in (1.0, 1e-2, 1e-4):
        rows = rng.dirichlet(np.ones(k), k)
        system = (1 + excess) * np.eye(k) - rows  # row sums are the excess, as in `entropic`
        right = rng.randn(k)
        got = np.asarray(solve(jnp.asarray(system), jnp.asarray(right)), np.float64)
        expected = np.linalg.solve(system, right)
        np.testing.assert_allclose(got, expected, atol=20 * precision / excess * np.abs(expected).max())


def test_gram_is_symmetric_to_the_last_bit(precision):
    product = np.asarray(jax.jit(matrices.gram)(jnp.asarray(np.random.RandomState(0).randn(3, 7, 7))))
    np.testing.assert_array_equal(product, product.swapaxes(1, 2))


def test_batched_equals_loop(x64):
    s = jnp.asarray(random_covariances(np.random.RandomState(3), 6, 4).reshape(2, 3, 4, 4))

    def function(a):
        factor = matrices.cholesky(a)
        return factor, matrices.invert_triangular(factor)

    one = jax.jit(function)
    looped = jax.tree.map(lambda *rows: np.stack(rows).reshape(s.shape), *(one(a) for a in s.reshape(6, 4, 4)))
    for batched in (one(s), jax.jit(jax.vmap(jax.vmap(function)))(s)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), batched, looped)


def primitives(jaxpr):
    """Names of all primitives in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def names_in(function, *args):
    return set(primitives(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("d", [2, 4])
def test_no_lapack_and_no_host_in_public_functions(d):
    gmm0, gmm1 = random_mixture(0, 3, d), random_mixture(1, 4, d)
    pairs = [cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1, tau=tau) for tau in (1.0, 0.9)]
    x = np.random.RandomState(0).randn(20, d)
    chunks = statistics.pack([jnp.asarray(x)], [None], 10)

    def cost(one, other):
        return jnp.sum(cg.bures_cost_matrix(one, other))

    def likelihood(gmm, points):
        return jnp.sum(gmm.log_prob(points))

    def plan_cost(pair):
        return cg.solve_plan(pair).regularized_cost

    def e_step(gmm):
        parameters = statistics.Parameters(gmm.means[None], gmm.cholesky[None], gmm.log_weights[None])
        return jnp.sum(statistics.e_step(parameters, chunks, jnp.ones((1, d))).penalized)

    found = names_in(jax.value_and_grad(cost, (0, 1)), gmm0, gmm1) | names_in(jax.value_and_grad(likelihood), gmm0, x)
    found |= names_in(jax.value_and_grad(e_step), gmm0)
    for pair in pairs:
        found |= names_in(cg.solve_plan, pair) | names_in(jax.value_and_grad(plan_cost), pair)
    assert "dot_general" in found
    assert not found & LAPACK
    control = names_in(jax.jit(lambda s: jax.lax.map(jnp.linalg.eigvalsh, s)), gmm0.covariances)
    assert control & LAPACK, "the search does not find what it looks for"


def products(jaxpr):
    """Precisions of all matrix products in a jaxpr and in those inside it, with what they are."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"], str(equation)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_products_are_in_full_precision():
    """A GPU rounds the factors of float32 products to 10 bits unless it is told not to."""
    gmm0, gmm1 = random_mixture(0, 3, 4), random_mixture(1, 4, 4)
    x = np.random.RandomState(0).randn(20, 4).astype(np.float32)
    pair = cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1)
    plan = cg.solve_plan(pair, method="exact")
    key = jax.random.key(0)
    programs = {
        "density": lambda gmm: jax.grad(lambda g: jnp.sum(g.log_prob(x)))(gmm),
        "exact": jax.grad(lambda gmm: cg.mw2_squared(gmm, gmm1)),
        "entropic": jax.grad(lambda gmm: cg.mw2_squared(gmm, gmm1, epsilon=0.1)),
        "map": lambda gmm: cg.map_points(plan, x),
        "draw": lambda gmm: cg.map_points(plan, x, method="random", key=key),
        "interpolate": lambda gmm: cg.interpolate(plan, 0.5),
        "barycenter": lambda gmm: cg.barycenter([gmm, gmm1], gmm, max_steps=2),
        "flow": lambda gmm: cg.flow(gmm, gmm1, steps=2),
        "adam": lambda gmm: cg.flow(gmm, gmm1, steps=2, optimizer=optax.adam),
        "fit": lambda gmm: cg.fit_pair(x, x, pair.replace(gmm, gmm1), transport_weight=0.1),
        "likelihood": jax.grad(lambda gmm: cg.penalized_log_likelihood(pair.replace(gmm, gmm1), x, x, transport_weight=0.1)),
    }  # fmt: skip
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    for name, program in programs.items():
        found = list(products(jax.make_jaxpr(program)(gmm0).jaxpr))
        assert found, name
        low = [what for precision, what in found if precision != highest]
        assert not low, (name, low[:3])
