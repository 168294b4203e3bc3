"""`coupled-gmm fit` of many clouds: what a run leaves, that it is `fit_graph`, and what is refused by its key."""

import jax
import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import coupled_gmm as cg
from coupled_gmm import cli
from coupled_gmm.data.clouds import time_course_clouds
from coupled_gmm.jobs import batch
from coupled_gmm.jobs.graph import GraphConfig, GraphJob
from coupled_gmm.jobs.registry import job_for, load_config
from coupled_gmm.jobs.sections import ConfigError, dump

N = 80
CONFIG = """
[data]
clouds = ["d0.csv", "d1.csv", "d2.csv"]
weights = "w"
[graph]
times = [0, 1, 2.5]
names = ["a", "b", "c"]
[start]
n_components = 2
n_init = 2
[fit]
relative_weight = 0.05
relative_rho = 1.0
em_steps = 3
[output]
max_points_drawn = 30
"""
STAR = CONFIG.replace("times = [0, 1, 2.5]", 'kind = "star"').replace("= 2\nn_init", "= [2, 1, 2, 2]\nn_init")
FILES = ["clouds.png", "config.toml", "fidelity.csv", "fit.npz", "growth.csv", "history.csv", "mass_flow.png"]
FILES += ["masses.csv", "objective.png", "plan.csv"]


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three clouds with weights, the last one's columns in another order, and the run of them."""
    folder = tmp_path_factory.mktemp("course")
    clouds, _ = time_course_clouds(jax.random.key(0), N)
    draw = np.random.default_rng(0)
    for i, cloud in enumerate(clouds[1:4]):
        x, y = np.asarray(cloud, np.float64).T
        frame = pl.DataFrame({"x": x, "y": y, "w": draw.uniform(0.5, 1, N)})
        (frame.select("y", "w", "x") if i == 2 else frame).write_csv(folder / f"d{i}.csv")
    (folder / "c.toml").write_text(CONFIG)
    return folder, call("fit", folder / "c.toml", "--out", folder / "out")


@pytest.mark.slow
def test_a_run_leaves_its_folder_and_is_shown(run):
    folder, result = run
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (folder / "out").iterdir()) == FILES
    assert "clouds: 3 of 80 points of 2 features, float32" in result.stdout
    assert "clouds.2: columns put into the order of clouds.0, x, y" in result.stdout
    shown = call("show", folder / "out")
    assert shown.exit_code == 0 and shown.stdout[: shown.stdout.index("all steps")] in result.stdout
    assert "a, t 0 to b, t 1" in shown.stdout


@pytest.mark.slow
def test_it_is_the_fit_of_the_function(run):
    """By its own start: one mixture for all points, each cloud counting by their number."""
    folder, _ = run
    frames = [pl.read_csv(folder / f"d{i}.csv") for i in range(3)]
    clouds = [frame.select("x", "y").to_numpy() for frame in frames]
    weights = [frame["w"].to_numpy() for frame in frames]
    pooled, w = np.concatenate(clouds), np.concatenate([w / w.mean() for w in weights])
    init = cg.init_gmm(jax.random.key(0), pooled, 2, n_init=2, point_weights=w)
    start = cg.fit_gmm(pooled, init, point_weights=w).gmm
    graph = cg.chain([start] * 3, times=[0, 1, 2.5], relative_rho=1.0)
    fit = cg.fit_graph(clouds, graph, relative_weight=0.05, point_weights=weights, em_steps=3)
    found = cg.load(folder / "out" / "fit.npz")
    assert isinstance(found, cg.GraphFit) and found.names == ("a", "b", "c")
    np.testing.assert_allclose(found.penalized_log_likelihood, fit.penalized_log_likelihood, rtol=1e-6)
    np.testing.assert_array_equal(found.times, [0, 1, 2.5])


@pytest.mark.slow
def test_tables_add_up(run):
    """Masses of a node to 1; what becomes of a component to the factor, recomputed from the plan by NumPy."""
    folder, _ = run
    masses, growth, plan, fidelity = (
        pl.read_csv(folder / "out" / f"{name}.csv") for name in ("masses", "growth", "plan", "fidelity")
    )
    assert masses["node"].to_list() == [0, 0, 1, 1, 2, 2] and masses["name"].to_list() == list("aabbcc")
    np.testing.assert_allclose(masses.group_by("node").agg(pl.sum("mass"))["mass"], 1, rtol=1e-6)
    matrix = plan.filter(pl.col("from_node") == 1)["mass"].to_numpy().reshape(2, 2)
    of = {node: masses.filter(pl.col("node") == node)["mass"].to_numpy() for node in (1, 2)}
    change = (matrix / matrix.sum(0) * of[2]).sum(1) / of[1]
    here = growth.filter(pl.col("from_node") == 1)
    np.testing.assert_allclose(here["change"], change, rtol=1e-4)
    np.testing.assert_allclose(here["rate"], np.log(change) / 1.5, rtol=1e-3, atol=1e-5)
    assert (fidelity["loss"] > -1e-5).all() and len(pl.read_csv(folder / "out" / "history.csv")) == 3


