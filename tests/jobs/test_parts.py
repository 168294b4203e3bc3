"""The folder of a batch: what is whole is not done again, what is damaged or another's is, and what fails fails alone."""

import io
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from batches import CHEAP, COMMAND, CONFIG, configured, ended, files, n_parts, process, results, wait_for
from rich.console import Console
from typer.testing import CliRunner

import coupled_gmm as cg
from coupled_gmm import cli
from coupled_gmm.core.progress import TaskBar
from coupled_gmm.data import saving
from coupled_gmm.jobs import batch, parts
from coupled_gmm.jobs.barycenter import BarycenterJob
from coupled_gmm.jobs.sections import ConfigError


@pytest.fixture
def cheap(tmp_path, monkeypatch):
    """Batches of jobs that cost nothing, and how many were done."""
    names = ("objective", "n_steps", "status_name", "message", "raise_if_failed")
    for name in names:
        monkeypatch.setattr(cg.GaussianMixture, name, None, raising=False)
    for name in ("read", "solve", "sheets"):
        monkeypatch.setattr(BarycenterJob, name, getattr(BarycenterJob, name))
    exec(CHEAP.replace("SECONDS", "0"), {})
    calls, solve = [], BarycenterJob.solve

    def counted(job, path, config, inputs, console):
        calls.append(config.start.seed)
        return solve(job, path, config, inputs, console)

    monkeypatch.setattr(BarycenterJob, "solve", counted)

    def run(seeds, *options, text=CONFIG):
        calls.clear()
        (tmp_path / "c.toml").write_text(text.replace("SEEDS", str(seeds)))
        options = [] if "--out" in options else ["--out", tmp_path / "out", *options]
        return CliRunner().invoke(cli.app, ["batch", str(tmp_path / "c.toml"), *map(str, options)])

    return SimpleNamespace(run=run, calls=calls, folder=tmp_path, out=tmp_path / "out", config=tmp_path / "c.toml")


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_a_batch_leaves_its_folder_and_is_not_done_again(cheap):
    done = cheap.run([3, 1])
    assert (done.exit_code, cheap.calls) == (0, [3, 1]), done.output
    names = sorted(files(cheap.out))
    assert [name for name in names if "/" not in name] == [
        "config.toml",
        "summary.csv",
        "summary.parquet",
        "timings.csv",
    ]
    assert len(names) == 6
    table = pl.read_csv(cheap.out / "summary.csv")
    assert table.columns == ["name", "start.seed", "status", "objective", "n_steps", "error"]
    assert table.rows()[0][:5] == ("seed=3", 3, "converged", 4 / 3, 7)
    assert pl.read_parquet(cheap.out / "summary.parquet").rows()[1] == ("seed=1", 1, "converged", 2 / 3, 7, "")
    assert pl.read_csv(cheap.out / "timings.csv").columns == ["name", "seconds"]
    assert "1/2 seed=3: converged, objective 1.33333, n_steps 7\n" in done.stdout
    before = files(cheap.out)
    again = cheap.run([3, 1])
    assert (again.exit_code, cheap.calls) == (0, []) and "earlier: 2 done, 0 failed\n" in again.stdout
    assert files(cheap.out) == before
    resolved = call("batch", cheap.out / "config.toml")
    assert resolved.exit_code == 0 and cheap.calls == [], resolved.output


def test_results_come_out_again(cheap):
    cheap.run([3, 100])
    job, gmm = parts.result_of(cheap.out, "seed=3")
    assert isinstance(job, BarycenterJob) and isinstance(gmm, cg.GaussianMixture)
    assert call("show", cheap.out, "--job", "seed=3", "--save", cheap.folder / "x.npz").exit_code == 0
    np.testing.assert_array_equal(cg.load(cheap.folder / "x.npz").means, [[4, 4]])
    assert saving.pack(gmm) == (cheap.folder / "x.npz").read_bytes()
    for arguments, line in (
        (["--job", "seed=4"], f"{cheap.out}: has no job 'seed=4'; config.toml there has their names"),
        (
            ["--job", "seed=100"],
            f"{cheap.out}: job 'seed=100' left no result: mixtures.0.file: absent.npz: no such file",
        ),
        (["--save", "x.npz"], "--save: is for a job of a batch; name one with --job, or copy fit.npz"),
        ([], f"{cheap.out}: the folder of a batch; name one of its jobs with --job, or see batch --status"),
        (["--job", "seed=3", "--save", cheap.out], f"--save: {cheap.out}: {cheap.out}: is a folder; name a file"),
    ):
        shown = call("show", cheap.out, *arguments)
        assert shown.exit_code == 2 and shown.stderr.startswith(line) and shown.stderr.count("\n") == 1


