"""The tables that sum up a run in a terminal."""

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from coupled_gmm.barycenter import BarycenterFit
from coupled_gmm.fit import PairFit
from coupled_gmm.flow import FlowFit
from coupled_gmm.mixture import GaussianMixture

_LARGEST_MATRIX = 12  # columns that a terminal has room for; larger plans are listed
_MOST_ROWS = 20
_MOST_FEATURES = 6
_FLOW_ROWS = 11

Titled = tuple[str, Table]


def print_summary(console: Console, fit: PairFit | BarycenterFit | FlowFit) -> None:
    """What a run found: of a pair masses, mass transfer and costs, of one mixture its components and the objective."""
    match fit:
        case BarycenterFit():
            tables = _components("Barycenter", fit.gmm), _descent(fit)
        case FlowFit():
            tables = _losses(fit), _components("Mixture at the end", fit.gmm)
        case _:
            tables = _masses(fit), _transfer(fit), _costs(fit)
    for title, table in tables:
        console.print(title, style="bold", markup=False)  # rich would squeeze a table's own title to its width
        console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _quantities(title: str, rows: dict[str, str]) -> Titled:
    table = _table("quantity", "value")
    for name, value in rows.items():
        table.add_row(name, value)
    return title, table


def _components(title: str, gmm: GaussianMixture) -> Titled:
    weights, means = np.asarray(gmm.weights), np.asarray(gmm.means)
    shown = np.arange(len(weights))
    if len(weights) > _MOST_ROWS:
        shown = np.argsort(-weights, kind="stable")[:_MOST_ROWS]
        title += f", the {_MOST_ROWS} heaviest of {len(weights)} components (all are in mixture.csv)"
    if means.shape[1] > _MOST_FEATURES:
        title += f", the first {_MOST_FEATURES} of {means.shape[1]} features"
    means = means[:, :_MOST_FEATURES]
    table = _table("component", "weight", *(f"mean {i}" for i in range(means.shape[1])))
    for k in shown.tolist():
        table.add_row(str(k), f"{weights[k]:.4f}", *(f"{mean:.4f}" for mean in means[k]))
    return title, table


def _descent(fit: BarycenterFit) -> Titled:
    rows = {
        "objective at the start": f"{float(fit.history.objective[0]):.6f}",
        "objective at the end": f"{float(fit.objective):.6f}",
        "steps": str(int(fit.n_steps)),
    }
    return _quantities("Descent", rows)


def _losses(fit: FlowFit) -> Titled:
    """The loss at some steps; the last row is the end, which the history does not hold."""
    losses = np.append(np.asarray(fit.history.loss), float(fit.loss))
    table = _table("steps done", "loss")
    for step in np.unique(np.linspace(0, len(losses) - 1, _FLOW_ROWS).round().astype(int)).tolist():
        table.add_row(str(step), f"{losses[step]:.5g}")
    return "Descent", table


def _masses(fit: PairFit) -> Titled:
    pair = fit.pair
    columns = {"mass in 0": pair.gmm0.weights, "mass in 1": pair.gmm1.weights}
    if not pair.balanced:
        outflow, inflow = fit.plan.reweighting()
        columns |= {"outflow / mass in 0": outflow, "inflow / mass in 1": inflow}
        columns |= {"mass change from 0": fit.plan.mass_change()}
    table = _table("component", *columns)
    for k in range(max(pair.gmm0.n_components, pair.gmm1.n_components)):
        table.add_row(str(k), *(f"{float(values[k]):.4f}" if k < len(values) else "" for values in columns.values()))
    return "Components of mixtures 0 and 1", table


def _transfer(fit: PairFit) -> Titled:
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


def _largest_transfers(matrix: np.ndarray, count: int = _MOST_ROWS) -> Titled:
    table = _table("from", "to", "mass")
    for index in np.argsort(-matrix, axis=None)[:count].tolist():
        k, m = divmod(index, matrix.shape[1])
        table.add_row(str(k), str(m), _mass(float(matrix[k, m])))
    return f"Mass transfer, the {count} largest of {matrix.size} (all are in plan.csv)", table


def _mass(mass: float) -> str:
    """A mass to four digits; what rounds to nothing is a dot, so that the transfers stand out."""
    return "." if abs(mass) < 5e-5 else f"{mass:.4f}"


def _costs(fit: PairFit) -> Titled:
    plan, pair = fit.plan, fit.pair
    rows = {
        "epsilon": f"{float(pair.epsilon):.6g}",
        "rho": "infinite (balanced)" if pair.balanced else ", ".join(f"{rho:.6g}" for rho in np.ravel(pair.rho)),
        "total mass F": f"{float(plan.total_mass):.6f}",
        "transport cost <P, C>": f"{float(plan.transport_cost):.6f}",
        "regularised cost": f"{float(plan.regularized_cost):.6f}",
        "marginal error": f"{float(plan.marginal_error):.1e}",
        "penalised log-likelihood": f"{float(fit.penalized_log_likelihood):.6f}",
        "EM steps": str(int(fit.n_steps)),
    }
    return _quantities("Costs", rows)
