"""Clouds from files: what is read, and what is refused in which words."""

import datetime
import gzip
import re

import jax
import numpy as np
import polars as pl
import pytest

from coupled_gmm.data import clouds, files

X = np.array([[1.0, 2.0], [3.0, 4.5], [-1.0, 0.25]])


@pytest.fixture
def table():
    return pl.DataFrame({"x": X[:, 0], "y": X[:, 1], "w": [1, 2, 3], "name": ["a", "b", "c"]})


def test_reads_every_format(tmp_path):
    frame = pl.DataFrame({"x": X[:, 0], "y": X[:, 1]})
    np.save(tmp_path / "c.npy", X)
    np.savez(tmp_path / "c.npz", X)
    frame.write_csv(tmp_path / "c.csv")
    frame.write_parquet(tmp_path / "c.parquet")
    text = (tmp_path / "c.csv").read_bytes()
    for ending in files.TEXT:
        (tmp_path / f"c{ending}").write_bytes(gzip.compress(text) if ending.endswith(".gz") else text)
    for ending in files.FORMATS:
        np.testing.assert_array_equal(clouds.read_cloud(tmp_path / f"c{ending}"), X)


def test_csv_without_header(tmp_path):
    (tmp_path / "c.csv").write_text("1,2\n3,4.5\n-1,0.25\n")
    np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "c.csv"), X)


def test_csv_with_spaces(tmp_path):
    (tmp_path / "c.csv").write_text("x, y\n1, 3e2\n-2.5, .5\n")
    np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "c.csv", columns=["x", "y"]), [[1, 300], [-2.5, 0.5]])


def test_columns_are_chosen_in_order_and_left_out(tmp_path, table):
    table.write_parquet(tmp_path / "c.parquet")
    np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "c.parquet", columns=["y", "x"]), X[:, ::-1])
    np.testing.assert_array_equal(clouds.read_cloud(tmp_path / "c.parquet", exclude=["w", "name"]), X)


def test_precision_is_kept_and_integers_become_floats(tmp_path):
    np.save(tmp_path / "single.npy", X.astype(np.float32))
    np.save(tmp_path / "whole.npy", np.arange(6, dtype=np.uint8).reshape(3, 2))
    assert clouds.read_cloud(tmp_path / "single.npy").dtype == np.float32
    assert clouds.read_cloud(tmp_path / "whole.npy").dtype == np.float64


def test_weights_from_a_column_an_array_and_a_file(tmp_path, table):
    table.write_csv(tmp_path / "c.csv")
    np.savez(tmp_path / "c.npz", x=X, w=[1.0, 2.0, 3.0])
    np.save(tmp_path / "w.npy", [[1.0], [2.0], [3.0]])
    for path, name in (("c.csv", "w"), ("c.npz", "w"), ("w.npy", None)):
        np.testing.assert_array_equal(clouds.read_weights(tmp_path / path, name=name), [1, 2, 3])


def _write(folder):
    np.save(folder / "line.npy", X[:, 0])
    np.save(folder / "empty.npy", X[:0])
    np.save(folder / "complex.npy", X * 1j)
    np.save(folder / "objects.npy", np.array([X, None], dtype=object), allow_pickle=True)
    np.save(folder / "good.npy", X)
    np.savez(folder / "two.npz", a=X, b=X)
    for name in ("damaged.npy", "damaged.npz", "damaged.parquet", "text.doc"):
        (folder / name).write_bytes(b"not what the ending says")
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("x,y\n")
    (folder / "ragged.csv").write_text("x,y\n1,2\n1,2,3,4\n")
    (folder / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (folder / "words.csv").write_text("x,name\n1,a\n2,b\n")
    pl.DataFrame({"when": [datetime.datetime(2020, 1, 1)]}).write_parquet(folder / "dates.parquet")
    (folder / "gap.csv").write_text("x,y\n1,2\n,3\n")
    (folder / "folder.npy").mkdir()


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("absent.csv", {}, FileNotFoundError, "no such file; check the name and the folder"),
        ("text.doc", {}, ValueError, "can't read .doc; use one of .npy, .npz, .csv, .parquet"),
        ("none", {}, ValueError, "can't read a file without ending; use one of"),
        ("line.npy", {}, ValueError, "expected an array of shape (n, d), got (3,); reshape one feature to (n, 1)"),
        ("empty.npy", {}, ValueError, "expected an array of shape (n, d), got (0, 2); save one row a point"),
        ("complex.npy", {}, ValueError, "expected real numbers, got dtype complex128; convert the array to floats"),
        ("objects.npy", {}, ValueError, "can't be read as .npy (Object arrays cannot be loaded"),
        ("damaged.npy", {}, ValueError, "can't be read as .npy"),
        ("damaged.npz", {}, ValueError, "can't be read as .npz"),
        ("damaged.parquet", {}, ValueError, "can't be read as .parquet"),
        ("folder.npy", {}, ValueError, "can't be read as .npy"),
        ("empty.csv", {}, ValueError, "can't be read as .csv"),
        ("binary.csv", {}, ValueError, "can't be read as .csv"),
        ("ragged.csv", {}, ValueError, "can't be read as .csv"),
        ("header.csv", {}, ValueError, "the table has no rows; a cloud needs at least one point"),
        ("words.csv", {}, ValueError, "column 'name' is not numeric (String); leave it out by naming columns"),
        ("dates.parquet", {}, ValueError, "column 'when' is not numeric (Datetime"),
        (
            "gap.csv",
            {},
            ValueError,
            "column 'x' lacks 1 of 2 values, the first in row 2; drop those rows, fill them in, or",
        ),
        ("words.csv", {"columns": ["z"]}, ValueError, "there is no column 'z'; it has 'x', 'name'"),
        ("words.csv", {"exclude": ["x", "name"]}, ValueError, "no columns are left to be features"),
        ("words.csv", {"key": "x"}, ValueError, "key is for .npz files"),
        ("good.npy", {"columns": ["x"]}, ValueError, "columns are for .csv and .parquet files"),
        ("two.npz", {}, ValueError, "holds 2 arrays (a, b); name one with key"),
        ("two.npz", {"key": "c"}, ValueError, "there is no array 'c'; it has 'a', 'b'"),
    ],
)
def test_refusals_name_the_file_and_the_remedy(tmp_path, name, options, kind, message):
    _write(tmp_path)
    with pytest.raises(kind, match=re.escape(f"{tmp_path / name}: {message}")):
        clouds.read_cloud(tmp_path / name, **options)


