"""The graph of mixtures: what its constructors build and refuse, padding, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_mixture

import coupled_gmm as cg
from coupled_gmm.fits.frame import Frame
from coupled_gmm.gaussians import mixture
from coupled_gmm.gaussians.mixture import stack


def three():
    return [random_mixture(0, 2, 2), random_mixture(1, 3, 2), random_mixture(2, 1, 2)]


def test_from_mixtures(x64):
    gmms = three()
    weights = [0.5, 2.0]
    built = cg.MixtureGraph.from_mixtures(
        gmms, [(0, 1), (2, 1)], edge_weights=weights, tau=0.8, node_weights=[1, 2, 0], frozen=[2]
    )
    assert (built.n_nodes, built.n_edges, built.sizes, built.balanced) == (3, 2, (2, 3, 1), False)
    np.testing.assert_array_equal(built.sources, [0, 2])
    np.testing.assert_array_equal(built.targets, [1, 1])
    np.testing.assert_array_equal(built.edge_weights, weights)
    np.testing.assert_array_equal(built.node_weights, [1, 2, 0])
    np.testing.assert_array_equal(built.frozen, [False, False, True])
    epsilons = [cg.GaussianMixturePair(gmms[i], gmms[j]).epsilon for i, j in ((0, 1), (2, 1))]
    np.testing.assert_allclose(built.epsilon, epsilons)
    np.testing.assert_allclose(built.rho, 4 * np.asarray(epsilons))  # tau / (1 - tau) = 4
    one = cg.MixtureGraph.from_mixtures(gmms, [(0, 1), (1, 2)], edge_weights=0.3, epsilon=0.1)
    np.testing.assert_allclose(one.edge_weights, [0.3, 0.3])
    np.testing.assert_allclose(one.epsilon, [0.1, 0.1])
    assert one.balanced and np.isinf(one.rho).all() and (one.node_weights == 1).all() and not one.frozen.any()
    each = cg.MixtureGraph.from_mixtures(gmms, [(0, 1), (1, 2)], epsilon=[0.1, 0.2])
    np.testing.assert_allclose(each.epsilon, [0.1, 0.2])
    alone = cg.MixtureGraph.from_mixtures(gmms, [])
    assert alone.n_edges == 0 and alone.n_nodes == 3


def test_padding_is_of_weight_zero_and_changes_no_density(x64):
    gmms = three()
    nodes = stack(gmms)
    assert nodes.means.shape == (3, 3, 2) and nodes.covariances.shape == (3, 3, 2, 2) and nodes.weights.shape == (3, 3)
    x = np.random.RandomState(0).randn(5, 2)
    for i, gmm in enumerate(gmms):
        np.testing.assert_array_equal(nodes.weights[i, gmm.n_components :], 0)
    node = jax.tree.map(lambda a: a[2], nodes)
    log_prob = jax.jit(lambda gmm: gmm.log_prob(x))
    np.testing.assert_allclose(log_prob(node), log_prob(gmms[2]), rtol=1e-12)
    built = cg.MixtureGraph.from_mixtures(gmms, [(0, 1)])
    for back, gmm in zip(built.split(built.nodes), gmms, strict=True):
        jax.tree.map(np.testing.assert_array_equal, back, gmm)
    same = mixture.padded(gmms[1], 3)
    jax.tree.map(np.testing.assert_array_equal, same, gmms[1])


def test_parameters_and_back(x64):
    gmms = three()
    built = cg.MixtureGraph.from_mixtures(gmms, [(0, 1)], frozen=[1])
    origin = jnp.asarray([10.0, -3.0])
    seen = Frame(origin, jnp.zeros(2), jnp.asarray(1.0))
    parameters = seen.parameters(built.nodes, jnp.zeros((3, 2)))
    np.testing.assert_allclose(parameters.means + origin, built.nodes.means, rtol=1e-12)
    assert np.isneginf(np.asarray(parameters.log_weights[2])).sum() == 2
    again = seen.mixture(parameters, far=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), again, built.nodes)
    moved = parameters._replace(means=parameters.means + 1, factors=2 * parameters.factors)
    fitted = built.fitted(seen.mixture(moved, far=False))
    np.testing.assert_allclose(fitted.means[0, :2], built.nodes.means[0, :2] + 1, rtol=1e-12)
    np.testing.assert_allclose(fitted.covariances[2, :1], 4 * built.nodes.covariances[2, :1], rtol=1e-12)
    for i, size in enumerate(built.sizes):  # padding
        np.testing.assert_array_equal(fitted.weights[i, size:], 0)
    frozen = jax.tree.map(lambda a: a[1], fitted)
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.tree.map(lambda a: a[1], built.nodes))


def test_a_pair_is_a_graph_of_one_edge():
    gmms = three()
    for tau in (1.0, 0.5):
        pair = cg.GaussianMixturePair(gmms[0], gmms[1], 0.1, tau)
        built = cg.MixtureGraph.from_pair(pair, jnp.asarray(0.7), [True, False])
        assert built.sizes == (2, 3) and built.n_edges == 1 and built.balanced == (tau == 1)
        np.testing.assert_allclose([built.edge_weights[0], built.epsilon[0]], [0.7, 0.1], rtol=1e-6)
        np.testing.assert_array_equal(built.rho, [pair.rho])
        np.testing.assert_array_equal(built.frozen, [True, False])
        for back, gmm in zip(built.split(built.nodes), gmms[:2], strict=True):
            jax.tree.map(np.testing.assert_array_equal, back, gmm)
    single = cg.MixtureGraph.single(gmms[2])
    assert single.n_nodes == 1 and single.n_edges == 0 and single.sizes == (1,)


def test_what_is_swept_is_a_leaf():
    gmms = three()
    structures = {
        jax.tree.structure(cg.MixtureGraph.from_mixtures(gmms, [(0, 1)], edge_weights=w, epsilon=e, tau=t, frozen=frozen))
        for w in (0.1, 1) for e in (1.0, 0.01) for t in (0.5, 0.9) for frozen in ((), [0])
    }  # fmt: skip
    assert len(structures) == 1
    pair = cg.GaussianMixturePair(gmms[0], gmms[1])
    leaves, structure = jax.tree.flatten(pair)
    assert len(leaves) == 8
    assert jax.tree.unflatten(structure, [None] * 8).gmm0.means is None, "rebuilding checks nothing"


def test_prices_of_edges():
    edges, epsilon = [(0, 1), (2, 1)], np.array([0.1, 0.2], np.float32)

    def prices(**options):
        built = cg.MixtureGraph.from_mixtures(three(), edges, epsilon=epsilon, **options)
        return np.asarray(built.rho), built.balanced

    for given, expected in (
        (2.0, [2, 2]), ([1, 2], [1, 2]), ([[1, 2]], [[1, 2], [1, 2]]), ([[1, 2], [3, np.inf]], [[1, 2], [3, np.inf]]),
    ):  # fmt: skip
        rho, balanced = prices(rho=given)
        np.testing.assert_array_equal(rho, expected)
        assert not balanced
    for given in (np.inf, [np.inf, np.inf], [[np.inf, np.inf]]):
        assert prices(rho=given)[1] and prices(tau=np.where(np.isinf(given), 1, 0))[1]
    factors = np.array([1.0, 3.0])  # of tau / (1 - tau)
    np.testing.assert_allclose(prices(tau=0.75)[0], 3 * epsilon, rtol=1e-5)
    np.testing.assert_allclose(prices(tau=[0.5, 0.75])[0], factors * epsilon, rtol=1e-5)
    np.testing.assert_allclose(prices(tau=[[0.5, 0.75]])[0], factors * epsilon[:, None], rtol=1e-5)
    np.testing.assert_array_equal(prices(tau=[[0.5, 1.0]])[0][:, 1], np.inf)
    # Without epsilon, one tau is another rho for every edge; one rho is one.
    rho = cg.MixtureGraph.from_mixtures(three(), edges, tau=0.8).rho
    assert rho[0] != rho[1]
    np.testing.assert_array_equal(cg.MixtureGraph.from_mixtures(three(), edges, rho=0.8).rho, np.float32([0.8, 0.8]))


def test_mixtures_in_float32_make_graphs_in_float32(x64):
    gmms = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gmm) for gmm in three()]
    built = cg.MixtureGraph.from_mixtures(gmms, [(0, 1)], epsilon=0.1, edge_weights=0.3, tau=0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(built) if jnp.issubdtype(leaf.dtype, jnp.floating)} == {
        np.dtype("float32")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "gmms: the list is empty"),
        ((three, [(0, 3)]), r"edges: \(0, 3\) does not join two of the 3 nodes"),
        ((three, [(1, 1)]), r"edges: \(1, 1\) does not join two"),
        ((three, [(-1, 1)]), r"edges: \(-1, 1\) does not join two"),
        ((three, [(0, 1, 2)]), r"edges: \(0, 1, 2\) does not join two"),
        ((lambda: [*three(), random_mixture(0, 2, 3)], []), "2 features|3 features"),
    ],
)
def test_refused_graphs(arguments, message):
    gmms, edges = arguments
    with pytest.raises(ValueError, match=message):
        cg.MixtureGraph.from_mixtures(gmms() if callable(gmms) else gmms, edges)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": [3]}, "frozen: there is no node 3"),
        ({"frozen": [-1]}, "frozen: there is no node -1"),
        ({"edge_weights": -1.0}, "edge_weights: must be .*at least 0"),
        ({"edge_weights": [1.0, 2.0, 3.0]}, "edge_weights: expected one number or one for each of the 2 edges"),
        ({"epsilon": 0.0}, "epsilon: must be .*above 0"),
        ({"epsilon": [0.1, -0.1]}, "epsilon: must be .*above 0"),
        ({"epsilon": [0.1] * 3}, "epsilon: expected one number or one for each of the 2 edges"),
        ({"tau": 0.0}, "tau: must be above 0"),
        ({"rho": [1.0, 2.0, 3.0]}, r"rho: expected one number or one .* 2 edges, or two: \(1, 2\) or \(2, 2\), got"),
        ({"rho": [[1.0, 2.0, 3.0]] * 2}, "rho: expected one number or one for each"),
        ({"rho": [1.0, -2.0]}, "rho: must be above 0"),
        ({"rho": 1.0, "tau": 1.0}, "rho: given beside tau"),
        ({"tau": 1.1}, "tau: must be above 0 and at most 1"),
        ({"node_weights": [1.0, 2.0]}, "node_weights: expected shape"),
        ({"node_weights": [1.0, -2.0, 1.0]}, "node_weights: 1 weights are negative"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        cg.MixtureGraph.from_mixtures(three(), [(0, 1), (1, 2)], **options)


def test_not_a_mixture():
    with pytest.raises(TypeError, match=r"gmms\[1\]: expected a GaussianMixture"):
        cg.MixtureGraph.from_mixtures([three()[0], np.zeros(3)], [])
