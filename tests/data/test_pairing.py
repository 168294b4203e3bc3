"""Columns of two clouds: paired by name from files and from tables in memory, or refused with both lists."""

import datetime
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import scipy.sparse

import coupled_gmm as cg
from coupled_gmm.core import checks, foreign
from coupled_gmm.data import clouds
from coupled_gmm.fits import coupled
from coupled_gmm.jobs import fit, terminal
from coupled_gmm.jobs.fit import FitConfig, FitJob
from coupled_gmm.jobs.registry import load_config
from coupled_gmm.jobs.sections import ConfigError

X = np.array([[1.5, 2.25], [-3.0, 0.5], [0.125, 4.0]])
REST = "\n[start]\nn_components = 1\n[fit]\ntransport_weight = 0.1\n"


def read(folder, text0, text1, keys="", ending=".csv"):
    """What the command line makes of two files and keys of [data]."""
    for name, content in (("a", text0), ("b", text1)):
        if isinstance(content, str):
            (folder / f"{name}{ending}").write_text(content)
        else:
            np.save(folder / f"{name}.npy", content)
    files = [("a.csv", "a.npy")[not isinstance(text0, str)], ("b.csv", "b.npy")[not isinstance(text1, str)]]
    path = folder / "c.toml"
    path.write_text(f'[data]\ncloud0 = "{files[0]}"\ncloud1 = "{files[1]}"\n{keys}\n{REST}')
    return FitJob().read(path, load_config(path, FitConfig))


XY = "x,y\n1.5,2.25\n-3.0,0.5\n0.125,4.0\n"
YX = "y,x\n2.25,1.5\n0.5,-3.0\n4.0,0.125\n"
BARE = XY.partition("\n")[2]


@pytest.mark.parametrize(
    ("text0", "text1", "keys", "names"),
    [
        (XY, XY, "", ("x", "y")),
        (XY, YX, "", ("x", "y")),
        (XY, YX.replace("y,x", "z,y,x").replace("\n2", "\n9,2").replace("\n0", "\n9,0").replace("\n4", "\n9,4"),
         'columns = ["x", "y"]', ("x", "y")),
        (XY, YX.replace("y,x", "y,x,w").replace("1.5", "1.5,1").replace("-3.0", "-3.0,2").replace("0.125", "0.125,3"),
         'weights1 = "w"', ("x", "y")),
        (BARE, BARE, "", None),
        (BARE, X, "", None),
        (X, X, "", None),
        ("0,1\n" + BARE, X, "", None),
        ("0,1\n" + BARE, "1,0\n" + YX.partition("\n")[2], "header = true", ("0", "1")),
    ],
)  # fmt: skip
def test_files_are_paired(tmp_path, text0, text1, keys, names):
    both = read(tmp_path, text0, text1, keys)
    for x in both.points:
        np.testing.assert_array_equal(x, X)
    assert both.names == names


@pytest.mark.parametrize(
    ("text0", "text1", "says"),
    [
        (XY, YX.replace("x", "z"), "has the features 'y', 'z', and cloud0 has 'x', 'y'; choose or name the same ones"),
        (XY, "x\n1\n", "has 1 features and cloud0 has 2; choose the same ones with columns (of 'x', and of 'x', 'y')"),
        (XY, BARE, "cloud0 names its features ('x', 'y') and cloud1 does not; name both or neither"),
        (BARE, XY, "cloud1 names its features ('x', 'y') and cloud0 does not; name both or neither"),
        (XY, X, "cloud0 names its features ('x', 'y') and cloud1 does not; name both or neither"),
        (XY, "0,1\n" + BARE, "has the features '0', '1', and cloud0 has 'x', 'y'; choose or name the same ones"),
        (X, X[:, :1], "has 1 features and cloud0 has 2; choose the same ones with columns"),
    ],
)
def test_files_that_do_not_pair_are_refused(tmp_path, text0, text1, says):
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/c.toml: data.cloud1: {says}")) as caught:
        read(tmp_path, text0, text1)
    assert len(str(caught.value).splitlines()) == 1


def test_an_order_put_right_is_said(tmp_path):
    both = read(tmp_path, XY, YX)
    assert list(both.notes) == ["cloud1: columns put into cloud0's order, x, y"]
    both = read(tmp_path, "id,x\n1,2\n2,5\n", "x\n3\n")
    assert both.notes[0].startswith("cloud0: left out 'id', which counts the rows")


