"""Choices without the truth on public tables, which are read from folders that are named; nothing of them is kept here.

    python benchmarks/held_out_choice.py hipc FOLDER [--seeds 5] [--points 20000]
    python benchmarks/held_out_choice.py cite FOLDER [--seeds 5]

hipc: cell-type proportions of an unlabelled flow cytometry sample from a labelled one. FOLDER holds HIPC_Stanford.RData of the
R package CytOpT (Freulon, Bigot & Hejblum 2023); it takes the package `rdata`. A Gaussian a class, of the labelled sample, is
frozen; a mixture that starts there is fitted to points of the other, and rho and the weight are chosen by held-out points.
Proportions are the plan's: the mass of each class times its mass change. KL(estimate, truth), lower is better.

cite: the CITE-seq data of the single-cell integration challenge, 50 principal components. FOLDER holds cite50_2.npy to
cite50_7.npy. Number of components and weight are chosen from days 2 and 4 alone (then 3 and 7), and what lies between them is
compared with the day between by the energy distance E|x - y| - (E|x - x'| + E|y - y'|) / 2, beside what needs no mixture.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
import ot

import coupled_gmm as cg
from coupled_gmm.selection import rules

RULES = ("best", "one_standard_error")


def divergence(estimate: np.ndarray, truth: np.ndarray) -> float:
    estimate = np.maximum(estimate, 1e-9) / np.maximum(estimate, 1e-9).sum()
    return float(np.sum(estimate * np.log(estimate / truth)))


def hipc(folder: Path, seeds: int, n: int | None) -> None:
    import rdata

    tables = rdata.read_rda(str(folder / "HIPC_Stanford.RData"))
    names = ("1228", "1369")
    points = {name: tables[f"HIPC_Stanford_{name}_1A"].to_numpy(float) for name in names}
    labels = {name: np.asarray(tables[f"HIPC_Stanford_{name}_1A_labels"]).astype(str) for name in names}
    classes = np.unique(labels["1228"])
    parts = {name: np.array([(labels[name] == c).mean() for c in classes]) for name in names}
    for one, other in (names, names[::-1]):
        unit = points[one].std(axis=0)
        x, y = points[one] / unit, points[other] / unit
        cells = [x[labels[one] == c] for c in classes]
        source = cg.GaussianMixture.from_moments(
            np.stack([c.mean(axis=0) for c in cells]), np.stack([np.cov(c.T) for c in cells]), parts[one]
        )
        print(f"{one} -> {other}: the source's own proportions {divergence(parts[one], parts[other]):.3f}", flush=True)
        graph = cg.MixtureGraph.from_mixtures([source, source], [(0, 1)], rho=1.0, frozen=[0])
        for seed in range(seeds):
            some = y[np.random.default_rng(seed).permutation(len(y))[:n]]
            began = time.perf_counter()
            choice = cg.choose(
                [None, some],
                graph,
                key=jax.random.key(seed),
                relative_weights=[1e-2, 3e-2, 0.1, 0.3, 1.0],
                rhos=[0.01, 0.03, 0.1, 0.3, 1.0],
                epsilons=[1e-2],
                folds=3,
                tol=1e-4,
            )
            took = time.perf_counter() - began
            for rule in RULES:
                row, fit = choice.table[rules.chosen(choice.candidates, rule)], choice.fit
                if row != choice.table[int(choice.row)]:
                    prices = {"rho": row["rho"], "epsilon": row["epsilon"]}
                    other_graph = cg.MixtureGraph.from_mixtures(fit.gmms, [(0, 1)], frozen=[0], **prices)
                    fit = cg.fit_graph(
                        [None, some], other_graph, relative_weight=row["relative_weight"], tol=1e-4, em_steps=200
                    )
                moved, apart = source.weights * fit.plan(0).mass_change(), fit.gmms[1].weights
                print(
                    f"  seed {seed}, {rule}: KL {divergence(np.asarray(moved), parts[other]):.4f} (masses alone "
                    f"{divergence(np.asarray(apart), parts[other]):.4f}) at weight {row['relative_weight']}, rho "
                    f"{row['rho'] / (100 * row['epsilon']):.2g} of the mean cost; {took:.0f} s",
                    flush=True,
                )


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    def mean(a: np.ndarray, b: np.ndarray) -> float:
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return float(np.sqrt(np.maximum(squares, 0)).mean())

    return mean(x, y) - 0.5 * (mean(x, x) + mean(y, y))


def cite(folder: Path, seeds: int, n: int | None) -> None:
    days = {day: np.load(folder / f"cite50_{day}.npy").astype(np.float64) for day in (2, 3, 4, 7)}
    courses = ((2, 3, 4, 0.5), (3, 4, 7, 0.25))
    print("weak:", {name: round(float(np.mean(each)), 3) for name, each in weak(days, courses).items()}, flush=True)
    scores = []
    for seed in range(seeds):
        found = []
        for before, between, after, t in courses:
            rng = np.random.default_rng(seed)
            ends = [days[day][rng.permutation(len(days[day]))[:n]] for day in (before, after)]
            began = time.perf_counter()
            choice = cg.choose(
                ends,
                jax.random.key(seed),
                n_components=[5, 10, 15],
                relative_weights=[3e-3, 1e-2, 3e-2, 0.1],
                folds=3,
                n_init=1,
                tol=1e-4,
            )
            row, both = choice.chosen, (days[before], days[after])
            fit = cg.fit_pair(*both, choice.fit.pair, relative_weight=row["relative_weight"], tol=1e-4, em_steps=200)
            took = time.perf_counter() - began
            moved = np.asarray(cg.map_points(fit.plan, days[before], method="random", key=jax.random.key(seed)))
            middle = {
                "mixture": np.asarray(cg.interpolate(fit.plan, t).sample(jax.random.key(seed), len(days[between]))),
                "points moved": days[before] + t * (moved - days[before]),
            }
            found.append([energy_distance(one, days[between]) for one in middle.values()])
            said = ", ".join(f"{name} {value:.3f}" for name, value in zip(middle, found[-1], strict=True))
            print(f"seed {seed}, {before} -> {after}: {said}; {row}, {fit.message}, {took:.0f} s", flush=True)
        scores.append(np.mean(found, axis=0))
        print(f"seed {seed}: mean {scores[-1].round(3)}", flush=True)
    print(f"over seeds {np.mean(scores, axis=0).round(3)} +- {np.std(scores, axis=0).round(3)} (mixture, points moved)")


def weak(days: dict[int, np.ndarray], courses: tuple) -> dict[str, list[float]]:
    """What needs no mixture: points of both ends, one Gaussian each, exact transport of points."""
    found: dict[str, list[float]] = {}
    for before, between, after, t in courses:
        x, y, rng = days[before], days[after], np.random.default_rng(0)
        n = min(len(x), len(y)) // 2
        one = [cg.fit_gmm(z, 1, key=jax.random.key(0)).gmm for z in (x, y)]
        plan = cg.solve_plan(cg.GaussianMixturePair(*one, epsilon=1.0))
        to = ot.emd(ot.unif(len(x)), ot.unif(len(y)), ot.dist(x, y), numItermax=10**7).argmax(axis=1)
        middle = {
            "half of both ends": np.concatenate([z[rng.permutation(len(z))[:n]] for z in (x, y)]),
            "one Gaussian": np.asarray(cg.interpolate(plan, t).sample(jax.random.key(0), len(days[between]))),
            "exact transport": x + t * (y[to] - x),
        }
        for name, points in middle.items():
            found.setdefault(name, []).append(energy_distance(points, days[between]))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("hipc", "cite"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--points", type=int, help="of each cloud, that are chosen by; all where it is left out")
    given = parser.parse_args()
    if given.table == "hipc":
        hipc(given.folder, given.seeds, given.points)
    else:
        cite(given.folder, given.seeds, given.points)
