"""The Krylov iteration between edges, against a direct solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coupled_gmm.transport import edges


def system(seed, n=12):
    """A matrix that is no more symmetric than Newton's, what it is preconditioned with, and a right side."""
    rng = np.random.RandomState(seed)
    own = np.diag(1 + rng.rand(n))
    return own + 0.6 * rng.randn(n, n) / np.sqrt(n), np.linalg.inv(own), rng.randn(n)


def solved(matrix, inverse, right):
    return edges._bicgstab(lambda x: matrix @ x, right, inverse @ right, lambda y: inverse @ y)


@pytest.mark.parametrize("seed", range(8))
def test_it_comes_as_near_as_is_asked(x64, seed):
    matrix, inverse, right = map(jnp.asarray, system(seed))
    miss = np.linalg.norm(matrix @ jax.jit(solved)(matrix, inverse, right) - right)
    assert miss <= 1.1 * edges._KRYLOV_TOLERANCE * np.linalg.norm(right)


def test_batches_inside_a_loop(x64):
    """As `jax.scipy`'s can't be: what is solved for goes on from one turn to the next."""
    stacked = [jnp.stack(parts) for parts in zip(*map(system, range(3)))]

    def turns(matrix, inverse, right):
        return jax.lax.fori_loop(0, 3, lambda _, x: solved(matrix, inverse, right + 0.1 * x), jnp.zeros_like(right))

    batched = jax.vmap(turns)(*stacked)
    for i, x in enumerate(batched):
        np.testing.assert_allclose(x, turns(*(part[i] for part in stacked)), rtol=1e-9)


def test_an_exact_start_and_nothing_to_solve(x64):
    matrix, _, right = map(jnp.asarray, system(0))
    inverse = jnp.linalg.inv(matrix)
    np.testing.assert_allclose(solved(matrix, inverse, right), inverse @ right, rtol=1e-9)
    np.testing.assert_array_equal(solved(matrix, inverse, 0 * right), 0)
