"""Every architecture in every format is the same function as the PyTorch student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from export import ort
from export.backends import open_backend
from export.parity import GATES, compare_logits, expect, is_tie
from export.reference import TorchBackend
from export.verify import verify
from tests.export.conftest import LIMIT
from vlm.chat import user_message

DECODERS = ("qwen2", "qwen3", "llama")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_onnx_equals_pytorch(exported: Callable[..., Any], tower: str, decoder: str) -> None:
    manifest = exported("onnx", "fp32", tower, decoder).manifest
    assert manifest.parity["failures"] == []
    assert manifest.verified
    assert manifest.parity["worst"]["prefill"] <= 3e-4
    assert manifest.parity["worst"]["top1"] == 1.0
    assert set(manifest.parity["cases"]) >= {"golden", "golden 3", "noise", "every_position", "batch_of_two"}
    assert manifest.accuracy["tokens_equal"] == 1.0


@pytest.mark.parametrize("precision", ["f16", "q8_0"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_gguf_equals_pytorch(exported: Callable[..., Any], decoder: str, precision: str) -> None:
    manifest = exported("gguf", precision, "siglip", decoder).manifest
    assert manifest.parity["failures"] == []
    assert manifest.parity["tokenisation"]["different"] == 0
    if precision == "f16":
        assert manifest.parity["worst"]["prefill"] <= 0.03


@pytest.mark.parametrize("decoder", ["qwen3", "llama"])
def test_tensorrt_graphs_equal_pytorch(exported: Callable[..., Any], decoder: str) -> None:
    manifest = exported("tensorrt", "fp16", "siglip", decoder).manifest
    assert manifest.parity["failures"] == []


def test_tensorrt_fp32_graphs_of_a_clip_student_with_an_early_feature_layer(exported: Callable[..., Any]) -> None:
    made = exported("tensorrt", "fp32", "clip", "qwen2", feature_layer=-2)
    assert made.manifest.verified, made.manifest.parity["failures"]


def test_gguf_with_early_feature_layer_untied_head_and_equal_vision_widths(exported: Callable[..., Any]) -> None:
    """Three llama.cpp traps at once: the block count, output.weight, and swapped feed-forward names."""
    made = exported(
        "gguf", "f16", "siglip", "qwen3", feature_layer=-2, tied=False, vision_intermediate=64, vision_hidden=64
    )
    assert made.manifest.parity["failures"] == []
    assert made.manifest.parity["worst"]["features"] < 0.02


@pytest.mark.parametrize(
    ("target", "precision", "tower"),
    [("onnx", "fp32", "clip"), ("gguf", "f16", "siglip"), ("tensorrt", "fp16", "siglip")],
)
def test_verify_replays_on_this_machine(exported: Callable[..., Any], target: str, precision: str, tower: str) -> None:
    report = verify(exported(target, precision, tower, "llama").root)
    assert report["failures"] == []


def test_reference_is_the_models_own_generate(subjects: Callable[..., Any]) -> None:
    """The hand-written greedy loop against transformers' generate, through the checkpoint's own processor."""
    import torch
    from transformers import AutoProcessor

    subject = subjects("siglip", "qwen2")
    evidence = subject.evidence
    processor = AutoProcessor.from_pretrained(subject.directory)
    for prompt, answer in list(zip(evidence.prompts, evidence.answers, strict=True))[:3]:
        text = processor.apply_chat_template([user_message(prompt.question)], add_generation_prompt=True)
        inputs = processor(images=prompt.image, text=text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == list(prompt.ids)
        with torch.no_grad():
            ids = subject.student.model.generate(**inputs, do_sample=False, max_new_tokens=LIMIT)
        assert tuple(ids[0, len(prompt.ids) :].tolist()) == answer


@pytest.mark.parametrize(("tower", "decoder"), [("clip", "qwen3"), ("siglip", "llama")])
def test_golden_answers_are_those_of_one_prompt_after_another(
    subjects: Callable[..., Any], tower: str, decoder: str
) -> None:
    """Prompts of different length share a padded batch; their logits come from passes without a cache."""
    from export.parity import STEPS
    from export.replay import forced_logits, greedy

    subject = subjects(tower, decoder)
    backend = TorchBackend(subject.student)
    cases = list(zip(subject.evidence.cases, subject.evidence.expected, strict=True))[:-1]
    assert len({len(case.prompt.ids) for case, _ in cases}) > 1
    for case, expected in cases:
        assert greedy(backend, case.prompt, (), STEPS) == case.forced
        assert compare_logits(expected, forced_logits(backend, case.prompt, case.forced))["decode"] < 1e-4


def test_a_near_tie_is_told_from_a_different_answer(subjects: Callable[..., Any]) -> None:
    subject = subjects("siglip", "qwen2")
    prompt, want = subject.evidence.prompts[0], subject.evidence.answers[0]
    reference = TorchBackend(subject.student)
    order = reference.prefill(prompt).argsort()
    strict, loose = GATES["onnx", "fp32"], dataclasses.replace(GATES["onnx", "fp32"], decode=100.0)
    assert int(order[-1]) == want[0]
    assert not is_tie(reference, prompt, want, (int(order[0]),), strict)
    assert is_tie(reference, prompt, want, (int(order[-2]),), loose)


def test_expected_keeps_the_most_likely_tokens() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 1000)).astype(np.float32)
    stored = expect(logits, rng.normal(size=(100, 4)).astype(np.float32), (1, 2))
    assert stored.top_ids.shape == (3, 256)
    assert (stored.top_ids[:, 0] == logits.argmax(1)).all()
    assert stored.features.shape == (64, 4)


def test_of_several_most_likely_tokens_any_is_right_and_no_other() -> None:
    """PyTorch's own argmax among equal logits is the lowest token id, which nobody who rounds otherwise can know."""
    stored = expect(np.array([[3, 5, 5, 1], [3, 5, 4.9999995, 1]], np.float32), np.ones((1, 4), np.float32), (0,))
    for said, top1 in (((1, 1), 1.0), ((2, 1), 1.0), ((2, 2), 0.5), ((0, 2), 0.0)):
        assert compare_logits(stored, np.eye(4, dtype=np.float32)[list(said)])["top1"] == top1


def test_a_batch_in_pieces_is_the_batch_at_once(exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = exported("onnx", "fp32", "siglip", "llama")
    backend = open_backend(made.root, made.manifest)
    assert isinstance(backend, ort.OnnxBackend)
    monkeypatch.setattr(ort, "PIECE", 7)
    long, short = (backend.prompt_embeddings(case.prompt)[0] for case in made.subject.evidence.cases[:2])
    short = short[: len(long) - 9]
    rows = np.stack([long, np.concatenate([np.zeros_like(long[:9]), short])])
    mask = np.ones(rows.shape[:2], np.int64)
    mask[1, :9] = 0  # longer than a piece: one piece of the second sample is all padding
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    found = []
    for large in (False, True):
        backend.large = large
        found.append(backend.prefill_batch(rows, mask, positions))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert backend.cache[0].shape[2] == len(long)
