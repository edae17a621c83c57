"""Each precision on each kind of student: within its limits, in the files and types other readers expect."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.measure import ablate, costliest
from export.parity import GATES, mixed_gate
from export.precision import KINDS, Precision, parse_precision
from export.to_onnx import Storage
from export.verify import verify
from tests.memorised import margins
from vlm.errors import UserError

ALL = [
    (kind, tower, decoder)
    for kind, tower, decoder in itertools.product(
        KINDS, ("siglip", "siglip2", "clip"), ("qwen2", "qwen2.5", "qwen3", "llama")
    )
]
FULL = bool(os.environ.get("EXPORT_FULL_MATRIX"))
# every kind, tower and decoder once in an ordinary run; set EXPORT_FULL_MATRIX=1 for all 60, twice
SOME = [
    ("fp16", "siglip", "llama"),
    ("int8", "clip", "qwen3"),
    ("int4", "siglip", "qwen2"),
    ("q4f16", "clip", "qwen3"),
]
# what a memorised student's first choice leads by, in standard deviations of its logits, in 19 of 20 rows
MARGIN = 1.0
# share of equal first choices, mean KL, worst cosine of visual tokens, worst logit difference per unit of spread
STRICT = {
    "fp32": (1.0, 1e-6, 0.999999, 3e-4),
    "fp16": (0.99, 1e-4, 0.999, 0.05),
    "int8": (0.97, 5e-3, 0.99, 0.5),
    "int4": (0.93, 0.05, 0.95, 4.0),
}


@pytest.mark.parametrize(("kind", "tower", "decoder"), ALL if FULL else SOME)
def test_precision_holds_its_limits(exported: Callable[..., Any], kind: str, tower: str, decoder: str) -> None:
    made = exported("onnx", kind, tower, decoder)
    report = verify(made.root)
    assert report["failures"] == []
    pooled, worst = made.manifest.parity["pooled"], made.manifest.parity["worst"]
    limits = {"fp32": (1.0, 1e-6, 0.999), "fp16": (0.99, 1e-4, 0.999), "int8": (0.97, 5e-3, 0.99)}
    top1, kl, cosine = limits.get(kind, (0.93, 0.05, 0.95))
    assert pooled["top1_tied"] >= top1
    assert pooled["kl"] <= kl
    assert worst["cosine"] >= cosine
    assert pooled["rows"] >= 100
    cache = [port for port in made.manifest.io["decoder_model_merged"]["inputs"] if port[0] == "past_key_values.0.key"]
    assert cache[0][1] == ("float16" if KINDS[kind].half else "float32")
    assert (made.root / "onnx" / f"decoder_model_merged{KINDS[kind].suffix}.onnx").is_file()


@pytest.mark.parametrize(("kind", "tower", "decoder"), ALL if FULL else [("int4", "siglip", "qwen2")])
def test_first_choice_is_kept_where_there_is_one(
    exported: Callable[..., Any], kind: str, tower: str, decoder: str
) -> None:
    """The strict form of the limits: a near tie turned counts as wrong. Needs a student whose choices have margins."""
    made = exported("onnx", kind, tower, decoder, memorised=True)
    parity = made.manifest.parity
    assert parity["failures"] == []
    lead = np.concatenate([margins(e.top_logits) / e.spread for e in made.subject.evidence.expected])
    assert np.quantile(lead, 0.05) > MARGIN
    top1, kl, cosine, worst = STRICT.get(kind, STRICT["int4"])
    assert parity["pooled"]["rows"] >= 100
    assert parity["pooled"]["top1"] >= top1
    assert parity["pooled"]["kl"] <= kl
    assert parity["worst"]["cosine"] >= cosine
    assert max(case[key] for case in parity["cases"].values() for key in ("prefill", "decode")) <= worst
    if KINDS[kind].bits >= 16:
        assert made.manifest.accuracy["tokens_equal"] == 1.0


def test_four_bits_are_about_five_with_their_scales(exported: Callable[..., Any]) -> None:
    manifest = exported("onnx", "int4", "siglip", "qwen2").manifest
    for part in ("embed_tokens", "decoder", "lm_head"):
        assert 4.9 < manifest.precision[part]["bits_per_weight"] < 5.2, part
    assert manifest.model["decoder_weight_bytes"] < 0.2 * 4 * 1_400_000
    assert manifest.model["lm_head_bytes"] == manifest.precision["lm_head"]["bytes"]


def test_static_weights_are_of_the_type_every_processor_multiplies_exactly(exported: Callable[..., Any]) -> None:
    """AVX2 saturates sums of uint8 x int8 pairs: 0.26 of a standard deviation on large positive factors, uint8 2e-5."""
    import onnx

    path = next((exported("onnx", "int8", "clip", "qwen3").root / "onnx").glob("vision_encoder*.onnx"))
    graph = onnx.load(str(path), load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    matrices = [node.input for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in kinds]
    assert len(matrices) == 2 * 6 + 2
    assert {kinds[name] for inputs in matrices for name in (inputs[0], inputs[2])} == {onnx.TensorProto.UINT8}


def test_portable_flavour_has_only_standard_operators(exported: Callable[..., Any], tmp_path: Path) -> None:
    import onnx

    from export.stages import Stages
    from export.to_onnx import write

    student = exported("onnx", "int4", "siglip", "qwen2").subject.student
    files, _, section, _ = write(student, tmp_path, Storage(parse_precision("int4"), "portable"), Stages(None))
    for path, _role in files:
        if path.suffix == ".onnx":
            assert {node.domain for node in onnx.load(str(path), load_external_data=False).graph.node} <= {
                "",
                "ai.onnx",
            }
    assert section["embed_tokens"]["fallbacks"]  # no plain operator looks up 4-bit rows
    assert section["decoder"]["bits_per_weight"] < 5.2


def test_portable_and_ort_flavour_multiply_by_the_same_numbers(subjects: Callable[..., Any], tmp_path: Path) -> None:
    from export.ort import OnnxBackend
    from export.parity import replay_case
    from export.stages import Stages
    from export.to_onnx import write

    subject = subjects("siglip", "qwen3")
    measured = []
    for flavour in ("ort", "portable"):
        storage = Storage(parse_precision("fp32,decoder=int8,head=int8"), flavour)
        files, *_ = write(subject.student, tmp_path / flavour, storage, Stages(None))
        paths = {role: path for path, role in files}
        checkpoint = subject.student.checkpoint
        backend = OnnxBackend(
            paths["vision_encoder"],
            paths["embed_tokens"],
            paths["decoder"],
            checkpoint.image,
            checkpoint.tokenizer.spec.image_token_id,
        )
        measured.append(replay_case(backend, subject.evidence.cases[0].prompt, subject.evidence.expected[0]))
    assert all(one["kl"] < 5e-3 for one in measured)
    assert measured[0]["prefill"] == pytest.approx(measured[1]["prefill"], abs=0.05)


def test_residual_beyond_float16_stays_float32(subjects: Callable[..., Any], tmp_path: Path) -> None:
    """Massive activations: a plain float16 graph gives infinities where the widened one stays right."""
    import dataclasses

    import numpy as np

    from export.calibrate import observe
    from export.evidence import calibration_prompts
    from export.ort import session
    from export.reference import TorchBackend
    from export.to_onnx import graphs, write_graph
    from vlm.preprocess import pixels

    student = subjects("siglip", "qwen2").student
    bias = student.model.model.vision_tower.encoder.layers[0].mlp.fc2.bias
    before = bias.clone()
    try:
        bias[7] += 80000.0
        prompts, more = calibration_prompts(student, None, count=2)
        calibration = observe(student, prompts, more)
        assert calibration.wide() == {"vision"}
        truth = TorchBackend(student).features(prompts[0].image)
        feed = {"pixel_values": pixels(prompts[0].image, student.checkpoint.image)[None]}
        got = {}
        for name, wide in (("narrow", frozenset()), ("wide", calibration.wide())):
            storage = dataclasses.replace(Storage(parse_precision("fp16")), wide=wide)
            files = write_graph(student, graphs(student, storage)[0], name, tmp_path)
            got[name] = session(files[0][0]).run(None, feed)[0][0]
    finally:
        bias.copy_(before)
    assert not np.isfinite(got["narrow"]).all()
    assert np.abs(got["wide"] - truth).max() < 0.05 * truth.std()


def test_ablation_names_the_part_that_costs_most(exported: Callable[..., Any], tmp_path: Path) -> None:
    made = exported("onnx", "int4", "siglip", "qwen2")
    storage = Storage(parse_precision("int4"), "ort")
    rows = ablate(made.subject.student, made.subject.evidence, made.root, made.manifest, storage, tmp_path)
    assert [row["part"] for row in rows] == ["none", "vision", "embed", "decoder", "head"]
    first = costliest(rows)[0]
    restored = {row["part"]: row["kl"] for row in rows}
    assert restored[first] == min(list(restored.values())[1:]) < restored["none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("int3", "int3"), ("int4,tower=fp16", "tower=fp16"), ("int4,vision", "PART=KIND"), ("int4,head=q2", "q2")],
)
def test_wrong_precision_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_precision(text)


@pytest.mark.parametrize("text", ["int4", "fp32", "int4,vision=fp16", "int8,embed=fp16,head=int4"])
def test_precision_text_round_trip(text: str) -> None:
    assert parse_precision(text).text() == text


def test_raising_ends_at_fp32() -> None:
    precision: Precision | None = parse_precision("q4f16")
    steps = 0
    while precision is not None and (following := precision.raised("decoder")) is not None:
        precision, steps = following, steps + 1
    assert precision is not None
    assert precision.decoder == "fp32"
    assert steps == 2


def test_mixed_gate_takes_the_coarsest_part_but_vision_its_own() -> None:
    gate = mixed_gate("fp32", "fp32", "int4", "int8")
    assert gate.kl == GATES["onnx", "int4"].kl
    assert gate.cosine == GATES["onnx", "fp32"].cosine
    assert gate.pooled
