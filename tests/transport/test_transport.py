"""Exact and entropic transport against POT, SciPy and NumPy in float64; derivatives against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from problems import KINDS, random_covariances, random_moments
from twins import bures_costs, component_densities, gaussian_map, kl, posterior, primal, sinkhorn

import coupled_gmm as cg

SHAPES = [(1, 4, 1), (3, 3, 1), (6, 1, 2), (1, 1, 5), (5, 4, 3), (40, 33, 2), (20, 40, 8), (12, 7, 32)]


def over_shapes(n_pairs, *quick):
    """Parametrised by shape: some pairs of the quick shapes in every run, 25 of each (200 in all) in the slow one."""
    slow = [pytest.param(shape, 25, marks=pytest.mark.slow) for shape in SHAPES]
    return pytest.mark.parametrize(("shape", "n_pairs"), [(shape, n_pairs) for shape in quick] + slow)


def cases(shape, n_pairs):
    """Kinds, moments and mixtures, every kind in turn."""
    for i in range(n_pairs):
        kind = KINDS[i % len(KINDS)]
        ends = random_moments(100 * SHAPES.index(shape) + i, *shape, kind)
        yield kind, ends, [cg.GaussianMixture(*map(jnp.asarray, end)) for end in ends]


def moves(x, ends, matrix):
    """Images of points (J, n, d) by each move of a plan, the probability of each (J, n), and its components (J, 2)."""
    (means0, covariances0, weights0), (means1, covariances1, _) = ends
    cells = np.argwhere(matrix > 0)
    images = [gaussian_map(x, means0[k], covariances0[k], means1[i], covariances1[i]) for k, i in cells]
    shares = matrix / np.where(matrix.sum(1) > 0, matrix.sum(1), 1)[:, None]
    likely = posterior(x, means0, covariances0, weights0)
    return np.array(images), np.array([likely[:, k] * shares[k, i] for k, i in cells]), cells


@jax.jit
def solved_exactly(gmm0, gmm1):
    plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0), method="exact")
    return plan, plan.matrix, plan.transport_cost, plan.duality_gap


@over_shapes(5, (1, 4, 1), (5, 4, 3), (40, 33, 2), (12, 7, 32))
def test_exact_plans_equal_pot(x64, shape, n_pairs):
    """POT's costs where it has any, singular values where a covariance is singular; the network simplex in both cases."""
    for kind, ends, gmms in cases(shape, n_pairs):
        plan, matrix, cost, gap = solved_exactly(*gmms)
        (means0, covariances0, a), (means1, covariances1, b) = ends
        expected = bures_costs(means0, covariances0, means1, covariances1)
        if "singular" not in kind:
            np.testing.assert_allclose(
                ot.gmm.dist_bures_squared(means0, means1, covariances0, covariances1), expected, rtol=1e-10
            )
        value = ot.emd2(a, b, expected)
        np.testing.assert_allclose(plan.cost, expected, rtol=1e-8, atol=1e-8 * expected.max())
        np.testing.assert_allclose(cost, value, rtol=1e-8)
        if shape == SHAPES[4] or n_pairs > 5:  # another program with the same solver
            np.testing.assert_allclose(distance(*gmms), value, rtol=1e-8)
        np.testing.assert_allclose(matrix, ot.emd(a, b, expected), atol=1e-9)
        assert int(plan.status) == cg.Status.CONVERGED and abs(gap) <= 1e-12 * expected.max()


