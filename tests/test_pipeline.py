"""The whole way on a tiny model, through the real commands: distil, export every target, run every backend."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.test_bad_input import ROOT, run
from tests.tiny import make_student
from vlm import digits

SIZES = {"hidden": 64, "head_dim": 16, "intermediate": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    make_student(root / "teacher", seed=1, layers=2, **SIZES)
    make_student(root / "start", seed=2, layers=1, **SIZES)
    for index in range(3):
        digits.sample("test", index).image.save(root / f"{index}.png")
    options = ["--steps", "6", "--batch_size", "4", "--eval_samples", "20", "--lr", "1e-4", "--threads", "1"]
    done = run(
        root, "distill", "train", "--preset", "digits", "--teacher", "teacher", "--student", "start", *options, "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"student", "objective", "exact_match", "n", "seconds", "seed"} <= set(result)
    assert result["objective"] == "align-ti"
    return root


def test_the_newest_run_goes_to_every_target_and_every_backend_says_the_same(folder: Path) -> None:
    answers: dict[str, list[str]] = {}
    student = next((folder / "runs").glob("*/student")).relative_to(folder)
    answers["torch"] = ask(folder, str(student))
    for target, precision in (("onnx", "fp32"), ("gguf", "f16")):
        done = run(
            folder, "export", "--target", target, "--precision", precision, "--samples", "10", "--out", target, "--json"
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert {"artefact", "verified", "bytes", "seconds", "peak_rss_bytes", "parity", "accuracy"} <= set(result)
        assert result["verified"] is True
        checked = run(folder, "export", "verify", target, "--json")
        assert checked.returncode == 0, checked.stderr
        assert json.loads(checked.stdout.splitlines()[-1])["failures"] == []
        answers[target] = ask(folder, target)
    assert answers["torch"] == answers["onnx"] == answers["gguf"]
    assert len(set(answers["torch"])) > 1, "answers should depend on the image"


def ask(folder: Path, artefact: str) -> list[str]:
    texts = []
    for index in range(3):
        question = digits.sample("test", index).question
        done = run(
            folder, "runtime", "ask", artefact, "--image", f"{index}.png", question, "--max-new-tokens", "6", "--json"
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.splitlines()[-1])
        assert {"text", "tokens", "ttft_ms", "tpot_ms", "stages_ms"} <= set(answer)
        texts.append(answer["text"])
    return texts


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed: engines are built")
def test_tensorrt_leaves_graphs_plan_and_script_and_says_what_to_do(folder: Path) -> None:
    done = run(folder, "export", "--target", "tensorrt", "--samples", "5", "--out", "trt")
    assert done.returncode == 3, done.stderr
    assert "python -m export build trt" in done.stderr
    names = {path.name for path in (folder / "trt").rglob("*")}
    assert {"build_plan.json", "build_engine.py", "engine_key.py", "manifest.json"} <= names
    assert any(name.endswith(".onnx") for name in names)
    asked = run(folder, "runtime", "ask", "trt", "--image", "0.png", "what?")
    assert asked.returncode == 3
    assert "tensorrt" in asked.stderr
    asked = run(folder, "runtime", "ask", "trt", "--provider", "cpu", "--image", "0.png", "what?", "--json")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout.splitlines()[-1])["tokens"] > 0


README = (ROOT / "README.md").read_text()
DOCUMENTED = sorted(set(re.findall(r"python -m (distill|export|runtime|demo)((?: [a-z]+)?)(?= |`|\n|$)", README)))


@pytest.mark.parametrize(("module", "command"), DOCUMENTED)
def test_every_documented_command_explains_itself(tmp_path: Path, module: str, command: str) -> None:
    words = [word for word in [command.strip()] if word]
    done = run(tmp_path, module, *words, "--help")
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout.lower()


def test_readme_names_only_files_that_exist() -> None:
    named = set(re.findall(r"`((?:vlm|distill|export|runtime|demo|tests|scripts|benchmarks)/[\w./-]*)`", README))
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
