"""Clouds on several devices, and in several processes: fits are those of one device."""

import json
import os
import socket
import subprocess
import sys

import devices
import jax
import numpy as np
import processes
import pytest
from problems import ROOT

import coupled_gmm as cg

TESTS = ROOT / "tests"


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS)))}


def report(names, folder):
    """What became of some checks, in a process with eight devices."""
    path = folder / "report.json"
    command = [sys.executable, str(TESTS / "devices.py"), str(path), *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=170)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def quick_report(tmp_path_factory):
    return report(sorted(set(devices.CHECKS) - devices.SLOW), tmp_path_factory.mktemp("devices"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(devices.CHECKS) - devices.SLOW))
def test_eight_devices(name, quick_report):
    assert not quick_report[name], quick_report[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(devices.SLOW))
def test_eight_devices_at_length(name, tmp_path):
    found = report([name], tmp_path)
    assert not found[name], found[name]


@pytest.mark.slow
def test_two_processes_of_two_devices(tmp_path):
    """Each with its own part of a cloud: both come to the same, and to what one device finds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, str(TESTS / "processes.py"), address, str(tmp_path)]
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [*command, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment() | flags,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=170)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(text[-3000:] for text in said)
    one, other = (dict(np.load(tmp_path / f"{number}.npz")) for number in range(2))
    expected = processes.fits(*processes.clouds(), jax.random.key(0))
    for name, found in one.items():
        np.testing.assert_array_equal(found, other[name], err_msg=name)
        reference = np.asarray(expected[name], np.float64)
        np.testing.assert_allclose(found, reference, rtol=0, atol=1e-5 * np.abs(reference).max(), err_msg=name)
    assert cg.Status(int(one["status"])).name
