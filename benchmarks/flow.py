"""Flows beside POT's, whose loss torch differentiates, in one process: POT's published one and a larger one.

    python benchmarks/flow.py [--out results.json]          needs torch: pip install torch

Adam on means, at twice the rate, covariances, projected after every step, and logits of weights, on either side, in float32;
errors are the largest of the losses against POT's in float64. Times are the best of a few runs, by turns; the first call, with
compilation, stands apart.
"""

import argparse
import json
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import ot
from rich.console import Console
from rich.table import Table
from transport import by_turns, mixtures

import coupled_gmm as cg

console = Console(width=140)
SEED = Path(__file__).parents[1] / "tests" / "data" / "flow_seed3.npz"  # POT's example: torch seed 3
POT_END = 0.0194  # the loss after the published 100 steps
RATE = 3e-2


def published() -> tuple[cg.GaussianMixture, cg.GaussianMixture]:
    with np.load(SEED) as arrays:
        weights = jax.nn.softmax(arrays["source_logits"])
        source = cg.GaussianMixture.from_moments(arrays["source_means"], arrays["source_covariances"], weights)
        target = (arrays[f"target_{part}"] for part in ("means", "covariances", "weights"))
        return source, cg.GaussianMixture.from_moments(*target)


def pot_flow(source: cg.GaussianMixture, target: cg.GaussianMixture, steps: int, dtype=np.float32) -> np.ndarray:
    """The losses before each step."""
    import torch

    def tensor(array) -> torch.Tensor:
        return torch.tensor(np.asarray(array, dtype))

    parameters = [tensor(x) for x in (source.means, source.covariances, np.log(source.weights))]
    means, covariances, logits = (x.requires_grad_() for x in parameters)
    goal = [tensor(x) for x in (target.means, target.covariances, target.weights)]
    groups = zip((means, covariances, logits), (2 * RATE, RATE, RATE))
    adam = torch.optim.Adam([{"params": x, "lr": rate} for x, rate in groups])
    losses = []
    for _ in range(steps):
        adam.zero_grad()
        weights = torch.softmax(logits, 0)
        loss = ot.gmm.gmm_ot_loss(means, goal[0], covariances, goal[1], weights, goal[2])
        loss.backward()
        adam.step()
        with torch.no_grad():
            values, frames = torch.linalg.eigh(covariances)
            covariances.copy_((frames * values.clamp(min=1e-6)[:, None]) @ frames.mT)
        losses.append(loss.item())
    return np.array(losses)


def against_pot(results: dict) -> None:
    columns = (
        "flow",
        "first, s",
        "warm, s",
        "POT + torch, s",
        "POT / warm",
        "error",
        "POT's error",
        "last loss",
    )
    table = Table(*columns, title="The same flow by Adam")
    problems = {
        "POT's example, 100 steps": (*published(), 100),
        "50 to 50, d 16, 20 steps": (*mixtures(50, 50, 16), 20),
    }
    for name, (source, target, steps) in problems.items():
        options = {"steps": steps, "step_size": RATE, "optimizer": optax.adam, "mean_rate": 2.0}
        calls = {"ours": partial(cg.flow, source, target, **options), "POT": partial(pot_flow, source, target, steps)}
        timings = by_turns(calls)
        ours, theirs = timings["ours"], timings["POT"]
        right, losses = pot_flow(source, target, steps, np.float64), np.asarray(ours.value.history.loss)
        errors = [float(np.abs(found - right).max()) for found in (losses, theirs.value)]
        times = (ours.first, ours.warm, theirs.warm, theirs.warm / ours.warm)
        results[name] = dict(zip(("first", "warm", "POT", "ratio", "error", "POT error"), (*times, *errors)))
        table.add_row(name, *(f"{v:.3g}" for v in times), *(f"{e:.1e}" for e in errors), f"{right[-1]:.5f}")
    console.print(table)


def default_steps(results: dict) -> None:
    table = Table("step size", f"steps to {POT_END}", "loss after 100", "first, s", "warm, s", title="Ours by default")
    source, target = published()
    for step_size in (0.1, 0.2, 0.3):
        timing = by_turns({"ours": partial(cg.flow, source, target, step_size=step_size)}, budget=0.2)["ours"]
        losses = np.append(timing.value.history.loss, timing.value.loss)
        steps = int(np.argmax(losses < POT_END))
        results[f"default, step size {step_size}"] = {"steps": steps, "first": timing.first, "warm": timing.warm}
        row = (str(steps), f"{losses[-1]:.1e}", f"{timing.first:.3g}", f"{timing.warm:.3g}")
        table.add_row(f"{step_size:g}", *row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="write the numbers to this JSON file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    console.print(f"jax {jax.__version__} on {jax.devices()[0].platform}, {jax.devices()[0].device_kind}")
    results: dict = {}
    against_pot(results)
    default_steps(results)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
