"""Runs as files: whole or not there, refused before the work, and what signals and broken streams do to them."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import coupled_gmm as cg
from coupled_gmm import cli
from coupled_gmm.core import interrupts
from coupled_gmm.data.saving import load, save
from coupled_gmm.jobs import folders, run, terminal
from coupled_gmm.jobs.barycenter import BarycenterJob
from coupled_gmm.jobs.sections import ConfigError

CONFIG = """
[data]
source = "tutorial"
n = 300
[start]
n_components = 3
n_init = 2
max_steps = 5
[fit]
transport_weight = 0.01
epsilon = 0.01
em_steps = 4
m_steps = 5
"""
BARYCENTER = """
[[mixtures]]
example = "left"
[start]
n_components = 2
"""
NAMES = ("a.csv", "b.png", "fit.npz")


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def solved(tmp_path, monkeypatch):
    """A barycenter that costs nothing: what is tested is what becomes of it."""
    gmm = cg.GaussianMixture.from_moments(np.zeros((2, 2)), np.stack([np.eye(2)] * 2), [0.5, 0.5])
    calls = []

    def solve(job, path, config, inputs, console):
        calls.append(config)
        return config, gmm

    def write(folder, job, config, result, inputs):
        save(folder / run.FIT, result)
        for name in ("config.toml", "mixture.csv"):
            (folder / name).write_text(f"of call {len(calls)}")

    monkeypatch.setattr(BarycenterJob, "solve", solve)
    monkeypatch.setattr(run, "_write", write)
    monkeypatch.setattr(BarycenterJob, "sheets", lambda job, result: ())
    monkeypatch.setattr(cg.GaussianMixture, "raise_if_failed", lambda self: None, raising=False)
    monkeypatch.setattr(cg.GaussianMixture, "message", "done", raising=False)
    monkeypatch.setattr(BarycenterJob, "read", lambda job, path, config: ([gmm], [gmm]))
    (tmp_path / "c.toml").write_text(BARYCENTER)
    return SimpleNamespace(folder=tmp_path, config=tmp_path / "c.toml", calls=calls)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_leaves_nothing_of_the_first_and_all_of_other_people(solved):
    """Pictures of an older run stood beside new numbers, a fit's plan.csv beside a barycenter."""
    out = solved.folder / "out"
    out.mkdir()
    for name in ("plan.csv", "clouds.png", "fit.npz", "mine.csv"):
        (out / name).write_text("old")
    assert call("barycenter", solved.config, "--out", out).exit_code == 0
    assert files(out) == ["config.toml", "fit.npz", "mine.csv", "mixture.csv"]
    assert (out / "mine.csv").read_text() == "old" and isinstance(load(out / "fit.npz"), cg.GaussianMixture)


def test_what_is_said_of_a_run_is_found_in_its_precision(solved, monkeypatch):
    """A message may solve plans between the mixtures; a float64 run whose penalty had overruled the data ended in a traceback."""
    seen = []
    monkeypatch.setattr(cg.GaussianMixture, "raise_if_failed", lambda self: seen.append(jax.config.jax_enable_x64))
    monkeypatch.setattr(
        cg.GaussianMixture, "message", property(lambda self: str(seen.append(jax.config.jax_enable_x64)))
    )
    solved.config.write_text(f'{BARYCENTER}[barycenter]\nprecision = "float64"\n')
    assert call("barycenter", solved.config, "--out", solved.folder / "out").exit_code == 0
    assert seen == [True, True]


def test_a_run_goes_where_a_link_leads_or_into_the_working_directory(solved, monkeypatch):
    real = solved.folder / "real"
    real.mkdir()
    (solved.folder / "link").symlink_to(real)
    assert call("barycenter", solved.config, "--out", solved.folder / "link").exit_code == 0
    assert (solved.folder / "link").is_symlink() and "fit.npz" in files(real)
    monkeypatch.chdir(solved.folder)
    assert call("barycenter", solved.config, "--out", ".").exit_code == 0
    assert {"c.toml", "fit.npz", "link", "real"} < set(files(solved.folder))


