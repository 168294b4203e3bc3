"""Configurations: those in the repository are valid, and each mistake is one line with its key and what to do."""

import tomllib

import numpy as np
import pytest
from problems import ROOT

from coupled_gmm.jobs.barycenter import BarycenterConfig
from coupled_gmm.jobs.fit import FitConfig
from coupled_gmm.jobs.flow import FlowConfig
from coupled_gmm.jobs.registry import COMMANDS, job_named, load_config
from coupled_gmm.jobs.sections import ConfigError, dump

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.toml") if path.stem != "batch")  # of one job each
GOOD = """
[data]
source = "tutorial"
[start]
n_components = 3
[fit]
transport_weight = 0.01
"""


MIXTURES = """
[[mixtures]]
example = "left"
[[mixtures]]
file = "b.npz"
coefficient = 2
[[mixtures]]
means = [[0.0, 1.0]]
covariances = [[[1.0, 0.0], [0.0, 1.0]]]
weights = [1.0]
"""
BARYCENTER = f"""{MIXTURES}
[start]
n_components = 3
[barycenter]
tol = 1e-6
"""
FLOW = """
[source]
file = "a.npz"
[[targets]]
example = "top"
[flow]
steps = 5
"""


def load(tmp_path, text, job=FitConfig):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_config(path, job)


@pytest.mark.parametrize(("key", "one", "two"), [("rho", "2", "[1, inf]"), ("tau", "0.5", "[0.5, 1.0]")])
def test_prices_of_mass_are_one_or_two(tmp_path, key, one, two):
    for text in (one, two):
        config = load(tmp_path, f"{GOOD}{key} = {text}")
        assert getattr(config.fit, key) == tomllib.loads(f"x = {text}")["x"]
        assert load(tmp_path, dump(config)) == config


def config_of(text):
    """Of the job that a configuration is for."""
    values = tomllib.loads(text)
    return job_named(next(command for command in COMMANDS if command in values), values).config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_survive_a_round_trip(path, tmp_path):
    job = config_of(path.read_text())
    config = load_config(path, job)
    assert load(tmp_path, dump(config), job) == config


def test_defaults_are_filled_in(tmp_path):
    config = load(tmp_path, GOOD)
    assert (config.data.n, config.data.seed) == (10_000, 0)
    assert config.output.directory == "runs/c"
    assert (config.fit.em_steps, config.fit.m_steps, config.fit.tol) == (30, 20, 0)
    assert tomllib.loads(dump(config))["fit"]["transport_weight"] == 0.01


def test_data_is_found_from_the_configuration(tmp_path):
    text = GOOD.replace(
        'source = "tutorial"', 'cloud0 = "a.csv"\ncloud1 = "/b.npy"\nweights0 = "w"\nweights1 = "w.npy"'
    )
    data = load(tmp_path, text).data
    assert (data.cloud0, data.cloud1) == (str(tmp_path / "a.csv"), "/b.npy")
    assert (data.weights0, data.weights1) == ("w", str(tmp_path / "w.npy"))


def test_mixtures_are_found_from_the_configuration_and_starts_have_defaults(tmp_path):
    config = load(tmp_path, BARYCENTER, BarycenterConfig)
    assert [member.coefficient for member in config.mixtures] == [1, 2, 1]
    assert config.mixtures[1].file == str(tmp_path / "b.npz")
    assert (config.start.seed, config.start.n_init) == (0, 10)
    assert (config.barycenter.projection, config.output.directory) == ("joint", "runs/c")
    assert load(tmp_path, dump(config), BarycenterConfig) == config
    given = BARYCENTER.replace("[start]\nn_components = 3", '[[start.mixtures]]\nexample = "middle"')
    start = load(tmp_path, given, BarycenterConfig).start
    assert (start.seed, start.n_init, len(start.mixtures)) == (None, None, 1)
    config = load(tmp_path, FLOW, FlowConfig)
    assert (config.source.file, config.flow.optimizer) == (str(tmp_path / "a.npz"), "geometric")
    assert load(tmp_path, dump(config), FlowConfig) == config


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
        ("0.01", "0.01\nrho = [1.0, 0.0]", "fit.rho: must be greater than 0, got 0.0"),
        ("0.01", "0.01\ntau = [0.5, 2]", "fit.tau: must be less than or equal to 1, got 2"),
        ("0.01", "0.01\nrho = [1.0]", "fit.rho: must be one number or two (of mixture 0 and of mixture 1), got [1.0]"),
        ("0.01", "0.01\nrho = [nan, 1.0]", "fit.rho: must be greater than 0, got nan"),
        ("0.01", "0.01\ntau = 'x'", "fit.tau: must be a valid number, got 'x'"),
        ("0.01", "0.01\ntau = true", "fit.tau: must be a valid number, got True"),
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
    assert_refused(tmp_path, GOOD, old, new, line, FitConfig)


