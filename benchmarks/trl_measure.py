"""What both sides of `benchmarks.trl_step` share: load the pair, take steps, report. Imports nothing of this project."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Job:
    """One process's share of the comparison.

    Attributes:
        pair: folder with `student`, `teacher` (model directories) and `batches.pt`.
        path: which of a side's losses.
        steps: optimiser steps that count, after `warmup` that do not.
    """

    pair: Path
    path: str
    steps: int
    warmup: int
    threads: int

    @staticmethod
    def parse() -> Job:
        parser = argparse.ArgumentParser()
        parser.add_argument("--pair", type=Path, required=True)
        parser.add_argument("--path", default="")
        for name in ("steps", "warmup", "threads"):
            parser.add_argument(f"--{name}", type=int, required=True)
        job = Job(**vars(parser.parse_args()))
        torch.set_num_threads(job.threads or torch.get_num_threads())
        return job

    def models(self) -> tuple[nn.Module, nn.Module]:
        """(student, teacher): the student in training with its tower frozen, the teacher frozen."""
        from transformers import LlavaForConditionalGeneration

        student, teacher = (
            LlavaForConditionalGeneration.from_pretrained(self.pair / name, dtype=torch.float32)
            for name in ("student", "teacher")
        )
        student.train().model.vision_tower.requires_grad_(False)
        teacher.eval().requires_grad_(False)
        return student, teacher

    def batches(self) -> Iterator[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = torch.load(self.pair / "batches.pt")
        for turn in range(self.warmup + self.steps):
            yield dict(found[turn % len(found)])


def run(job: Job, student: nn.Module, loss_and_backward: Loss, versions: dict[str, str]) -> None:
    """Take the steps and print one JSON line: losses, seconds, processor seconds, bytes of resident memory."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses: list[float] = []
    seconds: list[float] = []
    processor: list[float] = []
    before = _status("VmRSS")
    for turn, batch in enumerate(job.batches()):
        if turn == job.warmup:
            Path("/proc/self/clear_refs").write_text("5")
        started, clock = time.perf_counter(), time.process_time()
        loss = loss_and_backward(batch)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if turn >= job.warmup:
            seconds.append(time.perf_counter() - started)
            processor.append(time.process_time() - clock)
    report: dict[str, Any] = {"losses": losses, "seconds": seconds, "processor_seconds": processor}
    report |= {"peak": _status("VmHWM"), "before": before, "versions": versions | {"torch": torch.__version__}}
    print(json.dumps(report))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
