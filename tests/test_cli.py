"""The command line, end to end on small clouds: what a run leaves, and what each mistake says and returns."""

import dataclasses
import io
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from problems import ROOT
from rich.console import Console
from typer.testing import CliRunner

import coupled_gmm as cg
from coupled_gmm.cli import app
from coupled_gmm.core.progress import ProgressBar, table_header, table_row
from coupled_gmm.data.saving import load, save
from coupled_gmm.jobs import tables
from coupled_gmm.jobs.fit import FitConfig, FitJob
from coupled_gmm.jobs.registry import load_config

CONFIG = """
[data]
cloud0 = "a.csv"
cloud1 = "b.parquet"
weights1 = "w"

[start]
n_components = 2

[fit]
transport_weight = 0.1
rho = 1.0
em_steps = 3
m_steps = 3

[output]
max_points_drawn = 20
"""
FILES = ["clouds.png", "config.toml", "fit.npz", "history.csv", "objective.png", "plan.csv", "plan.png"]


def make_folder(folder):
    """Two clouds of 30 and 40 points, the second with weights, and a configuration."""
    draw = np.random.default_rng(0)
    for name, n in (("a", 30), ("b", 40)):
        x = draw.normal(size=(n, 2)) + 4 * draw.integers(2, size=(n, 1))
        frame = pl.DataFrame({"x": x[:, 0], "y": x[:, 1]})
        frame.write_csv(folder / f"{name}.csv")
        frame.with_columns(w=pl.Series(draw.uniform(0.5, 1, n))).write_parquet(folder / f"{name}.parquet")
    (folder / "c.toml").write_text(CONFIG)
    return folder


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("run"))
    return SimpleNamespace(
        folder=folder, out=folder / "out", result=call("fit", folder / "c.toml", "--out", folder / "out")
    )


def test_a_run_leaves_its_folder(run):
    assert run.result.exit_code == 0, run.result.output
    assert sorted(path.name for path in run.out.iterdir()) == FILES
    fit = load(run.out / "fit.npz")
    assert isinstance(fit, cg.PairFit)
    history = pl.read_csv(run.out / "history.csv")
    np.testing.assert_allclose(history["q0"], fit.history.q0, rtol=1e-5)
    assert history["step"].to_list() == [0, 1, 2]
    np.testing.assert_allclose(pl.read_csv(run.out / "plan.csv").drop("from").to_numpy(), fit.plan.matrix, rtol=1e-5)


def test_rows_are_printed_as_they_come_and_without_control_characters(run):
    lines = run.result.stdout.splitlines()
    start = lines.index(table_header())
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["0", "1", "2"]
    assert all(len(line) == len(table_header()) for line in lines[start : start + 4])
    assert "\x1b" not in run.result.stdout and "\r" not in run.result.stdout


def test_tables_say_masses_transfer_and_reweighting(run):
    text, fit = run.result.stdout, load(run.out / "fit.npz")
    outflow, _ = fit.plan.reweighting()
    for number in (*fit.pair.gmm0.weights, *fit.pair.gmm1.weights, *outflow):
        assert f"{float(number):.4f}" in text
    for words in (
        "Mass transfer",
        "outflow / mass in 0",
        "marginal error",
        "transport cost <P, C>",
        "regularised cost",
    ):
        assert words in text
    assert f"{float(fit.plan.total_mass):.6f}" in text
    assert f"run folder: {run.out}" in text


def test_show_prints_the_same_tables(run):
    shown = call("show", run.out)
    assert shown.exit_code == 0
    start = shown.stdout.index("Components of mixtures")
    end = shown.stdout.index("EM steps")
    assert shown.stdout[start:end] in run.result.stdout


