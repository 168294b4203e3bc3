"""The configurations of the command line's jobs: TOML, validated whole before anything runs.

Files that a configuration names are found from its own folder, the output folder from the working directory.
"""

import math
import sys
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from coupled_gmm.core.checks import MOST_STARTS, MOST_STEPS, brief
from coupled_gmm.data.clouds import FORMATS, ending
from coupled_gmm.jobs.sections import ConfigError, File, FileName, Section, check, found, read, refuse

TUTORIAL_SIZE = 10_000
RANDOM_STARTS = 10

MOST_POINTS = 100_000_000  # that are drawn
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Points = Annotated[int, Field(ge=1, le=MOST_POINTS)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Starts = Annotated[int, Field(ge=1, le=MOST_STARTS)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # JAX's keys of larger ones are those of smaller ones
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Precision = Literal["float32", "float64"]


def _prices(at_most: float) -> BeforeValidator:
    """Above 0: one number, or a list of two, for mixture 0 and for mixture 1."""

    def check(given: Any) -> float | list[float]:
        several = given if isinstance(given, list) else [given]
        if isinstance(given, list) and len(given) != 2:
            raise refuse(f"must be one number or two (of mixture 0 and of mixture 1), got {brief(given)}")
        for one in several:
            number = isinstance(one, (int, float)) and not isinstance(one, bool)
            if not number or (isinstance(one, int) and one > sys.float_info.max):
                raise refuse(f"must be a valid number, got {brief(one)}")
            if not one > 0:
                raise refuse(f"must be greater than 0, got {brief(one)}")
            if one > at_most:
                raise refuse(f"must be less than or equal to {at_most:g}, got {brief(one)}")
        return [float(one) for one in several] if isinstance(given, list) else float(given)

    return BeforeValidator(check)


Tau = Annotated[float | list[float], _prices(1)]
Rho = Annotated[float | list[float], _prices(math.inf)]


def is_file(weights: str | None) -> bool:
    """Whether data.weights names a file, not a column: it ends as a file that can be read does."""
    return weights is not None and ending(weights) in FORMATS


def _cloud(name: str, info: ValidationInfo) -> str:
    if not is_file(name):
        raise refuse(f"can't read {brief(name)}; use a file that ends in one of {', '.join(FORMATS)}")
    return found(name, info)


def _weights(name: str, info: ValidationInfo) -> str:
    return found(name, info) if is_file(name) else name


CloudFile = Annotated[str, AfterValidator(_cloud)]
Weights = Annotated[str, AfterValidator(_weights)]


class Data(Section):
    """A built-in source, or two files."""

    source: Literal["tutorial", "photographs"] | None = None
    n: Points | None = None  # points in each cloud of a built-in source
    seed: Seed | None = None
    cloud0: CloudFile | None = None
    cloud1: CloudFile | None = None
    columns: Annotated[list[str], Field(min_length=1)] | None = (
        None  # of tables, the features; None: all, paired by name
    )
    header: bool | None = None  # of text, whether the first line holds names; None: told from the file, or refused
    key0: str | None = None  # the array of a .npz
    key1: str | None = None
    weights0: Weights | None = None  # a column or .npz array beside the cloud, or a file of its own
    weights1: Weights | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.source is None:
            for key in ("cloud0", "cloud1"):
                if getattr(self, key) is None:
                    raise refuse("missing; name a file, or set source to 'tutorial' or 'photographs'", key)
            for key in ("n", "seed"):
                if getattr(self, key) is not None:
                    raise refuse("is for built-in sources; remove it, or set source", key)
        else:
            for key in ("cloud0", "cloud1", "columns", "header", "key0", "key1", "weights0", "weights1"):
                if getattr(self, key) is not None:
                    raise refuse(f"is for clouds from files; remove it, or remove source = {self.source!r}", key)
        return self

    def completed(self) -> Self:
        """With the defaults of built-in sources written out."""
        if self.source is None:
            return self
        n = TUTORIAL_SIZE if self.source == "tutorial" and self.n is None else self.n
        return self.model_copy(update={"n": n, "seed": self.seed or 0})


class Start(Section):
    """The pooled fit: one mixture for both clouds together, from which the two mixtures start."""

    n_components: Count
    seed: Seed = 0
    n_init: Starts = 10
    max_steps: Steps = 100
    tol: NonNegative = 1e-5


class Fit(Section):
    """The coupled fit; the names are those of `fit_pair` and `GaussianMixturePair`."""

    transport_weight: NonNegative
    epsilon: Positive | None = None
    tau: Tau | None = None
    rho: Rho | None = None
    em_steps: Steps = 30
    m_steps: Steps = 20
    optimizer: Literal["default", "adam"] = "default"
    learning_rate: Positive | None = None
    tol: NonNegative = 0.0
    freeze: list[Literal["gmm0", "gmm1"]] = Field(default=[])
    ridge: NonNegative = 1e-6
    method: Literal["entropic", "sinkhorn"] = "entropic"
    chunk_size: Count | None = None
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tau is not None and self.rho is not None:
            raise refuse("tau and rho say the same thing; keep one of them", "rho")
        if self.optimizer == "default" and self.learning_rate is not None:
            raise refuse("the default optimizer has none; remove it, or set optimizer = 'adam'", "learning_rate")
        if self.optimizer == "adam" and self.learning_rate is None:
            raise refuse("missing; optimizer = 'adam' needs it, for example 1e-3", "learning_rate")
        return self


class Mixture(Section):
    """A mixture from a file, built in, or by its moments."""

    file: File | None = None  # a mixture, or a fit that ended in one
    example: Literal["left", "right", "top", "middle"] | None = None
    means: list[list[float]] | None = None
    covariances: list[list[list[float]]] | None = None
    weights: list[float] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        moments = {key: getattr(self, key) is not None for key in ("means", "covariances", "weights")}
        ways = [key for key in ("file", "example") if getattr(self, key) is not None]
        ways += [key for key, given in moments.items() if given][:1]
        if not ways:
            raise refuse("missing; name a file, or an example, or give means, covariances and weights", "file")
        if len(ways) > 1:
            raise refuse(f"the mixture has {ways[0]} already; keep one of them", ways[1])
        if ways[0] in moments and not all(moments.values()):
            lacking = next(key for key, given in moments.items() if not given)
            raise refuse("missing; a mixture by its moments has means, covariances and weights", lacking)
        return self


class Member(Mixture):
    """One of several mixtures that pull; coefficients are divided by their sum."""

    coefficient: NonNegative = 1.0


def _counting(members: list[Member]) -> list[Member]:
    if not any(member.coefficient for member in members):
        raise refuse("all coefficients are zero; at least one must be positive")
    return members


Members = Annotated[list[Member], Field(min_length=1), AfterValidator(_counting)]


class BarycenterStart(Section):
    """Mixtures to start from, or how to draw some from the components of those given."""

    mixtures: Annotated[list[Mixture], Field(min_length=1)] | None = None
    n_components: Count | None = None
    seed: Seed | None = None
    n_init: Starts | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.mixtures is None and self.n_components is None:
            raise refuse("missing; say how many to draw, or give [[start.mixtures]]", "n_components")
        for key in ("n_components", "seed", "n_init"):
            if self.mixtures is not None and getattr(self, key) is not None:
                raise refuse("is for starts that are drawn; remove it, or remove [[start.mixtures]]", key)
        return self

    def completed(self) -> Self:
        """With the defaults of drawn starts written out."""
        if self.mixtures is not None:
            return self
        return self.model_copy(update={"seed": self.seed or 0, "n_init": self.n_init or RANDOM_STARTS})


class Plans(Section):
    """How plans to the given mixtures are solved."""

    method: Literal["exact", "entropic"] = "exact"
    epsilon: Positive | None = None
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _blurred(self) -> Self:
        if self.method == "exact" and self.epsilon is not None:
            raise refuse("exact plans have none; remove it, or set method = 'entropic'", "epsilon")
        return self


class Barycenter(Plans):
    """The descent; the names are those of `barycenter`."""

    projection: Literal["joint", "bures", "euclidean"] = "joint"
    learn_weights: bool = False
    max_steps: Steps = 100
    tol: NonNegative = 1e-7


class Flow(Plans):
    """The steps; the names are those of `flow`."""

    steps: Steps = 100
    step_size: Positive = 0.1
    optimizer: Literal["geometric", "adam"] = "geometric"
    mean_rate: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optimizer == "geometric" and self.mean_rate is not None:
            raise refuse("geometric steps have none; remove it, or set optimizer = 'adam'", "mean_rate")
        return self


class Output(Section):
    """What the run folder holds."""

    directory: FileName | None = None  # None: runs/NAME-OF-THE-CONFIGURATION
    pictures: bool = True


class FitOutput(Output):
    max_points_drawn: Count = 5000


class _Job(Section):
    """All of a configuration; build it with `load_config`."""

    command: ClassVar[str]  # the section that the command is named after

    def completed(self) -> Self:
        """With defaults written out that depend on other keys."""
        return self


class FitConfig(_Job):
    command = "fit"
    data: Data
    start: Start
    fit: Fit
    output: FitOutput = FitOutput()

    def completed(self) -> Self:
        return self.model_copy(update={"data": self.data.completed()})


class BarycenterConfig(_Job):
    command = "barycenter"
    mixtures: Members
    start: BarycenterStart
    barycenter: Barycenter = Barycenter()
    output: Output = Output()

    def completed(self) -> Self:
        return self.model_copy(update={"start": self.start.completed()})


class FlowConfig(_Job):
    command = "flow"
    source: Mixture
    targets: Members
    flow: Flow = Flow()
    output: Output = Output()


Job = TypeVar("Job", FitConfig, BarycenterConfig, FlowConfig)
JOBS = (FitConfig, BarycenterConfig, FlowConfig)


def load_config(path: str | PathLike[str], job: type[Job]) -> Job:
    """A checked configuration from a TOML file; paths are absolute, defaults that depend on others filled in.

    Raises:
      ConfigError: the file is missing or no TOML, or of another job, or keys are unknown, missing or wrong; a line for
        each mistake.
    """
    path = Path(path)
    values = read(path)
    other = next((one.command for one in JOBS if one.command in values), job.command)
    if job.command not in values and other != job.command:
        raise ConfigError(f"{path}: {other}: is not for `coupled-gmm {job.command}`; run `coupled-gmm {other}`")
    config = check(path, values, job).completed()
    directory = config.output.directory or str(Path("runs") / path.stem)
    return config.model_copy(update={"output": config.output.model_copy(update={"directory": directory})})
