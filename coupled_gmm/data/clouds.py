"""Point clouds from files, and the two built-in pairs of clouds.

A cloud is an array (n, d): n points, d features. Weights are an array (n,). A file either is a table of numbers or is
refused, with its name and what to do.
"""

import json
import math
import stat
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
from coupled_gmm.data import arrays, dialect
from coupled_gmm.data.dialect import Table
from coupled_gmm.gaussians.mixture import GaussianMixture

with installation.needed("tables", "clouds from files"):
    import polars as pl

TEXT = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
TABLES = (*TEXT, ".parquet")
FORMATS = (".npy", ".npz", ".csv", ".parquet", *TEXT[1:])
# Names that programs and people give to a column that counts rows.
_COUNTERS = ("index", "idx", "id", "row", "rowname", "rownames", "row_name", "row_names", "row_nr", "row_id", "rowid")
_COUNTERS += ("row_index", "row_number", "rn", "level_0", "no", "nr", "obs", "observation")
_ROW_NAMES = ("rownames", "row_names", "rowname", "row_name")


class Cloud(NamedTuple):
    """A cloud as a file holds it."""

    points: Float[np.ndarray, "n d"]
    names: tuple[str, ...] | None  # of the features, where the file has names
    notes: tuple[str, ...] = ()  # what was decided in reading it, for people to see


