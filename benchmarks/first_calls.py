"""First calls of the public functions beside OTT's first fit, in one process: seconds, programs compiled, and warm seconds.

    python benchmarks/first_calls.py [--no-ott] [--cache DIR]

On OTT's tutorial: two clouds of 10,000 x 2, K = 3. With a cache JAX keeps compiled programs in that folder: run it twice.
"""

import argparse
import warnings

import jax
import numpy as np
import ott_tutorial
from coupled_fit import console, seconds
from rich.table import Table

import coupled_gmm as cg

compiled: list[str] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-ott", action="store_true", help="leave OTT's fit out")
    parser.add_argument("--cache", help="keep compiled programs in this folder")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.cache:
        jax.config.update("jax_compilation_cache_dir", arguments.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    data = ott_tutorial.tutorial()
    theirs = None if arguments.no_ott else seconds(lambda: ott_tutorial.ott_fit(data, "balanced"))
    table = Table("call", "first, s", "programs", "warm, ms", title="First calls")
    total = 0.0
    for name, first, count, warm in calls(np.asarray(data.x0), np.asarray(data.x1)):
        total += first
        table.add_row(name, f"{first:.2f}", str(count), f"{1e3 * warm:.3g}")
        if theirs and name == "fit_pair":
            console.print(f"fit_pair: {first / theirs:.2f} of OTT's first fit ({theirs:.2f} s)")
    console.print(table)
    console.print(f"sum {total:.1f} s" + (f": {total / theirs:.2f} times OTT's first fit" if theirs else ""))


def calls(x0: np.ndarray, x1: np.ndarray):
    """Name, seconds of the first call, programs that it compiled, seconds of later ones; what one returns the next may take."""
    key, both = jax.random.PRNGKey(0), np.concatenate([x0, x1])
    found: dict = {}

    def timed(name, call):
        before = len(compiled)
        first = seconds(lambda: found.setdefault(name, call()))
        return name, first, len(compiled) - before, min(seconds(call) for _ in range(5))

    yield timed("init_gmm", lambda: cg.init_gmm(key, both, 3))
    yield timed("fit_gmm", lambda: cg.fit_gmm(both, found["init_gmm"]))
    start = found["fit_gmm"].gmm
    yield timed("pair, epsilon None", lambda: cg.GaussianMixturePair(start, start))
    yield timed("fit_pair", lambda: cg.fit_pair(x0, x1, found["pair, epsilon None"], transport_weight=0.01))
    pair = found["pair, epsilon None"]
    yield timed("fit_pair, 9,000 points", lambda: cg.fit_pair(x0[:9000], x1[:9000], pair, transport_weight=0.01))
    unbalanced = cg.GaussianMixturePair(start, start, epsilon=0.01, rho=1.0)
    yield timed("fit_pair, unbalanced", lambda: cg.fit_pair(x0, x1, unbalanced, transport_weight=0.1))
    pair = found["fit_pair"].pair
    yield timed("solve_plan", lambda: cg.solve_plan(pair))
    yield timed("solve_plan, exact", lambda: cg.solve_plan(pair, method="exact"))
    yield timed("mw2_squared", lambda: cg.mw2_squared(pair.gmm0, pair.gmm1))
    yield timed("its gradient", lambda: jax.grad(lambda gmm: cg.mw2_squared(gmm, pair.gmm1))(pair.gmm0))
    yield timed("map_points", lambda: cg.map_points(found["solve_plan"], x0))
    yield timed("interpolate", lambda: cg.interpolate(found["solve_plan"], 0.5))
    yield timed("barycenter", lambda: cg.barycenter([pair.gmm0, pair.gmm1], pair.gmm0))
    yield timed("flow", lambda: cg.flow(pair.gmm0, pair.gmm1))
    yield timed("reduce_gmm", lambda: cg.reduce_gmm(key, pair.gmm0, 2))
    yield timed("log_prob", lambda: pair.gmm0.log_prob(x0))
    yield timed("sample", lambda: pair.gmm0.sample(key, 1000))


if __name__ == "__main__":
    main()
