"""The job `barycenter`: the mixture closest to several, from its configuration to its pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import jax
import numpy as np
import polars as pl
from pydantic import Field, model_validator
from rich.console import Console

import coupled_gmm as cg
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.jobs import mixtures
from coupled_gmm.jobs.config import Count, JobConfig, NonNegative, Output, PlanOptions, Seed, Starts, Steps
from coupled_gmm.jobs.job import Job
from coupled_gmm.jobs.mixtures import Members, Mixture
from coupled_gmm.jobs.sections import ConfigError, Section, blame, refuse
from coupled_gmm.jobs.tables import Sheet, component_sheet, component_table, history_table, quantities
from coupled_gmm.jobs.terminal import say

RANDOM_STARTS = 10
_KEYS = {"init": "start.mixtures"}  # of arguments whose key has another name


class BarycenterStart(Section):
    """Mixtures to start from, or how to draw some from the components of those given."""

    mixtures: Annotated[list[Mixture], Field(min_length=1)] | None = None
    n_components: Count | None = None
    seed: Seed | None = None
    n_init: Starts | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.mixtures is None and self.n_components is None:
            raise refuse("missing; say how many to draw, or give [[start.mixtures]]", "n_components")
        for key in ("n_components", "seed", "n_init"):
            if self.mixtures is not None and getattr(self, key) is not None:
                raise refuse("is for starts that are drawn; remove it, or remove [[start.mixtures]]", key)
        return self

    def completed(self) -> Self:
        """With the defaults of drawn starts written out."""
        if self.mixtures is not None:
            return self
        return self.model_copy(update={"seed": self.seed or 0, "n_init": self.n_init or RANDOM_STARTS})


class Barycenter(PlanOptions):
    """The descent; the names are those of `barycenter`."""

    projection: Literal["joint", "bures", "euclidean"] = "joint"
    learn_weights: bool = False
    max_steps: Steps = 100
    tol: NonNegative = 1e-7


class BarycenterConfig(JobConfig):
    command = "barycenter"
    mixtures: Members
    start: BarycenterStart
    barycenter: Barycenter = Barycenter()
    output: Output = Output()

    def completed(self) -> Self:
        return self.model_copy(update={"start": self.start.completed()})


class BarycenterInputs(NamedTuple):
    """The mixtures that pull, and those to start from."""

    gmms: list[GaussianMixture]
    starts: list[GaussianMixture]


class BarycenterJob(Job[BarycenterConfig, BarycenterInputs, cg.BarycenterFit]):
    summary = "Find the mixture closest to several: their barycenter."
    config = BarycenterConfig
    result = cg.BarycenterFit
    files = ("history.csv", "mixture.csv", "objective.png", "barycenter.png")
    measures = ("objective", "n_steps")

    def read(self, path: Path, config: BarycenterConfig) -> BarycenterInputs:
        start = config.start
        gmms = mixtures.read_all(path, "mixtures", config.mixtures, config.precision)
        if start.mixtures is not None:
            return BarycenterInputs(gmms, mixtures.read_all(path, "start.mixtures", start.mixtures, config.precision))
        return BarycenterInputs(gmms, _drawn_starts(path, config, gmms))

    def solve(
        self, path: Path, config: BarycenterConfig, inputs: BarycenterInputs, console: Console
    ) -> tuple[BarycenterConfig, cg.BarycenterFit]:
        gmms, starts = inputs
        say(console, f"mixtures: {mixtures.described(gmms)}")
        say(console, f"start: {mixtures.described(starts) if len(starts) == 1 else f'{len(starts)} mixtures'}")
        same = ("projection", "method", "epsilon", "learn_weights", "max_steps", "tol")
        options = {name: getattr(config.barycenter, name) for name in same}
        coefficients = [member.coefficient for member in config.mixtures]
        with (
            console.status("compiling and running the descent"),
            blame(path, "barycenter", Barycenter, _KEYS),
        ):
            fit = jax.block_until_ready(cg.barycenter(gmms, starts, coefficients=coefficients, **options))
        if len(starts) > 1:
            say(console, f"best of {len(starts)} starts: number {int(fit.start)}, counted from 0")
        return config, fit

    def tables(self, result: cg.BarycenterFit) -> dict[str, pl.DataFrame]:
        history = history_table({"objective": _objectives(result)})
        return {"history.csv": history, "mixture.csv": component_table(result.gmm)}

    def sheets(self, result: cg.BarycenterFit) -> Sequence[Sheet]:
        return component_sheet("Barycenter", result.gmm), _descent(result)

    def kept(self, inputs: BarycenterInputs) -> list[GaussianMixture]:
        return inputs.gmms

    def drawn(self, result: cg.BarycenterFit) -> Any:
        return result.gmm, _objectives(result)

    def figures(self, config: BarycenterConfig, result: cg.BarycenterFit, inputs: BarycenterInputs) -> dict[str, Any]:
        from coupled_gmm.plot import barycenters

        objectives = _objectives(result)
        title = f"Objective on the way to the barycenter, {float(result.objective):.6f} at the end"
        above = barycenters.plot_loss(objectives - objectives.min(), title=title, ylabel="above the least")
        return {"barycenter.png": barycenters.plot_barycenter(result.gmm, inputs.gmms), "objective.png": above}


def _drawn_starts(path: Path, config: BarycenterConfig, gmms: Sequence[GaussianMixture]) -> list[GaussianMixture]:
    """Starts of equal weights, each with distinct components of the mixtures, chosen by what these count.

    Raises:
      ConfigError: the mixtures have too few.
    """
    n_components, n_init = config.start.n_components or 0, config.start.n_init or 0
    pulls = zip(config.mixtures, gmms, strict=True)
    mass = np.concatenate([member.coefficient * np.asarray(gmm.weights, np.float64) for member, gmm in pulls])
    if n_components > (available := np.count_nonzero(mass)):
        message = f"{n_components} are more than the mixtures' {available}; ask for fewer"
        raise ConfigError(f"{path}: start.n_components: {message}")
    means, covariances = (np.concatenate([getattr(gmm, name) for gmm in gmms]) for name in ("means", "covariances"))
    draw, weights = np.random.default_rng(config.start.seed), np.full(n_components, 1 / n_components)
    rows = [draw.choice(len(mass), n_components, replace=False, p=mass / mass.sum()) for _ in range(n_init)]
    return [GaussianMixture.from_moments(means[row], covariances[row], weights.astype(means.dtype)) for row in rows]


def _objectives(fit: cg.BarycenterFit) -> np.ndarray:
    """At the start and after each step."""
    return np.asarray(fit.history.objective)[: int(fit.n_steps) + 1]


def _descent(fit: cg.BarycenterFit) -> Sheet:
    rows = {
        "objective at the start": f"{float(fit.history.objective[0]):.6f}",
        "objective at the end": f"{float(fit.objective):.6f}",
        "steps": str(int(fit.n_steps)),
    }
    return quantities("Descent", rows)
