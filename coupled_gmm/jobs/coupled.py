"""What coupled fits of pairs and of graphs share: their keys, and the pooled fit that they start from."""

import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import jax
import numpy as np
import optax
from jaxtyping import Array
from pydantic import BeforeValidator, model_validator

import coupled_gmm as cg
from coupled_gmm.core.checks import brief
from coupled_gmm.core.status import Status
from coupled_gmm.jobs.config import Count, NonNegative, Output, Positive, Precision, Seed, Starts, Steps
from coupled_gmm.jobs.sections import Section, refuse
from coupled_gmm.jobs.tables import Sheet

_USABLE = (Status.CONVERGED, Status.STEPS_DONE, Status.NOT_CONVERGED, Status.PRECISION)  # ends of a start
_THE_SAME = (("transport_weight", "relative_weight"), ("epsilon", "relative_epsilon"), ("tau", "rho"))
_THE_SAME += (("tau", "relative_rho"), ("rho", "relative_rho"))
_OPTIONS = ("relative_weight", "em_steps", "m_steps", "learning_rate", "tol", "ridge", "method", "chunk_size")


def _prices(at_most: float) -> BeforeValidator:
    """Above 0: one number, or a list of two, for both ends of an edge."""

    def check(given: Any) -> float | list[float]:
        several = given if isinstance(given, list) else [given]
        if isinstance(given, list) and len(given) != 2:
            raise refuse(f"must be one number or two (of mixture 0 and of mixture 1), got {brief(given)}")
        for one in several:
            number = isinstance(one, (int, float)) and not isinstance(one, bool)
            if not number or (isinstance(one, int) and one > sys.float_info.max):
                raise refuse(f"must be a valid number, got {brief(one)}")
            if not one > 0:
                raise refuse(f"must be greater than 0, got {brief(one)}")
            if one > at_most:
                raise refuse(f"must be less than or equal to {at_most:g}, got {brief(one)}")
        return [float(one) for one in several] if isinstance(given, list) else float(given)

    return BeforeValidator(check)


Tau = Annotated[float | list[float], _prices(1)]
Rho = Annotated[float | list[float], _prices(math.inf)]


class Start(Section):
    """The pooled fit: one mixture for all clouds together, from which the mixtures start."""

    n_components: Count
    seed: Seed = 0
    n_init: Starts = 10
    max_steps: Steps = 100
    tol: NonNegative = 1e-5


class CoupledFit(Section):
    """A coupled fit; the names are those of `fit_pair` and `GaussianMixturePair`."""

    transport_weight: NonNegative | None = None
    relative_weight: NonNegative | None = None
    epsilon: Positive | None = None
    relative_epsilon: Positive | None = None
    tau: Tau | None = None
    rho: Rho | None = None
    relative_rho: Rho | None = None
    em_steps: Steps = 30
    m_steps: Steps = 20
    optimizer: Literal["default", "adam"] = "default"
    learning_rate: Positive | None = None
    tol: NonNegative = 0.0
    ridge: NonNegative = 1e-6
    method: Literal["entropic", "sinkhorn"] = "entropic"
    chunk_size: Count | None = None
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.transport_weight is None and self.relative_weight is None:
            raise refuse(
                "missing; or give transport_weight, which has the unit of one over squared data", "relative_weight"
            )
        for one, other in _THE_SAME:
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise refuse(f"{one} and {other} say the same thing; keep one of them", other)
        if self.optimizer == "default" and self.learning_rate is not None:
            raise refuse("the default optimizer has none; remove it, or set optimizer = 'adam'", "learning_rate")
        if self.optimizer == "adam" and self.learning_rate is None:
            raise refuse("missing; optimizer = 'adam' needs it, for example 1e-3", "learning_rate")
        return self

    def prices(self, sides: tuple[int, ...] = (2,)) -> dict[str, Any]:
        """epsilon and rho as they were given; `sides` is the shape of those that are two."""
        names = ("epsilon", "tau", "rho", "relative_epsilon", "relative_rho")
        given = {name: getattr(self, name) for name in names}
        return {
            name: np.reshape(one, sides) if isinstance(one, list) else one
            for name, one in given.items()
            if one is not None
        }

    def options(self) -> dict[str, Any]:
        """What `fit_pair` and `fit_graph` take by the same names."""
        own = optax.adam if self.optimizer == "adam" else None
        return {name: getattr(self, name) for name in _OPTIONS} | {"optimizer": own}


class FitOutput(Output):
    max_points_drawn: Count = 5000


def pooled_start(
    start: Start,
    n_components: int,
    ridge: float,
    points: Sequence[np.ndarray | Array],
    weights: Sequence[np.ndarray | None],
) -> Any:
    """One mixture fitted to all clouds together, each cloud counting by its number of points.

    Raises:
      FitError: that fit failed. Where its steps ran out, it is a start all the same.
    """
    pooled, point_weights = np.concatenate(points), None
    if any(w is not None for w in weights):
        pairs = zip(points, weights, strict=True)
        point_weights = np.concatenate([np.ones(len(x)) if w is None else w / w.mean() for x, w in pairs])
    shared = {"point_weights": point_weights, "ridge": ridge}
    init = cg.init_gmm(jax.random.key(start.seed), pooled, n_components, n_init=start.n_init, **shared)
    fit = cg.fit_gmm(pooled, init, max_steps=start.max_steps, tol=start.tol, **shared)
    if int(fit.status) not in _USABLE:
        raise cg.FitError(f"its start, one mixture for {_all(len(points))} clouds: {fit.message}")
    return fit


def _all(number: int) -> str:
    return "both" if number == 2 else f"all {number}"


def fidelity_sheet(found: Any, called: Sequence[str]) -> list[Sheet]:
    """What coupling has cost each mixture that has a cloud; of a run of before nobody knows."""
    if found is None:
        return []
    numbers = {
        "log-likelihood": found.log_likelihood,
        "lost to coupling": found.loss,
        "mean off, sd": found.mean_shift,
        "covariance off, sd": found.covariance_shift,
    }
    columns = {"": list(called)}
    columns |= {name: [_number(value) for value in np.asarray(number).tolist()] for name, number in numbers.items()}
    return [Sheet("What coupling has cost, in nats per point, and how far mixtures are from their clouds", columns)]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
