"""Tables: sheets, as a terminal shows them, and those of files that several jobs write."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from coupled_gmm.gaussians.mixture import GaussianMixture

MOST_ROWS = 20
_MOST_FEATURES = 6


class Sheet(NamedTuple):
    """A table before it is laid out: columns by their headings, the first of which names the rows."""

    title: str
    columns: dict[str, list[str]]
    totals: bool = False  # the last row sums up the others


def print_sheets(console: Console, sheets: Iterable[Sheet]) -> None:
    """Print tables; one that is wider than the console is folded: numbers are never cut."""
    for sheet in sheets:
        console.print(sheet.title, style="bold", markup=False)  # rich would squeeze a table's own title to its width
        for table in _folded(console, sheet):
            with _at_least(console, _width(console, table)):
                console.print(table)


def _folded(console: Console, sheet: Sheet) -> Iterator[Table]:
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


def _table(sheet: Sheet, names: list[str]) -> Table:
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


def quantities(title: str, rows: dict[str, str]) -> Sheet:
    """Numbers by their names."""
    return Sheet(title, {"quantity": list(rows), "value": list(rows.values())})


def component_sheet(title: str, gmm: GaussianMixture) -> Sheet:
    """A row a component: its weight and mean; the heaviest where there are many."""
    weights, means = np.asarray(gmm.weights), np.asarray(gmm.means)
    shown = np.arange(len(weights))
    if len(weights) > MOST_ROWS:
        shown = np.argsort(-weights, kind="stable")[:MOST_ROWS]
        title += f", the {MOST_ROWS} heaviest of {len(weights)} components (all are in mixture.csv)"
    if means.shape[1] > _MOST_FEATURES:
        title += f", the first {_MOST_FEATURES} of {means.shape[1]} features"
    columns = {"component": [str(k) for k in shown], "weight": [f"{weight:.4f}" for weight in weights[shown]]}
    for i, values in enumerate(means[shown, :_MOST_FEATURES].T):
        columns[f"mean {i}"] = [f"{value:.4f}" for value in values]
    return Sheet(title, columns)


def component_table(gmm: GaussianMixture) -> pl.DataFrame:
    """A row a component: its weight, mean, and the lower triangle of its covariance, which is symmetric."""
    means, covariances = np.asarray(gmm.means), np.asarray(gmm.covariances)
    columns = {f"mean_{i}": column for i, column in enumerate(means.T)}
    columns |= {f"covariance_{i}_{j}": covariances[:, i, j] for i in range(gmm.n_features) for j in range(i + 1)}
    return pl.DataFrame({"component": np.arange(len(means)), "weight": np.asarray(gmm.weights), **columns})


def history_table(columns: dict[str, np.ndarray]) -> pl.DataFrame:
    """A row a step, counted from 0."""
    return pl.DataFrame({"step": np.arange(len(next(iter(columns.values())))), **columns})
