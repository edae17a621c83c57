"""Graphs, plan and script from which a device with TensorRT builds its engines; no TensorRT needed here."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from export import build_engine
from export.declare import NEW, PAST, TOTAL, GraphSpec, delta_spec, vision_spec
from export.precision import KINDS
from export.student import Student
from export.to_onnx import save, trace
from vlm.errors import GateFailed
from vlm.files import sha256_file

PLAN_SCHEMA = "vlm-build-plan/1"
TORCH_NAMES = {"fp16": "float16", "fp32": "float32"}
RESERVED_ROWS = 1
MAX_IMAGES = 4
WORKSPACE = 1 << 30
CONTEXT_LIMIT = 4096
# every operator and element type here is parsed by TensorRT 10.3 and later; no plugin, no contrib operator
PLAIN_OPS = frozenset(
    [
        "Add",
        "Cast",
        "Concat",
        "Conv",
        "Cos",
        "Div",
        "Erf",
        "Expand",
        "Gather",
        "LayerNormalization",
        "MatMul",
        "Mul",
        "Neg",
        "Pow",
        "ReduceMean",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Transpose",
        "Unsqueeze",
    ]
)
PLAIN_TYPES = frozenset({"FLOAT", "FLOAT16", "INT64", "INT32", "BOOL"})


def write(student: Student, root: Path, precision: str) -> tuple[list[tuple[Path, str]], dict[str, Any]]:
    """Write vision and decoder graphs, the embedding table, the plan and the build script.

    Returns: (file, role) pairs, and the manifest's `io`.
    """
    import torch

    from export.graph import DeltaDecoder, VisionEncoder
    from export.linear import Recipe

    name = TORCH_NAMES[precision]
    recipe = Recipe(student, KINDS[precision])
    facts, tokens = student.facts, student.checkpoint.image.tokens
    vision, decoder = vision_spec(facts, tokens, name), delta_spec(facts, name)
    files: list[tuple[Path, str]] = []
    graphs = (
        ("vision_encoder", VisionEncoder(recipe, getattr(torch, name)), vision, "vision_encoder"),
        ("decoder", DeltaDecoder(recipe), decoder, "decoder"),
    )
    for stem, module, spec, role in graphs:
        path = root / "onnx" / f"{stem}.onnx"
        extra = save(trace(module, spec, student), path)
        check_plain(path)
        files += [(path, role), *extra]
    table = root / "embed_tokens.npy"
    np.save(table, student.model.model.language_model.embed_tokens.weight.float().numpy().astype(name))
    plan = root / build_engine.PLAN
    plan.write_text(json.dumps(make_plan(student, root, vision, decoder), indent=1) + "\n")
    script = root / "build_engine.py"
    shutil.copyfile(build_engine.__file__, script)
    files += [(table, "embed_tokens"), (plan, "build_plan"), (script, "build_script")]
    return files, {"vision_encoder": vision.to_json(), "decoder": decoder.to_json()}


def check_plain(path: Path) -> None:
    """Hold a graph to the operators every supported TensorRT parses.

    Raises:
        GateFailed: names the first operator or type outside the list.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    for node in graph.node:
        if node.op_type not in PLAIN_OPS or node.domain not in ("", "ai.onnx"):
            raise GateFailed(
                f"{path.name} uses {node.domain or 'ai.onnx'}.{node.op_type}, which TensorRT may not parse"
            )
    for tensor in graph.initializer:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        if name not in PLAIN_TYPES:
            raise GateFailed(f"{path.name} holds a {name} tensor ({tensor.name}), which TensorRT does not take")


def make_plan(student: Student, root: Path, vision: GraphSpec, decoder: GraphSpec) -> dict[str, Any]:
    """What to build: shapes as [minimum, typical, maximum] per profile, and how the caller keeps the cache."""
    facts = student.facts
    context = min(facts.context_length, CONTEXT_LIMIT)
    prompt = min(context, student.checkpoint.image.tokens + 64)
    side = facts.image_size
    row_bytes = facts.kv_heads * facts.head_dim * (2 if decoder.inputs[0].dtype == "float16" else 4)
    images = [[n, 3, side, side] for n in (1, 1, MAX_IMAGES)]
    return {
        "schema": PLAN_SCHEMA,
        "tensorrt": {"minimum": "10.3", "below": "12", "strongly_typed": True},
        "builder": {"workspace_bytes": WORKSPACE, "optimization_level": 3},
        "timing_cache": "engines/timing.cache",
        "engines": {
            "vision_encoder": {
                "onnx": "onnx/vision_encoder.onnx",
                "engine": "engines/vision_encoder.engine",
                "graph_sha256": graph_sha256(root / "onnx" / "vision_encoder.onnx"),
                "profiles": {"vision": {vision.inputs[0].name: images}},
            },
            "decoder": {
                "onnx": "onnx/decoder.onnx",
                "engine": "engines/decoder.engine",
                "graph_sha256": graph_sha256(root / "onnx" / "decoder.onnx"),
                "profiles": {
                    "prefill": _profile(decoder, (1, prompt, context), (1, 1, context)),
                    "decode": _profile(decoder, (1, 1, 1), (1, prompt, context)),
                },
            },
        },
        "cache": {
            "reserved_rows": RESERVED_ROWS,
            "row_bytes": row_bytes,
            # TensorRT takes addresses at multiples of 256: else new rows go through a buffer and a copy
            "zero_copy": row_bytes % 256 == 0,
            "max_rows": context + RESERVED_ROWS,
            "note": "row 0 is zeros and always masked; bind past at the start of a buffer and new rows behind them",
        },
        "key": ["graph", "profiles", "builder", "tensorrt", "gpu", "sm", "cuda", "l4t"],
    }


def _profile(spec: GraphSpec, new: tuple[int, ...], past: tuple[int, ...]) -> dict[str, list[list[int]]]:
    """Minimum, typical and maximum shape of each input; a cache is never empty (row 0 is reserved)."""
    shapes: dict[str, list[list[int]]] = {}
    for port in spec.inputs:
        sizes = ({NEW: s, PAST: p, TOTAL: s + p} for s, p in zip(new, past, strict=True))
        shapes[port.name] = [[size[d] if isinstance(d, str) else d for d in port.dims] for size in sizes]
    return shapes


def graph_sha256(path: Path) -> str:
    """One hash over a graph and its external data."""
    data = path.with_name(path.name + "_data")
    parts = [sha256_file(p) for p in (path, data) if p.is_file()]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
