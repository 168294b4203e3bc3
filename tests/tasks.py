"""Executors and tasks for them, in a module that their processes can import."""

import concurrent.futures
import os
import signal
import sys
import time

import jax
import numpy as np


def square(x):
    if x == 3:
        raise ValueError("three is refused")
    return {"square": np.asarray(x) ** 2}


def deadly(x):
    if x == 2:
        time.sleep(0.5)  # until what was done before has come back
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def exits(x):
    if x == 0:
        sys.exit("the worker's own")
    return x


def precision(x):
    return jax.numpy.asarray(x).dtype == np.float64


class Losing(concurrent.futures.ThreadPoolExecutor):
    """Loses its first task."""

    def submit(self, fn, /, *args, **kwargs):
        first, self.lost = not getattr(self, "lost", False), True
        if first:
            raise concurrent.futures.BrokenExecutor("a worker died")
        return super().submit(fn, *args, **kwargs)
