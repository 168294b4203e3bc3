"""A run folder: what a job leaves on disk."""

import contextlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from coupled_gmm.barycenters.barycenter import BarycenterFit
from coupled_gmm.barycenters.flow import FlowFit
from coupled_gmm.data import saving
from coupled_gmm.fits.coupled import PairFit
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.jobs import folders
from coupled_gmm.jobs.config import BarycenterConfig, FitConfig, FlowConfig
from coupled_gmm.jobs.sections import ConfigError, at, dump

FIT = "fit.npz"
Run = PairFit | BarycenterFit | FlowFit
# All that runs of any job write; the fit comes last, so that where it is the rest is.
_PICTURES = ("clouds", "plan", "objective", "colors", "barycenter", "flow", "loss")
NAMES = ("config.toml", "given.npz", "history.csv", "plan.csv", "mixture.csv", "flow.gif")
NAMES += (*(f"{name}.png" for name in _PICTURES), FIT)
_COLUMNS = ("q0", "q1", "transport", "objective", "penalized_log_likelihood", "marginal_error")
_RGB = ("red", "green", "blue")


class Place:
    """Where a run will be left: `reserve` makes one before the work, so that what came out can be written."""

    def __init__(self, folder: Path, part: Path):
        self.folder, self._part = folder, part

    def write(self, config: FitConfig | BarycenterConfig | FlowConfig, fit: Run, given: Any) -> None:
        """Everything about a run, in place of an older one; or, where that fails, nothing.

        fit.npz, history.csv, tables of the plan or mixture, config.toml, pictures if wanted.

        Args:
          config: as run.
          fit: what came out.
          given: of a coupled fit both clouds, of a barycenter or flow the mixtures that pulled; those are kept as well.

        Raises:
          ConfigError: the disk is full, or the folder was changed meanwhile.
        """
        try:
            _write(self._part, config, fit, given)
            folders.publish(self._part, self.folder, NAMES)
        except folders.Taken as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"{self.folder}: the run can't be written ({reason}); make room, or name another"
            ) from error


@contextlib.contextmanager
def reserve(path: Path, config: FitConfig | BarycenterConfig | FlowConfig) -> Iterator[Place]:
    """A place for a run of the configuration at `path`.

    Raises:
      ConfigError: the run could not be written there; or its configuration, in UTF-8, could not at all.
    """
    folder = Path(config.output.directory or "")
    if odd := [line for line in dump(config).splitlines() if not _is_utf8(line)]:
        raise ConfigError(f"{path}: {odd[0]!a}: a name that is not UTF-8 can't be written down; rename it")
    with contextlib.ExitStack() as stack:
        with at(path, "output.directory"):
            part = stack.enter_context(folders.reserved(folder, NAMES))
        yield Place(folder, part)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write(folder: Path, config: FitConfig | BarycenterConfig | FlowConfig, fit: Run, given: Any) -> None:
    saving.save(folder / FIT, fit)
    (folder / "config.toml").write_text(dump(config), encoding="utf-8")
    for name, table in _tables(fit).items():
        (folder / name).write_text(table.write_csv(), encoding="utf-8")
    if not isinstance(fit, PairFit):
        saving.save(folder / "given.npz", given)
    if config.output.pictures and _finite(fit):
        _draw(folder, config, fit, given)


def read(folder: str | PathLike[str]) -> Run:
    """The fit in a run folder.

    Raises:
      ConfigError: the folder holds none.
    """
    path = Path(folder) / FIT
    try:
        there = path.exists()
    except OSError as error:
        raise ConfigError(f"{folder}: can't be read ({error.strerror}); give a run folder") from error
    if not there and folders.unfinished(path.parent):
        raise ConfigError(f"{folder}: its run is unfinished: under way, or it was stopped; run it again")
    if not there:
        raise ConfigError(f"{folder}: no run folder (there is no {FIT} in it); give one that `coupled-gmm` wrote")
    try:
        fit = saving.load(path)
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
    from coupled_gmm.plot import flow  # matplotlib is slow to import, and only needed here

    match fit:
        case PairFit():
            figures = _pair_figures(config, fit, given)
        case BarycenterFit():
            objectives = _objectives(fit)
            title = f"Objective on the way to the barycenter, {float(fit.objective):.6f} at the end"
            above = flow.plot_loss(objectives - objectives.min(), title=title, ylabel="above the least")
            figures = {"barycenter.png": flow.plot_barycenter(fit.gmm, given), "objective.png": above}
        case FlowFit():
            figures = {
                "flow.png": flow.plot_flow(fit, given),
                "loss.png": flow.plot_loss(_losses(fit), title="Flow", ylabel="loss"),
            }
            flow.save_animation(folder / "flow.gif", fit, given)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)


def _pair_figures(config: FitConfig, fit: PairFit, clouds: tuple[Any, Any]) -> dict[str, Any]:
    from coupled_gmm.plot import mixtures

    photographs = config.data.source == "photographs"
    names = _RGB if photographs else config.data.columns
    options = {
        "axes": (0, 2) if photographs else (0, 1),
        "max_points": config.output.max_points_drawn,
        "feature_names": names,
    }
    figures = {
        "clouds.png": mixtures.plot_clouds(fit, *clouds, **options),
        "plan.png": mixtures.plot_plan(fit.plan),
        "objective.png": mixtures.plot_history(fit),
    }
    if photographs:
        figures["colors.png"] = mixtures.plot_clouds(fit, *clouds, point_colors="own", **options)
    return figures
