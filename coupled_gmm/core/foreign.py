"""What other libraries call an array: as one of NumPy, or refused by name.

None of those libraries is imported: a value is known by the module of its class. Names of columns are kept apart from the
numbers; `names` reads them.
"""

import decimal
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from coupled_gmm.core import installation
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError

_SHOWN = 5  # names in a message


def as_array(name: str, value: Any) -> np.ndarray:
    """A value of any library as an array of NumPy, in native byte order, of any dtype that is no object's.

    Raises:
      TypeError, ValueError: a kind of value, of column or of cell that is no real number; names the argument.
    """
    if isinstance(value, np.ma.MaskedArray):
        return _unmasked(name, value)
    if isinstance(value, np.ndarray):
        return _plain(name, np.asarray(value))
    library = _library(value)
    if hasattr(type(value), "obsm"):  # AnnData, MuData: X may be sparse, of 30,000 genes
        raise ArgumentTypeError(name, f"expected an array, got {type(value).__name__}", 'pass adata.obsm["X_pca"], say')
    if is_open(value):
        taken = f"take points of it: {name}.rows(indices)"
        raise ArgumentTypeError(name, f"expected an array, got {value!r}, which is not in memory", taken)
    if library == "scipy" and hasattr(value, "toarray"):
        raise ArgumentTypeError(
            name, f"expected an array, got a sparse {type(value).__name__}", f"pass {name}.toarray()"
        )
    if library == "pandas" and hasattr(value, "to_numpy"):
        return _of_pandas(name, value)
    if library == "polars" or (library == "pyarrow" and hasattr(value, "schema")):
        return _of_polars(name, value)
    if library == "torch":
        return _of_torch(name, value)
    try:
        return _plain(name, np.asarray(value))
    except ArgumentError:
        raise
    except (ValueError, OverflowError) as error:
        raise ArgumentError(name, "expected an array, got rows of unequal length") from error


def is_open(value: Any) -> bool:
    """Whether a cloud is not in memory: it gives its points in chunks, some rows of them, and sums over them."""
    return all(hasattr(type(value), method) for method in ("chunks", "rows", "reduce"))


def names(value: Any) -> tuple[str, ...] | None:
    """The names of a table's columns; None where they are mere positions, or there are none."""
    if is_open(value):
        return None if are_positions(value.names) else value.names
    if (library := _library(value)) not in ("pandas", "polars", "pyarrow"):
        return None
    columns = getattr(value, "column_names" if library == "pyarrow" else "columns", None)
    if columns is None:
        return None
    found = tuple(map(str, columns))
    return None if are_positions(found) else found


def are_positions(found: Sequence[str] | None) -> bool:
    """Whether names say no more than which column it is (0, 1 ..., column_0 ..., V1 ...), or there are none."""
    if found is None:
        return True
    schemes = ((prefix, start) for prefix, starts in (("", (0,)), ("column_", (0, 1)), ("V", (1,))) for start in starts)
    return any(list(found) == [f"{prefix}{start + i}" for i in range(len(found))] for prefix, start in schemes)


def select(value: Any, order: list[int]) -> Any:
    """A table, array or open cloud with its columns in this order."""
    if is_open(value):
        return value.reordered(order)
    if _library(value) == "pandas":
        return value.iloc[:, order]
    return value.select([names(value)[i] for i in order]) if names(value) else value[:, order]  # pyright: ignore[reportOptionalSubscript]


def same_features(called: Sequence[str], tables: Sequence[Any]) -> list[Any]:
    """Tables (None, arrays without names) with the columns of each in the order of the first that names them.

    Raises:
      ValueError: a table names other columns.
    """
    labels = [None if table is None else names(table) for table in tables]
    first = next((i for i, label in enumerate(labels) if label is not None), 0)
    ordered = list(tables)
    for i, table in enumerate(tables):
        order = feature_order((called[first], called[i]), (labels[first], labels[i]))
        if order is not None:
            ordered[i] = select(table, order)
    return ordered


def feature_order(
    called: tuple[str, str], features: tuple[Sequence[str] | None, Sequence[str] | None]
) -> list[int] | None:
    """Where the first table's features stand in the second; None where positions pair them.

    Raises:
      ValueError: the features are not the same ones.
    """
    one, other = features
    if one is None or other is None or list(one) == list(other):
        return None
    if sorted(one) != sorted(other) or len(set(one)) < len(one):
        theirs, ours = (", ".join(map(repr, each[:20])) + (" ..." if len(each) > 20 else "") for each in (other, one))
        if len(one) != len(other):
            remedy = f"choose the same ones with columns (of {theirs}, and of {ours})"
            raise ArgumentError(called[1], f"has {len(other)} features and {called[0]} has {len(one)}", remedy)
        raise ArgumentError(
            called[1], f"has the features {theirs}, and {called[0]} has {ours}", "choose or name the same ones"
        )
    return [list(other).index(feature) for feature in one]


def paired_order(
    called: tuple[str, str], features: tuple[Sequence[str] | None, Sequence[str] | None]
) -> list[int] | None:
    """As `feature_order`, of two tables that both name their features, or of which neither does in more than positions.

    Raises:
      ValueError: the features are not the same ones, or only one table names them.
    """
    order = feature_order(called, features)
    one, other = features
    if (one is None) != (other is None) and not are_positions(one or other):
        named, bare = called if other is None else called[::-1]
        known = ", ".join(map(repr, one or other or ()))
        raise ArgumentError(
            called[1], f"{named} names its features ({known}) and {bare} does not", "name both or neither"
        )
    return order


