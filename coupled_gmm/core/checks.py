"""Argument checks: each raises before anything is compiled, and says what was wrong, where, and what to do.

Types and shapes are always checked. Values are checked where they are known, that is not under a transformation.
"""

import functools
import reprlib
from typing import Any, NoReturn, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

from coupled_gmm.core import foreign, meshes
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError

MOST_STEPS = 1_000_000  # of any loop: each has a row in a history, and some a mixture in a path
MOST_STARTS = 10_000
MOST_NUMBERS = 2**31 - 1  # in one array: XLA counts them by 32 bits
_MOST_SHOWN = 4  # numbers of an array that a message shows
_LONGEST = 120  # characters of a value in a message


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        digits = int(x.bit_length() * 0.30103) + 1
        return repr(x) if digits < 40 else f"a number of some {digits} digits"


_BRIEF = _Brief()
_BRIEF.maxstring = _BRIEF.maxother = 80
_BRIEF.maxlevel = 3


def brief(value: Any) -> str:
    """A value as a message shows it: on one line, without control characters, and short."""
    if isinstance(value, (jax.Array, np.ndarray)):
        if not known(value) or value.size > _MOST_SHOWN:
            return f"an array of shape {value.shape}"
        value = np.asarray(value).tolist()
    text = _BRIEF.repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def known(*values: Any) -> bool:
    """Whether the values can be read now: no tracer among them."""
    return not any(isinstance(v, Tracer) for v in jax.tree.leaves(values))


def array_module(*values: Any) -> Any:
    """NumPy where the values can be read now, and else `jax.numpy`: few small numbers are quicker there, and compile nothing."""
    return np if known(*values) else jnp


def array(name: str, value: Any, *shape: int | str) -> jax.Array:
    """`value` as a floating JAX array of a shape such as ``("n", 2)``, where words stand for any size above zero."""
    result = _shaped(name, value, *shape)
    dtype = result.dtype if jnp.issubdtype(result.dtype, jnp.floating) else jnp.result_type(float)
    # What is NumPy's is put there, not `jnp.asarray`: that compiles a program for each shape.
    return jax.device_put(representable(name, result, jax.dtypes.canonicalize_dtype(dtype)))


def own_array(name: str, value: Any, *shape: int | str) -> Any:
    """The same in the precision that it was given in: a JAX array as it is, anything else as floats of NumPy."""
    result = _shaped(name, value, *shape)
    if isinstance(result, np.ndarray) and result.dtype.kind != "f":
        return result.astype(np.float64)
    return result if jnp.issubdtype(result.dtype, jnp.floating) else result.astype(jnp.result_type(float))


def _has_explicit_axes(sharding: Any) -> TypeGuard[NamedSharding]:
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


def _refuse_explicit_axes(name: str, where: str, remedy: str) -> NoReturn:
    auto = "make the mesh with axis_types=(jax.sharding.AxisType.Auto,)"
    raise ArgumentError(name, f"is cut over a mesh of explicit axes, {where}", f"{remedy}, or {auto}")


def representable(name: str, value: Any, dtype: Any, whole: bool = True) -> Any:
    """`value` in another precision, none of whose finite numbers becomes infinite there; where it is the whole, not all vanish."""
    with np.errstate(over="ignore"):
        result = value.astype(dtype)
    if isinstance(value, np.ndarray) and value.dtype.itemsize > np.dtype(dtype).itemsize:
        lost = np.isinf(result) & np.isfinite(value)
        if lost.any():
            raise ArgumentError(
                name,
                f"{lost.sum()} of {value.size} values, up to {np.abs(value[lost]).max():.3g}, exceed what "
                f"{np.dtype(dtype)} holds ({np.finfo(dtype).max:.2g})",
                "change the unit, or enable float64",
            )
        if whole and value.any() and not result.any():
            raise ArgumentError(
                name,
                f"all values vanish in {np.dtype(dtype)}, the largest being {np.abs(value).max():.3g}",
                "change the unit, or enable float64",
            )
    return result