def test_the_configuration_as_run_runs_again(run):
    config = load_config(run.out / "config.toml", FitConfig)
    assert config.data.cloud0 == str(run.folder / "a.csv")
    assert config.fit.epsilon == pytest.approx(float(load(run.out / "fit.npz").pair.epsilon))
    again = call("fit", run.out / "config.toml", "--out", run.folder / "again")
    assert again.exit_code == 0, again.output
    one, other = (load(folder / "fit.npz") for folder in (run.out, run.folder / "again"))
    np.testing.assert_allclose(one.plan.matrix, other.plan.matrix, rtol=1e-4, atol=1e-6)


def test_a_fit_that_does_not_converge_is_status_1(run):
    text = CONFIG.replace("[output]", "tol = 1e-12\n[output]").replace("[output]", "[output]\npictures = false")
    (run.folder / "tight.toml").write_text(text)
    result = call("fit", run.folder / "tight.toml", "--out", run.folder / "tight")
    assert result.exit_code == 1
    assert "the fit failed: the steps ran out before the tolerance was met" in result.stderr
    assert (run.folder / "tight" / "fit.npz").exists() and not (run.folder / "tight" / "plan.png").exists()


def test_a_fit_that_breaks_down_is_status_1_and_leaves_what_it_has(run):
    wanted = 'optimizer = "adam"\nlearning_rate = 1e8\n[output]'
    (run.folder / "wild.toml").write_text(CONFIG.replace("[output]", wanted))
    result = call("fit", run.folder / "wild.toml", "--out", run.folder / "wild")
    assert result.exit_code == 1
    assert "the fit failed: a value was not finite: raise ridge, lower the learning rate" in result.stderr
    assert sorted(path.name for path in (run.folder / "wild").iterdir()) == [f for f in FILES if "png" not in f]
    assert "nan" in call("show", run.folder / "wild").stdout


@pytest.mark.parametrize("status", [cg.Status.NOT_FINITE, cg.Status.COLLAPSED])
def test_a_start_that_failed_is_status_1_and_writes_nothing(run, monkeypatch, status):
    """The fit went on from it, and the run said "converged"."""
    fit_gmm = cg.fit_gmm
    monkeypatch.setattr(cg, "fit_gmm", lambda *a, **k: dataclasses.replace(fit_gmm(*a, **k), status=jnp.int32(status)))
    result = call("fit", run.folder / "c.toml", "--out", run.folder / "failed")
    assert result.exit_code == 1 and "run folder" not in result.stdout
    said = cg.MixtureFit._remedies.get(status, status.message)
    assert result.stderr == f"the fit failed: its start, one mixture for both clouds: {said}\n"
    assert not list((run.folder / "failed").iterdir())


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".npy"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_data_keep_their_digits(tmp_path, monkeypatch, ending, precision):
    """Whatever the precision of the fit: it centres them before it rounds them, and so does the fit of the start."""
    x = 2_459_000.5 + np.random.default_rng(0).normal(size=(30, 2))
    weights = np.linspace(1e-41, 1, 30)
    table = pl.DataFrame({"x": x[:, 0], "y": x[:, 1]})
    write = {".csv": table.write_csv, ".parquet": table.write_parquet, ".npy": lambda path: np.save(path, x)}[ending]
    write(tmp_path / f"a{ending}")
    np.save(tmp_path / "w.npy", weights)
    text = f"""data = {{cloud0 = "a{ending}", cloud1 = "a{ending}", weights1 = "w.npy"}}"""
    fit = f'''fit = {{transport_weight = 0.1, precision = "{precision}"}}'''
    (tmp_path / "c.toml").write_text(f"{text}\nstart = {{n_components = 2}}\n{fit}\n")
    seen = {}

    def record(name, result):
        def recorded(*arguments, **options):
            seen[name] = arguments, options
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(cg, name, recorded)

    gmm = cg.GaussianMixture.from_moments(np.zeros((2, 2)), np.stack([np.eye(2)] * 2), [0.5, 0.5])
    record("init_gmm", gmm)
    record("fit_gmm", SimpleNamespace(status=cg.Status.CONVERGED, gmm=gmm, n_steps=3))
    record("fit_pair", cg.FitError("stopped by the test"))
    assert call("fit", tmp_path / "c.toml", "--out", tmp_path / "out").exit_code == 1
    for cloud in seen["fit_pair"][0][:2]:
        assert cloud.dtype == np.float64
        np.testing.assert_array_equal(cloud, x)
    np.testing.assert_array_equal(seen["fit_pair"][1]["point_weights1"], weights)
    for name, pooled in (("init_gmm", seen["init_gmm"][0][1]), ("fit_gmm", seen["fit_gmm"][0][0])):
        np.testing.assert_array_equal(pooled, np.concatenate([x, x]))
        expected = np.concatenate([np.ones(30), weights / weights.mean()])
        np.testing.assert_allclose(seen[name][1]["point_weights"], expected, rtol=1e-12)


