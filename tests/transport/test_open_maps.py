"""Images of clouds that are not in memory, in files, beside those of the same points in memory."""

import os
import subprocess
import sys

import dask.array as da
import jax
import numpy as np
import polars as pl
import pytest
from problems import ROOT, points, random_mixture
from twins import gaussian_map, posterior

import coupled_gmm as cg

K, D, N = 3, 2, 3000
KEY = jax.random.key(3)
METHODS = ({"method": "barycentric"}, {"method": "random", "key": KEY})


@pytest.fixture
def plan():
    return cg.solve_plan(cg.GaussianMixturePair(random_mixture(0, K, D), random_mixture(1, K + 1, D), 1.0))


def opened(folder, x, **options):
    np.save(folder / "cloud.npy", x)
    return cg.open_cloud(folder / "cloud.npy", **options)


def gathered(cloud):
    return np.concatenate([points for points, _ in cloud.chunks()])


@pytest.mark.parametrize("arguments", METHODS, ids=lambda arguments: arguments["method"])
def test_images_are_those_of_points_in_memory(tmp_path, plan, arguments):
    """Random ones as well, by the same key: a point's draw does not depend on the chunk that it is read in."""
    x = points(plan.pair.gmm0, N).astype(np.float32)
    expected = np.asarray(cg.map_points(plan, x, **arguments))
    for size, exactly in ((1024, True), (None, True), (700, False), (N - 1, False)):
        cloud = opened(tmp_path, x, chunk_size=size)
        for end in ("npy", "parquet"):
            found = cg.map_points(plan, cloud, **arguments, out=tmp_path / f"images.{end}")
            assert (found.shape, found.dtype, found.chunk_size) == (x.shape, x.dtype, cloud.chunk_size)
            if exactly:
                np.testing.assert_array_equal(gathered(found), expected)
            else:
                np.testing.assert_allclose(gathered(found), expected, rtol=1e-5, atol=1e-5)
    if "key" in arguments:
        other = cg.map_points(plan, cloud, method="random", key=jax.random.key(4), out=tmp_path / "others.npy")
        assert (gathered(other) != expected).any(axis=1).mean() > 0.1


@pytest.mark.parametrize("single", [True, False])
def test_images_are_means_of_gaussian_maps(tmp_path, single):
    """By formula, in NumPy's float64, of either precision; one feature, one component."""
    with jax.enable_x64(not single):
        for k, d in ((K, D), (1, 1)):
            gmms = [random_mixture(seed, k, d, condition=10) for seed in (0, 1)]
            plan = cg.solve_plan(cg.GaussianMixturePair(*gmms, 1.0), method="exact")
            x = points(gmms[0], 50)
            moments = [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gmm)] for gmm in gmms]
            share = np.asarray(plan.matrix, np.float64)
            expected = np.zeros_like(x)
            for i in range(k):
                for j in range(k):
                    maps = gaussian_map(x, moments[0][0][i], moments[0][1][i], moments[1][0][j], moments[1][1][j])
                    part = posterior(x, *moments[0])[:, i] * share[i, j] / share[i].sum()
                    expected += part[:, None] * maps
            found = cg.map_points(plan, opened(tmp_path, x, chunk_size=16), out=tmp_path / "images.npy")
            tolerance = 1e-4 if single else 1e-9
            np.testing.assert_allclose(gathered(found), expected, rtol=tolerance, atol=tolerance)


def test_far_from_0(tmp_path):
    """Files of float64 are moved before they are rounded."""
    near, far = ([random_mixture(seed, K, D, shift=s, condition=10) for seed in (0, 1)] for s in (0.0, 1e6))
    plans = [cg.solve_plan(cg.GaussianMixturePair(*gmms, 1.0), method="exact") for gmms in (near, far)]
    x = points(near[0], 200)
    found = cg.map_points(plans[1], opened(tmp_path, x + 1e6, chunk_size=64), out=tmp_path / "images.npy")
    np.testing.assert_array_equal(gathered(found), np.asarray(cg.map_points(plans[1], x + 1e6)))
    np.testing.assert_allclose(gathered(found) - 1e6, cg.map_points(plans[0], x), atol=0.1)  # of a float32 at 1e6


