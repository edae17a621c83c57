"""Every mistake a user can make gives one line on stderr, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny import make_student
from tests.vlm.test_preprocess import huge_png, noise, png

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student, an ONNX artefact and good and bad images."""
    root = tmp_path_factory.mktemp("world")
    make_student(root / "student", hidden=64, head_dim=16, intermediate=64)
    done = run(root, "export", "--target", "onnx", "--student", "student", "--out", "artefact", "--samples", "4")
    assert done.returncode in (0, 1), done.stderr
    (root / "good.png").write_bytes(png(noise(40, 40)))
    (root / "cut.png").write_bytes(png(noise(64, 64))[:700])
    (root / "huge.png").write_bytes(huge_png(10_000, 10_000))
    return root


def run(cwd: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def altered_copy(root: Path) -> str:
    target = root / "altered"
    shutil.copytree(root / "artefact", target)
    victim = next(target.rglob("*.onnx_data"), None) or next(target.rglob("*.onnx"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    return "altered"


def no_weights(root: Path) -> str:
    target = root / "bare"
    shutil.copytree(root / "student", target)
    for weights in target.glob("*.safetensors"):
        weights.unlink()
    return "bare"


def recipe(root: Path, text: str) -> str:
    (root / "recipe.yaml").write_text(text)
    return "recipe.yaml"


def data_set(root: Path, value: object) -> str:
    (root / "data.json").write_text(json.dumps(value))
    return "data.json"


TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a 7"}]
TRAIN = ["--student", "student", "--objective", "sft", "--steps", "1", "--out", "new-run"]
Case = Callable[[Path], tuple[str, list[str], str]]
CASES: dict[str, Case] = {
    "missing image": lambda r: ("runtime", ["ask", "artefact", "--image", "none.png", "what?"], "none.png"),
    "truncated PNG": lambda r: ("runtime", ["ask", "artefact", "--image", "cut.png", "what?"], "cut.png"),
    "100 megapixels": lambda r: ("runtime", ["ask", "artefact", "--image", "huge.png", "what?"], "megapixels"),
    "unknown backend": lambda r: (
        "runtime",
        ["ask", "artefact", "--backend", "abacus", "--image", "good.png", "what?"],
        "abacus",
    ),
    "byte flipped, ask": lambda r: ("runtime", ["ask", altered_copy(r), "--image", "good.png", "what?"], "altered"),
    "byte flipped, verify": lambda r: ("export", ["verify", altered_copy(r)], "altered"),
    "reserved token": lambda r: ("runtime", ["ask", "artefact", "--image", "good.png", "see <image>"], "<image>"),
    "student without weights, export": lambda r: (
        "export",
        ["--target", "onnx", "--student", no_weights(r), "--out", "new"],
        "weights",
    ),
    "student without weights, train": lambda r: (
        "distill",
        ["train", "--preset", "digits", "--objective", "sft", "--student", no_weights(r), "--out", "new-run"],
        "weights",
    ),
    "unknown YAML key": lambda r: ("distill", ["train", "--config", recipe(r, "learning_rat: 1\n")], "learning_rat"),
    "wrong YAML type": lambda r: ("distill", ["train", "--config", recipe(r, "steps: many\n")], "steps"),
    "broken YAML": lambda r: ("distill", ["train", "--config", recipe(r, "steps: [1\n")], "YAML"),
    "unknown nested YAML key": lambda r: ("distill", ["train", "--config", recipe(r, "align:\n  cand: 3\n")], "cand"),
    "unknown option": lambda r: ("distill", ["train", "--stepz", "3"], "stepz"),
    "unknown objective": lambda r: ("distill", ["train", "--preset", "digits", "--objective", "magic"], "magic"),
    "unknown command": lambda r: ("distill", ["destill"], "destill"),
    "unknown preset": lambda r: ("distill", ["train", "--preset", "letters"], "letters"),
    "empty data set": lambda r: ("distill", ["train", *TRAIN, "--data", data_set(r, [])], "empty"),
    "data without images": lambda r: (
        "distill",
        ["train", *TRAIN, "--data", data_set(r, [{"image": "x.png", "conversations": TURNS}])],
        "x.png",
    ),
    "data with a bad turn": lambda r: (
        "distill",
        ["train", *TRAIN, "--data", data_set(r, [{"conversations": [{"from": "cat", "value": "miau"}]}])],
        "record 0",
    ),
    "no teacher": lambda r: ("distill", ["train", "--student", "student", "--data", "d.json", "--out", "x"], "teacher"),
    "no target": lambda r: ("export", [], "target"),
    "unknown target": lambda r: ("export", ["--target", "floppy"], "floppy"),
    "unknown precision": lambda r: (
        "export",
        ["--target", "onnx", "--student", "student", "--precision", "int3"],
        "int3",
    ),
    "not an artefact": lambda r: ("runtime", ["profile", "nowhere"], "nowhere"),
    "demo of nothing": lambda r: ("demo", ["nowhere"], "nowhere"),
    "demo open to the world": lambda r: ("demo", ["artefact", "--host", "0.0.0.0"], "--auth"),
    "compare with a wrong objective": lambda r: ("distill", ["compare", "--objectives", "sft,magic"], "magic"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_two_nothing_written(world: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    module, arguments, expected = CASES[name](root)
    before = files(root)
    done = run(root, module, *arguments)
    assert done.returncode == 2, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert len(lines) <= 2, done.stderr
    assert expected in lines[-1]
    assert done.stdout == ""
    assert files(root) == before


def test_a_good_run_of_the_same_world_works(world: Path) -> None:
    done = run(world, "runtime", "ask", "artefact", "--image", "good.png", "--max-new-tokens", "3", "--json", "what?")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["tokens"] <= 3
    assert Image.open(world / "good.png").size == (40, 40)
