"""Rows of running programs reach who asked for them, and nobody else; what a listener raises is raised to it alone."""

import threading

import jax
import jax.numpy as jnp
import pytest

from coupled_gmm.core import report

STEPS = 50


@jax.jit
def program(listener, start):
    def step(i, x):
        report.emit(listener, {"running": i < STEPS, "em_steps": jnp.asarray(STEPS), "step": i, "value": x})
        return x + 1

    return jax.lax.fori_loop(0, STEPS + 2, step, start)


def run(progress, start=0.0):
    with report.listening(progress) as listener:
        return program(listener, start)


def steps(rows):
    return [row["step"] for row in rows]


def test_every_row_is_delivered():
    rows = []
    run(rows.append, 7.0)
    assert steps(rows) == list(range(STEPS))
    assert rows[3] == {"em_steps": STEPS, "step": 3, "value": 10.0}


def test_nobody_is_no_listener():
    for progress in (False, None):
        with report.listening(progress) as listener:
            assert listener is None
    with pytest.raises(TypeError, match="progress: expected True, False or a callable of a row, got str"):
        run("yes")


def test_threads_get_their_own_rows_and_errors():
    """Two fits in two threads: all rows went to one of them, and what its callback raised failed the other's."""
    ends = {}

    def work(name):
        rows, error = [], KeyError(name)

        def listen(row):
            rows.append(row)
            if name == "odd" and row["step"] == 20:
                raise error

        for _ in range(10):
            rows.clear()
            try:
                run(listen, 1000.0 * (name == "odd"))
                raised = None
            except Exception as found:
                raised = found
            ends.setdefault(name, []).append((raised is error, steps(rows), rows[0]["value"]))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("even", "odd", "third")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("even", "third"):
        assert ends[name] == [(False, list(range(STEPS)), 0.0)] * 10
    assert ends["odd"] == [(True, list(range(21)), 1000.0)] * 10


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_a_listener_raises_comes_back_as_it_is(kind):
    error, rows = kind("mine"), []

    def listen(row):
        rows.append(row)
        raise error

    with pytest.raises(kind) as caught:
        run(listen)
    assert caught.value is error and steps(rows) == [0]
    jax.effects_barrier()  # nothing is left in JAX
    rows = []
    run(rows.append)
    assert len(rows) == STEPS and not report._listeners


def test_an_error_of_the_program_is_not_covered():
    with pytest.raises(ZeroDivisionError), report.listening(print):
        raise ZeroDivisionError
    assert not report._listeners


def test_listeners_may_be_nested():
    outer, inner = [], []
    with report.listening(outer.append) as one, report.listening(inner.append) as other:
        program(other, 5.0)
        program(one, 1.0)
    assert len(outer) == len(inner) == STEPS and (outer[0]["value"], inner[0]["value"]) == (1.0, 5.0)


def test_batches_report_every_row_of_each():
    rows = []
    jax.vmap(lambda start: run(rows.append, start))(jnp.asarray([0.0, 100.0]))
    assert sorted(row["value"] for row in rows) == [*range(STEPS), *range(100, 100 + STEPS)]


def test_a_new_listener_compiles_nothing():
    run(lambda row: None)
    before = program._cache_size()
    for _ in range(3):
        run(lambda row: None)
    assert program._cache_size() == before


def test_a_program_that_outlives_its_listener_reaches_nobody():
    rows, others = [], []
    outer = jax.jit(lambda start: run(rows.append, start))
    outer(1.0)
    run(others.append)
    outer(2.0)
    jax.effects_barrier()
    assert len(others) == STEPS and not rows