def assert_refused(tmp_path, good, old, new, line, job):
    assert old in good
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, good.replace(old, new, 1), job)
    assert any(found.startswith(f"{tmp_path / 'c.toml'}: {line}") for found in str(refusal.value).splitlines())


MIXTURE_KEYS = "file, example, means, covariances, weights"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("[start]", "[starts]", "starts: unknown key; did you mean 'start'? the sections are mixtures, start, bary"),
        ('example = "left"', "", "mixtures.0.file: missing; name a file, or an example, or give means, covariances"),
        ('"b.npz"', '"b.npz"\nexample = "left"', "mixtures.1.example: the mixture has file already; keep one of them"),
        ('"b.npz"', '"b.npz"\nweights = [1.0]', "mixtures.1.weights: the mixture has file already; keep one"),
        ("weights = [1.0]", "", "mixtures.2.weights: missing; a mixture by its moments has means, covariances and w"),
        ("[[0.0, 1.0]]", '[[0.0, "x"]]', "mixtures.2.means.0.1: must be a valid number, got 'x'"),
        ("[[0.0, 1.0]]", "[0.0, 1.0]", "mixtures.2.means.0: must be a valid list, got 0.0"),
        ('"left"', '"up"', "mixtures.0.example: must be 'left', 'right', 'top' or 'middle', got 'up'"),
        (
            "coefficient",
            "coeficient",
            f"mixtures.1.coeficient: unknown key; did you mean 'coefficient'? [[mixtures]] has {MIXTURE_KEYS}, coeff",
        ),
        ("= 2", "= -1", "mixtures.1.coefficient: must be greater than or equal to 0, got -1"),
        (
            MIXTURES,
            '[mixtures]\nexample = "left"\n',
            "mixtures: must be a list of sections; write [[mixtures]], with two brackets, for each",
        ),
        (MIXTURES, "mixtures = []\n", "mixtures: must have at least 1 item"),
        (MIXTURES, "mixtures = [3]\n", "mixtures.0: must be a section [[mixtures]],"),
        (MIXTURES, "", "mixtures: missing; add a section [[mixtures]]"),
        (
            MIXTURES,
            '[[mixtures]]\nexample = "left"\ncoefficient = 0\n',
            "mixtures: all coefficients are zero; at least one must be positive",
        ),
        ("n_components = 3", "", "start.n_components: missing; say how many to draw, or give [[start.mixtures]]"),
        (
            "n_components = 3",
            'n_init = 3\n[[start.mixtures]]\nexample = "middle"',
            "start.n_init: is for starts that are drawn; remove it, or remove [[start.mixtures]]",
        ),
        (
            "[start]\nn_components = 3",
            '[[start.mixtures]]\nexample = "middle"\ncoefficient = 1',
            f"start.mixtures.0.coefficient: unknown key; [[start.mixtures]] has {MIXTURE_KEYS}",
        ),
        ("tol = 1e-6", 'projection = "two"', "barycenter.projection: must be 'joint', 'bures' or 'euclidean', got"),
        ("tol = 1e-6", "epsilon = 1.0", "barycenter.epsilon: exact plans have none; remove it, or set method = 'ent"),
        ("tol = 1e-6", "[output]\nmax_points_drawn = 3", "output.max_points_drawn: unknown key; [output] has direc"),
    ],
)
def test_mistakes_of_a_barycenter(tmp_path, old, new, line):
    assert_refused(tmp_path, BARYCENTER, old, new, line, BarycenterConfig)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('[source]\nfile = "a.npz"', "", "source: missing; add a section [source]"),
        ('file = "a.npz"', 'file = "a.npz"\ncoefficient = 1', "source.coefficient: unknown key; [source] has file, ex"),
        ('file = "a.npz"', "file = 3", "source.file: must be a valid string, got 3"),
        ("steps = 5", "steps = 0", "flow.steps: must be greater than or equal to 1, got 0"),
        ("steps = 5", "step_size = 0", "flow.step_size: must be greater than 0, got 0"),
        (
            "steps = 5",
            "mean_rate = 2.0",
            "flow.mean_rate: geometric steps have none; remove it, or set optimizer = 'ad",
        ),
        ("steps = 5", "epsilon = 0.1", "flow.epsilon: exact plans have none; remove it"),
        ("steps = 5", 'optimizer = "sgd"', "flow.optimizer: must be 'geometric' or 'adam', got 'sgd'"),
    ],
)
def test_mistakes_of_a_flow(tmp_path, old, new, line):
    assert_refused(tmp_path, FLOW, old, new, line, FlowConfig)


