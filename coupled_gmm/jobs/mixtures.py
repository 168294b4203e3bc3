"""Mixtures that a configuration names: of a file, built in, or by their moments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jax
import numpy as np
from pydantic import AfterValidator, Field, model_validator

from coupled_gmm.core.tree import listed
from coupled_gmm.data import saving
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.jobs.config import NonNegative
from coupled_gmm.jobs.sections import ConfigError, File, Section, at, blame, refuse

_EXAMPLES = {"left": (5, 0, (-3.0, 0.0)), "right": (6, 1, (2.0, 0.0)), "top": (7, 2, (0.0, 4.0))}


class Mixture(Section):
    """A mixture from a file, built in, or by its moments."""

    file: File | None = None  # a mixture, or a fit that ended in one
    example: Literal["left", "right", "top", "middle"] | None = None
    means: list[list[float]] | None = None
    covariances: list[list[list[float]]] | None = None
    weights: list[float] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        moments = {key: getattr(self, key) is not None for key in ("means", "covariances", "weights")}
        ways = [key for key in ("file", "example") if getattr(self, key) is not None]
        ways += [key for key, given in moments.items() if given][:1]
        if not ways:
            raise refuse("missing; name a file, or an example, or give means, covariances and weights", "file")
        if len(ways) > 1:
            raise refuse(f"the mixture has {ways[0]} already; keep one of them", ways[1])
        if ways[0] in moments and not all(moments.values()):
            lacking = next(key for key, given in moments.items() if not given)
            raise refuse("missing; a mixture by its moments has means, covariances and weights", lacking)
        return self


class Member(Mixture):
    """One of several mixtures that pull; coefficients are divided by their sum."""

    coefficient: NonNegative = 1.0


def _counting(members: list[Member]) -> list[Member]:
    if not any(member.coefficient for member in members):
        raise refuse("all coefficients are zero; at least one must be positive")
    return members


Members = Annotated[list[Member], Field(min_length=1), AfterValidator(_counting)]


def read(path: Path, key: str, mixture: Mixture, precision: str) -> GaussianMixture:
    """The mixture that the section `key` of the configuration `path` describes.

    Raises:
      ConfigError: the file is missing or does not hold a mixture, or the moments are not those of a mixture.
    """
    if mixture.file is not None:
        with at(path, f"{key}.file"):
            return _checked(_loaded(mixture.file), precision)
    if mixture.example is not None:
        return _checked(example(mixture.example), precision)
    with blame(path, key, Mixture):
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


def described(gmms: Sequence[GaussianMixture]) -> str:
    """Their sizes, in words."""
    sizes = listed(gmm.n_components for gmm in gmms)
    return f"{sizes} components of {gmms[0].n_features} features, {gmms[0].dtype}"


def example(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moments of POT's example of a barycenter: three random mixtures around a "middle", the start."""
    if name == "middle":
        means, covariances, _ = _random_moments(6, 0, scale=1e-2, variance=1.0)
        return means, covariances, np.full(6, 1 / 6)
    n_components, seed, offset = _EXAMPLES[name]
    means, covariances, weights = _random_moments(n_components, seed, scale=0.5, variance=0.25)
    return means / 2 + offset, covariances, weights


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


def _random_moments(n_components: int, seed: int, scale: float, variance: float) -> tuple[np.ndarray, ...]:
    """Means, covariances P P^T + variance I and weights, of two features; the order of the draws is POT's."""
    draw = np.random.RandomState(seed)
    means = draw.randn(n_components, 2)
    factors = scale * draw.randn(n_components, 2, 2)
    weights = draw.random_sample(n_components)
    return means, factors @ factors.swapaxes(1, 2) + variance * np.eye(2), weights / weights.sum()
