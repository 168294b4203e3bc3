"""Two clouds that a configuration names: files, or a built-in source; and how the files of any cloud are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Array
from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from coupled_gmm.core import checks
from coupled_gmm.core.tree import listed
from coupled_gmm.data import clouds
from coupled_gmm.data.files import FORMATS, TEXT, ending
from coupled_gmm.jobs.config import Seed
from coupled_gmm.jobs.sections import ConfigError, Section, absolute, at, blame, refuse

TUTORIAL_SIZE = 10_000
MOST_POINTS = 100_000_000  # that are drawn
PointCount = Annotated[int, Field(ge=1, le=MOST_POINTS)]
Points = tuple[np.ndarray | Array, np.ndarray | Array]
_OF_ONE = ("cloud", "weights", "key")
PointWeights = tuple[np.ndarray | None, np.ndarray | None]


def is_file(weights: str | None) -> bool:
    """Whether data.weights names a file, not a column: it ends as a file that can be read does."""
    return weights is not None and ending(weights) in FORMATS


def _cloud(name: str, info: ValidationInfo) -> str:
    if not is_file(name):
        raise refuse(f"can't read {checks.brief(name)}; use a file that ends in one of {', '.join(FORMATS)}")
    return absolute(name, info)


def _weights(name: str, info: ValidationInfo) -> str:
    return absolute(name, info) if is_file(name) else name


CloudFile = Annotated[str, AfterValidator(_cloud)]
Weights = Annotated[str, AfterValidator(_weights)]


class Data(Section):
    """A built-in source, or two files."""

    source: Literal["tutorial", "photographs"] | None = None
    n: PointCount | None = None  # points in each cloud of a built-in source
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


class CloudPair(NamedTuple):
    """Both clouds, and what was read beside their points."""

    points: Points
    weights: PointWeights = (None, None)
    names: tuple[str, ...] | None = None  # of the features
    notes: Sequence[str] = ()


def read_pair(path: Path, data: Data, precision: str) -> CloudPair:
    """The clouds of [data], with all the digits that files hold: the fit centres them before it rounds.

    Raises:
      ConfigError: a file can't be read or used, or the clouds do not have the same features.
    """
    if data.source == "tutorial":
        return CloudPair(clouds.tutorial_clouds(jax.random.key(data.seed or 0), data.n or TUTORIAL_SIZE))
    if data.source == "photographs":
        with blame(path, "data", Data):
            x0, x1 = clouds.photograph_clouds(data.n, data.seed or 0)
        dtype = np.dtype(precision)
        return CloudPair((x0.astype(dtype), x1.astype(dtype)))
    sides = [CloudKeys(f"cloud{i}", f"weights{i}", *(getattr(data, f"{key}{i}") for key in _OF_ONE)) for i in "01"]
    (cloud0, w0), (cloud1, w1) = (read_cloud(path, side, data.columns, data.header, precision) for side in sides)
    with blame(path, "data", Data):
        given = cloud1.names
        cloud0, cloud1 = clouds.paired(("cloud0", "cloud1"), cloud0, cloud1)
    x0, x1 = cloud0.points, cloud1.points
    if x0.shape[1] != x1.shape[1]:
        both = f"{x1.shape[1]} features and cloud0 has {x0.shape[1]}"
        raise ConfigError(f"{path}: data.cloud1: has {both}; choose the same ones with columns")
    notes = [f"cloud{side}: {note}" for side, cloud in enumerate((cloud0, cloud1)) for note in cloud.notes]
    if given != cloud1.names:
        notes.append(f"cloud1: columns put into cloud0's order, {', '.join(cloud0.names or ())}")
    return CloudPair((x0, x1), (w0, w1), cloud0.names if cloud1.names else None, notes)


def described(points: Sequence[np.ndarray | Array], precision: str) -> str:
    """Their sizes, in words."""
    sizes = [f"{len(x):,}" for x in points]
    said = f"{len(sizes)} of {sizes[0]}" if len(sizes) > 2 and len(set(sizes)) == 1 else listed(sizes)
    return f"clouds: {said} points of {points[0].shape[1]} features, {precision}"


class CloudKeys(NamedTuple):
    """What a configuration says of one cloud, and by which keys of [data]."""

    cloud_key: str
    weights_key: str
    file: str
    weights: str | None
    array: str | None  # of a .npz


def read_cloud(
    path: Path, one: CloudKeys, columns: Sequence[str] | None, header: bool | None, precision: str
) -> tuple[clouds.Cloud, np.ndarray | None]:
    """A cloud and its points' weights from the files that the configuration at `path` names.

    Raises:
      ConfigError: a file can't be read or used.
    """

    def first_line(file: str) -> bool | None:
        return header if ending(file) in TEXT else None

    inside = None if is_file(one.weights) else one.weights
    with at(path, f"data.{one.cloud_key}"):
        exclude = [] if inside is None else [inside]
        options = {"columns": columns, "key": one.array, "header": first_line(one.file)}
        cloud = clouds.read_named_cloud(one.file, exclude=exclude, **options)
        single = cloud.points.dtype == np.float32 and precision == "float32"
        cloud = cloud._replace(points=cloud.points if single else cloud.points.astype(np.float64))
        checks.points(one.file, cloud.points)
    if one.weights is None:
        return cloud, None
    with at(path, f"data.{one.weights_key}"):
        source = one.weights if inside is None else one.file
        w = clouds.read_weights(source, name=inside, header=first_line(source)).astype(np.float64)
        checks.weights(source, w, len(cloud.points))
        return cloud, w
