"""The optimiser of a run, what its state takes in memory, and how one optimiser takes over from another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import checkpoint, processes
from distill.config import TrainConfig
from distill.fira import Fira
from distill.groups import Group, parameter_groups, part_of
from distill.methods import FiraOptions
from vlm.errors import UserError

BETAS = (0.9, 0.98)
FILE = "optimizer.pt"
# torch keeps AdamW's step counter as a float32 tensor
COUNTER_BYTES = 4


def build_optimizer(
    config: TrainConfig, student: nn.Module, extra: Sequence[tuple[str, nn.Parameter]] = ()
) -> torch.optim.Optimizer:
    """AdamW or Fira over `parameter_groups`; groups keep the names of their parameters.

    Args:
        extra: trained beside the student, by AdamW and with the run's learning rate.

    Raises:
        UserError: nothing trains, or the targets of Fira name nothing it could help with.
    """
    groups = [_torch_group(group) for group in parameter_groups(config, student)]
    if extra:
        groups.append({"params": list(extra), "lr": config.lr, "weight_decay": 0.0})
    if config.optim == "adamw":
        # fused: one pass over a parameter, no temporaries of its size; on CPUs too
        return torch.optim.AdamW(groups, betas=BETAS, fused=True)
    if config.fira.per_layer and processes.world() > 1:
        processes.refuse(
            UserError(
                f"fira.per_layer updates before {processes.world()} processes have added up their gradients; drop it"
            )
        )
    chosen = low_rank_names(student, config.fira)
    split: list[dict[str, Any]] = []
    for group in groups:
        for rank in (config.fira.rank, 0):
            members = [(name, p) for name, p in group["params"] if (name in chosen) == bool(rank)]
            split += [{**group, "params": members, "rank": rank}] if members else []
    return Fira(split, betas=BETAS, settings=config.fira, seed=config.seed)


def _torch_group(group: Group) -> dict[str, Any]:
    named = list(zip(group.names, group.parameters, strict=True))
    return {"params": named, "lr": group.lr, "weight_decay": group.decay}


def low_rank_names(student: nn.Module, fira: FiraOptions) -> set[str]:
    """Names of the trained matrices whose state Fira keeps in low rank.

    Raises:
        UserError: none.
    """
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    pattern = None if fira.targets == "auto" else re.compile(fira.targets)
    named = {
        name: p
        for name, p in trained.items()
        if p.ndim == 2 and (_decoder_matrix(name) if pattern is None else pattern.search(name))
    }
    if not named:
        raise UserError(f"fira.targets {fira.targets!r} names no trained matrix; name some, such as 'self_attn|mlp'")
    found = {name for name, p in named.items() if min(p.shape) > fira.rank}
    if not found:
        largest = max(min(p.shape) for p in named.values())
        raise UserError(
            f"fira.rank {fira.rank}: the targets' shorter sides are up to {largest}, so no state would be saved; "
            f"lower it below {largest} or use --optim adamw"
        )
    return found


def _decoder_matrix(name: str) -> bool:
    return part_of(name) == "llm" and bool(re.search(r"\.(layers|blocks)\.\d+\.", name))


@dataclass(frozen=True)
class StateMemory:
    """Bytes of optimiser state, and of the gradients held at a time.

    Attributes:
        matrices: how many tensors have a state of low rank, out of `tensors`.
        adamw: what AdamW's state of the same parameters takes.
    """

    matrices: int
    tensors: int
    state: int
    adamw: int
    gradients: int

    def text(self, config: TrainConfig) -> str:
        """One line for a run's header."""
        held = f"gradients {size(self.gradients)}"
        if config.optim == "adamw":
            return f"optimiser: adamw, state {size(self.state)}, {held}"
        once = " (one at a time)" if config.fira.per_layer else ""
        return (
            f"optimiser: fira, rank {config.fira.rank} on {self.matrices} of {self.tensors} tensors, state "
            f"{size(self.state)} (AdamW: {size(self.adamw)}), {held}{once}"
        )


def estimate_memory(student: nn.Module, config: TrainConfig) -> StateMemory:
    """Bytes the optimiser of a configuration will hold, from shapes alone.

    A matrix of low rank has m r values of the projector in the parameter's type, 2 n r of the moments and one norm;
    every other tensor two moments of its own size and a counter.
    """
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    chosen = low_rank_names(student, config.fira) if config.optim == "fira" else set()
    adamw = sum(adamw_bytes(p) for _, p in trained)
    state = sum(low_rank_bytes(p, config.fira) if name in chosen else adamw_bytes(p) for name, p in trained)
    sizes = [p.numel() * p.element_size() for _, p in trained]
    one_at_a_time = config.optim == "fira" and config.fira.per_layer
    return StateMemory(len(chosen), len(trained), state, adamw, max(sizes) if one_at_a_time else sum(sizes))


