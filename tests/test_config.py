"""Configurations: those in the repository are valid, and each mistake is one line with its key and what to do."""

import tomllib
from pathlib import Path

import pytest

from coupled_gmm.config import ConfigError, dump_config, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
GOOD = """
[data]
source = "tutorial"
[start]
n_components = 3
[fit]
transport_weight = 0.01
"""


def load(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_survive_a_round_trip(path, tmp_path):
    config = load_config(path)
    assert load(tmp_path, dump_config(config)) == config


def test_defaults_are_filled_in(tmp_path):
    config = load(tmp_path, GOOD)
    assert (config.data.n, config.data.seed) == (10_000, 0)
    assert config.output.directory == "runs/c"
    assert (config.fit.em_steps, config.fit.m_steps, config.fit.tol) == (30, 20, 0)
    assert tomllib.loads(dump_config(config))["fit"]["transport_weight"] == 0.01


def test_data_is_found_from_the_configuration(tmp_path):
    text = GOOD.replace(
        'source = "tutorial"', 'cloud0 = "a.csv"\ncloud1 = "/b.npy"\nweights0 = "w"\nweights1 = "w.npy"'
    )
    data = load(tmp_path, text).data
    assert (data.cloud0, data.cloud1) == (str(tmp_path / "a.csv"), "/b.npy")
    assert (data.weights0, data.weights1) == ("w", str(tmp_path / "w.npy"))


FILES = 'cloud0 = "a.csv"\ncloud1 = "b.csv"'


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("[fit]", "[fits]", "fits: unknown key; did you mean 'fit'? the sections are data, start, fit, output"),
        ("[start]\nn_components = 3", "", "start: missing; add a section [start]"),
        ("[data]", "data = 3\n[dat]", "data: must be a section [data], got 3"),
        ("n_components = 3", "", "start.n_components: missing; add it to [start]"),
        ("n_components = 3", "n_components = 0", "start.n_components: must be greater than or equal to 1, got 0"),
        ("n_components = 3", "n_components = 2.5", "start.n_components: must be a valid integer, got 2.5"),
        ("n_components = 3", "n_components = true", "start.n_components: must be a valid integer, got True"),
        (
            "n_components = 3",
            "n_components = 3\nN_init = 2",
            "start.N_init: unknown key; did you mean 'n_init'? [start] has n_components, seed, n_init, max_steps, tol",
        ),
        ('source = "tutorial"', "", "data.cloud0: missing; name a file, or set source to 'tutorial' or 'photographs'"),
        ('source = "tutorial"', 'cloud0 = "a.csv"', "data.cloud1: missing; name a file, or set source to 'tutorial'"),
        ('source = "tutorial"', 'source = "moons"', "data.source: must be 'tutorial' or 'photographs', got 'moons'"),
        ('source = "tutorial"', f"{FILES}\nn = 3", "data.n: is for built-in sources; remove it, or set source"),
        ('"tutorial"', f'"tutorial"\n{FILES}', "data.cloud0: is for clouds from files; remove it, or remove source"),
        ('source = "tutorial"', f"{FILES}\ncolumns = []", "data.columns: must have at least 1 item"),
        ('source = "tutorial"', f"{FILES}\ncolumns = [1]", "data.columns.0: must be a valid string, got 1"),
        (
            'source = "tutorial"',
            'cloud0 = "a.xls"\ncloud1 = "b.csv"',
            "data.cloud0: can't read 'a.xls'; use a file that ends in one of .npy, .npz, .csv, .parquet",
        ),
        ("0.01", "-1", "fit.transport_weight: must be greater than or equal to 0, got -1"),
        ("0.01", "nan", "fit.transport_weight: must be a finite number, got nan"),
        ("0.01", "'big'", "fit.transport_weight: must be a valid number, got 'big'"),
        ("0.01", "0.01\nepsilon = 0", "fit.epsilon: must be greater than 0, got 0"),
        ("0.01", "0.01\nepsilon = inf", "fit.epsilon: must be a finite number, got inf"),
        ("0.01", "0.01\ntau = 1.5", "fit.tau: must be less than or equal to 1, got 1.5"),
        ("0.01", "0.01\nrho = 0.0", "fit.rho: must be greater than 0, got 0.0"),
        ("0.01", "0.01\ntau = 0.5\nrho = 1", "fit.rho: tau and rho say the same thing; keep one of them"),
        ("0.01", "0.01\nem_steps = 0", "fit.em_steps: must be greater than or equal to 1, got 0"),
        ("0.01", '0.01\noptimizer = "sgd"', "fit.optimizer: must be 'default' or 'adam', got 'sgd'"),
        ("0.01", '0.01\noptimizer = "adam"', "fit.learning_rate: missing; optimizer = 'adam' needs it"),
        ("0.01", "0.01\nlearning_rate = 0.1", "fit.learning_rate: the default optimizer has none; remove it"),
        ("0.01", '0.01\nfreeze = ["gmm2"]', "fit.freeze.0: must be 'gmm0' or 'gmm1', got 'gmm2'"),
        ("0.01", '0.01\nmethod = "exact"', "fit.method: must be 'entropic' or 'sinkhorn', got 'exact'"),
        ("0.01", '0.01\nprecision = "float16"', "fit.precision: must be 'float32' or 'float64', got 'float16'"),
        ("0.01", '0.01\n[output]\npictures = "no"', "output.pictures: must be a valid boolean, got 'no'"),
        ("[fit]", "[fit", "not valid TOML:"),
    ],
)
def test_each_mistake_is_a_line_with_its_key(tmp_path, old, new, line):
    assert old in GOOD
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert any(found.startswith(f"{tmp_path / 'c.toml'}: {line}") for found in str(refusal.value).splitlines())


def test_all_mistakes_come_at_once(tmp_path):
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, GOOD.replace("0.01", "-1\nspeed = 3").replace("= 3\n[fit]", "= 0\n[fit]"))
    assert len(str(refusal.value).splitlines()) == 3


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file; check the name and the folder"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: can't be read"):
        load_config(tmp_path / "binary.toml")