@jax.jit
def moved(gmm0, gmm1, x, y, atol, n_draws):
    plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0), method="exact")
    draws = cg.map_points(plan, jnp.repeat(x, len(n_draws), axis=0), method="random", key=jax.random.key(0))
    density = cg.plan_density(plan, x, y, atol=atol)
    return plan.matrix, cg.map_points(plan, x), draws.reshape(len(x), len(n_draws), -1), density


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning:ot")  # POT's own
@over_shapes(5, (5, 4, 3))
def test_maps_of_exact_plans_equal_pot(x64, shape, n_pairs):
    """The mean map, the law of the random one and the density of the plan, wherever gmm0 has one."""
    n_draws = 1000
    for kind, ends, gmms in cases(shape, n_pairs):
        if kind in ("singular source", "absent and singular"):
            continue
        means, covariances, weights = ends[0]
        rng = np.random.RandomState(0)
        x = np.array(
            [rng.multivariate_normal(means[k], covariances[k]) for k in rng.choice(len(weights), 4, p=weights)]
        )
        y = np.concatenate([x, 2 * rng.randn(3, shape[2])])
        atol = 0.1 + 1.5 * shape[2] ** 0.5
        matrix, mean, draws, density = map(np.asarray, moved(*gmms, x, y, atol, np.zeros(n_draws)))
        images, probability, cells = moves(x, ends, matrix)
        # A singular covariance is known up to rounding, its square root up to the root of that.
        atol_map = 1e-6 if kind == "singular target" else 1e-8
        np.testing.assert_allclose(mean, np.einsum("jn,jnd->nd", probability, images), atol=atol_map)
        near = np.linalg.norm(images[:, :, None] - y, axis=-1) < atol
        weight = (
            np.array([matrix[k, i] for k, i in cells])[:, None] * component_densities(x, *ends[0])[:, cells[:, 0]].T
        )
        expected = np.sum(weight[:, :, None] * near, axis=0)
        np.testing.assert_allclose(density, expected, rtol=1e-8, atol=1e-8 * weight.max())
        if kind == "regular":
            parts = [part for pair in zip(*ends) for part in pair]
            theirs = ot.gmm.gmm_ot_apply_map(x, *parts, plan=matrix)
            np.testing.assert_allclose(mean, theirs, atol=1e-8)
            theirs = ot.gmm.gmm_ot_plan_density(x, y, *parts, plan=matrix, atol=atol)
            np.testing.assert_allclose(density, theirs, rtol=1e-8, atol=1e-8 * weight.max())
        for point in range(len(x)):
            here, chance = images[:, point], probability[:, point]
            hits = np.linalg.norm(draws[point][:, None] - here, axis=-1) < 1e-6
            assert hits.any(axis=1).all(), "a point went where no move leads"
            same = np.linalg.norm(here[:, None] - here, axis=-1) < 1e-6
            expected = same @ chance
            deviation = np.sqrt(expected * np.maximum(1 - expected, 0) / n_draws)
            assert (np.abs(hits.mean(0) - expected) <= 5 * deviation + 5 / n_draws).all()


@functools.partial(jax.jit, static_argnames="tau")
def solved_at(gmm0, gmm1, shares, tol, tau=1.0):
    """Entropic plans with epsilons that are shares of the mean cost."""
    mean = gmm0.weights @ cg.bures_cost_matrix(gmm0, gmm1) @ gmm1.weights

    def one(share):
        plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, share * mean, tau), tol=tol)
        return plan, plan.marginal_error, plan.regularized_cost, plan.duality_gap

    return jax.vmap(one)(shares)


@over_shapes(5, (5, 4, 3))
def test_entropic_plans_converge(precision, shape, n_pairs):
    """In float32 potentials are known to some 1e-7 of the largest cost: at 1e-3 of the mean one that may not be enough."""
    double = precision < 1e-8
    shares = np.array([10, 1, 0.1, 1e-2, 1e-3] + [1e-4] * double)
    for kind, _, gmms in cases(shape, n_pairs):
        plan, error, *_ = solved_at(*gmms, shares, 1e-4)
        assert plan.cost.dtype == (jnp.float64 if double else jnp.float32)
        status, sure = np.asarray(plan.status), shares >= (0 if double else 1e-2)
        assert (status[sure] == cg.Status.CONVERGED).all(), (kind, status, error)
        assert ((status == cg.Status.CONVERGED) == (np.asarray(error) <= 1e-4)).all()
        assert np.isin(status, (cg.Status.CONVERGED, cg.Status.PRECISION)).all() and (error <= 1e-3).all()


@pytest.mark.slow
def test_plans_converge_at_every_small_epsilon(x64):
    """A problem whose row-sum equations alone lead the iteration round in circles."""
    *_, (_, _, gmms) = cases((12, 7, 32), 8)
    plan, error, *_ = solved_at(*gmms, 1e-4 * np.linspace(0.5, 2, 15), 1e-4)
    assert (np.asarray(plan.status) == cg.Status.CONVERGED).all(), (plan.n_iterations, error)
    assert (plan.n_iterations <= 200).all(), plan.n_iterations


