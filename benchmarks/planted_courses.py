"""A planted time course, by a coupled chain, by mixtures fitted apart, and by consecutive pairs: `python benchmarks/planted_courses.py`.

Six times, four components that drift and grow or shrink; one splits at the third time, which makes five. Tracks: a component keeps the
number of its main ancestor as long as it is that one's main heir. Points are compared by the track of their most probable component with
the planted one (adjusted Rand index over all points of all times), and growth by the mean error of log(mass at the next time / mass now)
of the planted component that most of a component's points are of. All start from the mixture of all points pooled; the mixtures apart
also from the likeliest of ten starts of their own.
"""

import argparse
import time

import jax
import numpy as np
from sklearn.metrics import adjusted_rand_score

import coupled_gmm as cg

TIMES, K, D = 6, 5, 3
RATES = np.array([0.25, -0.35, 0.0, 0.15, 0.25])  # of growth, per time
EPSILON, RHO = 0.1, 1.0


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
        for k in range(K):
            inside = planted.tracks[t][label == k]
            if len(inside):
                error = abs(changes[k] - truth[np.bincount(inside, minlength=K).argmax()])
                errors.append((len(inside), min(error, 3.0)))
    weights, errors = np.array(errors).T
    return adjusted_rand_score(np.concatenate(planted.tracks), found), float(weights @ errors / weights.sum())


def weight_of(planted: Planted, relative: float) -> float:
    return relative / np.mean([x.var(0).mean() for x in planted.clouds])


def by_chain(planted: Planted, start: cg.GaussianMixture, relative: float):
    graph = cg.chain([start] * TIMES, edge_weights=weight_of(planted, relative), epsilon=EPSILON, rho=RHO)
    fit = cg.fit_graph(planted.clouds, graph, em_steps=60)
    plans = [np.asarray(fit.plan(e).matrix) for e in range(TIMES - 1)]
    return scores(planted, fit.gmms, plans, [np.log(np.maximum(np.asarray(g.change), 1e-9)) for g in fit.growth()])


def apart(planted: Planted, gmms: list):
    """Matched by exact MW2 plans; a component grows as the mass of its track does."""
    plans = [
        np.asarray(cg.solve_plan(cg.GaussianMixturePair(*pair), method="exact").matrix) for pair in zip(gmms, gmms[1:])
    ]
    masses = [np.asarray(gmm.weights) for gmm in gmms]
    heirs = [plan.argmax(1) for plan in plans]
    changes = [np.log(after[heir]) - np.log(now) for now, after, heir in zip(masses, masses[1:], heirs)]
    return scores(planted, gmms, plans, changes)


def by_pairs(planted: Planted, start: cg.GaussianMixture, relative: float):
    """Each two neighbours by themselves; the two mixtures of one time are joined by the points that they share."""
    pair = cg.GaussianMixturePair(start, start, EPSILON, rho=RHO)
    weight = weight_of(planted, relative)
    fits = [
        cg.fit_pair(*two, pair, transport_weight=weight, em_steps=60) for two in zip(planted.clouds, planted.clouds[1:])
    ]
    gmms = [fits[0].pair.gmm0, *(fit.pair.gmm1 for fit in fits)]
    plans = [np.asarray(fit.plan.matrix) for fit in fits]
    for t in range(1, len(fits)):  # from components as the last pair sees them to those of the next
        x = planted.clouds[t]
        shared = np.exp(np.asarray(gmms[t].log_posterior(x))).T @ np.exp(np.asarray(fits[t].pair.gmm0.log_posterior(x)))
        plans[t] = shared / shared.sum(0) @ plans[t]
    changes = [np.log(np.maximum(np.asarray(fit.plan.mass_change()), 1e-9)) for fit in fits]
    return scores(planted, gmms, plans, changes, [fit.pair.gmm0 for fit in fits])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--apart", type=float, default=2.0, help="standard deviation of means, in those of components")
    parser.add_argument("--relative-weights", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1])
    asked = parser.parse_args()
    begin, found = time.perf_counter(), {}
    for seed in range(asked.seeds):
        planted, key = Planted(seed, asked.points, asked.apart), jax.random.key(seed)
        start = cg.init_gmm(key, np.concatenate(planted.clouds), K)
        own = [cg.fit_gmm(x, K, key=jax.random.fold_in(key, t)).gmm for t, x in enumerate(planted.clouds)]
        runs = {"apart, own starts": apart(planted, own)}
        runs["apart, pooled start"] = apart(planted, [cg.fit_gmm(x, start).gmm for x in planted.clouds])
        for relative in asked.relative_weights:
            runs[f"pairs, {relative:g}"] = by_pairs(planted, start, relative)
            runs[f"chain, {relative:g}"] = by_chain(planted, start, relative)
        for name, score in runs.items():
            found.setdefault(name, []).append(score)
    print(
        f"{asked.seeds} seeds, {asked.points} points a time, {time.perf_counter() - begin:.0f} s; means and standard errors"
    )
    for name, each in found.items():
        each = np.array(each)
        mean, error = each.mean(0), each.std(0, ddof=1) / np.sqrt(len(each))
        print(
            f"  {name:20} ARI {mean[0]:.3f} +- {error[0]:.3f}   log growth off by {mean[1]:.3f} +- {error[1]:.3f}",
            flush=True,
        )
