"""Costs, plans and maps between given mixtures beside OTT's and POT's, in one process.

    python benchmarks/transport.py [cost] [exact] [entropic] [maps] [--out results.json]

Times are the best of a few runs, by turns, so that a slow moment of the machine meets all; the first call, with compilation,
stands apart. Ours are jitted, and float32 unless a table says otherwise; POT computes in float64.
"""

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import ot
from ott.geometry import costs, geometry, pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn
from rich.console import Console
from rich.table import Table

import coupled_gmm as cg
from coupled_gmm.gaussians import bures
from coupled_gmm.transport import exact, limits, network_simplex, solvers
from coupled_gmm.transport.pair import transport_problem

console = Console(width=140)
SHAPES, EPSILONS, TOL = ((3, 3), (10, 12), (40, 40)), (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4), 1e-4  # of entropic plans


class Timing(NamedTuple):
    first: float
    warm: float
    value: Any = None


def by_turns(calls: dict[str, Callable], runs: int = 3, budget: float = 1.0) -> dict[str, Timing]:
    """Every call in turn, in `runs` rounds after the first and in more until those took `budget` seconds.

    A first call of POT, which compiles nothing, remains the only one if it took ten seconds.
    """
    spent, values = {name: [] for name in calls}, {}
    for turn in itertools.count():
        for name, call in calls.items():
            if turn == 0 or not name.startswith("POT") or spent[name][0] < 10:
                start = time.perf_counter()
                values[name] = jax.block_until_ready(call())
                spent[name].append(time.perf_counter() - start)
        if turn >= runs and sum(sum(s[1:]) for s in spent.values()) > budget:
            return {name: Timing(s[0], min(s[1:] or s), values[name]) for name, s in spent.items()}


def report(results: dict, table: Table, label: str, timings: dict, base: str, last: dict, unit: float = 1.0) -> None:
    """A row for each call: first and warm time, its ratio to that of `base`, and one more number of `last`."""
    for name, (first, warm, _) in timings.items():
        ratio = warm / timings[base].warm
        numbers = {"first": first, "warm": warm, "ratio": ratio, str(table.columns[-1].header): last.get(name)}
        results[f"{table.title}: {label}, {name}"] = numbers
        shown = f"{last[name]:.1e}" if name in last else ""
        table.add_row(label, name, f"{first:.3g}", f"{warm / unit:.3g}", f"{ratio:.2f}", shown)
    table.add_section()


def mixtures(k0: int, k1: int, d: int, seed: int = 0) -> tuple[cg.GaussianMixture, cg.GaussianMixture]:
    """Two random mixtures; covariances have trace d and condition number 100."""
    both, rng = [], np.random.RandomState(seed)
    for k, shift in ((k0, 0.0), (k1, 1.0)):
        frames, values = np.linalg.qr(rng.randn(k, d, d))[0], 0.01 ** rng.rand(k, d)
        values[:, 0], values[:, -1] = 1, 0.01
        covariances = np.einsum("kij,kj,klj->kil", frames, d * values / values.sum(1, keepdims=True), frames)
        means, weights = 2 * rng.randn(k, d) + shift, rng.dirichlet(np.full(k, 2.0))
        both.append(cg.GaussianMixture.from_moments(means, covariances, weights))
    return both[0], both[1]


def reference_cost(means0, means1, covariances0, covariances1) -> np.ndarray:
    """Bures costs of the same numbers from float64 singular values, row by row."""
    factors0, factors1 = np.linalg.cholesky(covariances0), np.linalg.cholesky(covariances1)
    cross = np.stack([np.linalg.svd(factor.T @ factors1, compute_uv=False).sum(-1) for factor in factors0])
    traces0, traces1 = (np.trace(c, axis1=1, axis2=2) for c in (covariances0, covariances1))
    return ((means0[:, None] - means1) ** 2).sum(-1) + traces0[:, None] + traces1 - 2 * cross


def cost_matrices(results: dict, shapes=((50, 8), (100, 16), (200, 32)), narrow: int = 512) -> None:
    table = Table("K x K, d", "", "first, s", "warm, s", "over ours", "largest error / mean", title="Cost matrices")
    for k, d in shapes:
        gmm0, gmm1 = mixtures(k, k, d)
        moments = [moment for both in zip(*map(cg.to_pot, (gmm0, gmm1))) for moment in both][:4]
        theirs = jax.jit(lambda x, y, d=d: pointcloud.PointCloud(x, y, cost_fn=costs.Bures(d)).cost_matrix)
        calls = {
            "ours": partial(jax.jit(cg.bures_cost_matrix), gmm0, gmm1),
            "OTT": partial(theirs, bures.pack(gmm0), bures.pack(gmm1)),
            "POT": partial(ot.gmm.dist_bures_squared, *moments),
        }
        timings, right = by_turns(calls, budget=2.0), reference_cost(*moments)
        errors = {n: float(np.abs(np.asarray(t.value, float) - right).max() / right.mean()) for n, t in timings.items()}
        report(results, table, f"{k} x {k}, {d}", timings, "ours", errors)
    console.print(table)
    log_density(results, narrow)


