"""What a run tells while it trains: progress, metrics.jsonl, loggers; and how it is asked to stop."""

from __future__ import annotations

import importlib.util
import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from distill import checkpoint, processes
from distill.config import TrainConfig
from vlm.console import Progress
from vlm.errors import UserError
from vlm.files import write_atomic

# launchers hand a signal on that the terminal has already sent to everybody
ECHO_S = 3.0
STOPS = (signal.SIGINT, signal.SIGTERM)


class Reporter(TrainerCallback):
    """Progress on stderr, every log line into metrics.jsonl, Ctrl-C or SIGTERM turned into a checkpoint and a stop.

    The first process writes; all of them agree on when to stop.
    """

    def __init__(self, path: Path, steps: int, device: torch.device) -> None:
        self.path, self.steps, self.device = path, steps, device
        self.interrupted = 0.0
        self._progress: Progress | None = None
        self._previous: dict[int, Any] = {}
        self._detail = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if processes.is_first():
            drop_after(self.path, state.global_step)
            self._progress = Progress(self.steps, "train", every_s=10)
            self._progress.advance(state.global_step)
        try:
            self._previous = {number: signal.signal(number, self._on_interrupt) for number in STOPS}
        except ValueError:  # not the main thread: whoever owns it handles signals
            self._previous = {}

    def _on_interrupt(self, _: int, __: FrameType | None) -> None:
        now = time.monotonic()
        if self.interrupted and (processes.world() == 1 or now - self.interrupted > ECHO_S):
            raise KeyboardInterrupt
        self.interrupted = self.interrupted or now

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.advance(1, self._detail)
        if processes.any_of(bool(self.interrupted), self.device):
            self.interrupted = self.interrupted or time.monotonic()
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if not processes.is_first() or "train_runtime" in logs:  # the summary counts this process's steps only
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        except OSError as error:
            if not checkpoint.out_of_space(error, self.path.parent):
                raise
            raise checkpoint.no_space(self.path.parent) from None
        shown = ("loss", "sft", "kd", "iva", "tpa", "concept", "traj", "eval_exact_match")
        if any(name in logs for name in shown):
            self._detail = "  ".join(f"{name} {float(logs[name]):.3f}" for name in shown if name in logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.release()
        if self.interrupted:
            raise KeyboardInterrupt

    def release(self) -> None:
        """Give the signals back to whoever had them before training, however training ended."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}


def drop_after(path: Path, step: int) -> None:
    """Remove metrics of steps that a resumed run will take again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):  # the last line of a killed process may be cut
            continue
    write_atomic(path, "".join(f"{line}\n" for line in kept if step > 0))


def loggers(config: TrainConfig) -> list[TrainerCallback]:
    """The loggers a run asked for, in the process that writes.

    Raises:
        UserError: a package is missing.
    """
    check_loggers(config)
    if not processes.is_first():
        return []
    found: list[TrainerCallback] = []
    for name in config.loggers:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback

            found.append(TensorBoardCallback(SummaryWriter(str(config.out / "tensorboard"), max_queue=1000)))
        elif name == "wandb":
            from transformers.integrations import WandbCallback

            found.append(WandbCallback())
        else:
            from transformers.integrations import TrackioCallback

            found.append(TrackioCallback())
    return found


def check_loggers(config: TrainConfig) -> None:
    """Refuse a logger whose package is missing, before anything is loaded."""
    for name in config.loggers:
        if importlib.util.find_spec(name) is None:
            extra = "distill" if name == "tensorboard" else name
            raise UserError(f"report_to {name}: the package is not installed; pip install 'align-edge[{extra}]'")
