"""Clouds at times that a fit has not seen: `python benchmarks/held_out.py FOLDER [--tables LV hESC GoMvortex]`, a minute a seed.

FOLDER holds `LV_data.npy`, `hESC_data.npy` and `GoMvortex_data.npy`, arrays of one cloud a time, from the code of "Multi-marginal
Schrödinger bridges with iterative reference refinement" (Shen, Berlinghieri & Broderick 2024); they are not ours to hand on.
Clouds at even times are seen, those at odd ones predicted. hESC: exact 2-Wasserstein distance (POT). The others: sliced
2-Wasserstein distance (POT, 1,000 projections). Over seeds, of the starts and of what is drawn: means, and standard deviations of
the mean over times.

The number of components (1 to 4) and the transport weight are chosen by `choose`, by points of the clouds that are seen. The ends
of the splines are the package's default, which was chosen with these tables in sight: see `--ends` for the others.

Beside the chain's mixture and trajectories: half of each neighbouring cloud, one Gaussian a cloud, and exact transport between
points with the same spline through it. `mixture_at` is sampled with 1,000 points.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
import ot

import coupled_gmm as cg
from coupled_gmm.courses import splines

TABLES = ("LV", "hESC", "GoMvortex")
PUBLISHED = {
    "LV": {"3MSBM": (0.23, 0.13, 0.15, 0.36), "SBIRR": (0.17, 0.16, 0.24, 0.48), "Smooth SB": (0.29, 0.18, 0.11, 0.37)},
    "hESC": {"MSBM": (1.09, 1.30), "SBIRR": (1.08, 1.33), "DMSB": (1.10, 1.51), "TrajectoryNet": (1.30, 1.93)},
    "GoMvortex": {"3MSBM": (0.14, 0.14, 0.08, 0.06), "SBIRR": (0.15, 0.11, 0.11, 0.09)},
}


def clouds_of(folder: Path, table: str) -> list[np.ndarray]:
    clouds = np.load(folder / f"{table}_data.npy", allow_pickle=True)
    return [np.asarray(cloud, np.float64) for cloud in clouds]


def distance(table: str, one: np.ndarray, other: np.ndarray) -> float:
    if table == "hESC":
        return float(np.sqrt(ot.emd2(ot.unif(len(one)), ot.unif(len(other)), ot.dist(one, other))))
    return float(ot.sliced_wasserstein_distance(one, other, n_projections=1000, seed=0))


class Problem:
    """The clouds that are seen, with their times, and the times at which others are asked for."""

    def __init__(self, clouds: list[np.ndarray]):
        self.seen, self.held = clouds[::2], clouds[1::2]
        self.times = np.arange(float(len(self.seen)))
        self.asked = self.times[: len(self.held)] + 0.5

    def chosen(self, seed: int) -> cg.GraphFit:
        choice = cg.choose(self.seen, jax.random.key(seed), n_components=[1, 2, 3, 4])
        print(
            f"  seed {seed}: K {choice.chosen['n_components']}, relative weight {choice.chosen['relative_weight']:g}",
            flush=True,
        )
        return choice.fit

    def fit(self, n_components: int, relative_weight: float, seed: int) -> cg.GraphFit:
        key = jax.random.key(seed)
        starts = [cg.init_gmm(jax.random.fold_in(key, i), x, n_components) for i, x in enumerate(self.seen)]
        return cg.fit_graph(self.seen, cg.chain(starts), relative_weight=relative_weight, em_steps=60)

    def mixtures(self, fit: cg.GraphFit, seed: int, **how) -> list[np.ndarray]:
        keys = jax.random.split(jax.random.key(100 + seed), len(self.asked))
        return [np.asarray(cg.mixture_at(fit, t, **how).sample(key, 1000)) for t, key in zip(self.asked, keys)]

    def points(self, fit: cg.GraphFit, **how) -> list[np.ndarray]:
        return list(np.asarray(cg.trajectories(fit, self.seen[0], self.asked, **how)))

    def pooled(self, seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        half = [[x[rng.permutation(len(x))[: len(x) // 2]] for x in pair] for pair in zip(self.seen, self.seen[1:])]
        return [np.concatenate(pair) for pair in half]

    def exact(self, **how) -> list[np.ndarray]:
        """The same spline through points that exact plans between the clouds pass on (to the mean, where they split)."""
        knots = [self.seen[0]]
        plan = np.eye(len(self.seen[0]))
        for x, y in zip(self.seen, self.seen[1:]):
            step = ot.emd(ot.unif(len(x)), ot.unif(len(y)), ot.dist(x, y))
            plan = plan @ (step / step.sum(1, keepdims=True))
            knots.append(plan @ y)
        return list(spline(self.times, np.stack(knots), self.asked, **how))


def spline(times: np.ndarray, knots: np.ndarray, asked: np.ndarray, method: str = "spline", ends: str = "parabolic"):
    """The package's own weights, of points that it has not mapped."""
    times, asked = (each.astype(np.float32) for each in (times, asked))
    weights = np.asarray(jax.jit(splines.weights, static_argnums=(2, 3))(times, asked, method, ends), np.float64)
    return np.einsum("tv,vnd->tnd", weights, knots)


def predictions(
    problem: Problem, fit: cg.GraphFit, single: cg.GraphFit, seed: int, ends: str
) -> dict[str, list[np.ndarray]]:
    return {
        "mixture_at": problem.mixtures(fit, seed, ends=ends),
        "mixture_at, geodesic": problem.mixtures(fit, seed, method="geodesic"),
        "trajectories": problem.points(fit, ends=ends),
        "trajectories, random": problem.points(fit, key=jax.random.key(seed), ends=ends),
        "half of each neighbour": problem.pooled(seed),
        "one Gaussian a cloud": problem.mixtures(single, seed, ends=ends),
        "exact transport, spline": problem.exact(ends=ends),
        "exact transport, lines": problem.exact(method="geodesic"),
    }


def run(table: str, problem: Problem, asked: argparse.Namespace) -> None:
    begin, scores = time.perf_counter(), {}
    print(table)
    for seed in range(asked.seeds):
        by_hand = asked.components is not None
        fit = problem.fit(asked.components, asked.relative_weight, seed) if by_hand else problem.chosen(seed)
        single = problem.fit(1, 0.0, seed)
        for name, clouds in predictions(problem, fit, single, seed, asked.ends).items():
            each = [distance(table, *pair) for pair in zip(clouds, problem.held, strict=True)]
            scores.setdefault(name, []).append(each)
    seconds = (time.perf_counter() - begin) / asked.seeds
    for name, found in scores.items():
        means, whole = np.mean(found, axis=0), np.mean(found, axis=1)
        print(f"  {name:24}", *(f"{mean:6.3f}" for mean in means), f"  mean {whole.mean():.3f} +- {whole.std():.3f}")
    for name, found in PUBLISHED[table].items():
        print(f"  published, {name:13}", *(f"{mean:6.2f} " for mean in found), f" mean {np.mean(found):.3f}")
    print(f"  {seconds:.0f} s a seed", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ends", choices=splines.ENDS, default=splines.ENDS[0])
    parser.add_argument("--components", type=int, help="with --relative-weight, in place of what is chosen")
    parser.add_argument("--relative-weight", type=float, default=1e-3)
    asked = parser.parse_args()
    for table in asked.tables:
        run(table, Problem(clouds_of(asked.folder, table)), asked)
