"""Tiny randomly initialised students for parity and fault tests: seconds to build, every layer type present."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.assemble import SPECIALS, Shape, build_model, build_processor, build_tokenizer, save_checkpoint
from vlm import digits


def make_student(directory: Path, seed: int = 0, spread: float = 4.0, half: bool = False, **sizes: Any) -> Path:
    """Write a random student with the given Shape fields and return its directory.

    Freshly initialised weights give nearly flat logits, under which every parity check passes; `spread` scales the
    decoder and projector matrices so that logits differ from token to token as in a trained model.

    Args:
        half: every weight is a float16 number, as in checkpoints that were published or saved in that type.
    """
    shape = Shape(**{"vision_layers": 2, "vision_hidden": 64, "vision_intermediate": 96, **sizes})
    tokenizer = build_tokenizer(digits.texts())
    model = build_model(shape, tokenizer, seed)
    _spread(model, spread)
    for parameter in model.parameters() if half else ():
        parameter.data = parameter.data.half().float()
    save_checkpoint(model, build_processor(tokenizer, shape), directory, {"objective": "none", "seed": seed})
    return directory


def _spread(model: Any, spread: float) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("language_model" in name or "projector" in name) and "embed" not in name:
                parameter.mul_(spread)
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)


def rebuild(
    directory: Path, text: dict[str, Any], vision: dict[str, Any], top: dict[str, Any], spread: float = 4.0
) -> None:
    """Replace a student by a random one whose configuration has these settings changed."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= text
    config["vision_config"] |= vision
    path.write_text(json.dumps(config | top))
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(directory))
    _spread(model, spread)
    generation = (directory / "generation_config.json").read_text()
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(generation)


def make_tower(directory: Path, kind: str = "siglip", seed: int = 0, size: int = 32) -> Path:
    """Write a random SigLIP or CLIP model of both halves, as published towers are, with its image processor."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        SiglipConfig,
        SiglipImageProcessorPil,
        SiglipModel,
    )

    sides = {"height": size, "width": size}
    body = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    vision = {**body, "image_size": size, "patch_size": 8}
    text = {**body, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(seed)
    if kind == "siglip":
        SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(directory)
        SiglipImageProcessorPil(size=sides, resample=3).save_pretrained(directory)
    else:
        CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(directory)
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=sides).save_pretrained(directory)
    return directory


def make_llm(directory: Path, kind: str = "qwen2", seed: int = 0, rows: int = 576, **sizes: Any) -> Path:
    """Write a random causal language model with the digits tokenizer, without its image token.

    Args:
        rows: rows of the embedding; the tokenizer needs 511.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer(digits.texts(), specials=SPECIALS[:-1])
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    settings = {
        "vocab_size": rows,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        **sizes,
    }
    torch.manual_seed(seed)
    model_class(config_class(**settings)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
