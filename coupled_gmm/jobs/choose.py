"""The job `choose`: how many components, and how dear transport, of a pair of clouds or of a graph of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import polars as pl
from pydantic import Field, model_validator
from rich.console import Console

import coupled_gmm as cg
from coupled_gmm.jobs.clouds import CloudPair, Data, described, read_pair
from coupled_gmm.jobs.config import Count, JobConfig, NonNegative, Positive, Precision, Seed, Starts, Steps
from coupled_gmm.jobs.coupled import CoupledFit, FitOutput, Start
from coupled_gmm.jobs.fit import Fit, FitConfig, FitJob
from coupled_gmm.jobs.graph import KEYS, GraphConfig, GraphJob, NodeStart, has_several
from coupled_gmm.jobs.job import Job
from coupled_gmm.jobs.nodes import Graph, NodeClouds, NodeData, read_nodes
from coupled_gmm.jobs.sections import Section, blame, dump, refuse
from coupled_gmm.jobs.tables import MOST_ROWS, Sheet
from coupled_gmm.jobs.terminal import say

CHOSEN = "chosen.toml"
_EPSILON = 1e-2  # of the mean cost, where nobody says
_OPTIONS = ("relative_weights", "n_components", "epsilons", "rhos", "folds", "rule", "held_out", "n_init", "em_steps")
_OPTIONS += ("m_steps", "tol", "ridge")


class Choose(Section):
    """What is compared, and by what; the names are those of `choose`."""

    n_components: Annotated[list[Count], Field(min_length=1)] | None = None
    relative_weights: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    epsilons: Annotated[list[Positive], Field(min_length=1)] | None = None
    rhos: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    folds: Annotated[int, Field(ge=2, le=2**31 - 1)] = 5
    rule: Literal["one_standard_error", "best", "corner"] = "one_standard_error"
    held_out: Literal["points", "nodes"] = "points"
    seed: Seed = 0
    n_init: Starts = 4
    em_steps: Steps = 200
    m_steps: Steps = 20
    tol: NonNegative = 1e-5
    ridge: NonNegative = 1e-6
    precision: Precision = "float32"

    def options(self) -> dict[str, Any]:
        """What the function takes by the same names."""
        return {name: getattr(self, name) for name in _OPTIONS}

    def fitted(self, choice: cg.Choice) -> dict[str, Any]:
        """Keys of [fit] that say what the chosen fit was fitted with."""
        epsilons, rhos = sorted(set(self.epsilons or [_EPSILON])), sorted(set(self.rhos or [np.inf]))
        place = int(choice.groups[int(choice.row)]) % (len(epsilons) * len(rhos))  # rows are in the order of these
        epsilon, rho = epsilons[place // len(rhos)], rhos[place % len(rhos)]
        keys = {"relative_weight": choice.chosen["relative_weight"], "relative_epsilon": epsilon}
        keys |= {"relative_rho": rho} if np.isfinite(rho) else {}
        return keys | {name: getattr(self, name) for name in ("em_steps", "m_steps", "tol", "ridge", "precision")}

    def start(self, choice: cg.Choice) -> dict[str, Any]:
        """Keys of [start], likewise."""
        return {"n_components": choice.chosen["n_components"], "seed": self.seed}


class ChooseConfig(JobConfig):
    command = "choose"
    data: Data
    choose: Choose
    output: FitOutput = FitOutput()

    def completed(self) -> "ChooseConfig":
        return self.model_copy(update={"data": self.data.completed()})

    def chosen(self, choice: cg.Choice) -> JobConfig:
        """The configuration by which `coupled-gmm fit` fits what was chosen, from a start of its own."""
        start, fit = Start(**self.choose.start(choice)), Fit(**self.choose.fitted(choice))
        return FitConfig(data=self.data, start=start, fit=fit)


class ChooseGraphConfig(JobConfig):
    command = "choose"
    data: NodeData
    graph: Graph = Graph()
    choose: Choose
    output: FitOutput = FitOutput()

    @model_validator(mode="after")
    def _one_each(self) -> "ChooseGraphConfig":
        self.graph.check(self.data)
        if self.graph.frozen:
            raise refuse("is for mixtures that are there, and all of a choice are fitted; remove it", "graph.frozen")
        return self

    @classmethod
    def claims(cls, values: Mapping[str, Any]) -> bool:
        return "graph" in values or has_several(values)

    def completed(self) -> "ChooseGraphConfig":
        return self.model_copy(update={"data": self.data.completed(), "graph": self.graph.completed(self.data)})

    def chosen(self, choice: cg.Choice) -> JobConfig:
        start, fit = NodeStart(**self.choose.start(choice)), CoupledFit(**self.choose.fitted(choice))
        return GraphConfig(data=self.data, graph=self.graph, start=start, fit=fit)


class ChooseJob(Job[Any, Any, cg.Choice]):
    summary = "Choose the number of components and the weight of transport, by what points say that no fit has seen."
    config = ChooseConfig
    result = cg.Choice
    files = ("table.csv", CHOSEN, "choice.png", *FitJob.files)
    measures = ("n_components", "relative_weight", "held_out")

    def read(self, path: Path, config: Any) -> Any:
        return read_pair(path, config.data, config.precision)

    def problem(
        self, config: Any, inputs: CloudPair | Any
    ) -> tuple[Sequence[Any], Sequence[Any], tuple, dict[str, Any]]:
        """Clouds, their points' weights, what goes for a graph, and what goes beside it."""
        return inputs.points, inputs.weights, (jax.random.key(config.choose.seed),), {}

    def solve(self, path: Path, config: Any, inputs: Any, console: Console) -> tuple[Any, cg.Choice]:
        for note in inputs.notes:
            say(console, note)
        if inputs.names is not None:
            config = config.model_copy(update={"data": config.data.model_copy(update={"columns": list(inputs.names)})})
        points, weights, graph, beside = self.problem(config, inputs)
        say(console, described([x for x in points if x is not None], config.precision))
        with blame(path, "choose", Choose, KEYS):
            choice = cg.choose(
                points,
                *graph,
                point_weights=weights,
                progress=not console.quiet,
                **beside,
                **config.choose.options(),
            )
        return config, choice

    def tables(self, result: cg.Choice) -> dict[str, pl.DataFrame]:
        return {"table.csv": pl.DataFrame(result.table), **_job(result).tables(result.fit)}

    def texts(self, config: Any, result: cg.Choice) -> dict[str, str]:
        words = (
            "# What `coupled-gmm choose` chose; `coupled-gmm fit` fits it again, from one mixture for all clouds.\n\n"
        )
        return {CHOSEN: words + dump(config.chosen(result))}

    def sheets(self, result: cg.Choice) -> Sequence[Sheet]:
        return _table(result), *_job(result).sheets(result.fit)

    def measured(self, result: cg.Choice) -> dict[str, float | int]:
        row = result.table[int(result.row)]
        return {name: row[name] for name in self.measures}

    def drawn(self, result: cg.Choice) -> Any:
        return _job(result).drawn(result.fit)

    def figures(self, config: Any, result: cg.Choice, inputs: Any) -> dict[str, Any]:
        from coupled_gmm.plot import choices

        return {"choice.png": choices.plot_choice(result), **_job(result).figures(config, result.fit, inputs)}


