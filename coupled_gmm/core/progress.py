"""A fit's progress: the tutorial's table, row by row, and in a terminal a bar below it with the time left.

A row is shown where it says something: where its numbers, to the digits shown, are not those of the row above, each of the first
ten steps and then one for every tenth more that were done. The last is always shown; the history holds all.

Rows come from the running program, on a thread of JAX's; rich's console has a lock of its own, so they may. Where
standard output is no terminal (a file, a pipe) only plain rows are written.
"""

from collections.abc import Container
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

COLUMNS = {
    "step": (4, "d", "step"),
    "q0": (10, ".4f", "q0"),
    "q1": (10, ".4f", "q1"),
    "transport": (10, ".4f", "transport"),
    "objective": (11, ".4f", "objective"),
    "penalized_log_likelihood": (15, ".6f", "log-likelihood*"),
    "marginal_error": (14, ".1e", "marginal error"),
}

_ALL_OF = 10  # steps


def table_header(row: Container[str] = COLUMNS) -> str:
    """Titles of the columns of `table_row`; the starred one is penalised by transport and ridge."""
    return " ".join(f"{title:>{width}}" for name, (width, _, title) in COLUMNS.items() if name in row)


def table_row(row: dict[str, Any]) -> str:
    """One EM step in aligned columns; of a graph of one node there is no q1, of a larger one q0 and q1 are shown."""
    return " ".join(f"{row[name]:>{width}{form}}" for name, (width, form, _) in COLUMNS.items() if name in row)


class ProgressBar:
    """A context manager to call with a row of each EM step as it is done.

    A row is a dict of numbers: step, em_steps, q0, q1 (one per node), transport, objective, penalized_log_likelihood,
    marginal_error.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self._bar: Progress | None = None
        self._started = False
        self._shown: dict[str, Any] = {}
        self._waiting: dict[str, Any] | None = None  # the newest row, if it was not shown
        self._left_out = 0

    def __enter__(self) -> "ProgressBar":
        if self.console.is_terminal:
            self._bar = _bar(self.console)
            # Started at the first row, so that compilation does not enter the time left.
            self._task = self._bar.add_task("compiling the fit", start=False, total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._waiting is not None:
            self._show(self._waiting)
            self._left_out -= 1
        if self._left_out:
            self._write(f"{self._left_out} steps that said little more are left out here; the history has them")

    def __call__(self, row: dict[str, Any]) -> None:
        """Show one EM step."""
        if not self._started:
            self._started = True
            self._write(table_header(row))
            if self._bar is not None:
                self._bar.start_task(self._task)
        if self._bar is not None:
            text = f"EM step {row['step']}: objective {row['objective']:.4f}"
            self._bar.update(self._task, total=row["em_steps"], completed=row["step"] + 1, description=text)
        if self._says_more(row):
            self._show(row)
        else:
            self._waiting = row
            self._left_out += 1

    def _says_more(self, row: dict[str, Any]) -> bool:
        above = self._shown
        if not above:
            return True
        same = table_row(row | {name: above[name] for name in ("step", "marginal_error")}) == table_row(above)
        return not same and (row["step"] < _ALL_OF or row["step"] >= 1.1 * above["step"])

    def _show(self, row: dict[str, Any]) -> None:
        self._shown, self._waiting = row, None
        self._write(table_row(row))

    def _write(self, line: str) -> None:
        _write(self.console, line)


class TaskBar:
    """A context manager to tell of each of many tasks as it ends.

    In a terminal a bar has their number and the time left, above it is a line for each that failed; elsewhere there is a line for
    each.
    """

    def __init__(self, console: Console, total: int):
        self.console, self.total = console, total
        self._bar: Progress | None = None
        self._done, self._failed = 0, 0

    def __enter__(self) -> "TaskBar":
        if self.console.is_terminal:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task("running", total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, line: str, failed: bool) -> None:
        """One more has ended, with a line about it."""
        self._done += 1
        self._failed += failed
        if self._bar is None or failed:
            _write(self.console, f"{self._done:{len(str(self.total))}}/{self.total} {line}")
        if self._bar is not None:
            text = f"{self._failed} failed" if self._failed else "running"
            self._bar.update(self._task, completed=self._done, description=text)


class CountBar:
    """A context manager to call with how many tasks are ``done``, and ``of`` how many: in a terminal a bar, elsewhere nothing."""

    def __init__(self, what: str, total: int, console: Console | None = None):
        self._bar = _bar(console or Console())
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "CountBar":
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        self._bar.update(self._task, completed=row["done"])


def _bar(console: Console) -> Progress:
    """With the number done and the time left; it goes at the end."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def _write(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.file.flush()
