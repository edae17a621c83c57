"""Manifests and configurations of the right form with wrong things inside: one line each, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.cli import main
from export.gguf_precision import parse_gguf
from export.imatrix import Importance, check
from export.to_gguf import exact_kind
from export.verify import verify
from vlm.errors import ArtifactError, CheckpointError, ToolError, UserError
from vlm.manifest import NAME


@pytest.mark.parametrize(
    "change",
    [{"precision": {}}, {"image": {}}, {"chat": {}}, {"model": {}}, {"chat": {"magic": 1}}],
    ids=lambda change: json.dumps(change),
)
def test_a_manifest_that_lacks_something_is_damaged(
    exported: Callable[..., Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(exported("onnx", "fp32", "siglip", "llama").root, tmp_path / "a")
    path = tmp_path / "a" / NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match="is damaged"):
        verify(tmp_path / "a")


def test_a_manifest_that_is_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        verify(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"vision_feature_select_strategy": "cls"},
        {"vision_feature_layer": None},
        {"vision_feature_layer": []},
        {"text_config": "x"},
        {"text_config": {"num_attention_heads": 0}},
    ],
    ids=lambda change: json.dumps(change),
)
def test_a_configuration_that_is_none_is_said_before_any_work(
    subjects: Callable[..., Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(subjects("siglip", "qwen3").directory, tmp_path / "student")
    path = tmp_path / "student" / "config.json"
    value = json.loads(path.read_text())
    for name, new in change.items():
        value[name] = {**value[name], **new} if isinstance(new, dict) else new
    path.write_text(json.dumps(value))
    command = ["--target", "onnx", "--student", str(tmp_path / "student"), "--out", str(tmp_path / "out"), "--dry-run"]
    with pytest.raises(CheckpointError) as caught:
        main(command)
    assert "config.json" in caught.value.message
    assert isinstance(caught.value, ToolError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        (["--precision", ""], "precision"),
        (["--out", "x" * 300], "cannot be used"),
        (["--target", "gguf", "--precision", "q4_k_m", "--calibration", "."], "holds no image"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_work(
    subjects: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], seen: str
) -> None:
    monkeypatch.chdir(tmp_path)
    student = str(subjects("siglip", "qwen3").directory)
    with pytest.raises(UserError, match=seen):
        main(["--target", "onnx", "--student", student, "--out", "out", "--dry-run", *changes])


def test_a_matrix_without_the_head_is_taken() -> None:
    """As `llama-imatrix` writes it unless it is told to process the output."""
    found = Importance({"blk.0.ffn_up.weight": np.ones(8, np.float32)}, 1, "", "")
    check(found, {"blk.0.ffn_up.weight": (16, 8), "output.weight": (32, 8)}, Path("m.gguf"))
    with pytest.raises(UserError, match=r"lacks blk\.1"):
        check(found, {"blk.1.ffn_up.weight": (16, 8)}, Path("m.gguf"))


def test_quantisation_starts_from_the_numbers_as_stored() -> None:
    class Stored:
        kind = "f32"

    for precision, kind in (("bf16,embed=q8_0", "f32"), ("q4_k_m", "f32"), ("bf16", "bf16"), ("f16", "f16")):
        assert exact_kind(parse_gguf(precision), Stored()) == kind  # type: ignore[arg-type]
