"""Batches before anything runs: which jobs a configuration is, and each mistake in a line that says where it was made."""

import datetime
import json
import os

import numpy as np
import polars as pl
import pytest
import tomli_w
from problems import ROOT

from coupled_gmm.jobs import batch
from coupled_gmm.jobs.batch import flattened, load
from coupled_gmm.jobs.fit import FitConfig
from coupled_gmm.jobs.registry import load_config
from coupled_gmm.jobs.sections import ConfigError, may_be_text

SHARED = """
[start]
n_components = 2
[fit]
transport_weight = 0.1
"""
TUTORIAL = SHARED + '[data]\nsource = "tutorial"\n'


def write(folder, text, name="b.toml"):
    path = folder / name
    path.write_text(text)
    return path


def fits(folder, jobs="", shared=SHARED, sweep=""):
    return load(write(folder, f'command = "fit"\n{jobs}\n{sweep}\n{shared}'))


def refused(folder, *args, **options):
    """Lines, without the configuration's folder."""
    with pytest.raises(ConfigError) as caught:
        fits(folder, *args, **options)
    lines = str(caught.value).splitlines()
    assert all(line.isprintable() and len(line) < 500 for line in lines)
    return [line.replace(f"{folder}/", "") for line in lines]


def keys(found, *names):
    """Values by dotted keys of each job."""
    return [tuple(flattened(task.values).get(name) for name in names) for task in found.tasks]


CSV = 'name,data.cloud0,data.cloud1,fit.transport_weight,fit.tau,data.columns\na,x.csv,y.csv,0.01,,"[""u"", ""v""]"\n'
CSV += 'b/c,x.csv,../z.npy,2,"[0.5, 1]",\n'


def test_rows_of_a_manifest_set_keys(tmp_path):
    """Files are found from the manifest's folder, an empty cell leaves what is shared."""
    (tmp_path / "m").mkdir()
    write(tmp_path / "m", CSV, "cohort.csv")
    found = fits(tmp_path, '[jobs]\nmanifest = "m/cohort.csv"')
    assert [task.name for task in found.tasks] == ["a", "b/c"]
    names = ("data.cloud0", "data.cloud1", "fit.transport_weight", "fit.tau", "data.columns")
    m = tmp_path / "m"
    assert keys(found, *names) == [
        (f"{m}/x.csv", f"{m}/y.csv", 0.01, None, ["u", "v"]),
        (f"{m}/x.csv", f"{tmp_path}/z.npy", 2.0, [0.5, 1.0], None),
    ]
    assert found.directory == os.path.join("runs", "b")


def test_each_job_is_the_configuration_that_it_would_be_alone(tmp_path):
    """The twin is `coupled-gmm fit` of a file with the same keys."""
    found = fits(tmp_path, shared=TUTORIAL, sweep='sweep."fit.tau" = [0.5, [0.9, 1]]\nsweep.data.seed = [3, 4]')
    assert [task.name for task in found.tasks] == [
        "tau=0.5 seed=3",
        "tau=0.5 seed=4",
        "tau=[0.9, 1] seed=3",
        "tau=[0.9, 1] seed=4",
    ]
    for task, (tau, seed) in zip(found.tasks, [("0.5", 3), ("0.5", 4), ("[0.9, 1]", 3), ("[0.9, 1]", 4)]):
        alone = write(tmp_path, TUTORIAL.replace("0.1\n", f"0.1\ntau = {tau}\n") + f"seed = {seed}\n", "one.toml")
        assert task.values == load_config(alone, FitConfig).model_dump(exclude={"output"}, exclude_none=True)
    assert len({task.digest for task in found.tasks}) == 4


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "semicolons", "bom"])
def test_manifests_as_programs_write_them(tmp_path, ending):
    rows = [
        {"name": "007", "data.source": "tutorial", "data.seed": 3, "fit.rho": "inf", "fit.precision": "float64"},
        {"name": "true", "data.source": "tutorial", "data.seed": None, "fit.rho": "[1.0, 2]", "fit.precision": None},
    ]
    frame, name = pl.DataFrame(rows), f"m.{ending}"
    match ending:
        case "parquet":  # of numbers with gaps, as pandas has them
            frame.with_columns(pl.col("data.seed").cast(pl.Float64)).write_parquet(tmp_path / name)
        case "tsv":
            frame.write_csv(tmp_path / name, separator="\t")
        case _:
            name = "m.csv"
            text = frame.write_csv(separator=";" if ending == "semicolons" else ",", include_bom=ending == "bom")
            (tmp_path / name).write_text(text.replace("\n", "\r\n"))
    found = fits(tmp_path, f'[jobs]\nmanifest = "{name}"')
    assert [task.name for task in found.tasks] == ["007", "true"]
    assert keys(found, "data.seed", "fit.rho", "fit.precision") == [
        (3, float("inf"), "float64"),
        (0, [1.0, 2.0], "float32"),
    ]


