r"""All distances MW2 of a cohort of mixtures.

.. math:: D_{ij} = \min_{P \ge 0, P 1 = a_i, P^T 1 = a_j} \langle P, C_{ij} \rangle

The matrix is filled in `tiles` of one shape, whatever the sizes of the mixtures are, and every value has its plan's certificate.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coupled_gmm.batch import executors, tiles
from coupled_gmm.batch.tiles import Cohort
from coupled_gmm.core import checks, report
from coupled_gmm.core.errors import ArgumentError, reason
from coupled_gmm.core.status import FitError
from coupled_gmm.gaussians.mixture import GaussianMixture, check_features, in_one_space

_ROUND = 32  # what a tile's components are rounded up to


def mw2_matrix(
    gmms: Sequence[GaussianMixture],
    others: Sequence[GaussianMixture] | None = None,
    *,
    progress: Any = False,
    executor: Any = None,
) -> Float[Array, "B Bo"]:
    r"""Squared distances MW2 between all mixtures of a list, or of two lists, exact, in squared data units.

    .. math:: D_{ij} = MW_2^2(p_i, p_j) = \min_{P \ge 0, P 1 = a_i, P^T 1 = a_j} \langle P, C_{ij} \rangle

    Each is what `mw2_squared` gives, with the certificate of its plan. Within one list the matrix is symmetric and its diagonal
    zero. It needs some 30 MB for each core beside the mixtures and the matrix, however many they are. Plans in float32 on a CPU
    are found by POT where it is installed (extra ``pot``), and else in XLA, which takes half as long again.

    Args:
      gmms: B mixtures over the same features, of any numbers of components.
      others: None compares `gmms` with themselves; or B' mixtures over the same features.
      progress: True draws a bar; a callable gets a dict of what is ``done`` and ``of`` how many, in tiles of 512 components a side.
      executor: None is a thread for each core, in this process; or a `concurrent.futures.Executor`, which gets tiles. What it loses
        is done here, with a warning.

    Raises:
      TypeError, ValueError: not mixtures, features that disagree, traced mixtures, an empty list.
      FitError: a plan was not shown to be optimal; names the two mixtures.

    >>> gmms = [cg.GaussianMixture.from_moments([[x]], [[[1.0]]], [1.0]) for x in (0.0, 1.0, 3.0)]
    >>> print(cg.mw2_matrix(gmms).tolist())
    [[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]]
    """
    gmms = in_one_space("gmms", gmms)
    alone = others is None
    found = [] if others is None else in_one_space("others", others)
    for i, gmm in enumerate(found):
        check_features(f"others[{i}]", gmm, " and gmms[0] has", gmms[0].n_features)
    if not checks.known(gmms, found):
        raise ArgumentError("gmms", "are traced", "call it outside of jit, vmap and grad; there map over mw2_squared")
    executors.check(executor)
    cohorts, unit, dtype = _cohorts([gmms] if alone else [gmms, found])
    rows, columns = cohorts[0], cohorts[-1]
    places = [(a, b) for a, b in itertools.product(rows.groups(), columns.groups()) if not alone or a[0] <= b[0]]
    parts = [(rows.part(*a), columns.part(*b)) for a, b in places]
    side = -(-max(len(one.means) for pair in parts for one in pair) // _ROUND) * _ROUND  # one shape for all
    tasks = [(*pair, alone and a == b, side) for pair, (a, b) in zip(parts, places, strict=True)]
    if executor is None and len(tasks) > 1:
        tiles.compile_for(rows, columns, side)
    squares = np.zeros((len(rows.ends), len(columns.ends)), dtype)
    for number, tile in _done(tasks, executor, progress):
        (first, last), (begin, end) = places[number]
        if (wrong := np.argwhere(~np.isfinite(tile))).size:
            i, j = wrong[0] + (first, begin)
            name = "gmms" if alone else "others"
            raise FitError(f"the plan from gmms[{i}] to {name}[{j}] was not shown to be optimal: enable float64")
        squares[first:last, begin:end] = tile
        if alone:
            squares[begin:end, first:last] = tile.T
    with np.errstate(over="ignore"):
        squares = (squares.astype(np.float64) * unit**2).astype(dtype)
    if not np.isfinite(squares).all():
        raise ArgumentError(
            "gmms", f"squared distances leave the range of {dtype}", "change the unit, or enable float64"
        )
    return jax.device_put(squares)


def _done(tasks: list[tuple], executor: Any, progress: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The number and distances of each tile; what an executor loses is done here."""
    with report.counting(progress, len(tasks), "comparing") as advance:
        for number, found in executors.outcomes(tiles.tile, tasks, executor):
            if isinstance(found, BaseException):
                warnings.warn(
                    f"executor: it lost a part of the work, which is done here ({reason(found)})", stacklevel=3
                )
                found = tiles.tile(*tasks[number])
            yield number, found
            advance()


def _cohorts(lists: list[list[GaussianMixture]]) -> tuple[list[Cohort], float, np.dtype]:
    """Lists of mixtures in the same coordinates, by float64; their unit, a power of two; and the precision to work in."""
    read = [[_components(gmm) for gmm in some] for some in lists]
    means, covariances = (np.concatenate([gmm[i] for some in read for gmm in some]) for i in (0, 1))
    centre = means.mean(0)
    size = max(np.abs(means - centre).max(), covariances.max() ** 0.5)
    unit = 2.0 ** np.round(np.log2(size)) if size > 0 else 1.0
    dtype = np.dtype(jnp.result_type(*(gmm.dtype for some in lists for gmm in some)))

    def cohort(some: list[tuple[np.ndarray, ...]]) -> Cohort:
        means, covariances, weights = (np.concatenate(arrays) for arrays in zip(*some, strict=True))
        covariances, weights = (covariances / unit / unit).astype(dtype), weights.astype(dtype)
        return Cohort(
            (means - centre) / unit, covariances, weights, np.cumsum([len(weights) for _, _, weights in some])
        )

    return [cohort(some) for some in read], float(unit), dtype


def _components(gmm: GaussianMixture) -> tuple[np.ndarray, ...]:
    """Means, covariances and weights in float64, without components that have no mass: nothing is carried to or from them."""
    gmm = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gmm)
    means = gmm.means if gmm.remainders is None else gmm.means + gmm.remainders
    return tuple(np.asarray(leaf)[np.asarray(gmm.weights) > 0] for leaf in (means, gmm.covariances, gmm.weights))
