"""From a student to published artefacts: write, measure against PyTorch, publish as a whole."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.metadata
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from export import to_gguf, to_onnx, to_tensorrt
from export.calibrate import TOKENS_KEPT, Calibration, fold_scales, observe
from export.card import write_card
from export.evidence import Evidence, calibration_images, calibration_prompts, collect, note_unread, save_golden
from export.measure import PIXELS_DIFFER, ablate, costliest, measure
from export.options import ExportOptions
from export.precision import KINDS, PARTS, Precision, parse_precision
from export.preflight import expected, preflight
from export.questions import Question, divide, read_questions
from export.stages import Stages, stages_of
from export.student import Student, open_student
from export.trt_precision import TRT_KINDS, TRT_PARTS, parse_trt_precision
from vlm import allocator
from vlm.console import note
from vlm.errors import GateFailed
from vlm.files import atomic_dir
from vlm.load import open_checkpoint
from vlm.manifest import Manifest, file_entry, write_manifest

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "optimum", "gguf", "llama-cpp-python", "numpy")
ABLATION_PARAMETERS = 50_000_000
PEAK_PROMPTS = 4  # enough to see activations that leave float16
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
    first = runs[0]
    checkpoint = open_checkpoint(first.student)
    note(f"student {first.student}")
    # a full disk is better found before the work than after it
    note(expected([preflight(run) for run in runs]))
    asked, rest = (
        divide(read_questions(first.data, first.images), first.samples, first.seed) if first.data else ([], [])
    )
    started = time.monotonic()
    student: Student | None = open_student(checkpoint)
    note("asking PyTorch for reference answers")
    assert student is not None
    evidence = collect(student, first.samples, first.seed, questions=asked, task=first.data.stem if first.data else "")
    results: list[Result] = []
    for run in runs:
        note(f"writing {run.target} {run.precision} to {run.out}")
        with stages_of(run.out) as stages, atomic_dir(run.out) as work:
            making = Making(student, evidence, run, work, stages, rest)
            if run is runs[-1]:
                student = None  # the making drops it when the files are written
            manifest = making.finish()
            seconds = time.monotonic() - started
            manifest = dataclasses.replace(
                manifest, parity={**manifest.parity, "made": {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}}
            )
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


@dataclass
class Making:
    """One artefact in the making: write, measure, and with --auto-precision raise the worst part until it holds."""

    loaded: Student | None
    evidence: Evidence
    run: ExportOptions
    root: Path
    stages: Stages
    questions: Sequence[Question] = ()
    calibration: Calibration | None = None

    @property
    def student(self) -> Student:
        if self.loaded is None:
            raise RuntimeError("the student was dropped too early")
        return self.loaded

    def finish(self) -> Manifest:
        storage = self.storage() if self.run.target == "onnx" else None
        manifest = self.attempt(storage)
        if storage is None:
            seen = {} if self.calibration is None else {"calibration": self.calibration.to_json()}
            return dataclasses.replace(manifest, parity={**manifest.parity, **seen})
        steps: list[str] = []
        while True:
            rows = self.ablation(manifest, storage, wanted=self.run.auto_precision and not manifest.verified)
            # no number of bits brings other pixels back
            failing = [f for f in manifest.parity["failures"] if not f.startswith(PIXELS_DIFFER)]
            failing = failing if self.run.auto_precision else []
            raised = _raise_worst(storage.precision, failing, rows) if failing else None
            if raised is None:
                break
            steps.append(raised.text())
            note(f"gates do not hold ({failing[0]}); trying {raised.text()}")
            _empty(self.root)
            storage = dataclasses.replace(storage, precision=raised)
            manifest = self.attempt(storage)
        extra: dict[str, Any] = {"ablation": rows} if rows else {}
        if self.run.auto_precision:
            extra["auto_precision"] = steps
        if self.calibration is not None:
            extra["calibration"] = self.calibration.to_json()
        return dataclasses.replace(manifest, parity={**manifest.parity, **extra})

    def attempt(self, storage: to_onnx.Storage | None) -> Manifest:
        trt = self.trt_storage() if self.run.target == "tensorrt" else None
        manifest = build(self.student, self.evidence, self.run, self.root, trt or storage, self.stages, self.questions)
        checkpoint = self.student.checkpoint
        if not self.run.auto_precision and not self.wants_ablation(storage):
            self.loaded = None  # measuring needs the runtime's memory, not PyTorch's
            gc.collect()  # modules and their readers refer to each other
            allocator.give_back()
        return measure(checkpoint, self.evidence, self.root, manifest)

    def storage(self) -> to_onnx.Storage:
        """Precision with everything calibration has to say."""
        storage = plan_storage(self.run)
        if not _needs_calibration(self.run, storage.precision):
            note_unread(self.run.calibration, self.run.precision)
            return storage
        note(f"calibrating on {calibration_images(self.evidence, self.run.calibration, self.questions)}")
        ranges = storage.precision.vision == "int8" or self.run.awq or self.run.algorithm == "search"
        whole = ranges or self.run.auto_precision
        prompts = calibration_prompts(self.student, self.run.calibration, 0 if whole else PEAK_PROMPTS, self.questions)
        found = observe(self.student, *prompts, keep=TOKENS_KEPT if whole else 0)
        if self.run.awq:
            parts = [p for p in PARTS if p != "embed" and KINDS[getattr(storage.precision, p)].bits == 4]
            self.loaded = fold_scales(self.student, found, 4, parts)
        self.calibration = dataclasses.replace(found, seen={})  # the sampled inputs take hundreds of megabytes
        return dataclasses.replace(storage, ranges=found.ranges() if whole else {}, wide=found.wide())

    def trt_storage(self) -> to_tensorrt.TrtStorage:
        """As `storage`, for the engines' graphs."""
        storage = to_tensorrt.TrtStorage(parse_trt_precision(self.run.precision), self.run.algorithm)
        chosen = storage.precision
        half = "float16" in (TRT_KINDS[chosen.vision].activation, chosen.activation)
        if not (half or self.run.awq or self.run.algorithm == "search"):
            note_unread(self.run.calibration, self.run.precision)
            return storage
        note(f"calibrating on {calibration_images(self.evidence, self.run.calibration, self.questions)}")
        count = 0 if chosen.calibrated or self.run.awq or self.run.algorithm == "search" else PEAK_PROMPTS
        prompts = calibration_prompts(self.student, self.run.calibration, count, self.questions)
        self.calibration = observe(self.student, *prompts)
        if self.run.awq:
            self.loaded = fold_scales(
                self.student, self.calibration, 4, [p for p in TRT_PARTS if getattr(chosen, p) == "int4"]
            )
        return dataclasses.replace(storage, ranges=self.calibration.ranges(), wide=self.calibration.wide())

    def wants_ablation(self, storage: to_onnx.Storage | None) -> bool:
        if storage is None or not storage.precision.quantised:
            return False
        if self.run.ablation is not None:
            return self.run.ablation
        return sum(p.numel() for p in self.student.model.parameters()) <= ABLATION_PARAMETERS

    def ablation(self, manifest: Manifest, storage: to_onnx.Storage, wanted: bool) -> list[dict[str, Any]]:
        if not wanted and (self.loaded is None or not self.wants_ablation(storage)):
            return []
        with tempfile.TemporaryDirectory(prefix=".ablation-", dir=self.root) as scratch:
            return ablate(self.student, self.evidence, self.root, manifest, storage, Path(scratch))


