"""Files that no `save` wrote: damaged, forged or hostile ones are refused in a moment, in one line; and how files are written."""

import copy
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coupled_gmm as cg
from coupled_gmm.core.status import Status
from coupled_gmm.core.tree import saved_class, unchecked
from coupled_gmm.data import archive, saving


def F(x):
    return jnp.asarray(np.asarray(x, np.float32))


def N(x):
    return jnp.asarray(np.asarray(x, np.int32))


def mixture(n_components=2, n_features=2, **changes):
    fields = {
        "means": F(np.arange(n_components * n_features).reshape(n_components, n_features)),
        "covariances": F(np.tile(np.eye(n_features), (n_components, 1, 1))),
        "weights": F(np.full(n_components, 1 / max(n_components, 1))),
        "remainders": None,
    }
    return unchecked(cg.GaussianMixture, **fields | changes)


def pair(**changes):
    fields = {"gmm0": mixture(), "gmm1": mixture(3), "epsilon": F(0.5), "rho": F(2), "balanced": False}
    return unchecked(cg.GaussianMixturePair, **fields | changes)


def plan(**changes):
    fields = {"pair": pair(), "cost": F(np.ones((2, 3))), "potentials": (F(np.zeros(2)), F(np.ones(3)))}
    fields |= {"status": N(0), "n_iterations": N(4), "vertex": None, "gap": None}
    return unchecked(cg.Plan, **fields | changes)


def history(steps=4, nodes=2, edges=1, **changes):
    fields = {"q": F(np.ones((steps, nodes))), "transport_terms": F(np.ones((steps, edges)))}
    fields |= dict.fromkeys(["objective", "penalized_log_likelihood", "marginal_error"], F(np.ones(steps)))
    return unchecked(saved_class("History"), **fields | {"log_likelihoods": None} | changes)


def pair_fit(**changes):
    fields = {"pair": pair(), "plan": plan(), "penalized_log_likelihood": F(-3), "status": N(1), "n_steps": N(4)}
    fields |= {"history": history(), "log_likelihoods": F(np.ones(2))}
    return unchecked(saved_class("PairFit"), **fields | changes)


def stacked(tree, n=2):
    return jax.tree.map(lambda leaf: jnp.asarray(np.stack([leaf] * n)), tree)


def graph_fit(**changes):
    padded = stacked(plan(pair=pair(gmm0=mixture(3)), cost=F(np.ones((3, 3))), potentials=(F(np.zeros(3)),) * 2))
    fields = {"gmms": [mixture(), mixture(3), mixture(1)], "plans": padded, "penalized_log_likelihood": F(-3)}
    fields |= {"status": N(1), "n_steps": N(2), "history": history(4, 3, 2), "log_likelihoods": None}
    return unchecked(saved_class("GraphFit"), **fields | {"edges": N([[0, 1], [2, 1]])} | changes)


def flow_fit(**changes):
    fields = {"gmm": mixture(), "loss": F(1), "path": stacked(mixture(), 4), "status": N(1)}
    fields |= {"history": unchecked(saved_class("FlowHistory"), loss=F(np.ones(3)))}
    return unchecked(cg.FlowFit, **fields | changes)


def graph(**changes):
    made = cg.MixtureGraph.from_mixtures([mixture(), mixture(3)], [(0, 1)], epsilon=0.5, tau=0.5)
    return unchecked(cg.MixtureGraph, **vars(made) | changes)


def barycenter_fit(**changes):
    fields = {"gmm": mixture(), "objective": F(1), "status": N(1), "n_steps": N(3), "start": N(0)}
    fields |= {"history": unchecked(saved_class("BarycenterHistory"), objective=F(np.ones(4)))}
    return unchecked(cg.BarycenterFit, **fields | changes)


def mixture_fit(**changes):
    fields = {"gmm": mixture(), "log_likelihood": F(1), "status": N(1), "n_steps": N(3)}
    fields |= {"penalized_log_likelihood": F(1), "start": None, "statistics": None}
    rows = unchecked(saved_class("MixtureHistory"), log_likelihood=F(np.ones(4)), penalized_log_likelihood=None)
    return unchecked(cg.MixtureFit, **fields | {"history": rows} | changes)