def test_files_are_paired_in_the_order_of_their_names(tmp_path):
    for name in ("s10_a.csv", "s2_a.csv", "s2_b.csv", "s10_b.csv", "other.txt"):
        (tmp_path / name).touch()
    (tmp_path / "dir_a.csv").mkdir()
    found = fits(tmp_path, '[jobs]\ncloud0 = "*_a.csv"\ncloud1 = "*_b.csv"')
    assert [task.name for task in found.tasks] == ["s10_a", "s2_a"]
    assert keys(found, "data.cloud1") == [(f"{tmp_path}/s10_b.csv",), (f"{tmp_path}/s2_b.csv",)]
    absent = fits(tmp_path, '[jobs]\ncloud0 = ["z/a.csv", "y/a.csv"]', shared=SHARED + '[data]\ncloud1 = "r.csv"\n')
    assert [task.name for task in absent.tasks] == ["z/a.csv", "y/a.csv"], "a file that is missing is its job's mistake"
    assert keys(absent, "data.cloud1") == [(f"{tmp_path}/r.csv",)] * 2


def test_rows_in_the_configuration_and_names_that_nobody_gave(tmp_path):
    text = '[[jobs.rows]]\n"data.source" = "tutorial"\n' * 11
    assert [task.name for task in fits(tmp_path, text).tasks][::10] == ["01", "11"]
    (only,) = fits(tmp_path, shared=TUTORIAL).tasks
    assert only.name == "fit"


def test_keys_of_lists_of_sections(tmp_path):
    text = 'command = "flow"\nsource.example = "left"\n[[targets]]\nexample = "top"\n[[targets]]\nexample = "right"\n'
    text += '[[jobs.rows]]\n"targets.1.example" = "left"\n[[jobs.rows]]\n"targets.0.coefficient" = 2\n'
    found = load(write(tmp_path, text))
    assert [[t["example"] for t in task.values["targets"]] for task in found.tasks] == [
        ["top", "left"],
        ["top", "right"],
    ]
    assert found.tasks[1].values["targets"][0]["coefficient"] == 2
    assert load(write(tmp_path, found.dump()), resolved=True).tasks == found.tasks


@pytest.mark.parametrize(
    "jobs",
    [
        'sweep."fit.rho" = [inf, [1, 2]]\nsweep."fit.precision" = ["float32", "float64"]\n' + TUTORIAL,
        '[jobs]\nmanifest = "m.csv"\nkeep = ["age", "arm"]\n' + SHARED,
        '[[jobs.rows]]\nname = "a"\n"data.cloud0" = "x.csv"\n[data]\ncloud1 = "y.csv"\n' + SHARED,
    ],
)
def test_a_resolved_batch_is_the_same_batch(tmp_path, jobs):
    write(tmp_path, 'name,age,arm,data.source,fit.tau\n"é, 1",3,x,tutorial,1\nb,,y,tutorial,"[1, 0.5]"\n', "m.csv")
    found = load(write(tmp_path, f'command = "fit"\n{jobs}'))
    (tmp_path / "elsewhere").mkdir()
    again = load(write(tmp_path / "elsewhere", found.dump()), resolved=True)
    assert again.tasks == found.tasks and again.dump() == found.dump() and again.directory == found.directory
    assert batch.changed(found, again) is None


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("0.1\n", "0.2\n", r"fit.transport_weight: is 0.2, and was 0.1 (job 'a')"),
        ("seed=1", "seed=2", "data.seed: is 2, and was 1 (job 'b')"),
        ("name='b'", "name='c'", "jobs: 'c' is new"),
        (", {name='b', seed=1}", "", "jobs: 'b' is gone"),
        ("{name='a'}, {name='b', seed=1}", "{name='b', seed=1}, {name='a'}", "jobs: are in another order"),
        ("0.1\n", "0.1\ntol = 0.0\n", None),
    ],
)
def test_a_change_is_told_by_its_key(tmp_path, old, new, told):
    text = f"command = 'fit'\njobs.rows = [{{name='a'}}, {{name='b', seed=1}}]\n{TUTORIAL}"
    assert old in text
    first, second = (
        load(write(tmp_path, one.replace("seed=", '"data.seed"='))) for one in (text, text.replace(old, new, 1))
    )
    assert batch.changed(first, second) == told


