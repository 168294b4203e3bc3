"""What the host finds out about covariances before a program is compiled: valid ones, singular ones, and how they are rounded."""

import contextlib

import numpy as np

from coupled_gmm.core.errors import ArgumentError


def check_covariances(covariances: np.ndarray, eps: float) -> None:
    """Each entry in units of its own two features: beside a large one, nothing of a small one would be seen."""
    largest = np.maximum(np.abs(covariances).max(axis=(1, 2)), np.finfo(np.float64).tiny)
    variances = np.maximum(np.diagonal(covariances, axis1=1, axis2=2), eps**2 * largest[:, None])
    variances = np.maximum(variances, np.finfo(np.float64).tiny)
    scaled = covariances / np.sqrt(variances)[:, :, None] / np.sqrt(variances)[:, None, :]
    asymmetry = np.abs(scaled - scaled.swapaxes(1, 2)).max(axis=(1, 2))
    if (asymmetry > max(1e-5, 100 * eps)).any():
        k = int(asymmetry.argmax())
        raise ArgumentError(
            "covariances", f"component {k} is not symmetric", "pass (S + S.T) / 2 if the difference is noise"
        )
    lowest = np.linalg.eigvalsh(scaled)[:, 0]
    if (lowest < -10 * covariances.shape[-1] * eps).any():
        k = int(lowest.argmin())
        raise ArgumentError(
            "covariances",
            f"component {k} is indefinite (lowest eigenvalue {lowest[k]:.3g} of its correlations)",
            "clip its negative eigenvalues at zero",
        )


def rounding_errors(covariances: np.ndarray) -> np.ndarray:
    r"""What rounding covariances changes log-densities by: :math:`\frac{u}{2} \sum_{ij} |S^{-1}|_{ij} |S|_{ij}`, u half a unit."""
    unit = 0.25 * np.finfo(covariances.dtype).eps
    covariances = covariances.astype(np.float64)
    deviations = np.sqrt(np.maximum(np.diagonal(covariances, axis1=1, axis2=2), np.finfo(np.float64).tiny))
    scaled = covariances / deviations[:, :, None] / deviations[:, None]
    errors = np.zeros(len(scaled))
    for k, correlations in enumerate(scaled):
        with contextlib.suppress(np.linalg.LinAlgError):
            errors[k] = unit * np.abs(np.linalg.inv(correlations) * correlations).sum()
    return errors


def which_singular(covariances: np.ndarray) -> np.ndarray:
    """Which matrices `matrices.cholesky` finds singular; on the host, where a check compiles nothing."""
    pivots = np.full(covariances.shape[:-1], np.nan)
    for k, covariance in enumerate(covariances.astype(np.float64)):
        try:
            pivots[k] = np.diagonal(np.linalg.cholesky(covariance)) ** 2
        except np.linalg.LinAlgError:
            continue
    floor = 4 * np.finfo(covariances.dtype).eps * np.diagonal(covariances, axis1=1, axis2=2)
    return ~np.all(pivots > floor, axis=-1)