@pytest.mark.parametrize(
    ("there", "line"),
    [
        ("fit.npz/", "there is a folder {out}/fit.npz, where a run writes a file; remove it, or name another folder"),
        ("flow.gif/", "there is a folder {out}/flow.gif, where a run writes a file; remove it, or name another folder"),
        (
            "plan.csv",
            "{out}/plan.csv was not written by a run, and a run would replace it; remove it, or name another folder",
        ),
    ],
)
def test_what_is_in_the_way_is_refused_before_the_work(solved, there, line):
    out = solved.folder / "out"
    out.mkdir()
    (out / there).mkdir() if there.endswith("/") else (out / there).write_text("mine")
    result = call("barycenter", solved.config, "--out", out)
    assert (result.exit_code, solved.calls) == (2, [])
    assert result.stderr == f"{solved.config}: output.directory: {line.format(out=out)}\n"
    assert files(out) == [there.rstrip("/")]


def test_folders_that_cannot_be_written_are_refused_before_the_work(solved, monkeypatch):
    """The permissions of a folder do not stop root, so the refusals are made here."""
    monkeypatch.setattr(folders.tempfile, "mkdtemp", raising(OSError(30, "Read-only file system")))
    result = call("barycenter", solved.config, "--out", solved.folder)
    assert (result.exit_code, solved.calls) == (2, [])
    assert result.stderr.endswith(
        f"can't write into the folder {solved.folder} (Read-only file system); name another\n"
    )
    (solved.folder / "out").mkdir()
    (solved.folder / "out" / "fit.npz").touch()
    (solved.folder / "out" / "config.toml").touch()
    monkeypatch.setattr(folders.os, "access", lambda path, mode: mode != os.W_OK)
    result = call("barycenter", solved.config, "--out", solved.folder / "out")
    assert (result.exit_code, solved.calls) == (2, [])
    assert "config.toml is write-protected; change that, or name another folder\n" in result.stderr


@pytest.mark.parametrize("name", [os.fsdecode(b"out\xff"), "x" * 300, "c.toml", "c.toml/out", r"out\u0000"])
def test_names_of_no_folder_are_refused_before_the_work(solved, name):
    if "u0000" in name:
        solved.config.write_text(f'{BARYCENTER}[output]\ndirectory = "{name}"\n')
        result = call("barycenter", solved.config)
    else:
        result = call("barycenter", solved.config, "--out", f"{solved.folder}/{name}")
    assert (result.exit_code, solved.calls, len(result.stderr.splitlines())) == (2, [], 1), result.stderr


def raising(error):
    def raise_it(*arguments, **options):
        raise error

    return raise_it


@pytest.mark.parametrize("where", ["_write", "publish"])
def test_a_disk_that_fills_up_leaves_nothing_that_claims_to_be_whole(solved, monkeypatch, where):
    out = solved.folder / "out"
    error = OSError(28, "No space left on device")
    if where == "_write":
        monkeypatch.setattr(run, "_write", raising(error))
    else:
        replace = os.replace
        monkeypatch.setattr(
            os, "replace", lambda a, b: raising(error)() if Path(b).name == "fit.npz" else replace(a, b)
        )
    result = call("barycenter", solved.config, "--out", out)
    assert result.exit_code == 2 and len(solved.calls) == 1
    assert result.stderr == f"{out}: the run can't be written (No space left on device); make room, or name another\n"
    assert files(out) == []


def test_an_older_run_stays_where_a_new_one_fails(solved, monkeypatch):
    out = solved.folder / "out"
    call("barycenter", solved.config, "--out", out)
    monkeypatch.setattr(run, "_write", raising(OSError(28, "No space left on device")))
    assert call("barycenter", solved.config, "--out", out).exit_code == 2
    assert files(out) == ["config.toml", "fit.npz", "mixture.csv"]
    assert (out / "mixture.csv").read_text() == "of call 1"


def test_ctrl_c_without_a_watcher_is_one_line_and_status_130(solved, monkeypatch):
    monkeypatch.setattr(BarycenterJob, "solve", raising(KeyboardInterrupt()))
    result = call("barycenter", solved.config, "--out", solved.folder / "out")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert files(solved.folder / "out") == []


