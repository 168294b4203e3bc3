"""Small dense matrices against NumPy's LAPACK in float64, derivatives against finite differences, and no LAPACK inside."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from problems import LAPACK, names_in, random_covariances, random_mixture

import coupled_gmm as cg
from coupled_gmm.core import chunks, matrices
from coupled_gmm.core.tree import unchecked
from coupled_gmm.fits import statistics

# One, few enough that the loop over columns is laid out flat, and many; the others are the same code.
SIZES = (1, 3, 20, *(pytest.param(d, marks=pytest.mark.slow) for d in (2, 8)))


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


@pytest.mark.parametrize("d", [1, 6])
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


def test_no_lapack_and_no_host_in_public_functions():
    """Costs of two features have a closed form; the rest has the same code whatever d is."""
    d = 4
    gmm0, gmm1 = random_mixture(0, 3, d), random_mixture(1, 4, d)
    flat = random_mixture(0, 3, 2), random_mixture(1, 4, 2)
    pairs = [cg.GaussianMixturePair(gmm0, gmm1, epsilon=0.1, tau=tau) for tau in (1.0, 0.9)]
    x = np.random.RandomState(0).randn(20, d)
    packed = chunks.pack([x], [None], 10, jnp.float32)

    def cost(one, other):
        return jnp.sum(cg.bures_cost_matrix(one, other))

    def likelihood(gmm, points):
        return jnp.sum(gmm.log_prob(points))

    def plan_cost(pair):
        return cg.solve_plan(pair).regularized_cost

    def e_step(gmm):
        parameters = statistics.Parameters(gmm.means[None], gmm.cholesky[None], gmm.log_weights[None])
        return jnp.sum(statistics.likelihood(parameters, packed, jnp.ones((1, d))))

    slopes = jax.value_and_grad(cost, (0, 1))
    found = names_in(slopes, *flat) | names_in(slopes, gmm0, gmm1) | names_in(jax.value_and_grad(likelihood), gmm0, x)
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


class Examples:
    """Something of every public class, and how to call what is public: made once, and traced in the tests."""

    def __init__(self):
        gmm0, gmm1 = random_mixture(0, 3, 4), random_mixture(1, 4, 4)
        x = np.random.RandomState(0).randn(20, 4).astype(np.float32)
        key, steps = jax.random.key(0), {"em_steps": 2, "m_steps": 2}
        pairs = [cg.GaussianMixturePair(gmm0, gmm1, 0.1, tau) for tau in (1.0, 0.8)]
        graph = cg.MixtureGraph.from_mixtures([gmm0, gmm1], [(1, 0)], tau=0.8, edge_weights=0.1)
        # Of the shapes that they would have: nothing here depends on their values, and nothing has to be compiled for them.
        plans = jax.eval_shape(lambda: [*map(cg.solve_plan, pairs), cg.solve_plan(pairs[0], method="exact")])
        plans = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), plans)
        linked = cg.GaussianMixturePair(gmm0, gmm1, 0.1, links=cg.links((3, 4), forbidden=[(0, 1)]))
        self.instances = [gmm0, *pairs, linked, graph, *plans]
        fields = {"penalized_log_likelihood": None, "status": jnp.array(0), "n_steps": None, "history": None}
        course = unchecked(cg.PairFit, pair=pairs[0], plan=plans[0], **fields)
        self.functions = {
            "barycenter": lambda: cg.barycenter([gmm0, gmm1], gmm1, max_steps=2),
            "chain": lambda: cg.chain([gmm0, gmm1]),
            "grid": lambda: cg.grid([[gmm0, gmm1]] * 2),
            "star": lambda: cg.star(gmm0, [gmm1]),
            "trajectories": lambda: [cg.trajectories(course, x, [0.5], key=k) for k in (None, key)],
            "mixture_at": lambda: cg.mixture_at(course, 0.5),
            "bures_cost_matrix": lambda: cg.bures_cost_matrix(gmm0, gmm1),
            "fit_gmm": lambda: cg.fit_gmm(x, gmm0, max_steps=2),
            "fit_graph": lambda: cg.fit_graph([x, None], graph, **steps),
            "fit_pair": lambda: [cg.fit_pair(x, x, pair, transport_weight=0.1, **steps) for pair in pairs],
            "fit_path": lambda: cg.fit_path(x, x, pairs[0], transport_weights=[0.1, 1.0], **steps),
            "flow": lambda: [cg.flow(gmm0, gmm1, steps=2, optimizer=o) for o in (None, optax.adam)],
            "init_gmm": lambda: cg.init_gmm(key, x, 3),
            "interpolate": lambda: [cg.interpolate(plan, 0.5) for plan in plans],
            "map_points": lambda: [
                cg.map_points(plan, x, method=method, key=key) for plan in plans for method in ("barycentric", "random")
            ],
            "mw2_squared": lambda: [cg.mw2_squared(gmm0, gmm1), cg.mw2_squared(gmm0, gmm1, epsilon=0.1)],
            "penalized_log_likelihood": lambda: [
                cg.penalized_log_likelihood(pair, x, x, transport_weight=0.1) for pair in pairs
            ],
            "plan_density": lambda: cg.plan_density(plans[0], x, x, atol=0.1),
            "reduce_gmm": lambda: cg.reduce_gmm(key, gmm1, 2),
            "solve_plan": lambda: [
                *(cg.solve_plan(pair) for pair in (*pairs, linked)),
                *(cg.solve_plan(pair, method="exact") for pair in (pairs[0], linked)),
            ],
        }
        self.arguments = {
            "component_log_prob": (x,), "condition": ([0, 2], [0.1, 0.2]), "log_posterior": (x,), "log_prob": (x,),
            "marginal": ([0, 2],), "point_reweighting": (x,), "posterior_mean": (x, gmm0.weights),
            "predict": (x,), "replace": (gmm0, gmm1), "sample": (key, 5),
            "score": (x,), "aic": (x,), "bic": (x,), "split": (graph.nodes,),
        }  # fmt: skip


# What other libraries, files and the host do.
ELSEWHERE = {
    "bootstrap",
    "choose",
    "fit_classes",
    "links",
    "fit_gmms",
    "fit_pairs",
    "BuresCost",
    "from_ott",
    "from_sklearn",
    "init_gmms",
    "load",
    "mw2_matrix",
    "open_cloud",
    "save",
    "shard_cloud",
    "to_ott",
    "to_pot",
    "to_sklearn",
}
# Or of the host, or of OTT.
INTERNAL = {"check_densities", "fitted", "geometry", "message", "raise_if_failed", "status_name", "summary"}


@pytest.fixture(scope="module")
def examples():
    return Examples()


def is_public_function(name):
    return name[0].islower() and name not in ELSEWHERE


def low_products(program, *arguments):
    """Products in a program that are not in full precision."""
    leaves = jax.make_jaxpr(lambda *a: [leaf for leaf in jax.tree.leaves(program(*a)) if isinstance(leaf, jax.Array)])
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    return [what for precision, what in products(leaves(*arguments).jaxpr) if precision != highest]


@pytest.mark.parametrize("name", sorted(filter(is_public_function, cg.__all__)))
def test_products_of_functions_are_in_full_precision(examples, name):
    """A GPU rounds the factors of float32 products to 10 bits unless it is told not to."""
    assert name in examples.functions, "say how a new function is called"
    assert not low_products(examples.functions[name])


def test_products_of_methods_are_in_full_precision(examples):
    """Every property and method of every public class; those with arguments that are needed stand in a table."""
    low = {}
    for instance in examples.instances:
        cls = type(instance)
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(set(dir(cls)) - fields - INTERNAL):
            member = inspect.getattr_static(cls, name)
            if name.startswith("_") or isinstance(member, (classmethod, staticmethod)):
                continue

            def program(instance, name=name, member=member):
                found = getattr(instance, name)
                return found if isinstance(member, property) else found(*examples.arguments.get(name, ()))

            if bad := low_products(program, instance):
                low[f"{cls.__name__}.{name}"] = bad[:2]
    assert not low, sorted(low)


def test_products_of_derivatives_are_in_full_precision(examples):
    gmm0, pair, *_ = examples.instances
    x = examples.arguments["log_prob"][0]
    programs = {
        "log_prob": lambda gmm: jnp.sum(gmm.log_prob(x)),
        "log_posterior": lambda gmm: jnp.sum(gmm.log_posterior(x)),
        "exact": lambda gmm: cg.mw2_squared(gmm, pair.gmm1),
        "entropic": lambda gmm: cg.mw2_squared(gmm, pair.gmm1, epsilon=0.1),
        "plan": lambda gmm: jnp.sum(cg.solve_plan(pair.replace(gmm, pair.gmm1)).matrix),
        "cost": lambda gmm: cg.solve_plan(pair.replace(gmm, pair.gmm1)).regularized_cost,
        "J": lambda gmm: cg.penalized_log_likelihood(pair.replace(gmm, pair.gmm1), x, x, transport_weight=0.1),
    }
    assert not {name: low[:2] for name, program in programs.items() if (low := low_products(jax.grad(program), gmm0))}


def test_the_search_for_low_products_finds_them():
    assert low_products(lambda a: a @ a, jnp.eye(2))


def test_inverses_of_dominant_matrices(precision):
    rng = np.random.RandomState(0)
    for k in (1, 3, 4, 9):
        stochastic = rng.rand(2, k, k)
        matrix = 1.1 * np.eye(k) - stochastic / stochastic.sum(-1, keepdims=True)
        found = jax.jit(matrices.invert_dominant)(jnp.asarray(matrix))
        np.testing.assert_allclose(found, np.linalg.inv(matrix), atol=1e3 * precision)