@pytest.mark.slow
def test_double_precision_and_adam(run):
    wanted = 'precision = "float64"\noptimizer = "adam"\nlearning_rate = 1e-3\n[output]\npictures = false'
    (run.folder / "double.toml").write_text(CONFIG.replace("[output]", wanted).replace("rho = 1.0\n", ""))
    result = call("fit", run.folder / "double.toml", "--out", run.folder / "double")
    assert result.exit_code == 0, result.output
    assert "2 features, float64" in result.stdout and "infinite (balanced)" in result.stdout
    shown = call("show", run.folder / "double")
    assert shown.stdout[: shown.stdout.index("all steps")] in result.stdout


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("rho", "rhoo", "fit.rhoo: unknown key; did you mean 'rho'?"),
        ("a.csv", "absent.csv", "data.cloud0: {folder}/absent.csv: no such file; check the name and the folder"),
        (
            "a.csv",
            "nan.csv",
            "data.cloud0: {folder}/nan.csv: column 'x' is infinite in 1 of 3 values, the first in row 3",
        ),
        ("a.csv", "wide.csv", "data.cloud1: has 2 features and cloud0 has 3; choose the same ones with columns"),
        ('weights1 = "w"', 'weights1 = "v"', "data.weights1: {folder}/b.parquet: there is no column 'v'"),
        ('weights1 = "w"', 'weights1 = "a.csv"', "data.weights1: {folder}/a.csv: expected one weight a point"),
        ('weights1 = "w"', 'weights0 = "y"', "data.weights0: {folder}/a.csv: "),
        ("n_components = 2", "n_components = 100", "start.n_components: "),
        (
            "[output]",
            '[output]\ndirectory = "{folder}/a.csv"',
            "output.directory: can't make the folder {folder}/a.csv",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, old, new, line):
    make_folder(tmp_path)
    (tmp_path / "nan.csv").write_text("x,y\n1,nan\n2,3\ninf,4\n")
    (tmp_path / "wide.csv").write_text("x,y,z\n1,2,3\n2,3,5\n")
    (tmp_path / "c.toml").write_text(CONFIG.replace(old, new.format(folder=tmp_path), 1))
    place = () if "directory" in new else ("--out", tmp_path / "out")
    result = call("fit", tmp_path / "c.toml", *place)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{tmp_path}/c.toml: {line.format(folder=tmp_path)}")
    assert len(result.stderr.splitlines()) == 1


def test_show_refuses_what_is_no_run(tmp_path):
    result = call("show", tmp_path)
    assert (result.exit_code, result.stderr[: len(str(tmp_path)) + 18]) == (2, f"{tmp_path}: not a run folder")
    save(tmp_path / "fit.npz", np.zeros(3))
    result = call("show", tmp_path)
    assert result.exit_code == 2 and "holds a ndarray, which is not a run's result" in result.stderr
    (tmp_path / "fit.npz").write_bytes(b"broken")
    result = call("show", tmp_path)
    assert result.exit_code == 2 and "or a damaged one" in result.stderr


