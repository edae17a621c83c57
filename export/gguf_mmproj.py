"""The vision tower and projector as llama.cpp's `clip` reads them: arch `clip`, projector `mlp`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from export.gguf_file import BLOCKS, Tensor, changed, plain
from export.gguf_source import Array, Weights
from export.gguf_text import Origin, describe_origin, file_type
from export.student import Facts, blocks_used
from vlm.errors import CheckpointError

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
EMBEDDINGS = {
    "vision_tower.embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "vision_tower.embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "vision_tower.embeddings.position_embedding.weight": "v.position_embd.weight",
    "vision_tower.embeddings.class_embedding": "v.class_embd",
    "vision_tower.pre_layrnorm.weight": "v.pre_ln.weight",
    "vision_tower.pre_layrnorm.bias": "v.pre_ln.bias",
}
LAYER = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
PROJECTOR = {"multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2"}
GELU = ("gelu_pytorch_tanh", "gelu")


def depths(facts: Facts, config: Any) -> tuple[int, ...]:
    """Blocks that run before each selected feature, in the order of the configuration."""
    return blocks_used(facts, config.vision_config.num_hidden_layers)


def vision_tensors(weights: Weights, facts: Facts, config: Any, kind: str) -> list[Tensor]:
    """Only the blocks in use; never the post-layernorm, which llama.cpp would apply to the features.

    Raises:
        CheckpointError: a tensor is missing or has no place in an mmproj file.
    """
    used, vision = max(depths(facts, config)), config.vision_config
    names = dict(NAMES)
    if vision.intermediate_size == vision.hidden_size:  # llama.cpp then takes them for an old, swapped file
        names["mlp.fc1"], names["mlp.fc2"] = names["mlp.fc2"], names["mlp.fc1"]
    for index in range(used):
        for name in NAMES:
            for part in ("weight", "bias"):
                _ = weights[f"vision_tower.encoder.layers.{index}.{name}.{part}"]
    needed = [n for n in EMBEDDINGS if ("patch" in n and "bias" not in n) or "position" in n or facts.tower == "clip"]
    for name in (*[n for n in needed if n != "vision_tower.embeddings.patch_embedding.bias"], *_projector_names()):
        _ = weights[name]
    tensors: list[Tensor] = []
    for source, stored in weights.stored.items():
        if source.startswith(("language_model.", "lm_head.")):
            continue
        found = LAYER.fullmatch(source)
        if found and int(found[1]) >= used:
            continue
        if found and found[2] in names:
            name = f"v.blk.{found[1]}.{names[found[2]]}.{found[3]}"
            tensors.append(plain(weights, source, name, fitting(kind, stored.shape)))
        elif source in EMBEDDINGS:
            tensors.append(plain(weights, source, EMBEDDINGS[source], _embedding_type(source, kind)))
        elif source in _projector_names():
            module, _, part = source.rpartition(".")
            tensors.append(_projection(weights, source, f"{PROJECTOR[module]}.{part}", kind, facts, config))
        else:
            raise CheckpointError(f"{stored.path}: {source} has no place in an mmproj file")
    return tensors


def _projector_names() -> tuple[str, ...]:
    return tuple(f"{module}.{part}" for module in PROJECTOR for part in ("weight", "bias"))


def _embedding_type(source: str, kind: str) -> str:
    """Positions and vectors are added in float32; the patch kernel is never in blocks."""
    if "patch_embedding.weight" in source:
        return "F32" if kind == "f32" else "F16"
    return "F32"


def _projection(weights: Weights, source: str, name: str, kind: str, facts: Facts, config: Any) -> Tensor:
    """llama.cpp stacks several features in the order of their depth, the student in the order of its configuration."""
    wanted, shape = depths(facts, config), weights[source].shape
    type_name = fitting(kind, shape)
    if name != "mm.0.weight" or list(wanted) == sorted(wanted):
        return plain(weights, source, name, type_name)
    return changed(weights, source, name, type_name, functools.partial(by_depth, wanted=wanted))


def by_depth(weight: Array, wanted: Sequence[int]) -> Array:
    """Column blocks [rows, features x hidden] sorted by the depth of their feature."""
    parts = np.split(weight, len(wanted), axis=1)
    return np.concatenate([parts[i] for i in np.argsort(wanted)], axis=1)


def fitting(kind: str, shape: Sequence[int]) -> str:
    """The type of a matrix: `kind`, or float16 where its rows do not divide into blocks; float32 for vectors."""
    if len(shape) < 2:
        return "F32"
    wanted = kind.upper()
    return wanted if shape[-1] % BLOCKS[wanted] == 0 else "F16"


def describe_mmproj(origin: Origin, kind: str) -> Callable[[Any], None]:
    """The metadata of the mmproj, as a function that adds it to a `gguf.GGUFWriter`."""
    facts, vision, image = origin.facts, origin.config.vision_config, origin.checkpoint.image
    layers = sorted(depths(facts, origin.config))

    def describe(writer: Any) -> None:
        import gguf

        writer.add_type("mmproj")
        describe_origin(writer, origin)
        writer.add_file_type(file_type(kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_bool("clip.has_vision_encoder", True)
        writer.add_string("clip.projector_type", "mlp")
        if vision.hidden_act in GELU:
            writer.add_bool("clip.use_gelu", True)  # without it: QuickGELU, which CLIP has
        for key, value in (
            ("image_size", vision.image_size),
            ("patch_size", vision.patch_size),
            ("embedding_length", vision.hidden_size),
            ("feed_forward_length", vision.intermediate_size),
            ("block_count", layers[-1]),
            ("projection_dim", facts.hidden),
            ("attention.head_count", vision.num_attention_heads),
        ):
            writer.add_uint32(f"clip.vision.{key}", value)
        writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
        writer.add_array("clip.vision.image_mean", [float(v) for v in image.mean])
        writer.add_array("clip.vision.image_std", [float(v) for v in image.std])
        # named explicitly, or the last block is silently skipped; gguf-py writes Python ints as INT32, as llama.cpp needs
        writer.add_array("clip.vision.feature_layer", layers)

    return describe


def check_vision(config: Any, facts: Facts) -> Sequence[tuple[bool, str]]:
    """(broken, why) pairs of everything the vision graph of llama.cpp does not compute."""
    vision, clip = config.vision_config, facts.tower == "clip"
    acts = ("quick_gelu", *GELU) if clip else GELU
    wanted = depths(facts, config)
    return (
        (len(set(wanted)) != len(wanted), f"vision_feature_layer {list(facts.feature_layers)} names one layer twice"),
        (
            not clip and facts.select != "full",
            "vision_feature_select_strategy 'default' drops a patch of a SigLIP tower",
        ),
        (
            clip and facts.select != "default",
            "vision_feature_select_strategy 'full' of a CLIP tower keeps its CLS token",
        ),
        (vision.hidden_act not in acts, f"vision activation {vision.hidden_act!r}"),
        (config.projector_hidden_act not in GELU, "the projector activation is not GELU"),
        (not config.multimodal_projector_bias, "a projector without bias is untested in llama.cpp; use --target onnx"),
        (vision.image_size % vision.patch_size != 0 and clip, "patches that do not tile the image"),
    )
