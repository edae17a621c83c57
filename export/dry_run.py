"""Exact names and sizes of an ONNX artefact's graphs without reading a weight: trace hollow modules, count bytes.

The layers of a deep model are alike, so two shallow copies are traced and the rest follows: bytes grow linearly.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

from export import to_onnx
from export.artefact import plan_storage
from export.options import ExportOptions
from export.precision import KINDS
from export.preflight import check_disk, preflight
from export.student import Student, blocks_used, outline
from vlm.load import Checkpoint, open_checkpoint

DEEP = 4


def estimate(run: ExportOptions) -> dict[str, Any]:
    """As `export.preflight.preflight`, with `files` and, for ONNX, their exact sizes.

    Raises:
        CheckpointError: the student cannot be exported. UserError: it does not fit on the disk.
    """
    found = preflight(run)
    if run.target != "onnx":
        return found
    checkpoint = open_checkpoint(run.student)
    storage = plan_storage(run)
    sizes: dict[str, int] = {}
    for index in range(3):
        sizes |= _graph_files(checkpoint, storage, index)
    with tempfile.TemporaryDirectory() as scratch:
        shared = [
            *to_onnx.write_configs(outline(checkpoint), Path(scratch), [], storage.precision),
        ]
        sizes |= {path.name: path.stat().st_size for path, _ in shared}
    sizes["tokenizer.json"] = (checkpoint.directory / "tokenizer.json").stat().st_size
    sizes["chat_template.jinja"] = len(checkpoint.tokenizer.spec.template.encode())
    total = sum(sizes.values())
    check_disk(run.out, total, shutil.disk_usage(Path(found["artefact"]).resolve().anchor).free)
    return {**found, "bytes": total, "files": [{"path": path, "bytes": size} for path, size in sizes.items()]}


def _graph_files(checkpoint: Checkpoint, storage: to_onnx.Storage, index: int) -> dict[str, int]:
    """Path -> bytes of one graph and its external data."""
    facts = outline(checkpoint).facts
    deep = index != 1 and len(facts.feature_layers) == 1
    full = outline(checkpoint)
    tower, language = full.model.model.vision_tower.encoder, full.model.model.language_model
    depth = len(tower.layers) if index == 0 else len(language.layers)
    if not deep or depth <= DEEP:
        return _count(full, storage, index)
    used = max(blocks_used(facts, len(tower.layers))) if index == 0 else depth
    one, two = (_count(_shallow(checkpoint, layers, index), storage, index) for layers in (1, 2))
    return {path: one[path] + (used - 1) * (two[path] - one[path]) for path in one}


def _shallow(checkpoint: Checkpoint, layers: int, index: int) -> Student:
    """The student with its first layers only."""
    student = outline(checkpoint)
    if index == 0:
        encoder = student.model.model.vision_tower.encoder
        encoder.layers = encoder.layers[:layers]
        facts = dataclasses.replace(student.facts, feature_layers=(layers,))
    else:
        language = student.model.model.language_model
        language.layers = language.layers[:layers]
        facts = dataclasses.replace(student.facts, layers=layers)
    return dataclasses.replace(student, facts=facts)


def _count(student: Student, storage: to_onnx.Storage, index: int) -> dict[str, int]:
    import onnx_ir as ir

    graph = to_onnx.graphs(student, storage)[index]
    suffix = KINDS[getattr(storage.precision, graph.part)].suffix
    model = to_onnx.trace(graph.build(), graph.spec, student, graph.opset)
    path, external = f"onnx/{graph.stem}{suffix}.onnx", 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor.nbytes > to_onnx.INLINE_BYTES:
            external += tensor.nbytes
            value.const_value = ir.ExternalTensor(
                f"{graph.stem}{suffix}.onnx_data",
                external,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
            )
    return {path: len(ir.to_proto(model).SerializeToString()), f"{path}_data": external}
