"""Shared by tests of batches: a job that costs nothing, in this process and in others, and what a batch leaves."""

import subprocess
import sys
import time

from coupled_gmm.jobs import parts

# A job that costs nothing: its seed tells how it ends. It is of a process of its own where the text is run in one.
CHEAP = """
import os, signal, sys, time
import numpy as np
import coupled_gmm as cg
from coupled_gmm.jobs.barycenter import BarycenterJob
from coupled_gmm.jobs.sections import ConfigError

def solve(job, path, config, inputs, console):
    time.sleep(SECONDS)
    seed = config.start.seed
    if seed == 100:
        raise ConfigError(f"{path}: mixtures.0.file: absent.npz: no such file\\n{path}: another line")
    if seed == 101:
        raise RuntimeError("a fault\\nin two lines \\x1b[31m \\udcff")
    if seed == 103:
        os.kill(os.getpid(), signal.SIGKILL)
    gmm = cg.GaussianMixture.from_moments(np.full((1, 2), 1.0 + seed), np.eye(2)[None], [1.0])
    gmm.__dict__["seed"] = seed
    return config, gmm

def fail(gmm):
    if gmm.__dict__["seed"] == 102:
        raise cg.FitError("the steps ran out")

BarycenterJob.read = lambda job, path, config: None
BarycenterJob.solve = solve
BarycenterJob.sheets = lambda job, result: ()
for name, value in {
    "objective": property(lambda gmm: float(gmm.means[0, 0]) / 3),
    "n_steps": 7,
    "status_name": "converged",
    "message": "done",
    "raise_if_failed": fail,
}.items():
    setattr(cg.GaussianMixture, name, value)
"""
CONFIG = """
command = "barycenter"
[[mixtures]]
example = "left"
[start]
n_components = 2
[sweep]
"start.seed" = SEEDS
"""


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def results(folder):
    """What must be the same whenever and wherever jobs ran: the summary, and results by the names of jobs."""
    summaries = {name: (folder / name).read_bytes() for name in parts.SUMMARIES}
    place = parts.existing(folder)
    records = {task.name: place.record(task) for task in place.batch.tasks}
    return summaries, {name: (record.status, record.error, record.result) for name, record in records.items()}


COMMAND = """
sys.argv = ["coupled-gmm", "batch", *sys.argv[1:]]
if __name__ == "__main__":  # not in a worker, which has the cheap job all the same
    from coupled_gmm.cli import main
    main()
"""


def process(config, out, *options, seconds="0.02", setup=""):
    """A batch of cheap jobs in a process of its own."""
    code = f"{CHEAP.replace('SECONDS', seconds)}\n{setup}\n{COMMAND}"
    command = [sys.executable, "-c", code, str(config), "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    process.communicate(timeout=100)
    return process.returncode


def configured(folder, n):
    path = folder / "c.toml"
    path.write_text(CONFIG.replace("SEEDS", str([*range(n)])))
    return path


def n_parts(out):
    return len(list(out.glob("parts/*.parquet")))


def wait_for(condition, process, seconds=100):
    began = time.monotonic()
    while not condition() and process.poll() is None and time.monotonic() - began < seconds:
        time.sleep(0.005)
