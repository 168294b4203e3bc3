"""What the layout promises: imports run one way, files stay small, and importing the package is quick and quiet."""

import ast
import graphlib
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
from problems import ROOT, module_names

import coupled_gmm

PACKAGE = Path(coupled_gmm.__file__).parent
README = (ROOT / "README.md").read_text()
RULE = next(line.strip() for line in README.splitlines() if line.startswith("    core < "))
FLOOR = {folder: floor for floor, folders in enumerate(RULE.split(" < ")) for folder in folders.split(", ")}
MODULES = [name for name in module_names() if name.count(".") == 2 or name == "coupled_gmm.cli"]
# Needed only where pictures are drawn, commands are run or files are read: not at import.
HEAVY = ("matplotlib", "rich", "typer", "pydantic", "polars", "sklearn", "scipy", "PIL", "tomli_w", "ott", "ot")
HEAVY += ("dask", "distributed", "zarr")
LATER = ("coupled_gmm.plot", "coupled_gmm.jobs", "coupled_gmm.cli")
LATER += ("coupled_gmm.core.progress", "coupled_gmm.gaussians.ott_cost")


def folder(module: str) -> str:
    return module.split(".")[1]


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports, at import or inside functions; the package itself, for its public names."""
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("coupled_gmm")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            if node.module and node.module.startswith("coupled_gmm"):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= inner & set(MODULES) or {node.module}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    for other in imported(module):
        if other == "coupled_gmm":
            assert folder(module) in ("jobs", "cli"), f"{module} imports the public names"
        elif folder(other) != folder(module):
            assert FLOOR[folder(other)] < FLOOR[folder(module)], f"{module} imports {other}"


def test_no_circles():
    below = {module: imported(module) & set(MODULES) for module in MODULES}
    tuple(graphlib.TopologicalSorter(below).static_order())  # raises CycleError, which names them


def test_readme_names_every_file():
    """Its table has a row's files under their folder, and no others."""
    place, named = "", set()
    for line in README[README.index("| folder | file |") :].splitlines()[2:]:
        if not line.startswith("|"):
            break
        _, first, files, *_ = line.split("|")
        place = first.strip().strip("`/") or place
        stems = [file.strip().strip("`").removesuffix(".py") for file in files.split(",")]
        named |= {f"coupled_gmm.{stem}" if stem == "cli" else f"coupled_gmm.{place}.{stem}" for stem in stems}
    assert named == set(MODULES)


def test_folders_say_what_they_hold():
    """Each is in the rule; its `__init__` has words and imports nothing; and tests stand in the same folders."""
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders | {"cli"} == set(FLOOR)
    for name in folders:
        (words,) = ast.parse((PACKAGE / name / "__init__.py").read_text()).body
        text = ast.unparse(words)
        assert all(f"`{module.split('.')[2]}`" in text for module in MODULES if folder(module) == name), name
        assert any((ROOT / "tests" / name).glob("test_*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_files_are_small(module):
    assert len((PACKAGE.parent / (module.replace(".", "/") + ".py")).read_text().splitlines()) <= 400


def run(code):
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert end.returncode == 0, end.stderr
    return end


def test_importing_adds_nothing_but_the_package():
    """What takes time at import is other libraries: beyond JAX's own, none is imported, though some are installed.

    Seconds would say less: they are JAX's, and the machine's.
    """
    code = f"""
import sys
import types
import chex, jax, jax.numpy, jaxtyping, optax
before = {{name.partition(".")[0] for name in sys.modules}}
import coupled_gmm
added = {{name.partition(".")[0] for name in sys.modules}} - before - set(sys.stdlib_module_names)
assert added == {{"coupled_gmm"}}, added
print(*(name for name in sys.modules if name.startswith("coupled_gmm.")))
import importlib.util
missing = [name for name in {HEAVY!r} if importlib.util.find_spec(name) is None]
assert not missing, f"no library that could be imported: {{missing}}"
"""
    own = set(run(code).stdout.split())
    assert own and not [name for name in own if name.startswith(LATER)]


def test_importing_is_quiet():
    """No device, no compilation, no output."""
    code = """
import jax
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **_: compiled.append(name))
import coupled_gmm
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was started"
assert not compiled, compiled
"""
    end = run(code)
    assert end.stdout == "" and "Warning" not in end.stderr


def test_modules_of_jobs_do_not_draw():
    """Pictures and OTT are imported where they are asked for: a run without them does not wait for them."""
    run("""
import sys
import types
from coupled_gmm.jobs import registry, run, workers
heavy = [name for name in ("matplotlib", "ott", "sklearn", "PIL", "dask", "distributed") if name in sys.modules]
assert not heavy, heavy
""")


def test_public_names_exist():
    assert sorted(coupled_gmm.__all__) == coupled_gmm.__all__
    assert all(hasattr(coupled_gmm, name) for name in coupled_gmm.__all__)


def test_public_names_are_no_modules():
    """`coupled_gmm.barycenter` is a function, whatever was imported before."""
    for module in MODULES:
        importlib.import_module(module)
    names = [name for name in coupled_gmm.__all__ if isinstance(getattr(coupled_gmm, name), types.ModuleType)]
    assert not names
