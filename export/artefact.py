"""From a student to published artefacts: write, measure against PyTorch, publish as a whole."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from export import parity, to_gguf, to_onnx, to_tensorrt
from export.backends import gate_of, open_backend
from export.card import write_card
from export.evidence import (
    Evidence,
    accuracy,
    collect,
    embedding_parity,
    pixel_parity,
    save_golden,
    token_corpus,
)
from export.options import ExportOptions
from export.reference import TorchBackend
from export.replay import Backend, greedy
from export.student import Student, open_student, read_facts
from vlm.console import note
from vlm.errors import CheckpointError, GateFailed, UserError
from vlm.files import atomic_dir
from vlm.load import open_checkpoint
from vlm.manifest import NAME as MANIFEST
from vlm.manifest import Manifest, file_entry, write_manifest

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "optimum", "gguf", "llama-cpp-python", "numpy")
PIXEL_LIMIT = 1e-5
Files = list[tuple[Path, str]]


@dataclass(frozen=True)
class Result:
    """One published artefact and what was measured."""

    artefact: Path
    verified: bool
    bytes: int
    seconds: float
    peak_rss_bytes: int
    parity: dict[str, Any]
    accuracy: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "artefact": str(self.artefact)}


def export_all(runs: Sequence[ExportOptions]) -> list[Result]:
    """Write every artefact of one student; a failed gate still publishes, with verified false.

    Raises:
        CheckpointError: the student cannot be read or exported to this target.
        UserError: the output folder cannot be written.
    """
    started = time.monotonic()
    first = runs[0]
    checkpoint = open_checkpoint(first.student)
    note(f"student {first.student}")
    for run in runs:
        estimate(run)  # a full disk is better found before the work than after it
    student = open_student(checkpoint)
    note("asking PyTorch for reference answers")
    evidence = collect(student, first.samples, first.seed)
    results = []
    for run in runs:
        note(f"writing {run.target} {run.precision} to {run.out}")
        with atomic_dir(run.out) as work:
            manifest = measure(student, evidence, work, build(student, evidence, run, work))
            entry = file_entry(work, write_card(work, run.out.name, manifest), "card")
            manifest = dataclasses.replace(manifest, files=(*manifest.files, entry))
            write_manifest(work, manifest)
        size = sum(entry.bytes for entry in manifest.files)
        elapsed = time.monotonic() - started
        results.append(
            Result(run.out, manifest.verified, size, elapsed, peak_rss_bytes(), manifest.parity, manifest.accuracy)
        )
        started = time.monotonic()
    return results


def build(student: Student, evidence: Evidence, run: ExportOptions, root: Path) -> Manifest:
    """Write all files of an artefact under `root`; the manifest returned is not yet measured nor written."""
    sha256 = student.checkpoint.weights_sha256()
    pair_id = hashlib.sha256(f"{run.target}:{sha256}".encode()).hexdigest()[:16]
    writers: dict[str, Callable[[], tuple[Files, dict[str, Any]]]] = {
        "onnx": lambda: to_onnx.write(student, root),
        "gguf": lambda: _write_gguf(student, run, root, pair_id),
        "tensorrt": lambda: to_tensorrt.write(student, root, run.precision),
    }
    files, io = writers[run.target]()
    files += _shared_files(student, root) + save_golden(evidence, root)
    precision, weights = _weights(student, run, {role: path for path, role in files})
    spec = student.checkpoint.tokenizer.spec
    return Manifest(
        format=run.target,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tools=tool_versions(),
        source={**student.checkpoint.provenance, "student": run.student.name, "student_sha256": sha256},
        files=tuple(file_entry(root, path, role) for path, role in files),
        io=io,
        precision=precision,
        image=asdict(student.checkpoint.image),
        chat={**asdict(spec), "eos_token_ids": list(spec.eos_token_ids)},
        model={**asdict(student.facts), "feature_layers": list(student.facts.feature_layers), **weights},
        pair_id=pair_id,
        golden=(evidence.golden,),
    )


def _write_gguf(student: Student, run: ExportOptions, root: Path, pair_id: str) -> tuple[Files, dict[str, Any]]:
    from export.llama import quantise

    text, mmproj = root / f"text-{run.precision}.gguf", root / "mmproj-f16.gguf"
    plain = root / "text-f16.gguf"
    to_gguf.write_text(student, plain, pair_id, str(student.checkpoint.provenance.get("licence") or ""))
    if text != plain:
        quantise(plain, text, run.precision)
        plain.unlink()
    to_gguf.write_mmproj(student, mmproj, pair_id)
    return [(text, "text_gguf"), (mmproj, "mmproj")], {}


def _shared_files(student: Student, root: Path) -> Files:
    """Tokenizer and template: every runtime tokenises with these, whatever the format also embeds."""
    tokenizer, template = root / "tokenizer.json", root / "chat_template.jinja"
    shutil.copyfile(student.checkpoint.directory / "tokenizer.json", tokenizer)
    template.write_text(student.checkpoint.tokenizer.spec.template)
    return [(tokenizer, "tokenizer"), (template, "chat_template")]


def _weights(student: Student, run: ExportOptions, paths: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Precision per component as measured on the files, and the byte counts a profiler needs."""
    facts = student.facts
    if run.target == "gguf":
        precision = {}
        for component, role, declared in (("decoder", "text_gguf", run.precision), ("vision_encoder", "mmproj", "f16")):
            bits, types = to_gguf.bits_per_weight(paths[role])
            expected = {declared.upper(), "F32"}
            fallbacks = {name: count for name, count in types.items() if name not in expected}
            precision[component] = {"type": declared, "bits_per_weight": bits, "types": types, "fallbacks": fallbacks}
        decoder_bytes, head_bytes = to_gguf.decoder_bytes(paths["text_gguf"], facts)
        kv_width, kv_type = 2, "f16"
    else:
        precision = {}
        for component in ("vision_encoder", "decoder"):
            size, count = to_onnx.weight_bytes(paths[component])
            precision[component] = {"type": run.precision, "bits_per_weight": 8 * size / count, "fallbacks": {}}
        width = 2 if run.precision == "fp16" else 4
        precision["embed_tokens"] = {"type": run.precision, "bits_per_weight": 8.0 * width, "fallbacks": {}}
        decoder_bytes, head_bytes = to_onnx.weight_bytes(paths["decoder"])[0], facts.vocab_size * facts.hidden * width
        kv_width, kv_type = width, run.precision
    return precision, {
        "decoder_weight_bytes": decoder_bytes,
        "lm_head_bytes": head_bytes,
        "kv_bytes_per_token": facts.kv_bytes_per_token(kv_width),
        "kv_type": kv_type,
    }


