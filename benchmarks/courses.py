"""Chains of many clouds beside chains of few: `python benchmarks/courses.py [--nodes 2 10 40]`, some two minutes.

N 10,000 points a node, K 10, d 10, components that overlap and drift. A fit is one compiled call. Seconds of an EM step are
what 20 steps add to a fit of five, the least of some runs by turns: of processors, which other work on the machine changes
little, and of the clock.
"""

import argparse
import time

import jax
import numpy as np

import coupled_gmm as cg

N, K, D = 10_000, 10, 10
FEW, MANY = 5, 25


def problem(n_nodes: int) -> tuple[list[np.ndarray], cg.MixtureGraph]:
    """Clouds of components that drift, and a start beside them."""
    rng = np.random.default_rng(0)
    means, drift = 1.5 * rng.normal(size=(K, D)), 0.1 * rng.normal(size=(K, D))
    clouds, starts = [], []
    for v in range(n_nodes):
        at = means + v * drift
        clouds.append((at[rng.integers(K, size=N)] + rng.normal(size=(N, D))).astype(np.float32))
        starts.append(cg.GaussianMixture.from_moments(at + 0.5, np.tile(2 * np.eye(D), (K, 1, 1)), np.full(K, 1 / K)))
    return clouds, cg.chain(starts, edge_weights=1e-3, epsilon=1.0)


def seconds(clouds: list, graph: cg.MixtureGraph, steps: int) -> np.ndarray:
    """Of processors and of the clock."""
    begin = time.process_time(), time.perf_counter()
    jax.block_until_ready(cg.fit_graph(clouds, graph, em_steps=steps, fidelity=False))
    return np.array([time.process_time(), time.perf_counter()]) - begin


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 10, 40])
    parser.add_argument("--runs", type=int, default=4)
    asked = parser.parse_args()
    problems = {v: problem(v) for v in asked.nodes}
    first = {v: seconds(*given, FEW) for v, given in problems.items()}
    runs = [{v: [seconds(*given, n) for n in (FEW, MANY)] for v, given in problems.items()} for _ in range(asked.runs)]
    least = {v: np.min([run[v] for run in runs], axis=0) for v in problems}
    steps = {v: (many - few) / (MANY - FEW) for v, (few, many) in least.items()}
    base = asked.nodes[0]
    for v in problems:
        times = v / base
        whole, step = least[v][0] / least[base][0] / times, steps[v] / steps[base] / times
        print(
            f"{v} nodes: first call {first[v][1]:.1f} s; {FEW} steps {least[v][0][0]:.3f} processor s, {least[v][0][1]:.3f} s, "
            f"that is {whole[0]:.2f}, {whole[1]:.2f} of {times:g} times {base} nodes'; a step {steps[v][0]:.4f}, "
            f"{steps[v][1]:.4f} s, {step[0]:.2f}, {step[1]:.2f}",
            flush=True,
        )
