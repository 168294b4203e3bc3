"""Shared by all tests: one compilation cache, two cores, small random problems."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import numpy as np
import pytest

import coupled_gmm as cg

_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "coupled_gmm_test_cache"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(items):
    """A file's tests run in one process, which compiles their programs once; notebooks have processes of their own."""
    for item in items:
        if item.path.stem != "test_notebooks":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped():
    """Each file leaves its programs behind: some thousands in one process are more memory maps than Linux allows."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """The test runs in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """The test runs in both precisions; the value is the rounding unit."""
    with jax.enable_x64(request.param == "float64"):
        yield float(np.finfo(request.param).eps)


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