@pytest.mark.parametrize(
    ("csv", "lines"),
    [
        ("", ["b.toml: jobs.manifest: m.csv: is empty; write a line of column names, and a row for each job"]),
        ("name,fit.tau\n", ["b.toml: jobs.manifest: m.csv: has no rows; write one for each job"]),
        (
            "name,\na,1\n",
            ["b.toml: jobs.manifest: m.csv: column 2 has no name; give it the key that it sets, or remove"],
        ),
        ("fit.tau,fit.tau\n1,1\n", ["b.toml: jobs.manifest: m.csv: 2 columns are named 'fit.tau'; keep one of them"]),
        ("name,fit.tau\na,1\nb\n", ["b.toml: jobs.manifest: m.csv: row 2: 1 cells for 2 columns; correct that row"]),
        ("name\na\nb\na\n", ["m.csv: row 3: name: 'a' is that of m.csv: row 1 too; give each its own"]),
        ("name,fit.taw\na,1\nb,1\n", ["m.csv: fit.taw: unknown key; did you mean 'tau'? [fit] has transport_weight,"]),
        (
            "name,age\na,1\nb,1\n",
            ["m.csv: age: unknown key; the sections are data, start, fit, output; or list it in jobs"],
        ),
        (
            "name,output.pictures\na,true\n",
            ["m.csv: output.pictures: unknown key; jobs of a batch have none of that s"],
        ),
        ("name,data.a.b\na,1\n", ["m.csv: data.a: unknown key; [data] has source, n, seed"]),
        (
            "name,data.source.x\na,1\n",
            ["m.csv: data.source.x: there is no such place in what jobs share; correct the key"],
        ),
        (
            "name,fit.tau,fit.em_steps\na,2,1\nb,1,x\n",
            [
                "m.csv: row 1: fit.tau: must be less than or equal to 1, got 2",
                "m.csv: row 2: fit.em_steps: must be a valid integer, got 'x'",
            ],
        ),
        ("name,start.n_components\na,2.5\n", ["m.csv: row 1: start.n_components: must be a valid integer, got 2.5"]),
        ('name\n"a\n', ["b.toml: jobs.manifest: m.csv: can't be read (unexpected end of data)"]),
        ("name\na\0b\n", ["m.csv: row 1: name: must be a word or several, got 'a\\x00b'; give each job a name"]),
    ],
    ids=range(15),
)
def test_mistakes_in_a_manifest(tmp_path, csv, lines):
    write(tmp_path, csv, "m.csv")
    found = refused(tmp_path, '[jobs]\nmanifest = "m.csv"', shared=TUTORIAL)
    assert len(found) == len(lines)
    for line, start in zip(found, lines):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "m.parquet: no such file; check the name and the folder"),
        (b"", "m.parquet: can't be read ("),
        (b"PAR1" + bytes(100), "m.parquet: can't be read ("),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path, content, told):
    if content is not None:
        (tmp_path / "m.parquet").write_bytes(content)
    (line,) = refused(tmp_path, '[jobs]\nmanifest = "m.parquet"')
    assert line.startswith(f"b.toml: jobs.manifest: {told}")


def test_manifests_of_other_kinds(tmp_path):
    (tmp_path / "m.csv").write_bytes("name\né\n".encode("latin1"))
    (line,) = refused(tmp_path, '[jobs]\nmanifest = "m.csv"')
    assert line.startswith("b.toml: jobs.manifest: m.csv: can't be read (") and "utf-8" in line
    (tmp_path / "m.xlsx").touch()
    assert refused(tmp_path, '[jobs]\nmanifest = "m.xlsx"') == [
        "b.toml: jobs.manifest: m.xlsx: is no .csv, .tsv or .parquet file; save it as one"
    ]
    os.mkfifo(tmp_path / "p.csv")
    assert "is a pipe or a device" in refused(tmp_path, '[jobs]\nmanifest = "p.csv"')[0]