def measure(student: Student, evidence: Evidence, root: Path, manifest: Manifest) -> Manifest:
    """Fill parity, accuracy and `verified` by running the files just written."""
    gate = gate_of(manifest)
    backend = open_backend(root, manifest)
    try:
        cases = {
            case.name: parity.replay_case(backend, case.prompt, expected)
            for case, expected in zip(evidence.cases, evidence.expected, strict=True)
        }
        extra, found = _extra_checks(student, evidence, backend, cases)
        pixel = pixel_parity(student, evidence)
        extra["pixels"] = pixel
        if pixel["max"] > PIXEL_LIMIT:
            found.append(f"pixels differ from the checkpoint's processor by {pixel['max']:.3g}")
        for name, values in cases.items():
            found += parity.failures(name, values, gate)
        stop = student.checkpoint.tokenizer.spec.eos_token_ids
        extra["golden_ids"] = list(greedy(backend, evidence.cases[0].prompt, stop, len(evidence.golden.token_ids)))
        scores, missed = accuracy(backend, TorchBackend(student), student.checkpoint.tokenizer, evidence, gate)
    finally:
        backend.close()
    found += missed
    report = parity.report(gate, cases, extra, found)
    return dataclasses.replace(manifest, verified=not found, parity=report, accuracy=scores)


def _extra_checks(
    student: Student, evidence: Evidence, backend: Backend, cases: dict[str, dict[str, float]]
) -> tuple[dict[str, Any], list[str]]:
    """What only one format can be asked; adds cases in place."""
    from export.llama import LlamaBackend
    from export.ort import OnnxBackend

    if isinstance(backend, OnnxBackend):
        embeddings = embedding_parity(student, backend.embeddings)
        cases["every_position"] = _every_position(evidence, backend)
        cases["batch_of_two"] = padded_pair(student, evidence, backend)
        found = [] if embeddings["max"] == 0 else [f"embeddings differ by {embeddings['max']:.3g}"]
        return {"embeddings": embeddings}, found
    if isinstance(backend, LlamaBackend):
        tokenizer = student.checkpoint.tokenizer
        corpus = token_corpus(evidence)
        own = [list(tokenizer.tokenizer.encode(text, add_special_tokens=False).ids) for text in corpus]
        wrong = [text for text, ids in zip(corpus, own, strict=True) if backend.tokenise(text) != ids]
        image_id = tokenizer.spec.image_token_id
        wrong += [c.prompt.text for c in evidence.cases if backend.ids_of(c.prompt, image_id) != c.prompt.ids]
        found = [f"llama.cpp tokenises {len(wrong)} texts differently, first {wrong[0]!r}"] if wrong else []
        return {"tokenisation": {"texts": len(corpus) + len(evidence.cases), "different": len(wrong)}}, found
    return {}, []


