"""One tiny random student per run of the tests, as checkpoint, ONNX artefact and GGUF artefact."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def run_module(arguments: Sequence[str | Path], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m ...` in a process of its own, one thread, no network."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="session")
def command() -> Command:
    return run_module


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="the reference side needs transformers")
    from tests.tiny import make_student

    return make_student(tmp_path_factory.mktemp("student") / "tiny", seed=3)


def export(target: str, precision: str, student: Path, out: Path, *more: str) -> Path:
    options = [
        "--target",
        target,
        "--precision",
        precision,
        "--student",
        student,
        "--out",
        out,
        "--samples",
        "4",
        *more,
    ]
    result = run_module(["export", *options])
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def onnx_artifact(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    return export("onnx", "fp32", student, tmp_path_factory.mktemp("onnx") / "tiny-onnx")


@pytest.fixture(scope="session")
def gguf_artifact(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    return export("gguf", "f16", student, tmp_path_factory.mktemp("gguf") / "tiny-gguf")


@pytest.fixture
def damaged(onnx_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the ONNX artefact to do harm to."""
    return Path(shutil.copytree(onnx_artifact, tmp_path / "damaged"))
