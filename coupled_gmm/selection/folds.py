"""What is held out, and what is fitted without it: points of every cloud, or the whole cloud of a node.

Nothing is copied: points that are held out have weight zero where the others are fitted, and the other way round.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coupled_gmm.core import chunks
from coupled_gmm.core.chunks import Chunks
from coupled_gmm.core.errors import ArgumentError
from coupled_gmm.fits.frame import View


class Split(NamedTuple):
    """Weights in chunks, those of each cloud summing to 1 or all 0."""

    fitted: Float[np.ndarray, "C B"]
    held: Float[np.ndarray, "H C B"]  # parts of what is held out, each scored by itself
    has_cloud: Bool[np.ndarray, " V"]  # where points are fitted
    without: int | None = None  # the node whose cloud is held out


def whole(points: Chunks, view: View, n_held: int) -> Split:
    """Nothing held out."""
    weights = np.asarray(points.weights)
    return Split(weights, np.zeros((n_held, *weights.shape), weights.dtype), _has_cloud(view))


def by_points(points: Chunks, view: View, labels: list[np.ndarray], n_folds: int) -> Iterator[Split]:
    """Each fold of the points of all clouds, held out in turn."""
    weights, label = np.asarray(points.weights), _laid(points, labels)
    for fold in range(n_folds):
        fitted, held = (_normalised(points, np.where(here, weights, 0)) for here in (label != fold, label == fold))
        yield Split(fitted, held[None], _has_cloud(view))


def by_nodes(points: Chunks, view: View, labels: list[np.ndarray], n_folds: int, nodes: list[int]) -> Iterator[Split]:
    """Each of some nodes' clouds, held out in turn, and scored fold by fold."""
    weights, label, owner = np.asarray(points.weights), _laid(points, labels), _owner(points)[:, None]
    for node in nodes:
        parts = [np.where((owner == node) & (label == fold), weights, 0) for fold in range(n_folds)]
        held = np.stack([_normalised(points, part) for part in parts])
        has_cloud = _has_cloud(view)
        has_cloud[node] = False
        yield Split(np.where(owner == node, 0, weights), held, has_cloud, node)


def drawn(key: Array | None, view: View, n_folds: int) -> list[np.ndarray]:
    """The fold of each point, of each cloud: as many points in one as in another, at random or, without a key, in turn.

    Raises:
      ValueError: a cloud has fewer points of positive weight than there are folds.
    """
    labels = []
    for node, (x, w) in enumerate(zip(view.clouds, view.weights, strict=True)):
        if x is None:
            labels.append(np.zeros(0, np.int32))
            continue
        positive = np.arange(len(x)) if w is None else np.flatnonzero(np.asarray(w) > 0)
        if len(positive) < 2 * n_folds:
            raise ArgumentError(
                "folds",
                f"clouds[{node}] has {len(positive)} points of positive weight, and {n_folds} folds need two each",
                "lower folds",
            )
        turn = np.arange(len(positive), dtype=np.int32) % n_folds
        if key is not None:
            draws = chunks.draws(jax.random.fold_in(key, node), len(positive), 1, np.float32)
            turn[np.argsort(draws[:, 0])] = np.arange(len(positive)) % n_folds
        fold = np.full(len(x), -1, np.int32)
        fold[positive] = turn
        labels.append(fold)
    return labels


def interior(edges: Int[np.ndarray, "E 2"], view: View, frozen: np.ndarray) -> list[int]:
    """Nodes that may be held out: with a cloud, not frozen, and between two neighbours."""
    degree = np.bincount(edges.ravel(), minlength=len(view.clouds))
    return [node for node, x in enumerate(view.clouds) if x is not None and degree[node] > 1 and not frozen[node]]


def _has_cloud(view: View) -> Bool[np.ndarray, " V"]:
    return np.array([x is not None for x in view.clouds])


def _owner(points: Chunks) -> Int[np.ndarray, " C"]:
    """Of each chunk its node; past the last, where no chunk is in use."""
    return np.searchsorted(np.asarray(points.ends), np.arange(len(points.weights)), side="right")


def _laid(points: Chunks, labels: list[np.ndarray]) -> Int[np.ndarray, "C B"]:
    laid = np.full(points.weights.shape, -1, np.int32)
    begins = [0, *np.asarray(points.ends)[:-1].tolist()]
    for first, last, label in zip(begins, np.asarray(points.ends).tolist(), labels, strict=True):
        laid[first:last].reshape(-1)[: len(label)] = label
    return laid


def _normalised(points: Chunks, weights: Any) -> Any:
    owner, sums = _owner(points), weights.sum(axis=1, dtype=np.float64)
    totals = np.bincount(owner, sums, len(points.ends) + 1)[owner]
    return (weights / np.where(totals > 0, totals, 1)[:, None]).astype(weights.dtype)
