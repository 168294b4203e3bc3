"""One of two processes, each with its own part of the clouds: what it finds in fits of the whole goes to a file."""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

import coupled_gmm as cg


def clouds():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2001, 2)), rng.normal(size=(1500, 2)) + 1
    x += np.array([[0.0, 0.0], [4.0, 2.0]])[rng.integers(2, size=len(x))]
    y += np.array([[0.0, 0.0], [3.0, 3.0]])[rng.integers(2, size=len(y))]
    return x.astype(np.float32), rng.random(len(x)).astype(np.float32), y.astype(np.float32)


def fits(x, w, y, key):
    """Of a start, of one mixture, and of a pair whose other cloud every process has."""
    init = cg.init_gmm(key, x, 2, point_weights=w, n_init=2)
    broad = cg.GaussianMixture.from_moments([[0.0, 1.0], [2.0, 1.0]], np.stack([4 * np.eye(2)] * 2), [0.5, 0.5])
    alone = cg.fit_gmm(x, broad, point_weights=w, max_steps=10, tol=0)
    pair = cg.GaussianMixturePair(broad, broad, 0.1, 0.9)
    both = cg.fit_pair(x, y, pair, point_weights0=w, transport_weight=0.05, em_steps=10)
    return {
        "start": init.means,
        "means": alone.gmm.means,
        "covariances": alone.gmm.covariances,
        "log_likelihood": alone.log_likelihood,
        "means0": both.pair.gmm0.means,
        "means1": both.pair.gmm1.means,
        "plan": both.plan.matrix,
        "value": both.penalized_log_likelihood,
        "history": both.history.penalized_log_likelihood,
        "status": both.status,
    }


def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def main(address, folder, number):
    jax.distributed.initialize(address, 2, number)
    assert jax.device_count() == 4 and jax.local_device_count() == 2
    mesh = jax.make_mesh((4,), ("points",))
    x, w, y = clouds()
    part = slice(0, 701) if number == 0 else slice(701, None)
    points, weights = cg.shard_cloud(x[part], mesh, point_weights=w[part])
    assert points.shape == (2600, 2), points.shape  # twice 1,300: the longer part, evenly
    # Refused in one process, it is refused in both, and none waits for the other.
    bad = np.full_like(x, np.nan) if number else x
    assert ("NaN" if number else "processes [1] could not use") in refusal(cg.shard_cloud, bad, mesh)
    assert "numbers of features differ" in refusal(cg.shard_cloud, x[:, : 1 + number], mesh)
    assert "given in some processes" in refusal(cg.shard_cloud, x, mesh, point_weights=w if number else None)
    assert "5200 of 5200 values" in refusal(cg.fit_gmm, points * np.nan, 2, key=jax.random.key(0))
    found = fits(points, weights, y, jax.random.key(0))
    # The padding has no weight in a fit, and a density like any point: the score is of rows as they are.
    host = multihost_utils.process_allgather(points, tiled=True)
    gmm = cg.fit_gmm(x, 1, key=jax.random.key(0), point_weights=w).gmm
    np.testing.assert_allclose(gmm.score(points), gmm.score(np.asarray(host)), rtol=1e-6)
    np.savez(Path(folder) / f"{number}.npz", **{name: np.asarray(value) for name, value in found.items()})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