def _shaped(name: str, value: Any, *shape: int | str) -> Any:
    """A JAX array, or one of NumPy, of real numbers in this shape."""
    wanted = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
    try:
        result = _ours(name, value) if isinstance(value, jax.Array) else foreign.as_array(name, value)
    except ValueError as error:
        if not str(error).endswith("rows of unequal length"):
            raise
        raise ArgumentError(name, f"expected an array of shape {wanted}, got rows of unequal length") from error
    if getattr(result.dtype, "kind", "V") not in "fiub" and not jnp.issubdtype(result.dtype, jnp.floating):
        raise ArgumentTypeError(name, f"expected real numbers, got dtype {result.dtype}", "convert it to floats first")
    if len(result.shape) != len(shape):
        raise ArgumentError(name, f"expected shape {wanted}, got {result.shape}", f"reshape it to {len(shape)} axes")
    for axis, (size, got) in enumerate(zip(shape, result.shape, strict=True)):
        if isinstance(size, int) and size != got:
            raise ArgumentError(
                name, f"expected shape {wanted}, got {result.shape}", f"axis {axis} must have size {size}"
            )
        if got == 0:
            raise ArgumentError(name, f"expected shape {wanted}, got {result.shape}", f"axis {axis} is empty")
    return result


def _representable_dtype(dtype: Any) -> bool:
    return jax.dtypes.canonicalize_dtype(dtype) == dtype if isinstance(dtype, np.dtype) else True


def _ours(name: str, value: jax.Array) -> jax.Array | np.ndarray:
    """An array of JAX that its present settings let programs take: float64 where that is disabled is NumPy's."""
    if not known(value):
        if _has_explicit_axes(sharding := jax.typeof(value).sharding) and any(sharding.spec):
            _refuse_explicit_axes(name, "inside a transformation", "call this outside of it")
        return value
    if _representable_dtype(value.dtype):
        return _sharded_by_jax(name, value)
    if meshes.is_spread(value):
        held(name, value)
    return np.asarray(value)


def _sharded_by_jax(name: str, value: jax.Array) -> jax.Array:
    """An array in the same pieces on the same devices, of which JAX may choose how results are cut.

    `jax.make_mesh` leaves that to the caller, who can't say it of our own intermediate results.
    """
    sharding = value.sharding
    if not _has_explicit_axes(sharding):
        return value
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        _refuse_explicit_axes(name, "where jax.set_mesh has set one", "call this outside of it")
    mesh = cast(Mesh, sharding.mesh)
    return jax.device_put(value, NamedSharding(Mesh(mesh.devices, mesh.axis_names), sharding.spec))


def finite(name: str, value: Any, remedy: str = "remove or replace them") -> None:
    if known(value):
        # Counted where they lie: on the host by NumPy, without compilation; on an accelerator a copy of a cloud would cost more.
        bad = int((~np.isfinite(np.asarray(value))).sum() if on_host(value) else (~jnp.isfinite(value)).sum())
        if bad:
            raise ArgumentError(name, f"{bad} of {value.size} values are NaN or infinite", remedy)


def on_host(value: Any) -> bool:
    """Whether NumPy sees the array without a copy: not one from an accelerator, nor of pieces from several devices."""
    if not isinstance(value, jax.Array):
        return True
    in_one = len(value.devices()) == 1 or value.is_fully_replicated
    return in_one and all(device.platform == "cpu" for device in value.devices())


def at_hand(*arrays: Any) -> bool:
    """Whether arrays are values on the host, so that NumPy may read them without a copy."""
    return known(*arrays) and all(on_host(leaf) for leaf in jax.tree.leaves(arrays))


