"""Graphs, plan and script from which a device with TensorRT builds its engines; no TensorRT needed here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export import build_engine, trt_ops
from export.declare import NEW, PAST, TOTAL, GraphSpec, delta_spec, vision_spec
from export.precision import Algorithm
from export.sizes import parameter_counts, weight_sizes
from export.stages import Stages, code_sha256, student_key
from export.student import Student
from export.to_onnx import TOOLS, write_module
from export.trt_precision import TRT_KINDS, TrtPrecision
from vlm import engine_key
from vlm.files import sha256_file

if TYPE_CHECKING:
    from torch import nn

    from export.linear import Range

PLAN_SCHEMA = "vlm-build-plan/2"
RESERVED_ROWS = 1
IMAGE_BUCKETS = (1, 2, 4)
CONTEXT_LIMIT = 4096
PREFILL_ROWS = 512
TABLE_ROWS = 8192
# past lengths for which the runtime records a CUDA graph; longer ones in steps of the last
DECODE_BUCKETS = (128, 256, 512, 1024)
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
Files = list[tuple[Path, str]]


@dataclass(frozen=True)
class TrtStorage:
    """How weights are kept in the two graphs.

    Attributes:
        ranges: calibration per module path; int8 needs it.
        wide: parts whose residual stream leaves float16 and stays float32.
    """

    precision: TrtPrecision
    algorithm: Algorithm = "default"
    ranges: Mapping[str, Range] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TrtGraph:
    """One graph before it is traced; `fallbacks` fills while it is."""

    stem: str
    spec: GraphSpec
    opset: int
    build: Callable[[], nn.Module]
    fallbacks: dict[str, int]


def graphs(student: Student, storage: TrtStorage) -> tuple[TrtGraph, TrtGraph]:
    """Vision encoder and decoder."""
    import torch

    from export.graph import DeltaDecoder, VisionEncoder
    from export.trt_linear import TrtRecipe, recipe_of

    facts, chosen = student.facts, storage.precision

    def recipe(part: str, kind: str) -> TrtRecipe:
        known = TRT_KINDS[kind]
        half = known.activation == "float16"  # bfloat16 has float32's range
        return TrtRecipe(
            student,
            known.kind,
            algorithm=storage.algorithm,
            ranges=storage.ranges,
            wide=half and part in storage.wide,
            activation=known.activation,
        )

    vision, decoder = recipe("vision", chosen.vision), recipe("decoder", chosen.decoder)
    pixels = "float32" if vision.activation == "bfloat16" else vision.activation
    head = recipe_of(decoder, chosen.head).kind
    return (
        TrtGraph(
            "vision_encoder",
            vision_spec(facts, student.checkpoint.image.tokens, pixels),
            TRT_KINDS[chosen.vision].opset,
            lambda: VisionEncoder(vision, getattr(torch, pixels)),
            vision.fallbacks,
        ),
        TrtGraph(
            "decoder",
            delta_spec(facts, chosen.io, chosen.activation),
            chosen.decoder_opset,
            lambda: DeltaDecoder(decoder, head),
            decoder.fallbacks,
        ),
    )


def write(
    student: Student, root: Path, storage: TrtStorage, stages: Stages, pair_id: str
) -> tuple[Files, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Write vision and decoder graphs, the embedding table, the plan and the build script.

    Returns: (file, role) pairs, and the manifest's `io`, `precision` and numbers for `model`.

    Raises:
        GateFailed: a graph holds something a TensorRT we claim does not parse.
    """
    files: Files = []
    planned, of_student = graphs(student, storage), student_key(student.checkpoint)
    for graph in planned:
        key = _stage_key(student, storage, graph.stem, of_student)
        files += stages.files(graph.stem, key, root, lambda folder, g=graph: _write_graph(student, g, folder), graph.fallbacks)  # type: ignore[misc]  # fmt: skip
    table = root / "embed_tokens.npy"
    _write_table(student, table, storage.precision.io)
    plan = root / build_engine.PLAN
    plan.write_text(json.dumps(make_plan(student, root, storage.precision, planned, pair_id), indent=1) + "\n")
    files += [(table, "embed_tokens"), (plan, "build_plan")]
    for module, role in ((build_engine, "build_script"), (engine_key, "build_script_part")):
        script = root / Path(module.__file__).name  # type: ignore[arg-type]
        shutil.copyfile(module.__file__, script)  # type: ignore[arg-type]
        files.append((script, role))
    section, counts = _describe(student, storage, {role: path for path, role in files}, planned)
    return files, {graph.stem: graph.spec.to_json() for graph in planned}, section, counts


def _write_table(student: Student, path: Path, dtype: str) -> None:
    """A piece at a time: a large vocabulary in float32 beside the model would double its memory.

    Not through a mapped file: on a full disk that ends the process instead of raising.
    """
    weight = student.model.model.language_model.embed_tokens.weight.detach()
    kind = np.dtype(dtype)
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": tuple(weight.shape)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(weight), TABLE_ROWS):
            rows = weight[start : start + TABLE_ROWS].float().numpy().astype(kind)
            file.write(np.ascontiguousarray(rows).data)


def _write_graph(student: Student, graph: TrtGraph, folder: Path) -> Files:
    path = folder / "onnx" / f"{graph.stem}.onnx"
    role = "vision_encoder" if graph.stem == "vision_encoder" else "decoder"
    files = [(path, role), *write_module(graph.build(), graph.spec, student, graph.opset, path)]
    trt_ops.check(path)
    return files


