"""Programs are given back before a process has no room for more, and compiled anew when they are called again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coupled_gmm as cg
from coupled_gmm.core import programs


@pytest.fixture
def held(monkeypatch):
    """Counts every compilation; whether room is short is the test's to say."""
    found = {"maps": 0, "all": 0}
    monkeypatch.setattr(programs, "_EVERY", 1)
    monkeypatch.setattr(programs, "_limit", lambda: 1000)
    monkeypatch.setattr(programs, "n_maps", lambda: found["maps"])
    monkeypatch.setattr(jax, "clear_caches", lambda: found.update(all=found["all"] + 1))
    return found


def double(x, times):
    return times * x


def test_programs_stay_while_there_is_room(held):
    double_it = programs.program("times")(double)
    held["maps"] = 500
    for size in (3, 4):
        np.testing.assert_array_equal(double_it(jnp.ones(size), times=2), 2)
    assert double_it._cache_size() == 2 and not held["all"]


@pytest.mark.parametrize(("maps", "everything"), [(600, False), (900, True)])
def test_programs_go_when_room_is_short_and_come_again(held, maps, everything):
    double_it = programs.program("times")(double)
    double_it(jnp.ones(5), times=3)
    held["maps"] = maps
    jax.jit(lambda x: x - 17)(jnp.ones(5))  # somebody's own compilation tells
    assert double_it._cache_size() == 0
    assert bool(held["all"]) == everything, (
        "JAX's own caches, with the caller's programs, only where nothing else helps"
    )
    np.testing.assert_array_equal(double_it(jnp.ones(5), times=3), 3)


def test_a_system_without_such_a_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "_EVERY", 1)
    monkeypatch.setattr(programs, "_LIMIT", tmp_path / "missing")
    monkeypatch.setattr(programs, "_MAPS", tmp_path / "missing")
    programs._limit.cache_clear()
    try:
        assert programs._limit() is None and programs.n_maps() == 0
        np.testing.assert_array_equal(programs.program("times")(double)(jnp.ones(6), times=2), 2)
    finally:
        programs._limit.cache_clear()


def test_maps_are_counted_where_the_system_says():
    if not programs._MAPS.exists():
        pytest.skip("no /proc here")
    assert programs.n_maps() > 100
    assert programs._limit() is None or programs._limit() > 1000


def test_a_program_alone_or_a_part_of_another():
    """The compiler's options go with a program that is compiled by itself; JAX refuses them anywhere else."""
    double_it = programs.program("times")(double)
    x = jnp.arange(3.0)
    alone = double_it(x, times=2)
    grad = jax.grad(lambda x: jnp.sum(double_it(x, times=2)))
    parts = {
        "jit": jax.jit(lambda x: double_it(x, times=2))(x),
        "a constant of a jit": jax.jit(lambda y: double_it(x, times=2) + 0 * y)(x),
        "vmap": jax.vmap(lambda x: double_it(x, times=2))(x),
        "scan": jax.lax.map(lambda x: double_it(x, times=2), x),
        "grad": x * grad(x),
        "jit of grad": x * jax.jit(grad)(x),
    }
    for name, found in parts.items():
        np.testing.assert_array_equal(found, alone, err_msg=name)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the options are those of XLA for CPUs")
def test_a_version_of_xla_without_such_an_option(monkeypatch):
    monkeypatch.setattr(programs, "_QUICK", {"xla_cpu_no_such_option_of_any_version": True})
    monkeypatch.setattr(programs, "_quick_options_are_known", True)
    double_it = programs.program("times")(double)
    for _ in range(2):
        np.testing.assert_array_equal(double_it(jnp.ones(7), times=2), 2)
    assert not programs._quick_options_are_known, "nothing is tried twice"


def test_options_that_a_user_has_set_are_left_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_disable_hlo_passes=dce")
    assert programs._unless_set(programs._QUICK) == {"xla_cpu_use_fusion_emitters": False}


def test_loops_over_large_matrices_are_compiled_in_full(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    over_matrices, other = (programs.program(over_matrices=heavy)(jnp.square) for heavy in (True, False))
    small, large = (cg.GaussianMixture(np.zeros((1, d)), np.eye(d)[None], np.ones(1)) for d in (3, 4))
    assert over_matrices._may_be_quick([small], {}) and not over_matrices._may_be_quick(([small, large],), {})
    assert other._may_be_quick([large], {})


def test_an_error_of_the_program_is_its_own():
    def wrong(x):
        raise ValueError("of my own")

    with pytest.raises(ValueError, match="of my own"):
        programs.program()(wrong)(jnp.ones(3))
