"""Checkpoints of a run: whole or absent, never half of one.

OUT/checkpoints/checkpoint-N      student as a Hugging Face directory with its processor, optimiser, schedule, random states,
                                  trainer state
OUT/checkpoints/.writing          the one being written; renamed when it is on the disk
OUT/best/step-N, score.json       the student with the best held-out score so far, and that score
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import processes
from vlm.errors import UserError
from vlm.files import atomic_dir, fsync_path, read_json, write_atomic

COMPLETE = "complete"
SCORE = "score.json"
ADAPTER = "trained.safetensors"
EXTRA = "beside.safetensors"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def folder(out: Path) -> Path:
    return out / "checkpoints"


def writing(out: Path) -> Path:
    """Where the next checkpoint is written, outside the folders that resuming looks at."""
    return folder(out) / ".writing"


def publish(out: Path, step: int, seconds: float, keep: int) -> Path:
    """Give the written checkpoint its name, then drop the oldest beyond `keep`."""
    work, target = writing(out) / f"checkpoint-{step}", folder(out) / f"checkpoint-{step}"
    if (target / COMPLETE).is_file():  # the same step saved twice
        shutil.rmtree(writing(out))
        return target
    (work / COMPLETE).write_text(json.dumps({"seconds": seconds, "processes": processes.world()}))
    for path in sorted(work.rglob("*")):
        fsync_path(path)
    fsync_path(work)
    if target.exists():  # half deleted by a killed process
        shutil.rmtree(target)
    os.replace(work, target)
    fsync_path(target.parent)
    for old in complete(out)[:-keep]:
        # without its mark first: a process killed while deleting must not leave half a checkpoint that looks whole
        (old / COMPLETE).unlink()
        shutil.rmtree(old)
    return target


def seconds_of(directory: Path) -> float:
    """Seconds trained until a checkpoint.

    Raises:
        UserError: it belongs to a run of another number of processes, which would see other batches.
    """
    state = read_json(directory / COMPLETE)
    wrote, now = int(state["processes"]), processes.world()
    if wrote != now:
        # adapters alone are no student
        anew = "" if (directory / ADAPTER).is_file() else f", or begin anew from its student: --student {directory}"
        raise UserError(
            f"{directory.name} was written by {wrote} processes and this is a run of {now}, whose steps would be other "
            f"batches; start {wrote}{anew}"
        )
    return float(state["seconds"])


def complete(out: Path) -> list[Path]:
    """Checkpoints written to their end, oldest first."""
    found = [path for path in folder(out).glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=step_of)


def step_of(directory: Path) -> int:
    return int(directory.name.split("-")[1])


def last(out: Path) -> Path | None:
    """The newest complete checkpoint, if any; half-written and half-deleted ones are removed."""
    shutil.rmtree(writing(out), ignore_errors=True)
    found = complete(out)
    for path in folder(out).glob("checkpoint-*"):
        if path not in found:
            shutil.rmtree(path)
    return found[-1] if found else None


# what torch says of a write that found no room
CUT_SHORT = ("failed writing", "unexpected pos", "iostream error")


def out_of_space(error: BaseException, where: Path) -> bool:
    """Whether a failed write means a full disk; torch and safetensors do not say so with an errno."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL
    named = "No space left" in text or "Disk quota" in text
    try:
        return named or (any(words in text for words in CUT_SHORT) and shutil.disk_usage(where).free < 1 << 26)
    except OSError:
        return named


def no_space(out: Path) -> UserError:
    kept = complete(out)
    state = f"{kept[-1].name} is whole" if kept else "no checkpoint was written yet"
    return UserError(f"disk full while writing a checkpoint under {out} ({state}); free space, then --resume")


def is_adapted(student: nn.Module) -> bool:
    """Whether the student carries adapters: its trained weights then have names no plain model knows."""
    return any("lora_" in name for name, _ in student.named_parameters())


def save_student(student: Any, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a student as `save_pretrained` does; with adapters, their trained weights by name instead.

    Args:
        weights: the state dict to write where the module holds only a shard of it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if is_adapted(student):
        from safetensors.torch import save_file

        state = student.state_dict() if weights is None else weights
        trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        save_file({name: state[name].contiguous().cpu() for name in trained}, directory / ADAPTER)
        return
    student.save_pretrained(directory, **({} if weights is None else {"state_dict": dict(weights)}))


def read_student(student: Any, directory: Path) -> dict[str, Tensor]:
    """Weights that `save_student` wrote, under the module's own names."""
    if is_adapted(student):
        from safetensors.torch import load_file

        return load_file(directory / ADAPTER)
    # save_pretrained writes LLaVA weights under other names than the module's own; only from_pretrained maps them back
    saved = type(student).from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return dict(saved.state_dict())


def load_student(student: nn.Module, directory: Path) -> None:
    """Put saved weights into a student that is not sharded."""
    student.load_state_dict(read_student(student, directory), strict=not is_adapted(student))


def save_extra(extra: nn.Module | None, directory: Path) -> None:
    """Write what is trained beside a student; a student's own files do not know of it."""
    if extra is not None:
        from safetensors.torch import save_file

        save_file({name: value.contiguous().cpu() for name, value in extra.state_dict().items()}, directory / EXTRA)


def load_extra(extra: nn.Module | None, directory: Path) -> None:
    """Put what `save_extra` wrote back; a kept best student comes without."""
    if extra is not None and (directory / EXTRA).is_file():
        from safetensors.torch import load_file

        extra.load_state_dict(load_file(directory / EXTRA))


@dataclass(frozen=True)
class Score:
    """A held-out figure at a step; more exact matches or less loss is better, of equals the later."""

    step: int
    metric: str
    value: float

    def beats(self, other: Score | None) -> bool:
        if other is None or other.metric != self.metric:
            return True
        return self.value >= other.value if self.metric == "exact_match" else self.value <= other.value


def best(out: Path) -> Score | None:
    """The best score of the run so far."""
    path = out / "best" / SCORE
    return Score(**read_json(path)) if path.is_file() else None


def best_student(out: Path) -> Path | None:
    """Directory of the best student so far."""
    score = best(out)
    return None if score is None else out / "best" / f"step-{score.step}"


def write_best(out: Path, student: Any, weights: Mapping[str, Tensor] | None, score: Score) -> None:
    """Keep a student as the best; the one before is deleted once this one is whole and named."""
    target = out / "best" / f"step-{score.step}"
    with atomic_dir(target) as work:
        save_student(student, work, weights)
    write_atomic(out / "best" / SCORE, json.dumps(dataclasses.asdict(score)) + "\n")
    for old in target.parent.glob("step-*"):
        if old != target:
            shutil.rmtree(old)
