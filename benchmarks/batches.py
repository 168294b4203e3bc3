"""Batches beside loops of single calls: `python benchmarks/batches.py`, some three minutes.

64 pairs of clouds, 500 to 5,000 points each, 2 to 6 components, d 2, tol 1e-5. First calls compile all their programs, warm ones
are the best of five, by turns.
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


def compare(name, together, in_turn, value):
    """Seconds of a batch and of a loop, and by how much of itself what is compared differs at most."""
    jax.clear_caches()
    first, batch = seconds(together)
    jax.clear_caches()
    first_loop, each = seconds(in_turn)
    together(), in_turn()
    warm, warm_loop = (min(times) for times in zip(*((seconds(together)[0], seconds(in_turn)[0]) for _ in range(5))))
    apart = max(abs(value(one) / value(other) - 1) for one, other in zip(batch, each, strict=True))
    print(
        f"{name}: first {first:.1f} s, loop {first_loop:.1f} s, {first_loop / first:.1f} times; warm {warm:.2f} s, loop "
        f"{warm_loop:.2f} s, {warm_loop / warm:.1f} times; apart {apart:.0e}",
        flush=True,
    )


if __name__ == "__main__":
    clouds0, clouds1, starts = (list(each) for each in zip(*map(pair, range(64))))
    key, sizes = jax.random.key(0), [start.gmm0.n_components for start in starts]
    keys = [jax.random.fold_in(key, i) for i in range(64)]
    compare(
        "fit_pairs",
        lambda: cg.fit_pairs(clouds0, clouds1, starts, **OPTIONS),
        lambda: [cg.fit_pair(x0, x1, start, **OPTIONS) for x0, x1, start in zip(clouds0, clouds1, starts)],
        lambda fit: float(fit.penalized_log_likelihood),
    )
    compare(
        "fit_gmms",
        lambda: cg.fit_gmms(clouds0, [start.gmm0 for start in starts]),
        lambda: [cg.fit_gmm(x, start.gmm0) for x, start in zip(clouds0, starts)],
        lambda fit: float(fit.log_likelihood),
    )
    compare(
        "init_gmms",
        lambda: cg.init_gmms(key, clouds0, sizes),
        lambda: [cg.init_gmm(*one) for one in zip(keys, clouds0, sizes)],
        lambda gmm: float(gmm.weights[0]),
    )
