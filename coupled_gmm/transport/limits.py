"""What solvers of plans are allowed, and what is asked of their answers: iterations, tolerances, sizes."""

from typing import Any

import jax.numpy as jnp

MAX_ITERATIONS = {"entropic": 500, "sinkhorn": 20_000, "exact": 100_000}  # of a plan; exact plans: pivots
MAX_ITERATIONS_IN_FITS = 200  # of an entropic plan in an M-step, which starts from that of the step before
MAX_SIZE_IN_XLA = 64  # components of the larger side up to which exact plans are solved inside XLA
MAX_MARGINAL_ERROR = 1e-3  # L1, absolute (masses sum to 1): a plan with more is none, and no ground for a step
MAX_MW2_MARGINAL_ERROR = 1e-4  # the same, of the plan whose cost is returned as a distance


def value_tolerance(dtype: Any) -> float:
    """Marginal error asked of a plan whose <P, C> is the answer: an error of the same order, as far as the precision goes."""
    return 1e-10 if dtype == jnp.float64 else 1e-6


def barycenter_tolerance(dtype: Any) -> float:
    """Marginal error asked of a barycenter's plans, whose dual value is the objective."""
    return 1e-10 if dtype == jnp.float64 else 1e-5


def fit_tolerance(dtype: Any) -> float:
    """Marginal error asked of the plans in a fit: the error of a cost is of second order in it."""
    return float(jnp.finfo(dtype).eps) ** 0.6
