"""The gate must see real mistakes: each fault is injected into files that were right, and must be caught."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import to_gguf
from vlm.manifest import read_manifest


@pytest.mark.parametrize(("target", "precision"), [("onnx", "fp32"), ("tensorrt", "fp16")])
def test_wrong_mean_is_caught(exported: Callable[..., Any], target: str, precision: str) -> None:
    made = exported(target, precision, "siglip", "llama")
    wrong = dataclasses.replace(made.manifest, image={**made.manifest.image, "mean": [0.45, 0.5, 0.5]})
    assert made.measure_again(made.root, wrong).parity["failures"]


def _gguf_with(made: Any, root: Path, change: Callable[[Any], None]) -> Any:
    """Write both GGUF files of a changed copy of the student into a copy of the artefact."""
    root = made.copy_to(root)
    manifest = read_manifest(root)
    student = dataclasses.replace(made.subject.student, model=copy.deepcopy(made.subject.student.model))
    change(student)
    to_gguf.write_text(student, manifest.path_of(root, "text_gguf"), manifest.pair_id, "")
    to_gguf.write_mmproj(student, manifest.path_of(root, "mmproj"), manifest.pair_id)
    return made.measure_again(root)


def _gguf_swap_kv(student: Any) -> None:
    attention = student.model.model.language_model.layers[0].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def _gguf_scale_q(student: Any) -> None:
    student.model.model.language_model.layers[1].self_attn.q_norm.weight.mul_(1.1)


def _gguf_drop_block(student: Any) -> None:
    student.model.config.vision_config.num_hidden_layers -= 1


def _gguf_one_weight(student: Any) -> None:
    weight = student.model.model.language_model.layers[0].mlp.up_proj.weight
    weight[3, 5] += 10 * weight.std()


GGUF_FAULTS = {
    "swapped keys and values": _gguf_swap_kv,
    "q scaled": _gguf_scale_q,
    "dropped vision block": _gguf_drop_block,
    "one weight changed": _gguf_one_weight,
}


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_gguf_gate_catches(exported: Callable[..., Any], tmp_path: Path, fault: str) -> None:
    made = exported("gguf", "f16", "siglip", "qwen3")
    manifest = _gguf_with(made, tmp_path / "broken", GGUF_FAULTS[fault])
    assert not manifest.verified
    assert manifest.parity["failures"]


def test_gguf_gate_catches_a_wrong_mean(
    exported: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("gguf", "f16", "siglip", "qwen3")
    student = made.subject.student
    image = dataclasses.replace(student.checkpoint.image, mean=(0.45, 0.5, 0.5))
    checkpoint = dataclasses.replace(student.checkpoint, image=image)
    root = made.copy_to(tmp_path / "broken")
    manifest = read_manifest(root)
    to_gguf.write_mmproj(
        dataclasses.replace(student, checkpoint=checkpoint), manifest.path_of(root, "mmproj"), manifest.pair_id
    )
    assert made.measure_again(root).parity["failures"]


def test_gguf_rewriting_without_a_fault_passes(exported: Callable[..., Any], tmp_path: Path) -> None:
    made = exported("gguf", "f16", "siglip", "qwen3")
    assert _gguf_with(made, tmp_path / "same", lambda _: None).parity["failures"] == []
