r"""Plans along a path, composed into one between its ends.

Of plans :math:`P_{01}, P_{12}, \dots` whose inner mixtures agree, with c the masses that enter a mixture,

.. math:: P_{02} = P_{01} \, diag(1 / c_1) \, P_{12} , \qquad c_1 = P_{01}^T 1 ,

is the law of the first and last component of a Markov chain through all of them. Where the plans' marginals hold, so do its own.
Where masses change, what enters a component goes on as what leaves it: where mass comes from is composed exactly
(:math:`P_{kl} / c_l` multiply as matrices), and so are the factors by which masses change on their way. It is a coupling, and in
general not the optimal one: MW2 geodesics do not pass through the mixtures in between.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from coupled_gmm.core import checks
from coupled_gmm.core.programs import program
from coupled_gmm.core.status import FAILURES, SEVERITY, Status, first_status, worst
from coupled_gmm.core.tree import unchecked
from coupled_gmm.gaussians.bures import bures_cost_matrix
from coupled_gmm.transport.pair import GaussianMixturePair
from coupled_gmm.transport.plan import Plan


def composed(plans: Sequence[Plan]) -> Plan:
    """The plan from the first one's gmm0 to the last one's gmm1; of one plan, that one.

    Its status is the worst of theirs where that is a failure, and else `COMPOSED`: it is optimal for no problem of its own. It has
    no potentials and no bound on what it costs too much: its duality gap is infinite.
    """
    first, last = plans[0], plans[-1]
    if len(plans) == 1:
        return first
    matrix = last.matrix
    for plan in plans[-2::-1]:
        matrix = product(plan.conditionals()[1], matrix)
    ends = first.pair.gmm0, last.pair.gmm1
    pair = unchecked(
        GaussianMixturePair,
        gmm0=ends[0],
        gmm1=ends[1],
        epsilon=last.pair.epsilon,
        rho=jnp.stack([first.pair.rho0, last.pair.rho1]),
        balanced=all(plan.pair.balanced for plan in plans),
    )
    return Plan(
        pair=pair,
        cost=bures_cost_matrix(*ends),
        potentials=None,
        status=_status([plan.status for plan in plans]),
        n_iterations=jnp.zeros((), jnp.int32),
        vertex=matrix,
        gap=jnp.asarray(jnp.inf, matrix.dtype),
    )


def _status(ends: Sequence[Array]) -> Int[Array, ""]:
    """The worst, where that is a failure."""
    if checks.known(ends):
        end = worst(np.stack(ends))
        return jax.device_put(np.int32(end if end in FAILURES else Status.COMPOSED))
    failures = [(jnp.any(jnp.stack(ends) == end), end) for end in reversed(SEVERITY) if end in FAILURES]
    return jnp.asarray(first_status(failures, Status.COMPOSED), jnp.int32)


@program()
def product(one: Float[Array, "*K L"], other: Float[Array, "L *M"]) -> Float[Array, "..."]:
    """In full precision."""
    return one @ other