class ChooseGraphJob(ChooseJob):
    config = ChooseGraphConfig
    files = ("table.csv", CHOSEN, "choice.png", *GraphJob.files)

    def read(self, path: Path, config: Any) -> NodeClouds:
        return read_nodes(path, config.data, config.graph, config.precision)

    def problem(self, config: Any, inputs: Any) -> tuple[Sequence[Any], Sequence[Any], tuple, dict[str, Any]]:
        d = inputs.given[0][0].shape[1]
        one = cg.GaussianMixture.from_moments(np.zeros((1, d)), np.eye(d)[None], np.ones(1))  # until there are others
        graph = config.graph.build([one] * len(inputs.points), epsilon=1.0)
        return inputs.points, inputs.weights, (graph,), {"key": jax.random.key(config.choose.seed)}


def _job(choice: cg.Choice) -> Job[Any, Any, Any]:
    """Whose tables and pictures are those of the chosen fit."""
    return FitJob() if isinstance(choice.fit, cg.PairFit) else GraphJob()


def _table(choice: cg.Choice) -> Sheet:
    """A row for each fit, the likeliest where they are many, and the chosen one marked."""
    rows, chosen = choice.table, int(choice.row)
    shown, title = list(range(len(rows))), "Held-out log-likelihood of what was compared"
    if len(rows) > MOST_ROWS:
        order = np.argsort([row["loss"] for row in rows], kind="stable")[:MOST_ROWS].tolist()
        shown = sorted({*order, chosen})
        title += f", the likeliest of {len(rows)} (all are in table.csv)"
    forms = {
        "n_components": ("components", "d"),
        "relative_weight": ("relative weight", "g"),
        "epsilon": ("epsilon", ".4g"),
        "rho": ("rho", ".4g"),
        "held_out": ("held out", ".5f"),
        "loss": ("less than best", ".5f"),
        "loss_error": ("+-", ".5f"),
        "bic": ("BIC", ".1f"),
        "aic": ("AIC", ".1f"),
    }
    columns = {"": ["chosen" if i == chosen else "" for i in shown]}
    columns |= {title: [format(rows[i][name], form) for i in shown] for name, (title, form) in forms.items()}
    return Sheet(title, columns)
