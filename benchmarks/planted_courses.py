"""A planted course by a coupled chain, by mixtures fitted apart, by consecutive pairs: `python benchmarks/planted_courses.py`.

Six times, four components that drift and grow or shrink; one splits at the third time, which makes five. Tracks: a component keeps
the number of its main ancestor as long as it is that one's main heir. Points are compared by the track of their most probable
component with the planted one (adjusted Rand index over all points of all times), and growth by the mean error of log(mass at the
next time / mass now) of the planted component that most of a component's points are of. All have four components at the first two
times and five later, and start from mixtures of the points of those times pooled; the mixtures apart also from the likeliest of ten
starts of their own. In brackets by how much the chain of the same weight (or of the middle one) is better, seed by seed, and its
standard error.
"""

import argparse
import time
from itertools import pairwise

import jax
import numpy as np
from sklearn.metrics import adjusted_rand_score

import coupled_gmm as cg

TIMES, K, D = 6, 5, 3
SIZES = (4, 4, 5, 5, 5, 5)
RATES = np.array([0.4, -0.4, 0.0, 0.2, 0.4])  # of growth, per time
EPSILON, RIDGE = 0.1, 1e-3


class Planted:
    """Clouds with the track of each point, and what the mass of each track becomes on each edge."""

    def __init__(self, seed: int, n: int, apart: float):
        rng = np.random.default_rng(seed)
        means, drift = apart * rng.normal(size=(4, D)), 0.4 * rng.normal(size=(4, D))
        means, drift = np.vstack([means, means[:1]]), np.vstack([drift, drift[:1]])
        leave = rng.normal(size=D)
        drift_after = 1.3 * leave / np.linalg.norm(leave)
        self.masses, self.clouds, self.tracks = [], [], []
        for t in range(TIMES):
            mass = np.exp(RATES * t)
            mass = mass * (np.arange(K) < 4) if t < 2 else mass * np.array([0.5, 1, 1, 1, 0.5])
            self.masses.append(mass / mass.sum())
            at = means + t * drift
            at[4] = at[4] + max(t - 1, 0) * drift_after
            track = rng.choice(K, n, p=self.masses[-1])
            self.tracks.append(track)
            self.clouds.append((at[track] + rng.normal(size=(n, D))).astype(np.float32))

    def log_change(self, t: int) -> np.ndarray:
        """Of each track from t to t + 1: what splits off counts with what it comes from."""
        after = self.masses[t + 1].copy()
        after[0] += after[4] if t == 1 else 0
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(after) - np.log(self.masses[t])


def followed(masses: list[np.ndarray], plans: list[np.ndarray]) -> list[np.ndarray]:
    """The track of each component at each time."""
    tracks, fresh = [np.arange(len(masses[0]))], len(masses[0])
    for mass, plan in zip(masses[1:], plans):
        flow = plan / np.maximum(plan.sum(0), 1e-30) * mass
        track = []
        for m, k in enumerate(flow.argmax(0)):
            heir = flow[k].argmax() == m
            track.append(tracks[-1][k] if heir else fresh)
            fresh += not heir
        tracks.append(np.array(track))
    return tracks


def scores(planted: Planted, gmms: list, plans: list, log_changes: list[np.ndarray], seen: list | None = None):
    """ARI of tracks, and the mean error of log growth, weighted by mass; `seen`: the mixtures that growth is of, where others."""
    labels = [np.asarray(gmm.predict(x)) for gmm, x in zip(gmms, planted.clouds)]
    tracks = followed([np.asarray(gmm.weights) for gmm in gmms], plans)
    found = np.concatenate([track[label] for track, label in zip(tracks, labels)])
    errors = []
    for t, changes in enumerate(log_changes):
        gmm = (seen or gmms)[t]
        label = np.asarray(gmm.predict(planted.clouds[t])) if seen else labels[t]
        truth = planted.log_change(t)
        for k in range(gmm.n_components):
            inside = planted.tracks[t][label == k]
            if len(inside):
                error = abs(changes[k] - truth[np.bincount(inside, minlength=K).argmax()])
                errors.append((len(inside), min(error, 3.0)))
    weights, errors = np.array(errors).T
    return adjusted_rand_score(np.concatenate(planted.tracks), found), float(weights @ errors / weights.sum())


def weight_of(planted: Planted, relative: float) -> float:
    return relative / np.mean([x.var(0).mean() for x in planted.clouds])


def by_chain(planted: Planted, starts: list, relative: float, rho: float):
    graph = cg.chain(starts, edge_weights=weight_of(planted, relative), epsilon=EPSILON, rho=rho)
    fit = cg.fit_graph(planted.clouds, graph, em_steps=60, ridge=RIDGE)
    plans = [np.asarray(fit.plan(e).matrix) for e in range(TIMES - 1)]
    return scores(planted, fit.gmms, plans, [np.log(np.maximum(np.asarray(g.change), 1e-9)) for g in fit.growth()])