@pytest.mark.parametrize(("text", "job"), [(GOOD, FlowConfig), (FLOW, BarycenterConfig), (BARYCENTER, FitConfig)])
def test_a_configuration_of_another_job_says_which_to_run(tmp_path, text, job):
    with pytest.raises(ConfigError, match=rf"c\.toml: (\w+): is not for `coupled-gmm {job.command}`; run .*\1`$"):
        load(tmp_path, text, job)


def test_all_mistakes_come_at_once(tmp_path):
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, GOOD.replace("0.01", "-1\nspeed = 3").replace("= 3\n[fit]", "= 0\n[fit]"))
    assert len(str(refusal.value).splitlines()) == 3


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file; check the name and the folder"):
        load_config(tmp_path / "absent.toml", FitConfig)
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path, FitConfig)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: can't be read"):
        load_config(tmp_path / "binary.toml", FitConfig)


def refusal(tmp_path, text, job=FitConfig):
    """What is said of a configuration, without its name: short lines that a terminal can show."""
    path = tmp_path / "c.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path, job)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") and line.isprintable() and len(line) < 500 for line in lines)
    assert len(lines) <= 21
    return "\n".join(line.removeprefix(f"{path}: ") for line in lines)


DIGITS = "9" * 5001


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("freeze = {a = 1}", "fit.freeze: must be a valid list, got {'a': 1}"),
        ("m_steps = 1000000000000", "fit.m_steps: must be less than or equal to 1000000, got 1000000000000"),
        ("em_steps = 1000000000000", "fit.em_steps: must be less than or equal to 1000000, got 1000000000000"),
        ("chunk_size = 2147483648", "fit.chunk_size: must be less than or equal to 2147483647, got 2147483648"),
        (f"em_steps = {DIGITS}", "not valid TOML: an integer has too many digits; correct that value"),
        (
            f"em_steps = 0x{DIGITS}",
            "fit.em_steps: must be less than or equal to 1000000, got a number of some 6022 digits",
        ),
        (f"tol = {DIGITS[:4000]}", "fit.tol: must be a valid number, got a number of some 4001 digits"),
        (f"rho = {DIGITS[:4000]}", "fit.rho: must be a valid number, got a number of some 4001 digits"),
        (f"rho = [1, {DIGITS[:400]}]", "fit.rho: must be a valid number, got a number of some 401 digits"),
        ("tol = 1e400", "fit.tol: must be a finite number, got inf"),
        ("tau = nan", "fit.tau: must be greater than 0, got nan"),
        ("learning_rate = 2020-01-01", "fit.learning_rate: must be a valid number, got datetime.date(2020, 1, 1)"),
        ("a.b.c = 1", "fit.a: unknown key; [fit] has transport_weight, "),
        ("method.x = 1", "fit.method: must be 'entropic' or 'sinkhorn', got {'x': 1}"),
        (f"x = {'[' * 3000}", "not valid TOML: brackets are nested too deeply; take some away"),
        (f"x = {'{a=' * 3000}", "not valid TOML: brackets are nested too deeply; take some away"),
        (f"epsilon = '{'a' * 10**6}'", "fit.epsilon: must be a valid number, got 'aaaa"),
        (f'"\\u001b[31m{"k" * 10**6}" = 1', "fit.'\\x1b[31mkkkk"),
        ("freeze = ['\\u202e']", "fit.freeze.0: must be 'gmm0' or 'gmm1', got"),
        ("[[fit]]", "not valid TOML: Cannot overwrite a value"),
        (
            '[output]\ndirectory = "a\\u0000b"',
            "output.directory: a file name can't hold a NUL character, got 'a\\x00b'",
        ),
    ],
    ids=range(21),
)
def test_odd_values_are_refused_in_a_line(tmp_path, line, message):
    assert refusal(tmp_path, f"{GOOD}{line}\n").startswith(message)


