"""Shared by all tests: one compilation cache, two cores, small random problems."""

import gc
import os
import tempfile
from importlib.metadata import version

# Set before JAX is imported, for notebooks' kernels and command lines as well: one compilation cache, and quick compiling.
os.environ.setdefault("JAX_PLATFORMS", "")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "coupled_gmm_test_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Hoisting out of loops copies the program for each loop, again and again: half of the time that compiling a fit takes.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
QUICK += ["--xla_disable_hlo_passes=while-loop-invariant-code-motion"]
# A flag that a version of XLA does not have ends the process, and later ones do not have this one.
QUICK += ["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

import jax
import numpy as np
import pytest

gc.set_threshold(50_000, 20, 20)  # traced programs are millions of objects that stay: looking through them takes time

# A file's tests run in one process, which compiles their programs once; the dearest files begin, so that none is left at the end.
DEAR = ["notebooks", "transport", "cli", "coupled", "plan", "barycenter"]
DEAR += ["flow", "maps", "own_data", "offsets", "graph_fits", "hard"]


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(DEAR)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


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


@pytest.fixture(scope="module")
def client():
    """Of two processes, by Dask."""
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client
