"""Tiny randomly initialised students for parity and fault tests: seconds to build, every layer type present."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.assemble import Shape, build_model, build_processor, build_tokenizer, save_checkpoint
from vlm import digits


def make_student(directory: Path, seed: int = 0, spread: float = 4.0, **sizes: Any) -> Path:
    """Write a random student with the given Shape fields and return its directory.

    Freshly initialised weights give nearly flat logits, under which every parity check passes; `spread` scales the
    decoder and projector matrices so that logits differ from token to token as in a trained model.
    """
    import torch

    shape = Shape(**{"vision_layers": 2, "vision_hidden": 64, "vision_intermediate": 96, **sizes})
    tokenizer = build_tokenizer(digits.texts())
    model = build_model(shape, tokenizer, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("language_model" in name or "projector" in name) and "embed" not in name:
                parameter.mul_(spread)
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    save_checkpoint(model, build_processor(tokenizer, shape), directory, {"objective": "none", "seed": seed})
    return directory