def statistics(k=2, **changes):
    fields = {
        "mass": F(7),
        "masses": F(np.ones(k) / k),
        "means": F(np.zeros((k, 2))),
        "remainders": F(np.zeros((k, 2))),
    }
    fields |= {"scatters": F([np.eye(2)] * k), "entropy": F(0.1)}
    return unchecked(cg.MixtureStatistics, **fields | changes)


NAN, NEGATIVE = mixture(means=F(np.full((2, 2), np.nan))), mixture(weights=F([1.5, -0.5]))
ABSENT = mixture(weights=F([1.0, 0]), means=F([[0, 0], [np.nan, np.nan]]))
LEGAL = {
    "mixture": mixture(),
    "singular": mixture(covariances=F(np.ones((2, 2, 2)))),
    "absent": ABSENT,
    "remainders": mixture(remainders=F(np.zeros((2, 2)))),
    "stack": stacked(stacked(mixture())),
    "pair": pair(),
    "two prices": pair(rho=F([1, np.inf])),
    "stack of two prices": stacked(pair(rho=F([1, np.inf])), 3),
    "plan": plan(),
    "exact": plan(vertex=F(np.ones((2, 3))) / 6, gap=F(0)),
    "no plan": plan(status=N(Status.NOT_FINITE), cost=F(np.full((2, 3), np.nan))),
    "pair fit": pair_fit(),
    "batch": stacked(pair_fit(), 3),
    "failed": pair_fit(status=N(Status.NOT_FINITE), pair=pair(gmm0=NAN), penalized_log_likelihood=F(np.nan)),
    "early": pair_fit(n_steps=N(1), history=history(objective=F([1, np.nan, np.nan, np.nan]))),
    "graph": graph(),
    "graph fit": graph_fit(),
    "graph of before": graph_fit(edges=None),
    "named graph": graph(times=F([0, 2]), names=("a", "b")),
    "named graph fit": graph_fit(times=F([0, 1, 3]), names=("a", "b", "c")),
    "composed plan": plan(potentials=None, vertex=F(np.full((2, 3), 1 / 6)), gap=F(np.inf), status=N(12)),
    "flow": flow_fit(),
    "batch of flows": stacked(flow_fit()),
    "barycenter": barycenter_fit(),
    "mixture fit": mixture_fit(),
    "with statistics": mixture_fit(statistics=statistics()),
    "of few points": statistics(scatters=F(np.full((2, 2, 2), -1e-9))),
    "statistics of many": stacked(mixture_fit(statistics=statistics())),
    "on the host": jax.device_get(pair_fit()),
}
ILLEGAL = {
    "one mean, two covariances": (
        mixture(means=F(np.zeros((1, 2)))),
        "tree.covariances: expected shape (K d d) with K",
    ),
    "negative weights": (NEGATIVE, "tree.weights: must be at least 0"),
    "sum of weights": (mixture(weights=F(np.ones(2))), "tree.weights: must sum to 1"),
    "NaN": (NAN, "tree.means: must be finite"),
    "indefinite": (
        mixture(covariances=F([[[1, 2], [2, 1]]] * 2)),
        "tree.covariances: component 0 is indef",
    ),
    "masses": (statistics(masses=F([0.5, 0.6])), "tree.masses: must sum to 1"),
    "no mass": (statistics(mass=F(0)), "tree.mass: must be above 0"),
    "negative entropy": (statistics(entropy=F(-1)), "tree.entropy: must be at least 0"),
    "NaN in statistics": (mixture_fit(statistics=statistics(entropy=F(np.nan))), "tree.statistics.entropy: must be"),
    "statistics of three": (mixture_fit(statistics=statistics(3)), "tree.statistics: are of (3, 2) components"),
    "not symmetric": (
        mixture(covariances=F([[[1, 0.5], [0, 1]]] * 2)),
        "tree.covariances: component 0 is not",
    ),
    "integers": (mixture(means=N(np.zeros((2, 2)))), "tree.means: expected an array of float, got int32"),
    "None": (mixture(weights=None), "tree.weights: expected an array of float, got NoneType"),
    "a number": (mixture(weights=1.0), "tree.weights: expected an array of float, got float"),
    "a text": (pair(gmm0="gmm"), "tree.gmm0: is of type str, not GaussianMixture"),
    "no component": (mixture(0), "tree.means: has no component"),
    "rank": (mixture(weights=F(np.ones((1, 2))) / 2), "tree.weights: expected shape (K), got (1, 2)"),
    "in a list": ([mixture(), {"a": NEGATIVE}], "tree[1]['a'].weights: must be at least 0"),
    "features": (pair(gmm1=mixture(3, 3)), "tree.gmm1: has 3 features, and gmm0 has 2"),
    "epsilon": (pair(epsilon=F(-1)), "tree.epsilon: must be finite and above 0"),
    "rho": (pair(rho=F(0)), "tree.rho: must be above 0"),
    "three prices": (pair(rho=F(np.ones(3))), "tree.rho: expected shape"),
    "balanced at a price": (pair(balanced=True), "tree.rho: must be infinite"),
    "balanced, a word": (pair(balanced="yes"), "tree.balanced: is of type str, not bool"),
    "balanced, a number": (pair(balanced=1), "tree.balanced: is of type int, not bool"),
    "stacked mixture": (pair(gmm0=stacked(mixture())), "tree.gmm0.means: expected shape (K d), got (2, 2, 2)"),
    "plan of another size": (plan(cost=F(np.ones((2, 2)))), "tree.potentials[1]: expected shape (K1)"),
    "plan of other mixtures": (plan(pair=pair(gmm1=mixture())), "tree.cost: is (2, 3) and its mixtures have (2, 2)"),
    "one potential": (plan(potentials=(F(np.zeros(2)),)), "tree.potentials: has 1 parts, not 2"),
    "a list of potentials": (plan(potentials=[F(np.zeros(2))] * 2), "tree.potentials: is of type list, not tuple"),
    "status": (plan(status=N(-3)), "tree.status: is no status"),
    "a float's status": (plan(status=F(0)), "tree.status: expected an array of int, got float32"),
    "NaN, converged": (plan(cost=F(np.full((2, 3), np.nan))), "tree.cost: must be numbers"),
    "mass": (plan(vertex=-F(np.ones((2, 3)))), "tree.vertex: must be finite and at least 0"),
    "pair and plan": (pair_fit(pair=pair(gmm0=mixture(1))), "tree.plan: is between mixtures of other sizes"),
    "lengths": (
        pair_fit(history=history(objective=F(np.ones(3)))),
        "tree.history.objective: expected shape (steps) with",
    ),
    "columns": (pair_fit(history=history(4, 3, 1)), "tree.history: has (3, 1) columns"),
    "more steps than rows": (pair_fit(n_steps=N(5)), "tree.n_steps: must be from 0 to the 4 of its history"),
    "NaN, done": (pair_fit(penalized_log_likelihood=F(np.nan)), "tree.penalized_log_likelihood: must be finite"),
    "NaN in a mixture, done": (pair_fit(pair=pair(gmm0=NAN)), "tree.pair.gmm0.means: must be finite"),
    "half a batch": (
        unchecked(saved_class("PairFit"), **vars(stacked(pair_fit())) | {"n_steps": N(4)}),
        "tree.n_steps: expected shape (), stacked",
    ),
    "other history": (pair_fit(history=mixture_fit().history), "tree.history: is of type MixtureHistory, not History"),
    "no node": (graph(targets=N([7])), "tree.targets: must be nodes, from 0 to 1"),
    "sizes": (graph(sizes=(2, 9)), "tree.sizes: must be from 1 to 3"),
    "one name twice": (graph(names=("a", "a")), "tree.names: must be 2 that differ"),
    "names of others": (graph_fit(names=("a", "b")), "tree.names: must be 3 that differ"),
    "a time that is none": (graph(times=F([0, np.nan])), "tree.times: must be finite"),
    "times of others": (graph(times=F([0, 1, 2])), "tree.times: expected shape"),
    "neither potentials nor matrix": (plan(potentials=None), "tree.potentials: are missing, and a matrix"),
    "sizes, words": (graph(sizes=("2", "3")), "tree.sizes[0]: is of type str, not int"),
    "edge to itself": (graph(targets=N([0])), "tree.targets: must be other nodes"),
    "frozen": (graph(frozen=N(np.zeros(2))), "tree.frozen: expected an array of bool, got int32"),
    "nodes": (graph(nodes=mixture()), "tree.nodes.means: expected shape (K d), stacked in (2,), got (2, 2)"),
    "edge weights": (graph(edge_weights=-F(np.ones(1))), "tree.edge_weights: must be finite and at least 0"),
    "edges": (graph_fit(edges=N([[0, 1], [2, 5]])), "tree.edges: must be nodes, from 0 to 2"),
    "number of gmms": (graph_fit(gmms=[mixture()]), "tree.gmms: are 1, and the history has 3 nodes"),
    "number of plans": (
        graph_fit(edges=None, plans=stacked(plan(), 3)),
        "tree.plans.status: expected shape (), stacked in (2,)",
    ),
    "path": (flow_fit(path=stacked(mixture(), 3)), "tree.path.means: expected shape (K d), stacked in (4,)"),
    "path's mixtures": (flow_fit(path=stacked(mixture(3), 4)), "tree.path: has mixtures of another size"),
    "start": (barycenter_fit(start=N(-1)), "tree.start: must be at least 0"),
    "barycenter's steps": (barycenter_fit(n_steps=N(4)), "tree.n_steps: must be from 0 to the 3 of its history"),
    "mixture's steps": (mixture_fit(n_steps=N(-1)), "tree.n_steps: must be from 0 to the 4"),
}


