"""The configuration of a coupled fit: TOML, validated whole before anything runs.

Each mistake is one line, ``FILE: SECTION.KEY: what is wrong; what to do``, and all lines of a file come in one
`ConfigError`. Data files are found from the folder of the configuration, the output folder from the working directory.
"""

import difflib
import tomllib
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from coupled_gmm.clouds import FORMATS


class ConfigError(ValueError):
    """A configuration, or data it names, that can't be used: a line for each mistake, with the file and the key."""


TUTORIAL_SIZE = 10_000

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _refuse(key: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{text}", {"key": key, "text": message})  # pyright: ignore[reportArgumentType]


class Data(_Section):
    """A built-in source, or two files."""

    source: Literal["tutorial", "photographs"] | None = None
    n: Count | None = None  # points in each cloud of a built-in source
    seed: Annotated[int, Field(ge=0)] | None = None
    cloud0: str | None = None
    cloud1: str | None = None
    columns: Annotated[list[str], Field(min_length=1)] | None = None
    key0: str | None = None  # the array of a .npz
    key1: str | None = None
    weights0: str | None = None  # a column or .npz array beside the cloud, or a file of its own
    weights1: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Data":
        if self.source is None:
            for key in ("cloud0", "cloud1"):
                if getattr(self, key) is None:
                    raise _refuse(key, "missing; name a file, or set source to 'tutorial' or 'photographs'")
            for key in ("n", "seed"):
                if getattr(self, key) is not None:
                    raise _refuse(key, "is for built-in sources; remove it, or set source")
        else:
            for key in ("cloud0", "cloud1", "columns", "key0", "key1", "weights0", "weights1"):
                if getattr(self, key) is not None:
                    raise _refuse(key, f"is for clouds from files; remove it, or remove source = {self.source!r}")
        return self

    @model_validator(mode="after")
    def _readable_formats(self) -> "Data":
        for key in ("cloud0", "cloud1"):
            path = getattr(self, key)
            if path is not None and Path(path).suffix not in FORMATS:
                raise _refuse(key, f"can't read {path!r}; use a file that ends in one of {', '.join(FORMATS)}")
        return self


class Start(_Section):
    """The pooled fit: one mixture for both clouds together, from which the two mixtures start."""

    n_components: Count
    seed: Annotated[int, Field(ge=0)] = 0
    n_init: Count = 1
    max_steps: Count = 100
    tol: NonNegative = 1e-5


class Fit(_Section):
    """The coupled fit; the names are those of `fit_pair` and `GaussianMixturePair`."""

    transport_weight: NonNegative
    epsilon: Positive | None = None
    tau: Annotated[float, Field(gt=0, le=1)] | None = None
    rho: Annotated[float, Field(gt=0)] | None = None
    em_steps: Count = 30
    m_steps: Count = 20
    optimizer: Literal["default", "adam"] = "default"
    learning_rate: Positive | None = None
    tol: NonNegative = 0.0
    freeze: list[Literal["gmm0", "gmm1"]] = []
    ridge: NonNegative = 1e-6
    method: Literal["entropic", "sinkhorn"] = "entropic"
    chunk_size: Count | None = None
    precision: Literal["float32", "float64"] = "float32"

    @model_validator(mode="after")
    def _consistent(self) -> "Fit":
        if self.tau is not None and self.rho is not None:
            raise _refuse("rho", "tau and rho say the same thing; keep one of them")
        if self.optimizer == "default" and self.learning_rate is not None:
            raise _refuse("learning_rate", "the default optimizer has none; remove it, or set optimizer = 'adam'")
        if self.optimizer == "adam" and self.learning_rate is None:
            raise _refuse("learning_rate", "missing; optimizer = 'adam' needs it, for example 1e-3")
        return self


class Output(_Section):
    """What the run folder holds."""

    directory: str | None = None  # None: runs/NAME-OF-THE-CONFIGURATION
    pictures: bool = True
    max_points_drawn: Count = 5000


class FitConfig(_Section):
    """All of a configuration; build it with `load_config`."""

    data: Data
    start: Start
    fit: Fit
    output: Output = Output()


def load_config(path: str | PathLike[str]) -> FitConfig:
    """A checked configuration from a TOML file; data paths are absolute, defaults that depend on others filled in.

    Raises:
      ConfigError: the file is missing or no TOML, or keys are unknown, missing or wrong; a line for each mistake.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the name and the folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); give a text file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}; correct that line") from error
    try:
        config = FitConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{path}: {_line(details)}" for details in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    return _located(config, path)


def dump_config(config: FitConfig) -> str:
    """The configuration as TOML that `load_config` reads back; keys without a value are left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _located(config: FitConfig, path: Path) -> FitConfig:
    def absolute(name: str | None) -> str | None:
        return name if name is None else str((path.parent / name).resolve())

    data, output = config.data, config.output
    if data.source is not None:
        effective = {"n": data.n or TUTORIAL_SIZE} if data.source == "tutorial" else {}
        data = data.model_copy(update={**effective, "seed": data.seed or 0})
    files = {key: absolute(getattr(data, key)) for key in ("cloud0", "cloud1")}
    for key in ("weights0", "weights1"):
        name = getattr(data, key)
        files[key] = absolute(name) if is_file(name) else name
    directory = output.directory or str(Path("runs") / path.stem)
    return config.model_copy(
        update={"data": data.model_copy(update=files), "output": output.model_copy(update={"directory": directory})}
    )


def is_file(weights: str | None) -> bool:
    """Whether data.weights names a file, not a column: it ends as a file that can be read does."""
    return weights is not None and Path(weights).suffix in FORMATS


def _line(details: ErrorDetails) -> str:
    """One of pydantic's errors in our own words."""
    location = [str(part) for part in details["loc"]]
    context, given = details.get("ctx", {}), details["input"]
    match details["type"]:
        case "refused":
            return f"{'.'.join([*location, context['key']])}: {context['text']}"
        case "extra_forbidden":
            return f"{'.'.join(location)}: unknown key; {_known_keys(location)}"
        case "missing" if len(location) == 1:
            return f"{location[0]}: missing; add a section [{location[0]}]"
        case "missing":
            return f"{'.'.join(location)}: missing; add it to [{location[0]}]"
        case "model_type":
            return f"{'.'.join(location)}: must be a section [{'.'.join(location)}], got {given!r}"
    message = details["msg"].replace("Input should be", "must be").replace("List should have", "must have")
    return f"{'.'.join(location)}: {message}, got {given!r}"


def _known_keys(location: list[str]) -> str:
    """What may stand where an unknown key does, and which was probably meant."""
    model: Any = FitConfig
    for part in location[:-1]:
        model = model.model_fields[part].annotation
    names = list(model.model_fields)
    close = difflib.get_close_matches(location[-1].lower(), names, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    where = f"[{location[0]}] has" if len(location) > 1 else "the sections are"
    return f"{guess}{where} {', '.join(names)}"
