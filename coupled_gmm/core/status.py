"""What every solver returns beside its value: a status whose text names the remedy."""

import enum
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


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
    MEAN_NOT_CONVERGED = 10
    LOST = 11
    COMPOSED = 12

    @property
    def message(self) -> str:
        return _MESSAGES[self]

    @property
    def words(self) -> str:
        """Such as "not converged"."""
        return self.name.lower().replace("_", " ")


_MESSAGES = {
    Status.CONVERGED: "converged: the tolerance was met",
    Status.STEPS_DONE: "all steps were done; no tolerance was asked for (tol = 0)",
    Status.NOT_CONVERGED: "the steps ran out before the tolerance was met: allow more steps, or a larger tol",
    Status.PRECISION: (
        "stopped at what this precision can reach, above the tolerance: in float32, enable float64 "
        "(jax.config.update('jax_enable_x64', True)); in float64, raise epsilon or tol"
    ),
    Status.NOT_FINITE: (
        "a value was not finite: raise ridge, lower the learning rate, or check the start for singular covariances"
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
    Status.MEAN_NOT_CONVERGED: (
        "a mean of covariances had not settled after 100 steps, since they are so thin, in different directions: add a small "
        "multiple of the identity to them"
    ),
    Status.COMPOSED: "composed of the plans along a path: a coupling of its ends, and not the optimal one",
    Status.LOST: "the executor lost it, so that nothing was fitted (reasons says why): run the batch again, or fit it by itself",
}
# From the least to the worst; the numbers, which files hold, say nothing of that. After the ends that are none of a failure come
# those with a result that is usable but not as good as asked for, then those whose result is wrong in part, then those with none.
SEVERITY = (
    Status.CONVERGED,
    Status.STEPS_DONE,
    Status.COMPOSED,
    Status.NOT_CONVERGED,
    Status.STALLED,
    Status.PRECISION,
    Status.MEAN_NOT_CONVERGED,
    Status.STARVED,
    Status.COLLAPSED,
    Status.PLAN_NOT_CONVERGED,
    Status.SINGULAR,
    Status.NOT_FINITE,
    Status.LOST,
)
# Ends with a result that may be read, if not one as good as asked for.
USABLE = (Status.CONVERGED, Status.STEPS_DONE, Status.NOT_CONVERGED, Status.STALLED, Status.PRECISION)
# A solver that reads its end asks from the worst to the least, so that what spoils a number comes before what that number says: a
# plan that missed its marginals is named before the fall of an objective that it may have caused. Only whether the tolerance was
# met is asked before whether the steps ran out, and of a plan before whether it stopped at its precision.
FAILURES = frozenset(Status) - {Status.CONVERGED, Status.STEPS_DONE, Status.COMPOSED}
Remedies = Mapping[Status, str]


class Outcome:
    """What a status says, shared by every result; the class that inherits has a field ``status``."""

    status: jax.Array
    _remedies = MappingProxyType({})  # messages of this class, where the general ones name what it has not

    @property
    def converged(self) -> jax.Array:
        """Whether a tolerance that was asked for was met."""
        return self.status == Status.CONVERGED

    @property
    def status_name(self) -> str:
        """The status in a word or two; of a batch, how many ended in each way, the worst first."""
        return status_name(self.status)

    @property
    def message(self) -> str:
        """The status in words, with the remedy; for a batch the worst one, and how many ended in each way.

        Of a fit also what became of the plans that it ended with, where their solver stopped short, and what else is to be known.
        """
        said = message(self.status, self._remedies)
        plans = self._plans()
        if plans is not None and np.any(np.asarray(plans.status) != Status.CONVERGED):
            said = f"{said}; and the plan that it ended with: {plans.message}"
        warnings = "; ".join(self._warnings())
        return f"{said}; but {warnings}" if warnings else said

    def raise_if_failed(self) -> None:
        """Raise `FitError` with the remedy unless the work was done (and converged, where that was asked)."""
        if failed(self.status):
            raise FitError(self.message)

    def summary(self) -> str:
        """A few lines for people: sizes, numbers, and how it ended."""
        name, _, words = repr(self)[:-1].partition("(")
        facts = {**self._facts(), "status": self.message}
        return "\n".join([f"{name}: {words}", *(f"  {fact}: {said}" for fact, said in facts.items() if said)])

    def _facts(self) -> dict[str, str]:
        """Names and numbers that `summary` tells beside the words of `repr`."""
        return {}

    def _warnings(self) -> list[str]:
        """What else `message` says, of a result that is what was asked for and may mislead."""
        return []

    def _plans(self) -> "Outcome | None":
        """The plans that a fit ended with."""
        return None

    def _ended(self) -> list[str]:
        """The status for `repr`; nothing where it can't be read."""
        return [] if isinstance(self.status, Tracer) else [self.status_name]


def first_status(cases: Sequence[tuple[jax.Array, Any]], otherwise: Any) -> jax.Array:
    """The status of the first of (condition, status) that holds, inside programs; `otherwise` where none does."""
    status = otherwise
    for condition, end in reversed(cases):
        status = jnp.where(condition, end, status)
    return status


def failed(status: Any) -> bool:
    """Whether a status, or one of a batch, is a failure."""
    return bool(np.isin(np.asarray(status), list(FAILURES)).any())


def raise_if_failed(status: Any, remedies: Remedies | None = None) -> None:
    """Raise `FitError` with the remedy where a status, or one of a batch, is a failure."""
    if failed(status):
        raise FitError(message(status, remedies or {}))


def worst(status: Any) -> Status:
    """The worst status of a batch, by `SEVERITY`."""
    return max(_counted(status), key=SEVERITY.index)


def status_name(status: Any) -> str:
    """A status in a word or two; of a batch, how many ended in each way, the worst first."""
    counts = _counted(status)
    if np.ndim(status) == 0:
        return next(iter(counts)).words
    ends = sorted(counts, key=SEVERITY.index, reverse=True)
    return ", ".join(f"{counts[end]} {end.words}" for end in ends)


def message(status: Any, remedies: Remedies) -> str:
    """A status with its remedy; of a batch the worst one, and how many ended in each way."""
    end = worst(status)
    said = remedies.get(end, end.message)
    alike = np.size(status) == 1 or end is Status.CONVERGED
    return said if alike else f"{said} (of {np.size(status)}: {status_name(status)})"


def _counted(status: Any) -> dict[Status, int]:
    if isinstance(status, Tracer):
        raise TypeError("status: under a transformation it is not known how this ended; read it outside of it")
    values, counts = np.unique(np.asarray(status), return_counts=True)
    if not values.size:
        raise ValueError("status: the batch is empty; nothing was solved")
    return {Status(int(value)): int(count) for value, count in zip(values, counts, strict=True)}