def _stage_key(student: Student, storage: TrtStorage, stem: str, of_student: list[Any]) -> dict[str, Any]:
    """Everything the bytes of one graph depend on, this program's own text included."""
    seen = hashlib.sha256()
    for path, fold in sorted(student.folds.items()):
        for scale in (fold.input, fold.output):
            seen.update(path.encode() + (b"" if scale is None else scale.numpy().tobytes()))
    for path, span in sorted(storage.ranges.items()):
        seen.update(f"{path} {span.low} {span.high}".encode() + span.power_K.numpy().tobytes())
    return {
        "student": of_student,
        "graph": f"tensorrt {stem}",
        "options": [repr(storage.precision), storage.algorithm, sorted(storage.wide)],
        "calibration": seen.hexdigest(),
        "code": code_sha256(),
        "versions": [importlib.metadata.version(name) for name in TOOLS],
    }


def _describe(
    student: Student, storage: TrtStorage, paths: dict[str, Path], planned: tuple[TrtGraph, TrtGraph]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest's precision section, and the byte counts a profiler needs."""
    facts, chosen, counts = student.facts, storage.precision, parameter_counts(student)
    vision, decoder = weight_sizes(paths["vision_encoder"]), weight_sizes(paths["decoder"])
    head = sum(size for name, size in decoder.items() if name.startswith("head."))
    stored = {
        "vision_encoder": ("vision", chosen.vision, sum(vision.values()), planned[0].fallbacks),
        "decoder": ("decoder", chosen.decoder, sum(decoder.values()) - head, planned[1].fallbacks),
        "lm_head": ("head", chosen.head, head, {}),
        "embed_tokens": ("embed", "fp16" if chosen.io == "float16" else "fp32", counts["embed"] * BYTES[chosen.io], {}),
    }
    section = {
        name: {"type": kind, "bits_per_weight": 8 * size / counts[part], "bytes": size, "fallbacks": dict(fallbacks)}
        for name, (part, kind, size, fallbacks) in stored.items()
    }
    return section, {
        "decoder_weight_bytes": sum(decoder.values()),
        "lm_head_bytes": head,
        "kv_bytes_per_token": facts.kv_bytes_per_token(BYTES[chosen.activation]),
        "kv_type": {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[chosen.activation],
    }


def make_plan(
    student: Student, root: Path, precision: TrtPrecision, planned: tuple[TrtGraph, TrtGraph], pair_id: str
) -> dict[str, Any]:
    """What to build: shapes as [minimum, typical, maximum] per profile, and how the caller keeps the cache."""
    facts, vision, decoder = student.facts, planned[0].spec, planned[1].spec
    context = min(facts.context_length, CONTEXT_LIMIT)
    rows = min(context, PREFILL_ROWS)
    typical = min(rows, student.checkpoint.image.tokens + 64)
    side = facts.image_size
    images = {f"images_{n}": {vision.inputs[0].name: [[n, 3, side, side]] * 3} for n in IMAGE_BUCKETS}
    cache = next(port for port in decoder.inputs if port.name.startswith("past_"))
    row_bytes = facts.kv_heads * facts.head_dim * BYTES[cache.dtype]
    return {
        "schema": PLAN_SCHEMA,
        "pair_id": pair_id,
        "tensorrt": {"minimum": "10.3", "below": "12", "checked": [p.version for p in trt_ops.PARSERS]},
        "builder": {
            "optimization_level": 3,
            "version_compatible": False,
            "hardware_compatible": "none",
            "tf32": "fp32" not in (precision.vision, precision.decoder, precision.head),
        },
        "engines": {
            "vision_encoder": {**_graph(root, "vision_encoder"), "profiles": images},
            "decoder": {
                **_graph(root, "decoder"),
                "profiles": {
                    "prefill": _profile(decoder, (1, typical, rows), (1, 1, context)),
                    "decode": _profile(decoder, (1, 1, 1), (1, typical, context)),
                },
            },
        },
        "cache": {
            "reserved_rows": RESERVED_ROWS,
            "row_bytes": row_bytes,
            # TensorRT takes addresses at multiples of 256: new rows go in place where theirs is one, else they are copied
            "in_place_every": 256 // int(np.gcd(256, row_bytes)),
            "max_rows": context + RESERVED_ROWS,
            "prefill_rows": rows,
            "decode_buckets": decode_buckets(context),
            "note": "row 0 is zeros and always masked; bind past at the start of a buffer and new rows behind them",
        },
    }


def decode_buckets(context: int) -> list[int]:
    """Past lengths, the reserved row included, rising to the context."""
    step = DECODE_BUCKETS[-1]
    ends = [*DECODE_BUCKETS, *range(2 * step, context, step)]
    return [*(end for end in ends if end < context), context]


def _graph(root: Path, stem: str) -> dict[str, Any]:
    path = root / "onnx" / f"{stem}.onnx"
    parts = [part for part in (path, path.with_name(path.name + "_data")) if part.is_file()]
    return {
        "onnx": f"onnx/{stem}.onnx",
        "graph_sha256": hashlib.sha256("".join(sha256_file(part) for part in parts).encode()).hexdigest(),
        "weight_bytes": sum(part.stat().st_size for part in parts),
    }


def _profile(spec: GraphSpec, new: tuple[int, ...], past: tuple[int, ...]) -> dict[str, list[list[int]]]:
    """Minimum, typical and maximum shape of each input; a cache is never empty (row 0 is reserved)."""
    shapes: dict[str, list[list[int]]] = {}
    for port in spec.inputs:
        sizes = ({NEW: s, PAST: p, TOTAL: s + p} for s, p in zip(new, past, strict=True))
        shapes[port.name] = [[size[d] if isinstance(d, str) else d for d in port.dims] for size in sizes]
    return shapes