def test_jobs_fail_for_themselves_and_are_tried_again_where_that_is_asked_for(cheap):
    seeds = [0, 100, 101, 102, 4]
    done = cheap.run(seeds)
    assert (done.exit_code, cheap.calls) == (1, seeds)
    assert done.stderr == f"the batch failed: 3 of 5 jobs; `coupled-gmm batch --status {cheap.out}` says why\n"
    errors = [
        "",
        "mixtures.0.file: absent.npz: no such file | another line",
        r"RuntimeError: a fault | in two lines \x1b[31m \udcff",
        "the steps ran out",
        "",
    ]
    table = pl.read_parquet(cheap.out / "summary.parquet")
    assert table["error"].to_list() == errors
    assert table["status"].to_list() == ["converged", "", "", "converged", "converged"]
    assert table["n_steps"].to_list() == [7, None, None, 7, 7], "what did not converge is kept all the same"
    assert parts.result_of(cheap.out, "seed=102")[1].n_components == 1
    before = results(cheap.out)
    again = cheap.run(seeds)
    assert (again.exit_code, cheap.calls) == (1, [])
    assert "earlier: 2 done, 3 failed; --retry-failed tries these again\n" in again.stdout
    assert cheap.run(seeds, "--retry-failed").exit_code == 1 and cheap.calls == [100, 101, 102]
    assert results(cheap.out) == before
    told = call("batch", "--status", cheap.out)
    assert told.exit_code == 0
    assert told.stdout.splitlines()[0] == f"{cheap.out}: 5 jobs: 2 done, 3 failed, 0 left"
    assert told.stdout.splitlines()[3] == "seed=102: failed: the steps ran out"


def part(cheap, name):
    place = parts.existing(cheap.out)
    return place._path(next(task for task in place.batch.tasks if task.name == name))


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "another job", "another table", "text", "link"])
def test_what_is_no_whole_record_is_done_again(cheap, damage):
    assert cheap.run([1, 2, 3]).exit_code == 0
    before, path = results(cheap.out), part(cheap, "seed=2")
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.touch()
        case "bit":  # inside the result, where Parquet does not notice it
            place = content.index(b"PK\x03\x04") + 200
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        case "another job":
            path.write_bytes(part(cheap, "seed=1").read_bytes())
        case "another table":
            pl.DataFrame({"a": [1]}).write_parquet(path)
        case "text":
            path.write_text("mine")
        case "link":
            (cheap.folder / "mine.txt").write_text("mine")
            path.symlink_to(cheap.folder / "mine.txt")
    assert "2 done, 0 failed, 1 left" in call("batch", "--status", cheap.out).stdout
    assert os.path.lexists(path), "to look is not to remove"
    again = cheap.run([1, 2, 3])
    assert (again.exit_code, cheap.calls) == (0, [2])
    assert "seed=2: its file was no whole record of it; it is done again\n" in again.stdout
    assert results(cheap.out) == before and not path.is_symlink()
    assert damage != "link" or (cheap.folder / "mine.txt").read_text() == "mine"


def test_files_of_others_stay_and_what_the_killed_left_goes(cheap):
    cheap.run([1])
    for name in ("notes.txt", "parts/notes.parquet"):
        (cheap.out / name).write_text("mine")
    (cheap.out / "parts" / ".0123.part").write_text("half")
    assert cheap.run([1]).exit_code == 0
    there = files(cheap.out)
    assert there["notes.txt"] == there["parts/notes.parquet"] == b"mine" and "parts/.0123.part" not in there


