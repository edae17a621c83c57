"""The import arrows of the design hold, and a board without torch can load what it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("vlm", "distill", "export", "runtime", "demo")
ALLOWED = {
    "vlm": set(),
    "distill": {"vlm"},
    "export": {"vlm"},
    "runtime": {"vlm"},
    "demo": {"vlm", "runtime"},
}


def imports(path: Path) -> set[str]:
    """Top-level packages a file imports, lazily inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_design_allows(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        others = (imports(path) & set(ROOMS)) - {room}
        assert others <= ALLOWED[room], f"{path.relative_to(ROOT)} imports {sorted(others - ALLOWED[room])}"


@pytest.mark.parametrize("room", ROOMS)
def test_relative_imports_do_not_hide_an_arrow(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        levels = [n.level for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert max(levels, default=0) == 0, f"{path.relative_to(ROOT)} uses a relative import"


def test_the_arrow_test_itself_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from export.verify import check\n    return check\n")
    assert "export" in imports(bad)


BLOCKER = """
import sys
BLOCKED = {blocked!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
        return None
sys.meta_path.insert(0, Blocker())
import importlib, pkgutil
for package in ("vlm", "runtime"):
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
print("ok")
"""


@pytest.mark.parametrize(
    "blocked",
    [
        {"torch", "transformers"},
        {"torch", "transformers", "onnxruntime", "llama_cpp", "tensorrt", "sklearn", "tokenizers", "jinja2", "gradio"},
    ],
    ids=["no-torch", "numpy-and-pillow-only"],
)
def test_every_module_of_vlm_and_runtime_imports_without(blocked: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=blocked)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"


def test_files_and_functions_stay_small() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            assert len(text.splitlines()) <= 400, f"{path.relative_to(ROOT)} has {len(text.splitlines())} lines"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or node.lineno) - node.lineno + 1
                    assert length <= 80, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"
