"""A student as llama.cpp reads it: one text GGUF and one mmproj, from the checkpoint's files straight to disk."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import gguf_foreign, gguf_mmproj, gguf_text, imatrix
from export.evidence import calibration_images, note_unread
from export.gguf_file import read_tensors, stored_bytes, write
from export.gguf_precision import GgufPrecision, fell_back, parse_gguf
from export.gguf_quantise import check_tables, plan, quantise
from export.gguf_source import Weights
from export.gguf_text import Origin
from export.gguf_tokens import check_tokenizer
from export.imatrix import Importance
from export.options import ExportOptions, run_name
from export.stages import Stages, code_sha256, student_key
from export.student import Facts, read_config
from vlm.console import note
from vlm.errors import CheckpointError
from vlm.files import sha256_file
from vlm.load import Checkpoint

if TYPE_CHECKING:
    from export.evidence import Evidence
    from export.questions import Question
    from export.student import Student

CLIP_COSINE = 0.99
CLIP_BUG = "ggml-org/llama.cpp#25814"
Files = list[tuple[Path, str]]


def check(checkpoint: Checkpoint, facts: Facts, run: ExportOptions) -> None:
    """Needs headers only: refuse what llama.cpp computes wrongly or crashes on.

    Raises:
        CheckpointError: one line naming the setting and the way out.
    """
    config, where, foreign = read_config(checkpoint), checkpoint.directory, run.llama_cpp is not None
    if run.llama_cpp is not None:
        gguf_foreign.check_checkout(run.llama_cpp)
    if facts.tower == "clip":
        note(
            f"llama.cpp has computed CLIP towers wrongly so far ({CLIP_BUG}); the export measures the installed one first"
        )
    text = () if foreign else gguf_text.check_text(config, facts)
    for broken, message in (*text, *gguf_mmproj.check_vision(config, facts)):
        if broken:
            raise CheckpointError(f"{where} cannot become GGUF: {message}")
    check_tokenizer(checkpoint, facts, foreign)
    check_tables(parse_gguf(run.precision), facts.hidden, facts.tied)


def origin_of(checkpoint: Checkpoint, facts: Facts, weights: Weights, pair_id: str, sha256: str) -> Origin:
    return Origin(checkpoint, read_config(checkpoint), facts, pair_id, sha256, gguf_text.size_label(weights))


def write_text(origin: Origin, weights: Weights, path: Path, kind: str, hollow: bool = False) -> None:
    """The text file with float matrices in our own names; `kind` f32, f16 or bf16."""
    tensors = gguf_text.text_tensors(weights, origin.facts, origin.config, kind)
    write(path, origin.facts.decoder, gguf_text.describe_text(origin, kind), tensors, hollow)


def write_mmproj(origin: Origin, weights: Weights, path: Path, kind: str, hollow: bool = False) -> None:
    """The vision file; `kind` f32, f16 or q8_0."""
    tensors = gguf_mmproj.vision_tensors(weights, origin.facts, origin.config, kind)
    write(path, "clip", gguf_mmproj.describe_mmproj(origin, kind), tensors, hollow)


def write_all(
    student: Student,
    evidence: Evidence,
    run: ExportOptions,
    root: Path,
    stages: Stages,
    pair_id: str,
    questions: Sequence[Question] = (),
) -> tuple[Files, dict[str, Any], dict[str, Any]]:
    """Write both files, and the importance matrix where one was used.

    Args:
        questions: of the student's own that are free to gather it on.

    Returns: (file, role) pairs, and the manifest's `precision` and weight counts for `model`.
    """
    checkpoint, facts, precision = student.checkpoint, student.facts, parse_gguf(run.precision)
    weights = Weights(checkpoint.weights)
    origin = origin_of(checkpoint, facts, weights, pair_id, checkpoint.weights_sha256())
    called = run_name(checkpoint.directory)  # which the files carry
    base: dict[str, Any] = {
        "student": [called, *student_key(checkpoint)],
        "pair": pair_id,
        "code": code_sha256(),
        "versions": versions(),
    }
    base["converter"] = None if run.llama_cpp is None else gguf_foreign.checkout_key(run.llama_cpp)

    def exact(path: Path, kind: str) -> None:
        if run.llama_cpp is None:
            write_text(origin, weights, path, kind)
        else:
            note(f"converting the decoder with {run.llama_cpp}")
            gguf_foreign.write_text(origin, weights, run.llama_cpp, path, kind)

    def mmproj(folder: Path) -> Files:
        path = folder / f"mmproj-{precision.vision}.gguf"
        write_mmproj(origin, weights, path, precision.vision)
        return [(path, "mmproj")]

    kept = Stages(None) if facts.tower == "clip" else stages  # a file that may be refused is not worth keeping
    files = kept.files("mmproj", {**base, "vision": precision.vision}, root, mmproj)
    if facts.tower == "clip":
        _check_clip(origin, lambda path: exact(path, weights.kind), evidence, root, files[0][0])
    importance = find_importance(student, evidence, run, precision, root, stages, base, questions)
    if importance is not None:
        files.append((root / "imatrix.gguf", "imatrix"))

    def text(folder: Path) -> Files:
        path = folder / f"text-{precision.decoder}.gguf"
        if not precision.quantised:
            exact(path, precision.decoder)
            return [(path, "text_gguf")]
        whole = folder / "exact.gguf"
        exact(whole, exact_kind(precision, weights))
        note(f"quantising to {precision.text()}" + (f" with {importance.data}" if importance else ""))
        quantise(whole, path, precision, root / "imatrix.gguf" if importance else None)
        whole.unlink()
        return [(path, "text_gguf")]

    seen = sha256_file(root / "imatrix.gguf") if importance else None
    files += stages.files("text", {**base, "precision": precision.text(), "importance": seen}, root, text)
    section, counts = describe({role: path for path, role in files}, precision, facts)
    if importance is not None:
        section["decoder"]["imatrix"] = importance.to_json()
    return files, section, counts


def exact_kind(precision: GgufPrecision, weights: Weights) -> str:
    """What the text file holds before quantisation: every number as stored, so that nothing is rounded twice."""
    return weights.kind if precision.quantised else precision.decoder


def find_importance(
    student: Student,
    evidence: Evidence,
    run: ExportOptions,
    precision: GgufPrecision,
    root: Path,
    stages: Stages,
    base: Mapping[str, Any],
    questions: Sequence[Question] = (),
) -> Importance | None:
    """The matrix of --imatrix, or one gathered now; kept in the artefact. None where it changes nothing."""
    if run.no_imatrix or not precision.weighted:
        note_unread(run.calibration, "--no-imatrix" if run.no_imatrix else run.precision)
        return None
    if run.imatrix is not None:
        given = imatrix.load(run.imatrix)
        if run.llama_cpp is not None:  # llama.cpp itself says what does not fit
            shutil.copyfile(run.imatrix, root / "imatrix.gguf")
            return given
        shapes = {t.name: t.shape for t in gguf_text.text_tensors(Weights(student.checkpoint.weights), student.facts, read_config(student.checkpoint), "f32")}  # fmt: skip
        imatrix.check(given, shapes, run.imatrix)
        shutil.copyfile(run.imatrix, root / "imatrix.gguf")
        return given

    def make(folder: Path) -> Files:
        note(f"gathering an importance matrix on {calibration_images(evidence, run.calibration, questions)}")
        called = run.calibration.name if run.calibration else run.data.name if run.data and questions else ""
        imatrix.gather(student, run.calibration, questions, called).save(folder / "imatrix.gguf")
        return [(folder / "imatrix.gguf", "imatrix")]

    used = [] if run.calibration is not None else questions[: imatrix.MOST]
    asked = [[str(q.source), _file_key(Path(str(q.source))), q.text, q.answers] for q in used]
    key = {**base, "calibration": [_folder_key(run.calibration), asked]}
    (path, _), *_rest = stages.files("imatrix", key, root, make)
    return imatrix.load(path)


def _folder_key(folder: Path | None) -> list[Any]:
    if folder is None:
        return []
    return sorted(_file_key(p) for p in folder.iterdir() if p.is_file())


def _file_key(path: Path) -> list[Any]:
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def _check_clip(
    origin: Origin, write_exact: Callable[[Path], None], evidence: Evidence, root: Path, mmproj: Path
) -> None:
    """llama.cpp has placed the class token wrongly for years; measure what the installed one does.

    Raises:
        CheckpointError: visual tokens differ from PyTorch's.
    """
    from export.llama import LlamaBackend
    from export.parity import compare_features

    image, spec = origin.checkpoint.image, origin.checkpoint.tokenizer.spec
    case, expected = evidence.cases[0], evidence.expected[0]
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        text = Path(scratch) / "text.gguf"
        write_exact(text)
        backend = LlamaBackend(text, mmproj, image, spec.image_token)
        try:
            measured = compare_features(expected.features, backend.features(case.prompt.image)[expected.rows])
        finally:
            backend.close()
    if not measured["cosine"] >= CLIP_COSINE:
        raise CheckpointError(
            f"{origin.checkpoint.directory} cannot become GGUF: the installed llama.cpp computes CLIP towers wrongly "
            f"(visual tokens have cosine {measured['cosine']:.3f} with PyTorch's, {CLIP_BUG}); use --target onnx"
        )


def describe(
    paths: Mapping[str, Path], precision: GgufPrecision, facts: Facts
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Precision per component as measured on the files, and the byte counts a profiler needs."""
    text, mmproj = (read_tensors(paths[role]) for role in ("text_gguf", "mmproj"))
    parts = {
        "vision_encoder": (precision.vision, list(mmproj.values())),
        "embed_tokens": (None, [text["token_embd.weight"]]),
        "decoder": (precision.decoder, [t for n, t in text.items() if n not in ("token_embd.weight", "output.weight")]),
        "lm_head": (None, [text[n] for n in ("output.weight",) if n in text]),
    }
    section: dict[str, Any] = {}
    for name, (declared, tensors) in parts.items():
        if not tensors:
            continue
        types: dict[str, int] = {}
        for tensor in tensors:
            if len(tensor.shape) > 1:
                types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        stored = sum(int(t.n_bytes) for t in tensors)
        section[name] = {
            "type": declared or tensors[0].tensor_type.name.lower(),
            "bits_per_weight": 8 * stored / sum(int(t.n_elements) for t in tensors),
            "bytes": stored,
            "types": types,
            "fallbacks": {},
        }
    shapes = {n: tuple(int(v) for v in reversed(t.shape)) for n, t in text.items()}
    kinds = {n: t.tensor_type.name for n, t in text.items()}
    section["decoder"]["fallbacks"] = fell_back(precision, shapes, kinds)
    wanted = precision.vision.upper()
    narrow = section["vision_encoder"]["types"].get("F16", 0) if wanted == "Q8_0" else 0
    if narrow:
        section["vision_encoder"]["fallbacks"] = {"Q8_0 -> F16 (patches, or rows not a multiple of 32)": narrow}
    head = int(text["output.weight" if "output.weight" in text else "token_embd.weight"].n_bytes)
    return section, {
        "decoder_weight_bytes": section["decoder"]["bytes"] + head,
        "lm_head_bytes": head,
        "kv_bytes_per_token": facts.kv_bytes_per_token(2),
        "kv_type": "f16",
    }


