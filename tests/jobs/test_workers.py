"""Jobs of a batch as they are solved: real ones and their mistakes, and on Dask's workers, which may die."""

import os
import pickle
import signal
import subprocess
import sys
import time

import dask.config
import numpy as np
import polars as pl
import psutil
import pytest
from batches import CHEAP, COMMAND, configured, ended, n_parts, results, wait_for
from typer.testing import CliRunner

import coupled_gmm as cg
from coupled_gmm import cli
from coupled_gmm.jobs import batch, parts, workers
from coupled_gmm.jobs.sections import ConfigError

FITS = """
command = "fit"
[jobs]
manifest = "cohort.csv"
[data]
cloud1 = "b.csv"
columns = ["x", "y"]
[start]
n_components = 2
n_init = 2
[fit]
transport_weight = 0.1
epsilon = 0.1
em_steps = 3
m_steps = 3
"""
COHORT = """name,data.cloud0,fit.precision
good,b.csv,
double,b.csv,float64
absent,none.csv,
nan,nan.parquet,
column,column.csv,
broken,broken.npy,
folder,folder.csv,
last,a.csv,
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A folder of clouds, some of which can't be used."""
    folder = tmp_path_factory.mktemp("cohort")
    draw = np.random.default_rng(0)
    for name, n in (("a", 30), ("b", 40)):
        x = draw.normal(size=(n, 2)) + 4 * draw.integers(2, size=(n, 1))
        pl.DataFrame({"x": x[:, 0], "y": x[:, 1]}).write_csv(folder / f"{name}.csv")
    pl.DataFrame({"x": [0.0, 1.0, float("nan"), 2.0], "y": [1.0, 2.0, 3.0, 5.0]}).write_parquet(folder / "nan.parquet")
    (folder / "column.csv").write_text("x,z\n1,2\n3,5\n")
    (folder / "broken.npy").write_bytes(b"\x93NUMPY\x01")
    (folder / "folder.csv").mkdir()
    (folder / "cohort.csv").write_text(COHORT)
    (folder / "c.toml").write_text(FITS)
    return folder


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def fitted(cohort):
    return call("batch", cohort / "c.toml", "--out", cohort / "out")


def test_each_mistake_is_its_job_s_in_one_line_with_file_and_place(cohort, fitted):
    assert fitted.exit_code == 1, fitted.output
    table = pl.read_parquet(cohort / "out" / "summary.parquet")
    starts = {
        "good": "",
        "double": "",
        "absent": f"data.cloud0: {cohort}/none.csv: no such file; check the name and the folder",
        "nan": f"data.cloud0: {cohort}/nan.parquet: column 'x' lacks 1 of 4 values, the first in row 3; drop",
        "column": f"data.cloud0: {cohort}/column.csv: there is no column 'y'; it has 'x', 'z'",
        "broken": f"data.cloud0: {cohort}/broken.npy: columns are for .csv and .parquet files",
        "folder": f"data.cloud0: {cohort}/folder.csv: can't be read as .csv (it is no regular file); name a file",
        "last": "",
    }
    assert table["name"].to_list() == list(starts)
    for error, start in zip(table["error"], starts.values()):
        assert error.startswith(start) and bool(error) == bool(start) and "\n" not in error
    assert fitted.stdout.count(": failed: ") == 5 and fitted.stderr.startswith("the batch failed: 5 of 8 jobs; ")


def test_results_are_those_of_single_runs(cohort, fitted):
    """The twin is `coupled-gmm fit`, whose rows are printed between calls of the same program."""
    single = FITS.replace('[jobs]\nmanifest = "cohort.csv"', "").replace('command = "fit"', "")
    single = single.replace('cloud1 = "b.csv"', 'cloud0 = "a.csv"\ncloud1 = "b.csv"')
    (cohort / "one.toml").write_text(f"{single}\n[output]\npictures = false\n")
    assert call("fit", cohort / "one.toml", "--out", cohort / "one").exit_code == 0
    _, fit = parts.result_of(cohort / "out", "last")
    alone = cg.load(cohort / "one" / "fit.npz")
    assert fit.penalized_log_likelihood == alone.penalized_log_likelihood
    np.testing.assert_array_equal(fit.pair.gmm0.means, alone.pair.gmm0.means)
    table = pl.read_parquet(cohort / "out" / "summary.parquet")
    assert table["penalized_log_likelihood"][-1] == float(fit.penalized_log_likelihood) and table["n_steps"][-1] == 3
    shown = call("show", cohort / "out", "--job", "last")
    assert shown.exit_code == 0 and "Mass transfer" in shown.stdout


def test_precision_is_the_job_s_whoever_ran_before(cohort):
    tasks = {task.name: task for task in batch.load(cohort / "c.toml").tasks}
    sizes = [len(workers.solve(tasks[name]).result or b"") for name in ("good", "double", "good")]
    assert sizes[0] == sizes[2] < sizes[1]


def script(folder, seconds="0.05"):
    """A program whose command is `batch`, and whose jobs, in its workers too, cost nothing."""
    (folder / "run.py").write_text(CHEAP.replace("SECONDS", seconds) + COMMAND)
    return [sys.executable, str(folder / "run.py")]


