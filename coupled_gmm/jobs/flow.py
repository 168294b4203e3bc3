"""The job `flow`: a mixture on its way to others, from its configuration to its pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import numpy as np
import optax
import polars as pl
from pydantic import model_validator
from rich.console import Console

import coupled_gmm as cg
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.jobs import mixtures
from coupled_gmm.jobs.config import JobConfig, Output, PlanOptions, Positive, Steps
from coupled_gmm.jobs.job import Job
from coupled_gmm.jobs.mixtures import Members, Mixture
from coupled_gmm.jobs.sections import blame, refuse
from coupled_gmm.jobs.tables import Sheet, component_sheet, component_table, history_table
from coupled_gmm.jobs.terminal import say

_KEYS = {"source": "source"}  # of arguments whose key stands in another section
_MOST_ROWS = 11  # of losses


class Flow(PlanOptions):
    """The steps; the names are those of `flow`."""

    steps: Steps = 100
    step_size: Positive = 0.1
    optimizer: Literal["geometric", "adam"] = "geometric"
    mean_rate: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optimizer == "geometric" and self.mean_rate is not None:
            raise refuse("geometric steps have none; remove it, or set optimizer = 'adam'", "mean_rate")
        return self


class FlowConfig(JobConfig):
    command = "flow"
    source: Mixture
    targets: Members
    flow: Flow = Flow()
    output: Output = Output()


class FlowInputs(NamedTuple):
    """The mixture that flows, and those that pull."""

    source: GaussianMixture
    targets: list[GaussianMixture]


class FlowJob(Job[FlowConfig, FlowInputs, cg.FlowFit]):
    summary = "Let a mixture flow to others, and keep its path."
    config = FlowConfig
    result = cg.FlowFit
    files = ("history.csv", "mixture.csv", "flow.gif", "flow.png", "loss.png")
    measures = ("loss",)

    def read(self, path: Path, config: FlowConfig) -> FlowInputs:
        source = mixtures.read(path, "source", config.source, config.precision)
        return FlowInputs(source, mixtures.read_all(path, "targets", config.targets, config.precision))

    def solve(
        self, path: Path, config: FlowConfig, inputs: FlowInputs, console: Console
    ) -> tuple[FlowConfig, cg.FlowFit]:
        section = config.flow
        say(console, f"source: {mixtures.described([inputs.source])}")
        say(console, f"targets: {mixtures.described(inputs.targets)}")
        options = {name: getattr(section, name) for name in ("steps", "step_size", "method", "epsilon")}
        options["coefficients"] = [member.coefficient for member in config.targets]
        if section.optimizer == "adam":
            options |= {"optimizer": optax.adam, "mean_rate": 1.0 if section.mean_rate is None else section.mean_rate}
        with console.status("compiling and running the flow"), blame(path, "flow", Flow, _KEYS):
            return config, jax.block_until_ready(cg.flow(inputs.source, inputs.targets, **options))

    def tables(self, result: cg.FlowFit) -> dict[str, pl.DataFrame]:
        return {"history.csv": history_table({"loss": _losses(result)}), "mixture.csv": component_table(result.gmm)}

    def sheets(self, result: cg.FlowFit) -> Sequence[Sheet]:
        return _descent(result), component_sheet("Mixture at the end", result.gmm)

    def kept(self, inputs: FlowInputs) -> list[GaussianMixture]:
        return inputs.targets

    def drawn(self, result: cg.FlowFit) -> Any:
        return result.path, _losses(result)

    def figures(self, config: FlowConfig, result: cg.FlowFit, inputs: FlowInputs) -> dict[str, Any]:
        from coupled_gmm.plot import barycenters

        return {
            "flow.png": barycenters.plot_flow(result, inputs.targets),
            "loss.png": barycenters.plot_loss(_losses(result), title="Flow", ylabel="loss"),
        }

    def draw(self, folder: Path, config: FlowConfig, result: cg.FlowFit, inputs: FlowInputs) -> None:
        from coupled_gmm.plot import barycenters

        super().draw(folder, config, result, inputs)
        barycenters.save_animation(folder / "flow.gif", result, inputs.targets)


def _losses(fit: cg.FlowFit) -> np.ndarray:
    """Before each step and, which the history does not hold, at the end."""
    return np.append(np.asarray(fit.history.loss), np.asarray(fit.loss))


def _descent(fit: cg.FlowFit) -> Sheet:
    """The loss at some steps, the last of them the end."""
    losses = _losses(fit)
    steps = np.unique(np.linspace(0, len(losses) - 1, _MOST_ROWS).round().astype(int)).tolist()
    columns = {"steps done": [str(step) for step in steps], "loss": [f"{losses[step]:.5g}" for step in steps]}
    return Sheet("Descent", columns)