def _needs_calibration(run: ExportOptions, precision: Precision) -> bool:
    """Static ranges, overflow of float16, weighted rounding; plain blocks in float32 need none of it."""
    half = any(KINDS[getattr(precision, part)].half for part in PARTS)
    return half or precision.vision == "int8" or run.auto_precision or run.awq or run.algorithm == "search"


def plan_storage(run: ExportOptions) -> to_onnx.Storage:
    """What the options alone say about an ONNX artefact's weights."""
    precision = parse_precision(run.precision)
    return to_onnx.Storage(precision, run.flavour or precision.flavour, run.algorithm)


def _raise_worst(precision: Precision, failing: list[str], rows: list[dict[str, Any]]) -> Precision | None:
    """The part one measure alone depends on, else the one whose restoration helped most, a step up; None at the top."""
    alone = [
        part for part, sign in (("vision", ": cosine "), ("embed", "embeddings: ")) if any(sign in f for f in failing)
    ]
    for part in (*alone, *costliest(rows)):
        if raised := precision.raised(part):
            return raised
    return None


def _empty(root: Path) -> None:
    for path in root.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def build(
    student: Student,
    evidence: Evidence,
    run: ExportOptions,
    root: Path,
    storage: to_onnx.Storage | to_tensorrt.TrtStorage | None = None,
    stages: Stages | None = None,
    questions: Sequence[Question] = (),
) -> Manifest:
    """Write all files of an artefact under `root`; the manifest returned is not yet measured nor written.

    Args:
        questions: of the student's own that are free to calibrate on.
    """
    sha256 = student.checkpoint.weights_sha256()
    pair_id = hashlib.sha256(f"{run.target}:{sha256}".encode()).hexdigest()[:16]
    precision: dict[str, Any]
    weights: dict[str, Any]
    if isinstance(storage, to_tensorrt.TrtStorage):
        files, io, precision, weights = to_tensorrt.write(student, root, storage, stages or Stages(None), pair_id)
    elif run.target == "onnx":
        files, io, precision, weights = to_onnx.write(
            student, root, storage or plan_storage(run), stages or Stages(None)
        )
    else:
        files, precision, weights = to_gguf.write_all(
            student, evidence, run, root, stages or Stages(None), pair_id, questions
        )
        io = {}
    files += _shared_files(student, root) + save_golden(evidence, root)
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
        golden=evidence.golden,
    )


def _shared_files(student: Student, root: Path) -> Files:
    """Tokenizer and template: every runtime tokenises with these, whatever the format also embeds."""
    tokenizer, template = root / "tokenizer.json", root / "chat_template.jinja"
    shutil.copyfile(student.checkpoint.directory / "tokenizer.json", tokenizer)
    template.write_text(student.checkpoint.tokenizer.spec.template)
    return [(tokenizer, "tokenizer"), (template, "chat_template")]


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
