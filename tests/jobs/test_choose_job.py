"""`coupled-gmm choose`: what a run leaves, that what it chose can be fitted, and what is refused by its key."""

import tomllib

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import coupled_gmm as cg
from coupled_gmm import cli
from coupled_gmm.jobs.choose import Choose, ChooseConfig, ChooseGraphConfig, ChooseGraphJob, ChooseJob
from coupled_gmm.jobs.fit import FitConfig
from coupled_gmm.jobs.graph import GraphConfig
from coupled_gmm.jobs.registry import job_for, load_config
from coupled_gmm.jobs.sections import ConfigError

CONFIG = """
[data]
cloud0 = "a.csv"
cloud1 = "b.csv"
[choose]
n_components = [1, 2]
relative_weights = [0.01]
rhos = [1.0, inf]
folds = 2
n_init = 1
em_steps = 20
m_steps = 5
[output]
pictures = false
"""
COURSE = """
[data]
source = "time_course"
n = 60
[graph]
names = ["a", "b", "c", "d", "e"]
[choose]
n_components = [1, 2]
relative_weights = [0.01]
held_out = "nodes"
folds = 2
n_init = 2
em_steps = 200
tol = 1e-4
"""


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two clouds of two far components, and the choice between one and two."""
    folder, draw = tmp_path_factory.mktemp("choice"), np.random.default_rng(0)
    for name in "ab":
        x = draw.normal(size=(60, 1)) + 9 * draw.integers(2, size=(60, 1))
        pl.DataFrame({"x": x[:, 0]}).write_csv(folder / f"{name}.csv")
    (folder / "c.toml").write_text(CONFIG)
    return folder, call("choose", folder / "c.toml", "--out", folder / "out")


def test_a_run_leaves_its_folder_and_is_shown(run):
    folder, result = run
    assert result.exit_code == 0, result.output
    left = ["chosen.toml", "config.toml", "fit.npz", "history.csv", "plan.csv", "table.csv"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == left
    choice = cg.load(folder / "out" / "fit.npz")
    assert isinstance(choice, cg.Choice) and isinstance(choice.fit, cg.PairFit)
    assert choice.chosen["n_components"] == choice.fit.pair.gmm0.n_components == 2
    shown = call("show", folder / "out")
    assert shown.exit_code == 0 and shown.stdout[: shown.stdout.index("converged")] in result.stdout
    (marked,) = (line for line in shown.stdout.splitlines() if line.startswith(" chosen"))
    assert marked.split()[1:3] == ["2", f"{choice.chosen['relative_weight']:g}"]
    table = pl.read_csv(folder / "out" / "table.csv")
    assert len(table) == 8 and table["chosen"].to_list() == [row["chosen"] for row in choice.table]


def test_what_was_chosen_is_a_configuration_of_fit(run):
    """Its prices are those of the chosen row, in parts of the same mean cost; an infinite rho is left out."""
    folder, _ = run
    config = load_config(folder / "out" / "chosen.toml", FitConfig)
    choice = cg.load(folder / "out" / "fit.npz")
    assert (config.start.n_components, config.fit.relative_weight) == (2, choice.chosen["relative_weight"])
    rho = choice.chosen["rho"]
    assert config.fit.relative_rho == (None if np.isinf(rho) else 1.0) and config.fit.relative_epsilon == 0.01
    given = tomllib.loads((folder / "out" / "config.toml").read_text())["data"]
    assert config.data.columns == given["columns"] == ["x"] and config.data.cloud0 == str(folder / "a.csv")


def test_prices_are_read_off_the_row():
    """Rows are sizes, then epsilons, then rhos, each in rising order, and weights last."""
    section = Choose(n_components=[1, 2], epsilons=[0.1, 0.01], rhos=[np.inf, 1.0, 0.5])
    groups = np.repeat(np.arange(12), 3)
    for row, expected in ((0, (0.01, 0.5)), (3, (0.01, 1.0)), (6, (0.01, None)), (9, (0.1, 0.5)), (35, (0.1, None))):
        choice = type("Choice", (), {"groups": groups, "row": row, "chosen": {"relative_weight": 0.1}})()
        keys = section.fitted(choice)
        assert (keys["relative_epsilon"], keys.get("relative_rho")) == expected


@pytest.mark.slow
def test_of_a_course_whole_clouds_can_be_held_out(tmp_path):
    (tmp_path / "c.toml").write_text(COURSE)
    result = call("choose", tmp_path / "c.toml", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    choice = cg.load(tmp_path / "out" / "fit.npz")
    assert isinstance(choice.fit, cg.GraphFit) and choice.fit.names == ("a", "b", "c", "d", "e")
    np.testing.assert_array_equal(choice.fit.times, np.arange(5))
    for name in ("masses.csv", "mass_flow.png", "choice.png", "table.csv"):
        assert (tmp_path / "out" / name).exists()
    config = load_config(tmp_path / "out" / "chosen.toml", GraphConfig)
    assert config.start.n_components == choice.chosen["n_components"]
    assert call("fit", tmp_path / "out" / "chosen.toml", "--out", tmp_path / "fit").exit_code == 0


@pytest.mark.parametrize(
    ("good", "old", "new", "line"),
    [
        (CONFIG, "[1, 2]", "[1, 0]", "choose.n_components.1: must be greater than or equal to 1, got 0"),
        (CONFIG, "[1, 2]", "[]", "choose.n_components: must have at least 1 item"),
        (CONFIG, "[0.01]", "[-1.0]", "choose.relative_weights.0: must be greater than or equal to 0, got -1.0"),
        (CONFIG, "[1.0, inf]", "[0.0]", "choose.rhos.0: must be greater than 0, got 0.0"),
        (CONFIG, "[1.0, inf]", "[nan]", "choose.rhos.0: must be greater than 0, got nan"),
        (CONFIG, "folds = 2", "folds = 1", "choose.folds: must be greater than or equal to 2, got 1"),
        (
            CONFIG,
            "folds = 2",
            'rule = "luck"',
            "choose.rule: must be 'one_standard_error', 'best' or 'corner', got 'luck'",
        ),
        (CONFIG, "folds = 2", "fold = 2", "choose.fold: unknown key; did you mean 'folds'?"),
        (CONFIG, "[choose]", "[fit]", "fit: is not for `coupled-gmm choose`; run `coupled-gmm fit`"),
        (COURSE, "names", "frozen = [0]\nnames", "graph.frozen: is for mixtures that are there, and all of a choice"),
        (COURSE, '"e"]', '"e", "f"]', "graph.names: must be one for each of the 5 clouds, got 6"),
    ],
)
def test_each_mistake_is_a_line_with_its_key(tmp_path, good, old, new, line):
    assert old in good
    path = tmp_path / "c.toml"
    path.write_text(good.replace(old, new, 1))
    with pytest.raises(ConfigError) as refusal:
        load_config(path, job_for("choose", path).config)
    assert any(said.startswith(f"{path}: {line}") for said in str(refusal.value).splitlines()), refusal.value


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("[1, 2]", "[100]", "choose.n_components: 100 components, and the smallest cloud has 60 points; "),
        ("folds = 2", 'held_out = "nodes"', "choose.held_out: no node that has a cloud and is not frozen lies between"),
        ("b.csv", "absent.csv", "data.cloud1: {folder}/absent.csv: no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, old, new, line):
    folder, _ = run
    (folder / "bad.toml").write_text(CONFIG.replace(old, new, 1))
    result = call("choose", folder / "bad.toml", "--out", tmp_path / "out")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    assert result.stderr.startswith(f"{folder}/bad.toml: {line.format(folder=folder)}")


def test_which_job_it_is(tmp_path):
    path = tmp_path / "c.toml"
    for text, job, config in ((CONFIG, ChooseJob, ChooseConfig), (COURSE, ChooseGraphJob, ChooseGraphConfig)):
        path.write_text(text)
        found = job_for("choose", path)
        assert type(found) is job and isinstance(load_config(path, found.config), config)
