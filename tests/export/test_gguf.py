"""GGUF files: precisions per part, fallbacks, importance matrices, tokenizers, templates, CLIP, and what plans promise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import to_gguf
from export.backends import gate_of
from export.cli import main
from export.gguf_file import read_tensors
from export.gguf_mmproj import by_depth, fitting
from export.gguf_precision import FILE_TYPES, GgufPrecision, parse_gguf
from export.gguf_quantise import plan, quantise
from export.gguf_source import Weights
from export.gguf_text import rope_factors
from export.llama import LlamaBackend
from export.parity import COSINE, GATES, gguf_gate, trt_gate
from export.student import read_config, read_facts
from tests.tiny import make_student
from vlm.errors import ArtifactError, CheckpointError, UserError
from vlm.load import open_checkpoint
from vlm.manifest import read_manifest

QUANTISED = tuple(kind for kind in FILE_TYPES if kind not in ("f32", "f16", "bf16"))


@pytest.mark.parametrize(
    ("precision", "decoder"),
    [*((kind, "qwen2") for kind in ("f32", "bf16", "q4_k_m", "iq3_m")), ("f32", "qwen3"), ("f32", "llama")],
)
def test_every_kind_verifies(exported: Callable[..., Any], precision: str, decoder: str) -> None:
    made = exported("gguf", precision, "siglip", decoder)
    manifest = made.manifest
    assert manifest.parity["failures"] == []
    assert manifest.precision["decoder"]["type"] == precision
    assert manifest.precision["decoder"]["fallbacks"] == {}
    assert manifest.parity["tokenisation"]["texts"] > 1000
    if precision == "f32":
        assert manifest.parity["worst"]["prefill"] <= 0.02
        assert manifest.parity["worst"]["cosine"] >= 0.9999


def test_tokens_are_equal_where_first_choices_have_a_margin(exported: Callable[..., Any]) -> None:
    """Strictly, no near tie counted as equal: the random students have those at every third step."""
    made = exported("gguf", "f16", "siglip", "qwen2", memorised=True)
    assert made.manifest.parity["failures"] == []
    assert made.manifest.parity["pooled"]["top1"] >= 0.99
    assert made.manifest.accuracy["tokens_equal"] == 1.0


@pytest.mark.parametrize("decoder", ["qwen2", "qwen3", "llama"])
def test_tokens_are_equal_where_the_file_rounds_nothing(tmp_path: Path, decoder: str) -> None:
    """Strictly, on 200 questions, with random weights as transformers draws them, stored in float16."""
    student = make_student(tmp_path / "student", spread=1.0, half=True, decoder=decoder)
    run = ["--target", "gguf", "--precision", "f16", "--student", str(student), "--out", str(tmp_path / "out")]
    assert main([*run, "--samples", "200"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.accuracy["n"] == 200
    assert manifest.accuracy["tokens_equal"] >= 0.99
    assert manifest.parity["worst"]["prefill"] <= 0.03
    assert manifest.parity["worst"]["cosine"] >= 0.999


def test_parts_have_types_of_their_own(exported: Callable[..., Any]) -> None:
    made = exported("gguf", "q4_k_m,vision=q8_0,embed=q8_0,head=q6_k", "siglip", "qwen3", tied=False)
    assert made.manifest.parity["failures"] == []
    section = made.manifest.precision
    assert section["embed_tokens"]["type"] == "q8_0"
    assert section["lm_head"]["type"] == "q6_k"
    assert section["vision_encoder"]["type"] == "q8_0"
    assert 4 < section["decoder"]["bits_per_weight"] < 6
    assert section["decoder"]["imatrix"]["tokens"] > 400


@pytest.mark.parametrize(("precision", "coarsest"), [("f16,vision=q8_0", "q8_0"), ("q8_0,embed=q4_0", "q4_0")])
def test_mixed_kinds_are_held_to_the_coarsest(exported: Callable[..., Any], precision: str, coarsest: str) -> None:
    """A pair of a float16 text file and an eight-bit mmproj is right, though no float16 file would be that far off."""
    made = exported("gguf", precision, "siglip", "qwen2")
    assert made.manifest.parity["failures"] == []
    gate, alone = gate_of(made.manifest), GATES["gguf", coarsest]
    assert dataclasses.replace(gate, cosine=0) == dataclasses.replace(alone, cosine=0)
    assert gate.cosine == COSINE["q8_0" if "vision" in precision else "f16"]


def test_a_finer_part_loosens_nothing() -> None:
    """Nor does it switch a measure off that its own gate leaves out."""
    for kind in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq2_xs"):
        mixed = gguf_gate("f16", "q8_0", kind, "q6_k" if kind in ("q5_k_m", "q4_k_m", "iq2_xs") else kind)
        assert dataclasses.replace(mixed, cosine=GATES["gguf", kind].cosine) == GATES["gguf", kind], kind
    assert trt_gate("fp16", "int8", "fp16").correlation == GATES["tensorrt", "int8"].correlation


@pytest.mark.parametrize("kind", QUANTISED)
def test_llama_cpp_writes_every_kind_as_planned(exported: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    made = exported("gguf", "q4_k_m", "siglip", "qwen2")
    checkpoint, facts = made.subject.student.checkpoint, made.subject.student.facts
    weights = Weights(checkpoint.weights)
    origin = to_gguf.origin_of(checkpoint, facts, weights, "p", "s")
    to_gguf.write_text(origin, weights, tmp_path / "exact.gguf", "f16")
    to_gguf.write_text(origin, weights, tmp_path / "hollow.gguf", "f16", hollow=True)
    assert (tmp_path / "hollow.gguf").stat().st_size == (tmp_path / "exact.gguf").stat().st_size
    matrix = made.manifest.path_of(made.root, "imatrix")
    quantise(tmp_path / "exact.gguf", tmp_path / "q.gguf", GgufPrecision(kind), matrix)
    written = {name: tensor.tensor_type.name for name, tensor in read_tensors(tmp_path / "q.gguf").items()}
    assert written == plan(tmp_path / "hollow.gguf", GgufPrecision(kind), importance=True)
    assert FILE_TYPES[kind][1] in written.values()


def test_plan_equals_the_files(
    exported: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Sizes and fallbacks of --dry-run against the real run, on widths that do not suit blocks of 256."""
    sizes = {"hidden": 96, "head_dim": 24, "intermediate": 160, "vision_hidden": 72, "vision_intermediate": 100}
    made = exported("gguf", "q4_k_m,vision=q8_0", "siglip", "qwen2", **sizes)
    command = ["--target", "gguf", "--precision", "q4_k_m,vision=q8_0", "--student", str(made.subject.directory)]
    assert main([*command, "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    real = {entry.path: entry.bytes for entry in made.manifest.files}
    said = {entry["path"]: entry["bytes"] for entry in answer["files"]}
    assert set(said) == set(real) | {"README.md", "manifest.json"}
    for path in ("text-q4_k_m.gguf", "mmproj-q8_0.gguf"):
        assert said[path] == pytest.approx(real[path], abs=64), path
    assert answer["fallbacks"] == made.manifest.precision["decoder"]["fallbacks"]
    assert sum(answer["fallbacks"].values()) == 15
    assert made.manifest.precision["vision_encoder"]["fallbacks"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "iq2_xs", "--no-imatrix"], "needs an importance matrix"),
        (["--precision", "q4_k_m,mouth=q8_0"], "not PART=KIND"),
        (["--precision", "q4_k_m,vision=q4_k"], "not PART=KIND"),
        (["--precision", "q3"], "choose from f16, q8_0"),
        (["--precision", "q4_k_m", "--awq"], "for --target onnx"),
        (["--precision", "q4_k_m,embed=q8_0,head=q6_k"], "one tensor for both"),
        (["--precision", "q4_k_m", "--imatrix", "x", "--no-imatrix"], "leave out"),
        (["--precision", "q4_k_m", "--imatrix", "/nope.gguf"], "/nope.gguf is not a file"),
        (["--precision", "q8_0", "--imatrix", __file__], "does nothing at q8_0"),
        (["--imatrix", __file__], "does nothing at f16 and q8_0"),
        (["--precision", "q4_k_m", "--algorithm", "search"], "--algorithm is for --target onnx or tensorrt"),
    ],
)
def test_wrong_options_are_one_line(
    subjects: Callable[..., Any], tmp_path: Path, options: list[str], message: str
) -> None:
    command = [
        "--target",
        "gguf",
        "--student",
        str(subjects("siglip", "qwen2").directory),
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(UserError, match=message):
        main([*command, *options])
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_does_not_divide_is_refused_before_llama_cpp_aborts(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", hidden=96, head_dim=24, intermediate=96)
    command = ["--target", "gguf", "--precision", "q4_k_m,embed=q6_k", "--out", str(tmp_path / "o")]
    with pytest.raises(CheckpointError, match="rows of a multiple of 256, this student has 96"):
        main([*command, "--student", str(student)])


def test_disk_full_inside_llama_cpp(exported: Callable[..., Any], tmp_path: Path) -> None:
    """Both writers on a device that is always full."""
    made = exported("gguf", "f16", "siglip", "qwen2")
    full = tmp_path / "full.gguf"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        quantise(made.manifest.path_of(made.root, "text_gguf"), full, GgufPrecision("q8_0"))
    full.unlink(missing_ok=True)
    full.symlink_to("/dev/full")
    checkpoint = made.subject.student.checkpoint
    weights = Weights(checkpoint.weights)
    origin = to_gguf.origin_of(checkpoint, made.subject.student.facts, weights, "p", "s")
    with pytest.raises(OSError, match="No space left"):
        to_gguf.write_text(origin, weights, full, "f16")


def test_a_quantised_file_is_not_quantised_again(exported: Callable[..., Any], tmp_path: Path) -> None:
    made = exported("gguf", "q8_0", "siglip", "qwen2")
    with pytest.raises(ArtifactError, match="requantizing"):
        quantise(made.manifest.path_of(made.root, "text_gguf"), tmp_path / "x.gguf", GgufPrecision("q4_k_m"))
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("layers", [[-2, -1], [-1, 1]])
def test_several_feature_layers(exported: Callable[..., Any], layers: list[int]) -> None:
    """llama.cpp stacks them by depth, whatever the order of the configuration."""
    made = exported("gguf", "f16", "siglip", "qwen3", feature_layer=layers)
    assert made.manifest.parity["failures"] == []


def test_columns_follow_the_depth_of_their_feature() -> None:
    weight = np.arange(12).reshape(2, 6)
    assert by_depth(weight, (3, 1)).tolist() == [[3, 4, 5, 0, 1, 2], [9, 10, 11, 6, 7, 8]]


def test_rows_that_do_not_divide_fall_back_to_half() -> None:
    assert fitting("q8_0", (10, 4304)) == "F16"
    assert fitting("q8_0", (10, 1152)) == "Q8_0"
    assert fitting("q8_0", (10,)) == "F32"


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotations(tmp_path: Path, kind: str) -> None:
    student = make_student(tmp_path / "student", decoder="llama", hidden=64, head_dim=16, intermediate=64)
    config = json.loads((student / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_theta": 10000.0, **ROPES[kind]}
    (student / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    command = ["--target", "gguf", "--precision", "f16", "--samples", "2", "--student", str(student)]
    assert main([*command, "--out", str(out)]) == 0
    assert read_manifest(out).verified


def test_llama3_divisors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 500000.0, **ROPES["llama3"], "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=131072)
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    facts = dataclasses.replace(
        read_facts(open_checkpoint(make_student(tmp_path / "s", hidden=64, head_dim=16))), head_dim=128
    )
    text = type("Config", (), {"rope_parameters": rope})()
    factors = rope_factors(text, facts)
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / factors, inverse.numpy(), rtol=1e-5)


def test_old_spellings_of_tensor_names(subjects: Callable[..., Any], tmp_path: Path) -> None:
    """Files of transformers 4 and of save_pretrained give the same tensors as the model in memory."""
    from safetensors.numpy import load_file, save_file

    subject = subjects("siglip", "qwen2")
    stored = load_file(subject.directory / "model.safetensors")
    old = {}
    for name, array in stored.items():
        name = name.replace("vision_tower.", "vision_tower.vision_model.").removeprefix("model.")
        old[name] = array
    save_file(old, tmp_path / "old.safetensors")
    state = {f"model.{k}" if not k.startswith("lm_head") else k: v for k, v in stored.items()}
    save_file(state, tmp_path / "new.safetensors")
    plain = Weights([subject.directory / "model.safetensors"])
    for path in ("old.safetensors", "new.safetensors"):
        other = Weights([tmp_path / path])
        assert set(other.stored) == set(plain.stored)
        np.testing.assert_array_equal(other.whole("lm_head.weight" if "lm_head.weight" in other else "language_model.norm.weight"), plain.whole("lm_head.weight" if "lm_head.weight" in plain else "language_model.norm.weight"))  # fmt: skip


def test_blocks_are_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stored type, in pieces smaller than a row's neighbours, against the library's own reader."""
    import torch
    from safetensors.torch import save_file

    from export import gguf_source

    tensors = {
        f"x.{i}": torch.randn(37, 5, 3).to(dtype)
        for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))
    }
    tensors["x.vector"] = torch.randn(7)
    save_file(tensors, tmp_path / "m.safetensors")
    monkeypatch.setattr(gguf_source, "BLOCK_BYTES", 100)
    weights = Weights([tmp_path / "m.safetensors"])
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(weights.whole(name), tensor.float().numpy())


def test_truncated_weights_are_named(subjects: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((subjects("siglip", "qwen2").directory / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        Weights([path])


def test_clip_is_measured_and_refused_by_name(subjects: Callable[..., Any], tmp_path: Path) -> None:
    student = subjects("clip", "qwen2").directory
    with pytest.raises(CheckpointError, match=r"installed llama.cpp computes CLIP towers wrongly.*25814"):
        main(["--target", "gguf", "--student", str(student), "--out", str(tmp_path / "out"), "--samples", "0"])
    assert list(tmp_path.iterdir()) == []


def test_the_clip_file_is_right_but_for_the_place_of_the_class_token(
    subjects: Callable[..., Any], tmp_path: Path
) -> None:
    """llama.cpp's own mistake done in PyTorch gives its features: with the mistake mended, the file needs no change."""
    import torch

    from vlm.preprocess import pixels

    subject = subjects("clip", "qwen2")
    student, checkpoint = subject.student, subject.student.checkpoint
    weights = Weights(checkpoint.weights)
    origin = to_gguf.origin_of(checkpoint, student.facts, weights, "p", "s")
    to_gguf.write_text(origin, weights, tmp_path / "text.gguf", "f32")
    to_gguf.write_mmproj(origin, weights, tmp_path / "mmproj.gguf", "f32")
    image = subject.evidence.cases[0].prompt.image
    backend = LlamaBackend(tmp_path / "text.gguf", tmp_path / "mmproj.gguf", checkpoint.image, "<image>")
    got = backend.features(image)
    backend.close()
    tower = student.model.model.vision_tower
    with torch.no_grad():
        x = torch.from_numpy(pixels(image, checkpoint.image)[None])
        patches = tower.embeddings.patch_embedding(x).flatten(2).transpose(1, 2)
        state = torch.cat([patches, tower.embeddings.class_embedding[None, None]], 1)
        state = tower.pre_layrnorm(state + tower.embeddings.position_embedding.weight[None])
        for layer in tower.encoder.layers[: max(to_gguf.gguf_mmproj.depths(student.facts, origin.config))]:
            state = layer(state, attention_mask=None)
            state = state[0] if isinstance(state, tuple) else state
        wanted = student.model.model.multi_modal_projector(state[:, 1:])[0].numpy()
    assert np.abs(got - wanted).max() / wanted.std() < 0.02


def test_an_untied_head_that_the_configuration_denies(tmp_path: Path) -> None:
    """Published configurations claim tying where the head differs: the file must carry it."""
    student = make_student(tmp_path / "student", tied=False, hidden=64, head_dim=16, intermediate=64)
    config = json.loads((student / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (student / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(student)
    tensors = to_gguf.gguf_text.text_tensors(Weights(checkpoint.weights), read_facts(checkpoint), read_config(checkpoint), "f16")  # fmt: skip
    assert "output.weight" in {t.name for t in tensors}


def test_precision_text_round_trips() -> None:
    for text in ("f16", "q4_k_m", "q4_k_m,vision=q8_0,embed=q6_k,head=q8_0", "f32", "f32,vision=f16"):
        assert parse_gguf(text).text() == text
    assert parse_gguf("Q4_K_M").decoder == "q4_k_m"


@pytest.mark.parametrize(("recipe", "named"), [({"student": "tiny"}, "tiny"), ("tiny", None), (None, None)])
def test_what_a_student_was_made_from_is_named_where_it_is_known(
    subjects: Callable[..., Any], tmp_path: Path, recipe: Any, named: str | None
) -> None:
    """Also where another program wrote vlm.json in a form of its own."""
    import gguf

    student = subjects("siglip", "qwen2").student
    checkpoint = dataclasses.replace(student.checkpoint, provenance={"recipe": recipe})
    weights = Weights(checkpoint.weights)
    origin = to_gguf.origin_of(checkpoint, student.facts, weights, "p", "s")
    to_gguf.write_text(origin, weights, tmp_path / "text.gguf", "f16", hollow=True)
    field = gguf.GGUFReader(tmp_path / "text.gguf").get_field("general.base_model.0.name")
    assert (field and field.contents()) == named