def log_density(results: dict, d: int, variance: float = 0.01) -> None:
    """Of a narrow Gaussian in many dimensions, whose determinant no floating-point number holds."""
    x = np.sqrt(variance) * np.random.RandomState(0).randn(5, d).astype(np.float32)
    mean, covariance = np.zeros((1, d)), variance * np.eye(d)[None]
    right = -0.5 * ((x.astype(float) ** 2).sum(1) / variance + d * math.log(2 * math.pi * variance))
    ours = cg.GaussianMixture.from_moments(mean, covariance, [1.0]).log_prob(x)
    theirs = ot.gmm.gaussian_logpdf(x.astype(float), mean[0], covariance[0])
    for name, value in (("ours", np.asarray(ours, float)), ("POT", theirs)):
        error = results[f"log-density at d {d}, {name}"] = float(np.max(np.abs(value / right - 1)))
        console.print(f"log-density of N(0, {variance:g} I), d {d}, {name}: {value[0]:.7g}, relative error {error:.1e}")


def exact_plans(results: dict, sizes=(3, 10, 20, 40, 64, 100, 200), in_xla: int = 100, n_batch: int = 64) -> None:
    """In XLA up to `in_xla` components; batches up to 64, where `solve_plan` turns to the callback."""
    columns = ("K", "", "first, s", "warm, ms a problem", "over POT", "values differ")
    table = Table(*columns, title=f"Exact plans, float64; batches of {n_batch} problems are vmapped, POT's looped over")
    rng, limit = np.random.RandomState(2), limits.MAX_ITERATIONS["exact"]
    xla = jax.jit(lambda *problem: exact.solve(*problem, limit)[0].matrix)
    host = jax.jit(lambda *problem: network_simplex.solve(*problem, limit).matrix)
    vmapped = jax.jit(jax.vmap(xla))
    with jax.enable_x64(True):
        whole = np.asarray(cg.bures_cost_matrix(*mixtures(max(sizes), max(sizes), 4)))
        for k in sizes:
            cells = [np.ix_(rng.permutation(len(whole))[:k], rng.permutation(len(whole))[:k]) for _ in range(n_batch)]
            cost, a, b = np.stack([whole[cell] for cell in cells]), *rng.dirichlet(np.full(k, 2.0), (2, n_batch))
            one, stacked = jax.device_put((cost[0], a[0], b[0])), jax.device_put((cost, a, b))
            calls = {"XLA": partial(xla, *one)} if k <= in_xla else {}
            calls |= {"callback": partial(host, *one), "POT": partial(ot.emd, a[0], b[0], cost[0])}
            batch = {"XLA, batch": partial(vmapped, *stacked), "POT, loop": lambda p=(a, b, cost): [*map(ot.emd, *p)]}
            for group, base, n in ((calls, "POT", 1), (batch, "POT, loop", n_batch))[: 2 if k <= 64 else 1]:
                timings = by_turns(group)
                sums = {m: (cost[:n] * np.reshape(t.value, (-1, k, k))).sum((1, 2)) for m, t in timings.items()}
                differ = {m: float(np.max(np.abs(v / sums[base] - 1))) for m, v in sums.items() if m != base}
                report(results, table, str(k), timings, base, differ, 1e-3 * n)
    console.print(table)


@partial(jax.jit, static_argnames=("solver", "limit"))
def solved(pair: cg.GaussianMixturePair, cost: jax.Array, solver: Callable, limit: int) -> tuple[jax.Array, ...]:
    """As `cg.solve_plan` does it, on given costs: iterations, marginal error, whether it met the tolerance."""
    init = jnp.zeros_like(pair.gmm0.weights), jnp.zeros_like(pair.gmm1.weights)
    found = solver(transport_problem(pair, cost), init, jnp.asarray(TOL, init[0].dtype), limit)
    return found.n_iterations, found.marginal_error, found.converged


@partial(jax.jit, static_argnames="tau")
def ott_default(pair: cg.GaussianMixturePair, cost: jax.Array, tau: float) -> tuple[jax.Array, ...]:
    """The same from OTT's Sinkhorn as it comes, on masses under which its problem is ours; the verdict is its own."""
    log_a, log_b = pair.gmm0.log_weights, pair.gmm1.log_weights
    geom = geometry.Geometry(cost_matrix=cost, epsilon=pair.epsilon)
    problem = linear_problem.LinearProblem(geom, jnp.exp(log_a / tau), jnp.exp(log_b / tau), tau, tau)
    output = sinkhorn.Sinkhorn()(problem)
    f, g = output.f - pair.epsilon * log_a, output.g - pair.epsilon * log_b
    error = transport_problem(pair, cost).marginal_error(f, g)
    return output.n_iters, error, output.converged


