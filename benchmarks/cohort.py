"""A cohort in one process: samples of as many sizes, each through the start, the fit, the coupled fit, densities and the map.

    python benchmarks/cohort.py [SAMPLES]

Every number of points is another; K goes from 2 to 5. Prints what was compiled so far, the process's memory maps (Linux allows
65,530) and resident memory, and the seconds of a sample that compiled nothing.
"""

import sys
import time

import jax
import numpy as np

import coupled_gmm as cg
from coupled_gmm.core import programs

SHOWN = (1, 10, 30, 100, 300, 1000)
FEWEST, MOST = 300, 30_000


def sample(rng: np.random.Generator, centres: np.ndarray, n: int) -> np.ndarray:
    return (centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, 2))).astype(np.float32)


def through(number: int, x0: np.ndarray, x1: np.ndarray, n_components: int) -> None:
    """Everything that is done with a sample; what comes out is looked at, so that it is there."""
    start = cg.init_gmm(jax.random.key(number), x0, n_components, n_init=2)
    alone = cg.fit_gmm(x0, start).gmm
    fit = cg.fit_pair(x0, x1, cg.GaussianMixturePair(alone, alone), transport_weight=0.01, tol=1e-4)
    log_prob, images = alone.log_prob(x1), cg.map_points(fit.plan, x0)
    assert log_prob.shape == (len(x1),) and images.shape == x0.shape
    assert np.isfinite(log_prob).all() and np.isfinite(images).all()


def main(n_samples: int) -> None:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    rng = np.random.default_rng(0)
    sizes = rng.permutation(np.unique(np.geomspace(FEWEST, MOST, 3 * n_samples).astype(int)))[:n_samples]
    began, warm, compiling = time.perf_counter(), [], 0
    print(f"{'samples':>8} {'compiled':>9} {'in':>4} {'maps':>7} {'MB':>6} {'s':>7} {'s each, warm':>13}")
    for number, n in enumerate(sizes.tolist()):
        n_components = 2 + number % 4
        centres = 4 * rng.normal(size=(n_components, 2))
        clouds = sample(rng, centres, n), sample(rng, centres + 0.5, int(rng.integers(max(FEWEST, n // 2), n + 1)))
        before, start = len(compiled), time.perf_counter()
        through(number, *clouds, n_components)
        took = time.perf_counter() - start
        compiling += len(compiled) > before
        warm += [took] if len(compiled) == before else []
        if number + 1 in (*SHOWN, n_samples):
            with open("/proc/self/statm", encoding="ascii") as pages:
                resident = int(pages.read().split()[1]) * 4 // 1024
            each = f"{np.median(warm):.3f}" if warm else ""
            row = f"{len(compiled):>9} {compiling:>4} {programs.n_maps():>7} {resident:>6}"
            print(f"{number + 1:>8} {row} {time.perf_counter() - began:>7.1f} {each:>13}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else SHOWN[-1])