@pytest.mark.parametrize(
    ("jobs", "sweep", "line"),
    [
        ('[jobs]\ncloud0 = "*_a.csv"', "", "b.toml: jobs.cloud0: no file matches '*_a.csv' from "),
        (
            '[jobs]\ncloud0 = ["a.csv", "b.csv"]\ncloud1 = "c.csv"',
            "",
            "b.toml: jobs.cloud1: 1 files, and cloud0 has 2; name as many, or one for all jobs as data.cloud1",
        ),
        ('[jobs]\nmanifest = "m.csv"\ncloud0 = "a"', "", "b.toml: jobs.cloud0: jobs come from manifest already; keep"),
        ("[jobs]\nrows = []", "", "b.toml: jobs.rows: has no rows; write one for each job"),
        ("[jobs]\nrow = []", "", "b.toml: jobs.row: unknown key; did you mean 'rows'? [jobs] has manifest, keep"),
        ('[jobs]\nkeep = ["age"]', "", "b.toml: jobs.keep: names columns of a manifest, and there is none; remove it"),
        ('[jobs]\nrows=[{}]\nkeep = ["status"]', "", "b.toml: jobs.keep: the summary has a column 'status' of its own"),
        (
            '[jobs]\nrows=[{}]\nkeep = ["n_steps"]',
            "",
            "b.toml: jobs.keep: the summary has a column 'n_steps' of its own",
        ),
        (
            '[jobs]\nrows=[{}]\nkeep = ["fit.tau"]',
            "[sweep]\nfit.tau = [1]",
            "b.toml: jobs.keep: the summary has a column 'fit.tau' of its own",
        ),
        ("[[jobs.rows]]\nname = 3", "", "b.toml: jobs.rows.0: name: must be a word or several, got 3"),
        ("", "[sweep]\nfit.taw = [1]", "b.toml: sweep.fit.taw: unknown key; did you mean 'tau'?"),
        ("", '[sweep]\n"fit.tau" = 1', "b.toml: sweep.fit.tau: must be a list of values, got 1"),
        ("", '[sweep]\n"fit.tau" = []', "b.toml: sweep.fit.tau: must be a list of values, got []"),
        ("", '[sweep]\n"fit.tau" = [1, 2]', "b.toml: sweep.fit.tau: must be less than or equal to 1, got 2"),
        (
            "",
            '[sweep]\n"fit.tau" = [1, 1]',
            "b.toml: sweep.fit.tau: a value is there twice in [1, 1]; keep one of them",
        ),
        (
            '[[jobs.rows]]\n"fit.tau" = 1',
            '[sweep]\n"fit.tau" = [1]',
            "b.toml: sweep.fit.tau: rows set it too; keep one of them",
        ),
        (
            "",
            f'[sweep]\n"fit.em_steps" = {[*range(1, 1100)]}\n"fit.m_steps" = {[*range(1, 1100)]}',
            "b.toml: sweep: 1 rows and 1,207,801 combinations are too many jobs; take fewer",
        ),
        ("[output]\npictures = true", "", "b.toml: output.pictures: unknown key; [output] has directory"),
        ('[[jobs.rows]]\n"data.cloud0" = "a.xyz"', "", "b.toml: jobs.rows.0: data.cloud0: can't read 'a.xyz'; use a"),
    ],
    ids=range(19),
)
def test_mistakes_in_a_batch(tmp_path, jobs, sweep, line):
    shared = SHARED if "cloud" in jobs else TUTORIAL
    found = refused(tmp_path, jobs, sweep=sweep, shared=shared)
    assert found[0].startswith(line), found
    assert len(found) == 1


def test_a_mistake_in_what_jobs_share_is_said_once(tmp_path):
    sweep = "sweep.data.seed = [1, 2, 3]"
    found = refused(tmp_path, shared=TUTORIAL.replace("0.1", "-1").replace("= 2", "= 0"), sweep=sweep)
    assert len(found) == 2 and found[0].startswith("b.toml: start.n_components: must be")
    rows = "\n".join(['[[jobs.rows]]\n"fit.tau" = 2'] * 30)
    assert refused(tmp_path, rows, shared=TUTORIAL)[-1] == "b.toml: and 10 mistakes more; correct these first"


