"""Where a live teacher lives: with the student, on another GPU, or in main memory; in which type, quantised or not."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill import access, ribbon
from distill.access import Head
from distill.batch import Batch
from distill.config import Align, TrainConfig
from distill.methods import LavitOptions
from distill.teacher import DenseTarget, Gaze, LiveTeacher, Target, Teacher, TeacherPass
from vlm.errors import CheckpointError, MissingPiece, UserError
from vlm.load import Checkpoint, load_model

# kept as they are under quantisation: the head is multiplied by the loss, the rest is small
UNQUANTISED = ("lm_head", "vision_tower", "multi_modal_projector", "visual", "vision_model", "connector")


@dataclass(frozen=True)
class Placed:
    """A frozen teacher and where it computes.

    Attributes:
        head: its output projection on the student's device, where the loss is computed.
    """

    model: nn.Module
    device: torch.device
    head: Head

    def teacher(self, align: Align, iva_layer: int, lavit: LavitOptions | None = None) -> Teacher:
        """The teacher the objective asks; what it is shown and what it answers changes device as needed."""
        live = LiveTeacher(self.model, align, iva_layer, lavit)
        weight = access.head(self.model).weight_VD
        return live if weight is self.head.weight_VD else MovedTeacher(live, self.device, self.head)


def student_device() -> torch.device:
    """Where this process trains."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def place(checkpoint: Checkpoint, config: TrainConfig, beside: torch.device | None = None) -> Placed:
    """Load the teacher as `teacher_device`, `teacher_dtype` and `teacher_load` say.

    Args:
        beside: the student's device.

    Raises:
        UserError: no such GPU, or quantisation without one. MissingPiece: bitsandbytes is not installed.
    """
    beside = beside or student_device()
    device = _device(config.teacher_device, beside)
    offload = config.teacher_device == "cpu" and beside.type != "cpu"
    if config.teacher_load != "none":
        _refuse_quantisation(config, device, offload)
        model = _quantised(checkpoint, config, device)
    else:
        model = load_model(checkpoint, config.teacher_dtype).requires_grad_(False)
        if not offload:
            model = model.to(device)
    if not offload:
        own = access.head(model)
        return Placed(model, device, own if device == beside else _moved(own, beside))
    head = _moved(access.head(model), beside)
    return Placed(offloaded(model, beside), beside, head)


def offloaded(model: nn.Module, device: torch.device) -> nn.Module:
    """Keep the weights in main memory; each layer's travel to `device` while it computes."""
    from accelerate import cpu_offload

    moved: Any = cpu_offload(model, execution_device=device)
    moved.computes_on = device  # its parameters lie nowhere while it does not compute
    return moved


def computes_on(model: nn.Module) -> torch.device:
    """Where a model, offloaded or not, wants its input."""
    device: torch.device = getattr(model, "computes_on", None) or next(model.parameters()).device
    return device


def _device(name: str, beside: torch.device) -> torch.device:
    if name in ("auto", "same", "cpu"):
        return beside
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name if ":" in name else f"{name}:0")
    if device.index is not None and device.index >= count:
        found = f"{count} CUDA GPU{'s' if count != 1 else ''}" if count else "no CUDA GPU"
        raise UserError(f"teacher_device {name!r}: this machine has {found}; drop it, or choose same or cpu")
    return device


def _refuse_quantisation(config: TrainConfig, device: torch.device, offload: bool) -> None:
    what = f"teacher_load {config.teacher_load!r}"
    if device.type != "cuda":
        raise UserError(f"{what} needs a CUDA GPU and there is none; drop it, e.g. for --teacher_dtype bfloat16")
    if offload:
        raise UserError(f"{what} keeps the teacher on a GPU; drop --teacher_device cpu")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPiece(f"{what} needs bitsandbytes; run `pip install bitsandbytes`")


def _quantised(checkpoint: Checkpoint, config: TrainConfig, device: torch.device) -> nn.Module:
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    dtype = getattr(torch, config.teacher_dtype)
    how = {"8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}}
    quantisation = BitsAndBytesConfig(llm_int8_skip_modules=list(UNQUANTISED), **how[config.teacher_load])
    try:
        model: nn.Module = AutoModelForImageTextToText.from_pretrained(
            checkpoint.directory,
            dtype=dtype,
            quantization_config=quantisation,
            device_map={"": device},
            local_files_only=True,
        )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{checkpoint.directory}: cannot be loaded in {config.teacher_load} ({reason})"
        ) from error
    return model.eval().requires_grad_(False)


def _moved(head: Head, device: torch.device) -> Head:
    return Head(head.weight_VD.detach().to(device, copy=True), head.soft_cap)


class MovedTeacher:
    """A live teacher on another device, or one whose head is not in reach while it does not compute."""

    def __init__(self, live: LiveTeacher, device: torch.device, head: Head) -> None:
        self.live, self.device, self.head = live, device, head

    def __call__(self, batch: Batch, iva: bool, tpa: bool) -> TeacherPass:
        return MovedPass(self.live(_on(batch, self.device), iva, tpa), self.device, self.head)


@dataclass(frozen=True)
class MovedPass:
    """One pass of such a teacher; answers lie on the device of its head, the student's."""

    seen: TeacherPass
    device: torch.device
    head: Head

    def weights(self) -> Tensor:
        return self.seen.weights().to(self._home)

    def rows(self, sample_R: Tensor, token_R: Tensor) -> Target:
        return self._brought(self.seen.rows(sample_R.to(self.device), token_R.to(self.device)))

    def gaze(self) -> Gaze:
        found = self.seen.gaze()
        return Gaze(found.mass_BT.to(self._home), found.semantics_BE.to(self._home))

    def candidates(self, candidates: ribbon.Candidates) -> Target:
        return self._brought(self.seen.candidates(_on(candidates, self.device)))

    @property
    def _home(self) -> torch.device:
        return self.head.weight_VD.device

    def _brought(self, target: Target) -> Target:
        assert isinstance(target, DenseTarget)
        return DenseTarget(target.hidden_RE.to(self._home), self.head)


def _on(value: Any, device: torch.device) -> Any:
    """A frozen dataclass with its tensors on `device`, those of nested dataclasses too."""
    moved: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        found = getattr(value, item.name)
        if isinstance(found, Tensor):
            moved[item.name] = found.to(device)
        elif dataclasses.is_dataclass(found):
            moved[item.name] = _on(found, device)
    return dataclasses.replace(value, **moved)
