"""Saving and loading: one .npz of plain arrays, with a JSON header that says how they fit together.

No pickle: loading runs no code, and builds only this package's own classes. A class is stored by its name and the names
of its fields, so that a file outlives a change of their order, and a file of another shape is refused, not misread.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coupled_gmm.tree import new

FORMAT = "coupled_gmm"
VERSION = 1
_HEADER = "header"
# What files hold, by name, and where it is today: a class may move between modules.
_MODULES = {
    "BarycenterFit": "barycenter",
    "BarycenterHistory": "barycenter",
    "CostParts": "plan",
    "FlowFit": "flow",
    "FlowHistory": "flow",
    "GaussianMixture": "mixture",
    "GaussianMixturePair": "pair",
    "GraphFit": "fit",
    "History": "coupled",
    "MixtureFit": "em",
    "MixtureGraph": "graph",
    "MixtureHistory": "em",
    "PairFit": "fit",
    "Plan": "plan",
}


def save(path: str | PathLike[str], tree: Any) -> None:
    """Write mixtures, pairs, plans, fits, or lists, tuples and dicts of these and of arrays, to one file.

    Args:
      path: the file, written whole or not at all; ".npz" is its customary ending and is not added.
      tree: what to save. Arrays keep their type (JAX or NumPy) and precision.

    Raises:
      TypeError: something in the tree is neither of these; the message says where.
    """
    arrays: dict[str, np.ndarray] = {}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "package": _package_version(),
        "tree": _encode(tree, "tree", arrays),
    }
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **{_HEADER: np.array(json.dumps(header))}, **arrays)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: str | PathLike[str]) -> Any:
    """What `save` wrote. float64 arrays come back as float32 where JAX has float64 disabled.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a file that `save` wrote, or one of a newer format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the name and the folder")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(str(arrays[_HEADER]))
        ours = header["format"] == FORMAT
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a file that coupled_gmm.save wrote, or a damaged one; save it again") from error
    if not ours:
        raise ValueError(f"{path}: a file of {header['format']!r}, not of {FORMAT!r}; load it with what wrote it")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: has format version {header.get('version')!r}, and this package reads {VERSION}; "
            f"install the coupled_gmm that wrote it ({header.get('package')}) or a newer one"
        )
    try:
        return _decode(header["tree"], arrays)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: the header and the arrays disagree ({error}); save it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _encode(value: Any, where: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A JSON node for `value`; its arrays are collected by name."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic)):
        return {"value": value}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        if value.dtype.kind not in "fiubc":  # kinds that a .npz holds without pickle
            raise TypeError(f"{where}: can't save an array of dtype {value.dtype}; convert it to a NumPy dtype first")
        name = f"a{len(arrays)}"
        arrays[name] = np.asarray(value)
        return {"array": name, "jax": isinstance(value, jax.Array)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(v, f"{where}[{i}]", arrays) for i, v in enumerate(value)]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(v, f"{where}[{key!r}]", arrays) for key, v in value.items()}}
    cls = _class(type(value).__name__)
    if cls is not None and cls is type(value):
        names = [field.name for field in dataclasses.fields(cls)]
        return {
            "class": cls.__name__,
            "fields": {name: _encode(getattr(value, name), f"{where}.{name}", arrays) for name in names},
        }
    raise TypeError(
        f"{where}: can't save a {type(value).__name__}; save results of this package, arrays, numbers, strings, and "
        "lists, tuples and dicts (with string keys) of these"
    )


def _decode(node: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    match node:
        case {"value": value}:
            return value
        case {"array": name, "jax": True}:
            array = arrays[name]
            return jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))
        case {"array": name}:
            return arrays[name]
        case {"list": items}:
            return [_decode(item, arrays) for item in items]
        case {"tuple": items}:
            return tuple(_decode(item, arrays) for item in items)
        case {"dict": items}:
            return {key: _decode(item, arrays) for key, item in items.items()}
        case {"class": name, "fields": fields}:
            return _build(name, {key: _decode(field, arrays) for key, field in fields.items()})
    raise ValueError("the header holds a node that this package does not know; install a newer coupled_gmm")


def _build(name: str, fields: dict[str, Any]) -> Any:
    cls = _class(name)
    if cls is None:
        raise ValueError(f"holds a {name!r}, which is no class of this package; install the coupled_gmm that wrote it")
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    optional = {name for name, default in defaults.items() if default is not dataclasses.MISSING}  # since an older file
    wrong = (set(defaults) ^ set(fields)) - (optional - set(fields))
    if wrong:
        wrong = ", ".join(sorted(wrong))
        raise ValueError(f"its {name} differs from this package's in {wrong}; install the coupled_gmm that wrote it")
    return new(cls, **{name: defaults[name] for name in optional} | fields)


def _class(name: str) -> Any:
    """The class that files call so, or None; its module is imported for it."""
    module = _MODULES.get(name)
    return None if module is None else getattr(importlib.import_module(f"coupled_gmm.{module}"), name)


def _package_version() -> str:
    try:
        return importlib.metadata.version("coupled_gmm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
