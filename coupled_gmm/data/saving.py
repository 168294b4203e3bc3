"""Saving and loading: one .npz of plain arrays, with a JSON header that says how they fit together.

No pickle: loading runs no code, and builds only this package's own classes. A class is stored by its name and the names
of its fields, so that a file outlives a change of their order, and a file of another shape is refused, not misread.
"""

import contextlib
import dataclasses
import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coupled_gmm.core import checks, installation
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.core.tree import saved_class, unchecked
from coupled_gmm.data import archive, validity

FORMAT = "coupled_gmm"
VERSION = 2
READABLE = (1, 2)  # the first has no checksums
_HEADER = "header"
_DEEPEST = 100  # lists, tuples and dicts around a value: Python's own parser has a limit
_LARGEST_INTEGER = 1024  # bits


def save(path: str | PathLike[str], tree: Any) -> None:
    """Write mixtures, pairs, plans, fits, or lists, tuples and dicts of these and of arrays, to one file.

    Args:
      path: the file, written whole or not at all; ".npz" is its customary ending and is not added.
      tree: what to save. Arrays keep their type (JAX or NumPy) and precision.

    Raises:
      TypeError: something in the tree is neither of these; the message says where.
      ValueError: something in the tree is no result that the package could have made, and so would not be loaded again; or
        what stands at the path is no file.
      OSError: the file can't be written.
    """
    archive.write(Path(path), _members(tree))


def pack(tree: Any) -> bytes:
    """What `save` would write, in memory.

    Raises:
      TypeError, ValueError: as `save`.
    """
    return archive.packed(_members(tree))


