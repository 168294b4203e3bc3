"""POT's network simplex, on the host, for what `exact` solves inside XLA: quicker for more than some tens of components.

Links that are forbidden cost more than any cycle of others could save. So large a cost is no loss of precision: where an optimum is
not within rounding, it is looked for again among reduced costs, of which the large ones are cut down.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from coupled_gmm.core import expansions, installation
from coupled_gmm.core.expansions import Expansion
from coupled_gmm.core.host import on_host
from coupled_gmm.transport import exact

_REFINEMENTS = 6  # of an optimum


def solve(
    cost: Float[Array, "K0 K1"],
    a: Float[Array, " K0"],
    b: Float[Array, " K1"],
    max_iterations: int,
    links: Bool[Array, "K0 K1"] | None = None,
) -> exact.Vertex:
    """What `exact.solve` finds, in float64."""
    usable = exact.usable(a, b, links)
    (k0, k1), dtype = cost.shape, cost.dtype
    with installation.needed("pot", "an exact plan of so many components"):
        import ot  # slow to import, and only needed here

    def network_simplex(cost: np.ndarray, a: np.ndarray, b: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, ...]:
        finite, usable = np.isfinite(cost), usable > 0
        price = np.where(finite & usable, cost, 0)
        barred = (a > 0)[:, None] & (b > 0) & ~usable
        price = np.where(
            barred, 2 * sum(price.shape) * np.abs(price).max() + 1, price
        )  # no cycle of cells saves as much
        eps = float(jnp.finfo(dtype).eps)
        matrix, f, g, done = _refined(ot.emd, price, a / a.sum(), b / b.sum(), max_iterations, eps)
        matrix = np.where(barred, 0, matrix)
        return matrix * a.sum(), *_split(f, dtype), *_split(g, dtype), np.asarray(done and finite.all())

    shapes = (cost.shape, *3 * [(k0,)], *3 * [(k1,)], ())
    found = on_host(network_simplex, shapes, cost, a, b, usable.astype(dtype))
    matrix, f0, f1, f2, g0, g1, g2, done = found
    # In the precision of the problem: a callback's numbers pass in it.
    return exact.certified(cost, a, b, usable, matrix, (f0, f1, f2), (g0, g1, g2), jnp.zeros((), jnp.int32), done > 0)


def _refined(emd: Any, price: np.ndarray, a: np.ndarray, b: np.ndarray, max_iterations: int, eps: float) -> tuple:
    """A plan with potentials whose gap is within rounding of its cost.

    POT's tolerances are relative to the largest cost. Where that is too much, the reduced costs become the costs, and those that
    no better plan can pay are cut down to a size at which POT sees the rest (Gleixner, Steffy & Wolter 2016).
    """
    present = (a > 0)[:, None] & (b > 0)
    f, g = (tuple(np.zeros(k) for _ in range(3)) for k in price.shape)
    rest = price
    scale = np.abs(price).max() or 1.0
    least, best = np.inf, None
    for _ in range(_REFINEMENTS):
        matrix, log = emd(a, b, rest / scale, max_iterations, log=True)
        matrix = _without_noise(matrix, exact.NOISE * eps)
        f = expansions.added(f, (scale * log["u"], 0, 0))
        g = expansions.added(g, (scale * log["v"], 0, 0))
        done = log["result_code"] == 1  # ot.lp's code of an optimal solution
        gap, known = exact.gap(price, a, b, present, matrix, f, g, float(np.finfo(float).eps))
        if gap < least or best is None:
            least, best = gap, (matrix, f, g, done)
        if not done or not gap > max(known, eps * np.sum(matrix * np.abs(price))):
            break
        rest = expansions.reduced(price, *exact.crossed(f, g)) * present
        worst = max(-rest.min(), rest[matrix > 0].max())
        scale = 4 * sum(price.shape) * worst  # no cycle of cells can save as much
        rest = np.minimum(rest, scale)
    assert best is not None
    return best


def _without_noise(matrix: np.ndarray, noise: float) -> np.ndarray:
    """Without flows that are rounding of the masses that they join: see `exact`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    k0, k1 = matrix.shape
    small = (matrix > 0) & (matrix <= noise * matrix.sum())
    rows, columns = np.nonzero((matrix > 0) & ~small)
    links = coo_array((np.ones(len(rows)), (rows, k0 + columns)), shape=(k0 + k1, k0 + k1))
    n, block = connected_components(links, directed=False)
    mass = np.zeros(n)
    np.add.at(mass, block, np.r_[matrix.sum(1), matrix.sum(0)])
    rows, columns = np.nonzero(small)
    least = np.minimum(mass[block[rows]], mass[block[k0 + columns]])
    cleaned = matrix.copy()
    cleaned[rows, columns] = np.where(matrix[rows, columns] <= noise * least, 0, matrix[rows, columns])
    return cleaned


def _split(x: Expansion, dtype: Any) -> list[np.ndarray]:
    """An expansion's parts in another precision."""
    high = np.asarray(x[0], dtype).astype(float)
    middle, low = expansions.two_sum((x[0] - high) + x[1], x[2])
    rounded = np.asarray(middle, dtype).astype(float)
    return [high, rounded, (middle - rounded) + low]
