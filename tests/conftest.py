"""Shared by all tests: one compilation cache, two cores, small random problems."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import numpy as np
import pytest

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