def test_a_missing_configuration_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "coupled_gmm.cli", "fit", str(tmp_path / "absent.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}/absent.toml: no such file; check the name and the folder\n"


CONFIGS = ROOT / "configs"
BARYCENTER = """
[[mixtures]]
file = "two.npz"
[[mixtures]]
means = [[3.0, 0.0], [3.0, 2.0], [5.0, 1.0]]
covariances = [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.3], [0.3, 1.0]], [[0.5, 0.0], [0.0, 2.0]]]
weights = [0.5, 0.25, 0.25]
coefficient = 3
[start]
n_components = 2
n_init = 4
"""
FLOW = """
[source]
file = "two.npz"
[[targets]]
means = [[3.0, 0.0]]
covariances = [[[1.0, 0.3], [0.3, 1.0]]]
weights = [1.0]
[flow]
steps = 8
step_size = 0.5
"""


def make_mixtures(folder):
    """Files of mixtures, and of what is none."""
    two = cg.GaussianMixture.from_moments([[0.0, 0.0], [0.0, 2.0]], np.tile(np.eye(2), (2, 1, 1)), [0.4, 0.6])
    save(folder / "two.npz", two)
    save(folder / "three_features.npz", cg.GaussianMixture.from_moments(np.zeros((1, 3)), np.eye(3)[None], [1.0]))
    save(folder / "array.npz", np.zeros(3))
    (folder / "broken.npz").write_bytes(b"broken")
    (folder / "b.toml").write_text(BARYCENTER)
    (folder / "f.toml").write_text(FLOW)
    return folder


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """The barycenter and the flow of small mixtures, run."""
    folder = make_mixtures(tmp_path_factory.mktemp("moved"))
    results = {job: call(job, folder / f"{job[0]}.toml", "--out", folder / job) for job in ("barycenter", "flow")}
    return SimpleNamespace(folder=folder, **results)


def test_a_barycenter_leaves_its_folder(moved):
    assert moved.barycenter.exit_code == 0, moved.barycenter.output
    out = moved.folder / "barycenter"
    names = ["barycenter.png", "config.toml", "fit.npz", "given.npz", "history.csv", "mixture.csv", "objective.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    fit, gmms = load(out / "fit.npz"), load(out / "given.npz")
    distances = [float(cg.mw2_squared(fit.gmm, gmm)) for gmm in gmms]
    assert float(fit.objective) == pytest.approx((distances[0] + 3 * distances[1]) / 4, rel=1e-5)
    assert pl.read_csv(out / "history.csv")["objective"][-1] == pytest.approx(float(fit.objective))
    table = pl.read_csv(out / "mixture.csv")
    np.testing.assert_allclose(table["mean_1"], fit.gmm.means[:, 1], rtol=1e-6)
    np.testing.assert_allclose(table["covariance_1_0"], fit.gmm.covariances[:, 0, 1], rtol=1e-5)
    text = moved.barycenter.stdout
    for number in (*np.ravel(fit.gmm.means), *fit.gmm.weights):
        assert f"{float(number):.4f}" in text
    for words in ("2 and 3 components of 2 features, float32", "best of 4 starts", f"{float(fit.objective):.6f}"):
        assert words in text


def test_a_flow_leaves_its_folder(moved):
    assert moved.flow.exit_code == 0, moved.flow.output
    out = moved.folder / "flow"
    names = ["config.toml", "fit.npz", "flow.gif", "flow.png", "given.npz", "history.csv", "loss.png", "mixture.csv"]
    assert sorted(path.name for path in out.iterdir()) == names
    fit, (target,) = load(out / "fit.npz"), load(out / "given.npz")
    losses = pl.read_csv(out / "history.csv")["loss"].to_numpy()
    assert len(losses) == 9 and (np.diff(losses) <= 1e-5).all()
    for value, gmm in ((losses[0], load(moved.folder / "two.npz")), (losses[-1], fit.gmm)):
        assert value == pytest.approx(float(cg.mw2_squared(gmm, target)), abs=1e-5)
    assert f"{losses[0]:.5g}" in moved.flow.stdout and "all steps were done" in moved.flow.stdout


@pytest.mark.parametrize("job", ["barycenter", "flow"])
def test_show_prints_what_such_a_run_did(moved, job):
    shown, text = call("show", moved.folder / job), getattr(moved, job).stdout
    assert shown.exit_code == 0 and "Descent" in shown.stdout
    assert (
        shown.stdout.splitlines()[:-1] == text[: text.index("run folder")].splitlines()[-shown.stdout.count("\n") + 1 :]
    )


@pytest.mark.parametrize("job", ["barycenter", "flow"])
def test_such_a_configuration_as_run_runs_again(moved, job):
    config = moved.folder / job / "config.toml"
    config.write_text(config.read_text().replace("pictures = true", "pictures = false"))
    again = call(job, config, "--out", moved.folder / f"{job}_again")
    assert again.exit_code == 0, again.output
    one, other = (load(moved.folder / name / "fit.npz").gmm for name in (job, f"{job}_again"))
    np.testing.assert_array_equal(one.means, other.means)
    assert not list((moved.folder / f"{job}_again").glob("*.png"))


@pytest.mark.parametrize(("projection", "least"), [("joint", 8.744928), ("euclidean", 8.740154)])
def test_the_example_of_a_barycenter(tmp_path, projection, least):
    text = (CONFIGS / "barycenter.toml").read_text().replace('"joint"', f'"{projection}"')
    (tmp_path / "c.toml").write_text(text.replace("pictures = true", "pictures = false"))
    result = call("barycenter", tmp_path / "c.toml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert float(load(tmp_path / "out" / "fit.npz").objective) == pytest.approx(least, abs=2e-6)
    assert "converged" in result.stdout


def test_the_example_of_a_flow(tmp_path):
    text = (CONFIGS / "flow.toml").read_text()
    (tmp_path / "c.toml").write_text(text.replace("pictures = true", "pictures = false"))
    result = call("flow", tmp_path / "c.toml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    losses = load(tmp_path / "out" / "fit.npz").history.loss
    theirs = {0: 5.271783, 10: 2.179550, 50: 0.073408, 99: 0.019405}  # POT's, of the same start
    np.testing.assert_allclose([losses[step] for step in theirs], list(theirs.values()), atol=1e-4)


def test_a_flow_from_the_fit_of_another_run_with_entropic_plans_in_double_precision(moved):
    text = FLOW.replace("two.npz", "barycenter/fit.npz").replace("steps = 8", "steps = 2")
    (moved.folder / "c.toml").write_text(
        f'{text}method = "entropic"\nprecision = "float64"\n[output]\npictures = false\n'
    )
    result = call("flow", moved.folder / "c.toml", "--out", moved.folder / "entropic")
    assert result.exit_code == 0, result.output
    assert "2 components of 2 features, float64" in result.stdout
    shown = call("show", moved.folder / "entropic").stdout
    assert shown.splitlines()[:-1] == result.stdout[: result.stdout.index("run folder")].splitlines()[2:]


def test_a_descent_that_does_not_converge_is_status_1(tmp_path):
    make_mixtures(tmp_path)
    more = "[barycenter]\nmax_steps = 1\n[output]\npictures = false\n"
    (tmp_path / "c.toml").write_text(BARYCENTER + more)
    result = call("barycenter", tmp_path / "c.toml", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("the barycenter failed: the steps ran out before the tolerance was met")
    assert (tmp_path / "out" / "fit.npz").exists()


def test_a_flow_that_breaks_down_is_status_1_and_leaves_what_it_has(tmp_path):
    text = (CONFIGS / "flow.toml").read_text()
    (tmp_path / "c.toml").write_text(text.replace("step_size = 0.03", "step_size = 1e30"))
    result = call("flow", tmp_path / "c.toml", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("the flow failed: a value was not finite")
    assert (tmp_path / "out" / "fit.npz").exists() and not list((tmp_path / "out").glob("*.png"))
    assert "nan" in call("show", tmp_path / "out").stdout


@pytest.mark.parametrize(
    ("job", "old", "new", "line"),
    [
        ("barycenter", "two.npz", "absent.npz", "mixtures.0.file: {folder}/absent.npz: no such file"),
        ("barycenter", "two.npz", "array.npz", "mixtures.0.file: {folder}/array.npz: holds a ndarray; save a Gaussian"),
        ("barycenter", "two.npz", "broken.npz", "mixtures.0.file: {folder}/broken.npz: not a file that"),
        ("barycenter", "two.npz", "three_features.npz", "mixtures.1: has 2 features and mixtures.0 has 3; give"),
        ("barycenter", "0.25, 0.25]", "0.25]", "mixtures.1.weights: expected shape (3,), got (2,)"),
        ("barycenter", "0.25, 0.25]", "0.25, 0.5]", "mixtures.1.weights: must sum to 1 within 1e-3, got 1.25"),
        ("barycenter", "[3.0, 2.0]", "[3.0]", "mixtures.1.means: expected an array of shape (K, d), got rows of un"),
        ("barycenter", "[3.0, 2.0]", "[3.0, nan]", "mixtures.1.means: 1 of 6 values are NaN or infinite"),
        ("barycenter", "0.3, 1.0", "0.3, -1.0", "mixtures.1.covariances: component 1 is indefinite"),
        ("barycenter", "n_components = 2", "n_components = 6", "start.n_components: 6 are more than the mixtures' 5"),
        (
            "barycenter",
            "[start]\nn_components = 2\nn_init = 4",
            '[[start.mixtures]]\nfile = "two.npz"\n[[start.mixtures]]\nfile = "three_features.npz"',
            "start.mixtures.1: has 3 features and start.mixtures.0 has 2",
        ),
        (
            "barycenter",
            "[start]\nn_components = 2\nn_init = 4",
            '[[start.mixtures]]\nfile = "three_features.npz"',
            "start.mixtures.0: has 3 features, and the mixtures have 2",
        ),
        (
            "barycenter",
            "n_init = 4",
            'n_init = 4\n[barycenter]\nmethod = "entropic"\nlearn_weights = true',
            "barycenter.learn_weights: needs exact plans",
        ),
        ("barycenter", "[start]", "[begin]", "start: missing; add a section [start]"),
        ("flow", "two.npz", "three_features.npz", "source: has 3 features, and the target has 2"),
        ("flow", "two.npz", "absent.npz", "source.file: {folder}/absent.npz: no such file"),
        ("flow", "step_size = 0.5", "step_size = 1.5", "flow.step_size: must be above 0 and at most 1, got 1.5"),
        ("flow", "[[1.0, 0.3]", "[[1.0, 0.2]", "targets.0.covariances: component 0 is not symmetric"),
        ("flow", "[source]", "[fit]", "source: missing; add a section [source]"),
    ],
)
def test_bad_mixtures_are_one_line_and_status_2(tmp_path, job, old, new, line):
    make_mixtures(tmp_path)
    text = {"barycenter": BARYCENTER, "flow": FLOW}[job]
    assert old in text
    (tmp_path / "c.toml").write_text(text.replace(old, new, 1))
    result = call(job, tmp_path / "c.toml", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{tmp_path}/c.toml: {line.format(folder=tmp_path)}"), result.stderr
    assert len(result.stderr.splitlines()) == (2 if old in ("[start]", "[source]") else 1)


ROW = {
    "step": 7,
    "em_steps": 30,
    "q0": -3.758,
    "q1": -3.758,
    "transport": 0.558,
    "objective": -7.521,
    "penalized_log_likelihood": -7.5,
    "marginal_error": 2e-5,
}


def test_the_bar_shows_its_row_and_the_time_left_in_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with ProgressBar(console) as bar:
        for step in range(7, 10):
            bar(ROW | {"step": step})
    text = console.file.getvalue()
    assert "compiling the fit" in text and "EM step 9: objective -7.5210" in text and "10/30" in text
    assert text.count(table_header()) == 1 and table_row(ROW) in text


def rows_of(values, width=100):
    console = Console(file=io.StringIO(), width=width)
    with ProgressBar(console) as bar:
        for step, value in enumerate(values):
            bar(ROW | {"step": step, "em_steps": len(values), "objective": value, "marginal_error": 1e-5 * step})
    header, *lines = console.file.getvalue().splitlines()
    assert header == table_header() and len(header) <= 80
    return lines


def test_rows_that_say_nothing_new_are_left_out():
    """60 rows were printed, 45 of them equal."""
    lines = rows_of([-7.6 + 0.01 * min(step, 14) for step in range(60)])
    assert [int(line.split()[0]) for line in lines[:-1]] == [*range(12), 13, 15, 59]
    assert lines[-1] == "45 steps that said little more are left out here; the history has them"
    lines = rows_of(np.linspace(-9, -7, 400))  # crawling: no step is like the one before
    steps = [int(line.split()[0]) for line in lines[:-1]]
    assert len(steps) < 60 and steps[:10] == [*range(10)] and steps[-1] == 399
    assert len(rows_of([-7.6])) == 1 and len(rows_of(np.linspace(-9, -7, 10))) == 10


WEIGHTS = {"fidelity": None, "transport_weight": 0.01, "relative_weight": None}


@pytest.mark.parametrize(("width", "components"), [(10, 1), (10, 3), (40, 3), (60, 12), (80, 10), (120, 12)])
@pytest.mark.parametrize("tau", [1.0, 0.9])
def test_no_number_is_cut_on_a_narrow_console(width, components, tau):
    """K 10 on 80 columns, K 3 on 40: "0.0…"."""
    weights = np.full(components, 1 / components)
    gmm = SimpleNamespace(weights=weights, n_components=components)
    pair = SimpleNamespace(gmm0=gmm, gmm1=gmm, balanced=tau == 1, epsilon=1e-9, rho=np.array([1.234567, 7654321.0]))
    matrix = np.random.default_rng(0).dirichlet(np.ones(components**2)).reshape(components, -1)
    plan = SimpleNamespace(
        matrix=matrix, total_mass=1.0, transport_cost=12345.678901, regularized_cost=1.0, marginal_error=1e-6
    )
    plan.reweighting, plan.mass_change = lambda: (weights * 1234, weights), lambda: weights * 4321
    fit = SimpleNamespace(pair=pair, plan=plan, penalized_log_likelihood=-123456.789, n_steps=1, **WEIGHTS)
    console = Console(file=io.StringIO(), width=width)
    tables.print_sheets(console, FitJob().sheets(fit))
    text = console.file.getvalue()
    assert "…" not in text and console.width == width
    shown = text.split()
    for number in (*matrix.ravel(), *matrix.sum(0), *matrix.sum(1)):
        assert ("." if number < 5e-5 else f"{number:.4f}") in shown
    assert {"12345.678901", "-123456.789000"} <= set(shown)
    if width >= 60:
        assert max(map(len, text.splitlines())) <= width


def test_large_plans_are_listed_by_their_largest_transfers():
    draw = np.random.default_rng(0)
    gmm = cg.GaussianMixture.from_moments(
        draw.normal(size=(20, 2)), np.tile(0.01 * np.eye(2), (20, 1, 1)), np.ones(20) / 20
    )
    pair = cg.GaussianMixturePair(gmm, gmm, 0.01)
    fit = SimpleNamespace(pair=pair, plan=cg.solve_plan(pair), penalized_log_likelihood=0.0, n_steps=1, **WEIGHTS)
    console = Console(file=io.StringIO(), width=80)
    tables.print_sheets(console, FitJob().sheets(fit))
    text = console.file.getvalue()
    assert "the 20 largest of 400 (all are in plan.csv)" in text
    assert f"{float(fit.plan.matrix.max()):.4f}" in text
