"""The student as Trainer, DDP and FSDP see it: everything that reads its weights runs inside `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from distill.batch import Batch

T = TypeVar("T")


class Distiller(nn.Module):
    """A student whose forward runs any work on it.

    An objective calls parts of the student (embeddings, decoder twice, head weight) and never `student.forward`, where
    DDP reduces gradients and FSDP unshards weights. Here the whole of it is one forward pass of one module: DDP sees
    every use of a parameter, and FSDP keeps embeddings and head, which belong to the root, unsharded until it ends.
    The teacher stays outside: it is neither wrapped nor saved.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        names = {type(module).__name__ for module in student.modules()}
        # what FSDP shards one by one; the rest belongs to the root
        self._no_split_modules = sorted(names & set(_indivisible(student)))

    def forward(self, work: Callable[[nn.Module], T]) -> T:
        return work(self.student)

    def tie_weights(self) -> None:
        if hasattr(self.student, "tie_weights"):
            self.student.tie_weights()


def _indivisible(student: nn.Module) -> set[str]:
    found: set[str] = set()
    for module in student.modules():
        found |= set(getattr(module, "_no_split_modules", None) or ())
    return found


def blank_image(student: Any, batch: Batch) -> Tensor | float:
    """Zero, computed through the vision tower when a batch has no image.

    With a sharded student every process must pass through the same modules in the same order, whatever it was dealt.
    """
    if batch.pixels_NCHW is not None and len(batch.pixels_NCHW):
        return 0.0
    vision = student.config.vision_config
    pixels = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=batch.input_ids_BT.device)
    features = student.model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=student.config.vision_feature_layer,
        vision_feature_select_strategy=student.config.vision_feature_select_strategy,
        return_dict=True,
    ).pooler_output
    return sum((feature.sum() * 0.0 for feature in features), start=torch.zeros((), device=pixels.device))
