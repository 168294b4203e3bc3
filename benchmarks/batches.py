"""Ragged pairs through `fit_pairs`, beside a loop of `fit_pair`: `python benchmarks/batches.py`, some two minutes.

64 pairs, 500 to 5,000 points a cloud, 2 to 6 components, d 2, tol 1e-5. First calls are those of a fresh process, warm ones the
best of five, by turns.
"""

import time

import jax
import numpy as np

import coupled_gmm as cg

OPTIONS = {"transport_weight": 0.01, "tol": 1e-5, "em_steps": 100}


def pair(seed):
    rng = np.random.default_rng(seed)
    clouds, starts = [], []
    for n, k in zip(rng.integers(500, 5001, 2), rng.integers(2, 7, 2)):
        centres = 4 * rng.normal(size=(k, 2))
        cloud = (centres[rng.integers(k, size=n)] + rng.normal(size=(n, 2))).astype(np.float32)
        means = cloud[rng.choice(n, k, replace=False)]
        starts.append(cg.GaussianMixture.from_moments(means, np.tile(np.eye(2), (k, 1, 1)), np.full(k, 1 / k)))
        clouds.append(cloud)
    return *clouds, cg.GaussianMixturePair(*starts)


def seconds(call):
    start = time.perf_counter()
    value = jax.block_until_ready(call())
    return time.perf_counter() - start, value


if __name__ == "__main__":
    clouds0, clouds1, starts = zip(*map(pair, range(64)))

    def together():
        return cg.fit_pairs(list(clouds0), list(clouds1), list(starts), **OPTIONS)

    def in_turn():
        return [cg.fit_pair(x0, x1, start, **OPTIONS) for x0, x1, start in zip(clouds0, clouds1, starts)]

    (first, fits), (first_loop, each) = seconds(together), seconds(in_turn)
    warm, warm_loop = (min(times) for times in zip(*((seconds(together)[0], seconds(in_turn)[0]) for _ in range(5))))
    values = np.array([float(fit.penalized_log_likelihood) for fit in each])
    apart = np.max(np.abs(np.asarray(fits.penalized_log_likelihood) / values - 1))
    print(f"first: {first:.1f} s, loop {first_loop:.1f} s, {first_loop / first:.1f} times")
    print(
        f"warm: {warm:.2f} s, loop {warm_loop:.2f} s, {warm_loop / warm:.1f} times; J differs by {apart:.0e} of itself"
    )