def written(path, tree, **changes):
    """A file with right checksums of anything, also of what `save` refuses."""
    arrays = {}
    header = {
        "format": saving.FORMAT,
        "version": saving.VERSION,
        "package": "9.9",
        "tree": saving._encode(tree, "tree", 0, arrays),
    }
    return forged(path, header | changes, arrays)


def forged(path, header, arrays):
    header = {**header, "arrays": {name: saving._digest(array) for name, array in arrays.items()}}
    header.pop("checksum", None)
    header["checksum"] = saving._digest(saving._text(header))
    np.savez(path, header=saving._text(header), **arrays)
    return path


def read(path):
    """Header and arrays of a file, without what `load` checks."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return json.loads(str(arrays.pop("header"))), arrays


def same(left, right):
    if jax.tree.structure(left) != jax.tree.structure(right):
        return False
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right))
    return all(type(a) is type(b) and np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f") for a, b in pairs)


def refused(path, match=None):
    """The one line that `load` gives, in a moment."""
    began = time.perf_counter()
    with pytest.raises(ValueError, match=match) as caught:
        saving.load(path)
    assert time.perf_counter() - began < 2
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600 and message.isprintable()
    return message


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_comes_back(tmp_path, name):
    saving.save(tmp_path / "f.npz", LEGAL[name])
    assert same(saving.load(tmp_path / "f.npz"), LEGAL[name])


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_is_no_result_is_neither_loaded_nor_saved(tmp_path, name):
    tree, message = ILLEGAL[name]
    refused(written(tmp_path / "f.npz", tree), re.escape(message))
    with pytest.raises(ValueError, match=re.escape(message)):
        saving.save(tmp_path / "g.npz", tree)
    assert os.listdir(tmp_path) == ["f.npz"]


def test_files_without_checksums_still_load(tmp_path):
    saving.save(tmp_path / "f.npz", pair())
    header, arrays = read(tmp_path / "f.npz")
    del header["arrays"], header["checksum"]
    np.savez(tmp_path / "f.npz", header=saving._text(header | {"version": 1}), **arrays)
    assert same(saving.load(tmp_path / "f.npz"), pair())
    arrays["a2"] = -arrays["a2"]  # and their values are looked at
    np.savez(tmp_path / "f.npz", header=saving._text(header | {"version": 1}), **arrays)
    refused(tmp_path / "f.npz", r"tree\.gmm0\.weights: must be at least 0")


def test_a_changed_array_or_header_is_noticed(tmp_path):
    saving.save(tmp_path / "f.npz", pair())
    header, arrays = read(tmp_path / "f.npz")
    changed = {**arrays, "a0": arrays["a0"] + 1}
    np.savez(tmp_path / "g.npz", header=saving._text(header), **changed)
    refused(tmp_path / "g.npz", "array a0 has another checksum")
    np.savez(tmp_path / "g.npz", header=saving._text(header | {"package": "0"}), **arrays)
    refused(tmp_path / "g.npz", "its header has another checksum")
    np.savez(tmp_path / "g.npz", header=saving._text(header), **arrays, other=np.zeros(2))
    refused(tmp_path / "g.npz", "the header and the arrays disagree")


def archived(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_not_unpacked(tmp_path, compression):
    """18.5 kB of bzip2 became 10 GB."""
    saving.save(tmp_path / "f.npz", pair())
    path = archived(tmp_path / "g.npz", [*members_of(tmp_path / "f.npz"), ("x.npy", bytes(10**7))], compression)
    refused(path, "a member is compressed")


def npy(header, content=b""):
    header = header.encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000), }\n", "shape and size disagree"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4), }\n", "shape and size disagree"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", "neither numbers nor text"),
        ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,), }\n", "neither numbers nor text"),
        ("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (2,), }\n", "neither numbers nor text"),
        ("(" * 9000, "not a file that"),
        ("{'descr", "not a file that"),
        ("", "not a file that"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",), }\n", "not a file that"),
    ],
    ids=range(9),
)
def test_claims_of_an_array_are_checked_before_anything_is_allocated(tmp_path, array, message):
    saving.save(tmp_path / "f.npz", np.zeros(4, np.float32))
    (header, text), (name, _) = members_of(tmp_path / "f.npz")
    refused(archived(tmp_path / "g.npz", [(header, text), (name, npy(array, bytes(16)))]), message)
    refused(archived(tmp_path / "g.npz", [(header, npy(array, bytes(16)))]), "not a file that|shape and size|neither")


def patched(path, **fields):
    """The file with numbers in its last directory entry changed, as zip has them."""
    places = {
        "version": (6, 2),
        "flags": (8, 2),
        "method": (10, 2),
        "packed": (20, 4),
        "size": (24, 4),
        "offset": (42, 4),
    }
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    for name, value in fields.items():
        start, length = places[name]
        content[entry + start : entry + start + length] = value.to_bytes(length, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 1},
        {"flags": 0x40},
        {"flags": 0x20},
        {"method": 99},
        {"version": 255},
        {"packed": 2**31, "size": 2**31},
        {"size": 5},
        {"packed": 2**32 - 1, "size": 2**32 - 1},
        {"offset": 2**31},
        {"offset": 0},
    ],
)
def test_directories_that_lie_are_refused(tmp_path, fields):
    saving.save(tmp_path / "f.npz", pair())
    refused(patched(tmp_path / "f.npz", **fields))


def test_extra_and_repeated_members_are_refused(tmp_path):
    saving.save(tmp_path / "f.npz", pair())
    members = members_of(tmp_path / "f.npz")
    refused(archived(tmp_path / "g.npz", [*members, ("x.npy", members[1][1])]), "the header and the arrays disagree")
    refused(archived(tmp_path / "g.npz", [*members, ("readme.txt", b"")]), "a member is no array")
    with pytest.warns(UserWarning, match="Duplicate"):
        archived(tmp_path / "g.npz", [*members, members[1]])
    refused(tmp_path / "g.npz", "two members have one name")
    refused(archived(tmp_path / "g.npz", members[:-1]), "the header and the arrays disagree")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"dict": 5}, "a node that this package does not know"),
        ({"list": {"a": 1}}, "a node that this package does not know"),
        ({"value": [1]}, "a node that this package does not know"),
        ({"class": 3, "fields": {}}, "a node that this package does not know"),
        ({"class": "Plan", "fields": [1]}, "a node that this package does not know"),
        ({"array": ["a0"]}, "a node that this package does not know"),
        ({"array": "a7", "jax": True}, "the header and the arrays disagree"),
        ([], "a node that this package does not know"),
        (None, "a node that this package does not know"),
        ({"class": "\x1b[31m" + "x" * 10**6, "fields": {}}, r"holds a '\\x1b\[31m"),
        (
            {"class": "Plan", "fields": {"\x1b[31m" + "x" * 10**6: {"value": 1}}},
            "its Plan differs from this package's in",
        ),
    ],
)
def test_nodes_of_the_header_are_checked(tmp_path, node, message):
    refused(
        forged(tmp_path / "f.npz", {"format": saving.FORMAT, "version": 2, "package": "1", "tree": node}, {}), message
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "\x1b]0;title\x07" + "x" * 10**6}, r"a file of '\\x1b\]0;title"),
        ({"format": None}, "a file of None"),
        ({"version": 3, "package": "\x1b[31m" + "x" * 10**6}, r"has format version 3.*wrote it \(\\x1b\[31m"),
        ({"version": "2"}, "has format version '2'"),
        ({"version": True}, "has format version True"),
        ({"version": 10**1000}, "has format version a number of some 1001 digits"),
    ],
)
def test_what_a_file_says_of_itself_is_shown_short_and_harmless(tmp_path, changes, message):
    refused(written(tmp_path / "f.npz", 1, **changes), message)


@pytest.mark.parametrize("depth", [150, 990, 100_000])
def test_deep_headers_are_refused(tmp_path, depth):
    tree = '{"list":[' * depth + '{"value":1}' + "]}" * depth
    text = f'{{"format":"coupled_gmm","version":1,"package":"1","tree":{tree}}}'
    np.savez(tmp_path / "f.npz", header=np.array(text))
    refused(tmp_path / "f.npz", "nested in more than 100|not a file that")
    deep = 1
    for _ in range(depth):
        deep = [deep]
    with pytest.raises(ValueError, match="tree: is nested in more than 100"):
        saving.save(tmp_path / "g.npz", deep)


def test_values_that_this_precision_lacks_are_named(tmp_path):
    with jax.enable_x64(True):
        saving.save(tmp_path / "f.npz", {"x": jnp.asarray([1e300]), "n": 1})
        saving.save(tmp_path / "g.npz", jnp.asarray([2**40]))
    refused(tmp_path / "f.npz", "holds values of float64 that float32 can't; enable float64")
    refused(tmp_path / "g.npz", "holds values of int64 that int32 can't; enable float64")


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "is a pipe or a device"),
        ("/dev/zero", "is a pipe"),
        (tmp_path, "is a folder"),
    ):
        refused(path, message)
        with pytest.raises(ValueError, match=message):
            saving.save(path, 1)
    with pytest.raises(ValueError, match="is no name of a file"):
        saving.load("a\0b")
    with pytest.raises(ValueError, match="is no name of a file"):
        saving.save("a\0b", 1)
    (tmp_path / "file").touch()
    for bad in (tmp_path / "absent" / "f.npz", tmp_path / "file" / "f.npz", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=re.escape(str(bad))):
            saving.save(bad, 1)
        with pytest.raises(OSError, match=re.escape(str(bad))):
            saving.load(bad)
    if os.geteuid():  # root may read everything
        (tmp_path / "file").chmod(0)
        with pytest.raises(PermissionError, match="can't be read"):
            saving.load(tmp_path / "file")


def test_pickle_never_runs(tmp_path):
    np.savez(tmp_path / "f.npz", header=saving._text({"format": saving.FORMAT}), a0=np.array([print], object))
    refused(tmp_path / "f.npz")


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        (np.ma.masked_array([1.0, 2], [True, False]), TypeError, "tree: can't save a masked array"),
        (jax.random.key(0), TypeError, "tree: can't save an array of dtype key"),
        (Status.CONVERGED, TypeError, "tree: can't save a Status"),
        ({"n": 10**5000}, ValueError, r"tree\['n'\]: can't save an integer of more than 1024 bits"),
    ],
)
def test_what_would_come_back_as_something_else_is_not_saved(tmp_path, tree, error, message):
    with pytest.raises(error, match=message):
        saving.save(tmp_path / "f.npz", tree)
    with pytest.raises(TypeError, match="tree: can't save a value under jit"):
        jax.jit(lambda x: saving.save(tmp_path / "f.npz", x))(1.0)
    assert not os.listdir(tmp_path)


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("kept")
    for name in ("f.npz.part", ".aa.part"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    saving.save(tmp_path / "f.npz", 1)
    monkeypatch.setattr("secrets.token_hex", lambda n: "aa")
    with pytest.raises(FileExistsError):
        saving.save(tmp_path / "f.npz", 2)
    assert (tmp_path / "precious").read_text() == "kept" and saving.load(tmp_path / "f.npz") == 1


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        saving.save(tmp_path / "f.npz", 1)
        assert (tmp_path / "f.npz").stat().st_mode & 0o777 == 0o640
        (tmp_path / "f.npz").chmod(0o600)
        saving.save(tmp_path / "f.npz", 2)
        assert (tmp_path / "f.npz").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_what_was(tmp_path, monkeypatch, error):
    saving.save(tmp_path / "f.npz", 1)

    def fail(file, arrays):
        file.write(b"half")
        raise error

    monkeypatch.setattr(archive, "_write_arrays", fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        saving.save(tmp_path / "f.npz", 2)
    assert os.listdir(tmp_path) == ["f.npz"] and saving.load(tmp_path / "f.npz") == 1


def test_threads_may_save_to_one_path(tmp_path):
    errors = []

    def work(value):
        try:
            for _ in range(30):
                saving.save(tmp_path / "f.npz", {"value": value, "x": np.full(1000, value)})
                found = saving.load(tmp_path / "f.npz")
                assert (found["x"] == found["value"]).all()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ["f.npz"]


@pytest.mark.slow
def test_processes_may_save_to_one_path(tmp_path):
    code = f"""