def apart(planted: Planted, gmms: list):
    """Matched by exact MW2 plans; a component grows as the mass of its track does."""
    plans = [np.asarray(cg.solve_plan(cg.GaussianMixturePair(*pair), method="exact").matrix) for pair in pairwise(gmms)]
    masses = [np.asarray(gmm.weights) for gmm in gmms]
    heirs = [plan.argmax(1) for plan in plans]
    changes = [
        np.log(np.maximum(after[heir], 1e-9)) - np.log(np.maximum(now, 1e-9))
        for now, after, heir in zip(masses, masses[1:], heirs)
    ]
    return scores(planted, gmms, plans, changes)


def by_pairs(planted: Planted, starts: list, relative: float, rho: float):
    """Each two neighbours by themselves; the two mixtures of one time are joined by the points that they share."""
    weight = weight_of(planted, relative)
    fits = []
    for clouds, ends in zip(pairwise(planted.clouds), pairwise(starts)):
        pair = cg.GaussianMixturePair(*ends, EPSILON, rho=rho)
        fits.append(cg.fit_pair(*clouds, pair, transport_weight=weight, em_steps=60, ridge=RIDGE))
    gmms = [fits[0].pair.gmm0, *(fit.pair.gmm1 for fit in fits)]
    plans = [np.asarray(fit.plan.matrix) for fit in fits]
    for t in range(1, len(fits)):  # from components as the last pair sees them to those of the next
        x = planted.clouds[t]
        # Of one time, the same points seen by both.
        shared = np.exp(np.asarray(gmms[t].log_posterior(x))).T @ np.exp(np.asarray(fits[t].pair.gmm0.log_posterior(x)))
        plans[t] = shared / np.maximum(shared.sum(0), 1e-30) @ plans[t]
    changes = [np.log(np.maximum(np.asarray(fit.plan.mass_change()), 1e-9)) for fit in fits]
    return scores(planted, gmms, plans, changes, [fit.pair.gmm0 for fit in fits])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--points", type=int, default=150)
    parser.add_argument("--apart", type=float, default=3.0, help="standard deviation of means, in those of components")
    parser.add_argument("--relative-weights", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument(
        "--rho", type=float, default=20.0, help="price of mass, in squared standard deviations of components"
    )
    asked = parser.parse_args()
    begin, found, still = time.perf_counter(), {}, []
    for seed in range(asked.seeds):
        planted, key = Planted(seed, asked.points, asked.apart), jax.random.key(seed)
        pooled = [np.concatenate(part) for part in (planted.clouds[:2], planted.clouds[2:])]
        four, five = (cg.init_gmm(key, x, k) for x, k in zip(pooled, (4, 5)))
        starts = [four if k == 4 else five for k in SIZES]
        keys = jax.random.split(key, TIMES)
        own = [cg.fit_gmm(*each, key=key, ridge=RIDGE).gmm for each, key in zip(zip(planted.clouds, SIZES), keys)]
        runs = {"apart, own starts": apart(planted, own)}
        runs["apart, pooled start"] = apart(
            planted, [cg.fit_gmm(*each, ridge=RIDGE).gmm for each in zip(planted.clouds, starts)]
        )
        for relative in asked.relative_weights:
            runs[f"pairs, {relative:g}"] = by_pairs(planted, starts, relative, asked.rho)
            runs[f"chain, {relative:g}"] = by_chain(planted, starts, relative, asked.rho)
        with np.errstate(invalid="ignore"):  # what is not there yet has no mass to change
            changes = [np.nansum(now * abs(planted.log_change(t))) for t, now in enumerate(planted.masses[:-1])]
        still.append(np.mean(changes))
        for name, score in runs.items():
            found.setdefault(name, []).append(score)
    seconds = time.perf_counter() - begin
    print(
        f"{asked.seeds} seeds, {asked.points} points a time, {seconds:.0f} s; no growth at all: off by {np.mean(still):.3f}"
    )
    middle = asked.relative_weights[len(asked.relative_weights) // 2]
    for name, each in found.items():
        kind, _, weight = name.partition(", ")
        ours = np.array(found[f"chain, {middle:g}" if kind == "apart" else f"chain, {weight}"])
        each = np.array(each)
        better = (ours - each) * [1, -1]
        mean, gain = each.mean(0), better.mean(0)
        error = better.std(0, ddof=1) / np.sqrt(len(each))
        print(
            f"  {name:20} ARI {mean[0]:.3f} ({gain[0]:+.3f} +- {error[0]:.3f})   log growth off by {mean[1]:.3f} ({gain[1]:+.3f} "
            f"+- {error[1]:.3f})",
            flush=True,
        )
