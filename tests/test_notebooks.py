"""Every notebook runs from its first cell to its last, and is committed as it ran: with its pictures, on no one's machine."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from problems import ROOT

import coupled_gmm as cg

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def n_pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_there_are_notebooks():
    assert NOTEBOOKS


# Half a minute of compilation and more.
LONG = ("02_barycenters", "03_flow", "04_transport_maps", "05_batches", "06_time_course", "07_choosing")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in NOTEBOOKS],
)
def test_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    committed = n_pictures(notebook)
    environment = {
        name: value for name, value in os.environ.items() if name != "MPLBACKEND"
    }  # the kernel's own: inline
    package = str(Path(cg.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    environment["IPYTHONDIR"] = str(tmp_path / "ipython")
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)  # raises where a cell does
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert n_pictures(notebook) == committed
    install = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "google.colab" in install.source and "pip install" in install.source
    assert not install.outputs  # it does nothing here


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert n_pictures(notebook)
    assert path.stat().st_size < 1.5e6
    for cell in notebook.cells:
        assert cell.cell_type != "code" or cell.execution_count is not None
    for output in outputs(notebook):
        assert output.output_type != "error" and output.get("name") != "stderr"
        text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        assert not any(
            trace in text for trace in ("/home/", "/tmp/", "/Users/", str(NOTEBOOKS[0].parents[1]), "Warning")
        )
