"""The gate must see real mistakes: each fault is injected into files that were right, and must be caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import gguf_mmproj, gguf_text, parity
from export.backends import gate_of, open_backend
from export.gguf_file import Tensor, write
from export.gguf_source import Array, Weights
from export.measure import replay_cases, token_parity
from export.to_gguf import origin_of
from vlm.manifest import read_manifest


@pytest.mark.parametrize(("target", "precision"), [("onnx", "fp32"), ("tensorrt", "fp16")])
def test_wrong_mean_is_caught(exported: Callable[..., Any], target: str, precision: str) -> None:
    made = exported(target, precision, "siglip", "llama")
    wrong = dataclasses.replace(made.manifest, image={**made.manifest.image, "mean": [0.45, 0.5, 0.5]})
    assert made.measure_again(made.root, wrong).parity["failures"]


class Altered(Weights):
    """Checkpoint tensors, some of them changed on the way."""

    def __init__(self, paths: Any, changes: Mapping[str, Callable[[Array], Array]]) -> None:
        super().__init__(paths)
        self.changes = changes

    def raw_blocks(self, name: str) -> Iterator[Array]:
        blocks = super().raw_blocks(name)
        change = self.changes.get(name)
        return blocks if change is None else iter([change(np.concatenate(list(blocks)))])


@dataclass(frozen=True)
class Fault:
    """A mistake in the files of an artefact.

    Attributes:
        weights: tensor name in the checkpoint -> change of its values.
        keys: GGUF key -> another value, None to leave it out; for the text file and the mmproj.
        tensors: change of the list of tensors, by file.
        decoder, sizes: of the student it shows on.
    """

    weights: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[str, list[Tensor]], list[Tensor]] = lambda _arch, tensors: tensors
    decoder: str = "qwen3"
    sizes: Mapping[str, Any] = field(default_factory=dict)


def rewrite(made: Any, root: Path, fault: Fault) -> list[str]:
    """Both GGUF files of an artefact once more, with a fault; then what logits, features, ids and keys say.

    Answers are left out: text is a weak witness.
    """
    root = made.copy_to(root)
    manifest = read_manifest(root)
    student = made.subject.student
    weights = Altered(student.checkpoint.weights, fault.weights)
    origin = origin_of(student.checkpoint, student.facts, weights, manifest.pair_id, "0")

    def faulty(describe: Callable[[Any], None]) -> Callable[[Any], None]:
        def inner(writer: Any) -> None:
            describe(writer)
            for key, value in fault.keys.items():
                entry = writer.kv_data[0].pop(key, None)
                if entry is not None and value is not None:
                    writer.kv_data[0][key] = dataclasses.replace(entry, value=value)

        return inner

    text = gguf_text.text_tensors(weights, origin.facts, origin.config, "f16")
    vision = gguf_mmproj.vision_tensors(weights, origin.facts, origin.config, "f16")
    text_path, mmproj_path = manifest.path_of(root, "text_gguf"), manifest.path_of(root, "mmproj")
    arch = origin.facts.decoder
    write(text_path, arch, faulty(gguf_text.describe_text(origin, "f16")), fault.tensors("text", text))
    write(mmproj_path, "clip", faulty(gguf_mmproj.describe_mmproj(origin, "f16")), fault.tensors("clip", vision))
    return seen(made, root)


def seen(made: Any, root: Path) -> list[str]:
    manifest, evidence = read_manifest(root), made.subject.evidence
    backend: Any = open_backend(root, manifest)
    found = parity.all_failures(replay_cases(backend, evidence), gate_of(manifest))
    found += token_parity(made.subject.student.checkpoint, evidence, backend)[1]
    backend.close()
    return found


def _layer(index: int, name: str) -> str:
    return f"language_model.layers.{index}.{name}"


def _one_weight(array: Array) -> Array:
    array[3, 5] += 10 * array.std()
    return array


def _swap_names(a: str, b: str) -> Callable[[str, list[Tensor]], list[Tensor]]:
    def change(_arch: str, tensors: list[Tensor]) -> list[Tensor]:
        names = {a: b, b: a}
        return [dataclasses.replace(t, name=names.get(t.name, t.name)) for t in tensors]

    return change


def _with_post_norm(arch: str, tensors: list[Tensor]) -> list[Tensor]:
    width = next((t.shape[0] for t in tensors if t.name == "v.blk.0.ln1.weight"), 0)
    ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
    extra = [
        Tensor("v.post_ln.weight", (width,), "F32", lambda: [ones]),
        Tensor("v.post_ln.bias", (width,), "F32", lambda: [zeros]),
    ]
    return [*tensors, *extra] if arch == "clip" else tensors


def _unswapped(arch: str, tensors: list[Tensor]) -> list[Tensor]:
    if arch != "clip":
        return tensors
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    renamed = []
    for tensor in tensors:
        part = next((p for p in other if p in tensor.name), None)
        renamed.append(
            dataclasses.replace(tensor, name=tensor.name.replace(part, other[part]) if part else tensor.name)
        )
    return renamed


def _turned(turn: Callable[[Array, int], Array], heads: int) -> Callable[[Array], Array]:
    return lambda array: turn(array, heads)


def _halves(array: Array, heads: int) -> Array:
    """Undoes `gguf_text.interleave`, so that the file lacks it."""
    shape = array.shape
    return np.ascontiguousarray(array.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2)).reshape(
        shape
    )


FAULTS: dict[str, Fault] = {
    "swapped keys and values": Fault(tensors=_swap_names("blk.0.attn_k.weight", "blk.0.attn_v.weight")),
    "swapped gate and up": Fault(tensors=_swap_names("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")),
    "q scaled": Fault({_layer(1, "self_attn.q_norm.weight"): lambda a: a * np.float32(1.1)}),
    "one weight changed": Fault({_layer(0, "mlp.up_proj.weight"): _one_weight}),
    "embedding of the next token": Fault({"language_model.embed_tokens.weight": lambda a: np.roll(a, 1, 0)}),
    "llama without interleaved rotation": Fault(
        {_layer(0, "self_attn.q_proj.weight"): _turned(_halves, 4)}, decoder="llama"
    ),
    "qwen with interleaved rotation": Fault({_layer(0, "self_attn.q_proj.weight"): _turned(gguf_text.interleave, 4)}),
    "attention bias dropped": Fault({_layer(0, "self_attn.q_proj.bias"): np.zeros_like}, decoder="qwen2"),
    "rope base left out": Fault(keys={"qwen3.rope.freq_base": None}, sizes={"rope_theta": 1e6}),
    "wrong epsilon of the norms": Fault(keys={"qwen3.attention.layer_norm_rms_epsilon": 1e-2}),
    "feature layer left out": Fault(keys={"clip.vision.feature_layer": None}),
    "feature layer written as -1": Fault(keys={"clip.vision.feature_layer": [-1]}),
    "post-layernorm written": Fault(tensors=_with_post_norm),
    "use_gelu left out": Fault(keys={"clip.use_gelu": None}),
    "feed-forward of equal widths not renamed": Fault(
        tensors=_unswapped, sizes={"vision_intermediate": 64, "vision_hidden": 64}
    ),
    "rolled vision positions": Fault({"vision_tower.embeddings.position_embedding.weight": lambda a: np.roll(a, 1, 0)}),
    "red and blue swapped": Fault(
        {"vision_tower.embeddings.patch_embedding.weight": lambda a: np.ascontiguousarray(a[:, ::-1])}
    ),
    "projector bias dropped": Fault({"multi_modal_projector.linear_2.bias": np.zeros_like}),
    "wrong mean": Fault(keys={"clip.vision.image_mean": [0.45, 0.5, 0.5]}),
    "wrong standard deviation": Fault(keys={"clip.vision.image_std": [0.5, 0.5, 0.4]}),
    "default pre-tokeniser": Fault(keys={"tokenizer.ggml.pre": "default"}),
    "pre-tokeniser left out": Fault(keys={"tokenizer.ggml.pre": None}),
    "token types left out": Fault(keys={"tokenizer.ggml.token_type": None}),
    "merges in another order": Fault(keys={"tokenizer.ggml.merges": "reversed"}),
    "end of sequence left out": Fault(keys={"tokenizer.ggml.eos_token_id": None}),
    "beginning of sequence left out": Fault(keys={"tokenizer.ggml.bos_token_id": None}),
    "a token put before every prompt": Fault(keys={"tokenizer.ggml.add_bos_token": True}),
    "another chat template": Fault(keys={"tokenizer.chat_template": "{{ messages[0]['content'] }}"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_gguf_gate_catches(exported: Callable[..., Any], tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    made = exported("gguf", "f16", "siglip", fault.decoder, **fault.sizes)
    if "reversed" in fault.keys.values():
        import gguf

        merges = gguf.GGUFReader(made.manifest.path_of(made.root, "text_gguf")).get_field("tokenizer.ggml.merges")
        fault = dataclasses.replace(fault, keys={"tokenizer.ggml.merges": merges.contents()[::-1]})
    assert rewrite(made, tmp_path / "broken", fault)


def test_gguf_rewriting_without_a_fault_passes(exported: Callable[..., Any], tmp_path: Path) -> None:
    made = exported("gguf", "f16", "siglip", "qwen3")
    assert rewrite(made, tmp_path / "same", Fault()) == []


def test_dropped_vision_block_shows(exported: Callable[..., Any], tmp_path: Path) -> None:
    """Greedy text would not show it: 98.5 % of answers stayed the same in a trial."""
    made = exported("gguf", "f16", "siglip", "qwen3")
    fault = Fault(
        keys={"clip.vision.feature_layer": [1], "clip.vision.block_count": 1},
        tensors=lambda _arch, tensors: [t for t in tensors if not t.name.startswith("v.blk.1.")],
    )
    assert rewrite(made, tmp_path / "broken", fault)


def test_llama_cpps_own_padding_of_images_shows(exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is not square must not be left to llama.cpp, which pads it."""
    from export import llama

    def padded(image: Image.Image, spec: Any) -> Image.Image:
        side = max(image.size)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image)
        return square.resize((spec.size, spec.size))

    made = exported("gguf", "f16", "siglip", "qwen3")
    monkeypatch.setattr(llama, "resize", padded)
    assert seen(made, made.root)
