"""The coupled fit beside OTT's on the same samples and start, and the E-step beside scikit-learn's and gmmx's, in one process.

    python benchmarks/coupled_fit.py [memory] [ott] [e-step] [m-step] [--out results.json]

Times are the best of a few runs, by turns where a peer is compared, so that a slow moment of the machine meets both.
"""

import argparse
import json
import resource
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ott_tutorial
from rich.console import Console
from rich.table import Table
from sklearn.mixture import GaussianMixture as SklearnMixture

import coupled_gmm as cg

console = Console(width=130)
SHAPES = ((1_000_000, 3, 2), (500_000, 20, 10), (100_000, 50, 32))  # N, K, d


def seconds(call) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def by_turns(ours, theirs, runs: int) -> tuple[float, float]:
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    return min(a for a, _ in pairs), min(b for _, b in pairs)


def against_ott(results: dict) -> None:
    data = ott_tutorial.tutorial()
    table = Table("fit", "first call, s", "warm, s", "OTT first", "OTT warm", "first x", "warm x", title="Tutorial fit")
    adam = {"optimizer": optax.adam, "learning_rate": 1e-3}
    for case in ott_tutorial.CASES:
        their_first = seconds(lambda case=case: ott_tutorial.ott_fit(data, case))
        for name, options in (("default", {}), ("adam 1e-3", adam)):

            def ours(case=case, options=options):
                return ott_tutorial.our_fit(data, case, **options)

            first = seconds(ours)
            warm, their_warm = by_turns(ours, lambda case=case: ott_tutorial.ott_fit(data, case), 3)
            warm = min([warm, *(seconds(ours) for _ in range(10))])
            ratios = their_first / first, their_warm / warm
            results[f"{case} {name}"] = dict(
                zip(("first", "warm", "ott_first", "ott_warm"), (first, warm, their_first, their_warm))
            )
            cells = [f"{v:.3g}" for v in (first, warm, their_first, their_warm, *ratios)]
            table.add_row(f"{case}, {name}", *cells)
    console.print(table)


def cloud(n: int, k: int, d: int, rng: np.random.RandomState) -> tuple[np.ndarray, cg.GaussianMixture]:
    means = 4 * rng.randn(k, d)
    covariances = np.stack([np.eye(d) * (1 + 0.5 * rng.rand()) + 0.1 for _ in range(k)])
    x = (means[rng.randint(k, size=n)] + rng.randn(n, d)).astype(np.float32)
    return x, cg.GaussianMixture.from_moments(means, covariances, np.full(k, 1 / k))


def per_step(fit, few: int, many: int, runs: int = 3) -> float:
    """Seconds of one EM step: from two numbers of steps, so that what happens once does not count."""
    fit(few), fit(many)
    return min((seconds(lambda: fit(many)) - seconds(lambda: fit(few))) / (many - few) for _ in range(runs))


def sklearn_step(x: np.ndarray, start: cg.GaussianMixture) -> float:
    weights = np.asarray(start.weights, np.float64)

    def fit(steps: int):
        return SklearnMixture(
            start.n_components,
            tol=0,
            max_iter=steps,
            weights_init=weights / weights.sum(),
            means_init=np.asarray(start.means),
            precisions_init=np.linalg.inv(np.asarray(start.covariances, np.float64)),
        ).fit(x)

    return per_step(fit, 1, 4, runs=1)


def gmmx_step(x: np.ndarray, start: cg.GaussianMixture) -> float | None:
    try:
        from gmmx import EMFitter, GaussianMixtureModelJax
    except ImportError:
        return None
    model = GaussianMixtureModelJax.from_squeezed(
        means=start.means, covariances=start.covariances, weights=start.weights, covariance_type="full"
    )
    x = jnp.asarray(x)

    @jax.jit
    def step(x, model):
        fitter = EMFitter(tol=0, max_iter=1)
        _, responsibility = fitter.e_step(x=x, gmm=model)
        return fitter.m_step(x=x, gmm=model, log_resp=responsibility)

    seconds(lambda: step(x, model))
    return min(seconds(lambda: step(x, model)) for _ in range(2))


def e_step(results: dict) -> None:
    table = Table(
        "N, K, d", "ours, s", "sklearn f64", "sklearn f32", "gmmx f32", "x sklearn f64", "GFLOP/s", title="One EM step"
    )
    rng = np.random.RandomState(0)
    for n, k, d in SHAPES:
        x, start = cloud(n, k, d, rng)
        points = jnp.asarray(x)
        ours = per_step(lambda steps, p=points, s=start: cg.fit_gmm(p, s, max_steps=steps, tol=0.0), 2, 12)
        theirs64, theirs32 = sklearn_step(x.astype(np.float64), start), sklearn_step(x, start)
        gmmx = gmmx_step(x, start)
        results[f"E-step {n} {k} {d}"] = {"ours": ours, "sklearn64": theirs64, "sklearn32": theirs32, "gmmx": gmmx}
        shown = f"{gmmx:.3g}" if gmmx else "not installed"
        rate = 4e-9 * n * k * d * d / ours
        row = (f"{ours:.3g}", f"{theirs64:.3g}", f"{theirs32:.3g}", shown, f"{theirs64 / ours:.1f}", f"{rate:.1f}")
        table.add_row(f"{n:,}, {k}, {d}", *row)
    console.print(table)


