"""The decoder as llama.cpp's `qwen2`, `qwen3` and `llama` read it: tensors, sizes, where it comes from."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.gguf_file import PAIR_KEY, Tensor, changed, plain
from export.gguf_source import Array, Weights
from export.gguf_tokens import add_tokenizer
from export.options import run_name
from export.student import Facts
from vlm.errors import CheckpointError
from vlm.load import Checkpoint

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TABLE, HEAD, NORM = "language_model.embed_tokens.weight", "lm_head.weight", "language_model.norm.weight"
LAYER = re.compile(r"language_model\.layers\.(\d+)\.(.+)\.(weight|bias)")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
MATRICES = tuple(f"{name}.weight" for name in NAMES if name.endswith("_proj"))
NEEDED = {
    "qwen2": tuple(f"self_attn.{p}_proj.bias" for p in "qkv"),
    "qwen3": ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    "llama": (),
}
OPTIONAL = {"qwen2": (), "qwen3": (), "llama": tuple(f"self_attn.{p}_proj.bias" for p in "qkvo")}
ROPES = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class Origin:
    """Who made a file, out of what: the same in both files of a pair.

    Attributes:
        config: `LlavaConfig` of the student.
        size_label: e.g. `0.9B`, of the whole student.
    """

    checkpoint: Checkpoint
    config: Any
    facts: Facts
    pair_id: str
    sha256: str
    size_label: str


def tied(weights: Weights, facts: Facts) -> bool:
    """Whether head and table are one tensor: some published configurations claim so where they differ."""
    return facts.tied and (HEAD not in weights or weights.equal(HEAD, TABLE))


def text_tensors(weights: Weights, facts: Facts, config: Any, kind: str) -> list[Tensor]:
    """Everything of the decoder in llama.cpp's names: matrices in `kind`, vectors in float32.

    Raises:
        CheckpointError: a tensor is missing, or has no place in a GGUF file.
    """
    matrix = kind.upper()
    tensors = [plain(weights, TABLE, "token_embd.weight", matrix), plain(weights, NORM, "output_norm.weight", "F32")]
    if not tied(weights, facts):
        tensors.append(plain(weights, HEAD, "output.weight", matrix))
    if (factors := rope_factors(config.text_config, facts)) is not None:
        tensors.append(Tensor("rope_freqs.weight", factors.shape, "F32", lambda: [factors]))
    needed = (*MATRICES, *NORMS, *NEEDED[facts.decoder])
    for index in range(facts.layers):
        for name in needed:
            _ = weights[f"language_model.layers.{index}.{name}"]
    for source, stored in weights.stored.items():
        if not source.startswith("language_model.") or source in (TABLE, NORM):
            continue
        found = LAYER.fullmatch(source)
        known = (*needed, *OPTIONAL[facts.decoder])
        if not found or f"{found[2]}.{found[3]}" not in known or int(found[1]) >= facts.layers:
            raise CheckpointError(f"{stored.path}: {source} has no place in a GGUF file of {facts.decoder}")
        name = f"blk.{found[1]}.{NAMES[found[2]]}.{found[3]}"
        type_name = matrix if len(stored.shape) > 1 else "F32"
        rotated = facts.decoder == "llama" and found[2] in ("self_attn.q_proj", "self_attn.k_proj")
        if rotated:
            heads = facts.heads if "q_proj" in found[2] else facts.kv_heads
            tensors.append(changed(weights, source, name, type_name, functools.partial(interleave, heads=heads)))
        else:
            tensors.append(plain(weights, source, name, type_name))
    return tensors


def interleave(array: Array, heads: int) -> Array:
    """Rows of each head from two halves to neighbouring pairs: arch `llama` rotates (0,1), (2,3), ..."""
    shape = array.shape
    turned = array.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(turned).reshape(shape)


def rope_factors(text: Any, facts: Facts) -> Array | None:
    """Divisors of the rotation frequencies of Llama 3 (transformers `_compute_llama3_parameters`); None for other kinds."""
    rope = text.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, facts.head_dim, 2) / facts.head_dim)
    old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((old / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def describe_text(origin: Origin, kind: str) -> Callable[[Any], None]:
    """The metadata of the text file, as a function that adds it to a `gguf.GGUFWriter`."""
    facts, text = origin.facts, origin.config.text_config

    def describe(writer: Any) -> None:
        import gguf

        writer.add_type("model")
        describe_origin(writer, origin)
        writer.add_file_type(file_type(kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(facts.vocab_size)
        writer.add_context_length(facts.context_length)
        writer.add_embedding_length(facts.hidden)
        writer.add_block_count(facts.layers)
        writer.add_feed_forward_length(facts.intermediate)
        writer.add_head_count(facts.heads)
        writer.add_head_count_kv(facts.kv_heads)
        writer.add_layer_norm_rms_eps(text.rms_norm_eps)
        if facts.decoder == "qwen3" or facts.head_dim * facts.heads != facts.hidden:
            writer.add_key_length(facts.head_dim)
            writer.add_value_length(facts.head_dim)
        if facts.decoder == "llama":
            writer.add_rope_dimension_count(facts.head_dim)
        _describe_rope(writer, text.rope_parameters)
        add_tokenizer(writer, origin.checkpoint, facts.vocab_size)

    return describe


def file_type(kind: str) -> int:
    import gguf

    types = gguf.LlamaFileType
    return int(
        {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16, "q8_0": types.MOSTLY_Q8_0}[kind]
    )


def _describe_rope(writer: Any, rope: dict[str, Any]) -> None:
    import gguf

    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def describe_origin(writer: Any, origin: Origin) -> None:
    """`general.*`: name, size, licence, what it was distilled from and on."""
    known = origin.checkpoint.provenance
    name = run_name(origin.checkpoint.directory)
    writer.add_name(name)
    writer.add_basename(name)
    writer.add_size_label(origin.size_label)
    writer.add_tags(["image-text-to-text"])
    if licence := known.get("licence"):
        writer.add_license(str(licence))
    if objective := known.get("objective"):
        writer.add_finetune(str(objective))
    recipe = known.get("recipe")
    if isinstance(recipe, dict) and recipe.get("student"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, str(recipe["student"]))
    teacher, data = known.get("teacher"), known.get("data")
    writer.add_description(
        f"LLaVA student ({origin.facts.tower} tower, {origin.facts.decoder} decoder)"
        + (f" distilled from {_name(teacher)}" if teacher else "")
    )
    if data:
        writer.add_dataset_count(1)
        writer.add_dataset_name(0, _name(data))
        if isinstance(data, dict) and data.get("sha256"):
            writer.add_dataset_version(0, str(data["sha256"]))
    writer.add_string(PAIR_KEY, origin.pair_id)
    writer.add_string("align_edge.student_sha256", origin.sha256)


def _name(value: Any) -> str:
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)


def size_label(weights: Weights) -> str:
    """`0.9B` and the like, by llama.cpp's own rule."""
    import gguf

    return str(gguf.size_label(sum(stored.count for stored in weights.stored.values()), 0, 0, 0))


def check_text(config: Any, facts: Facts) -> Sequence[tuple[bool, str]]:
    """(broken, why) pairs of everything the text model of llama.cpp does not compute."""
    text = config.text_config
    rope = text.rope_parameters.get("rope_type", "default")
    return (
        (text.hidden_act != "silu", f"decoder activation {text.hidden_act!r}"),
        (rope not in ROPES, f"rope_type {rope!r} has no GGUF form"),
        (
            rope == "yarn" and text.rope_parameters.get("attention_factor") is not None,
            "a YaRN attention_factor of its own has no GGUF form",
        ),
        *(
            (rope == "yarn" and text.rope_parameters.get(name, usual) != usual, f"YaRN with {name} has no GGUF form")
            for name, usual in (("mscale", None), ("mscale_all_dim", None), ("truncate", True))
        ),
        (
            facts.decoder == "qwen2" and facts.head_dim * facts.heads != facts.hidden,
            "qwen2 with heads x head_dim != hidden does not load; use a qwen3 decoder",
        ),
        (facts.head_dim % 2 == 1, f"head_dim {facts.head_dim} is odd"),
        (facts.decoder == "llama" and getattr(text, "mlp_bias", False), "mlp_bias has no GGUF name"),
    )
