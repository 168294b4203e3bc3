"""The one idiom for classes: frozen dataclasses that JAX sees as pytrees.

`jax.tree_util.register_dataclass` calls ``__init__`` when it rebuilds an instance, and with it every check that a
constructor makes. Transformations rebuild instances around tracers, batched arrays and bare placeholders, which no check
should see, so `pytree` registers an unflatten that bypasses the constructor. Checks live in public constructors only.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

if TYPE_CHECKING:  # would let through only what both kinds can do
    AnyArray = jax.Array
else:
    AnyArray = jax.Array | np.ndarray  # NumPy's on their way to a program
_LONGEST = 60  # characters that a field may take
T = TypeVar("T")
_saved: dict[str, type] = {}


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree's structure: Python branches on it, and its change recompiles."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def unchecked(cls: type[T], **fields: Any) -> T:
    """An instance with these fields and no check: what transformations, and code inside the package, build with."""
    self = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(self, name, value)
    return self


def rebuilt(tree: T, **fields: Any) -> T:
    """The same tree with other fields, unchecked: they may be NumPy's, on their way to a program."""
    given = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}  # pyright: ignore[reportArgumentType]
    return unchecked(type(tree), **given | fields)


def take(tree: T, index: Any) -> T:
    """Rows of a tree whose leaves are stacked on a leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


_row = jax.jit(take)  # one program for all rows of all leaves


def chosen(condition: Any, one: T, other: T) -> T:
    """One of two trees of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


class Stackable:
    """`x[i]`, `len(x)` and iteration for trees whose leaves may be stacked on leading axes: a batch, a path, a graph's edges."""

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Of the leading axes: () for a single one."""
        raise NotImplementedError

    def _stacked(self) -> list[str]:
        """How many there are, for `repr`; nothing for a single one."""
        shape = self.batch_shape
        return [f"{' x '.join(map(str, shape))} stacked"] if shape else []

    def __len__(self) -> int:
        return self._stack("len()")[0]

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: Any) -> Self:
        size = self._stack("[i]")[0]
        if not isinstance(index, slice):
            index = operator.index(index)
            if not -size <= index < size:
                raise IndexError(f"{type(self).__name__}: there are {size} in the stack, and no number {index}")
            return _row(self, index % size)
        return take(self, index)

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(self._stack("iteration")[0]))

    def _stack(self, what: str) -> tuple[int, ...]:
        if not self.batch_shape:
            raise TypeError(
                f"{type(self).__name__}: {what} is for those stacked on a leading axis, and this is a single one"
            )
        return self.batch_shape


F = TypeVar("F", bound=Callable)


def mapped(method: F) -> F:
    """A method of one, which maps over those of a stack."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any) -> Any:
        if not self.batch_shape:
            return method(self, *args)
        return jax.vmap(lambda one: wrapped(one, *args))(self)

    return cast(F, wrapped)


def single(method: F) -> F:
    """A method of one, which refuses a stack by name."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.batch_shape:
            raise ValueError(
                f"{method.__name__}: this {type(self).__name__} holds several, stacked in shape {self.batch_shape}; take one of "
                "them by [i], or map over them with jax.vmap"
            )
        return method(self, *args, **kwargs)

    return cast(F, wrapped)


def _repr(self: Any) -> str:
    """What a class says of itself in `_words`; or else each field, arrays by their shapes."""
    words: Callable[[], list[str]] = getattr(self, "_words", list)
    try:
        said = words()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        said = []  # transformations put tracers, placeholders and None into trees, and arrays may have been given up
    said = said or [f"{f.name}={shown(getattr(self, f.name, None))}" for f in dataclasses.fields(self)]
    return f"{type(self).__name__}({', '.join(said)})"


def shown(value: Any) -> str:
    """A value in a few words: a number as such, an array by its type and shape."""
    if isinstance(value, (list, tuple)):
        return f"{len(value)} of {type(value[0]).__name__}" if value else "none"
    if value is None or isinstance(value, (bool, int, float, str)) or dataclasses.is_dataclass(value):
        said = repr(value)
        return said if len(said) < _LONGEST else said[:_LONGEST] + "..."
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not isinstance(shape, tuple) or dtype is None:
        return type(value).__name__
    if shape == () and (said := number(value)):
        return said
    return f"{dtype}[{','.join(map(str, shape))}]"


def number(value: Any) -> str:
    """A number to six digits; of several the least and the largest; "" where they can't be read."""
    given_up = isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.is_deleted()
    if value is None or given_up or not isinstance(value, (np.ndarray, np.generic, jax.Array, int, float)):
        return ""
    if isinstance(value, Tracer):
        return ""
    host = np.asarray(value)
    if host.size == 0 or host.dtype.kind not in "fiub":
        return ""
    if host.size == 1:
        return f"{host.item():.6g}"
    finite = host[np.isfinite(host)]
    return f"{finite.min():.6g} to {finite.max():.6g}" if finite.size else "nan"


def counted(value: Any, noun: str) -> list[str]:
    """Such as "1 step" or "12 steps", for what can be read."""
    said = number(value)
    return [f"{said} {noun}{'' if said == '1' else 's'}"] if said else []


def listed(values: Any) -> str:
    """Such as "3, 4 and 5"."""
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a pytree whose leaves are its fields, save those marked `static`."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    if cls.__repr__ is object.__repr__:
        cls.__repr__ = _repr  # pyright: ignore[reportAttributeAccessIssue]
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    leaves = tuple(f.name for f in fields if not f.metadata.get("static"))
    statics = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten_with_keys(self: Any):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in leaves)
        return children, tuple(getattr(self, name) for name in statics)

    def flatten(self: Any):
        return tuple(getattr(self, name) for name in leaves), tuple(getattr(self, name) for name in statics)

    def unflatten(aux: Any, children: Any) -> T:
        return unchecked(cls, **dict(zip(leaves, children, strict=True)), **dict(zip(statics, aux, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def saved(cls: type[T]) -> type[T]:
    """Let files hold instances of `cls`, under its name alone: it may move between modules, and two can't share one."""
    assert cls.__name__ not in _saved, f"files hold another {cls.__name__}"
    _saved[cls.__name__] = cls
    return cls


def saved_class(name: str) -> type | None:
    """The class that files call so."""
    return _saved.get(name)
