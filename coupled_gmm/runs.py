"""A run folder: what a fit leaves on disk, and the tables that sum it up."""

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from coupled_gmm import io
from coupled_gmm.config import ConfigError, FitConfig, dump_config
from coupled_gmm.fit import PairFit

FIT = "fit.npz"
_COLUMNS = ("q0", "q1", "transport", "objective", "penalized_log_likelihood", "marginal_error")
_RGB = ("red", "green", "blue")
_LARGEST_MATRIX = 12  # columns that a terminal has room for; larger plans are listed


def write(folder: Path, config: FitConfig, fit: PairFit, clouds: tuple[Any, Any]) -> None:
    """Everything about a run: fit.npz, history.csv, plan.csv, config.toml, and the pictures if they are wanted."""
    io.save(folder / FIT, fit)
    (folder / "config.toml").write_text(dump_config(config), encoding="utf-8")
    _history(fit).write_csv(folder / "history.csv")
    _plan(fit).write_csv(folder / "plan.csv")
    if config.output.pictures and _finite(fit):
        _draw(folder, config, fit, clouds)


def read(folder: str | PathLike[str]) -> PairFit:
    """The fit in a run folder.

    Raises:
      ConfigError: the folder holds none.
    """
    path = Path(folder) / FIT
    if not path.exists():
        raise ConfigError(f"{folder}: no run folder (there is no {FIT} in it); give one that `coupled-gmm fit` wrote")
    try:
        fit = io.load(path)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if not isinstance(fit, PairFit):
        raise ConfigError(f"{path}: holds a {type(fit).__name__}, no coupled fit; name the folder of a run")
    return fit


def _history(fit: PairFit) -> pl.DataFrame:
    steps = int(fit.n_steps)
    columns = {name: np.asarray(getattr(fit.history, name))[:steps] for name in _COLUMNS}
    return pl.DataFrame({"step": np.arange(len(columns["q0"])), **columns})


def _plan(fit: PairFit) -> pl.DataFrame:
    """A row a component of mixture 0, a column a component of mixture 1."""
    matrix = np.asarray(fit.plan.matrix)
    return pl.DataFrame({"from": np.arange(len(matrix)), **{f"to_{k}": column for k, column in enumerate(matrix.T)}})


def _finite(fit: PairFit) -> bool:
    gmms = (fit.pair.gmm0, fit.pair.gmm1)
    return all(np.isfinite(leaf).all() for gmm in gmms for leaf in (gmm.means, gmm.covariances, gmm.weights))


def _draw(folder: Path, config: FitConfig, fit: PairFit, clouds: tuple[Any, Any]) -> None:
    from coupled_gmm import plot  # matplotlib is slow to import, and only needed here

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
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)


def print_summary(console: Console, fit: PairFit) -> None:
    """Masses, mass transfer and costs of a fitted pair, and its components' reweighting where it is unbalanced."""
    for title, table in (_masses(fit), _transfer(fit), _costs(fit)):
        console.print(title, style="bold", markup=False)  # rich would squeeze a table's own title to its width
        console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _masses(fit: PairFit) -> tuple[str, Table]:
    pair = fit.pair
    columns = {"mass in 0": pair.gmm0.weights, "mass in 1": pair.gmm1.weights}
    if not pair.balanced:
        outflow, inflow = fit.plan.reweighting()
        columns |= {"outflow / mass in 0": outflow, "inflow / mass in 1": inflow}
    table = _table("component", *columns)
    for k in range(max(pair.gmm0.n_components, pair.gmm1.n_components)):
        table.add_row(str(k), *(f"{float(values[k]):.4f}" if k < len(values) else "" for values in columns.values()))
    return "Components of mixtures 0 and 1", table


def _transfer(fit: PairFit) -> tuple[str, Table]:
    matrix = np.asarray(fit.plan.matrix, np.float64)
    if max(matrix.shape) > _LARGEST_MATRIX:
        return _largest_transfers(matrix)
    columns = [*(f"to {k}" for k in range(matrix.shape[1])), "outflow"]
    table = _table("", *columns)
    for k, row in enumerate(matrix):
        table.add_row(f"from {k}", *(_mass(mass) for mass in row), f"{row.sum():.4f}")
    table.add_section()
    table.add_row("inflow", *(f"{mass:.4f}" for mass in matrix.sum(0)), f"{matrix.sum():.4f}")
    return "Mass transfer, from mixture 0 to mixture 1", table


def _largest_transfers(matrix: np.ndarray, count: int = 20) -> tuple[str, Table]:
    table = _table("from", "to", "mass")
    for index in np.argsort(-matrix, axis=None)[:count].tolist():
        k, m = divmod(index, matrix.shape[1])
        table.add_row(str(k), str(m), _mass(float(matrix[k, m])))
    return f"Mass transfer, the {count} largest of {matrix.size} (all are in plan.csv)", table


def _mass(mass: float) -> str:
    """A mass to four digits; what rounds to nothing is a dot, so that the transfers stand out."""
    return "." if abs(mass) < 5e-5 else f"{mass:.4f}"


def _costs(fit: PairFit) -> tuple[str, Table]:
    plan, pair = fit.plan, fit.pair
    rows = {
        "epsilon": f"{float(pair.epsilon):.6g}",
        "rho": "infinite (balanced)" if pair.balanced else f"{float(pair.rho):.6g}",
        "total mass F": f"{float(plan.total_mass):.6f}",
        "transport cost <P, C>": f"{float(plan.transport_cost):.6f}",
        "regularised cost": f"{float(plan.regularized_cost):.6f}",
        "marginal error": f"{float(plan.marginal_error):.1e}",
        "penalised log-likelihood": f"{float(fit.penalized_log_likelihood):.6f}",
        "EM steps": str(int(fit.n_steps)),
    }
    table = _table("quantity", "value")
    for name, value in rows.items():
        table.add_row(name, value)
    return "Costs", table
