"""Point clouds from files, and those that are built in: two pairs, and a time course.

A cloud is an array (n, d): n points, d features. Weights are an array (n,). A file either is a table of numbers or is
refused, with its name and what to do.
"""

import json
import math
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from coupled_gmm.core import checks, foreign, installation
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.data import arrays, columns, dialect
from coupled_gmm.data.dialect import Table
from coupled_gmm.data.files import TABLES, TEXT, ending, existing, unreadable
from coupled_gmm.gaussians.mixture import GaussianMixture

with installation.needed("tables", "clouds from files"):
    import polars as pl


class Cloud(NamedTuple):
    """A cloud as a file holds it."""

    points: Float[np.ndarray, "n d"]
    names: tuple[str, ...] | None  # of the features, where the file has names
    notes: tuple[str, ...] = ()  # what was decided in reading it, for people to see


def read_cloud(
    path: str | PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    key: str | None = None,
    header: bool | None = None,
) -> Float[np.ndarray, "n d"]:
    """A cloud (n, d) from a file, as floats; `read_named_cloud` gives its features' names as well.

    Args:
      path: a .npy, .npz, .parquet, or text (.csv, .tsv, .txt, these with .gz).
      columns: of a table, the features to take, in this order; None takes all but an index (row names, a column that
        counts the rows), which is left out with a warning. Of text without a header they are "column_1", "column_2" ...
      exclude: of a table, columns that are no features (weights, say); unused where `columns` are given.
      key: of a .npz, the array to take; needed where the file holds several.
      header: of text, whether the first line holds names; None tells it from the lines below, or refuses.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another format, a file that can't be read or in two ways, a column that is missing, lacks values or
        holds other things than numbers, a rank other than 2.
    """
    cloud = read_named_cloud(path, columns=columns, exclude=exclude, key=key, header=header)
    for note in cloud.notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return cloud.points


def read_named_cloud(
    path: str | PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    key: str | None = None,
    header: bool | None = None,
) -> Cloud:
    """The cloud of `read_cloud` with its features' names and, in place of warnings, notes."""
    path = existing(path)
    if header is not None and ending(path) not in TEXT:
        raise ValueError(f"{path}: header is for text files ({', '.join(TEXT)}); leave it out")
    if ending(path) in TABLES:
        if key is not None:
            raise ValueError(f"{path}: key is for .npz files; choose columns of a table by name instead")
        table = _read_table(path, header)
        return _features(path, table, columns, exclude)
    if columns is not None:
        raise ValueError(f"{path}: columns are for .csv and .parquet files; save only the features you want")
    cloud, names = _unstructured(path, _read_array(path, key), exclude)
    arrays.check_cloud(path, cloud.shape)
    return Cloud(cloud, names)


def read_weights(
    path: str | PathLike[str], *, name: str | None = None, header: bool | None = None
) -> Float[np.ndarray, " n"]:
    """Point weights (n,): the column or .npz array `name` of a file, or all of a file that holds one column.

    Raises:
      FileNotFoundError, ValueError: as `read_cloud`, and a file with more than one column.
    """
    path = existing(path)
    if ending(path) in TABLES:
        weights = read_named_cloud(path, columns=None if name is None else [name], header=header).points
    else:
        weights = _read_array(path, name if ending(path) == ".npz" else None)
        if weights.dtype.names is not None:
            weights, _ = _unstructured(path, weights if name is None else weights[[name]], ())
    if weights.ndim == 2 and weights.shape[1] == 1:
        weights = weights[:, 0]
    if weights.ndim != 1:
        raise ValueError(f"{path}: expected one weight a point, shape (n,), got {weights.shape}; save one column")
    return weights


def paired(names: tuple[str, str], cloud0: Cloud, cloud1: Cloud) -> tuple[Cloud, Cloud]:
    """Two clouds with the same features in the order of the first.

    Names pair features; where neither cloud has any, or mere numbers, their positions do.

    Args:
      names: what to call the clouds.

    Raises:
      ValueError: features that can't be paired; the message starts with the second cloud's name.
    """
    order = foreign.paired_order(names, (cloud0.names, cloud1.names))
    if order is not None:
        cloud1 = cloud1._replace(points=cloud1.points[:, order], names=cloud0.names)
    return cloud0, cloud1


def _read_table(path: Path, header: bool | None) -> Table:
    try:
        table = _read_parquet(path) if ending(path) == ".parquet" else dialect.read(path, header)
    except (Exception, pl.exceptions.PanicException) as error:  # a damaged file makes a foreign reader raise anything
        raise unreadable(path, error) from error
    if not table.columns or len(table.columns[0]) == 0:
        raise ValueError(f"{path}: the table has no rows; a cloud needs at least one point")
    return table


def _read_parquet(path: Path) -> Table:
    """A Parquet file; what pandas kept in it as an index is marked as such."""
    frame = pl.read_parquet(path, glob=False)
    about = json.loads(pl.read_parquet_metadata(path).get("pandas", "{}"))
    index = [name for name in about.get("index_columns", []) if isinstance(name, str)]
    return Table(frame.columns, frame.get_columns(), True, tuple(i for i, n in enumerate(frame.columns) if n in index))


def _features(path: Path, table: Table, names: Sequence[str] | None, exclude: Sequence[str]) -> Cloud:
    """The columns of a table that were asked for, or all that are features."""
    taken, notes = columns.features(path, table, names, exclude)
    points = np.stack([columns.values(path, table.names[i], table.columns[i]) for i in taken], axis=1)
    return Cloud(points, tuple(table.names[i] for i in taken) if table.named else None, (*table.notes, *notes))


