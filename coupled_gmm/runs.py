"""A run folder: what a job leaves on disk."""

from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from coupled_gmm import io
from coupled_gmm.barycenter import BarycenterFit
from coupled_gmm.config import BarycenterConfig, FitConfig, FlowConfig
from coupled_gmm.fit import PairFit
from coupled_gmm.flow import FlowFit
from coupled_gmm.mixture import GaussianMixture
from coupled_gmm.sections import ConfigError, dump

FIT = "fit.npz"
Run = PairFit | BarycenterFit | FlowFit
_COLUMNS = ("q0", "q1", "transport", "objective", "penalized_log_likelihood", "marginal_error")
_RGB = ("red", "green", "blue")


def write(folder: Path, config: FitConfig | BarycenterConfig | FlowConfig, fit: Run, given: Any) -> None:
    """Everything about a run: fit.npz, history.csv, tables of the plan or mixture, config.toml, pictures if wanted.

    Args:
      folder: exists.
      config: as run.
      fit: what came out.
      given: of a coupled fit both clouds, of a barycenter or flow the mixtures that pulled; those are kept as well.
    """
    io.save(folder / FIT, fit)
    (folder / "config.toml").write_text(dump(config), encoding="utf-8")
    for name, table in _tables(fit).items():
        table.write_csv(folder / name)
    if not isinstance(fit, PairFit):
        io.save(folder / "given.npz", given)
    if config.output.pictures and _finite(fit):
        _draw(folder, config, fit, given)


def read(folder: str | PathLike[str]) -> Run:
    """The fit in a run folder.

    Raises:
      ConfigError: the folder holds none.
    """
    path = Path(folder) / FIT
    if not path.exists():
        raise ConfigError(f"{folder}: no run folder (there is no {FIT} in it); give one that `coupled-gmm` wrote")
    try:
        fit = io.load(path)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if not isinstance(fit, Run):
        raise ConfigError(f"{path}: holds a {type(fit).__name__}, no run's result; name the folder of a run")
    return fit


def _tables(fit: Run) -> dict[str, pl.DataFrame]:
    match fit:
        case PairFit():
            columns = {name: np.asarray(getattr(fit.history, name))[: int(fit.n_steps)] for name in _COLUMNS}
            rest = {"plan.csv": _plan(fit)}
        case BarycenterFit():
            columns, rest = {"objective": _objectives(fit)}, {"mixture.csv": _components(fit.gmm)}
        case FlowFit():
            columns, rest = {"loss": _losses(fit)}, {"mixture.csv": _components(fit.gmm)}
    steps = np.arange(len(next(iter(columns.values()))))
    return {"history.csv": pl.DataFrame({"step": steps, **columns}), **rest}


def _objectives(fit: BarycenterFit) -> np.ndarray:
    """At the start and after each step."""
    return np.asarray(fit.history.objective)[: int(fit.n_steps) + 1]


def _losses(fit: FlowFit) -> np.ndarray:
    """Before each step and, which the history does not hold, at the end."""
    return np.append(np.asarray(fit.history.loss), np.asarray(fit.loss))


def _plan(fit: PairFit) -> pl.DataFrame:
    """A row a component of mixture 0, a column a component of mixture 1."""
    matrix = np.asarray(fit.plan.matrix)
    return pl.DataFrame({"from": np.arange(len(matrix)), **{f"to_{k}": column for k, column in enumerate(matrix.T)}})


def _components(gmm: GaussianMixture) -> pl.DataFrame:
    """A row a component: its weight, mean, and the lower triangle of its covariance, which is symmetric."""
    means, covariances = np.asarray(gmm.means), np.asarray(gmm.covariances)
    columns = {f"mean_{i}": column for i, column in enumerate(means.T)}
    columns |= {f"covariance_{i}_{j}": covariances[:, i, j] for i in range(gmm.n_features) for j in range(i + 1)}
    return pl.DataFrame({"component": np.arange(len(means)), "weight": np.asarray(gmm.weights), **columns})


def _finite(fit: Run) -> bool:
    match fit:
        case PairFit():
            drawn = fit.pair.gmm0, fit.pair.gmm1
        case BarycenterFit():
            drawn = fit.gmm, _objectives(fit)
        case FlowFit():
            drawn = fit.path, _losses(fit)
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(drawn))


def _draw(folder: Path, config: Any, fit: Run, given: Any) -> None:
    from coupled_gmm import plot_flow  # matplotlib is slow to import, and only needed here

    match fit:
        case PairFit():
            figures = _pair_figures(config, fit, given)
        case BarycenterFit():
            objectives = _objectives(fit)
            title = f"Objective on the way to the barycenter, {float(fit.objective):.6f} at the end"
            above = plot_flow.plot_loss(objectives - objectives.min(), title=title, ylabel="above the least")
            figures = {"barycenter.png": plot_flow.plot_barycenter(fit.gmm, given), "objective.png": above}
        case FlowFit():
            figures = {
                "flow.png": plot_flow.plot_flow(fit, given),
                "loss.png": plot_flow.plot_loss(_losses(fit), title="Flow", ylabel="loss"),
            }
            plot_flow.save_animation(folder / "flow.gif", fit, given)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)


def _pair_figures(config: FitConfig, fit: PairFit, clouds: tuple[Any, Any]) -> dict[str, Any]:
    from coupled_gmm import plot

    photographs = config.data.source == "photographs"
    names = _RGB if photographs else config.data.columns
    options = {
        "axes": (0, 2) if photographs else (0, 1),
        "max_points": config.output.max_points_drawn,
        "feature_names": names,
    }
    figures = {
        "clouds.png": plot.plot_clouds(fit, *clouds, **options),
        "plan.png": plot.plot_plan(fit.plan),
        "objective.png": plot.plot_history(fit),
    }
    if photographs:
        figures["colors.png"] = plot.plot_clouds(fit, *clouds, point_colors="own", **options)
    return figures
