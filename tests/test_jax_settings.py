"""The package inside programs that set JAX otherwise, and on arrays that come from elsewhere."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coupled_gmm as cg

X = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)


def mixture(dtype=np.float32):
    return cg.GaussianMixture.from_moments(np.array([[0, 0], [1, 1]], dtype), np.stack([np.eye(2)] * 2), [0.5, 0.5])


def pair(**changes):
    return cg.GaussianMixturePair(mixture(), mixture(), 0.1, **changes)


def fit(x=X, **changes):
    return cg.fit_pair(x, x + 1, pair(tau=0.9), transport_weight=0.1, em_steps=2, m_steps=2, **changes)


def test_a_pair_is_replaced_in_parts():
    given = pair(rho=(1.0, 2.0))
    other = dataclasses.replace(given, epsilon=0.2)
    assert float(other.epsilon) == np.float32(0.2) and not other.balanced
    np.testing.assert_array_equal(other.rho, given.rho)
    assert dataclasses.replace(pair(), epsilon=0.2).balanced
    assert dataclasses.replace(given, rho=np.inf).balanced and not dataclasses.replace(pair(), rho=1.0).balanced
    with pytest.raises(ValueError, match=r"^epsilon: must be finite and above 0, got -1"):
        dataclasses.replace(given, epsilon=-1)
    with pytest.raises(ValueError, match="init=False"):
        dataclasses.replace(given, balanced=True)


@pytest.mark.parametrize("dtype", [">f4", ">f8", np.longdouble, np.float16, ">i4"])
def test_numbers_of_other_machines_are_taken(dtype):
    gmm = mixture(dtype)
    np.testing.assert_array_equal(gmm.means, mixture().means)
    given = cg.GaussianMixturePair(gmm, gmm, np.array(2, dtype), rho=np.array([1, 2], dtype))
    assert (float(given.epsilon), given.rho.tolist()) == (2, [1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [">f4", np.longdouble])
def test_clouds_of_other_machines_are_taken(dtype):
    values = [fit(X.astype(kind), point_weights0=np.ones(60, kind)).penalized_log_likelihood for kind in (dtype, "f4")]
    np.testing.assert_allclose(*values, rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_float64_arrays_are_taken_where_jax_has_none():
    with jax.enable_x64(True):
        means, weights = jnp.asarray([[0.0, 0], [1, 1]]), jnp.asarray([0.5, 0.5])
    gmm = cg.GaussianMixture.from_moments(means, np.stack([np.eye(2)] * 2), weights)
    jax.tree.map(np.testing.assert_array_equal, gmm, mixture())
    assert gmm.dtype == np.float32


def test_float64_objects_are_refused_by_name_where_jax_has_none():
    with jax.enable_x64(True):
        given, gmm = pair(), mixture(np.float64)
    refusal = "was made in float64, which JAX has disabled here; enable it (jax.enable_x64), or cast"
    with pytest.raises(ValueError, match=re.escape(f"pair: {refusal}")):
        cg.solve_plan(given)
    with pytest.raises(ValueError, match=re.escape(f"gmm0: {refusal}")):
        cg.mw2_squared(gmm, gmm)
    cast = jax.tree.map(lambda leaf: leaf.astype("float32"), given)
    np.testing.assert_array_equal(
        cg.bures_cost_matrix(cast.gmm0, cast.gmm1), cg.bures_cost_matrix(mixture(), mixture())
    )


@pytest.mark.slow
def test_plans_are_read_where_promotion_is_refused():
    plan = cg.solve_plan(pair(tau=0.5))
    names = ["matrix", "normalized_matrix", "transport_cost", "regularized_cost", "cost_parts", "marginal_error"]
    names += ["total_mass", "normalized_cost", "mass_penalty", "duality_gap"]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        again = cg.solve_plan(pair(tau=0.5))
        read = {name: getattr(again, name) for name in names}
        again.reweighting()
        again.conditionals()
    for name in names:
        jax.tree.map(np.testing.assert_array_equal, read[name], getattr(plan, name))


@pytest.mark.slow
def test_fits_where_promotion_is_refused():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        strict = fit()
    jax.tree.map(np.testing.assert_array_equal, strict, fit())


@pytest.mark.slow
def test_clouds_on_a_mesh_whose_axes_are_explicit():
    """As `jax.make_mesh` has them."""
    code = """
import jax, numpy as np, coupled_gmm as cg
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((2,), ("points",))
x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("points")))
gmm = cg.init_gmm(jax.random.key(0), sharded, 2, n_init=2)
fits = [cg.fit_gmm(cloud, gmm, max_steps=3) for cloud in (x, sharded)]
np.testing.assert_allclose(*(fit.log_likelihood for fit in fits), rtol=1e-5)
"""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=150, env=os.environ | environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
