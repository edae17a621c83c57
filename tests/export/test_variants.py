"""Settings published checkpoints differ in, several in each student: the exact function at fp32, the limits at int4."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from export.artefact import Making
from export.evidence import collect
from export.options import ExportOptions
from export.precision import Flavour
from export.stages import Stages
from export.student import open_student
from export.verify import verify
from tests.tiny import make_student, rebuild
from vlm.errors import CheckpointError
from vlm.load import open_checkpoint
from vlm.manifest import write_manifest

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {**LLAMA3, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}


@dataclass(frozen=True)
class Variant:
    """Shape fields for a tiny student, then changes of its configuration."""

    shape: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "llama 3.2, biases, untied head, second last features": Variant(
        {"decoder": "llama", "tied": False, "feature_layer": -2},
        text={"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen 3, yarn, wide heads, features of two layers": Variant(
        {"decoder": "qwen3", "head_dim": 80, "tied": False},
        text={"rope_parameters": YARN},
        top={"vision_feature_layer": [-2, 1]},
    ),
    "qwen 2.5, rows that fill no block, siglip 2 patches": Variant(
        {"decoder": "qwen2", "hidden": 144, "heads": 3, "kv_heads": 1, "intermediate": 200, "vision_intermediate": 100}
        | {"image_size": 64, "patch_size": 16},
        text={"rope_parameters": LINEAR, "rms_norm_eps": 1e-6},
        top={"multimodal_projector_bias": False},
    ),
    "clip with its class token, all heads": Variant(
        {"tower": "clip", "decoder": "qwen2", "kv_heads": 4, "feature_layer": 1},
        vision={"hidden_act": "gelu"},
        top={"vision_feature_select_strategy": "full"},
    ),
}


# the fused operators in float32 are held to the exact limits; set EXPORT_FULL_MATRIX=1 for the other writings
WRITTEN: list[tuple[str, Flavour]] = [("fp32", "ort")]
if os.environ.get("EXPORT_FULL_MATRIX"):
    WRITTEN += [("fp32", "portable"), ("int4", "ort"), ("int4", "portable"), ("q4f16", "ort"), ("int8", "ort")]


@pytest.mark.parametrize(("precision", "flavour"), WRITTEN)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_holds_its_limits(tmp_path: Path, name: str, precision: str, flavour: Flavour) -> None:
    variant = VARIANTS[name]
    directory = make_student(tmp_path / "student", **variant.shape)
    rebuild(directory, variant.text, variant.vision, variant.top)
    student = open_student(open_checkpoint(directory))
    root = tmp_path / "artefact"
    root.mkdir()
    run = ExportOptions("onnx", directory, root, precision, samples=2, flavour=flavour, ablation=False)
    manifest = Making(student, collect(student, 2, seed=0, limit=2), run, root, Stages(None)).finish()
    write_manifest(root, manifest)
    assert manifest.parity["failures"] == []
    assert verify(root)["failures"] == []
    if "rope_parameters" in variant.text and variant.text["rope_parameters"] is LLAMA3:
        assert student.model.model.language_model.rotary_emb.inv_freq[-1] < 10000.0 ** (-62 / 64) / 4
    if precision == "fp32":
        assert manifest.parity["worst"]["prefill"] <= 3e-4
    elif precision == "int4":
        assert manifest.precision["decoder"]["bits_per_weight"] < 6.5


REFUSED = {
    "naflex": ({}, {"model_type": "siglip2_vision_model"}, {}, "fixed resolution"),
    "partial rotation": (
        {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
        {},
        {},
        "partial_rotary_factor",
    ),
    "dynamic rotation": ({"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, {}, {}, "dynamic"),
    "layer beyond the tower": ({}, {}, {"vision_feature_layer": -4}, "outside"),
    "embeddings as features": ({}, {}, {"vision_feature_layer": 0}, "outside"),
    "sliding windows": ({"layer_types": ["sliding_attention", "full_attention"]}, {}, {}, "full attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path, name: str) -> None:
    from export.student import check_decoder, read_facts

    text, vision, top, message = REFUSED[name]
    directory = make_student(tmp_path / "student")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= text
    config["vision_config"] |= vision
    path.write_text(json.dumps(config | top))
    with pytest.raises(CheckpointError, match=message):
        check_decoder(open_checkpoint(directory), read_facts(open_checkpoint(directory)))
