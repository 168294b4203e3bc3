"""Point clouds from files, and the two built-in pairs of clouds.

A cloud is an array (n, d): n points, d features. Weights are an array (n,). Whether values are finite is the core's
check; here a file either is a table of numbers or is refused, with its name and what to do.
"""

import math
import zipfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import jax
import numpy as np
import polars as pl
from jaxtyping import Array, Float, PRNGKeyArray

from coupled_gmm import checks
from coupled_gmm.mixture import GaussianMixture

TABLES = (".csv", ".parquet")
FORMATS = (".npy", ".npz", *TABLES)


def read_cloud(
    path: str | PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    key: str | None = None,
) -> Float[np.ndarray, "n d"]:
    """A cloud (n, d) from a .npy, .npz, .csv or .parquet file, as floats.

    Args:
      path: the file. A CSV whose first line is all numbers has no header; its columns are "column_1", "column_2" ...
      columns: of a table, the features to take, in this order; None takes all.
      exclude: of a table, columns that are no features (weights, say); unused where `columns` are given.
      key: of a .npz, the array to take; needed where the file holds several.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another format, a file that can't be read, a column that is missing or holds no numbers, a rank other
        than 2.
    """
    path = _existing(path)
    if path.suffix in TABLES:
        if key is not None:
            raise ValueError(f"{path}: key is for .npz files; choose columns of a table by name instead")
        frame = _read_table(path)
        names = list(columns) if columns is not None else [name for name in frame.columns if name not in exclude]
        if not names:
            raise ValueError(f"{path}: no columns are left to be features; name at least one in columns")
        return np.stack([_column(path, frame, name) for name in names], axis=1)
    if columns is not None:
        raise ValueError(f"{path}: columns are for .csv and .parquet files; save only the features you want")
    cloud = _read_array(path, key)
    if cloud.ndim != 2 or 0 in cloud.shape:
        hint = "reshape one feature to (n, 1)" if cloud.ndim == 1 else "save one row a point and one column a feature"
        raise ValueError(f"{path}: expected an array of shape (n, d), got {cloud.shape}; {hint}")
    return cloud


def read_weights(path: str | PathLike[str], *, name: str | None = None) -> Float[np.ndarray, " n"]:
    """Point weights (n,): the column or .npz array `name` of a file, or all of a file that holds one column.

    Raises:
      FileNotFoundError, ValueError: as `read_cloud`, and a file with more than one column.
    """
    path = _existing(path)
    if path.suffix in TABLES:  # noqa: SIM108
        weights = read_cloud(path, columns=None if name is None else [name])
    else:
        weights = _read_array(path, name)
    if weights.ndim == 2 and weights.shape[1] == 1:
        weights = weights[:, 0]
    if weights.ndim != 1:
        raise ValueError(f"{path}: expected one weight a point, shape (n,), got {weights.shape}; save one column")
    return weights


def _existing(path: str | PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in FORMATS:
        ending = path.suffix or "a file without ending"
        raise ValueError(f"{path}: can't read {ending}; use one of {', '.join(FORMATS)}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the name and the folder")
    return path


def _read_table(path: Path) -> pl.DataFrame:
    try:
        if path.suffix == ".parquet":
            frame = pl.read_parquet(path)
        else:
            frame = pl.read_csv(path, has_header=not _starts_with_numbers(path), infer_schema_length=None)
            frame = frame.rename(str.strip)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    if frame.height == 0:
        raise ValueError(f"{path}: the table has no rows; a cloud needs at least one point")
    return frame


def _starts_with_numbers(path: Path) -> bool:
    with path.open(encoding="utf-8") as lines:
        cells = lines.readline().strip().split(",")
    try:
        return bool([float(cell) for cell in cells])
    except ValueError:
        return False


def _column(path: Path, frame: pl.DataFrame, name: str) -> np.ndarray:
    if name not in frame.columns:
        raise ValueError(f"{path}: there is no column {name!r}; it has {', '.join(map(repr, frame.columns))}")
    column = frame[name]
    if column.null_count():
        raise ValueError(f"{path}: column {name!r} lacks {column.null_count()} values; drop those rows or fill them in")
    kind = column.dtype
    if kind == pl.String:  # numbers too, where one of them is "nan" or has a space before it
        column = column.str.strip_chars().cast(pl.Float64, strict=False)
    if column.null_count() or not (column.dtype.is_numeric() or kind == pl.Boolean):
        raise ValueError(f"{path}: column {name!r} is not numeric ({kind}); leave it out by naming columns")
    return column.cast(pl.Float64).to_numpy()


def _read_array(path: Path, key: str | None) -> np.ndarray:
    try:
        # Without pickle: a cloud is data, and reading one runs no code.
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with np.load(path, allow_pickle=False) as archive:
                array = archive[_key(path, archive.files, key)]
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise _unreadable(path, error) from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{path}: expected real numbers, got dtype {array.dtype}; convert the array to floats")
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _key(path: Path, names: list[str], key: str | None) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key is None:
        raise ValueError(f"{path}: holds {len(names)} arrays ({', '.join(names)}); name one with key")
    if key not in names:
        raise ValueError(f"{path}: there is no array {key!r}; it has {', '.join(map(repr, names))}")
    return key


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{path}: can't be read as {path.suffix} ({reason}); save it again, or check that it is complete")


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
    from sklearn.datasets import load_sample_images  # slow to import, and only needed here

    clouds = [image.reshape(-1, 3).astype(np.float32) / 255 for image in load_sample_images().images]
    if n is not None:
        size = len(clouds[0])
        if checks.integer("n", n, 1) > size:
            raise ValueError(f"n: the photographs have {size} pixels each, got {n}; ask for fewer, or none for all")
        draw = np.random.default_rng(seed)
        clouds = [cloud[draw.choice(size, n, replace=False)] for cloud in clouds]
    return clouds[0], clouds[1]
