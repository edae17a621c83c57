"""Bytes and bits of the weights in ONNX files, per part of the student."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from export.precision import KINDS, Precision
from export.student import Student, blocks_used

# tables of angles stored beside the weights; a decoder reads one row of them per token
TABLES = ("cos", "sin")


def tensor_bytes(tensor: Any) -> int:
    """Stored bytes of an initialiser, from its declaration."""
    import onnx

    count = math.prod(tensor.dims)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return -(-count // 2)
    return int(count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def weight_sizes(path: Path) -> dict[str, int]:
    """Initialiser name -> bytes, angle tables left out; external data is not read."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return {tensor.name: tensor_bytes(tensor) for tensor in graph.initializer if tensor.name not in TABLES}


def parameter_counts(student: Student) -> dict[str, int]:
    """Parameters of each part as the graphs use them: unused vision blocks do not count, a tied head does."""
    model, facts = student.model.model, student.facts
    tower = model.vision_tower
    last = max(blocks_used(facts, len(tower.encoder.layers)))

    def count(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    vision = count(tower.embeddings) + sum(count(block) for block in tower.encoder.layers[:last])
    vision += count(model.multi_modal_projector) + (count(tower.pre_layrnorm) if facts.tower == "clip" else 0)
    language = model.language_model
    return {
        "vision": vision,
        "embed": count(language.embed_tokens),
        "decoder": count(language) - count(language.embed_tokens),
        "head": count(student.model.lm_head),
    }


def describe(
    student: Student, paths: dict[str, Path], precision: Precision, fallbacks: dict[str, dict[str, int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest's precision section, and the byte counts a profiler needs.

    Args:
        paths: role -> graph file.
        fallbacks: role -> what could not be stored as asked.
    """
    facts, counts = student.facts, parameter_counts(student)
    sizes = {role: weight_sizes(paths[role]) for role in ("vision_encoder", "embed_tokens", "decoder")}
    head = sum(size for name, size in sizes["decoder"].items() if name.startswith("head."))
    stored = {
        "vision": sum(sizes["vision_encoder"].values()),
        "embed": sum(sizes["embed_tokens"].values()),
        "decoder": sum(sizes["decoder"].values()) - head,
        "head": head,
    }
    section = {
        name: {
            "type": getattr(precision, part),
            "bits_per_weight": 8 * stored[part] / counts[part],
            "bytes": stored[part],
            "fallbacks": fallbacks.get(name, {}),
        }
        for part, name in (
            ("vision", "vision_encoder"),
            ("embed", "embed_tokens"),
            ("decoder", "decoder"),
            ("head", "lm_head"),
        )
    }
    half = KINDS[precision.decoder].half
    return section, {
        "decoder_weight_bytes": stored["decoder"] + head,
        "lm_head_bytes": head,
        "kv_bytes_per_token": facts.kv_bytes_per_token(2 if half else 4),
        "kv_type": "fp16" if half else "fp32",
    }