def ending(path: str | PathLike[str]) -> str:
    """What a file's name says it is: ".csv", ".csv.gz"; empty where it says nothing."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


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
    path = _existing(path)
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
    if cloud.ndim != 2 or 0 in cloud.shape:
        hint = "reshape one feature to (n, 1)" if cloud.ndim == 1 else "save one row a point and one column a feature"
        raise ValueError(f"{path}: expected an array of shape (n, d), got {cloud.shape}; {hint}")
    return Cloud(cloud, names)


def read_weights(
    path: str | PathLike[str], *, name: str | None = None, header: bool | None = None
) -> Float[np.ndarray, " n"]:
    """Point weights (n,): the column or .npz array `name` of a file, or all of a file that holds one column.

    Raises:
      FileNotFoundError, ValueError: as `read_cloud`, and a file with more than one column.
    """
    path = _existing(path)
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
    order = foreign.feature_order(names, (cloud0.names, cloud1.names))
    if order is not None:
        cloud1 = cloud1._replace(points=cloud1.points[:, order], names=cloud0.names)
    elif (cloud0.names is None) != (cloud1.names is None):
        named, bare = names if cloud1.names is None else names[::-1]
        known = ", ".join(map(repr, cloud0.names or cloud1.names or ()))
        if not foreign.are_positions(cloud0.names or cloud1.names):
            problem = f"{named} names its features ({known}) and {bare} does not"
            raise ArgumentError(names[1], problem, "name both or neither")
    return cloud0, cloud1


def _existing(path: str | PathLike[str]) -> Path:
    path = Path(path)
    if ending(path) not in FORMATS:
        end = ending(path) or "a file without ending"
        raise ValueError(f"{path}: can't read {end}; use one of {', '.join(FORMATS)}")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; check the name and the folder") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):  # reading a named pipe would wait for ever
        raise ValueError(f"{path}: can't be read as {ending(path)} (it is no regular file); name a file")
    return path


def _read_table(path: Path, header: bool | None) -> Table:
    try:
        table = _read_parquet(path) if ending(path) == ".parquet" else dialect.read(path, header)
    except (Exception, pl.exceptions.PanicException) as error:  # a damaged file makes a foreign reader raise anything
        raise _unreadable(path, error) from error
    if not table.columns or len(table.columns[0]) == 0:
        raise ValueError(f"{path}: the table has no rows; a cloud needs at least one point")
    return table


def _read_parquet(path: Path) -> Table:
    """A Parquet file; what pandas kept in it as an index is marked as such."""
    frame = pl.read_parquet(path, glob=False)
    about = json.loads(pl.read_parquet_metadata(path).get("pandas", "{}"))
    index = [name for name in about.get("index_columns", []) if isinstance(name, str)]
    return Table(frame.columns, frame.get_columns(), True, tuple(i for i, n in enumerate(frame.columns) if n in index))


def _features(path: Path, table: Table, columns: Sequence[str] | None, exclude: Sequence[str]) -> Cloud:
    """The columns of a table that were asked for, or all that are features."""
    notes = list(table.notes)
    if columns is None:
        index = _index(path, table)
        notes += [f"left out {_called(table, i)}, which {why}" for i, why in index.items()]
        taken = [i for i, name in enumerate(table.names) if i not in index and name not in exclude]
        counting = [i for i in taken if len(taken) > 1 and len(table.columns[i]) > 2 and _counts_rows(table.columns[i])]
        notes += [
            f"took {table.names[i]!r}, which counts the rows, for a feature; if it is an index, name the features in columns"
            for i in counting
        ]
    else:
        taken = [_place(path, table, name) for name in columns]
    names = [table.names[i] for i in taken]
    if not names:
        raise ValueError(f"{path}: no columns are left to be features; name at least one in columns")
    for i, name in zip(taken, names, strict=True):
        if name == "":
            raise ValueError(f"{path}: column {i + 1} has no name; name it, or name the features in columns")
        if table.names.count(name) > 1:
            raise ValueError(f"{path}: {table.names.count(name)} columns are named {name!r}; give each its own name")
    points = np.stack([_column(path, table.columns[i], table.names[i]) for i in taken], axis=1)
    return Cloud(points, tuple(names) if table.named else None, tuple(notes))


def _called(table: Table, i: int) -> str:
    return repr(table.names[i]) if table.names[i] else "the column without a name"


def _place(path: Path, table: Table, name: str) -> int:
    if name not in table.names:
        raise ValueError(f"{path}: there is no column {name!r}; it has {', '.join(map(repr, table.names))}")
    return table.names.index(name)


def _index(path: Path, table: Table) -> dict[int, str]:
    """Columns that say which row it is, no feature of a point, and why they are thought so.

    An id that counts the rows says nothing of a point; who wants it all the same names it in columns.
    """
    found = dict.fromkeys(table.index, "is the index that pandas kept")
    for i, (name, column) in enumerate(zip(table.names, table.columns, strict=True)):
        if i in found:
            continue
        counts = len(column) > 1 and _counts_rows(column)
        unnamed = name == "" or name.startswith(("Unnamed: ", "__index_level_"))
        if (unnamed and (counts or ((i == 0 or name[:1] == "_") and _tells_rows_apart(column)))) or (
            name.lower() in _ROW_NAMES and _tells_rows_apart(column)
        ):
            found[i] = "names the rows"
        elif counts and name.lower() in _COUNTERS:
            found[i] = "counts the rows; name it in columns if it is a feature"
        elif counts and not table.named and i == 0 and len(table.columns) > 1:
            rest = ", ".join(table.names[1:3])
            raise ValueError(
                f"{path}: {name} counts the rows; name the features in columns ({rest} ...), it too if it is one"
            )
    return found


def _counts_rows(column: pl.Series) -> bool:
    if not column.dtype.is_numeric() or column.null_count():
        return False
    values = column.cast(pl.Float64).to_numpy()
    return any(np.array_equal(values, np.arange(start, start + len(values))) for start in (0, 1))


def _tells_rows_apart(column: pl.Series) -> bool:
    """Whether cells may be names of rows: words, or whole numbers, none twice."""
    if column.dtype == pl.String:
        return True
    if not column.dtype.is_numeric() or column.null_count():
        return False
    return column.n_unique() == len(column) and bool((column.cast(pl.Float64) % 1 == 0).all())


def _column(path: Path, column: pl.Series, name: str) -> np.ndarray:
    """A column as floats, if every value is a finite number."""
    remedy = "leave it out by naming columns"
    if not (column.dtype.is_numeric() or column.dtype == pl.Null):
        bad = column.is_not_null()
        row = bad.arg_max() or 0
        cell = f"; {bad.sum()} of {len(bad)} cells, the first {str(column[row])[:40]!r} in row {row + 1}"
        raise ValueError(f"{path}: column {name!r} is not numeric ({column.dtype}); {remedy}{cell}")
    values = column.cast(pl.Float64)
    for wrong, what in ((values.is_null() | values.is_nan(), "lacks"), (values.is_infinite(), "is infinite in")):
        if count := wrong.fill_null(False).sum():
            row = (wrong.arg_max() or 0) + 1
            text = f"column {name!r} {what} {count} of {len(values)} values, the first in row {row}"
            raise ValueError(f"{path}: {text}; drop those rows, fill them in, or {remedy}")
    return values.to_numpy()


def _read_array(path: Path, key: str | None) -> np.ndarray:
    try:
        array = arrays.read(path, key)
    except Exception as error:  # a damaged file makes a foreign reader raise anything
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise _unreadable(path, error) from error
    if array.dtype.names is not None:
        return array
    return _floats(path, array)


def _floats(path: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{path}: expected real numbers, got dtype {array.dtype}; convert the array to floats")
    return foreign.native_floats(str(path), array)


def _unstructured(path: Path, array: np.ndarray, exclude: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """An array whose fields have names as columns, and those names."""
    if array.dtype.names is None:
        return array, None
    names = tuple(name for name in array.dtype.names if name not in exclude)
    columns = [_floats(path, array[name]) for name in names]
    if array.ndim != 1 or any(column.ndim != 1 for column in columns):
        raise ValueError(f"{path}: expected fields of one number each, got dtype {array.dtype}; save plain floats")
    return np.stack(columns, axis=1).astype(np.float64), names


def _unreadable(path: Path, error: BaseException) -> ValueError:
    if isinstance(error, PermissionError):
        return ValueError(f"{path}: may not be read; ask for permission to, or change it")
    if isinstance(error, MemoryError):
        return ValueError(f"{path}: does not fit into memory; save fewer points, or float32")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if ending(path) in TEXT and isinstance(error, ValueError) and "; " in reason:  # with a remedy of its own
        return ValueError(f"{path}: can't be read as {ending(path)}: {reason}")
    return ValueError(
        f"{path}: can't be read as {ending(path)} ({reason}); save it again, or check that it is complete"
    )


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