def fill(folder, value):
    with folders.reserved(folder, NAMES) as part:
        for name in NAMES:
            (part / name).write_text(value)
        folders.publish(part, folder, NAMES)


@pytest.mark.parametrize("moved", range(4))
def test_what_was_killed_while_it_moved_in_is_unfinished_and_then_gone(tmp_path, monkeypatch, moved):
    """At each of its moments: nothing is cleaned up after it."""

    class Killed(BaseException):
        pass

    fill(tmp_path, "old")
    replace, done = os.replace, []

    def count(source, target):
        if len(done) == moved:
            raise Killed
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", count)
        for name in ("_remove", "_remove_files"):
            patch.setattr(folders, name, lambda *arguments: None)
        fill(tmp_path, "new")
    if moved == 0:
        assert [(tmp_path / name).read_text() for name in NAMES] == ["old"] * 3
    else:
        assert not (tmp_path / "fit.npz").exists() and folders.unfinished(tmp_path)
        with pytest.raises(ConfigError, match=r"its run is unfinished: under way, or it was stopped; run it again"):
            run.read(tmp_path)
    fill(tmp_path, "third")
    assert files(tmp_path) == sorted(NAMES)
    assert [(tmp_path / name).read_text() for name in NAMES] == ["third"] * 3


def test_runs_side_by_side_do_not_mix_nor_remove_each_other(tmp_path):
    with folders.reserved(tmp_path, NAMES) as one, folders.reserved(tmp_path, NAMES) as other:
        for name in NAMES:
            (one / name).write_text("one")
        for name in NAMES[1:]:
            (other / name).write_text("other")
        folders.publish(one, tmp_path, NAMES)
        folders.publish(other, tmp_path, NAMES)
    assert files(tmp_path) == ["b.png", "fit.npz"]
    assert (tmp_path / "b.png").read_text() == "other"


def test_a_file_of_the_users_that_came_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(folders.Taken, match="was not written by a run"), folders.reserved(tmp_path, NAMES) as part:
        (part / "fit.npz").touch()
        (tmp_path / "a.csv").write_text("mine")
        folders.publish(part, tmp_path, NAMES)
    assert files(tmp_path) == ["a.csv"] and (tmp_path / "a.csv").read_text() == "mine"


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    assert terminal.plain("a\x1b[31m\nb\u202e\x9bé") == "a\\x1b[31m\\nb\\u202e\\x9bé"
    result = call("show", tmp_path / "\x1b[2Jout")
    assert result.exit_code == 2 and "\\x1b[2Jout" in result.stderr and "\x1b" not in result.stderr


def test_a_line_that_quotes_megabytes_is_cut(capsys):
    terminal.say_error("file: a" + "b" * 10_000_000 + "c; save it again")
    assert len(line := capsys.readouterr().err) < 3000 and line.endswith("c; save it again\n")


COMMAND = (sys.executable, "-m", "coupled_gmm.cli")


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "interrupted by SIGTERM")]
)
def test_signals_end_a_command_in_one_line(tmp_path, number, line):
    """While it is busy in compiled code too, where Python's own handlers would have to wait; twice is no more than once."""
    code = (
        "import sys; sys.argv = ['coupled-gmm']; import coupled_gmm; from coupled_gmm.jobs import folders;"
        f"hold = folders.reserved(__import__('pathlib').Path({str(tmp_path)!r}), ['fit.npz']); part = hold.__enter__();"
        "(part / 'fit.npz').touch(); print('up', flush=True);"
        "from ctypes import CDLL; [CDLL(None).sleep(60) for _ in range(9)]"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    assert folders.unfinished(tmp_path)
    for _ in range(3):
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", f"{line}\n")
    assert not files(tmp_path)


def test_a_command_that_has_ended_is_not_said_to_be_interrupted(tmp_path):
    """A signal while the interpreter leaves: status 0 came with "interrupted" before."""
    code = (
        "import sys; sys.argv = ['coupled-gmm', 'show', 'absent']; from coupled_gmm import cli; import atexit, os, signal, time;"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.5))); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and "absent" in done.stderr and "interrupted" not in done.stderr


