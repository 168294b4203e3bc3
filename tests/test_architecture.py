"""What the layout promises: imports run one way, files stay small, and importing the package is quick and quiet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import coupled_gmm

PACKAGE = Path(coupled_gmm.__file__).parent
# A module imports modules of lower floors only; within one floor nobody imports anybody.
FLOORS = [
    {"tree", "matrices", "result", "foreign", "host", "expansions", "archive", "arrays", "dialect", "interrupts"},
    {"checks", "programs", "covariances"},
    {"chunks"},
    {"density"},
    {"conditional"},
    {"mixture"},
    {"bures"},
    {"duals", "exact", "ott_cost", "statistics"},
    {"entropic"},
    {"pair", "frame", "starts"},
    {"masses", "plan"},
    {"solvers", "maps"},
    {"star"},
    {"barycenter", "flow"},
    {"reduction"},
    {"graph"},
    {"coordinates"},
    {"m_step"},
    {"report"},
    {"coupled"},
    {"fitted"},
    {"em", "fit"},
    {"validity"},
    {"io", "clouds", "interop", "sections"},
    {"__init__"},
    {"config", "folders", "plot", "progress"},
    {"plot_flow", "terminal"},
    {"runs", "tables", "mixtures"},
    {"cli"},
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
# Needed only where pictures are drawn, commands are run or files are read: not at import.
HEAVY = ("matplotlib", "rich", "typer", "pydantic", "polars", "sklearn", "scipy", "PIL", "tomli_w", "ott", "ot")
LATER = {
    "cli",
    "config",
    "folders",
    "mixtures",
    "ott_cost",
    "plot",
    "plot_flow",
    "progress",
    "runs",
    "sections",
    "tables",
}
LATER |= {"terminal"}


def imported(module: str, lazy: bool) -> set[str]:
    """Modules of the package that a module imports, at import or (lazy) inside functions as well."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    nodes = list(ast.walk(tree))
    if not lazy:
        inside = {n for f in nodes if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f) if n is not f}
        nodes = [n for n in nodes if n not in inside]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                if top == "coupled_gmm":
                    found.add(rest or "__init__")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            if node.module == "coupled_gmm":
                names = {alias.name for alias in node.names}
                found |= {name if name in MODULES else "__init__" for name in names}
            elif node.module and node.module.startswith("coupled_gmm."):
                found.add(node.module.split(".")[1])
    return found


def test_every_module_has_a_floor():
    assert set(MODULES) == set(FLOOR), "add new modules to the table, and to the README's"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    upward = {other for other in imported(module, lazy=False) if FLOOR[other] >= FLOOR[module]}
    assert not upward, f"{module} imports {upward}"
    # The listener's own bar is the one thing that a lower module fetches from above, when it is asked for.
    lazily = imported(module, lazy=True) - imported(module, lazy=False)
    allowed = {"report": {"progress"}}.get(module, set())
    assert {other for other in lazily if FLOOR[other] >= FLOOR[module]} <= allowed


def test_report_knows_nothing_of_the_package():
    assert imported("report", lazy=False) == set()


@pytest.mark.parametrize("module", MODULES)
def test_files_are_small(module):
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= 400


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
import chex, jax, jax.numpy, jaxtyping, optax
before = {{name.partition(".")[0] for name in sys.modules}}
import coupled_gmm
added = {{name.partition(".")[0] for name in sys.modules}} - before - set(sys.stdlib_module_names)
assert added == {{"coupled_gmm"}}, added
own = sorted(name.partition(".")[2] for name in sys.modules if name.startswith("coupled_gmm."))
print(*own)
import importlib.util
missing = [name for name in {HEAVY!r} if importlib.util.find_spec(name) is None]
assert not missing, f"no library that could be imported: {{missing}}"
"""
    own = set(run(code).stdout.split())
    assert own <= set(MODULES) - LATER, own & LATER


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
from coupled_gmm import clouds, config, io, mixtures, runs, sections, tables
heavy = [name for name in ("matplotlib", "ott", "sklearn", "PIL") if name in sys.modules]
assert not heavy, heavy
""")


def test_public_names_exist():
    assert sorted(coupled_gmm.__all__) == coupled_gmm.__all__
    assert all(hasattr(coupled_gmm, name) for name in coupled_gmm.__all__)
