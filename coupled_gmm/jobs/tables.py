"""The tables that sum up a run in a terminal."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from coupled_gmm.barycenters.barycenter import BarycenterFit
from coupled_gmm.barycenters.flow import FlowFit
from coupled_gmm.fits.coupled import PairFit
from coupled_gmm.gaussians.mixture import GaussianMixture

_LARGEST_MATRIX = 12  # columns that a terminal has room for; larger plans are listed
_MOST_ROWS = 20
_MOST_FEATURES = 6
_FLOW_ROWS = 11


class _Sheet(NamedTuple):
    """A table before it is laid out: columns by their headings, the first of which names the rows."""

    title: str
    columns: dict[str, list[str]]
    totals: bool = False  # the last row sums up the others


def print_summary(console: Console, fit: PairFit | BarycenterFit | FlowFit) -> None:
    """What a run found: of a pair masses, mass transfer and costs, of one mixture its components and the objective.

    A table that is wider than the console is folded: numbers are never cut.
    """
    match fit:
        case BarycenterFit():
            sheets = _components("Barycenter", fit.gmm), _descent(fit)
        case FlowFit():
            sheets = _losses(fit), _components("Mixture at the end", fit.gmm)
        case _:
            sheets = _masses(fit), _transfer(fit), _costs(fit)
    for sheet in sheets:
        console.print(sheet.title, style="bold", markup=False)  # rich would squeeze a table's own title to its width
        for table in _folded(console, sheet):
            with _at_least(console, _width(console, table)):
                console.print(table)


def _folded(console: Console, sheet: _Sheet) -> Iterator[Table]:
    """As many columns a table as there is room for, and at least one beside the first, which is in each."""
    first, *rest = sheet.columns
    block = [first]
    for name in rest:
        wider = _table(sheet, [*block, name])
        if len(block) > 1 and _width(console, wider) > console.width:
            yield _table(sheet, block)
            block = [first]
        block.append(name)
    yield _table(sheet, block)


def _table(sheet: _Sheet, names: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(names):
        width = max(map(cell_len, (name, *sheet.columns[name])))
        table.add_column(name, justify="right" if i else "left", no_wrap=True, min_width=width)
    *rows, last = zip(*(sheet.columns[name] for name in names), strict=True)
    for row in rows:
        table.add_row(*row)
    if sheet.totals:
        table.add_section()
    table.add_row(*last)
    return table


def _width(console: Console, table: Table) -> int:
    """Without loss, however narrow the console is."""
    return console.measure(table, options=console.options.update(width=100_000)).minimum


@contextlib.contextmanager
def _at_least(console: Console, width: int) -> Iterator[None]:
    """On a console too narrow for one column the terminal breaks the lines, which loses nothing."""
    narrow = console.width
    console.width = max(width, narrow)
    try:
        yield
    finally:
        console.width = narrow


def _quantities(title: str, rows: dict[str, str]) -> _Sheet:
    return _Sheet(title, {"quantity": list(rows), "value": list(rows.values())})


def _components(title: str, gmm: GaussianMixture) -> _Sheet:
    weights, means = np.asarray(gmm.weights), np.asarray(gmm.means)
    shown = np.arange(len(weights))
    if len(weights) > _MOST_ROWS:
        shown = np.argsort(-weights, kind="stable")[:_MOST_ROWS]
        title += f", the {_MOST_ROWS} heaviest of {len(weights)} components (all are in mixture.csv)"
    if means.shape[1] > _MOST_FEATURES:
        title += f", the first {_MOST_FEATURES} of {means.shape[1]} features"
    columns = {"component": [str(k) for k in shown], "weight": [f"{weight:.4f}" for weight in weights[shown]]}
    for i, values in enumerate(means[shown, :_MOST_FEATURES].T):
        columns[f"mean {i}"] = [f"{value:.4f}" for value in values]
    return _Sheet(title, columns)


def _descent(fit: BarycenterFit) -> _Sheet:
    rows = {
        "objective at the start": f"{float(fit.history.objective[0]):.6f}",
        "objective at the end": f"{float(fit.objective):.6f}",
        "steps": str(int(fit.n_steps)),
    }
    return _quantities("Descent", rows)


def _losses(fit: FlowFit) -> _Sheet:
    """The loss at some steps; the last row is the end, which the history does not hold."""
    losses = np.append(np.asarray(fit.history.loss), float(fit.loss))
    steps = np.unique(np.linspace(0, len(losses) - 1, _FLOW_ROWS).round().astype(int)).tolist()
    columns = {"steps done": [str(step) for step in steps], "loss": [f"{losses[step]:.5g}" for step in steps]}
    return _Sheet("Descent", columns)


def _masses(fit: PairFit) -> _Sheet:
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
    return _Sheet("Components of mixtures 0 and 1", columns)


def _transfer(fit: PairFit) -> _Sheet:
    matrix = np.asarray(fit.plan.matrix, np.float64)
    if max(matrix.shape) > _LARGEST_MATRIX:
        return _largest_transfers(matrix)
    columns = {"": [*(f"from {k}" for k in range(len(matrix))), "inflow"]}
    for m, column in enumerate(matrix.T):
        columns[f"to {m}"] = [*map(_mass, column), f"{column.sum():.4f}"]
    columns["outflow"] = [f"{mass:.4f}" for mass in (*matrix.sum(1), matrix.sum())]
    return _Sheet("Mass transfer, from mixture 0 to mixture 1", columns, totals=True)


def _largest_transfers(matrix: np.ndarray, count: int = _MOST_ROWS) -> _Sheet:
    order = np.argsort(-matrix, axis=None)[:count]
    froms, tos = np.unravel_index(order, matrix.shape)
    masses = matrix.ravel()[order]
    columns = {"from": [str(k) for k in froms], "to": [str(m) for m in tos], "mass": [_mass(mass) for mass in masses]}
    return _Sheet(f"Mass transfer, the {count} largest of {matrix.size} (all are in plan.csv)", columns)


def _mass(mass: float) -> str:
    """A mass to four digits; what rounds to nothing is a dot, so that the transfers stand out."""
    return "." if abs(mass) < 5e-5 else f"{mass:.4f}"


def _costs(fit: PairFit) -> _Sheet:
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