@over_shapes(5, (5, 4, 3))
def test_regularized_cost_and_its_certificate(x64, shape, n_pairs):
    """The cost is that of a long Sinkhorn run; of a plan that is solved loosely, the gap says how far it may be off."""
    shares = np.array([10, 1, 0.1, 1e-2, 1e-3, 1e-4])
    small = max(shape) <= 6
    for _, (end0, end1), gmms in cases(shape, n_pairs):
        plan, _, best, _ = solved_at(*gmms, shares, 1e-9)
        assert (np.asarray(plan.status) == cg.Status.CONVERGED).all()
        scale = plan.cost.max() + np.asarray(plan.pair.epsilon)
        for tol in (1e-2, 1e-3, 1e-4):
            _, _, cost, gap = map(np.asarray, solved_at(*gmms, shares, tol))
            assert (np.abs(cost - best) <= gap + 1e-9 * scale).all(), (tol, cost - best, gap)
        for i, epsilon in enumerate(np.asarray(plan.pair.epsilon)[: 3 if small else 1]):
            cost = np.asarray(plan.cost[i])
            expected = primal(
                sinkhorn(cost, end0[2], end1[2], epsilon, np.inf), cost, end0[2], end1[2], epsilon, np.inf
            )
            np.testing.assert_allclose(best[i], expected, rtol=1e-6)


def transformed(gmm, rotation, shift, order):
    """The mixture turned, moved and with its components in another order."""
    return cg.GaussianMixture(
        gmm.means[order] @ rotation.T + shift, rotation @ gmm.covariances[order] @ rotation.T, gmm.weights[order]
    )


distance = jax.jit(cg.mw2_squared)


@pytest.mark.parametrize(("k", "d"), [(5, 1), (9, 2), (7, 32)])
def test_a_mixture_is_at_no_distance_from_itself(k, d):
    """In float32, whatever is singular or absent, far from the origin, and with components far from each other."""
    for i, kind in enumerate(KINDS):
        for offset, spread in ((0, 1), (1e4, 1), (0, 1e4)):
            means, covariances, weights = random_moments(i, k, k, d, kind.replace("target", "source"))[0]
            gmm = cg.GaussianMixture(*(jnp.asarray(a) for a in (spread * means + offset, covariances, weights)))
            trace = weights @ np.trace(covariances, axis1=1, axis2=2)
            assert 0 <= distance(gmm, gmm) <= 1e-6 * trace, (kind, offset, spread)


def test_distance_is_a_metric_that_ignores_coordinates(x64):
    """Symmetric, with the triangle inequality, also where it is tight; unchanged by a motion and by a reordering."""
    rng = np.random.RandomState(0)
    for i, kind in enumerate(KINDS):
        gmms = [
            cg.GaussianMixture(*map(jnp.asarray, random_moments(10 * i + j, 5, 5, 3, kind)[j % 2])) for j in range(3)
        ]
        first, second, third = gmms
        sides = np.sqrt([distance(first, second), distance(second, third), distance(first, third)])
        assert (2 * sides.max() <= sides.sum() + 1e-12).all()
        np.testing.assert_allclose(distance(second, first), sides[0] ** 2, rtol=1e-8)
        rotation, shift = np.linalg.qr(rng.randn(3, 3))[0], 3 * rng.randn(3)
        ends = [transformed(gmm, rotation, shift, rng.permutation(5)) for gmm in (first, second)]
        np.testing.assert_allclose(distance(*ends), sides[0] ** 2, rtol=1e-8)
        steps = [transformed(first, np.eye(3), s * shift, np.arange(5)) for s in (1, 3)]
        np.testing.assert_allclose(
            [distance(first, steps[0]), distance(first, steps[1]), distance(*steps)],
            np.array([1, 9, 4]) * (shift @ shift),
            rtol=1e-8,
        )


K0, K1 = 3, 4
FACTORS = np.random.RandomState(9).randn(3, K0, K1)
# Steps of finite differences whose error is the fourth (third) power of the step; values at the point itself come first.
AROUND, AHEAD = np.array([0, -2e-3, -1e-3, 1e-3, 2e-3]), np.array([0, 1e-4, 2e-4, 3e-4, 4e-4])