def test_ambiguous_headers_name_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"data.cloud0: .*a\.csv: .*say which with header = true or header = false"):
        read(tmp_path, "0,1\n5,6\n", "0,1\n5,6\n")
    points, *_ = read(tmp_path, "0,1\n5,6\n", "0,1\n5,6\n", "header = false")
    np.testing.assert_array_equal(points[0], [[0, 1], [5, 6]])


def test_names_go_into_the_run(tmp_path, monkeypatch):
    """Into its configuration, and with it into the pictures."""
    both = read(tmp_path, XY, YX)
    monkeypatch.setattr(fit, "pooled_start", lambda *_: type("Start", (), {"n_steps": 1, "gmm": None}))
    monkeypatch.setattr(fit, "_pair", lambda *_: type("Pair", (), {"epsilon": 0.1}))
    monkeypatch.setattr(fit, "_fit_pair", lambda *_: None)
    path = tmp_path / "c.toml"
    config, _ = FitJob().solve(path, load_config(path, FitConfig), both, terminal.console())
    assert config.data.columns == ["x", "y"]


PANDAS = pytest.param("pandas", marks=pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="optional"))


def table(library, names, x=X):
    if library == "polars":
        return pl.DataFrame(x, schema=list(names))
    return pytest.importorskip("pandas").DataFrame(x, columns=list(names))


@pytest.mark.parametrize("library", ["polars", PANDAS])
def test_tables_in_memory_are_paired(library):
    """As `fit_pair`, `fit_graph` and the objective see them: before anything else is done."""
    x0, x1 = table(library, "xy"), table(library, "yx", X[:, ::-1])
    for one in foreign.same_features(["x0", "x1"], [x0, x1]):
        np.testing.assert_array_equal(checks.points("x", one), X)
    same = foreign.same_features(["a", "b", "c"], [None, X, x0])
    assert same[0] is None and same[1] is X
    start = cg.GaussianMixture.from_moments(np.zeros((1, 2)), np.eye(2)[None], [1.0])
    pair = cg.GaussianMixturePair(start, start, epsilon=0.1)
    graph = cg.MixtureGraph.from_mixtures([start, start], [(0, 1)], epsilon=0.1)
    other = table(library, "xz")
    says = "has the features 'x', 'z', and {} has 'x', 'y'; choose or name the same ones"
    for call, name in (
        (lambda: cg.fit_pair(x0, other, pair, transport_weight=0.1), "x0"),
        (lambda: cg.penalized_log_likelihood(pair, x0, other, transport_weight=0.1), "x0"),
        (lambda: cg.fit_graph([x0, other], graph), "clouds[0]"),
    ):
        with pytest.raises(ValueError, match=re.escape(says.format(name))):
            call()


def test_the_fit_sees_columns_in_one_order(monkeypatch):
    seen = {}

    def stop(names, points, *rest):
        seen["points"] = points
        raise KeyError("stopped by the test")

    monkeypatch.setattr(coupled.frame, "seen", stop)
    start = cg.GaussianMixture.from_moments(np.zeros((1, 2)), np.eye(2)[None], [1.0])
    pair = cg.GaussianMixturePair(start, start, epsilon=0.1)
    with pytest.raises(KeyError):
        cg.fit_pair(table("polars", "xy"), table("polars", "yx", X[:, ::-1]), pair, transport_weight=0.1)
    for x in seen["points"]:
        np.testing.assert_array_equal(x, X)


class AnnData:
    """Of which nobody may touch X: it is sparse, of 30,000 genes."""

    obsm: dict = {}  # noqa: RUF012

    @property
    def X(self):
        raise AssertionError("X was read")

    def __array__(self, *_, **__):
        raise AssertionError("made dense")


class Tensor:
    """A tensor of torch, as far as NumPy sees it."""

    __module__ = "torch"

    def __init__(self, array):
        self.array = array

    def detach(self):
        return self

    cpu = detach

    def __array__(self, *_, **__):
        if self.array is None:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array


