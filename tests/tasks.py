"""Tasks for executors, in a module that their processes can import."""

import os
import signal
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


def precision(x):
    return jax.numpy.asarray(x).dtype == np.float64