def around(v):
    return (v[1] - 8 * v[2] + 8 * v[3] - v[4]) / 12e-3


def ahead(v):
    return (-11 * v[0] + 18 * v[1] - 9 * v[2] + 2 * v[3]) / 6e-4


def numbers_of(plan):
    forward, backward = plan.conditionals()
    return {
        "cost": plan.regularized_cost,
        "transport": plan.transport_cost,
        "matrix": jnp.sum(FACTORS[0] * plan.matrix),
        "parts": jnp.sum(FACTORS[1] * forward + FACTORS[2] * backward),
    }


def unbalanced_numbers(problem):
    """What a plan says, of (gmm0, gmm1, epsilon, rho)."""
    plan = cg.solve_plan(cg.GaussianMixturePair.from_rho(*problem), tol=1e-13)
    return numbers_of(plan) | {"mass": plan.total_mass, "price": plan.mass_penalty}


def balanced_numbers(problem):
    return numbers_of(cg.solve_plan(cg.GaussianMixturePair(*problem[:3]), tol=1e-13))


def distances(problem):
    return {"exact": cg.mw2_squared(*problem[:2]), "entropic": cg.mw2_squared(*problem[:2], epsilon=problem[2])}


def exact_distance(problem):
    return {"exact": cg.mw2_squared(*problem[:2])}


def normalized(problem):
    gmm0, gmm1, epsilon, rho = problem
    plan = cg.solve_plan(cg.GaussianMixturePair.from_rho(gmm0, gmm1, epsilon, rho), tol=1e-13)
    return {"parts": plan.normalized_cost}


def smooth_problem(d, absent=False):
    """Mixtures, epsilon and rho; in NumPy, where nothing is compiled."""
    gmms = []
    for k, weights in ((K0, [0.4, 0.0, 0.6]), (K1, [0.3, 0.3, 0.4, 0.0])):
        rng = np.random.RandomState(k)
        means, covariances = 2 * rng.randn(k, d), random_covariances(rng, k, d, 10)
        weights = np.array(weights) if absent else rng.dirichlet(np.full(k, 2.0))
        gmms.append(cg.GaussianMixture(means, covariances, weights))
    return (*gmms, np.asarray(2.0), np.asarray(5.0))


def edge_problems(d):
    """Equal, singular and zero covariances, absent ones too: where a division or a root might not be finite."""
    gmm0, gmm1, epsilon, rho = smooth_problem(d, absent=True)
    halves = [np.concatenate([leaf, leaf[:1]]) for leaf in (gmm0.means, gmm0.covariances, gmm0.weights)]
    halves[2] = halves[2] * [0.5, 1, 1, 0.5]

    def with_covariance(gmm, k, covariance):
        covariances = gmm.covariances.copy()
        covariances[k] = covariance
        return cg.GaussianMixture(gmm.means, covariances, gmm.weights)

    singular, dirac = with_covariance(gmm1, 0, np.diag(np.eye(d)[0])), with_covariance(gmm0, 0, 0)
    pairs = [(gmm0, cg.GaussianMixture(*halves)), (gmm0, singular), (gmm0, with_covariance(gmm1, 3, 0))]
    return [(*pair, epsilon, rho) for pair in (*pairs, (dirac, gmm1), (dirac, singular))]


ALONG = ["means0", "means1", "covariances0", "covariances1", "weights0", "weights1", "epsilon", "rho"]
INTO = ["into0", "into1"] * 4  # mass, into components that have none; as many as above, for one compilation


def changes(problem, names):
    """A stack of changes of the problem; weights move along sums of zero, among components that have mass."""
    rng = np.random.RandomState(0)
    stack = []
    for name in names:
        change = jax.tree.map(lambda leaf: np.zeros(leaf.shape), problem)
        if name in ("epsilon", "rho"):
            change = (*change[:2], np.asarray(0.3 * (name == "epsilon")), np.asarray(0.3 * (name == "rho")))
        else:
            side, field = int(name[-1]), "weights" if name.startswith("into") else name[:-1]
            step = rng.randn(*getattr(problem[side], field).shape)
            weights = np.asarray(problem[side].weights)
            if field == "covariances":
                step = 5e-3 * (step + step.swapaxes(1, 2))
            if field == "weights":
                step = 1.0 * (weights == 0) if name.startswith("into") else 0.05 * step * (weights > 0)
                step -= weights * step.sum()
            object.__setattr__(change[side], field, step)
        stack.append(change)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *stack)


