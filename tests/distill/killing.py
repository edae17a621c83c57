"""Runs that are killed (SIGKILL) at chosen function calls, then resumed; `python -m tests.distill.killing --help`.

A moment is a count of function calls, Python's and C's, so that it can lie anywhere: between two operations of a step,
half-way through a file, between two renames. Nothing waits for a clock: the same seed kills at the same calls.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from distill.checkpoint import complete
from distill.config import Align, TrainConfig
from distill.report import read_metrics
from distill.train import train
from distill.trainer import DistillTrainer
from tests.tiny import make_student

SIZES = {"hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "intermediate": 48, "spread": 3.0}
SAVING = ("_save_checkpoint", "write_best", "save_checkpoint")
# drawing the curves makes more calls than everything else together; moments are meant to lie in the run
DRAWING = ("loss_curve", "write_report", "plot")
NUMBERS = ("step", "loss", "sft", "kd", "iva", "tpa", "concept", "traj", "grad_norm", "learning_rate", "visual_gain")
HELD_OUT = ("eval_sft", "eval_kd", "eval_iva", "eval_tpa", "eval_loss", "eval_exact_match")


@dataclass
class Counter:
    """Counts calls since it was set as the profiler, and those made while something is being saved.

    Attributes:
        kill_at: die at this call; 0 never.
        saving_only: count only calls inside saving for that.
    """

    kill_at: int = 0
    saving_only: bool = False
    calls: int = 0
    saving: int = 0
    depth: int = 0
    drawing: int = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.depth += frame.f_code.co_name in SAVING
            self.drawing += frame.f_code.co_name in DRAWING
        elif event == "return":
            self.depth -= frame.f_code.co_name in SAVING
            self.drawing -= frame.f_code.co_name in DRAWING
            return
        if self.drawing or event not in ("call", "c_call"):
            return
        self.calls += 1
        self.saving += self.depth > 0
        if self.kill_at and (self.saving if self.saving_only else self.calls) >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], None]) -> int:
    """Run work in a forked process; its wait status. Forking spares importing torch every time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def profiled(config: TrainConfig, counter: Counter) -> None:
    sys.setprofile(counter)
    try:
        train(config)
    finally:
        sys.setprofile(None)


def recipe(folder: Path) -> TrainConfig:
    """A run of two epochs and a bit in which everything happens: saving, evaluation, a best student, visual checks."""
    make_student(folder / "teacher", seed=1, layers=2, **SIZES)
    make_student(folder / "student", seed=2, layers=1, **SIZES)
    return TrainConfig(
        preset="digits",
        teacher=str(folder / "teacher"),
        student=str(folder / "student"),
        steps=12,
        batch_size=2,
        accumulate=2,
        lr=3e-3,
        samples=20,
        eval_samples=8,
        eval_every=3,
        save_every=2,
        log_every=1,
        keep_checkpoints=2,
        keep_best="loss",
        final="best",
        visual_every=4,
        visual_samples=4,
        report_to="none",
        threads=1,
        align=Align(iva_layer=0),
    )


def stop_after(config: TrainConfig, step: int) -> None:
    """Train until so many optimiser steps are taken, then break off as a crash would."""
    begin = DistillTrainer.training_step

    def crash(self: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Crash
        return begin(self, *args, **kwargs)

    with mock.patch.object(DistillTrainer, "training_step", crash), contextlib.suppress(Crash):
        train(config)


class Crash(Exception):
    """What `stop_after` breaks off with."""


def differences(reference: Path, other: Path) -> list[str]:
    """Weights and logged values of two runs that are not equal to the last bit."""
    ours, theirs = (load_file(run / "student" / "model.safetensors") for run in (reference, other))
    found = [name for name, value in ours.items() if not torch.equal(theirs[name], value)]
    found += sorted(ours.keys() ^ theirs.keys())
    lines = [read_metrics(run / "metrics.jsonl") for run in (reference, other)]
    if len(lines[0]) != len(lines[1]):
        found.append(f"{len(lines[0])} against {len(lines[1])} log lines")
    for one, two in zip(*lines, strict=False):
        found += [f"step {one['step']}: {name}" for name in (*NUMBERS, *HELD_OUT) if one.get(name) != two.get(name)]
    return found


def kill_and_compare(folder: Path, kills: int, seed: int, tell: Callable[[str], None]) -> list[str]:
    """Kill runs `kills` times in all, every second time inside saving, resume to the end, compare with one never killed.

    Returns:
        what differed; empty when every run ended with the same bits.
    """
    config = recipe(folder)
    chance = random.Random(seed)
    reference = dataclasses.replace(config, out=folder / "reference")
    counter = Counter()
    profiled(reference, counter)
    tell(f"one run makes {counter.calls} calls, {counter.saving} of them while saving")
    found: list[str] = []
    killed, number = 0, 0
    while killed < kills:
        out = folder / f"run-{number}"
        number += 1
        here = 0
        while True:
            saving = killed % 2 == 1
            at = chance.randint(1, (counter.saving if saving else counter.calls) * 2 // 3) if killed < kills else 0
            resume = (out / "config.json").exists()
            run = dataclasses.replace(config, out=out, resume=resume)
            trap = Counter(at, saving)
            status = in_child(lambda run=run, trap=trap: profiled(run, trap))  # type: ignore[misc]
            if not os.WIFSIGNALED(status):
                assert os.waitstatus_to_exitcode(status) == 0, "a resumed run failed"
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            killed, here = killed + 1, here + 1
            whole = [path.name for path in complete(out)]
            tell(
                f"kill {killed}: at {'saving ' if saving else ''}call {at}, complete now: {', '.join(whole) or 'none'}"
            )
        wrong = differences(reference.out, out)
        tell(f"run {number} finished after {here} kills: {len(wrong)} differences")
        found += [f"run {number}: {name}" for name in wrong]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_compare(Path(folder), options.kills, options.seed, lambda text: print(text, flush=True))
    print(
        f"{options.kills} kills, seed {options.seed}: " + ("; ".join(found) or "weights and metrics equal bit for bit")
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