import numpy as np
from coupled_gmm.data import saving
for i in range(200):
    saving.save({str(tmp_path / "f.npz")!r}, np.full(10_000, i))
    assert len(set(saving.load({str(tmp_path / "f.npz")!r}).tolist())) == 1
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        assert run.communicate(timeout=120)[1] == "" and run.returncode == 0
    assert os.listdir(tmp_path) == ["f.npz"]


TREES = [LEGAL[name] for name in ("pair", "plan", "pair fit", "graph", "graph fit", "flow", "failed")]


class Fuzzer:
    """One damage or forgery a call; the name of its kind, and whether the file may still be a legal one."""

    def __init__(self, seed, folder):
        self.rng, self.path = np.random.default_rng(seed), folder / "f.npz"
        self.kinds = ("flip", "cut", "splice", "swap", "text", "node", "array", "compress", "directory")

    def __call__(self):
        tree = TREES[self.rng.integers(len(TREES))]
        saving.save(self.path, tree)
        kind = self.kinds[self.rng.integers(len(self.kinds))]
        return kind, tree, getattr(self, kind)()

    def flip(self):
        content = bytearray(self.path.read_bytes())
        for place in self.rng.integers(len(content), size=self.rng.integers(1, 4)):
            content[place] ^= 1 << self.rng.integers(8)
        self.path.write_bytes(content)

    def cut(self):
        content = self.path.read_bytes()
        self.path.write_bytes(content[: self.rng.integers(len(content))])

    def splice(self):
        content = bytearray(self.path.read_bytes())
        start, length = self.rng.integers(len(content)), self.rng.integers(1, 200)
        content[start : start + length] = self.rng.bytes(length) if self.rng.random() < 0.5 else bytes(length)
        self.path.write_bytes(content)

    def swap(self):
        header, arrays = read(self.path)
        one, other = self.rng.choice(sorted(arrays), 2, replace=False)
        arrays[one], arrays[other] = arrays[other], arrays[one]
        np.savez(self.path, header=saving._text(header), **arrays)

    def text(self):
        header, arrays = read(self.path)
        text = bytearray(json.dumps(header).encode())
        place = self.rng.integers(len(text))
        text[place : place + 1] = self.rng.choice([b"", b"9", b"[", b"}", b'"', b"-", b"\x01"])
        np.savez(self.path, header=np.array(text.decode()), **arrays)

    def node(self):
        """Some node of the header replaced, with right checksums."""
        header, arrays = read(self.path)
        spots = []

        def walk(node):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                spots.append((node, key))
                if isinstance(node[key], (dict, list)):
                    walk(node[key])

        walk(header)
        node, key = spots[self.rng.integers(len(spots))]
        other, name = spots[self.rng.integers(len(spots))]
        odd = [None, True, -1, 2.5, "x", "a0", [], {}, {"value": 1}, {"list": []}, {"array": "a1", "jax": True}]
        odd += [{"dict": 5}, 10**400, float("nan")]
        choice = self.rng.integers(len(odd) + 3)
        node[key] = copy.deepcopy(odd[choice] if choice < len(odd) else other[name])
        forged(self.path, header, arrays) if isinstance(header.get("tree"), dict) else self.text()
        return "perhaps legal"

    def array(self):
        """One array with another value, shape or type, with right checksums."""
        header, arrays = read(self.path)
        name = self.rng.choice(sorted(arrays))
        array = arrays[name].copy()
        match self.rng.integers(6):
            case 0:
                array = array[None]
            case 1:
                array = array.ravel()
            case 2:
                array = np.concatenate([array.ravel(), array.ravel()])
            case 3:
                array = array.astype(self.rng.choice(["f2", "f8", "i4", "i8", "u1", "c8", "?", ">f4"]))
            case 4:
                array = array.reshape(-1)[:0]
            case 5 if array.size:
                array.reshape(-1)[self.rng.integers(array.size)] = self.rng.choice([0, 1, 9, 100])
                array = array if self.rng.random() < 0.5 or array.dtype == bool else -array
        forged(self.path, header, {**arrays, name: array})
        return "perhaps legal"

    def compress(self):
        members = members_of(self.path)
        archived(self.path, members, int(self.rng.choice([8, 12, 14])))

    def directory(self):
        name = self.rng.choice(["version", "flags", "method", "packed", "size", "offset"])
        patched(self.path, **{name: int(self.rng.integers(2**16))})


def fuzzed(seed, folder, n):
    """Counts by kind and outcome; whatever is neither refused in one line, nor equal, nor legal, is a failure."""
    fuzz, counts = Fuzzer(seed, folder), {}
    for _ in range(n):
        kind, tree, perhaps_legal = fuzz()
        try:
            found = saving.load(fuzz.path)
        except ValueError:
            refused(fuzz.path)
            outcome = "refused"
        else:
            outcome = "equal" if same(found, tree) else "another legal one"
            assert outcome == "equal" or perhaps_legal, (kind, found)
            saving.save(fuzz.path, found)
            assert same(saving.load(fuzz.path), found)
        counts[kind, outcome] = counts.get((kind, outcome), 0) + 1
    return counts


def test_fuzzed_files_are_refused_or_equal(tmp_path):
    assert sum(fuzzed(0, tmp_path, 60).values()) == 60


@pytest.mark.slow
def test_many_fuzzed_files_are_refused_or_equal(tmp_path):
    counts = fuzzed(1, tmp_path, 4000)
    print(*(f"{kind:10} {outcome:18} {n}" for (kind, outcome), n in sorted(counts.items())), sep="\n")
