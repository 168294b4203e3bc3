"""Chains, stars and grids: which nodes they join, when, and what nodes are called."""

import numpy as np
import pytest
from problems import random_mixture

import coupled_gmm as cg

GMMS = [random_mixture(seed, 2, 2) for seed in range(6)]
PRICE = {"epsilon": 1.0}
NAMES = ["wt", "ko", "rescue"]


def edges(graph):
    return list(zip(np.asarray(graph.sources).tolist(), np.asarray(graph.targets).tolist()))


def test_common_graphs():
    chain, star = cg.chain(GMMS[:4], **PRICE), cg.star(GMMS[0], GMMS[1:4], **PRICE)
    assert edges(chain) == [(0, 1), (1, 2), (2, 3)] and edges(star) == [(0, 1), (0, 2), (0, 3)]
    np.testing.assert_array_equal(chain.times, range(4))
    assert star.times is None and star.names is None and chain.sizes == star.sizes == (2,) * 4
    grid = cg.grid([GMMS[:3], GMMS[3:]], times=[0, 2, 5], **PRICE)
    assert edges(grid) == [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]
    np.testing.assert_array_equal(grid.times, [0, 2, 5, 0, 2, 5])
    assert edges(cg.grid([GMMS[:3]], **PRICE)) == [(0, 1), (1, 2)]
    assert edges(cg.grid([[gmm] for gmm in GMMS[:3]], **PRICE)) == [(0, 1), (1, 2)]
    assert cg.chain(GMMS[:1]).n_edges == cg.grid([GMMS[:1]]).n_edges == 0


def test_nodes_have_times_and_names():
    graph = cg.MixtureGraph.from_mixtures(
        GMMS[:3], [("wt", "ko"), (2, "ko")], frozen=["ko"], names=NAMES, times=[1, 0, 4], edge_weights=[1, 2], **PRICE
    )
    assert edges(graph) == [(0, 1), (2, 1)] and graph.names == tuple(NAMES)
    np.testing.assert_array_equal(graph.frozen, [False, True, False])
    np.testing.assert_array_equal(graph.times, [1, 0, 4])
    ordered, _ = graph.in_node_order()
    np.testing.assert_array_equal(ordered.times, graph.times)
    options = {"names": NAMES, "frozen": ["rescue"], "node_weights": [1, 2, 3], "rho": 2.0, **PRICE}
    for built in (cg.chain(GMMS[:3], **options), cg.star(GMMS[0], GMMS[1:3], **options)):
        assert built.names == tuple(NAMES) and not built.balanced and bool(built.frozen[2])
        np.testing.assert_array_equal(built.node_weights, [1, 2, 3])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cg.chain(GMMS[:3], times=[0, 2, 2]), "^times: must increase along a chain, and 2 comes before 2"),
        (lambda: cg.chain(GMMS[:2], times=[1e9, 1e9 + 1]), "^times: must increase"),  # one number in float32
        (lambda: cg.chain(GMMS[:2], times=[0, np.nan]), "^times: 1 of 2 values are NaN"),
        (lambda: cg.chain(GMMS[:2], times=[0, 1, 2]), r"^times: expected shape \(2,\), got \(3,\)"),
        (lambda: cg.chain([]), "^gmms: the list is empty; a chain needs"),
        (lambda: cg.star(GMMS[0], []), "^gmms: the list is empty; a star needs"),
        (lambda: cg.grid([]), "^rows: there is no mixture in them"),
        (lambda: cg.grid([[]]), "^rows: there is no mixture in them"),
        (lambda: cg.grid([GMMS[:2], GMMS[:3]]), r"^rows: are of unequal length: rows\[0\] has 2 .* rows\[1\] has 3"),
        (lambda: cg.chain(GMMS[:3], names=["a", "b", "a"]), "^names: 'a' is the name of two nodes"),
        (lambda: cg.chain(GMMS[:3], names=["a", "b"]), "^names: expected one for each of the 3 nodes, got 2"),
        (
            lambda: cg.chain(GMMS[:3], names=NAMES, frozen=["KO"]),
            "^frozen: no node is called 'KO'; .*'wt', 'ko', 'rescue'$",
        ),
        (lambda: cg.chain(GMMS[:3], frozen=["wt"]), "^frozen: no node is called 'wt': they have no names"),
        (lambda: cg.MixtureGraph.from_mixtures(GMMS[:3], [("wt", "x")], names=NAMES), "^edges: no node is called 'x'"),
        (
            lambda: cg.MixtureGraph.from_mixtures(GMMS[:3], [("ko", 1)], names=NAMES),
            "^edges: .* joins a node to itself",
        ),
        (lambda: cg.MixtureGraph.from_mixtures(GMMS[:3], [(0, 1), ("ko", "wt")], names=NAMES), "^edges: .*already"),
    ],
)
def test_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_refused_types():
    for build, message in (
        (lambda: cg.chain(GMMS[:2], names=["a", 1]), r"^names\[1\]: expected a string"),
        (lambda: cg.chain(GMMS[:2], names="ab"), "^names: expected a list"),
        (lambda: cg.star(GMMS[:1], GMMS), "^centre: expected a GaussianMixture"),
        (lambda: cg.grid(GMMS), r"^rows\[0\]: expected a list"),
        (lambda: cg.chain(GMMS, weights=1), "unexpected keyword argument 'weights'"),
    ):
        with pytest.raises(TypeError, match=message):
            build()
