"""The student as Trainer, DDP and FSDP see it: everything that reads its weights runs inside `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

T = TypeVar("T")


class Distiller(nn.Module):
    """A student whose forward runs any work on it.

    An objective calls parts of the student (embeddings, decoder twice, head weight) and never `student.forward`, where
    DDP reduces gradients and FSDP unshards weights. Here the whole of it is one forward pass of one module: DDP sees
    every use of a parameter, and FSDP keeps embeddings and head, which belong to the root, unsharded until it ends.
    The teacher stays outside: it is neither wrapped nor saved.

    Args:
        extra: what is trained beside the student and dropped with the run.
    """

    def __init__(self, student: nn.Module, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.student, self.extra = student, extra
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


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards parts of a module: then every process must pass through them equally often."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())