def test_weights_must_be_one_column(tmp_path):
    np.save(tmp_path / "w.npy", X)
    with pytest.raises(ValueError, match=re.escape("expected one weight a point, shape (n,), got (3, 2)")):
        clouds.read_weights(tmp_path / "w.npy")


def test_tutorial_mixtures_are_what_ott_samples_from():
    """OTT hands R S to `jnp.linalg.cholesky`; the Gram matrix of that factor is the covariance of its points."""
    gmm0, gmm1 = clouds.tutorial_mixtures()
    angles = np.deg2rad([5, -5, -10])
    turns = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]]).transpose(2, 0, 1)
    factors = np.asarray(jax.numpy.linalg.cholesky(turns @ np.asarray(gmm0.covariances)))
    np.testing.assert_allclose(gmm1.covariances, factors @ factors.swapaxes(1, 2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gmm1.means[0], [3, -1.5])


def test_tutorial_clouds_follow_their_mixtures():
    x0, x1 = clouds.tutorial_clouds(jax.random.key(0), 5000)
    assert x0.shape == x1.shape == (5000, 2)
    for x, gmm in zip((x0, x1), clouds.tutorial_mixtures(), strict=True):
        np.testing.assert_allclose(x.mean(0), gmm.mean(), atol=0.2)
        np.testing.assert_allclose(np.cov(np.asarray(x).T), gmm.covariance(), rtol=0.1, atol=0.2)
    again, _ = clouds.tutorial_clouds(jax.random.key(0), 5000)
    np.testing.assert_array_equal(x0, again)


def test_the_time_course_follows_its_mixtures():
    """One component, then two whose masses grow apart by the planted rates; the points have their means and covariances."""
    course = clouds.time_course_mixtures()
    x, times = clouds.time_course_clouds(jax.random.key(0), 5000)
    np.testing.assert_array_equal(times, course.times)
    assert [gmm.n_components for gmm in course.gmms] == [1, 1, 2, 2, 2]
    for cloud, gmm in zip(x, course.gmms, strict=True):
        np.testing.assert_allclose(np.mean(cloud, 0), gmm.mean(), atol=0.25)  # sd of the last one's is 3.5 / sqrt(5000)
        np.testing.assert_allclose(np.cov(np.asarray(cloud).T), gmm.covariance(), atol=0.5)
    ratios = [np.asarray(gmm.weights)[1] / np.asarray(gmm.weights)[0] for gmm in course.gmms[2:]]
    rate = course.growth[1] - course.growth[0]
    np.testing.assert_allclose(ratios, np.exp(rate * np.array([1, 2, 3])), rtol=1e-5)
    again, _ = clouds.time_course_clouds(jax.random.key(0), 5000)
    np.testing.assert_array_equal(x[4], again[4])


def test_photographs_are_pixels():
    for cloud in clouds.photograph_clouds():
        assert cloud.shape == (427 * 640, 3)
        assert cloud.dtype == np.float32
        assert cloud.min() >= 0 and 0.9 < cloud.max() <= 1
    few, _ = clouds.photograph_clouds(100, seed=3)
    assert few.shape == (100, 3)
    with pytest.raises(ValueError, match="n: the photographs have 273280 pixels each, got 300000"):
        clouds.photograph_clouds(300_000)
