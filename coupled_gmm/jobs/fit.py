"""The job `fit`: two mixtures fitted to two clouds so that they stay close, from its configuration to its pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from pydantic import Field
from rich.console import Console

import coupled_gmm as cg
from coupled_gmm.core.progress import ProgressBar
from coupled_gmm.jobs.clouds import CloudPair, Data, Points, PointWeights, described, read_pair
from coupled_gmm.jobs.config import JobConfig
from coupled_gmm.jobs.coupled import CoupledFit, FitOutput, Start, fidelity_sheet, pooled_start
from coupled_gmm.jobs.job import Job
from coupled_gmm.jobs.sections import blame
from coupled_gmm.jobs.tables import MOST_ROWS, Sheet, history_table, quantities
from coupled_gmm.jobs.terminal import say

# Arguments whose key has another name, or stands in another section.
_KEYS = {"x": "data", "x0": "data.cloud0", "x1": "data.cloud1", "point_weights": "data.weights0"}
_KEYS |= {"point_weights0": "data.weights0", "point_weights1": "data.weights1", "ridge": "fit.ridge"}
_KEYS |= {"init": "fit.ridge", "gmm": "fit.ridge", "pair.gmm0": "fit.ridge", "pair.gmm1": "fit.ridge"}
_COLUMNS = ("q0", "q1", "transport", "objective", "penalized_log_likelihood", "marginal_error")
_RGB = ("red", "green", "blue")
_LARGEST_MATRIX = 12  # columns that a terminal has room for; larger plans are listed


class Fit(CoupledFit):
    """The coupled fit of two mixtures."""

    freeze: list[Literal["gmm0", "gmm1"]] = Field(default=[])


class FitConfig(JobConfig):
    command = "fit"
    data: Data
    start: Start
    fit: Fit
    output: FitOutput = FitOutput()

    def completed(self) -> Self:
        return self.model_copy(update={"data": self.data.completed()})


class FitJob(Job[FitConfig, CloudPair, cg.PairFit]):
    summary = "Fit two mixtures to two clouds, so that they stay close."
    config = FitConfig
    result = cg.PairFit
    files = ("history.csv", "plan.csv", "clouds.png", "plan.png", "objective.png", "colors.png")
    measures = ("penalized_log_likelihood", "n_steps")

    def read(self, path: Path, config: FitConfig) -> CloudPair:
        return read_pair(path, config.data, config.precision)

    def solve(self, path: Path, config: FitConfig, inputs: CloudPair, console: Console) -> tuple[FitConfig, cg.PairFit]:
        points, weights, names, notes = inputs
        for note in notes:
            say(console, note)
        if names is not None:  # kept in the run's configuration, and shown by its pictures
            config = config.model_copy(update={"data": config.data.model_copy(update={"columns": list(names)})})
        say(console, described(points, config.precision))
        with console.status("fitting the start"), blame(path, "start", Start, _KEYS):
            pooled = pooled_start(config.start, config.start.n_components, config.fit.ridge, points, weights)
        components = config.start.n_components
        say(console, f"start: one mixture of {components} for both clouds, {int(pooled.n_steps)} EM steps")
        with blame(path, "fit", Fit, _KEYS):
            pair = _pair(config.fit, pooled.gmm)
            with ProgressBar(console) as bar:
                result = _fit_pair(config.fit, pair, points, weights, None if console.quiet else bar)
        if config.fit.epsilon is None and config.fit.relative_epsilon is None:
            chosen = config.fit.model_copy(update={"epsilon": float(f"{float(pair.epsilon):.9g}")})
            config = config.model_copy(update={"fit": chosen})
        return config, result

    def tables(self, result: cg.PairFit) -> dict[str, pl.DataFrame]:
        columns = {name: np.asarray(getattr(result.history, name))[: int(result.n_steps)] for name in _COLUMNS}
        return {"history.csv": history_table(columns), "plan.csv": _plan(result)}

    def sheets(self, result: cg.PairFit) -> Sequence[Sheet]:
        return (
            _masses(result),
            _transfer(result),
            *fidelity_sheet(result.fidelity, ["mixture 0", "mixture 1"]),
            _costs(result),
        )

    def drawn(self, result: cg.PairFit) -> Any:
        return result.pair.gmm0, result.pair.gmm1

    def figures(self, config: FitConfig, result: cg.PairFit, inputs: CloudPair) -> dict[str, Any]:
        from coupled_gmm.plot import fits, plans

        photographs = config.data.source == "photographs"
        options: dict[str, Any] = {
            "axes": (0, 2) if photographs else (0, 1),
            "max_points": config.output.max_points_drawn,
            "feature_names": _RGB if photographs else config.data.columns,
        }
        figures = {
            "clouds.png": fits.plot_clouds(result, *inputs.points, **options),
            "plan.png": plans.plot_plan(result.plan),
            "objective.png": fits.plot_history(result),
        }
        if photographs:
            figures["colors.png"] = fits.plot_clouds(result, *inputs.points, point_colors="own", **options)
        return figures


def _pair(section: Fit, gmm: cg.GaussianMixture) -> cg.GaussianMixturePair:
    return cg.GaussianMixturePair(gmm, gmm, **section.prices())


def _fit_pair(
    section: Fit, pair: cg.GaussianMixturePair, points: Points, weights: PointWeights, progress: Any
) -> cg.PairFit:
    return cg.fit_pair(
        *points,
        pair,
        transport_weight=section.transport_weight,
        point_weights0=weights[0],
        point_weights1=weights[1],
        freeze=section.freeze,
        progress=progress,
        **section.options(),
    )


def _plan(fit: cg.PairFit) -> pl.DataFrame:
    """One row per component of mixture 0, one column per component of mixture 1."""
    matrix = np.asarray(fit.plan.matrix)
    return pl.DataFrame({"from": np.arange(len(matrix)), **{f"to_{k}": column for k, column in enumerate(matrix.T)}})


def _masses(fit: cg.PairFit) -> Sheet:
    pair = fit.pair
    numbers = {"mass in 0": pair.gmm0.weights, "mass in 1": pair.gmm1.weights}
    if not pair.balanced:
        outflow, inflow = fit.plan.reweighting()
        numbers |= {"outflow / mass in 0": outflow, "inflow / mass in 1": inflow}
        numbers |= {"mass change from 0": fit.plan.mass_change()}
    count = max(pair.gmm0.n_components, pair.gmm1.n_components)
    columns = {"component": [str(k) for k in range(count)]}
    for name, values in numbers.items():
        column = [f"{value:.4f}" for value in np.asarray(values).tolist()]
        columns[name] = column + [""] * (count - len(column))
    return Sheet("Components of mixtures 0 and 1", columns)


def _transfer(fit: cg.PairFit) -> Sheet:
    matrix = np.asarray(fit.plan.matrix, np.float64)
    if max(matrix.shape) > _LARGEST_MATRIX:
        return _largest_transfers(matrix)
    columns = {"": [*(f"from {k}" for k in range(len(matrix))), "inflow"]}
    for m, column in enumerate(matrix.T):
        columns[f"to {m}"] = [*map(_mass, column), f"{column.sum():.4f}"]
    columns["outflow"] = [f"{mass:.4f}" for mass in (*matrix.sum(1), matrix.sum())]
    return Sheet("Mass transfer, from mixture 0 to mixture 1", columns, totals=True)


def _largest_transfers(matrix: np.ndarray, count: int = MOST_ROWS) -> Sheet:
    order = np.argsort(-matrix, axis=None)[:count]
    froms, tos = np.unravel_index(order, matrix.shape)
    masses = matrix.ravel()[order]
    columns = {"from": [str(k) for k in froms], "to": [str(m) for m in tos], "mass": [_mass(mass) for mass in masses]}
    return Sheet(f"Mass transfer, the {count} largest of {matrix.size} (all are in plan.csv)", columns)


def _mass(mass: float) -> str:
    """A mass to four digits; what rounds to nothing is a dot, so that the transfers stand out."""
    return "." if abs(mass) < 5e-5 else f"{mass:.4f}"


def _costs(fit: cg.PairFit) -> Sheet:
    plan, pair = fit.plan, fit.pair
    weights = [
        f"{float(weight):.6g}" if weight is not None else "" for weight in (fit.transport_weight, fit.relative_weight)
    ]
    rows = {
        "transport weight, relative weight": ", ".join(weights),
        "epsilon": f"{float(pair.epsilon):.6g}",
        "rho": "infinite (balanced)" if pair.balanced else ", ".join(f"{rho:.6g}" for rho in np.ravel(pair.rho)),
        "total mass F": f"{float(plan.total_mass):.6f}",
        "transport cost <P, C>": f"{float(plan.transport_cost):.6f}",
        "regularised cost": f"{float(plan.regularized_cost):.6f}",
        "marginal error": f"{float(plan.marginal_error):.1e}",
        "penalised log-likelihood": f"{float(fit.penalized_log_likelihood):.6f}",
        "EM steps": str(int(fit.n_steps)),
    }
    return quantities("Costs", rows)
