"""Damaged, incomplete and mismatched artefacts and students are refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import artefact
from export.backends import open_backend
from export.cli import main
from export.parity import GATES
from export.verify import verify
from tests.tiny import make_student
from vlm.errors import ArtifactError, CheckpointError, GateFailed, UserError
from vlm.manifest import file_entry, read_manifest, write_manifest

PARTS = [("onnx", "fp32", "decoder"), ("gguf", "f16", "mmproj"), ("tensorrt", "fp16", "external_data")]


def _victim(root: Path, role: str) -> Path:
    return root / next(entry.path for entry in read_manifest(root).files if entry.role == role)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, Callable[[Path], None]] = {"flip": _flip, "truncate": _truncate, "remove": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("target", "precision", "role"), PARTS)
def test_damaged_file_is_refused_by_name(
    exported: Callable[..., Any], tmp_path: Path, target: str, precision: str, role: str, damage: str
) -> None:
    root = exported(target, precision, "siglip", "llama").copy_to(tmp_path / "artefact")
    victim = _victim(root, role)
    DAMAGE[damage](victim)
    with pytest.raises(ArtifactError, match=victim.name) as caught:
        verify(root)
    assert caught.value.exit_code == 2


def test_text_and_mmproj_of_different_students_do_not_pair(exported: Callable[..., Any], tmp_path: Path) -> None:
    root = exported("gguf", "f16", "siglip", "llama").copy_to(tmp_path / "artefact")
    manifest = read_manifest(root)
    other = exported("gguf", "f16", "siglip", "qwen3")
    mmproj = manifest.path_of(root, "mmproj")
    shutil.copyfile(other.manifest.path_of(other.root, "mmproj"), mmproj)
    files = tuple(file_entry(root, root / f.path, f.role) for f in manifest.files)
    with pytest.raises(ArtifactError, match="pair id"):
        open_backend(root, dataclasses.replace(manifest, files=files))


def test_verify_reports_a_model_that_answers_differently(exported: Callable[..., Any], tmp_path: Path) -> None:
    """Consistent hashes, wrong function: exit 1 with the failures, not an error."""
    root = exported("onnx", "fp32", "siglip", "llama").copy_to(tmp_path / "artefact")
    manifest = read_manifest(root)
    write_manifest(root, dataclasses.replace(manifest, image={**manifest.image, "std": [0.4, 0.5, 0.5]}))
    assert main(["verify", str(root)]) == 1


def test_verify_json(exported: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(exported("gguf", "f16", "siglip", "llama").root), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["verified"]
    assert report["failures"] == []


@pytest.mark.parametrize(("target", "precision"), [("onnx", "fp32"), ("gguf", "f16"), ("tensorrt", "fp16")])
def test_verify_needs_no_torch(exported: Callable[..., Any], target: str, precision: str) -> None:
    root = exported(target, precision, "siglip", "llama").root
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'optimum', 'sklearn'): sys.modules[name] = None\n"
        "from export.cli import main\n"
        "sys.exit(main(['verify', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stop_word_missing_from_the_eos_list_is_refused(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student")
    path = student / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": config["eos_token_id"][0]}))
    with pytest.raises(CheckpointError, match="always stops at"):
        main(["--target", "gguf", "--student", str(student), "--out", str(tmp_path / "out"), "--samples", "0"])
    assert not (tmp_path / "out").exists()


def test_student_without_weights(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student")
    (student / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        main(["--target", "onnx", "--student", str(student), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_student_with_truncated_weights(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student")
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        main(["--target", "onnx", "--student", str(student), "--out", str(tmp_path / "out")])


def test_no_student_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no finished run"):
        main(["--target", "onnx"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "onnx", "--precision", "q9", "--student", "s"], "q9"),
        (["--target", "tflite"], "tflite"),
        (["frobnicate"], "frobnicate"),
        (["--target", "onnx", "--student", "s", "--samples", "-1"], "negative"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_failed_gate_publishes_unverified_and_exits_1(
    subjects: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = dataclasses.replace(GATES["gguf", "f16"], kl=-1.0)
    monkeypatch.setitem(GATES, ("gguf", "f16"), impossible)
    out = tmp_path / "out"
    command = ["--target", "gguf", "--precision", "f16", "--samples", "2", "--out", str(out)]
    with pytest.raises(GateFailed, match="not verified: golden: kl") as caught:
        main([*command, "--student", str(subjects("siglip", "llama").directory)])
    assert caught.value.exit_code == 1
    assert read_manifest(out).verified is False
    assert "NO: golden: kl" in (out / "README.md").read_text()


def test_interruption_leaves_the_old_artefact_and_finished_stages(
    exported: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("gguf", "f16", "siglip", "llama")
    out = made.copy_to(tmp_path / "out")
    before = (out / "manifest.json").read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artefact, "measure", interrupted)
    command = ["--target", "gguf", "--precision", "f16", "--samples", "0", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--student", str(made.subject.directory)])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.stages", "out"]
    assert (out / "manifest.json").read_bytes() == before


def test_a_folder_that_is_no_artefact_is_never_replaced(subjects: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    student = subjects("siglip", "llama").directory
    with pytest.raises(UserError, match="not an artefact"):
        main(["--target", "gguf", "--student", str(student), "--out", str(tmp_path)])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_command_line_ends_with_one_line_and_the_right_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_dry_run_writes_nothing(
    subjects: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = subjects("siglip", "qwen2").directory
    out = tmp_path / "out"
    assert main(["--target", "gguf", "--student", str(student), "--out", str(out), "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["bytes"] > 1_000_000
    assert answer["also"][0]["bytes"] < answer["bytes"]
    assert list(tmp_path.iterdir()) == []
