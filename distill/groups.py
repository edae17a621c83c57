"""Which parameters train, how fast, and with what decay: freeze lists and optimiser groups by part of the model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from distill.config import TrainConfig
from vlm.errors import UserError

# first match wins: a merger inside a vision module is the projector, an embedding inside a decoder is the embeddings
PARTS = {
    "projector": r"multi_modal_projector|image_newline|visual\.(deepstack_)?merger|\bconnector\b",
    "vision": r"\bvision_tower\b|\bvision_model\b|\bvisual\b",
    "embeddings": r"\bembed_tokens\b",
    "lm_head": r"\blm_head\b",
    "llm": r"\blanguage_model\b|\btext_model\b",
}
# `--freeze llm` means the whole language model, and its learning rate is the default of what belongs to it
INSIDE_LLM = ("embeddings", "lm_head")
LAYERS = re.compile(r"(llm|vision)\.layers\.(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Group:
    """Parameters of one part that share learning rate and decay."""

    part: str
    lr: float
    decay: float
    parameters: tuple[nn.Parameter, ...]
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


def part_of(name: str) -> str:
    """The part of the model a parameter name belongs to.

    Raises:
        UserError: a model class whose layout is not known here.
    """
    for part, pattern in PARTS.items():
        if re.search(pattern, name):
            return part
    raise UserError(f"parameter {name!r} belongs to no known part ({', '.join(PARTS)}) of a supported model class")


def freeze(model: nn.Module, names: str) -> None:
    """Turn gradients off for a comma-separated list of parts, layer ranges and regular expressions.

    Raises:
        UserError: an entry names nothing, listing what can be named.
    """
    for entry in filter(None, (word.strip() for word in names.split(","))):
        chosen = _named_by(model, entry)
        for parameter in chosen:
            parameter.requires_grad_(False)


def _named_by(model: nn.Module, entry: str) -> list[nn.Parameter]:
    named = list(model.named_parameters())
    if entry in PARTS:
        wanted = {entry, *(INSIDE_LLM if entry == "llm" else ())}
        found = [parameter for name, parameter in named if part_of(name) in wanted]
    elif (layers := LAYERS.fullmatch(entry)) is not None:
        found = _layers(named, layers)
    else:
        try:
            pattern = re.compile(entry)
        except re.error as error:
            raise UserError(f"freeze {entry!r} is not a regular expression ({error}); {_choices(model)}") from None
        found = [parameter for name, parameter in named if pattern.search(name)]
    if not found and entry == "lm_head":
        raise UserError("freeze 'lm_head': the head is tied to the embeddings; name 'embeddings' instead")
    if not found:
        raise UserError(f"freeze {entry!r} names no parameter; {_choices(model)}")
    return found


def _layers(named: list[tuple[str, nn.Parameter]], entry: re.Match[str]) -> list[nn.Parameter]:
    part, first = entry[1], int(entry[2])
    last = first if entry[3] is None else int(entry[3])
    numbered: dict[int, list[nn.Parameter]] = {}
    for name, parameter in named:
        number = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
        if number and part_of(name) == part:
            numbered.setdefault(int(number[1]), []).append(parameter)
    if first > last or last not in numbered:
        raise UserError(f"freeze {entry[0]!r}: the {part} has layers 0 to {max(numbered, default=-1)}")
    return [parameter for number in range(first, last + 1) for parameter in numbered[number]]


def _choices(model: nn.Module) -> str:
    parts = sorted({part_of(name) for name, _ in model.named_parameters()})
    return f"choose from {', '.join(parts)}, llm.layers.A-B, vision.layers.A-B, or a regular expression of names"


def parameter_groups(config: TrainConfig, model: nn.Module) -> list[Group]:
    """Trainable parameters by part, learning rate and decay (none on vectors).

    Raises:
        UserError: nothing trains, or a learning rate is given for a part that does not train.
    """
    members: dict[tuple[str, float, float], list[tuple[str, nn.Parameter]]] = {}
    trains: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        trains.add(part)
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        members.setdefault((part, _rate(config, part), decay), []).append((name, parameter))
    if not members:
        raise UserError("every parameter is frozen; nothing to train")
    for part in PARTS:
        covered = {part, *(INSIDE_LLM if part == "llm" else ())}
        if getattr(config.lrs, part) and not covered & trains:
            present = any(part_of(name) == part for name, _ in model.named_parameters())
            why = "is frozen" if present else "has no parameters of its own in this model"
            raise UserError(f"lrs.{part} {getattr(config.lrs, part)}: that part {why}; drop the option")
    return [Group(*key, tuple(p for _, p in named), tuple(name for name, _ in named)) for key, named in members.items()]


def _rate(config: TrainConfig, part: str) -> float:
    own: float = getattr(config.lrs, part)
    if part == "projector":
        own = own or config.projector_lr
    if part in INSIDE_LLM:
        own = own or config.lrs.llm
    return own or config.lr


def table(groups: list[Group], model: nn.Module) -> str:
    """One line per group: part, trained parameters, learning rate, decay; and what stays fixed."""
    lines = [f"{'part':<11}{'parameters':>14}{'lr':>10}{'decay':>8}"]
    lines += [f"{group.part:<11}{group.size:>14,}{group.lr:>10.1e}{group.decay:>8g}" for group in groups]
    fixed = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return "\n".join([*lines, f"{'fixed':<11}{fixed:>14,}"])
