"""The one idiom for classes: frozen dataclasses that JAX sees as pytrees.

`jax.tree_util.register_dataclass` calls ``__init__`` when it rebuilds an instance, and with it every check that a
constructor makes. Transformations rebuild instances around tracers, batched arrays and bare placeholders, which no check
should see, so `pytree` registers an unflatten that bypasses the constructor. Checks live in public constructors only.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the tree's structure: Python branches on it, and its change recompiles."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def new(cls: type[T], **fields: Any) -> T:
    """An instance with these fields and no check: what transformations, and code inside the package, build with."""
    self = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(self, name, value)
    return self


def taken(tree: T, index: Any) -> T:
    """Rows of a tree whose leaves are stacked on a leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a pytree whose leaves are its fields, save those marked `static`."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    leaves = tuple(f.name for f in fields if not f.metadata.get("static"))
    statics = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten_with_keys(self: Any):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in leaves)
        return children, tuple(getattr(self, name) for name in statics)

    def flatten(self: Any):
        return tuple(getattr(self, name) for name in leaves), tuple(getattr(self, name) for name in statics)

    def unflatten(aux: Any, children: Any) -> T:
        return new(cls, **dict(zip(leaves, children, strict=True)), **dict(zip(statics, aux, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