def m_step(results: dict) -> None:
    """Seconds of 20 more evaluations in each M-step, at two numbers of points: the E-step is the same in both."""
    rng = np.random.RandomState(1)
    table = Table("N", "20 Adam evaluations, ms", title="M-step")
    for n in (10_000, 1_000_000):
        x0, start0 = cloud(n, 3, 2, rng)
        x1, start1 = cloud(n, 3, 2, np.random.RandomState(1))
        pair = cg.GaussianMixturePair(start0, start1, epsilon=1.0)
        clouds = jnp.asarray(x0), jnp.asarray(x1)

        def fit(m_steps, clouds=clouds, pair=pair):
            options = {"optimizer": optax.adam, "learning_rate": 1e-3, "em_steps": 5}
            return cg.fit_pair(*clouds, pair, transport_weight=0.01, m_steps=m_steps, **options)

        fit(1), fit(2001)
        spent = min((seconds(lambda: fit(2001)) - seconds(lambda: fit(1))) / 5 / 100 for _ in range(5))
        results[f"M-step {n}"] = spent
        table.add_row(f"{n:,}", f"{1e3 * spent:.3f}")
    console.print(table)


def pair_of_clouds(n: int, k: int, d: int) -> list[np.ndarray]:
    """Two clouds of k clusters each, of many shapes and masses, the second's a little elsewhere."""
    rng = np.random.RandomState(0)
    means, clouds = 4.5 * rng.randn(k, d) / np.sqrt(min(d, 8)), []
    for shift in (0.0, 0.7):
        centres = means + (shift * rng.randn(k, d) if shift else 0)
        factors = np.eye(d) + 0.4 * rng.randn(k, d, d) / np.sqrt(d)
        factors *= np.exp(0.3 * rng.randn(k, 1, 1))
        labels = rng.choice(k, n, p=rng.dirichlet(np.full(k, 5.0)))
        clouds.append((centres[labels] + np.einsum("nij,nj->ni", factors[labels], rng.randn(n, d))).astype(np.float32))
    return clouds


def growth(results: dict, steps: int = 30) -> None:
    """A coupled fit against plain EM on both clouds, the same number of steps, where components and features are many."""
    table = Table("N, K, d", "pair, s", "two plain EMs, s", "ratio", f"J after {steps}", title="Growth")
    for n, k, d in ((10_000, 3, 2), (10_000, 10, 10), (20_000, 20, 20), (20_000, 50, 32), (20_000, 30, 50)):
        clouds = [jnp.asarray(x) for x in pair_of_clouds(n, k, d)]
        start = cg.init_gmm(jax.random.key(0), jnp.concatenate(clouds), k)
        pair = cg.GaussianMixturePair(start, start)

        def ours(clouds=clouds, pair=pair):
            return cg.fit_pair(*clouds, pair, transport_weight=0.01, em_steps=steps)

        def alone(clouds=clouds, start=start):
            return [cg.fit_gmm(x, start, max_steps=steps, tol=0.0).gmm for x in clouds]

        value = float(ours().penalized_log_likelihood)
        alone()
        mine, theirs = (min(each) for each in zip(*((seconds(ours), seconds(alone)) for _ in range(3)), strict=True))
        results[f"growth {n} {k} {d}"] = {"pair": mine, "plain": theirs, "J": value}
        table.add_row(f"{n:,}, {k}, {d}", f"{mine:.3g}", f"{theirs:.3g}", f"{mine / theirs:.2f}", f"{value:.5f}")
    console.print(table)


def separation_and_memory(results: dict) -> None:
    rng = np.random.RandomState(0)
    for apart in (1e3, 1e4):
        centres = np.array([[0, 0], [apart, 0], [0, -apart]])
        x = (centres[rng.randint(3, size=30_000)] + rng.randn(30_000, 2)).astype(np.float32)
        fit = cg.fit_gmm(x, cg.init_gmm(jax.random.key(1), x, 3, n_init=4), ridge=0.0, max_steps=30)
        nearest = np.argmin(((x[:, None].astype(float) - np.asarray(fit.gmm.means)) ** 2).sum(-1), axis=1)
        exact = np.stack([np.cov(x[nearest == k].T.astype(float), bias=True) for k in range(3)])
        error = float(np.abs(np.asarray(fit.gmm.covariances) - exact).max())
        results[f"covariance error, clusters {apart:g} sd apart"] = error
        console.print(f"clusters {apart:g} standard deviations apart: covariances off by {error:.1e}")
    points = jnp.asarray(rng.randn(10_000_000, 2).astype(np.float32))
    start = cg.init_gmm(jax.random.key(0), points[:10_000], 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = seconds(lambda: cg.fit_gmm(points, start, max_steps=5, tol=0.0))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    results["memory at 1e7 points, MB"] = grown
    console.print(
        f"10,000,000 points, d 2, K 3: {grown:.0f} MB beyond the points at the peak; 5 steps and compilation {spent:.1f} s"
    )


PARTS = {"memory": separation_and_memory, "ott": against_ott, "e-step": e_step, "m-step": m_step, "growth": growth}


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