def start(command, *arguments, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, arguments)], **pipes, **options)


def workers_of(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "--multiprocessing-fork" in child.cmdline()]


def test_a_worker_that_is_killed_changes_nothing(tmp_path):
    command, config, out = script(tmp_path), configured(tmp_path, 40), tmp_path / "out"
    under_way = start(command, config, "--out", out, "--workers", 2)
    wait_for(lambda: n_parts(out), under_way)
    workers_of(under_way)[0].kill()
    told, errors = under_way.communicate(timeout=100)
    assert under_way.returncode == 0, errors
    assert "workers: 2\n" in told and "40 jobs: 40 done, 0 failed, 0 left\n" in told
    assert "Restarting worker" in errors, "it was killed before the end"
    assert ended(start(command, config, "--out", tmp_path / "first")) == 0
    assert results(out) == results(tmp_path / "first")


def test_ctrl_c_ends_workers_too_in_one_line(tmp_path):
    """It reaches all processes of a terminal."""
    command, config, out = script(tmp_path), configured(tmp_path, 600), tmp_path / "out"
    under_way = start(command, config, "--out", out, "--workers", 2, start_new_session=True)
    wait_for(lambda: n_parts(out) > 2, under_way)
    children = workers_of(under_way)
    os.killpg(under_way.pid, signal.SIGINT)
    _, errors = under_way.communicate(timeout=60)
    assert (under_way.returncode, errors) == (130, "interrupted\n")
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert n_parts(out) > 2 and not list(out.rglob("*.part"))


CLUSTER = """
import time
import run
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        print(cluster.scheduler_address, flush=True)
        time.sleep(100)
"""


@pytest.fixture
def cluster(tmp_path):
    """A Dask cluster of one worker in a process of its own: that process, and its address."""
    script(tmp_path)
    (tmp_path / "cluster.py").write_text(CLUSTER)
    process = start([sys.executable, str(tmp_path / "cluster.py")])
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate(timeout=60)


def test_a_cluster_that_is_there(tmp_path, cluster):
    command, config = script(tmp_path, "0.02"), configured(tmp_path, 6)
    done = start(command, config, "--out", tmp_path / "out", "--scheduler", cluster[1])
    told, errors = done.communicate(timeout=100)
    assert (done.returncode, errors) == (0, ""), errors
    assert "workers: 1\n" in told and "6 jobs: 6 done, 0 failed, 0 left\n" in told


def test_a_cluster_that_goes_away_leaves_the_rest_to_the_next_run(tmp_path, cluster):
    command, config, out = script(tmp_path, "0.1"), configured(tmp_path, 200), tmp_path / "out"
    under_way = start(command, config, "--out", out, "--scheduler", cluster[1])
    wait_for(lambda: n_parts(out) > 2, under_way)
    children = workers_of(cluster[0])
    cluster[0].kill()
    for child in children:
        child.kill()
    _, errors = under_way.communicate(timeout=100)
    assert under_way.returncode == 1
    assert "the cluster went away, with " in errors.splitlines()[-1]
    assert "0 failed" in call("batch", "--status", out).stdout


@pytest.mark.slow
def test_a_job_that_kills_its_workers_fails_for_itself(tmp_path):
    command, out = script(tmp_path), tmp_path / "out"
    config = configured(tmp_path, 5)
    config.write_text(config.read_text().replace("[0, 1", "[0, 103, 1"))
    done = start(command, config, "--out", out, "--workers", 2)
    told, errors = done.communicate(timeout=150)
    assert done.returncode == 1, errors
    assert "6 jobs: 5 done, 1 failed, 0 left\n" in told and "seed=103: failed: KilledWorker: " in told


def test_addresses_where_nobody_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "_SECONDS", 1)
    config = configured(tmp_path, 1)
    began = time.monotonic()
    for address in ("tcp://127.0.0.1:1", "nowhere", "http://[", ""):
        done = call("batch", config, "--out", tmp_path / "out", "--scheduler", address)
        assert done.exit_code == 2 and done.stderr.startswith(f"--scheduler: {address}: can't be reached ("), (
            done.output
        )
        assert done.stderr.count("\n") == 1
    assert time.monotonic() - began < 30
    assert dask.config.get("scheduler", None) is None, "who uses Dask in this process goes on as before"


@pytest.mark.parametrize(("option", "value"), [("--workers", "2"), ("--scheduler", "tcp://127.0.0.1:1")])
def test_without_dask_the_extra_is_named(monkeypatch, tmp_path, option, value):
    for name in [name for name in sys.modules if name.partition(".")[0] == "distributed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "distributed", None)
    done = call("batch", configured(tmp_path, 1), "--out", tmp_path / "out", option, value)
    line = f"{option}: needs distributed, which is not installed; pip install 'coupled_gmm[cluster]'\n"
    assert (done.exit_code, done.stderr) == (2, line) and not (tmp_path / "out").exists()


def test_a_task_travels(cohort):
    """Plain values, so that a worker needs nothing of the process that asked."""
    for task in batch.load(cohort / "c.toml").tasks:
        assert pickle.loads(pickle.dumps(task)) == task
    with pytest.raises(ConfigError, match="no such file"):
        batch.load(cohort / "absent.toml")