def _read_array(path: Path, key: str | None) -> np.ndarray:
    try:
        array = arrays.read(path, key)
    except Exception as error:  # a damaged file makes a foreign reader raise anything
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise unreadable(path, error) from error
    if array.dtype.names is not None:
        return array
    return arrays.floats(path, array)


def _unstructured(path: Path, array: np.ndarray, exclude: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """An array whose fields have names as columns, and those names."""
    if array.dtype.names is None:
        return array, None
    names = tuple(name for name in array.dtype.names if name not in exclude)
    arrays.check_fields(path, array.dtype, array.ndim, names)
    return np.stack([arrays.floats(path, array[name]) for name in names], axis=1).astype(np.float64), names


def tutorial_mixtures() -> tuple[GaussianMixture, GaussianMixture]:
    """The two mixtures that generate OTT's tutorial on coupled fits: three components in the plane.

    The tutorial turns the second mixture's covariances with R S, not R S R^T, which is not symmetric. OTT takes their
    Cholesky factors with `jnp.linalg.cholesky`, which first symmetrises: its points come from (R S + S R^T) / 2, said
    openly here.
    """
    means = np.array([[2.0, -1.0], [-2.0, 0.0], [4.0, 3.0]])
    covariances = 3 * np.array([[[0.2, 0.0], [0.0, 0.1]], [[0.6, 0.0], [0.0, 0.3]], [[0.5, -0.4], [-0.4, 0.5]]])
    turned = np.stack([_rotation(angle) @ s for angle, s in zip((5, -5, -10), covariances, strict=True)])
    shift = np.array([[1.0, -0.5], [-1.0, -1.0], [-1.0, 0.0]])
    return (
        GaussianMixture.from_moments(means, covariances, [0.2, 0.2, 0.6]),
        GaussianMixture.from_moments(means + shift, (turned + turned.swapaxes(1, 2)) / 2, [0.4, 0.4, 0.2]),
    )


def _rotation(degrees: float) -> np.ndarray:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cosine, -sine], [sine, cosine]])


def tutorial_clouds(key: PRNGKeyArray, n: int) -> tuple[Float[Array, "n 2"], Float[Array, "n 2"]]:
    """n points from each of `tutorial_mixtures`; the key decides them."""
    key0, key1 = jax.random.split(key)
    gmm0, gmm1 = tutorial_mixtures()
    return gmm0.sample(key0, n), gmm1.sample(key1, n)


class TimeCourse(NamedTuple):
    """A planted time course: the mixture at each time, and how fast the mass of each of its components grows."""

    times: Float[np.ndarray, " V"]
    gmms: list[GaussianMixture]
    growth: Float[
        np.ndarray, " K"
    ]  # per unit of time, from `BRANCHING` on: rates of numbers, before masses are normalised


COURSE_TIMES = (0.0, 1.0, 2.0, 3.0, 4.0)
BRANCHING = 1.0  # when the progenitors split
_GROWTH = (0.0, 0.5)  # of the two branches


def time_course_mixtures() -> TimeCourse:
    r"""Differentiation as a planted time course in the plane: one population that drifts, splits in two, and one half grows.

    At times 0 and 1 there are progenitors alone, one Gaussian that drifts. Then both halves of them move apart: the numbers of the
    lower branch stay what they are, those of the upper grow by :math:`e^{0.5}` per unit of time. A component is a branch, and
    progenitors are the one component of their times; masses are parts of all cells there are.
    """
    times, growth = np.array(COURSE_TIMES), np.array(_GROWTH)
    gmms = []
    for t in times:
        since = max(t - BRANCHING, 0.0)
        if not since:
            gmms.append(GaussianMixture.from_moments([[2 * t, 0.0]], [np.diag([0.4, 0.3])], [1.0]))
            continue
        means = np.array([[2 * t, -1.5 * since], [2 * t, 1.5 * since]])
        tilt = np.array([[0.4, -0.1], [-0.1, 0.3]])
        numbers = np.exp(growth * since)
        covariances = np.stack([tilt, tilt * [[1, -1], [-1, 1]]])
        gmms.append(GaussianMixture.from_moments(means, covariances, numbers / numbers.sum()))
    return TimeCourse(times, gmms, growth)


def time_course_clouds(key: PRNGKeyArray, n: int) -> tuple[list[Float[Array, "n 2"]], Float[np.ndarray, " V"]]:
    """n points at each time of `time_course_mixtures`, and these times; the key decides the points."""
    course = time_course_mixtures()
    keys = jax.random.split(key, len(course.times))
    return [gmm.sample(one, n) for gmm, one in zip(course.gmms, keys, strict=True)], course.times


def photograph_clouds(n: int | None = None, seed: int = 0) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]:
    """The pixels of the two photographs inside scikit-learn (a temple in China, a flower): red, green, blue in [0, 1].

    Args:
      n: how many pixels of each, drawn without replacement; None takes all 273,280, row by row.
      seed: decides the draw.
    """
    with installation.needed("sklearn", "the photographs"):
        from sklearn.datasets import load_sample_images  # slow to import, and only needed here

    clouds = [image.reshape(-1, 3).astype(np.float32) / 255 for image in load_sample_images().images]
    if n is not None:
        size = len(clouds[0])
        if checks.integer("n", n, 1) > size:
            raise ArgumentError(
                "n", f"the photographs have {size} pixels each, got {n}", "ask for fewer, or none for all"
            )
        draw = np.random.default_rng(seed)
        clouds = [cloud[draw.choice(size, n, replace=False)] for cloud in clouds]
    return clouds[0], clouds[1]