def where_it_lies(value: Any) -> tuple[Any, Any]:
    """An array and the module to read it with: the host's memory by NumPy, that of devices by JAX, without a copy."""
    return (np.asarray(value), np) if on_host(value) else (value, jnp)


def points(name: str, value: Any, n_features: int | None = None) -> Any:
    """A cloud (n, d) of finite coordinates, in the precision that it was given in."""
    x = own_array(name, value, "n", "d" if n_features is None else n_features)
    finite(name, x, "remove those points, or give them finite coordinates and point weight 0")
    return x


def weights(name: str, value: Any, size: int) -> jax.Array:
    """Non-negative weights (size,) that are not all zero; not normalised."""
    return _in_working_precision(own_weights(name, value, size))


def relative_weights(name: str, value: Any, size: int) -> Any:
    """The same as parts of the largest, so that their own size, 1e37 or 1e-41, costs no precision; on the host by NumPy."""
    w = own_weights(name, value, size)
    if at_hand(w):
        w = np.asarray(w, np.float64)
        return w / w.max()
    return _in_working_precision(w / w.max())


def own_weights(name: str, value: Any, size: int) -> Any:
    w = own_array(name, value, size)
    finite(name, w)
    if known(w):
        values, _ = where_it_lies(w)
        if (values < 0).any():
            raise ArgumentError(name, f"{(values < 0).sum()} weights are negative", "weights must be at least 0")
        if not values.any():
            raise ArgumentError(name, "all weights are zero", "at least one must be positive")
    return w


def _in_working_precision(value: Any) -> jax.Array:
    with np.errstate(over="ignore"):
        result = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
    return result if isinstance(result, jax.Array) else jax.device_put(result)


def scalar(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    infinite: bool = False,
    batched: bool = False,
) -> jax.Array:
    """A real number, with its bounds in the message; ``batched`` lets an array of such numbers through."""
    if value is None or isinstance(value, (str, bytes, bool)):
        raise ArgumentTypeError(name, f"expected a real number, got {brief(value)}")
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiu":
        value = foreign.native_floats(name, np.asarray(value))
    try:
        value = float(value) if type(value) is int else value
        number = np.asarray(value) if isinstance(value, (float, np.ndarray)) else jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentTypeError(name, f"expected a real number, got {brief(value)}") from error
    if number.dtype.kind not in "fiu" or (number.ndim and not batched):
        raise ArgumentTypeError(name, f"expected one real number, got {type(value).__name__} of shape {number.shape}")
    with np.errstate(over="ignore"):
        number = jax.device_put(number.astype(jnp.result_type(float)))
    if known(value):  # the value as given: under jit even a constant becomes a tracer once it is converted
        host = np.asarray(value, np.float64)
        bounds = [] if infinite or at_most is not None else ["finite"]
        bounds += [f"above {above:g}"] if above is not None else []
        bounds += [f"at least {at_least:g}"] if at_least is not None else []
        bounds += [f"at most {at_most:g}"] if at_most is not None else []
        valid = ~np.isnan(host) & (infinite | np.isfinite(host))
        valid &= above is None or host > above
        valid &= at_least is None or host >= at_least
        valid &= at_most is None or host <= at_most
        if not np.all(valid):
            wrong = f"{host[~valid][0]:g} and the like in {(~valid).sum()} of {host.size} places"
            got = brief(value) if host.size <= _MOST_SHOWN else wrong
            raise ArgumentError(name, f"must be {' and '.join(bounds) or 'a number'}, got {got}")
        _check_range(name, host, number.dtype, above)
    return number


def _check_range(name: str, host: np.ndarray, dtype: Any, above: float | None) -> None:
    """Refuse numbers that are infinite in the working precision, or zero there where they must be above it."""
    with np.errstate(over="ignore"):
        result = host.astype(dtype)
    lost = np.isinf(result) & np.isfinite(host)
    if above == 0:
        lost |= result < np.finfo(dtype).tiny
    if np.any(lost):
        first = host[lost].ravel()[0]
        raise ArgumentError(name, f"{first:g} is out of the range of {dtype}", "change the unit, or enable float64")