def test_names_weights_and_blocks_of_dask(tmp_path, plan):
    x, w = points(plan.pair.gmm0, 300), np.arange(300) / 8
    pl.DataFrame({"CD3": x[:, 0], "CD8": x[:, 1], "w": w}).write_parquet(tmp_path / "c.parquet", row_group_size=70)
    cloud = cg.open_cloud(tmp_path / "c.parquet", weights="w", chunk_size=100)
    expected = np.asarray(cg.map_points(plan, x))
    found = cg.map_points(plan, cloud, out=tmp_path / "images.parquet")
    assert found.names == ("CD3", "CD8")
    np.testing.assert_allclose(gathered(found), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate([weights for _, weights in found.chunks()]), w)
    with pytest.raises(ValueError, match=r"images\.npy: a \.npy holds no weights"):
        cg.map_points(plan, cloud, out=tmp_path / "images.npy")
    blocks = cg.open_cloud(da.from_array(x, chunks=(80, 1)))
    found = cg.map_points(plan, blocks, out=tmp_path / "images.npy")
    np.testing.assert_allclose(gathered(found), expected, rtol=1e-5, atol=1e-5)


def test_what_can_not_be_done_is_refused_by_name(tmp_path, plan):
    x = points(plan.pair.gmm0, 40)
    cloud, place = opened(tmp_path, x, chunk_size=8), tmp_path / "images.npy"
    thin = cg.open_cloud(tmp_path / "cloud.npy", columns=[0])
    for call, error, says in (
        (
            lambda: cg.map_points(plan, cloud),
            ValueError,
            r"^out: the images of OpenCloud\(.* need a file, got None; name",
        ),
        (lambda: cg.map_points(plan, cloud, out=3), ValueError, r"^out: the images of .* need a file, got 3"),
        (
            lambda: cg.map_points(plan, x, out=place),
            ValueError,
            "^out: is for clouds that are not in memory; save what",
        ),
        (lambda: cg.map_points(plan, thin, out=place), ValueError, r"^x: expected shape \(n, 2\), got \(40, 1\)"),
        (lambda: cg.map_points(plan, cloud, method="random", out=place), ValueError, "^key: "),
        (lambda: cg.map_points(plan, cloud, out=tmp_path / "x.csv"), ValueError, r"x\.csv: can't write \.csv"),
        (
            lambda: jax.eval_shape(lambda plan: cg.map_points(plan, cloud, out=place), plan),
            TypeError,
            r"^x: OpenCloud\(.* can't be read under a transformation",
        ),
        (
            lambda: jax.eval_shape(lambda k: cg.map_points(plan, cloud, method="random", key=k, out=place), KEY),
            TypeError,
            r"^x: OpenCloud\(.* can't be read under a transformation",
        ),
    ):
        with pytest.raises(error, match=says):
            call()
    x[17] = 1e300
    with pytest.raises(ValueError, match=r"^x\[16:24\]: 2 of 16 values, up to 1e\+300, exceed what float32 holds"):
        cg.map_points(plan, opened(tmp_path, x, chunk_size=8), out=place)
    assert os.listdir(tmp_path) == ["cloud.npy"]


MEMORY = """
import os, sys, threading, time
import numpy as np
import jax
import coupled_gmm as cg
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
gmms = [cg.GaussianMixture.from_moments(np.eye(3, 2) + s, [np.eye(2)] * 3, np.full(3, 1 / 3)) for s in (0, 2)]
plan = cg.solve_plan(cg.GaussianMixturePair(*gmms, 0.1), method="exact")
options = {"method": "random", "key": jax.random.key(0)} if sys.argv[3] == "random" else {}
cloud, small = cg.open_cloud(sys.argv[1]), cg.open_cloud(sys.argv[2])
cg.map_points(plan, small, **options, out=sys.argv[4])
start = most = resident()
over = False
def watch():
    global most
    while not over:
        most = max(most, resident())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
begin = time.perf_counter()
cg.map_points(plan, cloud, **options, out=sys.argv[4])
print(time.perf_counter() - begin, file=sys.stderr)
over = True
thread.join()
print(most - start)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
@pytest.mark.parametrize("method", ["barycentric", "random"])
def test_memory_is_that_of_chunks(tmp_path, method):
    """Of 240 MB of points (a hole in a file) and as much of images."""
    for path, rows in ((tmp_path / "c.npy", 30_000_000), (tmp_path / "small.npy", 5_000_000)):
        with path.open("wb") as file:
            about = {"descr": "<f4", "fortran_order": False, "shape": (rows, 2)}
            np.lib.format.write_array_header_1_0(file, about)
            file.truncate(file.tell() + 8 * rows)
    command = [sys.executable, "-c", MEMORY, tmp_path / "c.npy", tmp_path / "small.npy", method, tmp_path / "out.npy"]
    end = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert end.returncode == 0, end.stderr
    print(end.stdout, end.stderr)
    assert float(end.stdout) < 220
    assert cg.open_cloud(tmp_path / "out.npy").shape == (30_000_000, 2)
