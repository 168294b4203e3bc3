"""What every solver returns beside its value: a status whose text names the remedy."""

import enum

import jax
import numpy as np


class FitError(RuntimeError):
    """A solver ended without a usable result; the message names the remedy."""


class Status(enum.IntEnum):
    """How a solver ended. Stored as an integer array, so that it passes through ``jit`` and ``vmap``."""

    CONVERGED = 0
    STEPS_DONE = 1
    NOT_CONVERGED = 2
    PRECISION = 3
    NOT_FINITE = 4
    PLAN_NOT_CONVERGED = 5
    COLLAPSED = 6
    STALLED = 7
    STARVED = 8
    SINGULAR = 9

    @property
    def message(self) -> str:
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "converged: the tolerance was met",
    Status.STEPS_DONE: "all steps were done; no tolerance was asked for (tol = 0)",
    Status.NOT_CONVERGED: "the steps ran out before the tolerance was met: allow more steps, or a larger tol",
    Status.PRECISION: (
        "stopped at what this precision can reach, above the tolerance: in float32, enable float64 "
        "(jax.config.update('jax_enable_x64', True)); in float64, raise epsilon or tol"
    ),
    Status.NOT_FINITE: (
        "a value was not finite: raise ridge, lower the learning rate or step size, or check the start for singular covariances"
    ),
    Status.PLAN_NOT_CONVERGED: (
        "a transport plan missed its marginals during the fit (history.marginal_error): raise epsilon, or use float64"
    ),
    Status.COLLAPSED: (
        "the objective fell: a component became thinner than this precision resolves; raise ridge, or use float64"
    ),
    Status.STALLED: (
        "stalled: no step raised the objective, though its gradient promises more than the tolerance: go on in float64, start "
        "from a fit at a smaller transport weight, or take small steps (optimizer=optax.adam, learning_rate=1e-2)"
    ),
    Status.STARVED: (
        "a component of the start ended with no points at all, since it lay too far from them: start from "
        "init_gmm(key, x, n_components)"
    ),
    Status.SINGULAR: (
        "a fitted covariance is singular in this precision, so that the mixture has no density: raise ridge, or use float64"
    ),
}
FAILURES = frozenset(Status) - {Status.CONVERGED, Status.STEPS_DONE}


class Outcome:
    """What a status says, shared by every result; the class that inherits has a field ``status``."""

    status: jax.Array

    @property
    def converged(self) -> jax.Array:
        """Whether a tolerance that was asked for was met."""
        return self.status == Status.CONVERGED

    @property
    def message(self) -> str:
        """The status in words, with the remedy; for a batch, the worst one."""
        return _message(self.status)

    def raise_if_failed(self) -> None:
        """Raise `FitError` with the remedy unless the work was done (and converged, where that was asked)."""
        raise_if_failed(self.status)


def raise_if_failed(status: jax.Array) -> None:
    """Raise `FitError` with the remedy where a status, or one of a batch, is a failure."""
    failed = np.isin(np.asarray(status), list(FAILURES))
    if failed.any():
        where = f" (in {failed.sum()} of {failed.size} problems)" if failed.size > 1 else ""
        raise FitError(_message(status) + where)


def _message(status: jax.Array) -> str:
    return Status(int(np.max(np.asarray(status)))).message
