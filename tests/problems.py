"""Shared by tests: where the data are, small random problems, and what a compiled program calls."""

import pkgutil
from pathlib import Path

import jax
import numpy as np

import coupled_gmm as cg

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"


def module_names() -> list[str]:
    """All modules of the package, whether they were imported or not."""
    return sorted(info.name for info in pkgutil.walk_packages(cg.__path__, "coupled_gmm."))


def random_covariances(rng: np.random.RandomState, n: int, d: int, condition: float = 100.0) -> np.ndarray:
    """Random covariances (n, d, d) of trace d whose eigenvalues spread over the condition number."""
    frames = np.linalg.qr(rng.randn(n, d, d))[0]
    values = condition ** -rng.rand(n, d)
    values[:, 0], values[:, -1] = 1.0, (1.0 if d == 1 else 1.0 / condition)
    values *= d / values.sum(1, keepdims=True)
    return np.einsum("nij,nj,nkj->nik", frames, values, frames)


def random_mixture(seed: int, n_components: int, n_features: int, shift: float = 0.0, condition: float = 100.0):
    rng = np.random.RandomState(seed)
    means = 2 * rng.randn(n_components, n_features) + shift
    weights = rng.dirichlet(np.full(n_components, 2.0))
    return cg.GaussianMixture.from_moments(means, random_covariances(rng, n_components, n_features, condition), weights)


def points(gmm: cg.GaussianMixture, n: int, seed: int = 0) -> np.ndarray:
    """Points (n, d) of a mixture, drawn by NumPy: nothing is compiled for them."""
    rng = np.random.RandomState(seed)
    means, covariances, weights = (np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights))
    labels = rng.choice(len(weights), n, p=weights / weights.sum())
    return means[labels] + np.einsum(
        "nij,nj->ni", np.linalg.cholesky(covariances)[labels], rng.randn(n, means.shape[1])
    )


KINDS = ("regular", "absent", "singular source", "singular target", "absent and singular")


def random_moments(seed, k0, k1, d, kind):
    """Means, covariances and weights of two mixtures, some of them without mass or of any lower rank."""
    rng = np.random.RandomState(seed)
    ends = []
    for side, k in enumerate((k0, k1)):
        means, covariances = 2 * rng.randn(k, d), random_covariances(rng, k, d)
        weights = rng.dirichlet(np.full(k, 2.0))
        if kind.startswith("absent"):
            weights[rng.permutation(k)[: k // 3]] = 0
            weights /= weights.sum()
        if kind == ("singular source", "singular target")[side] or kind == "absent and singular":
            for i in rng.permutation(k)[: rng.randint(1, k + 1)]:
                factor = rng.randn(d, rng.randint(d))
                covariances[i] = factor @ factor.T
        ends.append((means, covariances, weights))
    return ends


LAPACK = {
    "cholesky", "cholesky_update", "triangular_solve", "eig", "eigh", "svd", "lu", "lu_pivots_to_permutation", "qr", "geqrf",
    "geqp3", "householder_product", "schur", "hessenberg", "tridiagonal", "tridiagonal_solve", "ffi_call", "custom_call",
    "pure_callback", "io_callback",
}  # fmt: skip


def primitives(jaxpr):
    """Names of all primitives in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def names_in(function, *args):
    return set(primitives(jax.make_jaxpr(function)(*args).jaxpr))
