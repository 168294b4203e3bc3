"""Time and memory against points, components, features, pairs, files and devices, with slopes.

    python benchmarks/scale.py [steps] [pairs] [files] [devices] [--largest 1e7] [--out results.json]

Devices are simulated, on the cores that there are. An EM step takes what a fit of many steps takes more than one of few. A slope is
that of logarithms: 1 is in proportion.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import coupled_gmm as cg

STEPS = {  # what is varied: N, K, d of each
    "N": [(10**4, 8, 4), (10**5, 8, 4), (10**6, 8, 4), (10**7, 8, 4), (10**8, 8, 4)],
    "K": [(10**6, 2, 4), (10**6, 8, 4), (10**6, 32, 4), (10**6, 128, 4)],
    "d": [(10**6, 8, 2), (10**6, 8, 4), (10**6, 8, 8), (10**6, 8, 16), (10**6, 8, 32)],
}
PAIRS = [16, 64, 256, 1024, 4096]
FILES = [10**6, 10**7, 10**8]
DEVICES = [1, 2, 4, 8]
ON_DEVICES = """
import jax, scale
import coupled_gmm as cg
x, start = scale.problem({n}, 20, 10)
mesh = jax.make_mesh((len(jax.devices()),), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
points = cg.shard_cloud(x, mesh)[0] if mesh.size > 1 else jax.device_put(x)
print(scale.per_step(points, start))
"""


def seconds(call):
    begin = time.perf_counter()
    value = jax.block_until_ready(call())
    return time.perf_counter() - begin, value


def problem(n: int, k: int, d: int) -> tuple[np.ndarray, cg.GaussianMixture]:
    rng = np.random.default_rng(n + k + d)
    means = 4 * rng.normal(size=(k, d))
    x = np.empty((n, d), np.float32)
    for first in range(0, n, 10**6):
        part = x[first : first + 10**6]
        part[:] = means[rng.integers(k, size=len(part))] + rng.standard_normal(part.shape, np.float32)
    start = cg.GaussianMixture.from_moments(means + 0.5, np.tile(2 * np.eye(d), (k, 1, 1)), np.full(k, 1 / k))
    return x, start


def per_step(x, start, few: int = 2, many: int = 12) -> float:
    def fit(n_steps):
        return seconds(lambda: cg.fit_gmm(x, start, tol=0, max_steps=n_steps).log_likelihood)[0]

    fit(few)
    return max(1e-9, min(fit(many) for _ in range(3)) - min(fit(few) for _ in range(3))) / (many - few)


def slope(sizes, times) -> float:
    """Of the last half: what large ones come to."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(times[half:]), 1)[0])


def steps(largest: int) -> dict:
    found = {}
    for varied, shapes in STEPS.items():
        shapes = [shape for shape in shapes if shape[0] * shape[2] <= 4 * largest]
        times = []
        for shape in shapes:
            x, start = problem(*shape)
            times.append(per_step(jax.device_put(x), start))
            n, k, d = shape
            rate = n * k * 4 * d * d / times[-1] / 1e9  # two products of d x d a point and component
            print(f"N {n:>11,} K {k:>4} d {d:>3}: {1e3 * times[-1]:9.3f} ms a step, {rate:8.1f} GFLOP/s", flush=True)
        sizes = [shape["NKd".index(varied)] for shape in shapes]
        found[varied] = {"sizes": sizes, "seconds": times, "slope": slope(sizes, times)}
        print(f"  against {varied}: slope {found[varied]['slope']:.2f}", flush=True)
    return found


def cohort(size: int, n: int) -> tuple[list, list, list]:
    """Pairs of the tutorial's kind: two clouds of n x 2, three components each, which all fits start at."""
    rng = np.random.default_rng(0)
    means = 3 * rng.normal(size=(size, 3, 2))
    sides = [[(m[rng.integers(3, size=n)] + rng.normal(size=(n, 2))).astype(np.float32) for m in means] for _ in "01"]
    gmms = [cg.GaussianMixture.from_moments(m, np.tile(np.eye(2), (3, 1, 1)), np.full(3, 1 / 3)) for m in means]
    return *sides, [cg.GaussianMixturePair(gmm, gmm) for gmm in gmms]


def pairs(largest: int, n: int = 1000) -> dict:
    sizes, options = [size for size in PAIRS if size * n <= largest], {"transport_weight": 0.01, "tol": 1e-5}
    times, loops = [], []
    for size in sizes:
        given = cohort(size, n)

        def together(given=given):
            return cg.fit_pairs(*given, **options)

        def in_turn(given=given):
            return [cg.fit_pair(*one, **options) for one in zip(*(some[:8] for some in given), strict=True)]

        first, fits = seconds(together)
        times.append(min(seconds(together)[0] for _ in range(3)))
        in_turn()
        loops.append(seconds(in_turn)[0] / 8)
        print(
            f"{size:>5} pairs of {n:,}: first {first:6.2f} s, warm {times[-1]:.3f} s, {size / times[-1]:8.0f} fits/s, "
            f"{float(np.mean(np.asarray(fits.n_steps))):.1f} steps; a loop of fit_pair {1 / loops[-1]:8.0f} fits/s",
            flush=True,
        )
    return {"sizes": sizes, "seconds": times, "loop": loops, "slope": slope(sizes, times)}


def resident() -> float:
    """Megabytes at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def files(largest: int) -> dict:
    """Clouds n x 2 in a .npy file: a step of `fit_gmm` beside a pass of reading and a step of the same fit in memory."""
    found = []
    for n in [size for size in FILES if size <= largest]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cloud.npy"
            x, start = problem(min(n, 10**6), 3, 2)
            on_disk = np.lib.format.open_memmap(path, "w+", np.float32, (n, 2))
            for first in range(0, n, len(x)):
                on_disk[first : first + len(x)] = x
            on_disk.flush()
            del on_disk
            in_memory = per_step(jax.device_put(x), start) * (n / len(x))
            cloud = cg.open_cloud(path)
            reading = min(seconds(lambda cloud=cloud: [None for _ in cloud.chunks()])[0] for _ in range(2))
            cg.fit_gmm(cloud, start, tol=0, max_steps=1)
            before = resident()
            few = seconds(lambda cloud=cloud, start=start: cg.fit_gmm(cloud, start, tol=0, max_steps=1))[0]
            many = seconds(lambda cloud=cloud, start=start: cg.fit_gmm(cloud, start, tol=0, max_steps=4))[0]
            step, grown = (many - few) / 3, resident() - before
        part = max(reading, in_memory) / step
        found.append({"n": n, "step": step, "reading": reading, "in memory": in_memory, "MB": grown})
        print(
            f"N {n:>11,}: {step:.3f} s a step; reading alone {reading:.3f}, in memory {in_memory:.3f}: {part:.2f} of the "
            f"slower; memory +{grown:.0f} MB",
            flush=True,
        )
    return {"files": found}


def devices(largest: int) -> dict:
    """A cloud n x 10, K 20, over simulated devices."""
    n, times = min(largest, 500_000), []
    for count in DEVICES:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        code = [sys.executable, "-c", ON_DEVICES.format(n=n)]
        end = subprocess.run(
            code, env=os.environ | {"XLA_FLAGS": flags}, cwd=Path(__file__).parent, capture_output=True, text=True
        )
        if end.returncode:
            raise RuntimeError(end.stderr)
        times.append(float(end.stdout))
        print(f"{count} devices, N {n:,}, K 20, d 10: {1e3 * times[-1]:.1f} ms a step", flush=True)
    return {"sizes": DEVICES, "seconds": times}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=["steps", "pairs", "files", "devices", []])
    parser.add_argument("--largest", type=float, default=1e7, help="points at most")
    parser.add_argument("--points", type=int, default=1000, help="points in each cloud of a pair")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}")
    results, largest = {}, int(arguments.largest)
    for section in arguments.sections or ["steps", "pairs", "files", "devices"]:
        if section == "pairs":
            results[section] = pairs(largest, arguments.points)
        else:
            results[section] = {"steps": steps, "files": files, "devices": devices}[section](largest)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1))
