"""Before any work: what will be written, how long it takes, how much memory and disk it needs, and whether it fits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export import imatrix, to_gguf
from export.gguf_precision import parse_gguf
from export.options import ExportOptions
from export.precision import BLOCK, KINDS, PARTS, parse_precision
from export.questions import read_questions
from export.student import Facts, check_decoder, check_prompt, read_facts
from export.trt_precision import BLOCKS, TRT_KINDS, TRT_PARTS, parse_trt_precision
from vlm.console import note
from vlm.errors import CheckpointError, UserError
from vlm.load import Checkpoint, open_checkpoint
from vlm.manifest import NAME as MANIFEST

# fitted on 2 cores to students of 1.4, 138 and 581 million parameters; good to a factor of two. Per million of them outside
# the embedding table, for writing and replaying, and again for each of them and each token of a compared question
SECONDS = 8.0
PER_MILLION = {"onnx": 0.32, "gguf": 0.11, "tensorrt": 0.8}
PER_TOKEN = {"onnx": 1.2e-5, "gguf": 2.3e-5, "tensorrt": 1.2e-5}
GATHERING = 1.3e-5  # an importance matrix
PROMPT_TOKENS = 64  # template, question and answer beside the image
LIBRARIES_BYTES = 800_000_000


def check_target(out: Path) -> None:
    """Publishing replaces the whole folder, so it must be an artefact, empty, or not there yet.

    Raises:
        UserError: something else is there.
    """
    try:
        other = out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir())))
    except OSError as error:
        raise UserError(f"--out {out} cannot be used ({error.strerror}); choose another folder") from None
    if other:
        raise UserError(f"{out} exists and is not an artefact; choose another folder with --out")


def preflight(run: ExportOptions) -> dict[str, Any]:
    """Check a student without loading its weights, and the room there is for its artefact.

    Returns: artefact, parameters, bytes, seconds, peak_rss_bytes, free_bytes; estimates, see `export.dry_run`.

    Raises:
        CheckpointError: the student cannot be exported.
        UserError: it does not fit on the disk, or its questions are malformed.
    """
    check_target(run.out)
    checkpoint = open_checkpoint(run.student)
    facts = read_facts(checkpoint)
    check_prompt(checkpoint)
    if run.llama_cpp is None:
        check_decoder(checkpoint, facts)
    if run.target == "gguf":
        to_gguf.check(checkpoint, facts, run)
    asked = run.samples
    if run.data is not None:
        asked = min(asked, len(read_questions(run.data, run.images)))
    shapes = tensor_shapes(checkpoint)
    needed = _bytes(run, facts, shapes)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    stored = sum(path.stat().st_size for path in checkpoint.weights)
    if run.target == "gguf" and parse_gguf(run.precision).quantised:
        needed += stored  # the float file that quantisation starts from
    existing = next(p for p in run.out.resolve().parents if p.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"cannot write to {existing}; choose another folder with --out")
    free = shutil.disk_usage(existing).free
    # PyTorch's student while writing; ONNX Runtime reads the graphs whole to compare them
    peak = LIBRARIES_BYTES + max(stored + 4 * largest, needed if run.target != "gguf" else 0)
    found = {
        "artefact": str(run.out),
        "dry_run": run.dry_run,
        "parameters": count,
        "bytes": needed,
        "free_bytes": free,
        "seconds": round(_seconds(run, checkpoint, (count - facts.vocab_size * facts.hidden) / 1e6, asked)),
        "peak_rss_bytes": peak,
    }
    check_disk(run.out, needed, free)
    available = available_memory()
    if available is not None and peak > available:
        note(f"warning: this takes about {peak / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free")
    return found


def _seconds(run: ExportOptions, checkpoint: Checkpoint, millions: float, asked: int) -> float:
    tokens = checkpoint.image.tokens + PROMPT_TOKENS
    found = SECONDS + millions * (PER_MILLION[run.target] + PER_TOKEN[run.target] * tokens * asked)
    if run.target == "gguf" and parse_gguf(run.precision).weighted and not run.no_imatrix and run.imatrix is None:
        found += millions * GATHERING * tokens * imatrix.MOST
    return found


def expected(found: Sequence[dict[str, Any]]) -> str:
    """What several runs take, in the words of a note."""
    seconds, size = sum(one["seconds"] for one in found), sum(one["bytes"] for one in found)
    peak = max(one["peak_rss_bytes"] for one in found)
    return f"about {seconds} s on two cores, {size / 1e6:.0f} MB of files, {peak / 1e9:.1f} GB of memory"


def check_disk(out: Path, needed: int, free: int) -> None:
    if needed > free:
        raise UserError(f"{out} needs {needed} bytes, {free} are free; choose another folder with --out")


def available_memory() -> int | None:
    """Bytes a new process may take, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored tensor; reads headers only.

    Raises:
        CheckpointError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in checkpoint.weights:
        try:
            with safe_open(path, "np") as tensors:
                names = tensors.keys()  # the handle itself cannot be iterated
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be loaded ({error}); copy it again") from None
    return shapes


def _bytes(run: ExportOptions, facts: Facts, shapes: dict[str, tuple[int, ...]]) -> int:
    table = facts.vocab_size * facts.hidden
    if run.target == "gguf":
        width = {"f32": 32, "f16": 16, "bf16": 16}.get(parse_gguf(run.precision).decoder, 9)
        return int(sum(int(np.prod(shape)) for shape in shapes.values()) * width / 8)
    if run.target == "tensorrt":
        trt = parse_trt_precision(run.precision)
        bits_of = {part: _trt_bits(getattr(trt, part)) for part in TRT_PARTS}
        bits_of["embed"] = 16.0 if trt.io == "float16" else 32.0
    else:
        precision = parse_precision(run.precision)
        bits_of = {part: _bits(getattr(precision, part)) for part in PARTS}
    total = table * (bits_of["embed"] + bits_of["head"]) / 8
    for name, shape in shapes.items():
        if "embed_tokens" in name or "lm_head" in name:
            continue
        part = "vision" if "vision_tower" in name or "projector" in name else "decoder"
        bits = bits_of[part] if len(shape) == 2 and "position" not in name else 32
        total += int(np.prod(shape)) * bits / 8
    return int(total)


def _trt_bits(kind: str) -> float:
    known = TRT_KINDS[kind].kind
    return known.bits + (16 / BLOCKS[-1] if known.bits == 4 else 0)


def _bits(kind: str) -> float:
    """With the scales of the blocks."""
    known = KINDS[kind]
    return known.bits if known.bits >= 16 else known.bits + (16 if known.half else 32) / BLOCK
