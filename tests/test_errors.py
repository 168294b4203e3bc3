"""Bad input is refused before any program is entered; the message names the argument and what to do."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import coupled_gmm as cg
from coupled_gmm.batch import stacks, tiles
from coupled_gmm.core.tree import unchecked
from coupled_gmm.courses import chains, densities
from coupled_gmm.courses import points as trajectory_points
from coupled_gmm.fits import coupled, gmm, pairs, penalized
from coupled_gmm.selection import paths, replicates
from coupled_gmm.transport import maps, solvers

NAN, INF = np.nan, np.inf
EYES = np.broadcast_to(np.eye(2), (2, 2, 2))
MEANS, WEIGHTS = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([0.25, 0.75])
X = np.random.RandomState(0).randn(20, 2)
ONES = np.ones(20)
PROGRAMS = [
    (pairs, "_begin_pair"),
    (pairs, "_go_on_with_pair"),
    (pairs, "_fit_pairs"),
    (penalized, "_value_of_pair"),
    (coupled, "_begin_graph"),
    (coupled, "_go_on_with_graph"),
    (coupled, "_fit_graphs"),
    (gmm, "_fit"),
    (gmm, "_init"),
    (stacks, "_fits"),
    (tiles, "_costs"),
    (paths, "_path"),
    (replicates, "_refits"),
    (solvers, "_solve_plan"),
    (solvers, "_solve_exactly"),
    (solvers, "_mw2_squared"),
    (maps, "_map_barycentric"),
    (maps, "_map_random"),
    (maps, "_interpolate"),
    (maps, "_plan_density"),
    (chains, "_chain"),
    (densities, "_mixture_at"),
    (trajectory_points, "_along"),
]


@functools.cache
def good() -> SimpleNamespace:
    """Legal arguments, for the others of a call."""
    mixture = moments()
    singular = moments(covariances=[np.eye(2), np.ones((2, 2))])
    line = cg.GaussianMixture.from_moments([[0.0]], [[[1.0]]], [1.0])
    pair = cg.GaussianMixturePair(mixture, mixture, 1.0)
    zeros = jnp.zeros(2)
    plan = cg.Plan(pair, jnp.zeros((2, 2)), (zeros, zeros), jnp.array(0), jnp.array(0))
    return SimpleNamespace(
        key=jax.random.key(0),
        mixture=mixture,
        singular=singular,
        line=line,
        pair=pair,
        plan=plan,
        flat_plan=dataclasses.replace(plan, pair=cg.GaussianMixturePair(singular, mixture, 1.0)),
        singular_pair=cg.GaussianMixturePair(mixture, singular, 1.0),
    )


def moments(means=MEANS, covariances=EYES, weights=WEIGHTS):
    return cg.GaussianMixture.from_moments(means, covariances, weights)


def x_with(value: float) -> np.ndarray:
    x = X.copy()
    x[3, 1] = value
    return x


def weights_with(value: float) -> np.ndarray:
    weights = ONES.copy()
    weights[3] = value
    return weights


def init(**changes):
    arguments = {"key": good().key, "x": X, "n_components": 3, **changes}
    return cg.init_gmm(**arguments)


def fit_gmm(**changes):
    arguments = {"x": X, "init": good().mixture, **changes}
    return cg.fit_gmm(**arguments)


def going_on(k=2, entropy=0.1, mass=20.0, **changes):
    eyes, zeros = np.array([np.eye(2)] * k), np.zeros((k, 2))
    leaves = (np.float32(mass), np.ones(k) / k, zeros, zeros, eyes, np.float32(entropy))
    return fit_gmm(**{"statistics": cg.MixtureStatistics(*map(jnp.asarray, leaves)), **changes})


def fit_gmms(**changes):
    arguments = {"clouds": [X, X], "inits": good().mixture, **changes}
    return cg.fit_gmms(**arguments)


def init_gmms(**changes):
    arguments = {"key": good().key, "clouds": [X, X], "n_components": 3, **changes}
    return cg.init_gmms(**arguments)


def fit_pairs(**changes):
    arguments = {"clouds0": [X], "clouds1": [X], "pairs": good().pair, "transport_weight": 0.1, **changes}
    return cg.fit_pairs(**arguments)


def bootstrap(**changes):
    arguments = {"key": good().key, "fit": pair_fit(), "clouds": [X, X], **changes}
    return cg.bootstrap(**arguments)


def pair_fit(**changes):
    """As `fit_pair` returns it, without a program."""
    plan, steps = good().plan, jnp.array(1)
    fit = cg.PairFit(good().pair, plan, jnp.array(-3.0), jnp.array(0), steps, None, transport_weights=jnp.array(0.1))
    return dataclasses.replace(fit, **changes)


def choose(**changes):
    arguments = {"clouds": [X, X], "graph_or_key": good().key, "n_components": [1, 2], "folds": 2, **changes}
    return cg.choose(**arguments)


def make_pair(epsilon=1.0, tau=1.0, gmm0=None, gmm1=None):
    return cg.GaussianMixturePair(gmm0 or good().mixture, gmm1 or good().mixture, epsilon, tau)


def from_rho(rho):
    return cg.GaussianMixturePair.from_rho(good().mixture, good().mixture, 1.0, rho)


def solve(**changes):
    arguments = {"pair": good().pair, **changes}
    return cg.solve_plan(**arguments)


def distance(**changes):
    arguments = {"gmm0": good().mixture, "gmm1": good().mixture, **changes}
    return cg.mw2_squared(**arguments)


def map_points(**changes):
    arguments = {"plan": good().plan, "x": X, **changes}
    return cg.map_points(**arguments)


def density(**changes):
    arguments = {"plan": good().plan, "x": X, "y": X, "atol": 0.1, **changes}
    return cg.plan_density(**arguments)


def interpolate(t, plan=None):
    return cg.interpolate(plan or good().plan, t)


def course() -> cg.PairFit:
    fields = {"penalized_log_likelihood": None, "status": jnp.array(0), "n_steps": None, "history": None}
    return unchecked(cg.PairFit, pair=good().pair, plan=good().plan, **fields)


def trajectories(x=X, times=(0.5,), **options):
    return cg.trajectories(course(), x, times, **options)


def mixture_at(t, **options):
    return cg.mixture_at(course(), t, **options)


def fit_pair(**changes):
    arguments = {"x0": X, "x1": X, "pair": good().pair, "transport_weight": 0.1, **changes}
    return cg.fit_pair(**arguments)


def objective(**changes):
    arguments = {"pair": good().pair, "x0": X, "x1": X, "transport_weight": 0.1, **changes}
    return cg.penalized_log_likelihood(**arguments)


def graph(gmms=None, edges=((0, 1),), **options):
    return cg.MixtureGraph.from_mixtures(gmms or [good().mixture] * 2, edges, **options)


def fit_graph(clouds=(X, X), given=None, **options):
    return cg.fit_graph(clouds, given or graph(), **options)


def under_jit(call):
    """`call` with a pair of traced epsilon."""
    return jax.jit(lambda epsilon: call(make_pair(epsilon)).status)(1.0)


MOMENTS = [
    ("ragged", lambda: moments(means=[[0, 0], [1]]), ValueError, "^means: .*rows of unequal length"),
    ("rank", lambda: moments(means=[0.0, 1.0]), ValueError, r"^means: expected shape \(K, d\), .*reshape it to 2 axes"),
    ("none", lambda: moments(means=None), TypeError, "^means: expected real numbers.*convert"),
    ("complex", lambda: moments(means=MEANS + 1j), TypeError, "^means: expected real numbers, .*complex.*convert"),
    ("nan-mean", lambda: moments(means=[[NAN, 0], [1, 1]]), ValueError, "^means: 1 of 4 values are NaN .*replace"),
    ("no-components", lambda: moments(np.zeros((0, 2)), np.zeros((0, 2, 2)), []), ValueError, "^means: .*empty"),
    (
        "too-large",
        lambda: moments(means=[[1e300, 0], [1, 1]]),
        ValueError,
        r"^means: 1 of 4 values, up to 1e\+300, exceed what float32 holds",
    ),
    (
        "strings",
        lambda: moments(covariances=np.full((2, 2, 2), "a")),
        TypeError,
        "^covariances: .*convert it to floats",
    ),
    ("cov-rank", lambda: moments(covariances=np.ones((2, 2))), ValueError, "^covariances: .*reshape it to 3 axes"),
    ("cov-d", lambda: moments(covariances=np.ones((2, 3, 3))), ValueError, "^covariances: .*axis 1 must have size 2"),
    (
        "cov-inf",
        lambda: moments(covariances=np.full((2, 2, 2), INF)),
        ValueError,
        "^covariances: .*NaN or infinite; remove or replace",
    ),
    (
        "asymmetric",
        lambda: moments(covariances=[np.eye(2), [[1, 0.5], [0, 1]]]),
        ValueError,
        r"^covariances: component 1 is not symmetric; pass \(S \+ S\.T\) / 2",
    ),
    (
        "indefinite",
        lambda: moments(covariances=[np.eye(2), [[1, 2], [2, 1]]]),
        ValueError,
        "^covariances: component 1 is indefinite .*-1.*clip its negative eigenvalues",
    ),
    ("negative-weight", lambda: moments(weights=[1.5, -0.5]), ValueError, "^weights: 1 .*negative.*at least 0"),
    (
        "zero-weights",
        lambda: moments(weights=[0, 0]),
        ValueError,
        "^weights: all .*zero; at least one must be positive",
    ),
    ("nan-weight", lambda: moments(weights=[NAN, 1]), ValueError, "^weights: 1 of 2 values are NaN"),
    (
        "weights-sum",
        lambda: moments(weights=[0.5, 0.4]),
        ValueError,
        "^weights: must sum to 1 .*0.9; divide by the sum",
    ),
    ("weights-size", lambda: moments(weights=[1.0]), ValueError, "^weights: .*axis 0 must have size 2"),
]

METHODS = [
    ("log-prob-d", lambda: good().mixture.log_prob(np.ones((3, 3))), ValueError, "^x: .*axis 1 must have size 2"),
    ("log-prob-rank", lambda: good().mixture.log_prob([0, 0]), ValueError, "^x: .*reshape it to 2 axes"),
    (
        "log-prob-nan",
        lambda: good().mixture.log_prob(x_with(NAN)),
        ValueError,
        "^x: 1 of 40 .*NaN.*remove those points",
    ),
    (
        "log-prob-singular",
        lambda: good().singular.log_prob(X),
        ValueError,
        "^gmm: component 1 .*singular.*multiple of the",
    ),
    (
        "posterior-singular",
        lambda: good().singular.log_posterior(X),
        ValueError,
        "^gmm: component 1 .*drop the component",
    ),
    ("sample-float", lambda: good().mixture.sample(good().key, 2.5), TypeError, "^n: expected an integer, got 2.5"),
    (
        "sample-many",
        lambda: good().mixture.sample(good().key, 10**12),
        ValueError,
        "^n: must be at most 536870911, got 10000",
    ),
    ("sample-none", lambda: good().mixture.sample(good().key, 0), ValueError, "^n: must be at least 1, got 0"),
    (
        "sample-seed",
        lambda: good().mixture.sample(0, 3),
        TypeError,
        r"^key: expected a random key, .*jax.random.key\(0\)",
    ),
    (
        "sample-keys",
        lambda: good().mixture.sample(jax.random.split(good().key), 3),
        ValueError,
        r"^key: expected one random key, got an array of shape \(2,\); pass one",
    ),
    ("axes-repeat", lambda: good().mixture.marginal([0, 0]), ValueError, "^axes: expected distinct features between 0"),
    ("axes-range", lambda: good().mixture.marginal([2]), ValueError, r"^axes: .*between 0 and 1, got \[2\]"),
    ("axes-none", lambda: good().mixture.marginal([]), ValueError, r"^axes: expected distinct features"),
    (
        "axes-float",
        lambda: good().mixture.marginal([0.5]),
        TypeError,
        r"^axes: expected a sequence of integers such as",
    ),
    ("axes-mask", lambda: good().mixture.marginal([True, False]), TypeError, "^axes: expected a sequence of integers"),
    (
        "axes-integer",
        lambda: good().mixture.marginal(0),
        TypeError,
        r"^axes: expected a sequence of integers such as \[",
    ),
    ("condition-all", lambda: good().mixture.condition([0, 1], [0, 1]), ValueError, "^axes: all .*leave at least one"),
    ("condition-size", lambda: good().mixture.condition([0], [0, 1]), ValueError, "^values: .*must have size 1"),
    ("condition-nan", lambda: good().mixture.condition([0], [NAN]), ValueError, "^values: 1 of 1 .*NaN.*replace"),
    (
        "condition-singular",
        lambda: moments(covariances=[np.eye(2), np.diag([0, 1])]).condition([0], [1.0]),
        ValueError,
        r"^marginal over axes \[0\]: component 1 has a singular covariance",
    ),
]

SINGLE = [
    ("init-key", lambda: init(key=7), TypeError, r"^key: expected a random key, got int; pass jax.random.key\(0\)"),
    (
        "init-inf",
        lambda: init(x=x_with(INF)),
        ValueError,
        "^x: 1 of 40 values are NaN or infinite; remove those points",
    ),
    ("init-float", lambda: init(n_components=2.5), TypeError, "^n_components: expected an integer, got 2.5"),
    ("init-zero", lambda: init(n_components=0), ValueError, "^n_components: must be at least 1, got 0"),
    ("init-one-point", lambda: init(x=np.ones((20, 2))), ValueError, "^n_components: 3 .* x has 1; lower n_components"),
    (
        "init-weighted-out",
        lambda: init(point_weights=[1, 1] + 18 * [0]),
        ValueError,
        "^n_components: 3 .*distinct points of positive weight, x has 2; lower",
    ),
    ("init-weights", lambda: init(point_weights=-ONES), ValueError, "^point_weights: 20 .*negative.* at least 0"),
    ("init-many", lambda: init(n_init=10**9), ValueError, "^n_init: must be at most 10000, got 1000000000"),
    ("init-large", lambda: init(n_components=10**12), ValueError, "^n_components: must be at most 2147483647"),
    ("init-draws", lambda: init(n_init=0), ValueError, "^n_init: must be at least 1"),
    ("init-ridge", lambda: init(ridge=-1), ValueError, "^ridge: must be finite and at least 0, got -1"),
    ("fit-init", lambda: fit_gmm(init=X), TypeError, "^init: expected a GaussianMixture, got ndarray"),
    ("fit-d", lambda: fit_gmm(x=np.ones((20, 3))), ValueError, "^x: .*axis 1 must have size 2"),
    (
        "fit-singular",
        lambda: fit_gmm(init=good().singular, ridge=0),
        ValueError,
        "^init: component 1 .*singular.*add a small",
    ),
    ("fit-weights-zero", lambda: fit_gmm(point_weights=0 * ONES), ValueError, "^point_weights: all weights are zero"),
    ("fit-weights-size", lambda: fit_gmm(point_weights=ONES[1:]), ValueError, "^point_weights: .*must have size 20"),
    ("fit-weights-nan", lambda: fit_gmm(point_weights=weights_with(NAN)), ValueError, "^point_weights: 1 of 20 .*NaN"),
    (
        "fit-many",
        lambda: fit_gmm(max_steps=10**12),
        ValueError,
        "^max_steps: must be at most 1000000, got 1000000000000",
    ),
    (
        "fit-forgets",
        lambda: fit_gmm(forgetting=0.1),
        ValueError,
        "^forgetting: there are no earlier data .*statistics=",
    ),
    ("fit-rate", lambda: going_on(forgetting=1.5), ValueError, "^forgetting: must be .*at most 1, got 1.5"),
    ("fit-rate-nan", lambda: going_on(forgetting=NAN), ValueError, "^forgetting: must be .*got nan"),
    ("fit-statistics", lambda: going_on(statistics=X), TypeError, "^statistics: expected a MixtureStatistics"),
    (
        "fit-statistics-k",
        lambda: going_on(k=3),
        ValueError,
        "^statistics: are of 3 components of 2 features, and init is of 2",
    ),
    (
        "fit-statistics-d",
        lambda: going_on(x=X[:, :1], init=good().line),
        ValueError,
        "^statistics: .* init is of 1 of 1",
    ),
    ("fit-statistics-nan", lambda: going_on(entropy=NAN), ValueError, "^statistics: are not finite.*failed"),
    ("fit-statistics-mass", lambda: going_on(mass=0.0), ValueError, "^statistics: mass must be above 0"),
    (
        "fit-statistics-init",
        lambda: going_on(init=2, key=good().key),
        ValueError,
        "^init: statistics go with one mixture",
    ),
    ("fit-statistics-inits", lambda: going_on(init=2 * [good().mixture]), ValueError, "^init: statistics go with one"),
    (
        "fit-statistics-absent",
        lambda: going_on(init=moments(weights=[1, 0])),
        ValueError,
        "^statistics: component 1 has",
    ),
    ("fit-starts", lambda: fit_gmm(init=2, key=good().key, n_init=10**9), ValueError, "^n_init: must be at most 10000"),
    ("fit-steps", lambda: fit_gmm(max_steps=0), ValueError, "^max_steps: must be at least 1, got 0"),
    ("fit-tol", lambda: fit_gmm(tol=-1), ValueError, "^tol: must be finite and at least 0, got -1"),
    ("fit-tol-nan", lambda: fit_gmm(tol=NAN), ValueError, "^tol: must be finite and at least 0, got nan"),
    ("fit-ridge", lambda: fit_gmm(ridge="1e-6"), TypeError, "^ridge: expected a real number, got '1e-6'"),
]

PAIRS = [
    ("pair-kind", lambda: make_pair(gmm1=X.tolist()), TypeError, "^gmm1: expected a GaussianMixture, got list"),
    (
        "pair-d",
        lambda: make_pair(gmm1=good().line),
        ValueError,
        "^gmm1: has 1 features and gmm0 has 2; .*take a marginal",
    ),
    ("epsilon-zero", lambda: make_pair(0), ValueError, "^epsilon: must be finite and above 0, got 0"),
    ("epsilon-nan", lambda: make_pair(NAN), ValueError, "^epsilon: must be finite and above 0, got nan"),
    ("epsilon-inf", lambda: make_pair(INF), ValueError, "^epsilon: must be finite and above 0, got inf"),
    (
        "epsilon-digits",
        lambda: make_pair(10**400),
        TypeError,
        "^epsilon: expected a real number, got a number of some 401 di",
    ),
    (
        "epsilon-large",
        lambda: make_pair(10**40),
        ValueError,
        r"^epsilon: 1e\+40 is out of the range of float32; .*enable flo",
    ),
    (
        "epsilon-little",
        lambda: make_pair(1e-50),
        ValueError,
        "^epsilon: 1e-50 is out of the range of float32; .*enable flo",
    ),
    ("epsilon-text", lambda: make_pair("1"), TypeError, "^epsilon: expected a real number, got '1'"),
    ("epsilon-texts", lambda: make_pair(["1"]), TypeError, r"^epsilon: expected a real number, got \['1'\]"),
    ("epsilon-ragged", lambda: make_pair([[1], [1, 2]]), TypeError, "^epsilon: expected a real number"),
    ("epsilon-complex", lambda: make_pair(1j), TypeError, "^epsilon: expected one real number, got complex"),
    ("tau-zero", lambda: make_pair(tau=0), ValueError, "^tau: must be above 0 and at most 1, got 0"),
    ("tau-above", lambda: make_pair(tau=1.1), ValueError, "^tau: must be above 0 and at most 1, got 1.1"),
    ("tau-none", lambda: make_pair(tau=None), TypeError, "^tau: expected a real number, got None"),
    ("rho-zero", lambda: from_rho(0), ValueError, "^rho: must be above 0, got 0"),
    ("rho-negative", lambda: from_rho(-1), ValueError, "^rho: must be above 0, got -1"),
    ("rho-nan", lambda: from_rho(NAN), ValueError, "^rho: must be above 0, got nan"),
    ("costs-kind", lambda: cg.bures_cost_matrix(good().mixture, X), TypeError, "^gmm1: expected a GaussianMixture"),
    (
        "costs-d",
        lambda: cg.bures_cost_matrix(good().mixture, good().line),
        ValueError,
        "^gmm1: has 1 features and gmm0 has 2; .*take a marginal of one",
    ),
    (
        "plan-kind",
        lambda: solve(pair=good().mixture),
        TypeError,
        "^pair: expected a GaussianMixturePair, got GaussianMix",
    ),
    ("plan-method", lambda: solve(method="newton"), ValueError, "^method: expected one of 'entropic', .*got 'newton'"),
    ("plan-methods", lambda: solve(method=["entropic"]), ValueError, r"^method: expected one of .*got \['entropic'\]"),
    ("plan-tol", lambda: solve(tol=0), ValueError, "^tol: must be finite and above 0, got 0"),
    ("plan-iterations", lambda: solve(max_iterations=0), ValueError, "^max_iterations: must be at least 1, got 0"),
    ("plan-float", lambda: solve(max_iterations=1e3), TypeError, "^max_iterations: expected an integer, got 1000.0"),
    (
        "plan-init",
        lambda: solve(init=np.zeros(2)),
        TypeError,
        r"^init: expected potentials \(f, g\) as in plan.potentials",
    ),
    ("plan-init-size", lambda: solve(init=(np.zeros(2), np.zeros(3))), ValueError, r"^init\[1\]: .*must have size 2"),
    (
        "plan-init-nan",
        lambda: solve(init=(np.zeros(2), [0, NAN])),
        ValueError,
        r"^init\[1\]: .*pass None to start from",
    ),
    (
        "sinkhorn-traced",
        lambda: under_jit(lambda pair: cg.solve_plan(pair, method="sinkhorn")),
        ValueError,
        "^method: 'sinkhorn' needs values of epsilon .*use 'entropic' under jit",
    ),
]

MAPS = [
    ("distance-kind", lambda: distance(gmm1=X), TypeError, "^gmm1: expected a GaussianMixture, got ndarray"),
    (
        "distance-d",
        lambda: distance(gmm1=good().line),
        ValueError,
        "^gmm1: has 1 features and gmm0 has 2; .*take a marg",
    ),
    ("distance-epsilon", lambda: distance(epsilon=0), ValueError, "^epsilon: must be finite and above 0, got 0"),
    ("distance-texts", lambda: distance(epsilon="1"), TypeError, "^epsilon: expected a real number, got '1'"),
    (
        "exact-unbalanced",
        lambda: solve(pair=make_pair(tau=0.5), method="exact"),
        ValueError,
        "^method: 'exact' is for balanced transport; build the pair with tau = 1, or use 'entropic'",
    ),
    (
        "exact-traced",
        lambda: jax.jit(lambda tau: cg.solve_plan(make_pair(tau=tau), method="exact").status)(1.0),
        ValueError,
        "^method: 'exact' is for balanced transport; build the pair with tau = 1",
    ),
    ("map-plan", lambda: map_points(plan=good().pair), TypeError, "^plan: expected a Plan, got GaussianMixturePair"),
    (
        "map-method",
        lambda: map_points(method="mean"),
        ValueError,
        "^method: expected one of 'barycentric', 'random', got",
    ),
    (
        "map-no-key",
        lambda: map_points(method="random"),
        ValueError,
        r"^key: method 'random' draws at random; pass a key such as jax.random.key\(0\)",
    ),
    ("map-seed", lambda: map_points(method="random", key=0), TypeError, "^key: expected a random key, got int; pass"),
    ("map-d", lambda: map_points(x=np.ones((20, 3))), ValueError, "^x: .*axis 1 must have size 2"),
    ("map-one-point", lambda: map_points(x=[0, 0]), ValueError, "^x: .*reshape it to 2 axes"),
    ("map-nan", lambda: map_points(x=x_with(NAN)), ValueError, "^x: 1 of 40 .*NaN or infinite; remove those points"),
    ("t-above", lambda: interpolate(1.5), ValueError, "^t: must be at least 0 and at most 1, got 1.5"),
    ("t-below", lambda: interpolate(-0.1), ValueError, "^t: must be at least 0 and at most 1, got -0.1"),
    ("t-nan", lambda: interpolate(NAN), ValueError, "^t: must be at least 0 and at most 1, got nan"),
    ("t-none", lambda: interpolate(None), TypeError, "^t: expected a real number, got None"),
    ("t-several", lambda: interpolate([0, 1]), TypeError, r"^t: expected one real number, got list of shape \(2,\)"),
    ("t-plan", lambda: interpolate(0.5, good().pair), TypeError, "^plan: expected a Plan, got GaussianMixturePair"),
    ("density-atol", lambda: density(atol=0), ValueError, "^atol: must be finite and above 0, got 0"),
    ("density-negative", lambda: density(atol=-1), ValueError, "^atol: must be finite and above 0, got -1"),
    ("density-y", lambda: density(y=np.ones((20, 3))), ValueError, "^y: .*axis 1 must have size 2"),
    ("density-x", lambda: density(x=x_with(INF)), ValueError, "^x: 1 of 40 .*remove those points"),
    (
        "density-singular",
        lambda: density(plan=good().flat_plan),
        ValueError,
        "^plan.pair.gmm0: component 1 has a singular covariance and no density; add a small multiple",
    ),
]

FITS = [
    (
        "pair",
        lambda: fit_pair(pair=good().mixture),
        TypeError,
        "^pair: expected a GaussianMixturePair, got GaussianMix",
    ),
    (
        "singular",
        lambda: fit_pair(pair=good().singular_pair, ridge=0),
        ValueError,
        "^pair.gmm1: component 1 .*singular.*add a small",
    ),
    (
        "x0-nan",
        lambda: fit_pair(x0=x_with(NAN)),
        ValueError,
        "^x0: 1 of 40 values are NaN or infinite; remove those points",
    ),
    ("x1-inf", lambda: fit_pair(x1=x_with(-INF)), ValueError, "^x1: 1 of 40 .*point weight 0"),
    ("x0-rank", lambda: fit_pair(x0=X[:, 0]), ValueError, "^x0: .*reshape it to 2 axes"),
    ("x1-d", lambda: fit_pair(x1=np.ones((20, 3))), ValueError, "^x1: .*axis 1 must have size 2"),
    ("x1-ragged", lambda: fit_pair(x1=[[1, 2], [3]]), ValueError, "^x1: .*rows of unequal length"),
    ("x1-empty", lambda: fit_pair(x1=X[:0]), ValueError, "^x1: .*axis 0 is empty"),
    ("x1-text", lambda: fit_pair(x1=X.astype(str)), TypeError, "^x1: expected real numbers, .*convert it to floats"),
    (
        "weights0",
        lambda: fit_pair(point_weights0=weights_with(-1)),
        ValueError,
        "^point_weights0: 1 .*negative.*at least 0",
    ),
    ("weights1", lambda: fit_pair(point_weights1=ONES[:, None]), ValueError, "^point_weights1: .*reshape it to 1 axes"),
    ("weight", lambda: fit_pair(transport_weight=-1), ValueError, "^transport_weight: must be finite and at least 0"),
    (
        "weight-none",
        lambda: fit_pair(transport_weight=None),
        ValueError,
        "^transport_weight: is missing; pass relative_weight",
    ),
    ("weight-two", lambda: fit_pair(relative_weight=1), ValueError, "^transport_weight: given beside relative_weight"),
    ("em-steps", lambda: fit_pair(em_steps=0), ValueError, "^em_steps: must be at least 1, got 0"),
    ("em-float", lambda: fit_pair(em_steps=5.0), TypeError, "^em_steps: expected an integer, got 5.0"),
    ("m-steps", lambda: fit_pair(m_steps=0), ValueError, "^m_steps: must be at least 1, got 0"),
    ("m-bool", lambda: fit_pair(m_steps=True), TypeError, "^m_steps: expected an integer, got True"),
    ("em-many", lambda: fit_pair(em_steps=10**12), ValueError, "^em_steps: must be at most 1000000, got 1000000000000"),
    ("m-many", lambda: fit_pair(m_steps=10**12), ValueError, "^m_steps: must be at most 1000000, got 1000000000000"),
    (
        "m-digits",
        lambda: fit_pair(m_steps=10**5000),
        ValueError,
        "^m_steps: must be at most 1000000, got a number of some",
    ),
    ("chunk-large", lambda: fit_pair(chunk_size=10**12), ValueError, "^chunk_size: must be at most 2147483647"),
    (
        "weight-large",
        lambda: fit_pair(transport_weight=1e300),
        ValueError,
        r"^transport_weight: 1e\+300 is out of the range of",
    ),
    (
        "weight-digits",
        lambda: fit_pair(transport_weight=10**5000),
        TypeError,
        "^transport_weight: expected a real number, got a",
    ),
    ("optimizer", lambda: fit_pair(optimizer="adam"), TypeError, "^optimizer: expected None, an optax factory such as"),
    ("no-rate", lambda: fit_pair(optimizer=optax.adam), ValueError, "^learning_rate: .*needs one; pass learning_rate="),
    (
        "rate",
        lambda: fit_pair(learning_rate=0.1),
        ValueError,
        "^learning_rate: goes with an optax factory only.*drop it",
    ),
    (
        "built-rate",
        lambda: fit_pair(optimizer=optax.adam(0.1), learning_rate=0.1),
        ValueError,
        "^learning_rate: goes with an optax factory only.*drop it",
    ),
    (
        "rate-zero",
        lambda: fit_pair(optimizer=optax.adam, learning_rate=0),
        ValueError,
        "^learning_rate: must be finite and above 0, got 0",
    ),
    ("tol", lambda: fit_pair(tol=-1e-3), ValueError, "^tol: must be finite and at least 0"),
    ("freeze", lambda: fit_pair(freeze=("gmm2",)), ValueError, "^freeze: expected a collection of 'gmm0' and 'gmm1'"),
    ("freeze-text", lambda: fit_pair(freeze="gmm0"), ValueError, "^freeze: expected a collection of 'gmm0' and 'gmm1'"),
    ("freeze-none", lambda: fit_pair(freeze=None), (TypeError, ValueError), "^freeze: expected a collection of 'gmm0'"),
    ("ridge", lambda: fit_pair(ridge=-1), ValueError, "^ridge: must be finite and at least 0"),
    ("method", lambda: fit_pair(method="newton"), ValueError, "^method: expected one of 'entropic', 'sinkhorn'"),
    (
        "exact",
        lambda: fit_pair(method="exact"),
        ValueError,
        "^method: expected one of 'entropic', 'sinkhorn', got 'exact'",
    ),
    ("chunk", lambda: fit_pair(chunk_size=0), ValueError, "^chunk_size: must be at least 1, got 0"),
    ("progress", lambda: fit_pair(progress="yes"), TypeError, "^progress: expected True, False or a callable"),
    (
        "sinkhorn",
        lambda: under_jit(lambda pair: fit_pair(pair=pair, method="sinkhorn")),
        ValueError,
        "^method: 'sinkhorn' needs values .*use 'entropic' under jit",
    ),
    ("value-swapped", lambda: objective(pair=X), TypeError, "^pair: expected a GaussianMixturePair, got ndarray"),
    ("value-singular", lambda: objective(pair=good().singular_pair), ValueError, "^pair.gmm1: component 1 .*singular"),
    ("value-nan", lambda: objective(x1=x_with(NAN)), ValueError, "^x1: 1 of 40 .*remove those points"),
    (
        "value-weight",
        lambda: objective(transport_weight=NAN),
        ValueError,
        "^transport_weight: must be finite and at lea",
    ),
    ("value-weights", lambda: objective(point_weights0=0 * ONES), ValueError, "^point_weights0: all weights are zero"),
]

COURSES = [
    ("time", lambda: mixture_at(1.5), ValueError, "^t: 1.5 is outside of the chain's times, 0 to 1; a path is known"),
    ("nan", lambda: mixture_at(NAN), ValueError, "^t: must be .*got nan"),
    ("times", lambda: mixture_at([0.5]), TypeError, "^t: expected one real number"),
    ("ends", lambda: mixture_at(0.5, ends="clamped"), ValueError, "^ends: expected one of 'parabolic'"),
    ("fit", lambda: cg.mixture_at(good().plan, 0.5), TypeError, "^fit: expected a GraphFit or a PairFit, got Plan"),
    ("late", lambda: trajectories(times=[0, 2]), ValueError, "^times: 2 is outside"),
    ("points", lambda: trajectories(x_with(NAN)), ValueError, "^x: 1 of 40 values are NaN"),
    ("features", lambda: trajectories(X[:, :1]), ValueError, r"^x: expected shape \(n, 2\)"),
    ("key", lambda: trajectories(key=0), TypeError, "^key: expected a random key"),
    ("method", lambda: trajectories(method="cubic"), ValueError, "^method: expected one of 'spline', 'geodesic'"),
]


GRAPHS = [
    ("none", lambda: cg.MixtureGraph.from_mixtures([], []), ValueError, "^gmms: .*empty; a graph needs at least one"),
    ("kind", lambda: graph([good().mixture, X]), TypeError, r"^gmms\[1\]: expected a GaussianMixture, got ndarray"),
    ("one", lambda: graph(good().mixture, []), TypeError, "^gmms: expected"),
    ("d", lambda: graph([good().mixture, good().line]), ValueError, "has 1 features and .* has 2; .*take a marginal"),
    (
        "edge",
        lambda: graph(edges=[(0, 2)]),
        ValueError,
        r"^edges: \(0, 2\) does not join two of the 2 nodes; use indices",
    ),
    ("loop", lambda: graph(edges=[(1, 1)]), ValueError, r"^edges: \(1, 1\) does not join two of the 2 nodes"),
    ("flat-edges", lambda: graph(edges=[0, 1]), (TypeError, ValueError), "^edges: "),
    ("float-edge", lambda: graph(edges=[(0, 0.5)]), (TypeError, ValueError), "^edges: "),
    ("frozen", lambda: graph(frozen=[2]), ValueError, "^frozen: there is no node 2; use indices from 0 to 1"),
    ("frozen-float", lambda: graph(frozen=[0.5]), (TypeError, ValueError), "^frozen: "),
    ("weight", lambda: graph(edge_weights=-1), ValueError, "^edge_weights: must be finite and at least 0"),
    ("weights-size", lambda: graph(edge_weights=[1, 1]), ValueError, "^edge_weights: .*one for each of the 1 edges"),
    ("epsilon", lambda: graph(epsilon=0), ValueError, "^epsilon: must be finite and above 0"),
    ("tau", lambda: graph(tau=2), ValueError, "^tau: must be above 0 and at most 1, got 2"),
    ("node-weights", lambda: graph(node_weights=[1]), ValueError, "^node_weights: .*must have size 2"),
    (
        "fit-kind",
        lambda: fit_graph(given=good().mixture),
        TypeError,
        "^graph: expected a MixtureGraph, got GaussianMix",
    ),
    ("clouds", lambda: fit_graph([X]), ValueError, "^clouds: expected one for each of the 2 nodes .*got 1"),
    ("clouds-none", lambda: fit_graph(None), (TypeError, ValueError), "^clouds: expected"),
    ("cloud", lambda: fit_graph([X, x_with(NAN)]), ValueError, r"^clouds\[1\]: 1 of 40 .*remove those points"),
    (
        "weights",
        lambda: fit_graph(point_weights=[None]),
        ValueError,
        "^point_weights: expected one for each of the 2 nodes",
    ),
    ("weights-none", lambda: fit_graph([X, None], point_weights=[None, ONES]), ValueError, r"^point_weights\[1\]: "),
    (
        "singular",
        lambda: fit_graph(given=graph([good().mixture, good().singular]), ridge=0),
        ValueError,
        "^node 1: .*singular",
    ),
    ("steps", lambda: fit_graph(em_steps=0), ValueError, "^em_steps: must be at least 1"),
]


BATCHES = [
    ("none", lambda: fit_gmms(clouds=[]), ValueError, "^clouds: the list is empty"),
    ("cloud", lambda: fit_gmms(clouds=[X, x_with(NAN)]), ValueError, r"^clouds\[1\]: 1 of 40 .*remove those points"),
    ("features", lambda: fit_gmms(clouds=[X, X[:, :1]]), ValueError, r"^clouds\[1\]: expected shape"),
    ("inits", lambda: fit_gmms(inits=[good().mixture]), ValueError, "^inits: expected one for each of the 2 clouds"),
    ("kind", lambda: fit_gmms(inits=[good().mixture, 3]), TypeError, r"^inits\[1\]: expected a GaussianMixture"),
    ("number", lambda: fit_gmms(inits=3), TypeError, "^inits: expected a list, got int"),
    ("singular", lambda: fit_gmms(inits=good().singular, ridge=0), ValueError, r"^inits\[0\]: .*singular"),
    ("weights", lambda: fit_gmms(point_weights=[ONES]), ValueError, "^point_weights: expected one for each of the 2"),
    (
        "weight",
        lambda: fit_gmms(point_weights=[None, weights_with(-1)]),
        ValueError,
        r"^point_weights\[1\]: 1 weights are neg",
    ),
    ("steps", lambda: fit_gmms(max_steps=0), ValueError, "^max_steps: must be at least 1"),
    ("tol", lambda: fit_gmms(tol=[0.1, 0.1]), ValueError, "^tol: expected one number for all clouds"),
    ("ridge", lambda: fit_gmms(ridge=-1), ValueError, "^ridge: must be finite and at least 0"),
    ("executor", lambda: fit_gmms(executor=3), TypeError, "^executor: expected an Executor"),
    ("traced", lambda: jax.jit(lambda x: fit_gmms(clouds=[x, x]))(X), ValueError, "^clouds: arguments are traced"),
    ("key", lambda: init_gmms(key=3), TypeError, "^key: expected a random key"),
    ("counts", lambda: init_gmms(n_components=[3]), ValueError, "^n_components: expected one for each of the 2 clouds"),
    ("count", lambda: init_gmms(n_components=[3, 0]), ValueError, r"^n_components\[1\]: must be at least 1"),
    ("true", lambda: init_gmms(n_components=[True, 2]), TypeError, r"^n_components\[0\]: expected an integer"),
    ("distinct", lambda: init_gmms(n_components=21), ValueError, r"^n_components: 21 .*clouds\[0\] has 20"),
    ("n_init", lambda: init_gmms(n_init=0), ValueError, "^n_init: must be at least 1"),
    ("pair", lambda: fit_pairs(pairs=[3]), TypeError, r"^pairs\[0\]: expected a GaussianMixturePair"),
    ("price", lambda: fit_pairs(transport_weight=[1.0, 2.0]), ValueError, "^transport_weight: expected one number"),
]


SELECTION = [
    ("fit", lambda: bootstrap(fit=good().pair), TypeError, "^fit: expected a PairFit or a GraphFit"),
    ("failed", lambda: bootstrap(fit=pair_fit(status=jnp.array(4))), ValueError, "^fit: has no usable result"),
    (
        "weightless",
        lambda: bootstrap(fit=pair_fit(transport_weights=None)),
        ValueError,
        "^transport_weight: .* pass it",
    ),
    ("clouds", lambda: bootstrap(clouds=[X]), ValueError, "^clouds: expected one for each of the 2"),
    ("no clouds", lambda: bootstrap(clouds=[None, None]), ValueError, "^clouds: every one is None"),
    ("NaN", lambda: bootstrap(clouds=[X, x_with(NAN)]), ValueError, r"^clouds\[1\]: 1 of 40 values"),
    ("level", lambda: bootstrap(level=1.0), ValueError, "^level: must be below 1"),
    ("replicates", lambda: bootstrap(n_replicates=1), ValueError, "^n_replicates: must be at least 2"),
    ("key", lambda: bootstrap(key=0), TypeError, "^key: expected a random key"),
    ("graph", lambda: bootstrap(graph=3), ValueError, "^graph: goes with the fit of a graph"),
    ("freeze", lambda: bootstrap(freeze=["gmm2"]), ValueError, "^freeze: expected"),
    ("traced", lambda: jax.jit(lambda x: bootstrap(clouds=[x, x]).level)(X), ValueError, "^fit: arguments are traced"),
    ("no graph", lambda: choose(graph_or_key=3), TypeError, "^graph_or_key: expected a MixtureGraph or a random key"),
    ("two keys", lambda: choose(key=good().key), ValueError, "^key: goes with a graph"),
    ("one cloud", lambda: choose(clouds=[X]), ValueError, "^clouds: expected two or more"),
    ("None", lambda: choose(clouds=[X, None]), ValueError, "^clouds: expected two or more, all with points"),
    ("folds", lambda: choose(folds=1), ValueError, "^folds: must be at least 2"),
    (
        "many folds",
        lambda: choose(folds=11),
        ValueError,
        r"^folds: clouds\[0\] has 20 points .* 11 folds need two each",
    ),
    ("no sizes", lambda: choose(n_components=[]), ValueError, "^n_components: the list is empty"),
    (
        "many",
        lambda: choose(n_components=[11]),
        ValueError,
        "^n_components: 11 components, and the smallest cloud has 20",
    ),
    ("no weights", lambda: choose(relative_weights=[]), ValueError, "^relative_weights: the list is empty"),
    (
        "weights",
        lambda: choose(relative_weights=[-0.1]),
        ValueError,
        "^relative_weights: must be finite and at least 0",
    ),
    ("epsilons", lambda: choose(epsilons=[0.0]), ValueError, "^epsilons: must be finite and above 0"),
    ("rhos", lambda: choose(rhos=[]), ValueError, "^rhos: the list is empty"),
    ("rule", lambda: choose(rule="two"), ValueError, "^rule: expected one of"),
    ("held out", lambda: choose(held_out="clouds"), ValueError, "^held_out: expected one of"),
    ("nodes", lambda: choose(held_out="nodes"), ValueError, "^held_out: no node that has a cloud"),
    (
        "traced choice",
        lambda: jax.jit(lambda x: choose(clouds=[x, x]).row)(X),
        ValueError,
        "^clouds: arguments are traced",
    ),
]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(*case, id=f"{name}-{case_name}")
        for name, cases in [
            ("moments", MOMENTS),
            ("methods", METHODS),
            ("single", SINGLE),
            ("pairs", PAIRS),
            ("maps", MAPS),
            ("fits", FITS),
            ("graphs", GRAPHS),
            ("batches", BATCHES),
            ("courses", COURSES),
            ("selection", SELECTION),
        ]
        for case_name, *case in cases
    ],
)
@pytest.mark.filterwarnings("ignore:x. features .* are constant")  # said of one point before it is refused
def test_refused_before_any_program_is_entered(call, error, message, monkeypatch):
    entered = []
    for module, name in PROGRAMS:
        monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: entered.append(name))
    with pytest.raises(error, match=message):
        call()
    assert not entered


class Entered(Exception):
    pass


def test_every_program_is_watched():
    """The refusals above would prove nothing if the legal arguments did not enter the programs under those names."""
    calls = {"_value_of_pair": objective}
    calls |= {"_begin_pair": fit_pair, "_begin_graph": fit_graph}
    calls |= {"_go_on_with_pair": fit_pair, "_go_on_with_graph": fit_graph}
    calls |= {"_fit": fit_gmm, "_init": init, "_solve_plan": solve, "_mw2_squared": distance}
    calls |= {"_solve_exactly": lambda: solve(method="exact"), "_map_barycentric": map_points}
    calls |= {"_map_random": lambda: map_points(method="random", key=good().key)}
    calls |= {"_fit_graphs": lambda: fit_graph(n_init=2, key=good().key)}
    calls |= {"_fit_pairs": lambda: fit_pair(n_init=2, key=good().key)}
    calls |= {"_fits": fit_gmms, "_costs": lambda: cg.mw2_matrix([good().mixture])}
    calls |= {"_path": choose, "_refits": bootstrap}
    calls |= {"_interpolate": lambda: interpolate(0.5), "_plan_density": density}
    calls |= dict.fromkeys(("_chain", "_mixture_at"), lambda: mixture_at(0.5)) | {"_along": trajectories}

    def enter(*args, **kwargs):
        raise Entered

    for module, name in PROGRAMS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, enter)
            with pytest.raises(Entered):
                calls[name]()


def test_a_refusal_compiles_no_fit():
    programs = [getattr(module, name) for module, name in PROGRAMS]
    before = [program._cache_size() for program in programs]
    for call in (lambda: fit_pair(freeze=("gmm2",)), lambda: fit_gmm(tol=NAN), lambda: solve(method="newton")):
        with pytest.raises(ValueError):
            call()
    assert [program._cache_size() for program in programs] == before