@functools.partial(jax.jit, static_argnames="values")
def slopes(values, problem, steps, stencil):
    """Gradients; slopes along the steps by reverse mode, by forward mode, and values on the stencil."""
    gradients = jax.jacrev(values)(problem)

    def along(step):
        return {
            name: sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, step)))
            for name, gradient in gradients.items()
        }

    on_stencil, forward = on_stencil_of(values, problem, steps, stencil)
    return gradients, jax.vmap(along)(steps), forward, on_stencil


def on_stencil_of(function, problem, steps, stencil):
    """Values (stencil, steps) of a function, and its slopes along the steps where the stencil begins."""

    def at(far, step):
        return jax.jvp(function, (jax.tree.map(lambda x, dx: x + far * dx, problem, step),), (step,))

    n = len(steps[2])
    values, forward = jax.vmap(at)(
        jnp.repeat(stencil, n), jax.tree.map(lambda a: jnp.concatenate([a] * len(stencil)), steps)
    )
    values = jax.tree.map(lambda a: a.reshape(len(stencil), n, *a.shape[1:]), values)
    return values, jax.tree.map(lambda slope: slope[:n], forward)


@pytest.mark.parametrize(
    ("values", "d"),
    [
        (unbalanced_numbers, 1),
        (exact_distance, 3),
        # The derivatives of balanced potentials are in the test of second derivatives as well.
        *(pytest.param(balanced_numbers, d, marks=pytest.mark.slow) for d in (1, 2, 3)),
        *(pytest.param(unbalanced_numbers, d, marks=pytest.mark.slow) for d in (2, 3)),
        *(pytest.param(values, d, marks=pytest.mark.slow) for values in (distances, normalized) for d in (1, 3)),
    ],
)
def test_derivatives_equal_finite_differences(x64, values, d):
    """Both modes, in all of both mixtures, epsilon and rho; into components that have no mass; finite at the edges."""
    for absent in (False, True):
        problem = smooth_problem(d, absent)
        _, reverse, forward, found = slopes(values, problem, changes(problem, ALONG), AROUND)
        for name in reverse:
            expected = around(np.asarray(found[name]))
            scale = np.abs(expected).max()
            assert scale > 1e-3, "nothing changes"
            np.testing.assert_allclose(reverse[name], expected, atol=1e-7 * scale, err_msg=name)
            np.testing.assert_allclose(forward[name], reverse[name], atol=1e-10 * scale, err_msg=name)
    # What has been divided by masses is read with their logarithms, which have no derivative there.
    _, reverse, forward, found = slopes(values, problem, changes(problem, INTO), AHEAD)
    for name in reverse:
        expected = ahead(np.asarray(found[name]))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(forward[name], reverse[name], atol=1e-10 * scale, err_msg=name)
        if "parts" not in name:
            np.testing.assert_allclose(reverse[name], expected, atol=1e-5 * scale, err_msg=name)
    for problem in edge_problems(d):
        gradients, _, forward, _ = slopes(values, problem, changes(problem, ALONG), AROUND)
        for path, leaf in jax.tree_util.tree_leaves_with_path((gradients, forward)):
            assert np.isfinite(np.asarray(leaf)).all(), jax.tree_util.keystr(path)


# At XLA's level 0 and without its fusion emitters, as tests/conftest.py asks, the forward derivatives come out wrong in the
# third digit; at any other level, or with the emitters, all agree to 1e-14. A wrong program tells nothing about the formulas.
@functools.partial(jax.jit, static_argnames="both", compiler_options={"xla_backend_optimization_level": 1})
def curvatures(problem, steps, both):
    """How the gradient of the regularised costs changes: forward over reverse, reverse over reverse, and on the stencil.

    There also the values, and the gradient itself along the steps.
    """

    def value(problem):
        gmm0, gmm1, epsilon, rho = problem
        pairs = cg.GaussianMixturePair(gmm0, gmm1, epsilon), cg.GaussianMixturePair.from_rho(gmm0, gmm1, epsilon, rho)
        return sum(cg.solve_plan(pair, tol=1e-13).regularized_cost for pair in pairs)

    gradient = jax.value_and_grad(value)

    def inner(gradient, step):
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, step)))

    def along(problem, step):
        return inner(gradient(problem)[1], step)

    (values, gradients), (_, forward) = on_stencil_of(gradient, problem, steps, AROUND)
    reverse = jax.vmap(lambda step: jax.grad(along)(problem, step))(steps) if both else forward
    first = jax.vmap(inner)(jax.tree.map(lambda leaf: leaf[0], gradients), steps)
    return forward, reverse, gradients, first, values