def _members(tree: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    header = {"format": FORMAT, "version": VERSION, "package": installation.version()}
    header["tree"] = _encode(tree, "tree", 0, arrays)
    try:
        validity.check("tree", tree)
    except validity.Invalid as error:
        raise ValueError(f"{error}; it would not be loaded again: save its arrays in a dict instead") from error
    header["arrays"] = {name: _digest(array) for name, array in arrays.items()}
    header["checksum"] = _digest(_text(header))
    return {_HEADER: _text(header), **arrays}


def load(path: str | PathLike[str]) -> Any:
    """What `save` wrote. float64 arrays come back as float32 where JAX has float64 disabled.

    Sizes are checked before anything is allocated, header and arrays against their checksums, and objects as at construction.

    Raises:
      FileNotFoundError, PermissionError: there is no such file, or it can't be read.
      ValueError: not a file that `save` wrote, or one of a newer format, or a damaged one.
    """
    path = Path(path)
    return _loaded(path, archive.opened(path))


def unpack(name: str, content: bytes) -> Any:
    """What `pack` wrote; `name` is what errors call it.

    Raises:
      ValueError: as `load`.
    """
    return _loaded(name, archive.held(content))


def _loaded(path: str | Path, opened: contextlib.AbstractContextManager[archive.Archive]) -> Any:
    try:
        with opened as members:
            header = _header(members)
            arrays = _arrays(members, header)
    except (archive.Damaged, RecursionError) as error:
        reason = error if isinstance(error, archive.Damaged) else "its header is nested too deeply"
        raise ValueError(
            f"{path}: not a file that coupled_gmm.save wrote, or a damaged one ({reason}); save it again, or copy it whole"
        ) from error
    except _Foreign as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        tree = _decode(header["tree"], arrays, 0)
        if arrays:
            raise ValueError(f"the header and the arrays disagree ({len(arrays)} are not in it); save it again")
        validity.check("tree", tree)
    except validity.Invalid as error:
        raise ValueError(f"{path}: {error}; save it again with the package that wrote it") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tree


class _Foreign(ValueError):
    """A file of something else, or of another version."""


def _header(members: archive.Archive) -> dict[str, Any]:
    if _HEADER not in members.names:
        raise archive.Damaged("it has no header")
    text = str(members[_HEADER])
    try:
        header = json.loads(text)
    except ValueError as error:
        raise archive.Damaged("its header is no JSON") from error
    if not isinstance(header, dict) or not {"format", "version", "package", "tree"} <= header.keys():
        raise archive.Damaged("its header lacks something")
    if header["format"] != FORMAT:
        raise _Foreign(f"a file of {checks.brief(header['format'])}, not of {FORMAT!r}; load it with what wrote it")
    version, package = header["version"], checks.brief(header["package"]).strip("'\"")
    if type(version) is not int or version not in READABLE:
        raise _Foreign(
            f"has format version {checks.brief(version)}, and this package reads {' and '.join(map(str, READABLE))}; install "
            f"the coupled_gmm that wrote it ({package}) or a newer one"
        )
    if version > 1 and header.pop("checksum", None) != _digest(_text(header)):
        raise archive.Damaged("its header has another checksum")
    return header


def _arrays(members: archive.Archive, header: dict[str, Any]) -> dict[str, np.ndarray]:
    """All arrays, as they were saved: of the first format none has a checksum."""
    names = members.names - {_HEADER}
    digests = header.get("arrays", dict.fromkeys(names))
    if not isinstance(digests, dict) or digests.keys() != names:
        raise archive.Damaged("the header and the arrays disagree")
    arrays = {name: members[name] for name in names}
    for name, array in arrays.items():
        if digests[name] not in (None, _digest(array)):
            raise archive.Damaged(f"array {name} has another checksum")
    return arrays


def _text(header: dict[str, Any]) -> np.ndarray:
    return np.array(json.dumps(header))


def _digest(array: np.ndarray) -> str:
    """A checksum of an array's type, shape and numbers."""
    kind = f"{array.dtype.str} {array.shape}"
    return f"{kind} {hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()}"


def _encode(value: Any, where: str, depth: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A JSON node for `value`; its arrays are collected by name."""
    if depth > _DEEPEST:
        raise ArgumentError("tree", f"is nested in more than {_DEEPEST} lists, tuples and dicts", "save its parts")
    if value is None or type(value) in (bool, int, float, str):
        return {"value": _plain(value, where)}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        name = f"a{len(arrays)}"
        arrays[name] = _plain_array(value, where)
        return {"array": name, "jax": isinstance(value, jax.Array)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(v, f"{where}[{i}]", depth + 1, arrays) for i, v in enumerate(value)]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encode(v, f"{where}[{key!r}]", depth + 1, arrays) for key, v in value.items()}}
    cls = saved_class(type(value).__name__)
    if cls is not None and cls is type(value):
        names = [field.name for field in dataclasses.fields(cls)]
        fields = {name: _encode(getattr(value, name), f"{where}.{name}", depth + 1, arrays) for name in names}
        return {"class": cls.__name__, "fields": fields}
    raise ArgumentTypeError(
        where,
        f"can't save a {type(value).__name__}",
        "save results of this package, arrays, numbers, strings, and lists, tuples and dicts (with string keys) of these",
    )


def _plain(value: Any, where: str) -> Any:
    if type(value) is int and value.bit_length() > _LARGEST_INTEGER:
        raise ArgumentError(where, f"can't save an integer of more than {_LARGEST_INTEGER} bits", "save it as a string")
    return value


def _plain_array(value: Any, where: str) -> np.ndarray:
    """An array as NumPy has it; of a kind that a .npz holds without pickle, and comes back as."""
    if not checks.known(value):
        raise ArgumentTypeError(where, "can't save a value under jit or vmap", "return it, and save it outside")
    if isinstance(value, np.ma.MaskedArray):
        raise ArgumentTypeError(where, "can't save a masked array", "save its data and its mask")
    if getattr(value.dtype, "kind", "V") not in "fiubc":
        raise ArgumentTypeError(
            where, f"can't save an array of dtype {value.dtype}", "convert it to a NumPy dtype first"
        )
    return np.array(value, order="C")


def _decode(node: Any, arrays: dict[str, np.ndarray], depth: int) -> Any:
    """The value of a JSON node, from the arrays, each of which is taken once."""
    if depth > _DEEPEST:
        raise ValueError(f"is nested in more than {_DEEPEST} lists, tuples and dicts; save its parts")
    match node:
        case {"value": None | bool() | int() | float() | str() as value}:
            return value
        case {"array": str(name), **rest}:
            if name not in arrays:
                raise ValueError(f"the header and the arrays disagree ({checks.brief(name)}); save it again")
            return _on_device(arrays.pop(name)) if rest.get("jax") is True else arrays.pop(name)
        case {"list": list(items)}:
            return [_decode(item, arrays, depth + 1) for item in items]
        case {"tuple": list(items)}:
            return tuple(_decode(item, arrays, depth + 1) for item in items)
        case {"dict": dict(items)}:
            return {key: _decode(item, arrays, depth + 1) for key, item in items.items()}
        case {"class": str(name), "fields": dict(fields)}:
            return _build(name, {key: _decode(field, arrays, depth + 1) for key, field in fields.items()})
    raise ValueError("the header holds a node that this package does not know; install a newer coupled_gmm")


def _on_device(array: np.ndarray) -> jax.Array:
    """In JAX's precision, where that holds every value."""
    try:
        dtype = jax.dtypes.canonicalize_dtype(array.dtype.newbyteorder("="))
    except TypeError as error:
        raise ValueError(f"holds a JAX array of {array.dtype}, which JAX has none of; save it again") from error
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    lost = cast != array if array.dtype.kind in "iu" else np.isinf(cast) & np.isfinite(array)
    if np.any(lost):
        raise ValueError(f"holds values of {array.dtype} that {dtype} can't; enable float64 to load it")
    return jnp.asarray(cast)


def _build(name: str, fields: dict[str, Any]) -> Any:
    cls = saved_class(name)
    if cls is None:
        what = checks.brief(name)
        raise ValueError(f"holds a {what}, which is no class of this package; install the coupled_gmm that wrote it")
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    optional = {name for name, default in defaults.items() if default is not dataclasses.MISSING}  # since an older file
    wrong = (set(defaults) ^ set(fields)) - (optional - set(fields))
    if wrong:
        wrong = ", ".join(checks.brief(field).strip("'\"") for field in sorted(wrong)[:5])
        raise ValueError(f"its {name} differs from this package's in {wrong}; install the coupled_gmm that wrote it")
    return unchecked(cls, **{name: defaults[name] for name in optional} | fields)
