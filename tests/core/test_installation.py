"""What is installed, and how it is said of what is not."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib

import jax.numpy as jnp
import pytest
from problems import ROOT, random_mixture

import coupled_gmm as cg
from coupled_gmm.core import foreign, installation, report
from coupled_gmm.data import array_files, clouds
from coupled_gmm.transport import network_simplex

CLOUDS = "coupled_gmm.data.clouds"


def test_version(monkeypatch):
    """The distribution's; without one the package works too, and says that it doesn't know."""
    assert cg.__version__ == importlib.metadata.version("coupled_gmm")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert installation.version() == cg.__version__ == "0+unknown"


@pytest.mark.parametrize("file", ["CITATION.cff", "CHANGELOG.md"])
def test_files_beside_the_package_name_its_version(file):
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.search(rf"^(version:|##) {re.escape(version)}$", (ROOT / file).read_text(), re.MULTILINE)


def run(code: str, *blocked: str) -> subprocess.CompletedProcess:
    """A process in which these libraries are not installed."""
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODULES = {"polars": "polars", "POT": "ot", "pydantic": "pydantic", "rich": "rich", "scikit-learn": "sklearn"}
MODULES |= {"tomli-w": "tomli_w", "typer": "typer", "filelock": "filelock", "platformdirs": "platformdirs"}
MODULES |= {"distributed": "distributed", "dask[array]": "dask", "zarr": "zarr"}


def modules(extra: str) -> tuple[str, ...]:
    return tuple(sorted(MODULES[re.split("[>=]", requirement)[0]] for requirement in EXTRAS[extra]))


def test_extras_are_the_ones_that_are_named():
    assert modules("cli") == installation._COMMAND
    assert EXTRAS["all"] == ["coupled_gmm[cli,cluster,pot,sklearn,tables,zarr]"]


def test_the_core_works_without_any_extra(tmp_path):
    code = f"""
import numpy as np
import coupled_gmm as cg
gmm = cg.GaussianMixture.from_moments(np.eye(2), np.stack(2 * [np.eye(2)]), [0.5, 0.5])
assert cg.solve_plan(cg.GaussianMixturePair(gmm, gmm), method="exact").matrix.shape == (2, 2)
assert cg.from_ott(cg.to_ott(gmm)).n_components == 2
assert cg.BuresCost(2) is not None
import coupled_gmm.plot.mixtures, coupled_gmm.plot.barycenters
np.save({str(tmp_path / "c.npy")!r}, np.eye(3))
assert len(cg.open_cloud({str(tmp_path / "c.npy")!r})) == 3
"""
    end = run(
        code, *{name for extra in ("cli", "cluster", "pot", "sklearn", "tables", "zarr") for name in modules(extra)}
    )
    assert end.returncode == 0, end.stderr


@pytest.mark.parametrize("library", installation._COMMAND)
def test_a_command_without_its_libraries_is_one_line(library):
    code = "sys.argv = ['/bin/coupled-gmm', 'fit', 'absent.toml']; from coupled_gmm.cli import main; main()"
    end = run(code, library)
    line = f"coupled-gmm: needs {library}, which is not installed; pip install 'coupled_gmm[cli]'\n"
    assert (end.returncode, end.stdout, end.stderr) == (2, "", line)


def test_a_command_says_what_its_data_need(tmp_path):
    config = ROOT / "configs" / "photographs.toml"
    code = f"sys.argv = ['coupled-gmm', 'fit', {str(config)!r}, '--out', {str(tmp_path)!r}]\n"
    end = run(code + "from coupled_gmm.cli import main; main()", "sklearn")
    line = "the photographs: needs sklearn, which is not installed; pip install 'coupled_gmm[sklearn]'\n"
    assert (end.returncode, end.stderr) == (2, line)
    assert not list(tmp_path.iterdir())


def progress():
    with report.listening(True):
        pass


def large_exact_plan():
    cost, mass = jnp.ones((65, 65)), jnp.full(65, 1 / 65)
    network_simplex.solve(cost, mass, mass, 10)


@pytest.mark.parametrize(
    ("library", "module", "extra", "what", "call"),
    [
        ("ot", "", "pot", "an exact plan of so many components", large_exact_plan),
        ("sklearn", "", "sklearn", "from_sklearn", lambda: cg.from_sklearn(None)),
        ("sklearn", "", "sklearn", "to_sklearn", lambda: cg.to_sklearn(random_mixture(0, 2, 2))),
        ("sklearn", "", "sklearn", "the photographs", lambda: clouds.photograph_clouds(10)),
        ("rich", "coupled_gmm.core.progress", "cli", "progress", progress),
        ("zarr", "", "zarr", "a zarr array", lambda: array_files._zarr(ROOT, "")),
        ("polars", "", "tables", "x", lambda: foreign._of_polars("x", None)),
        ("polars", "coupled_gmm.data.clouds", "tables", "clouds from files", lambda: importlib.import_module(CLOUDS)),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, library, module, extra, what, call):
    for name in [name for name in sys.modules if name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    if module:
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError) as caught:
        call()
    assert str(caught.value) == f"{what}: needs {library}, which is not installed; pip install 'coupled_gmm[{extra}]'"
    assert caught.value.name.partition(".")[0] == library


def test_other_failures_of_an_import_stay_what_they_are():
    with pytest.raises(ImportError, match="cannot import name"), installation.needed("tables", "x"):
        from math import absent  # noqa: F401
    inner, outer = installation.needed("tables", "x"), installation.needed("cli", "y")
    with pytest.raises(installation.MissingExtraError, match=r"^x: "), outer, inner:
        import no_such_library  # noqa: F401  # pyright: ignore[reportMissingImports]