@pytest.mark.parametrize(
    ("d", "both"),
    [(2, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, True), (2, True), (3, False)))],
)
def test_second_derivatives_equal_finite_differences(x64, d, both):
    """Of the regularised costs, in everything, and the first ones, which the envelope theorem gives.

    Beyond two dimensions the polar factor's loop has forward derivatives only.
    """
    for absent in (False, True):
        problem = smooth_problem(d, absent)
        *found, first, values = curvatures(problem, changes(problem, ALONG), both)
        expected = around(np.asarray(values))
        np.testing.assert_allclose(first, expected, atol=1e-7 * np.abs(expected).max())
        for (path, one), other, values in zip(
            jax.tree_util.tree_leaves_with_path(found[0]), *map(jax.tree.leaves, found[1:])
        ):
            one, other, expected = np.asarray(one), np.asarray(other), around(np.asarray(values))
            scale, name = np.abs(expected).max(), jax.tree_util.keystr(path)
            np.testing.assert_allclose(other, one, atol=1e-10 * scale, err_msg=name)
            if "weights" in name:  # a constant in them is free: masses move against each other
                one, expected = (v - v.mean(1, keepdims=True) for v in (one, expected))
            np.testing.assert_allclose(one, expected, atol=1e-7 * scale, err_msg=name)


def batch_of(n, k0, k1, d):
    """n pairs of moments, a quarter of them with an absent component on either side."""
    rng = np.random.RandomState(0)
    ends = []
    for k in (k0, k1):
        weights = rng.dirichlet(np.full(k, 2.0), n)
        weights[: n // 4, 0] = 0
        covariances = random_covariances(rng, n * k, d).reshape(n, k, d, d)
        ends.append((2 * rng.randn(n, k, d), covariances, weights / weights.sum(1, keepdims=True)))
    return ends


@jax.jit
def unbalanced(gmms, epsilon_share, rho_share, tol):
    """What unbalanced plans say, with epsilon and rho as shares of the mean cost."""

    def one(gmm0, gmm1, epsilon_share, rho_share):
        mean = gmm0.weights @ cg.bures_cost_matrix(gmm0, gmm1) @ gmm1.weights
        pair = cg.GaussianMixturePair.from_rho(gmm0, gmm1, epsilon_share * mean, rho_share * mean)
        plan = cg.solve_plan(pair, tol=tol)
        said = {"mass": plan.total_mass, "cost": plan.regularized_cost, "total": plan.cost_parts.total}
        said |= {"normalized": plan.normalized_cost, "price": plan.mass_penalty, "bound": plan.cost_bound}
        return plan, said | {"matrix": plan.matrix, "parts": plan.cost_parts}

    return jax.vmap(one)(*gmms, epsilon_share, rho_share)


def test_parts_of_unbalanced_costs(precision):
    """A hundred problems, with next to nothing moved to nearly all of it, add up as API.md and the docstrings say."""
    n = 100
    rng, ends = np.random.RandomState(1), batch_of(n, 3, 4, 2)
    gmms = [cg.GaussianMixture(*map(jnp.asarray, end)) for end in ends]
    shares = 10 ** rng.uniform(-2, 1, n), 10 ** rng.uniform(-2, 4, n)
    plan, said = unbalanced(gmms, *shares, 1e-4 if precision > 1e-8 else 1e-12)
    said = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), said)
    mass, cost, price, bound = (said[name] for name in ("mass", "cost", "price", "bound"))
    assert mass.min() < 0.1 and mass.max() > 0.999, "a narrow choice of problems"
    assert (mass <= 1 + 4 * precision).all()
    np.testing.assert_allclose(mass * said["normalized"] + price, cost, rtol=1e-5)
    np.testing.assert_allclose(said["total"], cost, rtol=4 * precision)
    assert (price <= cost * (1 + 1e-6)).all() and (cost <= bound * (1 + 1e-6)).all()
    if precision < 1e-8:  # only there is a plan as good as optimal
        np.testing.assert_allclose(cost, bound * (1 - mass), rtol=1e-7)
    costs = np.asarray(plan.cost, np.float64)
    epsilon, rho = np.asarray(plan.pair.epsilon, np.float64), np.asarray(plan.pair.rho, np.float64)
    for i in range(n):
        matrix, a, b = said["matrix"][i], *(np.asarray(gmm.weights[i], np.float64) for gmm in gmms)
        for flows, name in ((matrix, "parts"), (matrix / matrix.sum(), "normalized")):
            parts = [
                np.sum(flows * costs[i]),
                epsilon[i] * kl(flows, a[:, None] * b),
                rho[i] * kl(flows.sum(1), a),
                rho[i] * kl(flows.sum(0), b),
            ]
            if name == "parts":
                found = [getattr(said[name], part)[i] for part in ("transport", "entropy", "outflow", "inflow")]
                np.testing.assert_allclose(found, parts, atol=1e-5 * sum(parts))
            else:
                np.testing.assert_allclose(said[name][i], sum(parts), rtol=1e-5)


