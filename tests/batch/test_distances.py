"""`mw2_matrix` beside linear programmes of costs that eigenvalues give."""

import importlib.util
import types

import jax
import numpy as np
import ot
import pytest
from tasks import Losing

import coupled_gmm as cg
from coupled_gmm.batch import tiles


def mixture(rng, k, d, *, scale=1.0, offset=0.0, absent=0, rank=None, dtype=np.float32):
    factors = rng.normal(size=(k, d, d)) * 0.7
    if rank is not None:
        factors[..., rank:] = 0
    covariances = factors @ factors.transpose(0, 2, 1) + (0.05 if rank is None else 0) * np.eye(d)
    weights = rng.dirichlet(np.ones(k))
    if absent:
        weights[rng.choice(k, absent, replace=False)] = 0
        weights /= weights.sum()
    means = offset + scale * 2 * rng.normal(size=(k, d))
    return cg.GaussianMixture.from_moments(means.astype(dtype), (scale**2 * covariances).astype(dtype), weights)


def bures(m0, s0, m1, s1):
    values, vectors = np.linalg.eigh(s0)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ s1 @ root).clip(0)
    return ((m0 - m1) ** 2).sum() + np.trace(s0) + np.trace(s1) - 2 * np.sqrt(inner).sum()


def twin(one, other):
    """POT's linear programme in float64."""
    (m0, s0, a), (m1, s1, b) = (
        [np.asarray(leaf, np.float64) for leaf in (gmm.means, gmm.covariances, gmm.weights)] for gmm in (one, other)
    )
    cost = np.array([[bures(*x, *y) for y in zip(m1, s1)] for x in zip(m0, s0)])
    return ot.emd2(a / a.sum(), b / b.sum(), cost)


