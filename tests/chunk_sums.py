"""What tests make of the chunks of a cloud: functions of a module, so that workers can import them."""

import os
import threading
import time
from pathlib import Path

import numpy as np


def moments(points, weights, first, reference):
    """Count, mass, sum and sum of squares about a reference, and the sum of rows' numbers."""
    x = points.astype(np.float64) - reference
    w = np.ones(len(x)) if weights is None else weights.astype(np.float64)
    return np.float64(len(x)), w.sum(), w @ x, w @ x**2, np.float64((first + np.arange(len(x))).sum())


def extremes(points, weights, first):
    return {"low": points.min(0), "high": points.max(0), "first": points[0]}


def wider(one, other):
    return {
        "low": np.minimum(one["low"], other["low"]),
        "high": np.maximum(one["high"], other["high"]),
        "first": one["first"],
    }


def shapes(points, weights, first):
    """How many chunks there are, their points and their features."""
    return np.ones(()), np.float64(points.shape[0]), np.float64(points.shape[1])


def slowly(points, weights, first, seconds):
    time.sleep(float(seconds))
    return (points.astype(np.float64).sum(0),)


def killing(points, weights, first, victim, mark):
    """The sum, where the worker with this number, once, dies at it."""
    mark = Path(bytes(mark).decode())
    if first >= victim and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    return (points.astype(np.float64).sum(0),)


def threads(points, weights, first):
    """How many threads of readers there are."""
    return (np.float64(sum("read-ahead" in thread.name for thread in threading.enumerate())),)


def drawn(block, rows):
    """Points of a block that its number decides: a graph of these can be made again."""
    return np.random.RandomState(int(block[0])).randn(rows, 4)


CENTRES = np.array([[0.0, 0.0, 1.0, 0.0], [4.0, 1.0, 0.0, 2.0], [1.0, 5.0, 2.0, 0.0]])


def clusters(seed, rows, d, offset=0.0):
    """Points of three clusters, in float32."""
    rng = np.random.default_rng(seed)
    x = CENTRES[rng.integers(3, size=rows), :d] + rng.standard_normal((rows, d), np.float32)
    return (offset + x).astype(np.float32)


def clusters_of(block, rows, d, offset):
    return clusters(int(block[0]), rows, d, offset)


def sent(client):
    """Bytes that the workers of a cluster have sent so far."""
    return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())