def test_unbalanced_costs_tend_to_the_balanced_ones(x64):
    """The nearer tau is to 1: first order in 1 - tau. Balanced plans change no masses, and nothing bounds their cost."""
    gmm0, gmm1 = (cg.GaussianMixture(*(leaf[-1] for leaf in end)) for end in batch_of(1, 3, 4, 2))

    def read(tau):
        plan = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0, tau), tol=1e-12)
        said = {"penalty": plan.mass_penalty, "bound": plan.cost_bound, "parts": plan.cost_parts}
        return jnp.stack([plan.regularized_cost, plan.transport_cost, plan.normalized_cost]), said

    (costs, said), (expected, balanced) = jax.jit(lambda tau: (jax.vmap(read)(tau), read(1)))(
        1 - np.array([1e-4, 1e-6])
    )
    differences = costs - expected
    assert (np.abs(differences[1]) < 1e-3 * np.abs(expected)).all()
    np.testing.assert_allclose(differences[0], 100 * differences[1], rtol=0.05)
    assert (np.asarray(said["penalty"]) > 0).all() and np.isfinite(said["bound"]).all()
    parts = balanced["parts"]
    assert balanced["penalty"] == 0 and balanced["bound"] == np.inf
    assert parts.outflow == 0 and parts.inflow == 0 and parts.transport > 0 and parts.entropy > 0
    np.testing.assert_allclose([parts.transport + parts.entropy, expected[2]], expected[0], rtol=1e-9)


@pytest.mark.slow
def test_a_batch_equals_a_loop(x64):
    """Every function of plans, under jit and vmap, interpolation over its time as well."""
    n, times = 4, np.array([0, 0.3, 1])
    gmms = [cg.GaussianMixture(*end) for end in batch_of(n, 3, 4, 2)]
    x = np.random.RandomState(0).randn(6, 2)

    def everything(gmm0, gmm1):
        exact = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0), method="exact")
        entropic = cg.solve_plan(cg.GaussianMixturePair(gmm0, gmm1, 1.0, 0.9), tol=1e-11)
        return {
            "costs": [cg.bures_cost_matrix(gmm0, gmm1), cg.mw2_squared(gmm0, gmm1)],
            "plans": [(p.matrix, p.regularized_cost, p.status, p.conditionals()) for p in (exact, entropic)],
            "means": cg.map_points(exact, x),
            "draws": cg.map_points(entropic, x, method="random", key=jax.random.key(0)),
            "density": cg.plan_density(exact, x, x, atol=2.0),
            "between": jax.vmap(lambda t: cg.interpolate(exact, t))(times),
        }

    batched, one = jax.jit(jax.vmap(everything))(*gmms), jax.jit(everything)
    for i in range(n):
        row, alone = (jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (batched, gmms))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), row, one(*alone))