@pytest.mark.slow
def test_the_configuration_as_run_runs_again(run):
    """It says where the data are, and which columns were taken; without pictures they go."""
    folder, _ = run
    as_run = folder / "out" / "config.toml"
    assert isinstance(job_for("fit", as_run), GraphJob)
    config = load_config(as_run, GraphConfig)
    assert config.data.columns == ["x", "y"] and config.data.clouds == [str(folder / f"d{i}.csv") for i in range(3)]
    (folder / "again.toml").write_text(as_run.read_text().replace("pictures = true", "pictures = false"))
    assert call("fit", folder / "again.toml", "--out", folder / "again").exit_code == 0
    one, other = (cg.load(folder / name / "fit.npz") for name in ("out", "again"))
    assert float(one.penalized_log_likelihood) == float(other.penalized_log_likelihood)


@pytest.mark.slow
def test_a_batch_of_such_configurations(run, tmp_path):
    """Which of the jobs of one word it is, is told from what they share, and from the first row of a resolved batch."""
    folder, _ = run
    text = CONFIG.replace("relative_rho = 1.0", "").replace("[output]\nmax_points_drawn = 30\n", "")
    (folder / "batch.toml").write_text(f'command = "fit"\n{text}[sweep]\nfit.relative_rho = [1.0, 2.0]\n')
    found = batch.load(folder / "batch.toml")
    assert isinstance(found.job, GraphJob) and [task.name for task in found.tasks] == [
        "relative_rho=1.0",
        "relative_rho=2.0",
    ]
    (tmp_path / "resolved.toml").write_text(found.dump())
    again = batch.load(tmp_path / "resolved.toml", resolved=True)
    assert isinstance(again.job, GraphJob) and batch.changed(found, again) is None


@pytest.mark.slow
@pytest.mark.slow
def test_a_star_has_a_centre_without_a_cloud(run):
    folder, _ = run
    (folder / "star.toml").write_text(STAR.replace("[start]", 'frozen = ["b"]\n[start]'))
    result = call("fit", folder / "star.toml", "--out", folder / "star")
    assert result.exit_code == 0, result.output
    fit = cg.load(folder / "star" / "fit.npz")
    assert fit.names == ("centre", "a", "b", "c") and fit.times is None
    assert [gmm.n_components for gmm in fit.gmms] == [2, 1, 2, 2]
    assert np.asarray(fit.edges).tolist() == [[0, 1], [0, 2], [0, 3]]
    assert pl.read_csv(folder / "star" / "fidelity.csv")["loss"].is_null().to_list() == [True, False, False, False]
    assert "q_0" not in pl.read_csv(folder / "star" / "history.csv").columns
    assert not (folder / "star" / "mass_flow.png").exists()


@pytest.mark.slow
def test_the_planted_course(tmp_path):
    """Rates of growth, and the masses, of `configs/time_course.toml`."""
    from problems import ROOT

    assert call("fit", ROOT / "configs" / "time_course.toml", "--out", tmp_path / "out").exit_code == 0
    fit = cg.load(tmp_path / "out" / "fit.npz")
    numbers = [np.exp(np.array([0.0, 0.5]) * since) for since in (1, 2, 3)]
    planted = [np.sort(n / n.sum()) for n in numbers]
    for gmm, masses in zip(fit.gmms[2:], planted, strict=True):
        np.testing.assert_allclose(np.sort(gmm.weights), masses, atol=0.03)  # 2,000 points: sd 0.011
    for growth in fit.growth()[2:]:
        low, high = np.sort(growth.rate)
        assert abs(high - low - 0.5) < 0.1