def native_floats(name: str, array: np.ndarray) -> np.ndarray:
    """Real numbers as float32 or float64 in native byte order; of others the nearest that loses nothing."""
    if array.dtype.kind != "f":
        return array.astype(np.float64)
    if array.dtype.itemsize == 2:
        return array.astype(np.float32)
    if array.dtype.itemsize > 8:
        with np.errstate(over="ignore"):
            cast = array.astype(np.float64)
        if (lost := np.isinf(cast) & np.isfinite(array)).any():
            raise ArgumentError(
                name, f"{lost.sum()} of {array.size} values exceed what float64 holds", "change the unit"
            )
        return cast
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _library(value: Any) -> str:
    """The library that a value's class, or one that it inherits from, belongs to."""
    known = ("pandas", "polars", "pyarrow", "scipy", "torch")
    modules = [cls.__module__.partition(".")[0] for cls in type(value).__mro__]
    return next((module for module in modules if module in known), "")


def _unmasked(name: str, value: np.ma.MaskedArray) -> np.ndarray:
    mask = np.ma.getmaskarray(value)
    if mask.any():
        rows = mask.reshape(len(mask), -1).any(axis=1).sum() if mask.ndim else 1
        raise ArgumentError(
            name, f"{rows} of {len(np.atleast_1d(mask))} rows have masked values", "drop those rows, or fill them in"
        )
    return _plain(name, value.data)


def _plain(name: str, array: np.ndarray) -> np.ndarray:
    """An array whose cells are numbers of NumPy, where they are real numbers at all."""
    if array.dtype.names is not None:
        fields = ", ".join(map(repr, array.dtype.names[:_SHOWN]))
        raise ArgumentTypeError(name, f"has fields with names ({fields})", "make one array of its columns")
    if array.dtype.kind == "O":
        real = (numbers.Real, decimal.Decimal, np.bool_)
        kinds = {type(cell).__name__ for cell in array.flat if not isinstance(cell, real) and np.ndim(cell) == 0}
        if kinds:
            raise ArgumentTypeError(
                name,
                f"expected real numbers, got dtype object with {', '.join(sorted(kinds))}",
                "convert it to floats first",
            )
        try:
            return array.astype(np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ArgumentTypeError(
                name, "expected real numbers, got dtype object", "convert it to floats first"
            ) from error
    return array if array.dtype.kind not in "f" else native_floats(name, array)


def _of_pandas(name: str, value: Any) -> np.ndarray:
    if value.ndim == 1:
        series = [(str(value.name), value)]
    else:
        series = [(str(label), value.iloc[:, i]) for i, label in enumerate(value.columns)]
    columns = []
    for label, column in series:
        kind = str(column.dtype)
        cells = column.to_numpy()
        if kind == "object":
            real = [isinstance(cell, (numbers.Real, decimal.Decimal)) for cell in cells[~column.isna().to_numpy()]]
            numeric = all(real) and not any(isinstance(cell, bool) for cell in cells)
        else:
            numeric = getattr(getattr(column.dtype, "subtype", column.dtype), "kind", "") in "fiu"
        columns.append((label, kind, None if not numeric else int(column.isna().sum()), column))
    _refuse_columns(name, [(label, kind, missing) for label, kind, missing, _ in columns], len(value))
    arrays = [
        np.asarray(column.to_numpy(), np.float64) if kind == "object" else np.asarray(column.to_numpy())
        for _, kind, _, column in columns
    ]
    arrays = [a.astype(np.float64) if a.dtype.kind == "O" else a for a in arrays]
    if value.ndim == 1:
        return native_floats(name, arrays[0])
    return native_floats(name, np.stack(arrays, axis=1)) if arrays else np.empty((len(value), 0))


def _of_polars(name: str, value: Any) -> np.ndarray:
    with installation.needed("tables", name):
        import polars as pl  # theirs is at hand already, or pyarrow's is read by it

    if isinstance(value, pl.LazyFrame):
        raise ArgumentTypeError(name, "expected a table, got a LazyFrame", f"pass {name}.collect()")
    if not isinstance(value, (pl.DataFrame, pl.Series)):
        value = pl.from_arrow(value)
    columns = [value] if isinstance(value, pl.Series) else value.get_columns()
    found = []
    for column in columns:
        missing = (
            column.null_count() + int(column.is_nan().sum() or 0) if column.dtype.is_float() else column.null_count()
        )
        found.append((column.name, str(column.dtype), missing if column.dtype.is_numeric() else None))
    _refuse_columns(name, found, len(value))
    arrays = [
        column.cast(pl.Float64).to_numpy() if not column.dtype.is_float() else column.to_numpy() for column in columns
    ]
    if isinstance(value, pl.Series):
        return arrays[0]
    return np.stack(arrays, axis=1) if arrays else np.empty((0, 0))


def _refuse_columns(name: str, columns: list[tuple[str, str, int | None]], size: int) -> None:
    """Refuse columns (label, kind, missing values; None: it holds no numbers)."""
    words = [f"{label!r} ({kind})" for label, kind, missing in columns if missing is None]
    if words:
        raise ArgumentTypeError(
            name, f"expected real numbers, got columns {_listed(words)}", "leave them out, or convert them to floats"
        )
    missing = [f"{label!r} ({count} of {size})" for label, _, count in columns if count]
    if missing:
        raise ArgumentError(
            name, f"values are missing in columns {_listed(missing)}", "drop those rows, or fill them in"
        )


def _listed(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _of_torch(name: str, value: Any) -> np.ndarray:
    try:
        return _plain(name, np.asarray(value.detach().cpu()))
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ArgumentTypeError(
            name, "this tensor does not go to NumPy", f"pass {name}.detach().cpu().float().numpy()"
        ) from error