@pytest.mark.parametrize("d", [1, 2, 3, 8])
@pytest.mark.parametrize(("exactly", "by_pot"), [(False, True), (False, False), (True, False)])
def test_every_distance_is_the_linear_programme(d, exactly, by_pot, monkeypatch):
    if not by_pot:
        monkeypatch.setattr(tiles, "_pot_is_better", lambda dtype: False)
    rng = np.random.default_rng(d)
    with jax.enable_x64(exactly):
        dtype = np.float64 if exactly else np.float32
        sizes = [1, 2, 3, 5, 9, 20]
        gmms = [mixture(rng, k, d, absent=k // 4, dtype=dtype) for k in sizes]
        gmms += [mixture(rng, 4, d, rank=d - 1, dtype=dtype), gmms[3]]
        squares = np.asarray(cg.mw2_matrix(gmms))
        assert squares.dtype == dtype
        expected = np.array([[twin(one, other) for other in gmms] for one in gmms])
        # The twin's eigenvalues cancel where two components are close.
        np.testing.assert_allclose(squares, expected, rtol=1e-5, atol=(1e-7 if exactly else 1e-5) * expected.max())
        assert (squares == squares.T).all() and not squares.diagonal().any()
        assert 0 <= squares[3, -1] <= (1e-12 if exactly else 1e-5) * expected.max()  # an equal mixture elsewhere
        few = np.asarray(cg.mw2_matrix(gmms[:2], gmms[2:5]))
        np.testing.assert_allclose(few, expected[:2, 2:5], rtol=1e-5)


def test_it_is_mw2_squared_of_each_pair():
    rng = np.random.default_rng(0)
    gmms = [mixture(rng, k, 3) for k in (2, 3, 4)]
    squares = np.asarray(cg.mw2_matrix(gmms))
    each = [[float(cg.mw2_squared(one, other)) for other in gmms] for one in gmms]
    np.testing.assert_allclose(squares, each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_change_nothing_but_the_unit(scale):
    near = [mixture(np.random.default_rng(s), 3, 2) for s in range(4)]
    far = [mixture(np.random.default_rng(s), 3, 2, scale=scale) for s in range(4)]
    np.testing.assert_allclose(np.asarray(cg.mw2_matrix(far)) / scale**2, np.asarray(cg.mw2_matrix(near)), rtol=1e-4)


def test_an_offset_changes_nothing():
    with jax.enable_x64(True):
        near, far = (
            [mixture(np.random.default_rng(s), 3, 2, offset=offset, dtype=np.float64) for s in range(4)]
            for offset in (0, 1e6)
        )
        np.testing.assert_allclose(np.asarray(cg.mw2_matrix(far)), np.asarray(cg.mw2_matrix(near)), rtol=1e-7)


def test_far_mixtures_and_near_ones_in_one_list():
    """In one frame a float32 would know the components of those that are near to 0.06 only."""
    rng = np.random.default_rng(0)
    gmms = [mixture(rng, 5, 3, offset=offset) for offset in (0, 0, 1e6, 1e6)]
    gmms.append(cg.GaussianMixture.from_moments([[0.0] * 3, [1e6] * 3], [np.eye(3)] * 2, [0.5, 0.5]))
    squares = np.asarray(cg.mw2_matrix(gmms))
    expected = np.array([[twin(one, other) if one is not other else 0 for other in gmms] for one in gmms])
    np.testing.assert_allclose(squares, expected, rtol=1e-6)


def test_many_of_all_sizes_with_ties_tiny_weights_and_points():
    rng = np.random.default_rng(1)
    gmms = [mixture(rng, k, 3, absent=k // 4) for k in range(1, 31)]
    gmms += [
        cg.GaussianMixture.from_moments(rng.normal(size=(8, 3)), spread * np.array([np.eye(3)] * 8), w / w.sum())
        for w in (np.ones(8), np.ones(8), 10.0 ** rng.uniform(-9, 0, 8))
        for spread in (0, 0.1)
    ]
    squares = np.asarray(cg.mw2_matrix(gmms))
    assert (squares == squares.T).all() and not squares.diagonal().any()
    for i, j in [*rng.choice(len(gmms), (60, 2)), *np.argwhere(np.tri(6, k=-1)) + 30]:
        if i != j:
            np.testing.assert_allclose(squares[i, j], twin(gmms[i], gmms[j]), rtol=1e-5)


@pytest.mark.parametrize("fault", ["a plan that is not optimal", "a plan of other masses", "steps that ran out"])
def test_what_pot_does_not_settle_is_solved_by_other_means(fault, monkeypatch):
    gmms = [mixture(np.random.default_rng(s), 3, 2) for s in range(5)]
    alone = np.asarray(cg.mw2_matrix(gmms))
    calls = []

    def emd(a, b, cost, steps, **options):
        plan, log = ot.emd(a, b, cost, steps, **options)
        calls.append(fault)
        if fault == "a plan that is not optimal":
            plan = np.outer(a, b)
        elif fault == "a plan of other masses":
            plan = plan * (1 - 1e-3)
        else:
            log["result_code"] = 3
        return plan, log

    monkeypatch.setattr(tiles, "_pot", lambda: types.SimpleNamespace(emd=emd))
    np.testing.assert_allclose(np.asarray(cg.mw2_matrix(gmms)), alone, rtol=1e-6)
    assert len(calls) == 10


def test_without_pot_all_is_done_in_xla(monkeypatch):
    gmms = [mixture(np.random.default_rng(s), 3, 2) for s in range(3)]
    alone = np.asarray(cg.mw2_matrix(gmms))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    monkeypatch.setattr(tiles, "_by_pot", None)
    np.testing.assert_allclose(np.asarray(cg.mw2_matrix(gmms)), alone, rtol=1e-6)


def test_what_a_tile_raises_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 8)

    def fail(*args):
        raise MemoryError("a tile's")

    monkeypatch.setattr(tiles, "_by_pot", fail)
    with pytest.raises(MemoryError, match="a tile's"):
        cg.mw2_matrix([mixture(np.random.default_rng(s), 3, 2) for s in range(6)])


def test_one_list_of_any_length_and_single_components():
    one = mixture(np.random.default_rng(0), 1, 1)
    assert np.asarray(cg.mw2_matrix([one])).tolist() == [[0.0]]


def test_tiles_say_what_one_tile_says(monkeypatch):
    gmms = [mixture(np.random.default_rng(s), 1 + s % 7, 3) for s in range(12)]
    whole = np.asarray(cg.mw2_matrix(gmms))
    monkeypatch.setattr(tiles, "_TILE", 8)
    monkeypatch.setattr(tiles, "_FULL", 4)
    rows = []
    np.testing.assert_allclose(np.asarray(cg.mw2_matrix(gmms, progress=rows.append)), whole, rtol=1e-5, atol=1e-6)
    assert rows[-1]["done"] == rows[-1]["of"] == len(rows) > 1


def test_more_components_than_fit_a_compiled_programme():
    rng = np.random.default_rng(3)
    gmms = [mixture(rng, 70, 2), mixture(rng, 3, 2)]
    squares = np.asarray(cg.mw2_matrix(gmms))
    np.testing.assert_allclose(squares[0, 1], twin(*gmms), rtol=1e-5)


def test_an_executor_gives_the_same_and_what_it_loses_is_done_here(monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 8)
    gmms = [mixture(np.random.default_rng(s), 3, 2) for s in range(6)]
    alone = np.asarray(cg.mw2_matrix(gmms))
    with Losing(2) as pool, pytest.warns(UserWarning, match="a worker died"):
        assert (np.asarray(cg.mw2_matrix(gmms, executor=pool)) == alone).all()


def test_a_plan_without_a_certificate_is_named(monkeypatch):
    monkeypatch.setattr(tiles, "_pot_is_better", lambda dtype: False)
    monkeypatch.setattr(tiles, "_plans", lambda cost, a, b: (np.zeros(len(a)), np.zeros(len(a), bool)))
    monkeypatch.setattr(tiles, "_on_host", lambda cost, a, b: (0.0, False))
    gmms = [mixture(np.random.default_rng(s), 2, 2) for s in range(2)]
    with pytest.raises(cg.FitError, match=r"from gmms\[0\] to gmms\[1\]"):
        cg.mw2_matrix(gmms)


def test_refusals_name_the_argument():
    gmm, other = mixture(np.random.default_rng(0), 2, 2), mixture(np.random.default_rng(0), 2, 3)
    for arguments, named in (
        (([],), "gmms"),
        (([gmm, 3],), r"gmms\[1\]"),
        (([gmm, other],), r"gmms\[1\]"),
        (([gmm], [other]), r"others\[0\]"),
        (([gmm], []), "others"),
    ):
        with pytest.raises((ValueError, TypeError), match=named):
            cg.mw2_matrix(*arguments)
    with pytest.raises(TypeError, match="executor"):
        cg.mw2_matrix([gmm], executor=2)
    with pytest.raises(TypeError, match="progress"):
        cg.mw2_matrix([gmm], progress="yes")
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda gmm: cg.mw2_matrix([gmm, gmm]))(gmm)