def estimate(checkpoint: Checkpoint, facts: Facts, run: ExportOptions) -> dict[str, Any]:
    """Files, sizes, real bits per weight and fallbacks, as llama.cpp itself plans them; no weight is read.

    Returns: empty where another converter writes the text file.

    Raises:
        CheckpointError: a tensor is missing or has no place in a GGUF file.
    """
    if run.llama_cpp is not None:
        return {}
    precision, weights = parse_gguf(run.precision), Weights(checkpoint.weights)
    check_tables(precision, facts.hidden, gguf_text.tied(weights, facts))
    origin = origin_of(checkpoint, facts, weights, "0" * 16, "0" * 64)
    tensors = gguf_text.text_tensors(weights, facts, origin.config, exact_kind(precision, weights))
    shapes = {t.name: t.shape for t in tensors}
    types = {t.name: t.type for t in tensors}
    weighted = precision.weighted and not run.no_imatrix
    with tempfile.TemporaryDirectory() as scratch:
        text, mmproj = Path(scratch) / "text.gguf", Path(scratch) / "mmproj.gguf"
        write_text(origin, weights, text, exact_kind(precision, weights), hollow=True)
        write_mmproj(origin, weights, mmproj, precision.vision, hollow=True)
        header = text.stat().st_size - sum(_padded(t.bytes) for t in tensors)
        if precision.quantised:
            types = plan(text, precision, weighted)
        vision_bytes = mmproj.stat().st_size
    text_bytes = header + sum(_padded(stored_bytes(shapes[name], kind)) for name, kind in types.items())
    files = [
        {"path": f"text-{precision.decoder}.gguf", "bytes": text_bytes},
        {"path": f"mmproj-{precision.vision}.gguf", "bytes": vision_bytes},
    ]
    if weighted:
        columns = [shape[1] for shape in shapes.values() if len(shape) == 2]
        files.append({"path": "imatrix.gguf", "bytes": sum(4 * c + 256 for c in columns)})
    count = sum(stored.count for stored in weights.stored.values())
    return {
        "files": files,
        "fallbacks": fell_back(precision, shapes, types),
        "bits_per_weight": 8 * (text_bytes + vision_bytes) / count,
    }


def _padded(size: int) -> int:
    return -(-size // 32) * 32


def versions() -> list[str]:
    return [importlib.metadata.version(name) for name in ("gguf", "llama-cpp-python", "torch", "transformers")]
