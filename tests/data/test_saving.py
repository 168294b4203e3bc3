"""Saved files: every class comes back as it was, and what is not ours is refused."""

import dataclasses
import importlib
import json
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import module_names

import coupled_gmm as cg
from coupled_gmm.core.tree import saved_class
from coupled_gmm.data import saving


def header(**changes):
    fields = {"format": "coupled_gmm", "version": 1, "package": "9.9", "tree": {"value": None}}
    return {"header": np.array(json.dumps(fields | changes))}


@pytest.fixture(scope="module")
def pair():
    covariances = np.stack([np.eye(2), 2 * np.eye(2)])
    gmm0 = cg.GaussianMixture.from_moments([[0.0, 0], [1, 1]], covariances, [0.5, 0.5])
    gmm1 = cg.GaussianMixture.from_moments([[0.0, 1], [3, 1]], covariances, [0.25, 0.75])
    return cg.GaussianMixturePair.from_rho(gmm0, gmm1, 0.5, 1.0)


@pytest.fixture(scope="module")
def fit(pair):
    x = np.random.default_rng(0).normal(size=(50, 2))
    return cg.fit_pair(x, x + 1, pair, transport_weight=0.1, em_steps=2, m_steps=2)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(one) is type(other)
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).dtype == np.asarray(other).dtype


def test_results_come_back(tmp_path, pair, fit):
    plan = cg.solve_plan(pair)
    for tree in (pair.gmm0, pair, plan, fit, [pair, plan], {"a": pair, "b": (plan, None)}):
        saving.save(tmp_path / "tree.npz", tree)
        assert_same(tree, saving.load(tmp_path / "tree.npz"))
    again = saving.load(tmp_path / "tree.npz")["b"][0]
    np.testing.assert_array_equal(again.matrix, plan.matrix)
    assert again.pair.balanced is False


def package_classes():
    """All dataclasses of the package, by name, whether they were imported or not."""
    modules = [importlib.import_module(name) for name in module_names()]
    classes = {c for module in modules for c in vars(module).values() if isinstance(c, type)}
    classes = [c for c in classes if dataclasses.is_dataclass(c) and c.__module__.startswith("coupled_gmm.")]
    assert len(classes) == len({c.__name__ for c in classes}), "a class is found by its name alone"
    return {c.__name__: c for c in classes}


def test_every_result_can_be_saved():
    """The table of classes holds what the package exports, and whatever is a field of that."""
    classes = package_classes()
    wanted = [name for name in cg.__all__ if name in classes]
    assert {"GaussianMixture", "GraphFit", "FlowFit"} <= set(wanted)
    for name in wanted:  # grows on the way
        fields = " ".join(str(field.type) for field in dataclasses.fields(classes[name]))
        wanted += [part for part in re.findall(r"\w+", fields) if part in classes and part not in wanted]
    for name in wanted:
        assert saved_class(name) is classes[name]
    assert saved_class("Frame") is None and saved_class("sys") is None


def test_plain_containers_and_dtypes_come_back(tmp_path):
    tree = {
        "numpy": np.arange(3, dtype=np.int16),
        "jax": jnp.zeros((2, 0), jnp.float32),
        "list": [1, 2.5, "text", True, None, float("inf")],
        "tuple": (np.float64(3.5), [], {}),
    }
    saving.save(tmp_path / "tree", tree)
    found = saving.load(tmp_path / "tree")
    assert isinstance(found["numpy"], np.ndarray) and found["numpy"].dtype == np.int16
    assert isinstance(found["jax"], jax.Array) and found["jax"].shape == (2, 0)
    assert found["list"] == tree["list"]
    assert found["tuple"][0] == 3.5 and found["tuple"][1:] == ([], {})


def test_double_precision_survives(tmp_path):
    with jax.enable_x64(True):
        x = jnp.asarray([1 / 3])
        saving.save(tmp_path / "x.npz", x)
        assert saving.load(tmp_path / "x.npz") == x
    assert saving.load(tmp_path / "x.npz").dtype == jnp.float32


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [object()]}, "tree['a'][0]: can't save a object; save results of this package"),
        ({1: 2}, "tree: can't save a dict"),
        (np.array([None]), "tree: can't save an array of dtype object"),
        (jnp.zeros(2, jnp.bfloat16), "tree: can't save an array of dtype bfloat16; convert it"),
    ],
)
def test_what_can_not_be_saved_is_refused(tmp_path, tree, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        saving.save(tmp_path / "tree.npz", tree)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "not a file that coupled_gmm.save wrote"),
        ({"header": np.zeros(3)}, "not a file that coupled_gmm.save wrote"),
        ({"header": np.array("[]")}, "not a file that coupled_gmm.save wrote"),
        (header(format="other"), "a file of 'other', not of 'coupled_gmm'"),
        (
            header(version=3),
            "has format version 3, and this package reads 1 and 2; install the coupled_gmm that wrote it (9.9)",
        ),
        (header(tree={"array": "a0"}), "the header and the arrays disagree"),
        (header(tree={"strange": 1}), "the header holds a node that this package does not know"),
        (header(tree={"class": "Popen", "fields": {}}), "holds a 'Popen', which is no class of this package"),
        (
            header(tree={"class": "GaussianMixture", "fields": {"means": {"value": 1}}}),
            "its GaussianMixture differs from this package's in covariances, weights",
        ),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'f.npz'}: {message}")):
        saving.load(tmp_path / "f.npz")


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        saving.load(tmp_path / "absent.npz")
    for content in (b"", b"nonsense", b"PK\x03\x04broken"):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"not a file that coupled_gmm\.save wrote, or a damaged one"):
            saving.load(tmp_path / "damaged.npz")


def test_a_failed_save_keeps_the_old_file(tmp_path):
    saving.save(tmp_path / "x.npz", np.arange(3))
    with pytest.raises(TypeError):
        saving.save(tmp_path / "x.npz", object())
    np.testing.assert_array_equal(saving.load(tmp_path / "x.npz"), np.arange(3))


def test_equal_trees_are_equal_files(tmp_path, pair):
    """Members of a zip have dates; here all have the same."""
    tree = {"gmm": pair.gmm0, "x": np.arange(3)}
    cg.save(tmp_path / "x.npz", tree)
    content = saving.pack(tree)
    assert (tmp_path / "x.npz").read_bytes() == content
    with zipfile.ZipFile(tmp_path / "x.npz") as file:
        assert {member.date_time for member in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    again = saving.unpack("the bytes", content)
    assert saving.pack(again) == content
    np.testing.assert_array_equal(again["gmm"].means, tree["gmm"].means)
    for damaged in (content[:-10], content[:300] + b"x" + content[301:], b""):
        with pytest.raises(ValueError, match=r"^the bytes: not a file that"):
            saving.unpack("the bytes", damaged)
