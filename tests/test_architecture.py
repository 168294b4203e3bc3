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
    {"tree", "matrices", "result", "checks", "host", "expansions"},
    {"mixture"},
    {"bures"},
    {"entropic", "exact", "ott_cost", "statistics"},
    {"pair"},
    {"masses", "plan"},
    {"solvers", "maps"},
    {"star"},
    {"barycenter", "flow"},
    {"reduction"},
    {"graph"},
    {"m_step"},
    {"report"},
    {"coupled"},
    {"em", "fit"},
    {"io", "clouds", "interop", "sections"},
    {"__init__"},
    {"config", "plot", "progress"},
    {"plot_flow"},
    {"runs", "tables", "mixtures"},
    {"cli"},
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
# Needed only where pictures are drawn, commands are run or files are read: not at import.
HEAVY = ("matplotlib", "rich", "typer", "pydantic", "polars", "sklearn", "PIL", "tomli_w", "ott", "ot")


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


def test_importing_is_quick_and_quiet():
    """No heavy library, no device, no compilation, no output."""
    code = f"""
import sys
import coupled_gmm
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was started"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "" and "Warning" not in run.stderr


def test_public_names_exist():
    assert sorted(coupled_gmm.__all__) == coupled_gmm.__all__
    assert all(hasattr(coupled_gmm, name) for name in coupled_gmm.__all__)
