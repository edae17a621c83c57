"""Float32 arithmetic over weights stored in 16 bits: each matrix is widened while it is used. Imports torch lazily.

Widening is exact, so the model computes what a float32 copy of the checkpoint would, at half the memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

HALVES = {"BF16": "bfloat16", "F16": "float16"}


def stored_dtype(weights: tuple[Path, ...]) -> str:
    """`bfloat16` or `float16` if all tensors are stored so, else `float32`. Reads headers only."""
    from safetensors import SafetensorError, safe_open

    found: set[str] = set()
    for path in weights:
        try:
            with safe_open(path, "np") as tensors:
                names = tensors.keys()  # the handle itself cannot be iterated
                found |= {tensors.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError):
            return "float32"  # the loader says what is wrong with the file
    return HALVES.get(next(iter(found)), "float32") if len(found) == 1 else "float32"


def widen(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Make a model compute in float32; matrices of linear layers and the embedding table stay as stored."""
    import torch
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Linear):
            if module.weight.dtype != torch.float32:
                if module.bias is not None:
                    module.bias.data = module.bias.data.float()
                module.register_forward_pre_hook(_to_float32)
                module.register_forward_hook(_back)
        elif isinstance(module, nn.Embedding) and module is model.model.language_model.embed_tokens:
            if module.weight.dtype != torch.float32:
                module.register_forward_hook(lambda _module, _inputs, output: output.float())
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.float())
    return model


def _to_float32(module: Any, _inputs: Any) -> None:
    module.narrow = module.weight.data
    module.weight.data = module.narrow.float()


def _back(module: Any, _inputs: Any, _output: Any) -> None:
    module.weight.data = module.narrow
    del module.narrow