def test_another_configuration_is_refused(cheap):
    cheap.run([1, 2])
    before = files(cheap.out)
    for text, told in (
        (CONFIG.replace("= 2", "= 3"), "start.n_components: is 3, and was 2 (job 'seed=1')"),
        (CONFIG.replace("left", "top"), "mixtures: is [{'coefficient': 1.0, 'example': 'top'}], and was"),
        (CONFIG.replace("SEEDS", "[1, 2, 3]"), "jobs: 'seed=3' is new"),
    ):
        refused = cheap.run([1, 2], text=text)
        assert (refused.exit_code, cheap.calls) == (2, []), refused.output
        assert refused.stderr.startswith(f"{cheap.config}: {told}")
        end = f"in {cheap.out}, which holds the results of that; name another folder with --out, or remove that one\n"
        assert refused.stderr.endswith(end) and refused.stderr.count("\n") == 1
    assert files(cheap.out) == before


@pytest.mark.parametrize("there", ["fit.npz", "summary.csv", "plan.csv", "config.toml", "parts/x", "parts"])
def test_folders_of_something_else_are_refused(cheap, there):
    path = cheap.out / there
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    refused = cheap.run([1])
    assert (refused.exit_code, cheap.calls) == (2, [])
    line = f"{cheap.config}: output.directory: {cheap.out / there.partition('/')[0]} was not written by "
    assert refused.stderr.startswith(line) and refused.stderr.count("\n") == 1
    assert files(cheap.out) == {there: b"mine"}


def test_a_run_does_not_go_into_the_folder_of_a_batch(cheap):
    cheap.run([1])
    (cheap.folder / "one.toml").write_text('[[mixtures]]\nexample = "left"\n[start]\nn_components = 2\n')
    refused = call("barycenter", cheap.folder / "one.toml", "--out", cheap.out)
    assert refused.exit_code == 2 and "config.toml was not written by a run" in refused.stderr


def test_folders_that_are_none(cheap):
    for folder in (cheap.folder / "absent", cheap.folder, cheap.config):
        told = call("batch", "--status", folder)
        assert told.exit_code == 2 and told.stderr.startswith(f"{folder}: not the folder of a batch (")
    cheap.out.write_text("a file")
    refused = cheap.run([1])
    assert refused.exit_code == 2
    assert (
        refused.stderr
        == f"{cheap.config}: output.directory: can't write into {cheap.out} (File exists); name another\n"
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--shard", "3/2"], "--shard: must be i/n, from 1/n to n/n, got '3/2'"),
        (["--shard", "0/2"], "--shard: must be i/n, from 1/n to n/n, got '0/2'"),
        (["--shard", "1"], "--shard: must be i/n, from 1/n to n/n, got '1'"),
        (["--shard", "1/99999999"], "--shard: must be i/n, from 1/n to n/n, got '1/99999999'"),
        (["--workers", "2", "--scheduler", "x"], "--scheduler: there are --workers already; keep one of them"),
        (["--status", "x"], "--status: is for a folder alone; leave the configuration out"),
    ],
)
def test_options_that_are_refused(cheap, options, line):
    refused = cheap.run([1], *options)
    assert (refused.exit_code, refused.stderr, cheap.calls) == (2, f"{line}\n", [])
    assert not cheap.out.exists()


def test_neither_a_configuration_nor_a_folder():
    refused = call("batch")
    line = "CONFIG.toml: no configuration; name a CONFIG.toml, or a folder with --status\n"
    assert (refused.exit_code, refused.stderr) == (2, line)


def test_shards_are_shares_of_the_jobs(cheap):
    seeds = [*range(7)]
    assert cheap.run(seeds).exit_code == 0
    whole = results(cheap.out)
    for name in list(files(cheap.out)):
        (cheap.out / name).unlink()
    first = cheap.run(seeds, "--shard", "1/3")
    assert (first.exit_code, cheap.calls) == (0, [0, 3, 6])
    assert "4 of the batch's 7 jobs are left; the summary waits for them\n3 jobs: 3 done" in first.stdout
    assert not (cheap.out / "summary.csv").exists()
    assert cheap.run(seeds, "--shard", "3/3").exit_code == 0 and cheap.calls == [2, 5]
    assert cheap.run(seeds, "--shard", "2/3").exit_code == 0 and cheap.calls == [1, 4]
    assert results(cheap.out) == whole
    assert cheap.run(seeds, "--shard", "8/9").exit_code == 0 and cheap.calls == []


