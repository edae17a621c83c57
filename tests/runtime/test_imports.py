"""A board has no torch: what must work without it, and what a missing package says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
ANSWER = """
from PIL import Image
from runtime import load
from runtime.api import Done, Sampling
from runtime.images import from_pillow, question
with load({path!r}) as engine:
    *_, done = engine.generate([question("Read it.", from_pillow(Image.new("RGB", (40, 40))))], Sampling(max_new_tokens=3))
assert isinstance(done, Done) and done.usage.completion_tokens == 3
assert not [name for name in sys.modules if name.partition(".")[0] in ("torch", "transformers", "export", "distill")]
"""
FAKE = """
import runtime, runtime.api, runtime.engine, runtime.cli, runtime.profiler, runtime.report, vlm
import runtime.evaluate, runtime.evaluate_compare, runtime.tasks.choices, runtime.tasks.others, runtime.tasks.short_answer
from runtime.images import question
with runtime.load("x", backend="fake") as engine:
    *_, done = engine.generate([question("hi")])
assert done.text == "7"
heavy = {"pyarrow", "torch", "transformers", "tokenizers", "onnxruntime", "llama_cpp", "sklearn", "gradio"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
TORCH = ["torch", "transformers", "safetensors"]
EVERYTHING = [*TORCH, "tokenizers", "jinja2", "onnxruntime", "llama_cpp", "sklearn", "psutil", "onnx", "gguf"]


def python(blocked: list[str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


@pytest.mark.parametrize("fixture", ["onnx_artifact", "gguf_artifact"])
def test_backends_answer_without_torch(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    result = python(TORCH, ANSWER.format(path=str(path)))
    assert result.returncode == 0, result.stderr


def test_core_needs_numpy_and_pillow_only() -> None:
    result = python(EVERYTHING, FAKE)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("blocked", "fixture", "extra"),
    [
        ("onnxruntime", "onnx_artifact", "onnx"),
        ("llama_cpp", "gguf_artifact", "gguf"),
        ("torch", "student", "torch"),
        ("transformers", "student", "torch"),
        ("tokenizers", "onnx_artifact", "tokenizer"),
    ],
)
def test_missing_package_names_its_extra(
    blocked: str, fixture: str, extra: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(fixture)
    code = (
        f"sys.argv = ['x', 'ask', {str(path)!r}, 'hi']\nimport runpy\nrunpy.run_module('runtime', run_name='__main__')"
    )
    result = python([blocked], code)
    assert result.returncode == 3, result.stderr
    assert f"pip install 'align-edge[{extra}]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_rooms_on_the_far_side_of_the_disk_are_not_imported() -> None:
    import ast

    for path in (ROOT / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"distill", "export", "demo"}, path
