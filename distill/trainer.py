"""The Hugging Face Trainer with the Align-TI objective: checkpoints, resume and loggers come with it."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from distill.config import TrainConfig
from distill.data import Collator, Examples, to_batch
from distill.groups import build_optimizer
from distill.objective import Normaliser, Objective
from vlm.console import Progress
from vlm.errors import GateFailed, UserError

COMPLETE = "complete"
METRICS = "metrics.jsonl"


class DistillTrainer(Trainer):
    """Trains a student on an Objective.

    The normaliser of every term is counted over all micro-batches of a step, so the loss and its gradient are those
    of the full batch however it is cut.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: nn.Module,
        objective: Objective,
        examples: Examples,
        collate: Collator,
        evaluate_now: Callable[[nn.Module], dict[str, float]],
    ) -> None:
        args = _arguments(config)
        if args.world_size > 1:
            raise UserError(
                f"{args.world_size} processes: distributed training is not supported yet; start one process"
            )
        super().__init__(
            model=student,
            args=args,
            train_dataset=examples,
            eval_dataset=examples,  # only to satisfy the base class: `evaluate` below brings its own held-out data
            data_collator=collate,
            optimizers=(build_optimizer(config, student), None),
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._reporter = Reporter(config.out, config.steps)
        self.add_callback(self._reporter)
        self.add_callback(TensorBoardCallback(SummaryWriter(str(config.out / "tensorboard"), max_queue=1000)))
        self.objective, self.evaluate_now = objective, evaluate_now
        self.loss_is_scaled_for_ga = True
        self._term_sums: dict[str, float] = {}
        self._term_steps = 0
        self.started, self.seconds_before = time.monotonic(), 0.0
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._reporter.release()

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        self._term_steps += 1
        micro_batches: list[dict[str, Tensor]] = []
        for _ in range(num_batches):
            micro_batch = next(epoch_iterator, None)
            if micro_batch is None:
                break
            micro_batches.append(micro_batch)
        batches = [to_batch(tensors) for tensors in micro_batches]
        counts = [[int(batch.response_tokens()), int(batch.image_samples())] for batch in batches] or [[0, 0]]
        return micro_batches, torch.tensor(counts, device=device).sum(dim=0).clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        batch = to_batch(inputs)
        normaliser = (
            Normaliser.of(batch)
            if num_items_in_batch is None
            else Normaliser(num_items_in_batch[0], num_items_in_batch[1])
        )
        # the framework casts inside the model's own forward, which the objective does not go through
        with self.accelerator.autocast():
            loss, values = self.objective(self.accelerator.unwrap_model(model), batch, normaliser)
        if not math.isfinite(float(loss.detach())):
            raise GateFailed(f"the loss is {float(loss.detach())} at step {self.state.global_step + 1}; lower --lr")
        for name, value in values.items():
            self._term_sums[name] = self._term_sums.get(name, 0.0) + float(value)
        return (loss, values) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_steps:
            logs = {**logs, **{name: round(value / self._term_steps, 6) for name, value in self._term_sums.items()}}
            self._term_sums, self._term_steps = {}, 0
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        step, metrics = self._evaluated
        if step != self.state.global_step:  # the base class asks twice when the last step is an evaluation step
            metrics = {f"eval_{name}": value for name, value in self.evaluate_now(self.model).items()}
            self._evaluated = self.state.global_step, metrics
            self.log(metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # save_pretrained writes LLaVA weights under other names than the module's own; the base class loads the file
        # by name, finds nothing and goes on from the initial weights with a mere warning
        target = self.model if model is None else model
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=torch.float32, local_files_only=True)
        target.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        # a process killed while saving leaves a folder without this mark; resuming passes over it
        (folder / COMPLETE).write_text(str(self.seconds()))

    def seconds(self) -> float:
        """Seconds trained so far, those before an interruption included."""
        return self.seconds_before + time.monotonic() - self.started


def _arguments(config: TrainConfig) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(config.out / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(config.warmup * config.steps)),
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_steps=config.save_every,
        save_total_limit=3,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        label_names=["response"],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would split the objective's single-device batch
    return arguments


class Reporter(TrainerCallback):
    """Progress on stderr, every log line into metrics.jsonl, Ctrl-C turned into a checkpoint and a stop."""

    def __init__(self, out: Path, steps: int) -> None:
        self.path, self.steps = out / METRICS, steps
        self.interrupted = False
        self._progress: Progress | None = None
        self._previous: Any = None
        self._detail = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        drop_after(self.path, state.global_step)
        self._progress = Progress(self.steps, "train", every_s=10)
        self._progress.advance(state.global_step)
        try:
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        except ValueError:  # not the main thread: whoever owns it handles Ctrl-C
            self._previous = None

    def _on_interrupt(self, _: int, __: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self._progress is not None
        self._progress.advance(1, self._detail)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        shown = ("loss", "sft", "kd", "iva", "tpa", "eval_exact_match")
        if any(name in logs for name in shown):
            self._detail = "  ".join(f"{name} {float(logs[name]):.3f}" for name in shown if name in logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.release()
        if self.interrupted:
            raise KeyboardInterrupt

    def release(self) -> None:
        """Give Ctrl-C back to whoever had it before training, however training ended."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


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
    path.write_text("".join(f"{line}\n" for line in kept if step > 0))


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end, if any; half-written ones are removed."""
    folders = sorted((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for folder in [f for f in folders if not (f / COMPLETE).exists()]:
        shutil.rmtree(folder)
        folders.remove(folder)
    return folders[-1] if folders else None
