"""Tasks here and in pools: what comes back, and what is lost with a worker that dies."""

import concurrent.futures
import multiprocessing
import threading

import jax
import numpy as np
import pytest
from tasks import deadly, exits, precision, square

from coupled_gmm.batch import executors


@pytest.mark.parametrize("n_threads", [1, 3])
def test_in_this_process_all_are_done_and_errors_pass(n_threads, monkeypatch):
    monkeypatch.setattr(executors, "threads", lambda: n_threads)
    found = dict(executors.outcomes(square, [(0,), (1,), (2,)]))
    assert {i: int(result["square"]) for i, result in found.items()} == {0: 0, 1: 1, 2: 4}
    for tasks in ([(3,)], [(1,), (3,), (2,)]):
        with pytest.raises(ValueError, match="three"):
            list(executors.outcomes(square, tasks))


def test_tasks_of_this_process_are_done_at_once(monkeypatch):
    """Each waits for the other: one after the other they would never end."""
    monkeypatch.setattr(executors, "threads", lambda: 2)
    together = threading.Barrier(2, timeout=20)
    assert sorted(i for i, _ in executors.outcomes(lambda: together.wait(), [(), ()])) == [0, 1]


def test_a_task_that_raises_comes_back_as_its_exception_and_the_others_as_results():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = dict(executors.outcomes(square, [(i,) for i in range(200)], pool))
    assert sorted(found) == list(range(200))
    assert isinstance(found[3], ValueError)
    assert all(int(found[i]["square"]) == i**2 for i in found if i != 3)


def test_a_worker_that_is_killed_loses_tasks_and_no_others():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        found = dict(executors.outcomes(deadly, [(i,) for i in range(4)], pool))
    assert sorted(found) == [0, 1, 2, 3]
    assert found[0] == 0 and isinstance(found[2], concurrent.futures.BrokenExecutor)
    assert all(found[i] == i or isinstance(found[i], concurrent.futures.BrokenExecutor) for i in found)


@pytest.mark.parametrize("pool", [concurrent.futures.ThreadPoolExecutor, concurrent.futures.ProcessPoolExecutor])
def test_a_task_that_exits_is_lost_and_ends_nobody_else(pool):
    options = {"mp_context": multiprocessing.get_context("spawn")} if "Process" in pool.__name__ else {}
    with pool(1, **options) as workers:
        found = dict(executors.outcomes(exits, [(0,), (1,)], workers))
    assert isinstance(found[0], SystemExit) and found[1] == 1


def test_tasks_are_done_in_the_precision_of_who_asks():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for exactly in (False, True):
            with jax.enable_x64(exactly):
                assert dict(executors.outcomes(precision, [(1.0,)], pool)) == {0: np.asarray(exactly)}


def test_what_is_no_executor_is_refused():
    with pytest.raises(TypeError, match="executor: expected an Executor"):
        executors.check("two")