@pytest.mark.parametrize("seed", [2**32, 2**63, 10**30, -1])
def test_seeds_are_those_that_differ(tmp_path, seed):
    """JAX's key of 2^32 is that of 0, and from 2^63 it has none."""
    for key in ("start", "data"):
        text = GOOD.replace(f"[{key}]", f"[{key}]\nseed = {seed}")
        assert refusal(tmp_path, text).startswith(f"{key}.seed: must be ")
    assert load(tmp_path, GOOD.replace("[start]", "[start]\nseed = 4294967295")).start.seed == 2**32 - 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("means = {a = 1}", "mixtures.0.means: must be a valid list, got {'a': 1}"),
        ("means = [[{a = 1}]]", "mixtures.0.means.0.0: must be a valid number, got {'a': 1}"),
        (f"means = {'[' * 200}{']' * 200}", "mixtures.0.means.0.0: must be a valid number, got [[[[...]]]]"),
        ('file = "a\\u0000.npz"', "mixtures.0.file: a file name can't hold a NUL character"),
        ("coefficient = 1e400", "mixtures.0.coefficient: must be a finite number, got inf"),
    ],
    ids=range(5),
)
def test_odd_values_of_mixtures_are_refused_in_a_line(tmp_path, line, message):
    text = f"[[mixtures]]\n{line}\n[start]\nn_components = 1\n"
    assert refusal(tmp_path, text, BarycenterConfig).startswith(message)


def test_columns_are_a_list(tmp_path):
    text = GOOD.replace('source = "tutorial"', f"{FILES}\ncolumns = {{a = 1}}")
    assert refusal(tmp_path, text) == "data.columns: must be a valid list, got {'a': 1}"


def test_texts_as_editors_write_them(tmp_path):
    path = tmp_path / "c.toml"
    for content in (b"\xef\xbb\xbf" + GOOD.encode(), GOOD.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        assert load_config(path, FitConfig) == load(tmp_path, GOOD)
    assert refusal(tmp_path, GOOD.encode("utf-16")) == "can't be read: it is not text in UTF-8; save it as that"


def test_files_without_end_and_mistakes_without_number(tmp_path):
    with pytest.raises(ConfigError, match=r"^/dev/zero: is larger than 10,000,000 bytes, so it is not a configuration"):
        load_config("/dev/zero", FitConfig)
    said = refusal(tmp_path, "\n".join(f"k{i} = 1" for i in range(1000)) + GOOD)
    assert said.endswith("and 980 mistakes more; correct these first")


def mutated(rng, text):
    """A configuration with some of its lines or characters changed, lost, doubled or swapped."""
    values = [
        "1",
        "-1",
        "0",
        "1e400",
        "nan",
        "true",
        "''",
        "'a'",
        "[]",
        "{}",
        "[[1]]",
        "{a=1}",
        "[{}]",
        "1979-05-27",
        DIGITS,
    ]
    values += ["'\\u0000'", '"\\u0000"', "[1,'a']", "2.5", "9223372036854775808", "'" + "x" * 3000 + "'", "[" * 900]
    for _ in range(rng.integers(1, 4)):
        lines = text.split("\n")
        i, j = rng.integers(len(lines), size=2)
        match rng.integers(6):
            case 0:
                lines[i] = lines[i].partition("=")[0] + "= " + values[rng.integers(len(values))]
            case 1:
                lines[i] = lines[i].replace("[", "[[").replace("]", "]]") if rng.random() < 0.5 else ""
            case 2:
                lines[i], lines[j] = lines[j], lines[i]
            case 3:
                lines.insert(i, lines[j])
            case 4:
                place = rng.integers(len(lines[i]) + 1)
                lines[i] = lines[i][:place] + rng.choice(list("[]{}=.\"'#,\x00\x1b\n19-")) + lines[i][place:]
            case 5:
                key = lines[i].partition("=")[0].strip() or "x"
                lines[i] = f"{key}.{rng.choice(['a', '0', 'mixtures', key])} = {values[rng.integers(len(values))]}"
        text = "\n".join(lines)
    return text


def fuzz(tmp_path, seed, n):
    """How many mutated configurations are still good; the others end in a ConfigError of short lines."""
    rng, good = np.random.default_rng(seed), 0
    shipped = [(path.read_text(), config_of(path.read_text())) for path in CONFIGS]
    shipped += [(FLOW, FlowConfig), (BARYCENTER, BarycenterConfig)]
    for _ in range(n):
        text, job = shipped[rng.integers(len(shipped))]
        text = mutated(rng, text)
        try:
            config = load(tmp_path, text, job)
            assert load(tmp_path, dump(config), job) == config
            good += 1
        except ConfigError:
            refusal(tmp_path, text, job)
    return good


def test_mutated_configurations_are_good_or_refused(tmp_path):
    assert 10 < fuzz(tmp_path, 0, 150) < 140


@pytest.mark.slow
def test_many_mutated_configurations_are_good_or_refused(tmp_path):
    print(fuzz(tmp_path, 1, 10_000), "of 10,000 are good")
