"""Low-rank adapters (LoRA, Hu et al. 2021) through peft, put into the student in place.

The student keeps its class and its layout, so everything that reads its parts works unchanged. Adapters and the
projector train, nothing else. At the end the adapters are written in peft's own format and merged into the weights.

Dropout acts before each adapter. Under the ribbon's `cached` layout candidates read the very keys and values of the
gold pass, so both saw the same dropped prefix; the single-pass layouts would draw the prefix's dropout anew, which is
why the configuration refuses that combination.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from distill.config import Lora
from distill.groups import part_of
from vlm.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"
# the chunked loss multiplies with these weights itself, past any adapter
NEVER = ("lm_head", "embed_tokens")


def attach(model: Any, settings: Lora) -> None:
    """Add adapters to the linear layers of the decoder (and tower) and leave only them and the projector to train.

    Raises:
        UserError: the targets name nothing, or what cannot carry an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = targets(model, settings)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
        modules_to_save=None,
    )
    inject_adapter_in_model(config, model, NAME)
    for name, parameter in model.named_parameters():
        if part_of(name) == "projector":
            parameter.requires_grad_(True)


def targets(model: nn.Module, settings: Lora) -> list[str]:
    """Full names of the linear layers that get adapters."""
    parts = ("llm", "vision") if settings.vision else ("llm",)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.(layers|blocks)\.\d+\.", name) and part_of(name) in parts
    ]
    if settings.targets == "auto":
        return linear
    try:
        pattern = re.compile(settings.targets)
    except re.error as error:
        raise UserError(f"lora.targets {settings.targets!r} is not a regular expression ({error})") from None
    for never in NEVER:
        if pattern.search(never):
            raise UserError(
                f"lora.targets {settings.targets!r} takes in {never}, which the loss reads directly; "
                "name decoder layers, such as 'self_attn|mlp'"
            )
    found = [name for name in linear if pattern.search(name)]
    if not found:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(f"lora.targets {settings.targets!r} names no linear layer; there are {', '.join(kinds)}")
    return found


def attached(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def save_adapter(model: Any, directory: Path, base: str) -> None:
    """Write what was trained as a peft adapter: `PeftModel.from_pretrained(student, directory)` applies it to `base`."""
    from safetensors.torch import save_file

    config: LoraConfig = model.peft_config[NAME]
    config.base_model_name_or_path = base
    config.modules_to_save = _projectors(model)
    config.inference_mode = True
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    trained: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if f".{NAME}." in name or part_of(name) == "projector":
            trained[f"base_model.model.{name.replace(f'.{NAME}.', '.')}"] = parameter.detach().cpu().contiguous()
    save_file(trained, directory / "adapter_model.safetensors")


def _projectors(model: nn.Module) -> list[str]:
    """The outermost modules that hold projector weights."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and not inside and any(True for _ in module.parameters()):
            parts = {part_of(f"{name}.{inner}") for inner, _ in module.named_parameters()}
            if parts == {"projector"}:
                found.append(name)
    return found


def merge(model: Any) -> None:
    """Fold the adapters into the weights they adapt, in place; afterwards the model is a plain one of its class."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config
