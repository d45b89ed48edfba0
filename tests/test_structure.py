"""What must stay true of the whole: imports point down, help is instant, only one module prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kallm_bench"

# Each room may import the rooms before it in this list and itself.
ORDER = [
    "errors",
    "files",
    "hub",
    "progress",
    "sharing",
    "interrupts",
    "suite_files",
    "kan.bases",
    "kan.kernels",
    "kan.reference",
    "kan.ops",
    "kan.layers",
    "kan.feedforward",
    "kan",
    "models",
    "records",
    "training",
    "bbh",
    "profiling",
    "suites",
    "filing",
    "reporting",
    "forecast",
    "footprint",
    "teaching",
    "budget",
    "efforts",
    "engine",
    "fetch",
    "generate",
    "doctor",
    "plots",
    "console",
    "cli",
]


def room_of(module: str) -> str:
    """The longest entry of ORDER that a dotted name below kallm_bench begins with."""
    return max((room for room in ORDER if f"{module}.".startswith(f"{room}.")), key=len)


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports when it is imported itself or type-checked, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kallm_bench"):
            inside = (node.module or "").removeprefix("kallm_bench").removeprefix(".")
            found |= {inside} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("kallm_bench.") for a in node.names if a.name.startswith("kallm_bench.")}
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module)
    for imported in imports_of(path):
        assert ORDER.index(room_of(imported)) <= ORDER.index(room), f"{module} imports {imported}"


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("kallm_bench.records", "torch"),
        ("kallm_bench.reporting", "torch"),
        ("kallm_bench.cli", "torch"),
        ("kallm_bench.cli", "numpy"),
        ("kallm_bench.cli", "transformers"),
        ("kallm_bench.kan", "transformers"),
    ],
)
def test_light_rooms_stay_light(module: str, never: str) -> None:
    program = f"import sys, {module}; sys.exit('{never}' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_models_are_imported_before_transformers() -> None:
    """As a notebook does it; importing transformers then imports models, in the midst of which it comes."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", "from kallm_bench.models import load_model"], check=True)


def test_only_the_console_prints() -> None:
    for path in FILES:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not prints, path
        if path.parent.name != "console":
            assert "sys.stdout" not in path.read_text(), path


def test_nothing_is_ever_unpickled() -> None:
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        loads = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"]
        imported = {name.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names}
        assert not loads, path
        assert not imported & {"pickle", "dill", "joblib", "cloudpickle"}, path


def test_only_one_module_knows_nvml() -> None:
    importers = [
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and "pynvml" in ast.unparse(node)
    ]
    assert set(importers) == {"hardware.py"}