@pytest.mark.parametrize("text", [CONFIG, STAR], ids=["chain", "star"])
def test_configurations_survive_a_round_trip(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(text)
    config = load_config(path, GraphConfig)
    path.write_text(dump(config))
    assert load_config(path, GraphConfig) == config


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('names = ["a", "b", "c"]', 'kind = "grid"', "graph.kind: must be 'chain' or 'star', got 'grid'"),
        ("[0, 1, 2.5]", "[0, 1]", "graph.times: must be one for each of the 3 clouds, got 2"),
        ("[0, 1, 2.5]", "[0, 2, 1]", "graph.times: must increase, got [0.0, 2.0, 1.0]; name clouds and times in"),
        ("[0, 1, 2.5]", "[0, 1, inf]", "graph.times: must be finite, got [0.0, 1.0, inf]"),
        ("times", 'kind = "star"\ntimes', "graph.times: a star has none; remove it, or set kind = 'chain'"),
        ('["a", "b", "c"]', '["a", "b"]', "graph.names: must be one for each of the 3 clouds, got 2"),
        ('["a", "b", "c"]', '["a", "b", "a"]', "graph.names: must be words, all different"),
        (
            "names",
            'frozen = ["z"]\nnames',
            "graph.frozen.0: there is no node 'z'; numbers are 0 to 2, names a, b and c",
        ),
        ("names", "frozen = [3]\nnames", "graph.frozen.0: there is no node 3; numbers are 0 to 2"),
        ("names", "frozen = [0.5]\nnames", "graph.frozen.0: must be a node's name, or its number from 0, got 0.5"),
        (
            "= 2\nn_init",
            "= [1, 2]\nn_init",
            "start.n_components: must be one number, or one for each of the 3 nodes, got 2",
        ),
        ("= 2\nn_init", "= [1, 2, 0]\nn_init", "start.n_components: must be greater than or equal to 1"),
        (
            "= 2\nn_init",
            '= "two"\nn_init',
            "start.n_components: must be a valid integer, or a list of one for each node, got 'two'",
        ),
        ('weights = "w"', 'weights = ["w", "w"]', "data.weights: must be one for all, or one for each of the 3 clouds"),
        ('weights = "w"', "n = 3", "data.n: is for the built-in source; remove it, or set source"),
        ('weights = "w"', 'cloud0 = "a.csv"', "data.cloud0: unknown key; did you mean 'clouds'?"),
        ('"d1.csv"', '"d1.xls"', "data.clouds.1: can't read 'd1.xls'; use a file that ends in one of"),
        ('["d0.csv", "d1.csv", "d2.csv"]', '["d0.csv"]', "data.clouds: must have at least 2 items"),
        ("[data]", '[data]\nsource = "time_course"', "data.clouds: is for clouds from files; remove it, or remove"),
        ('clouds = ["d0.csv", "d1.csv", "d2.csv"]', "", "data.clouds: missing; name a file for each, or set source to"),
        ("relative_rho = 1.0", "relative_rho = 1.0\ntau = 0.5", "fit.relative_rho: tau and relative_rho say the same"),
        ("relative_rho = 1.0", 'freeze = ["gmm0"]', "fit.freeze: unknown key; [fit] has transport_weight,"),
    ],
)
def test_each_mistake_is_a_line_with_its_key(tmp_path, old, new, line):
    assert old in CONFIG
    path = tmp_path / "c.toml"
    path.write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(ConfigError) as refusal:
        load_config(path, job_for("fit", path).config)
    assert any(said.startswith(f"{path}: {line}") for said in str(refusal.value).splitlines()), refusal.value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("d1.csv", "absent.csv", "data.clouds.1: {folder}/absent.csv: no such file; check the name and the folder"),
        ("d1.csv", "odd.csv", "data.clouds.1: "),
        ('weights = "w"', 'weights = ["w", "v", "w"]', "data.weights.1: {folder}/d1.csv: there is no column 'v'"),
        ("= 2\nn_init", "= 500\nn_init", "start.n_components: "),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, old, new, line):
    folder, _ = run
    (folder / "odd.csv").write_text("x,z,w\n1,2,1\n3,4,1\n")
    (folder / "bad.toml").write_text(CONFIG.replace(old, new, 1))
    result = call("fit", folder / "bad.toml", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"{folder}/bad.toml: {line.format(folder=folder)}"), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_section_that_is_missing_is_asked_for(tmp_path):
    """Of clouds in a list, or of the built-in course, it is known that they want a graph."""
    for data in ('clouds = ["a.csv", "b.csv"]', 'source = "time_course"'):
        (tmp_path / "c.toml").write_text(f"[data]\n{data}\n[start]\nn_components = 2\n[fit]\nrelative_weight = 0.1\n")
        result = call("fit", tmp_path / "c.toml")
        assert (result.exit_code, result.stderr) == (2, f"{tmp_path}/c.toml: graph: missing; add a section [graph]\n")
