"""What other people's tools read: names, shapes and metadata of the written files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vlm.chat import user_message
from vlm.manifest import check_files, read_manifest
from vlm.preprocess import pixels


def test_onnx_layout_is_the_one_transformers_js_reads(exported: Callable[..., Any]) -> None:
    import onnx

    root = exported("onnx", "fp32", "siglip", "qwen3").root
    graph = onnx.load(str(root / "onnx" / "decoder_model_merged.onnx"), load_external_data=False).graph
    inputs = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 64]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["num_logits_to_keep"] == []
    assert [o.name for o in graph.output][:2] == ["logits", "present.0.key"]
    config = json.loads((root / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"]["decoder_model_merged.onnx"] == 1
    assert config["image_token_index"] == config["image_token_id"]
    preprocessor = json.loads((root / "preprocessor_config.json").read_text())
    assert preprocessor["processor_class"] == "LlavaProcessor"
    assert preprocessor["num_additional_image_tokens"] == 0
    assert "<image>" in json.loads((root / "tokenizer_config.json").read_text())["chat_template"]


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_processor_files_of_the_artefact_make_the_same_prompt(exported: Callable[..., Any], tower: str) -> None:
    """transformers' own processor, loaded from the ONNX artefact, counts as many image tokens as the graphs give."""
    from transformers import AutoProcessor

    made = exported("onnx", "fp32", tower, "qwen3")
    processor = AutoProcessor.from_pretrained(made.root)
    prompt = made.subject.evidence.prompts[0]
    text = processor.apply_chat_template([user_message(prompt.question)], add_generation_prompt=True)
    inputs = processor(images=prompt.image, text=text, return_tensors="np")
    assert inputs["input_ids"][0].tolist() == list(prompt.ids)
    assert np.abs(inputs["pixel_values"][0] - pixels(prompt.image, made.subject.student.checkpoint.image)).max() < 1e-6


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_image_tokens_for_a_reader_that_ignores_the_select_strategy(exported: Callable[..., Any], tower: str) -> None:
    root = exported("onnx", "fp32", tower, "qwen3").root
    assert json.loads((root / "preprocessor_config.json").read_text())["num_additional_image_tokens"] == 0


def test_graphs_carry_no_traces_of_this_machine(exported: Callable[..., Any]) -> None:
    root = exported("onnx", "fp32", "siglip", "qwen2").root
    for path in (root / "onnx").glob("*.onnx"):
        assert b".py" not in path.read_bytes()


@pytest.mark.parametrize(
    ("target", "precision", "roles"),
    [
        ("onnx", "fp32", {"vision_encoder", "embed_tokens", "decoder", "external_data", "config"}),
        ("gguf", "q8_0", {"text_gguf", "mmproj"}),
        ("tensorrt", "fp16", {"vision_encoder", "embed_tokens", "decoder", "build_plan", "build_script"}),
    ],
)
def test_manifest_says_what_a_runtime_needs(
    exported: Callable[..., Any], target: str, precision: str, roles: set[str]
) -> None:
    made = exported(target, precision, "siglip", "llama")
    manifest = read_manifest(made.root)
    check_files(made.root, manifest)
    found = {entry.role for entry in manifest.files}
    assert roles | {"tokenizer", "chat_template", "golden_image", "reference"} <= found
    wanted = ("layers", "heads", "kv_heads", "head_dim", "hidden", "vocab_size", "context_length")
    assert all(manifest.model[key] > 0 for key in wanted)
    assert manifest.model["decoder_weight_bytes"] > manifest.model["lm_head_bytes"] > 0
    bits = {"fp32": 32, "fp16": 16, "q8_0": 8.5}[precision]
    # a random student's norms are all ones, and equal constants are stored once
    assert bits - 0.1 < manifest.precision["decoder"]["bits_per_weight"] < bits + 0.2
    assert manifest.image["tokens"] == 16
    assert manifest.source["student_sha256"] == made.subject.student.checkpoint.weights_sha256()
    assert manifest.golden[0].token_ids


def test_gguf_metadata(exported: Callable[..., Any]) -> None:
    import gguf

    made = exported("gguf", "f16", "siglip", "qwen3")
    text = gguf.GGUFReader(made.manifest.path_of(made.root, "text_gguf"))
    value = {name: field.contents() for name, field in text.fields.items()}
    vocab = made.subject.student.facts.vocab_size
    assert value["general.architecture"] == "qwen3"
    assert value["tokenizer.ggml.pre"] == "qwen2"
    assert len(value["tokenizer.ggml.tokens"]) == len(set(value["tokenizer.ggml.tokens"])) == vocab
    assert value["tokenizer.ggml.add_bos_token"] is False
    mmproj = gguf.GGUFReader(made.manifest.path_of(made.root, "mmproj"))
    field = mmproj.get_field("clip.vision.feature_layer")
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert field.contents() == [2]
    assert not any("post_ln" in tensor.name for tensor in mmproj.tensors)
