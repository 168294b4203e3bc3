"""Mixtures that a configuration names: of a file, built in, or by their moments; and starts drawn from their components."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coupled_gmm.data import saving
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.jobs.config import BarycenterConfig, Mixture
from coupled_gmm.jobs.sections import ConfigError, at, blame

_EXAMPLES = {"left": (5, 0, (-3.0, 0.0)), "right": (6, 1, (2.0, 0.0)), "top": (7, 2, (0.0, 4.0))}


def read(path: Path, key: str, mixture: Mixture, precision: str) -> GaussianMixture:
    """The mixture that the section `key` of the configuration `path` describes.

    Raises:
      ConfigError: the file is missing or holds no mixture, or its moments are none of a mixture.
    """
    if mixture.file is not None:
        with at(path, f"{key}.file"):
            return _checked(_loaded(mixture.file), precision)
    if mixture.example is not None:
        return _checked(example(mixture.example), precision)
    with blame(path, key, Mixture, {}):
        return _checked((mixture.means, mixture.covariances, mixture.weights), precision)


def read_all(path: Path, key: str, mixtures: Sequence[Mixture], precision: str) -> list[GaussianMixture]:
    """The mixtures of a list of sections.

    Raises:
      ConfigError: as `read`, and where their features differ in number.
    """
    gmms = [read(path, f"{key}.{i}", mixture, precision) for i, mixture in enumerate(mixtures)]
    d = gmms[0].n_features
    for i, gmm in enumerate(gmms):
        if gmm.n_features != d:
            both = f"{gmm.n_features} features and {key}.0 has {d}"
            raise ConfigError(f"{path}: {key}.{i}: has {both}; give mixtures over the same features")
    return gmms


def example(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moments of POT's example of a barycenter: three random mixtures around a "middle", the start."""
    if name == "middle":
        means, covariances, _ = _random_moments(6, 0, spread=1e-2, variance=1.0)
        return means, covariances, np.full(6, 1 / 6)
    n_components, seed, offset = _EXAMPLES[name]
    means, covariances, weights = _random_moments(n_components, seed, spread=0.5, variance=0.25)
    return means / 2 + offset, covariances, weights


def drawn(path: Path, config: BarycenterConfig, gmms: Sequence[GaussianMixture]) -> list[GaussianMixture]:
    """Starts of equal weights, each with distinct components of the mixtures, chosen by what these count.

    Raises:
      ConfigError: the mixtures have too few.
    """
    n_components, n_init = config.start.n_components or 0, config.start.n_init or 0
    pulls = zip(config.mixtures, gmms, strict=True)
    mass = np.concatenate([member.coefficient * np.asarray(gmm.weights, np.float64) for member, gmm in pulls])
    if n_components > (available := np.count_nonzero(mass)):
        message = f"{n_components} are more than the mixtures' {available}; ask for fewer"
        raise ConfigError(f"{path}: start.n_components: {message}")
    means, covariances = (np.concatenate([getattr(gmm, name) for gmm in gmms]) for name in ("means", "covariances"))
    draw, weights = np.random.default_rng(config.start.seed), np.full(n_components, 1 / n_components)
    rows = [draw.choice(len(mass), n_components, replace=False, p=mass / mass.sum()) for _ in range(n_init)]
    return [GaussianMixture.from_moments(means[row], covariances[row], weights.astype(means.dtype)) for row in rows]


def _loaded(name: str) -> tuple[Any, Any, Any]:
    """The moments of what a file holds."""
    held = saving.load(name)
    gmm = getattr(held, "gmm", held)
    if not isinstance(gmm, GaussianMixture):
        raise TypeError(f"{name}: holds a {type(held).__name__}; save a GaussianMixture, or a fit that ended in one")
    return gmm.means, gmm.covariances, gmm.weights


def _checked(moments: tuple[Any, Any, Any], precision: str) -> GaussianMixture:
    gmm = GaussianMixture.from_moments(*moments)
    return jax.tree.map(lambda leaf: leaf.astype(precision), gmm)


def _random_moments(n_components: int, seed: int, spread: float, variance: float) -> tuple[np.ndarray, ...]:
    """Means, covariances P P^T + variance I and weights, of two features; the order of the draws is POT's."""
    draw = np.random.RandomState(seed)
    means = draw.randn(n_components, 2)
    factors = spread * draw.randn(n_components, 2, 2)
    weights = draw.random_sample(n_components)
    return means, factors @ factors.swapaxes(1, 2) + variance * np.eye(2), weights / weights.sum()
