"""Hold the files just written against PyTorch's answers: parity, accuracy, and what each part's precision costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export import parity, to_onnx
from export.backends import gate_of, image_spec, open_backend
from export.evidence import Evidence, accuracy, embedding_parity, pixel_parity, token_corpus
from export.gguf_tokens import INFILLING, declared
from export.ort import OnnxBackend
from export.parity import Gate
from export.precision import PARTS
from export.reference import TorchBackend
from export.replay import Backend
from export.student import Student, open_student
from vlm.console import note
from vlm.load import Checkpoint
from vlm.manifest import Manifest

if TYPE_CHECKING:
    from export.llama import LlamaBackend

PIXEL_LIMIT = 1e-5
STEM_OF = {"vision": "vision_encoder", "embed": "embed_tokens", "decoder": "decoder_model_merged"}
STEM_OF["head"] = STEM_OF["decoder"]
PIXELS_DIFFER = "pixels differ"
Cases = dict[str, dict[str, float]]


def measure(checkpoint: Checkpoint, evidence: Evidence, root: Path, manifest: Manifest) -> Manifest:
    """Fill parity, accuracy and `verified` by running the files under `root`."""
    gate = gate_of(manifest)
    backend = open_backend(root, manifest, longest=evidence.longest)
    try:
        cases = replay_cases(backend, evidence)
        extra, found = _extra_checks(checkpoint, evidence, backend, cases, gate)
        pixel = pixel_parity(checkpoint, evidence, image_spec(manifest))
        extra["pixels"] = pixel
        if pixel["max"] > PIXEL_LIMIT:
            found.append(f"{PIXELS_DIFFER} from the checkpoint's processor by {pixel['max']:.3g}")
        found += parity.all_failures(cases, gate)
        stop = checkpoint.tokenizer.spec.eos_token_ids
        extra["golden_ids"] = [
            list(parity.golden_answer(backend, case.prompt, golden.token_ids, cases[case.name], stop))
            for case, golden in zip(evidence.cases, evidence.golden, strict=False)
        ]
        scores, missed = accuracy(backend, _reference(checkpoint), checkpoint.tokenizer, evidence, gate)
    finally:
        backend.close()
    found += missed
    report = parity.report(gate, cases, extra, found)
    return dataclasses.replace(manifest, verified=not found, parity=report, accuracy=scores)


def replay_cases(backend: Backend, evidence: Evidence) -> Cases:
    return {
        case.name: parity.replay_case(backend, case.prompt, expected)
        for case, expected in zip(evidence.cases, evidence.expected, strict=True)
    }


def _reference(checkpoint: Checkpoint) -> Callable[[], Backend]:
    """PyTorch again, loaded only if an answer differs and nobody knows whether that was a near tie."""
    return lambda: TorchBackend(open_student(checkpoint))


def _extra_checks(
    checkpoint: Checkpoint, evidence: Evidence, backend: Backend, cases: Cases, gate: Gate
) -> tuple[dict[str, Any], list[str]]:
    """What only one format can be asked; adds cases in place."""
    from export.llama import LlamaBackend

    tokenizer = checkpoint.tokenizer
    if isinstance(backend, OnnxBackend):
        embeddings = embedding_parity(evidence, backend.embeddings)
        cases["every_position"] = every_position(evidence, backend)
        cases["batch_of_two"] = padded_pair(tokenizer.spec.pad_token_id, evidence, backend, gate)
        far = not embeddings["max"] <= gate.embedding
        found = [f"embeddings: max {embeddings['max']:.3g} is above {gate.embedding:.3g}"] if far else []
        return {"embeddings": embeddings}, found
    if isinstance(backend, LlamaBackend):
        return token_parity(checkpoint, evidence, backend)
    return {}, []


def token_parity(checkpoint: Checkpoint, evidence: Evidence, backend: LlamaBackend) -> tuple[dict[str, Any], list[str]]:
    """Text to ids and where generation stops, in llama.cpp and in the student's tokenizer.

    llama.cpp normalises nothing, so a text is compared in the form the student's tokenizer brings it into.
    """
    tokenizer = checkpoint.tokenizer
    own, normaliser = tokenizer.tokenizer, tokenizer.tokenizer.normalizer
    texts = token_corpus(evidence, tokenizer)
    texts = list(dict.fromkeys(texts if normaliser is None else map(normaliser.normalize_str, texts)))
    wrong = [t for t in texts if backend.tokenise(t) != list(own.encode(t, add_special_tokens=False).ids)]
    image_id = tokenizer.spec.image_token_id
    wrong += [c.prompt.text for c in evidence.cases if backend.ids_of(c.prompt, image_id) != c.prompt.ids]
    found = [f"llama.cpp tokenises {len(wrong)} texts differently, first {wrong[0]!r}"] if wrong else []
    deaf = [own.id_to_token(i) for i in tokenizer.spec.eos_token_ids if not backend.stops_at(i)]
    found += [f"llama.cpp does not stop at {token!r}" for token in deaf[:1]]
    ends = {*tokenizer.spec.eos_token_ids}
    words = {i: str(token.content) for i, token in own.get_added_tokens_decoder().items()}
    eager = [
        word for i, word in sorted(words.items()) if i not in ends and word not in INFILLING and backend.stops_at(i)
    ]
    found += [
        f"llama.cpp also stops at {word!r}; add it to eos_token_id of generation_config.json" for word in eager[:1]
    ]
    told, wanted = backend.declared(), declared(tokenizer)
    found += [f"the text file says {k} {told[k]!r}, the student {wanted[k]!r}" for k in wanted if told[k] != wanted[k]]
    count = {"texts": len(texts) + len(evidence.cases), "different": len(wrong), "stop_words_missed": len(deaf)}
    return {"tokenisation": {**count, "normalised": normaliser is not None}}, found


def every_position(evidence: Evidence, backend: OnnxBackend) -> dict[str, float]:
    """Logits after each prompt token: a wrong causal mask shows here even if the last row is right."""
    chosen, expected = evidence.positions
    # the worst of many rows has the limit of the decoded steps, which is also one of many: a right 8-bit export of a
    # random CLIP and Qwen3 has 0.63 here, above the 0.5 that the one row after a prompt is held to
    return parity.compare_logits(expected, backend.prefill_rows(evidence.cases[-1].prompt, chosen))


def padded_pair(pad: int, evidence: Evidence, backend: OnnxBackend, gate: Gate) -> dict[str, float]:
    """Two cases of different length in one left-padded batch, teacher-forced together; worst or mean of the two rows."""
    cases, truths = (evidence.cases[0], evidence.cases[-1]), (evidence.expected[0], evidence.expected[-1])
    length = max(len(c.prompt.ids) for c in cases)
    rows = [backend.prompt_embeddings(c.prompt)[0] for c in cases]
    filler = backend.embeddings(np.array([[pad]], np.int64))[0]
    embeds = np.stack([np.concatenate([np.repeat(filler, length - len(r), 0), r]) for r in rows])
    mask = np.stack([np.r_[np.zeros(length - len(r)), np.ones(len(r))] for r in rows]).astype(np.int64)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    logits = [backend.prefill_batch(embeds, mask, positions)]
    for step in zip(*(c.forced for c in cases), strict=True):
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
        positions = positions[:, -1:] + 1
        logits.append(backend.run(backend.embeddings(np.array(step)[:, None]), mask, positions, 1)[:, -1])
    both = [parity.compare_logits(e, np.stack(logits)[:, i]) for i, e in enumerate(truths)]
    if not gate.pooled:
        return {key: (min if key in parity.LOW_IS_BAD else max)(one[key] for one in both) for key in both[0]}
    means = parity.pool(both)
    return {**means, "prefill": max(b["prefill"] for b in both), "decode": max(b["decode"] for b in both)}


def ablate(
    student: Student, evidence: Evidence, root: Path, manifest: Manifest, storage: to_onnx.Storage, scratch: Path
) -> list[dict[str, Any]]:
    """What each part costs: the artefact with one part at a time back in fp32, measured again.

    Returns: per part `{part, kind, kl, top1, exact_match}`, and a first row with nothing restored.
    """
    cases = [manifest.parity["cases"][case.name] for case in evidence.cases]
    rows = [_row("none", "-", parity.pool(cases), manifest.accuracy.get("after"))]
    for part in PARTS:
        kind = getattr(storage.precision, part)
        if kind == "fp32":
            continue
        note(f"measuring what {part} {kind} costs")
        restored = dataclasses.replace(storage, precision=dataclasses.replace(storage.precision, **{part: "fp32"}))
        folder = scratch / part
        graph = next(g for g in to_onnx.graphs(student, restored) if g.stem == STEM_OF[part])
        files = to_onnx.write_graph(student, graph, "_restored", folder)
        backend = open_backend(root, manifest, {graph.role: files[0][0]})
        try:
            pooled = parity.pool(replay_cases(backend, evidence).values())
            scores, _ = accuracy(
                backend, lambda: TorchBackend(student), student.checkpoint.tokenizer, evidence, gate_of(manifest)
            )
        finally:
            backend.close()
        rows.append(_row(part, kind, pooled, scores.get("after")))
        for path, _ in files:
            path.unlink()
    return rows


def _row(part: str, kind: str, pooled: dict[str, float], score: float | None) -> dict[str, Any]:
    return {"part": part, "kind": kind, "kl": pooled["kl"], "top1": pooled["top1"], "exact_match": score}


def costliest(rows: list[dict[str, Any]]) -> list[str]:
    """Parts in the order in which restoring them helps most: exact match first where it is known, then KL."""
    return [
        row["part"]
        for row in sorted(
            rows[1:], key=lambda r: (-(r["exact_match"] if r["exact_match"] is not None else 0.0), r["kl"])
        )
    ]
