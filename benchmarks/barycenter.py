"""Barycenters beside POT's fixed point, in one process: POT's documented problem, and larger ones like it.

    python benchmarks/barycenter.py [--out results.json]

Times are the best of a few runs, by turns, the first call, with compilation, apart; POT runs once where it takes ten seconds.
Ours are float32. Objectives, sums of squared MW2 distances, are all POT's of the mixtures that came out, in float64.
"""

import argparse
import json
import warnings
from functools import partial

import jax
import numpy as np
import ot
from rich.console import Console
from rich.table import Table
from transport import by_turns

import coupled_gmm as cg

console = Console(width=140)
Moments = tuple[np.ndarray, np.ndarray, np.ndarray]
# Components of the mixtures, features, components of the barycenter, steps.
PROBLEMS = (((5, 6, 7), 2, 6, 3), ((5, 6, 7), 2, 6, 50), ((20,) * 5, 8, 20, 10), ((50,) * 5, 16, 50, 3))


def random_moments(n: int, d: int, seed: int, least: float = 1.0, scale: float = 1e-2) -> Moments:
    """A random mixture as POT's example draws it."""
    rng = np.random.RandomState(seed)
    means, roots = rng.randn(n, d), scale * rng.randn(n, d, d)
    weights = rng.random_sample(n)
    return means, roots @ roots.swapaxes(1, 2) + least * np.eye(d), weights / weights.sum()


def problem(sizes: tuple[int, ...], d: int, n: int) -> tuple[list[Moments], Moments]:
    """The mixtures, and the start, of uniform weights."""
    moments = []
    for seed, size in enumerate(sizes):
        means, covariances, weights = random_moments(size, d, seed, 0.25, 0.5)
        means[:, :2] = means[:, :2] / 2 + [(-3, 0), (2, 0), (0, 4)][seed % 3]
        means[:, 2:] /= 2
        moments.append((means, covariances, weights))
    means, covariances, _ = random_moments(n, d, 0)
    return moments, (means, covariances, np.full(n, 1 / n))


def pot_barycenter(moments: list[Moments], start: Moments, projection: str, steps: int) -> Moments:
    means, covariances = start[0].copy(), start[1].copy()  # it writes its answer over them
    parts = [list(part) for part in zip(*moments)]
    even = np.full(len(moments), 1 / len(moments))
    options = {"iterations": steps, "barycentric_proj_method": projection}
    found = ot.gmm.gmm_barycenter_fixed_point(*parts, means, covariances, even, **options)
    return *found, start[2]


def objective(found: Moments, moments: list[Moments]) -> float:
    losses = [ot.gmm.gmm_ot_loss(found[0], m[0], found[1], m[1], found[2], m[2]) for m in moments]
    return float(np.mean(losses))


def compare(results: dict, table: Table, sizes: tuple[int, ...], d: int, n: int, steps: int) -> None:
    moments, start = problem(sizes, d, n)
    gmms, init = [cg.GaussianMixture.from_moments(*m) for m in moments], cg.GaussianMixture.from_moments(*start)
    calls = {}
    for projection in ("joint", "bures", "euclidean"):
        calls[projection] = partial(cg.barycenter, gmms, init, projection=projection, max_steps=steps, tol=0)
        if projection != "joint":
            calls[f"POT {projection}"] = partial(pot_barycenter, moments, start, projection, steps)
    timings = by_turns(calls, budget=0.5)
    label = f"{'/'.join(map(str, sizes))} to {n}, d {d}, {steps} steps"
    for projection in ("joint", "bures", "euclidean"):
        first, warm, fit = timings[projection]
        numbers = {"first": first, "warm": warm, "objective": objective(cg.to_pot(fit.gmm), moments)}
        row = [label, projection, f"{first:.3g}", f"{warm:.3g}", "", "", f"{numbers['objective']:.6f}", ""]
        if projection != "joint":
            theirs = timings[f"POT {projection}"]
            numbers |= {"POT": theirs.warm, "POT objective": objective(theirs.value, moments)}
            row[4:6], row[7] = [f"{theirs.warm:.3g}", f"{theirs.warm / warm:.1f}"], f"{numbers['POT objective']:.6f}"
        results[f"{label}, {projection}"] = numbers
        table.add_row(*row)
    table.add_section()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="write the numbers to this JSON file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    console.print(f"jax {jax.__version__} on {jax.devices()[0].platform}, {jax.devices()[0].device_kind}")
    results: dict = {}
    columns = ("problem", "projection", "first, s", "warm, s", "POT, s", "POT / warm", "objective", "POT's")
    table = Table(*columns, title="Barycenters")
    for sizes, d, n, steps in PROBLEMS:
        compare(results, table, sizes, d, n, steps)
    console.print(table)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
