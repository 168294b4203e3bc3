"""The host: calls from compiled programs to its libraries, and how many of its cores are ours."""

import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def on_host(
    function: Callable[..., Sequence[np.ndarray]], shapes: Sequence[tuple[int, ...]], *arrays: Array
) -> list[Array]:
    """What a function of NumPy float64 arrays returns, arrays of these shapes, in the precision of the given ones.

    Under vmap the function is called once for each. Numbers pass as 32-bit words: the call may come on a thread that a
    context of ``jax.enable_x64`` does not reach, and there float64 would be cut to float32.
    """
    dtype = np.dtype(arrays[0].dtype)

    def call(*words: np.ndarray) -> list[np.ndarray]:
        given = (np.asarray(word).view(dtype)[..., 0].astype(np.float64) for word in words)
        return [np.asarray(result, dtype)[..., None].view(np.uint32) for result in function(*given)]

    words = [jax.lax.bitcast_convert_type(array, jnp.uint32).reshape(*array.shape, -1) for array in arrays]
    expected = [jax.ShapeDtypeStruct((*shape, dtype.itemsize // 4), jnp.uint32) for shape in shapes]
    found = jax.pure_callback(call, expected, *words, vmap_method="sequential")
    return [jax.lax.bitcast_convert_type(word if dtype.itemsize == 8 else word[..., 0], dtype) for word in found]


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
