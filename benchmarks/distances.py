"""All distances of a cohort, beside POT's: `python benchmarks/distances.py`, some minutes.

POT's functions take two mixtures at a time; its seconds are those of some pairs, scaled to all of them. The reference of the last
column is its linear programme, at costs that NumPy finds by eigenvalues in float64.
"""

import time

import jax
import numpy as np
import ot

import coupled_gmm as cg

ROW = "| {} | {} | {} | {} | {} | {} | {} |"


def mixtures(n, sizes, d):
    rng = np.random.default_rng(0)

    def one(k):
        factors = 0.5 * rng.normal(size=(k, d, d))
        covariances = factors @ factors.transpose(0, 2, 1) + 0.05 * np.eye(d)
        means = 2 * rng.normal(size=(k, d))
        return cg.GaussianMixture.from_moments(
            means.astype(np.float32), covariances.astype(np.float32), rng.dirichlet(np.ones(k))
        )

    return [one(k) for k in rng.integers(*sizes, endpoint=True, size=n)]


def moments(gmm):
    means, covariances, weights = (np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    return means, covariances, weights / weights.sum()


def reference(one, other):
    """<P, C> of POT's linear programme; the traces of roots are those of eigenvalues of products."""
    (m0, s0, a), (m1, s1, b) = moments(one), moments(other)
    roots = np.sqrt(np.linalg.eigvals(s0[:, None] @ s1).real.clip(0)).sum(-1)
    traces = np.trace(s0, axis1=1, axis2=2)[:, None] + np.trace(s1, axis1=1, axis2=2)
    cost = ((m0[:, None] - m1) ** 2).sum(-1) + traces - 2 * roots
    return ot.emd2(a, b, cost)


def theirs(one, other):
    (m0, s0, a), (m1, s1, b) = moments(one), moments(other)
    return ot.gmm.gmm_ot_loss(m0, m1, s0, s1, a, b)


def seconds(call):
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def compare(n, sizes, d, n_pairs, n_theirs):
    gmms = mixtures(n, sizes, d)
    first, _ = seconds(lambda: jax.block_until_ready(cg.mw2_matrix(gmms)))
    warm, squares = seconds(lambda: np.asarray(cg.mw2_matrix(gmms)))
    rng = np.random.default_rng(1)
    pairs = [rng.choice(n, 2, replace=False) for _ in range(n_pairs)]
    exact = np.array([reference(gmms[i], gmms[j]) for i, j in pairs])
    off = max(abs(squares[i, j] - value) / value for (i, j), value in zip(pairs, exact))
    each, _ = seconds(lambda: [theirs(gmms[i], gmms[j]) for i, j in pairs[:n_theirs]])
    scaled = each / n_theirs * n * (n - 1) / 2
    print(
        ROW.format(
            n,
            f"{sizes[0]} to {sizes[1]}",
            d,
            f"{first:.1f}, {warm:.1f}",
            f"{scaled:.1f}",
            f"{scaled / warm:.1f}",
            f"{off:.0e}",
        )
    )


if __name__ == "__main__":
    print(ROW.format("mixtures", "K", "d", "first, warm, s", "POT, s (scaled)", "times faster", "relative error"))
    compare(200, (3, 30), 8, 500, 100)
    compare(100, (20, 20), 10, 100, 50)