def test_which_jobs_these_are_is_said_first(tmp_path):
    for text, told in (
        (
            TUTORIAL + "[output]\npictures = true\n",
            "command: missing; say first which jobs these are, 'fit' or 'choose' or 'barycenter' or 'flow', or run that "
            "for one job",
        ),
        (f'command = "show"\n{TUTORIAL}', "command: must be 'fit' or 'choose' or 'barycenter' or 'flow', got 'show'"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(write(tmp_path, text))
        assert str(caught.value) == f"{tmp_path}/b.toml: {told}"
    with pytest.raises(ConfigError, match="command: is of many jobs, not of one; run `coupled-gmm batch`"):
        load_config(ROOT / "configs" / "batch.toml", FitConfig)


def test_names_that_are_not_utf8_are_refused(tmp_path):
    name = os.fsdecode(b"\xff_a.csv")
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    (line,) = refused(tmp_path, '[jobs]\ncloud0 = "*_a.csv"', shared=SHARED + '[data]\ncloud1 = "r.csv"\n')
    assert line.endswith("is not UTF-8 and can't be written down; rename it") and "\\udcff" in line


def test_the_example(tmp_path):
    found = load(ROOT / "configs" / "batch.toml")
    assert len(found.tasks) == 12 and found.tasks[0].name == "seed=0 transport_weight=0.01"
    assert load(write(tmp_path, found.dump())).tasks == found.tasks


def test_mutated_batches_are_good_or_refused(tmp_path):
    """Values of other kinds at every key, and keys in other places: a line, or jobs, never a traceback."""
    text = f"{SHARED}[data]\ncloud0 = 'a.csv'\n[jobs]\nkeep = ['age']\n"
    text += "rows = [{name = 'a', 'data.cloud1' = 'b.csv', age = 3}]\n[sweep]\nfit.tau = [0.5, 1]\n"
    values = [
        "1",
        "'x'",
        "[]",
        "{}",
        "[1]",
        "[[1]]",
        "{a = 1}",
        "[{}]",
        "true",
        "nan",
        "1979-05-27",
        "'\\u0000'",
        "9" * 400,
    ]
    names = ["command", "jobs.rows", "jobs", "sweep", "sweep.fit", "data", "fit.tau", "jobs.cloud0", "jobs.manifest"]
    draw, good = np.random.default_rng(0), 0
    for _ in range(300):
        lines = text.split("\n")
        i, name, value = draw.integers(len(lines)), draw.choice(names), draw.choice(values)
        match draw.integers(3):
            case 0:
                lines[i] = f"{lines[i].partition('=')[0]}= {value}"
            case 1:
                lines[i] = ""
            case 2:
                lines.insert(0, f"{name} = {value}")
        try:
            found = load(write(tmp_path, "command = 'fit'\n" + "\n".join(lines)))
            assert load(write(tmp_path, found.dump())).tasks == found.tasks
            good += 1
        except ConfigError as error:
            assert all(line.isprintable() and len(line) < 600 for line in str(error).splitlines())
    assert 20 < good < 280


def test_cells_of_text_are_told_from_numbers():
    """By what the key takes, not by what the cell looks like."""
    told = {key: may_be_text(key, FitConfig) for key in ("data.cloud0", "data.key0", "fit.method", "fit.tau", "data.n")}
    assert told == {"data.cloud0": True, "data.key0": True, "fit.method": True, "fit.tau": False, "data.n": False}
    assert not any(may_be_text(key, FitConfig) for key in ("", "x", "data", "data.columns", "x.y.z", "fit.tau.x"))


def test_columns_of_any_kind_are_kept(tmp_path):
    """As numbers or as words, which TOML and a summary can hold."""
    date, gone = datetime.date(2020, 1, 2), datetime.timedelta(1)
    columns = {"a": [date, None], "b": [gone, gone], "c": [[1, None], []], "d": [b"x", b""], "e": [1.5, float("nan")]}
    pl.DataFrame({"data.seed": [1, 2], **columns}).write_parquet(tmp_path / "m.parquet")
    found = fits(tmp_path, f'[jobs]\nmanifest = "m.parquet"\nkeep = {list(columns)}', shared=TUTORIAL)
    assert found.tasks[0].kept == {"a": "2020-01-02", "b": "1 day, 0:00:00", "c": "[1, None]", "d": "b'x'", "e": 1.5}
    again = load(write(tmp_path, found.dump()), resolved=True)
    assert again.tasks[0] == found.tasks[0] and repr(again.tasks) == repr(found.tasks)


def test_thousands_of_jobs(tmp_path):
    rows = [{"name": f"s{i}", "data.seed": i} for i in range(3000)]
    pl.DataFrame(rows).write_parquet(tmp_path / "m.parquet")
    found = fits(tmp_path, '[jobs]\nmanifest = "m.parquet"', shared=TUTORIAL)
    assert len({task.digest for task in found.tasks}) == 3000
    assert load(write(tmp_path, found.dump()), resolved=True).tasks == found.tasks


def test_values_survive_as_json_and_toml(tmp_path):
    """Digests are of JSON, and what is written down is TOML: both are read again as the same numbers."""
    values = [1e-300, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, 1]
    found = fits(tmp_path, shared=TUTORIAL, sweep=tomli_w.dumps({"sweep": {"fit.tol": values}}))
    assert [value for (value,) in keys(found, "fit.tol")] == values
    assert load(write(tmp_path, found.dump())).tasks == found.tasks
    assert json.loads(json.dumps(found.tasks[0].values)) == found.tasks[0].values
