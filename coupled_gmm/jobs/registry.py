"""All jobs: a new one is a file of its own, and a line here. Of those of one command the configuration says which it is for."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from coupled_gmm.jobs.barycenter import BarycenterJob
from coupled_gmm.jobs.choose import ChooseGraphJob, ChooseJob
from coupled_gmm.jobs.config import JobConfig
from coupled_gmm.jobs.fit import FitJob
from coupled_gmm.jobs.flow import FlowJob
from coupled_gmm.jobs.graph import GraphJob
from coupled_gmm.jobs.job import Job
from coupled_gmm.jobs.sections import ConfigError, check, read

# Of one command the first whose configuration claims the tables; the last one's claims all.
JOBS: tuple[Job[Any, Any, Any], ...] = (GraphJob(), FitJob(), ChooseGraphJob(), ChooseJob(), BarycenterJob(), FlowJob())
COMMANDS = tuple(dict.fromkeys(job.command for job in JOBS))

Config = TypeVar("Config", bound=JobConfig)


def job_of(result: object) -> Job[Any, Any, Any] | None:
    """The job that ends in such a result."""
    return next((job for job in JOBS if isinstance(result, job.result)), None)


def job_named(command: str, values: Mapping[str, Any]) -> Job[Any, Any, Any] | None:
    """The job of a word on the command line, for a configuration of these tables."""
    return next((job for job in JOBS if job.command == command and job.config.claims(values)), None)


def job_for(command: str, path: str | PathLike[str]) -> Job[Any, Any, Any]:
    """The job of a command that the configuration at `path` is for.

    Raises:
      ConfigError: the file is missing or not valid TOML.
    """
    job = job_named(command, read(Path(path)))
    assert job is not None  # one of each command claims all
    return job


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