@pytest.mark.parametrize(
    "shell",
    [
        "{command} {config} --out {out} | true",
        pytest.param("{command} {config} --out {out} >&- 2>/dev/full", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_saved_whoever_reads_what_it_prints(tmp_path, shell):
    """Before: pages of traceback, and nothing saved."""
    (tmp_path / "c.toml").write_text(BARYCENTER + "[output]\npictures = false\n")
    command = shell.format(command=" ".join([*COMMAND, "barycenter"]), config=tmp_path / "c.toml", out=tmp_path / "out")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    job, result = run.read(tmp_path / "out")
    assert isinstance(job, BarycenterJob) and isinstance(result, cg.BarycenterFit)


@pytest.mark.parametrize(
    ("arguments", "original", "expected"),
    [
        (["/bin/coupled-gmm", "fit"], ["python", "/bin/coupled-gmm", "fit"], True),
        (["-m"], ["python", "-m", "coupled_gmm.cli", "fit"], True),
        (["-m"], ["python", "-m", "a_package_that_imports_this_one.train"], False),
        (["-c"], ["python", "-c", "import coupled_gmm"], False),
        ([], [], False),
    ],
)
def test_only_commands_watch_for_signals(monkeypatch, arguments, original, expected):
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert interrupts.is_command() == expected
    assert signal.getsignal(signal.SIGINT) is not interrupts._leave_it_to_the_thread, "to ask is not to watch"


def test_output_that_fails_is_told_from_a_reader_who_has_enough(monkeypatch):
    for descriptor, expected in ((os.open("/dev/full", os.O_WRONLY), "No space left on device"), (os.pipe(), None)):
        if isinstance(descriptor, tuple):
            os.close(descriptor[0])
            descriptor = descriptor[1]
        monkeypatch.setattr(sys, "stdout", terminal._text(descriptor, "ascii", line_buffering=False))
        print("é" * 20_000)
        assert terminal.lost() == expected
        os.close(descriptor)


def show(folder):
    """What is said of a folder: "whole", "unfinished" or "nothing"; anything else is a fault."""
    if not folder.exists():
        return "nothing"
    result = call("show", folder)
    if result.exit_code == 0:
        written = set(files(folder))
        assert {
            "fit.npz",
            "config.toml",
            "history.csv",
            "plan.csv",
            "clouds.png",
            "plan.png",
            "objective.png",
        } <= written
        load(folder / "fit.npz")
        return "whole"
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    return "unfinished" if "unfinished" in result.stderr else "nothing"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_that_are_killed_at_random_moments(tmp_path):
    """30 of them: SIGKILL, SIGTERM and Ctrl-C in turn, over a folder that is new or that holds a whole run."""
    (tmp_path / "c.toml").write_text(CONFIG)
    command = [*COMMAND, "fit", str(tmp_path / "c.toml"), "--out"]
    for _ in range(2):  # the second finds its programs where a cache of them is kept, as those below do
        start = time.monotonic()
        assert subprocess.run([*command, tmp_path / "first"], capture_output=True).returncode == 0
        seconds = time.monotonic() - start
    draw, seen = random.Random(0), []
    for i in range(30):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3]
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        if i % 2:
            shutil.copytree(tmp_path / "first", out)
        process = subprocess.Popen([*command, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(draw.uniform(0.3, seconds))
        process.send_signal(number)
        told, err = process.communicate()
        # Before the signal came; as the interpreter goes, it takes no signal any more, and one ends it as it ends any process.
        ended = process.returncode == 0 or (process.returncode == -number and "run folder:" in told)
        said = show(out)
        seen.append((number.name, "old run" if i % 2 else "new folder", process.returncode, err.strip(), said))
        print(*seen[-1], sep=" | ", flush=True)
        assert ended or process.returncode == (-number if number == signal.SIGKILL else 128 + number), seen[-1]
        assert err == ("" if ended or number == signal.SIGKILL else interrupts.line(number) + "\n"), seen[-1]
        if number != signal.SIGKILL:
            assert not folders.unfinished(out) and (said == "whole" or not out.exists() or not files(out)), seen[-1]
        if i % 10 == 0:
            assert subprocess.run([*command, out], capture_output=True).returncode == 0
            assert show(out) == "whole" and files(out) == files(tmp_path / "first")