def test_columns_that_are_kept_and_differ(cheap):
    rows = '[[jobs.rows]]\nname = "a/b"\nage = 3\n[[jobs.rows]]\nname = "c"\n"start.n_components" = 4\n'
    text = CONFIG.replace("[sweep]", f'[jobs]\nkeep = ["age"]\n{rows}[sweep]')
    assert cheap.run([1], text=text).exit_code == 0
    table = pl.read_parquet(cheap.out / "summary.parquet")
    assert table.rows()[0][:3] == ("a/b seed=1", 2, 3) and table.rows()[1][:3] == ("c seed=1", 4, None)
    assert cheap.run([1], text=text.replace("age = 3", "age = 4")).exit_code == 0 and cheap.calls == []
    assert pl.read_parquet(cheap.out / "summary.parquet")["age"][0] == 4


def test_a_disk_that_is_full_ends_the_batch_in_a_line_and_it_goes_on(cheap, monkeypatch):
    replace, there = parts._replace, []

    def full(path, content, **options):
        if len(there) == 2 and path.suffix == ".parquet":
            raise OSError(28, "No space left on device")
        replace(path, content, **options)
        there.extend([path] * (path.suffix == ".parquet"))

    monkeypatch.setattr(parts, "_replace", full)
    done = cheap.run([1, 2, 3, 4])
    assert done.exit_code == 2 and cheap.calls == [1, 2, 3]
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(
        ".parquet: can't be written (No space left on device); make room, and run the batch again: it goes on\n"
    )
    monkeypatch.undo()
    assert not [name for name in files(cheap.out) if name.endswith(".part")]


def test_a_limit_to_the_size_of_files(tmp_path):
    """The write itself fails, in the middle: a line, status 2, nothing half written, and the next run goes on."""
    config, out = configured(tmp_path, 2), tmp_path / "out"
    few = process(config, out, setup="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))")
    line = few.communicate(timeout=100)[1]
    assert few.returncode == 2, line
    assert line.count("\n") == 1 and "can't be written (File too large); make room, and run" in line
    assert [name for name in files(out) if "parquet" in name or name.endswith(".part")] == []
    assert ended(process(config, out)) == 0


def kill_again_and_again(start, folder, n, most):
    """A batch killed n times, each within some seconds after its first job, or as it starts; then run to its end."""
    draw, out, killed, seen = np.random.default_rng(0), folder / "out", 0, []
    while killed < n:
        before, under_way = n_parts(out), start(out)
        if draw.random() < 0.8:
            wait_for(lambda before=before: n_parts(out) > before, under_way)
        time.sleep(draw.uniform(0, most))
        under_way.send_signal(signal.SIGKILL)
        under_way.communicate(timeout=100)
        killed += under_way.returncode == -signal.SIGKILL
        seen.append(n_parts(out))
    last = start(out)
    told, errors = last.communicate(timeout=1000)
    assert last.returncode == 0, errors
    assert "earlier: " in told and "no whole record" not in told and seen == sorted(seen)
    assert results(out) == results(folder / "first")
    assert not list(out.rglob("*.part"))
    return seen


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    config = configured(tmp_path, 40)
    assert ended(process(config, tmp_path / "first")) == 0
    kill_again_and_again(lambda out: process(config, out), tmp_path, n=4, most=0.2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_64_fits_killed_20_times(tmp_path):
    """Real ones, of files, in this process's place and on two of Dask's workers."""
    draw = np.random.default_rng(0)
    for i in range(64):
        for side in "ab":
            n = int(draw.integers(300, 3000))
            x = draw.normal(size=(n, 2)) + 5 * draw.integers(0, 3, size=(n, 1))
            pl.DataFrame({"x": x[:, 0], "y": x[:, 1]}).write_csv(tmp_path / f"s{i:02}_{side}.csv")
    config = tmp_path / "c.toml"
    config.write_text(FITS)
    command = [sys.executable, "-m", "coupled_gmm.cli", "batch", str(config)]

    def start(out, *options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*command, "--out", str(out), *options], text=True, **pipes)

    assert ended(start(tmp_path / "first")) == 0
    print(kill_again_and_again(start, tmp_path, n=20, most=0.5), flush=True)
    assert ended(start(tmp_path / "workers", "--workers", "2")) == 0
    assert results(tmp_path / "workers") == results(tmp_path / "first")


