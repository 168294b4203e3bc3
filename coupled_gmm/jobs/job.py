"""What the command line, the run folder and whatever runs many jobs ask of one."""

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import polars as pl
from rich.console import Console

from coupled_gmm.jobs.config import JobConfig
from coupled_gmm.jobs.tables import Sheet


class JobResult(Protocol):
    """What comes out of a job: something of the public package, with its status."""

    @property
    def message(self) -> str:
        """How it ended and, where that was not well, what to do."""
        ...

    def raise_if_failed(self) -> Any:
        """Raise `FitError` where it is of no use."""
        ...


Config = TypeVar("Config", bound=JobConfig)
Inputs = TypeVar("Inputs")
Result = TypeVar("Result", bound=JobResult)


class Job(abc.ABC, Generic[Config, Inputs, Result]):
    """A command with a configuration: reading, running, tables and pictures.

    A job holds no state. It reads what its configuration names, as `Inputs`, solves, and says of a `Result` what is written,
    printed and drawn. Jobs are listed in `registry`.
    """

    summary: ClassVar[str]  # the line of the command's help
    config: type[Config]
    result: type[Result]
    files: ClassVar[tuple[str, ...]]  # tables, texts and pictures that a run may leave
    measures: ClassVar[tuple[str, ...]]  # numbers of a result, for the summary of many

    @property
    def command(self) -> str:
        """The word on the command line."""
        return self.config.command

    @abc.abstractmethod
    def read(self, path: Path, config: Config) -> Inputs:
        """What the configuration at `path` names.

        Raises:
          ConfigError: it is missing or can't be used; with the key.
        """

    @abc.abstractmethod
    def solve(self, path: Path, config: Config, inputs: Inputs, console: Console) -> tuple[Config, Result]:
        """The work: the configuration with what was chosen on the way, and what came out.

        Raises:
          ConfigError: an argument was refused; with the key that set it.
          FitError: there is no result, not even one that failed.
        """

    @abc.abstractmethod
    def tables(self, result: Result) -> dict[str, pl.DataFrame]:
        """Tables to write, by the names of their files."""

    @abc.abstractmethod
    def sheets(self, result: Result) -> Sequence[Sheet]:
        """Tables to print."""

    def texts(self, config: Config, result: Result) -> dict[str, str]:
        """Other texts to write, by the names of their files."""
        del config, result
        return {}

    def kept(self, inputs: Inputs) -> Any:
        """What is saved as given, beside the result; None for nothing."""
        del inputs

    def measured(self, result: Result) -> dict[str, float | int]:
        """The result's measures."""
        return {name: np.asarray(getattr(result, name)).item() for name in self.measures}

    @abc.abstractmethod
    def drawn(self, result: Result) -> Any:
        """Arrays, or trees of them, without which there are no pictures: they must be finite."""

    @abc.abstractmethod
    def figures(self, config: Config, result: Result, inputs: Inputs) -> dict[str, Any]:
        """Pictures by the names of their files. Import matplotlib here: it is slow, and only needed now."""

    def draw(self, folder: Path, config: Config, result: Result, inputs: Inputs) -> None:
        """All pictures into a folder."""
        for name, figure in self.figures(config, result, inputs).items():
            figure.savefig(folder / name, dpi=120)
