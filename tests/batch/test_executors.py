"""Tasks here and in pools: what comes back, and what is lost with a worker that dies."""

import concurrent.futures
import multiprocessing

import jax
import numpy as np
import pytest
from tasks import deadly, precision, square

from coupled_gmm.batch import executors


def test_in_this_process_tasks_come_in_order_and_errors_pass():
    found = list(executors.outcomes(square, [(0,), (1,), (2,)]))
    assert [(i, int(result["square"])) for i, result in found] == [(0, 0), (1, 1), (2, 4)]
    with pytest.raises(ValueError, match="three"):
        list(executors.outcomes(square, [(3,)]))


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


def test_tasks_are_done_in_the_precision_of_who_asks():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for exactly in (False, True):
            with jax.enable_x64(exactly):
                assert dict(executors.outcomes(precision, [(1.0,)], pool)) == {0: np.asarray(exactly)}


def test_what_is_no_executor_is_refused():
    with pytest.raises(TypeError, match="executor: expected an Executor"):
        executors.check("two")
