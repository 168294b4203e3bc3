"""All jobs: a new one is a file of its own, and a line here."""

from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from coupled_gmm.jobs.barycenter import BarycenterJob
from coupled_gmm.jobs.config import JobConfig
from coupled_gmm.jobs.fit import FitJob
from coupled_gmm.jobs.flow import FlowJob
from coupled_gmm.jobs.job import Job
from coupled_gmm.jobs.sections import ConfigError, check, read

JOBS: tuple[Job[Any, Any, Any], ...] = (FitJob(), BarycenterJob(), FlowJob())

Config = TypeVar("Config", bound=JobConfig)


def job_of(result: object) -> Job[Any, Any, Any] | None:
    """The job that ends in such a result."""
    return next((job for job in JOBS if isinstance(result, job.result)), None)


def job_named(command: str) -> Job[Any, Any, Any] | None:
    """The job of a word on the command line."""
    return next((job for job in JOBS if job.command == command), None)


def load_config(path: str | PathLike[str], model: type[Config]) -> Config:
    """A checked configuration from a TOML file; paths are absolute, defaults that depend on others filled in.

    Raises:
      ConfigError: the file is missing or not valid TOML, or of another job, or keys are unknown, missing or wrong; a line for
        each mistake.
    """
    path = Path(path)
    values = read(path)
    if "command" in values and "command" not in model.model_fields:
        raise ConfigError(f"{path}: command: is of many jobs, not of one; run `coupled-gmm batch`")
    other = next((job.command for job in JOBS if job.command in values), model.command)
    if model.command not in values and other != model.command:
        raise ConfigError(f"{path}: {other}: is not for `coupled-gmm {model.command}`; run `coupled-gmm {other}`")
    config = check(path, values, model).completed()
    directory = config.output.directory or str(Path("runs") / path.stem)
    return config.model_copy(update={"output": config.output.model_copy(update={"directory": directory})})
