"""What some features say of the others: mixtures given values of a few of their features, many values at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.core import matrices
from coupled_gmm.core.expansions import two_sum
from coupled_gmm.core.programs import program
from coupled_gmm.gaussians.density import log_joint, whitenings


@program("given")
def conditionals(
    moments: tuple[Float[Array, "K d"], Float[Array, "K d d"], Float[Array, " K"], Any],
    values: Float[Array, "m g"],
    centres: Float[Array, "K g"],
    given: tuple[int, ...],
) -> tuple[Float[Array, "m K r"], Float[Array, "m K r r"], Float[Array, "m K"], Any]:
    """Means, covariances, weights and remainders (or None) of the mixtures over the other features, in their order.

    Args:
      moments: means, covariances, weights and remainders of the mixture.
      values: of the features `given`, about any point.
      centres: the components' means there, about the same point.
      given: their indices.
    """
    means, covariances, weights, remainders = moments
    some, rest = np.asarray(given), np.setdiff1d(np.arange(means.shape[1]), given)
    whitening, log_norm, regular = whitenings(covariances[:, some[:, None], some])
    # Of an absent component that is singular there, nothing is learnt.
    whitening = jnp.where(regular[:, None, None], whitening, 0)
    cross = covariances[:, rest[:, None], some] @ matrices.transpose(whitening)
    whitened = jnp.einsum("kij,kjm->kim", whitening, values.T - centres[:, :, None])
    shifts = jnp.moveaxis(jnp.einsum("kij,kjm->kim", cross, whitened), -1, 0)
    moved, lost = two_sum(means[:, rest], shifts)
    posterior = jax.nn.softmax(log_joint(whitened, log_norm, weights), axis=0).T
    within = covariances[:, rest[:, None], rest] - matrices.gram(cross)
    within = jnp.broadcast_to(within, (len(values), *within.shape))
    return moved, within, posterior, None if remainders is None else remainders[:, rest] + lost