def _every_position(evidence: Evidence, backend: Any) -> dict[str, float]:
    """Logits after each prompt token: a wrong causal mask shows here even if the last row is right."""
    chosen, expected = evidence.positions
    measured = parity.compare_logits(expected, backend.prefill_all(evidence.cases[1].prompt)[chosen])
    return {**measured, "prefill": max(measured["prefill"], measured["decode"])}


def padded_pair(student: Student, evidence: Evidence, backend: Any) -> dict[str, float]:
    """Both cases in one left-padded batch, teacher-forced together; the worse of the two rows."""
    cases = evidence.cases
    pad = student.checkpoint.tokenizer.spec.pad_token_id
    length = max(len(c.prompt.ids) for c in cases)
    rows = [backend.prompt_embeddings(c.prompt)[0] for c in cases]
    filler = backend.embeddings(np.array([[pad]], np.int64))[0]
    embeds = np.stack([np.concatenate([np.repeat(filler, length - len(r), 0), r]) for r in rows])
    mask = np.stack([np.r_[np.zeros(length - len(r)), np.ones(len(r))] for r in rows]).astype(np.int64)
    backend.cache = []
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    logits = [backend.run(embeds, mask, positions, 1)[:, -1]]
    for step in zip(*(c.forced for c in cases), strict=True):
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
        positions = positions[:, -1:] + 1
        logits.append(backend.run(backend.embeddings(np.array(step)[:, None]), mask, positions, 1)[:, -1])
    both = [parity.compare_logits(e, np.stack(logits)[:, i]) for i, e in enumerate(evidence.expected)]
    return {key: (min if key == "top1" else max)(one[key] for one in both) for key in both[0]}


def check_target(out: Path) -> None:
    """Publishing replaces the whole folder, so it must be an artefact, empty, or not there yet.

    Raises:
        UserError: something else is there.
    """
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise UserError(f"{out} exists and is not an artefact; choose another folder with --out")


def estimate(run: ExportOptions) -> dict[str, Any]:
    """Check a student without loading its weights; bytes the artefact will take and bytes free there.

    Raises:
        CheckpointError: the student cannot be exported.
        UserError: it does not fit on the disk.
    """
    from safetensors import SafetensorError, safe_open

    check_target(run.out)
    checkpoint = open_checkpoint(run.student)
    facts = read_facts(checkpoint)
    if run.target == "gguf":
        to_gguf.check(checkpoint, facts)
    count = 0
    for path in checkpoint.weights:
        try:
            with safe_open(path, "np") as tensors:
                names = tensors.keys()  # the handle itself cannot be iterated
                count += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in names)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be loaded ({error}); copy it again") from None
    if facts.tied and run.target != "gguf":
        count += facts.vocab_size * facts.hidden  # table and head become two tensors
    bits = {"fp32": 32, "fp16": 16, "f16": 16, "q8_0": 8.5}[run.precision]
    needed = int(count * bits / 8)
    existing = next(p for p in [run.out.resolve(), *run.out.resolve().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"{run.out} needs {needed} bytes, {free} are free; choose another folder with --out")
    return {"artefact": str(run.out), "dry_run": True, "parameters": count, "bytes": needed, "free_bytes": free}


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tool_versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for name in TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def next_step(results: Sequence[Result]) -> GateFailed | None:
    """The error to end with when a gate failed."""
    failed = [r for r in results if not r.verified]
    if not failed:
        return None
    worst = failed[0].parity["failures"]
    more = f" (and {len(worst) - 1} more in the manifest)" if len(worst) > 1 else ""
    return GateFailed(f"{failed[0].artefact} was written but is not verified: {worst[0]}{more}")
