"""Exact names and sizes of an artefact's files without reading a weight: trace hollow modules, count bytes.

The layers of a deep model are alike, so two shallow copies are traced and the rest follows: bytes grow linearly.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from export import to_gguf, to_onnx
from export.artefact import plan_storage
from export.evidence import Evidence, golden_prompts, save_golden
from export.options import ExportOptions
from export.parity import STEPS, Case, expect
from export.precision import KINDS
from export.preflight import check_disk, preflight
from export.student import Student, blocks_used, outline, read_facts
from vlm.load import Checkpoint, open_checkpoint
from vlm.manifest import Golden

DEEP = 4
TEXTS = {"README.md": 4500, "manifest.json": 14000}  # they hold measurements: about so long


def estimate(run: ExportOptions) -> dict[str, Any]:
    """As `export.preflight.preflight`, with `files` and, for ONNX, their exact sizes.

    Raises:
        CheckpointError: the student cannot be exported. UserError: it does not fit on the disk.
    """
    found = preflight(run)
    checkpoint = open_checkpoint(run.student)
    if run.target == "gguf":
        return _gguf(checkpoint, run, found)
    if run.target != "onnx":
        return found
    storage = plan_storage(run)
    sizes: dict[str, int] = {}
    for index in range(3):
        sizes |= _graph_files(checkpoint, storage, index)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        made = to_onnx.write_configs(outline(checkpoint), root, [], storage.precision)
        sizes |= {path.relative_to(root).as_posix(): path.stat().st_size for path, _ in made}
    return _summed(checkpoint, run, found, sizes)


def _summed(checkpoint: Checkpoint, run: ExportOptions, found: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """With the files every artefact has."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        made = save_golden(_hollow_evidence(checkpoint), root)
        sizes |= {path.relative_to(root).as_posix(): path.stat().st_size for path, _ in made}
    sizes["tokenizer.json"] = (checkpoint.directory / "tokenizer.json").stat().st_size
    sizes["chat_template.jinja"] = len(checkpoint.tokenizer.spec.template.encode())
    sizes |= TEXTS
    total = sum(sizes.values())
    check_disk(run.out, total, found["free_bytes"])
    return {**found, "bytes": total, "files": [{"path": path, "bytes": size} for path, size in sizes.items()]}


def _gguf(checkpoint: Checkpoint, run: ExportOptions, found: dict[str, Any]) -> dict[str, Any]:
    planned = to_gguf.estimate(checkpoint, read_facts(checkpoint), run)
    if not planned:
        return found
    sizes = {entry["path"]: entry["bytes"] for entry in planned["files"]}
    result = _summed(checkpoint, run, found, sizes)
    return {**result, "fallbacks": planned["fallbacks"], "bits_per_weight": planned["bits_per_weight"]}


def _hollow_evidence(checkpoint: Checkpoint) -> Evidence:
    """Evidence of the right shapes with random figures, to see what storing it takes."""
    rng, facts = np.random.default_rng(0), outline(checkpoint).facts
    asked = golden_prompts(checkpoint.tokenizer)
    logits = rng.normal(size=(1 + STEPS, facts.vocab_size)).astype(np.float32)
    features = rng.normal(size=(checkpoint.image.tokens, facts.hidden)).astype(np.float32)
    expected = expect(logits, features, tuple(range(STEPS)))
    return Evidence(
        golden=tuple(Golden(f"golden/{i}.png", p.question, ()) for i, p in enumerate(asked)),
        cases=tuple(Case(str(i), p, ()) for i, p in enumerate(asked)),
        expected=(expected,) * len(asked),
        positions=(np.zeros(0, np.int64), expected),
        table=(np.zeros(0, np.int64), features),
        prompts=(),
        answers=(),
        truths=(),
        limit=0,
        task="",
    )


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