def adamw_bytes(p: Tensor) -> int:
    return 2 * p.numel() * p.element_size() + COUNTER_BYTES


def low_rank_bytes(p: Tensor, fira: FiraOptions) -> int:
    """m r + 2 n r + 1 values."""
    short, long = sorted(p.shape)
    rank = min(fira.rank, short)
    computed = torch.promote_types(p.dtype, torch.float32).itemsize
    moment = 2 if fira.moments == "bfloat16" else computed
    return short * rank * p.element_size() + 2 * long * rank * moment + computed


def header(config: TrainConfig, student: nn.Module) -> list[str]:
    """What a run says of its optimiser before it trains, departures from the paper named."""
    lines = [estimate_memory(student, config).text(config)]
    if config.optim == "fira":
        f = config.fira
        limit = f"limit={f.limit:g}" if f.limit else "limit=off"
        said = [f"residual={f.residual}", f"scaling={f.scaling}", limit, f"scale={f.scale:g}", f"svd={f.svd}"]
        lines.append(
            f"fira: {' '.join(said)} moments={f.moments} refresh={f.refresh}; not as in arXiv 2410.01623: betas {BETAS} as "
            f"everywhere here, matrices not larger than the rank with AdamW{_departures(f)}"
        )
    return lines


def _departures(fira: FiraOptions) -> str:
    found = []
    if fira.residual != "orthogonal":
        found.append("no residual, which is GaLore" if fira.residual == "none" else "the released code's residual")
    if fira.scaling != "column":
        found.append("one scale a matrix")
    if not fira.limit:
        found.append("no limiter")
    if fira.svd != "exact":
        found.append("randomised decomposition")
    return "".join(f", {text}" for text in found)


def state_to_start_from(config: TrainConfig) -> Path | None:
    """The checkpoint whose optimiser state is taken over; None once the run has a whole one of its own to go on from."""
    return None if config.resume and checkpoint.complete(config.out) else config.optim_state


def refuse_without_state(folder: Path) -> None:
    """Raises UserError where a folder holds no optimiser state to take over, before anything is written."""
    _saved(folder, mmap=True)


def _saved(folder: Path, mmap: bool) -> dict[str, Any]:
    """What a checkpoint holds of its optimiser.

    Args:
        mmap: leave the tensors on the disk: only to see that they are there.
    """
    path = folder / FILE
    other = "name a checkpoint folder, such as runs/NAME/checkpoints/checkpoint-500, or drop --optim_state"
    if not path.is_file():
        raise UserError(f"no optimiser state in {folder} ({FILE} is missing); {other}")
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except Exception as error:  # of a file that is no such thing nearly everything is raised
        reason = next(iter(str(error).splitlines()), type(error).__name__).split(". ")[0]
        raise UserError(f"{path} is damaged ({reason}); {other}") from None
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    whole = isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)
    if not whole or not isinstance(saved.get("state"), dict):
        raise UserError(f"{path} holds no state of an optimiser; {other}")
    if not all("param_names" in group for group in saved["param_groups"]):
        raise UserError(f"{path} holds no parameter names (it was written by an older version); drop --optim_state")
    return dict(saved)


def take_over(optimizer: torch.optim.Optimizer, folder: Path) -> tuple[int, int]:
    """Go on with the state a checkpoint's optimiser had, whichever it was.

    State is found by parameter name and taken where it has the form this optimiser keeps (vectors and embeddings have
    AdamW's under either); the rest starts anew.

    Returns:
        (tensors taken over, tensors there are).

    Raises:
        UserError: no optimiser state there, or one without names.
    """
    saved = _saved(folder, mmap=False)
    states: dict[str, dict[str, Any]] = {}
    for group in saved["param_groups"]:
        states |= {
            name: saved["state"].get(number, {})
            for name, number in zip(group["param_names"], group["params"], strict=True)
        }
    taken = total = 0
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            total += 1
            found = states.get(name, {})
            if found and _fits(found, p, int(group.get("rank", 0))):
                optimizer.state[p] = {key: _taken(key, value, p, optimizer) for key, value in found.items()}
                taken += 1
    return taken, total


def _taken(name: str, value: Any, p: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """A state value on the parameter's device, low-rank moments in the type they are kept in now."""
    from distill.fira import AVERAGE, AVERAGE_SQ, Fira

    if not isinstance(value, Tensor):
        return value
    if isinstance(optimizer, Fira) and name in (AVERAGE, AVERAGE_SQ):
        return value.to(p.device, getattr(torch, optimizer.settings.moments))
    return value.to(p.device)


def _fits(state: dict[str, Any], p: Tensor, rank: int) -> bool:
    if rank:
        from distill.fira import AVERAGE

        return AVERAGE in state and state[AVERAGE].shape == (min(rank, *p.shape), max(p.shape))
    return "exp_avg" in state and state["exp_avg"].shape == p.shape


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