@pytest.mark.parametrize(
    "value",
    [X.astype(">f8"), X.astype(">f4"), X.astype(np.longdouble), X.astype(np.float16), X.astype(object), np.ma.array(X),
     Tensor(X), pl.DataFrame(X), pl.DataFrame(X).cast(pl.Decimal(10, 3)), np.matrix(X), np.asfortranarray(X)],
    ids=["f8", "f4", "long double", "half", "object", "masked", "torch", "polars", "decimal", "matrix", "Fortran"],
)  # fmt: skip
def test_arrays_of_other_kinds(value):
    points = checks.points("x", value)
    np.testing.assert_array_equal(points, X)
    assert points.dtype.isnative and points.dtype in (np.float32, np.float64)


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (AnnData(), TypeError, 'expected an array, got AnnData; pass adata.obsm["X_pca"], say'),
        (scipy.sparse.csr_array(X), TypeError, "expected an array, got a sparse csr_array; pass x.toarray()"),
        (np.ma.masked_greater(X, 3), ValueError, "1 of 3 rows have masked values; drop those rows, or fill them in"),
        (Tensor(None), TypeError, "this tensor does not go to NumPy; pass x.detach().cpu().float().numpy()"),
        (np.array([[1, None]], object), TypeError, "expected real numbers, got dtype object with NoneType"),
        (np.array([["1", 2]], object), TypeError, "expected real numbers, got dtype object with str"),
        (X * 1j, TypeError, "expected real numbers, got dtype complex128"),
        (np.array([["2020"]], "datetime64[D]"), TypeError, "expected real numbers, got dtype datetime64[D]"),
        (jax.random.split(jax.random.key(0), 2)[:, None], TypeError, "expected real numbers, got dtype key<fry>"),
        (np.array([(1.0, 2.0)], "f8,f8"), TypeError, "has fields with names ('f0', 'f1'); make one array of its"),
        (np.array([[np.longdouble("1e400")]]), ValueError, "1 of 1 values exceed what float64 holds"),
        (pl.DataFrame({"a": [1, None], "b": [1, 2]}), ValueError, "values are missing in columns 'a' (1 of 2); drop"),
        (
            pl.DataFrame({"a": ["1"], "b": [True]}),
            TypeError,
            "expected real numbers, got columns 'a' (String), 'b' (Boolean); leave",
        ),
        (
            pl.DataFrame({"a": [datetime.date(2020, 1, 1)]}),
            TypeError,
            "expected real numbers, got columns 'a' (Date); leave them out",
        ),
        (pl.DataFrame(X).lazy(), TypeError, "expected a table, got a LazyFrame; pass x.collect()"),
    ],
)
def test_arrays_that_are_refused(value, kind, says):
    with pytest.raises(kind, match=re.escape(f"x: {says}")) as caught:
        checks.points("x", value)
    assert len(str(caught.value).splitlines()) == 1


def test_pandas():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X, columns=["a", "b"])
    for good in (frame, frame.astype("Float64"), frame.astype(object), frame.astype(pd.SparseDtype("float"))):
        np.testing.assert_array_equal(checks.points("x", good), X)
    np.testing.assert_array_equal(checks.weights("w", pd.Series([1, 2], dtype="Int64"), 2), [1, 2])
    for bad, kind, says in (
        (frame.mask(frame > 3), ValueError, r"values are missing in columns 'b' \(1 of 3\)"),
        (frame.astype("Float64").mask(frame > 3), ValueError, r"values are missing in columns 'b' \(1 of 3\)"),
        (frame.assign(b=[True, False, True]), TypeError, r"got columns 'b' \(bool\)"),
        (frame.assign(b=pd.Categorical([1.0, 2, 3])), TypeError, r"got columns 'b' \(category\)"),
    ):
        with pytest.raises(kind, match=says):
            checks.points("x", bad)


def test_float64_where_it_is_off():
    """Arrays are numbers like others; what programs compute with is refused by name."""
    moments = np.zeros((1, 2)), np.eye(2)[None], [1.0]
    with jax.enable_x64(True):
        x, gmm = jnp.asarray(X), cg.GaussianMixture.from_moments(*moments)
        pair = cg.GaussianMixturePair(gmm, gmm, epsilon=0.1)
    single = cg.GaussianMixture.from_moments(*moments)
    np.testing.assert_allclose(single.log_prob(x), single.log_prob(X), rtol=1e-6)
    assert cg.GaussianMixture.from_moments(gmm.means, gmm.covariances, gmm.weights).dtype == np.float32
    for name, call in (
        ("gmm", lambda: gmm.log_prob(X)),
        ("gmm", lambda: gmm.sample(jax.random.key(0), 3)),
        ("pair", lambda: cg.solve_plan(pair)),
        ("gmm0", lambda: cg.mw2_squared(gmm, gmm)),
        ("init", lambda: cg.fit_gmm(X, gmm)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: was made in float64, which JAX has disabled here"):
            call()
    for epsilon in (np.longdouble(0.5), np.array(0.5, ">f8"), pair.epsilon):
        cg.GaussianMixturePair(single, single, epsilon=epsilon)


def test_named_clouds_pair_without_files():
    one, other = clouds.Cloud(X, ("x", "y")), clouds.Cloud(X[:, ::-1], ("y", "x"))
    np.testing.assert_array_equal(clouds.paired(("a", "b"), one, other)[1].points, X)