def entropic_problem(k0: int, k1: int, ratio: float, balanced: bool, seed: int) -> dict[str, dict]:
    """Every solver on one problem: iterations, milliseconds, marginal error and verdict."""
    timings: dict[str, Timing] = {}
    for bits in (32, 64):
        with jax.enable_x64(bits == 64):
            gmm0, gmm1 = mixtures(k0, k1, 4, seed)
            cost = cg.bures_cost_matrix(gmm0, gmm1)
            mean = float(gmm0.weights @ cost @ gmm1.weights)
            pair = cg.GaussianMixturePair.from_rho(gmm0, gmm1, ratio * mean, jnp.inf if balanced else mean)
            calls = {f"ours, float{bits}": partial(solved, pair, cost, solvers.ENTROPIC, 500)}
            if bits == 64:
                calls["OTT, 20,000"] = partial(solved, pair, cost, solvers.solver_for("sinkhorn", pair), 20_000)
                calls["OTT, as it comes"] = partial(ott_default, pair, cost, float(pair.tau))
            timings |= by_turns(calls, runs=2, budget=0.02)
    numbers = {name: (*map(float, t.value), 1e3 * t.first, 1e3 * t.warm) for name, t in timings.items()}
    return {name: dict(zip(("iterations", "error", "verdict", "first", "warm"), v)) for name, v in numbers.items()}


def entropic_plans(results: dict, shapes=SHAPES, epsilons=EPSILONS, seeds: int = 5) -> None:
    columns = ("epsilon / mean", "", "iterations", "warm, ms", "marginal error", "first, ms", "met", "says so")
    formats = {"iterations": ".0f", "warm": ".3g", "error": ".1e"}
    for (k0, k1), balanced in itertools.product(shapes, (True, False)):
        kind = f"{k0} x {k1}, {'balanced' if balanced else 'unbalanced'}"
        title = f"Entropic plans {kind}, to {TOL:g}, costs given, OTT in float64: median / worst of {seeds} seeds"
        table = Table(*columns, title=title)
        for ratio in epsilons:
            found = [entropic_problem(k0, k1, ratio, balanced, seed) for seed in range(seeds)]
            for name in found[0]:
                seen = {field: [seed[name][field] for seed in found] for field in found[0][name]}
                results[f"{title}: {ratio:g}, {name}"] = seen
                shown = [f"{np.median(seen[field]):{f}} / {np.max(seen[field]):{f}}" for field, f in formats.items()]
                counts = [f"{sum(v):g} of {seeds}" for v in ([e <= TOL for e in seen["error"]], seen["verdict"])]
                table.add_row(f"{ratio:g}", name, *shown, f"{seen['first'][0]:.3g}", *counts)
            table.add_section()
        console.print(table)


def point_maps(results: dict, shapes=((8, 3), (20, 10)), n=1_000_000, n_bary=100_000, n_rand=1_000, few=10) -> None:
    title = f"Maps of {n:,} points; POT's from {n_bary:,} (barycentric) and {n_rand:,} (random), scaled"
    table = Table("K, d", "", "first, s", "warm, s", "over ours", "images differ, float64", title=title)
    for k, d in shapes:
        with jax.enable_x64(True):
            plan = cg.solve_plan(cg.GaussianMixturePair(*mixtures(k, k, d)), method="exact")
            some = np.asarray(plan.pair.gmm0.sample(jax.random.key(0), n_bary))
            images = np.asarray(cg.map_points(plan, some[:10_000]))
        moments = [moment for both in zip(*map(cg.to_pot, (plan.pair.gmm0, plan.pair.gmm1))) for moment in both]
        pot = partial(ot.gmm.gmm_ot_apply_map, plan=np.asarray(plan.matrix), seed=0)
        differ = {"ours": float(np.abs(images - pot(some[:10_000], *moments)).max())}
        plan = cg.solve_plan(cg.GaussianMixturePair(*mixtures(k, k, d)), method="exact")
        x = plan.pair.gmm0.sample(jax.random.key(0), n)
        for method, theirs, size in (("barycentric", "bary", n_bary), ("random", "rand", n_rand)):
            calls = {
                "ours": partial(cg.map_points, plan, x, method=method, key=jax.random.key(1)),
                "POT": partial(pot, some[:size], *moments, method=theirs),
                "POT, few": partial(pot, some[:few], *moments, method=theirs),
            }
            timings = by_turns(calls)
            fixed = timings.pop("POT, few").warm  # the matrices of its maps: they do not grow with the points
            scaled = fixed + (timings["POT"].warm - fixed) * (n - few) / (size - few)
            timings["POT"] = Timing(scaled, scaled)
            report(results, table, f"{k}, {d}, {method}", timings, "ours", differ if theirs == "bary" else {})
    console.print(table)


PARTS = {"cost": cost_matrices, "exact": exact_plans, "entropic": entropic_plans, "maps": point_maps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    console.print(f"jax {jax.__version__} on {jax.devices()[0].platform}, {jax.devices()[0].device_kind}")
    results: dict = {}
    for name in arguments.parts or PARTS:
        PARTS[name](results)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