FITS = """
command = "fit"
[jobs]
cloud0 = "*_a.csv"
cloud1 = "*_b.csv"
[start]
n_components = 3
n_init = 3
[fit]
transport_weight = 0.05
epsilon = 0.1
em_steps = 10
"""


def test_two_shards_at_once(tmp_path):
    config = configured(tmp_path, 30)
    assert ended(process(config, tmp_path / "first")) == 0
    both = [process(config, tmp_path / "out", "--shard", f"{i}/2") for i in (1, 2)]
    ends = [one.communicate(timeout=100) for one in both]
    assert [one.returncode for one in both] == [0, 0], ends
    assert results(tmp_path / "out") == results(tmp_path / "first")


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "interrupted by SIGTERM")]
)
def test_signals_keep_what_is_done(tmp_path, number, line):
    config, out = configured(tmp_path, 300), tmp_path / "out"
    under_way = process(config, out, seconds="0.05")
    wait_for(lambda: n_parts(out), under_way)
    time.sleep(0.3)
    under_way.send_signal(number)
    _, errors = under_way.communicate(timeout=60)
    assert (under_way.returncode, errors) == (128 + number, f"{line}\n")
    assert not list(out.glob("parts/.*")) and not (out / "summary.csv").exists()
    told = call("batch", "--status", out)
    assert told.exit_code == 0 and " 0 failed, " in told.stdout and "300 jobs: 0 done" not in told.stdout


@pytest.mark.parametrize("shell", ["{command} | head -1 >/dev/null", "{command} >/dev/full", "{command} >&-"])
def test_whoever_reads_what_is_printed(tmp_path, shell):
    config, out = configured(tmp_path, 30), tmp_path / "out"
    (tmp_path / "run.py").write_text(f"{CHEAP.replace('SECONDS', '0')}\n{COMMAND}")
    command = shell.format(command=f"{sys.executable} {tmp_path / 'run.py'} {config} --out {out}")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=100)
    full = f"standard output can't be written (No space left on device); the results are in {out}\n"
    assert (done.returncode, done.stderr) == (0, full if "full" in shell else "")
    assert len(pl.read_csv(out / "summary.csv")) == 30


def test_a_batch_that_another_version_wrote(cheap):
    """Its configuration has a key that this one does not know."""
    cheap.run([1])
    path = cheap.out / "config.toml"
    path.write_text(path.read_text().replace("[start]", "[start]\nnew = 1"))
    refused = cheap.run([1])
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert "holds no batch of this version (" in refused.stderr and "start.new: unknown key" in refused.stderr


def test_records_are_as_they_were(tmp_path):
    """Numbers, words and bytes of any kind through a file and back; nothing else is taken for them."""
    (tmp_path / "c.toml").write_text(CONFIG.replace("SEEDS", "[0]"))
    of = batch.load(tmp_path / "c.toml", str(tmp_path / "out"))
    place, (task,) = parts.claimed(of), of.tasks
    for measures, result, error in (
        ({"objective": float("nan"), "n_steps": 3}, b"\0\xff" * 1000, "é\U0001f600"),
        ({"objective": -float("inf")}, b"", ""),
        ({}, None, "x"),
    ):
        record = parts.Record(task.name, task.digest, "converged", error, 0.1 + 0.2, measures, result)
        place.write(record)
        found = place.record(task)
        assert repr(found) == repr(record)
        other = record._replace(digest="0" * 32)
        parts._replace(place._path(task), parts._parquet(parts._frame(other)))
        assert place.record(task) is None
    with pytest.raises(ConfigError, match="has not ended"):
        parts.result_of(tmp_path / "out", task.name)


def test_a_terminal_shows_how_many_are_left_and_what_failed():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with TaskBar(console, 3) as bar:
        bar.advance("a: converged", failed=False)
        bar.advance("b: failed: x", failed=True)
        bar._bar.refresh()
    text = console.file.getvalue()
    assert "2/3" in text and "1 failed" in text and "2/3 b: failed: x" in text and "a: converged" not in text
    plain = Console(file=io.StringIO(), width=40)
    with TaskBar(plain, 10) as bar:
        bar.advance("[bold]a: " + "x" * 60, failed=False)
    assert plain.file.getvalue() == f" 1/10 [bold]a: {'x' * 60}\n"