def one_or_two(name: str, value: Any, **bounds: Any) -> jax.Array:
    """A number for both sides of a pair, or two: one for each."""
    if isinstance(value, (tuple, list)) and not known(*value):
        value = jnp.stack([jnp.asarray(each) for each in value]) if len(value) else jnp.zeros(0)
    number = scalar(name, value, batched=True, **bounds)
    if number.shape not in ((), (2,)):
        raise ArgumentError(
            name,
            f"expected one number, or two (gmm0's side, gmm1's side), got shape {number.shape}",
            "for many problems at once map over them with jax.vmap",
        )
    return number


def integer(name: str, value: Any, at_least: int, at_most: int = MOST_NUMBERS) -> int:
    """A Python integer: sizes and step counts are static, and numbers of 32 bits in programs."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentTypeError(name, f"expected an integer, got {brief(value)}")
    if value < at_least:
        raise ArgumentError(name, f"must be at least {at_least}, got {brief(int(value))}")
    if value > at_most:
        raise ArgumentError(name, f"must be at most {at_most}, got {brief(int(value))}")
    return int(value)


def key(name: str, value: Any) -> jax.Array:
    """One random key of JAX, of the typed kind or the raw one."""
    typed = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    raw = isinstance(value, (jax.Array, np.ndarray)) and value.dtype == np.uint32
    if not typed and not raw:
        raise ArgumentTypeError(
            name, f"expected a random key, got {type(value).__name__}", "pass jax.random.key(0), say"
        )
    if value.ndim != (0 if typed else 1):
        raise ArgumentError(name, f"expected one random key, got an array of shape {value.shape}", "pass one of them")
    return jnp.asarray(value)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def value_only(x: Any, message: str) -> Any:
    """`x` itself, that raises TypeError with `message` where it is differentiated: better than a wrong derivative."""
    del message
    return x


@value_only.defjvp
def _refuse(message: str, primals: Any, tangents: Any) -> Any:
    raise TypeError(message)


def sequence(name: str, value: Any) -> list:
    if not isinstance(value, (tuple, list, np.ndarray)):
        raise ArgumentTypeError(name, f"expected a list, got {type(value).__name__}", "put it in one")
    return list(value)


def instance(name: str, value: Any, cls: type, *, computes: bool = True) -> None:
    """One of a class, not a stack of them; whoever computes with it needs its precision."""
    if not isinstance(value, cls):
        raise ArgumentTypeError(name, f"expected a {cls.__name__}, got {type(value).__name__}")
    if computes:
        held(name, value)
    shape = getattr(value, "batch_shape", ())
    if shape:
        raise ArgumentError(
            name,
            f"holds several, stacked in shape {shape}",
            f"take one of them, {name}[i], or map over them with jax.vmap",
        )


def held(name: str, value: Any) -> None:
    """Refuse a tree of float64 numbers where JAX has float64 disabled: programs would mix precisions."""
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.Array) and not _representable_dtype(leaf.dtype):
            raise ArgumentError(
                name,
                "was made in float64, which JAX has disabled here",
                "enable it (jax.enable_x64), or cast: jax.tree.map(lambda leaf: leaf.astype('float32'), ...)",
            )


def choice(name: str, value: Any, options: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ArgumentError(name, f"expected one of {', '.join(map(repr, options))}, got {brief(value)}")
    return value


def is_built_optimizer(name: str, value: Any) -> bool:
    """Whether an optimiser is a built optax transformation; otherwise it must be None or a factory of one."""
    built = isinstance(value, optax.GradientTransformation)
    if value is not None and not built and not callable(value):
        expected = "None, an optax factory such as optax.adam, or a built optax transformation"
        raise ArgumentTypeError(name, f"expected {expected}, got {type(value).__name__}")
    return built
