"""The Hugging Face Trainer with the Align-TI objective: loggers, schedules and launchers come with it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from distill import checkpoint, processes
from distill.config import TrainConfig
from distill.data import Collator, Examples, to_batch, train_sampler
from distill.distiller import Distiller, is_sharded
from distill.objective import Normaliser, Objective, bounded
from distill.optimizers import build_optimizer, state_to_start_from, take_over
from distill.reporter import Reporter, loggers
from vlm.errors import GateFailed

T = TypeVar("T")
Adjust = Callable[[dict[str, Tensor], int], dict[str, Tensor]]
METRICS = "metrics.jsonl"


class DistillTrainer(Trainer):
    """Trains a student on an Objective.

    The normaliser of every term is counted over all micro-batches and processes of a step, and candidates are drawn by
    a sample's place in the step, so loss, gradient and logged values are those of the full batch however it is cut.

    Args:
        evaluate_now: held-out scores of the student, called in every process with the trainer.
        inspect: called after every step in every process; what it returns is logged.
        adjust: (tensors of a micro-batch, optimiser step from 0) -> the tensors to train on at that step.
        processor: written beside every checkpoint's weights, so that a checkpoint is a student to open.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: nn.Module,
        objective: Objective,
        examples: Examples,
        collate: Collator,
        evaluate_now: Callable[[DistillTrainer], dict[str, float]],
        inspect: Callable[[DistillTrainer, int], dict[str, Any]] | None = None,
        adjust: Adjust | None = None,
        processor: Any = None,
    ) -> None:
        self.config, self.objective = config, objective
        self.student = student
        self._own: torch.optim.Optimizer | None = None
        super().__init__(
            model=Distiller(student, self.extra),
            args=_arguments(config),
            train_dataset=examples,
            eval_dataset=examples,  # only to satisfy the base class: `evaluate` below brings its own held-out data
            data_collator=collate,
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._reporter = Reporter(config.out / METRICS, config.steps, self.args.device)
        self.add_callback(self._reporter)
        for callback in loggers(config):
            self.add_callback(callback)
        self.evaluate_now, self.inspect, self.adjust = evaluate_now, inspect, adjust
        self.processor = processor
        self.loss_is_scaled_for_ga = True
        self._window = _Window()
        self._micro_batch, self._inspected = 0, 0
        self.started, self.seconds_before = time.monotonic(), 0.0
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._failures: list[BaseException] = []

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.config.fsdp and not self.is_fsdp_enabled:
            _shard_on_cpu(self)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self._own is None:
            self.optimizer = self._own = build_optimizer(self.config, self.student, self.objective.extra_parameters())
            if (start := state_to_start_from(self.config)) is not None:
                taken, total = take_over(self._own, start)
                processes.say(f"optimiser state of {taken} of {total} tensors taken over from {start}")
        return self._own

    def go(self, found: Path | None) -> None:
        """Train from a checkpoint, or from the start, to the last step."""
        if found is not None and checkpoint.step_of(found) >= self.config.steps:
            # the base class would take one more step
            self.load_weights(found)
            self.student.to(self.args.device)
            return
        try:
            self.train(resume_from_checkpoint=None if found is None else str(found))
        finally:
            self._reporter.release()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._inspected = self.state.global_step
        if processes.world() > 1:
            how = (
                "the student sharded over them (FSDP2)" if is_sharded(self.model) else "each with a copy of the student"
            )
            processes.say(f"{processes.world()} processes, {how}")
        return prepared

    def on_student(self, work: Callable[[nn.Module], T], train: bool = False) -> T:
        """Run work that reads the student's weights; with a sharded student, in every process alike."""
        model = self.model_wrapped if train else self.model
        # autocast and sharding act inside this module's forward
        with self.accelerator.autocast():
            result: T = model(work)
        return result

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        self._micro_batch = 0
        micro_batches: list[dict[str, Tensor]] = []
        for _ in range(num_batches):
            micro_batch = next(epoch_iterator, None)
            if micro_batch is None:
                break
            micro_batches.append(self.adjust(micro_batch, self.state.global_step) if self.adjust else micro_batch)
        batches, how = [to_batch(tensors) for tensors in micro_batches], self.config.tokens.normalise
        counts = [
            [
                float(batch.response_tokens(how)),
                float(batch.image_samples()),
                float(batch.response_tokens(how, taught=True)),
                float(batch.attention_mask_BT.sum()),
            ]
            for batch in batches
        ] or [[0.0] * 4]
        counted = processes.total(torch.tensor(counts, device=device, dtype=torch.float64).sum(dim=0))
        self._window.start_step(float(counted[3]))
        # a step may weigh less than one token in all, but not nothing
        return micro_batches, torch.where(counted[:3] > 0, counted[:3], 1.0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        batch = to_batch(inputs)
        normaliser = Normaliser.of(batch) if num_items_in_batch is None else Normaliser(*num_items_in_batch)
        seeds = self._seeds(len(batch.input_ids_BT))

        def work(student: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
            return self.objective(student, batch, normaliser, seeds, self.state.global_step)

        loss, values = self.on_student(work, train=True)
        # all processes must give up together, or the others wait for this one for ever
        if processes.any_of(not math.isfinite(float(loss.detach())), loss.device):
            seen = "not finite" if math.isfinite(float(loss.detach())) else f"{float(loss.detach())}"
            processes.refuse(GateFailed(f"the loss is {seen} at step {self.state.global_step + 1}; lower --lr"))
        self._window.add(values)
        # gradients and logged losses are averaged over processes, while each holds its part of the sum
        loss = loss * processes.world()
        return (loss, values) if return_outputs else loss

    def _seeds(self, size: int) -> list[int]:
        """A seed a sample from its place in the step: the same whichever process and micro-batch it is dealt to."""
        first = (self._micro_batch * processes.world() + processes.rank()) * self.config.batch_size
        self._micro_batch += 1
        step = (self.config.seed << 36) + (self.state.global_step << 16)
        return [(step + first + row) % (1 << 62) for row in range(size)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._window.close()}
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        step = self.state.global_step
        if self.inspect is not None and step % self.config.visual_every == 0 and step != self._inspected:
            self._inspected = step
            due = self.control.should_log
            self.log(self.inspect(self, step))
            self.control.should_log = due  # logging clears it, and the losses are still to be logged
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        step = self.config.batch_size * self.config.accumulate * processes.world()
        sampler = train_sampler(self.train_dataset, step, self.config.seed, self.config.group_by_length)
        return sampler or super()._get_train_sampler(train_dataset)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        step, metrics = self._evaluated
        if step != self.state.global_step:  # the base class asks twice when the last step is an evaluation step
            metrics = {f"eval_{name}": value for name, value in self.evaluate_now(self).items()}
            self._evaluated = self.state.global_step, metrics
            self.log(metrics)
            self._keep_best(metrics)
        return metrics

    def _keep_best(self, metrics: dict[str, float]) -> None:
        wanted = self.config.keep_best
        metric = "loss" if "eval_exact_match" not in metrics else wanted
        if wanted == "none" or f"eval_{metric}" not in metrics:
            return
        score = checkpoint.Score(self.state.global_step, metric, metrics[f"eval_{metric}"])
        if not processes.share(score.beats(checkpoint.best(self.config.out))):
            return
        weights = self.full_weights()
        processes.first(lambda: checkpoint.write_best(self.config.out, self.student, weights, score))

    def full_weights(self) -> dict[str, Tensor] | None:
        """Whole weights of a sharded student in the first process (empty in the others); None when not sharded."""
        if not self.is_fsdp_enabled:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        return {name.removeprefix("student."): value for name, value in state.items()}

    def load_weights(self, directory: Path) -> None:
        """Put the weights of `checkpoint.save_student` into the student, sharded or not; in every process."""
        if not self.is_fsdp_enabled or self.model_wrapped is not self.model:
            checkpoint.load_student(self.student, directory)
            checkpoint.load_extra(self.extra, directory)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        state = {f"student.{name}": value for name, value in checkpoint.read_student(self.student, directory).items()}
        strict = not checkpoint.is_adapted(self.student)
        set_model_state_dict(self.model, state, options=StateDictOptions(full_state_dict=True, strict=strict))

    @property
    def extra(self) -> nn.Module | None:
        """What is trained beside the student."""
        return None if self.objective.lavit is None else self.objective.lavit.head

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = self.full_weights()
        if self.args.should_save:
            self._write(lambda: checkpoint.save_student(self.student, Path(str(output_dir)), weights))
            self._write(lambda: checkpoint.save_extra(self.extra, Path(str(output_dir))))
            if self.processor is not None:
                self._write(lambda: self.processor.save_pretrained(Path(str(output_dir))))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            self._write(lambda: super(DistillTrainer, self)._save_optimizer_and_scheduler(output_dir))
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        if self.args.should_save:
            self._write(lambda: torch.save(state, Path(output_dir) / "optimizer.pt"))
            self._write(lambda: torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        folder = Path(checkpoint)
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        # not strict: parameters that never had a gradient (the tower beyond its feature layer) have no state
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=options)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def _write(self, work: Callable[[], Any]) -> None:
        """Keep a failed write for later: raising at once would leave the other processes waiting in a collective."""
        try:
            work()
        except Exception as error:
            self._failures.append(error)

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoint.writing(self.config.out))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        out, step, device = self.config.out, self.state.global_step, self.args.device
        work = checkpoint.writing(out) / f"checkpoint-{step}"
        if processes.is_first():
            self._write(lambda: work.mkdir(parents=True, exist_ok=True))
        processes.wait()
        self._write(lambda: super(DistillTrainer, self)._save_checkpoint(model, trial))
        # the name is given once every process has written its part
        if not processes.any_of(bool(self._failures), device) and processes.is_first():
            self._write(lambda: checkpoint.publish(out, step, self.seconds(), self.config.keep_checkpoints))
        if processes.any_of(bool(self._failures), device):
            self._give_up_saving(out)

    def _give_up_saving(self, out: Path) -> None:
        failures, self._failures = self._failures, []
        if processes.is_first():
            shutil.rmtree(checkpoint.writing(out), ignore_errors=True)
        if failures and not checkpoint.out_of_space(failures[0], out):
            raise failures[0]
        processes.refuse(checkpoint.no_space(out))

    def seconds(self) -> float:
        """Seconds trained so far, those before an interruption included."""
        return self.seconds_before + time.monotonic() - self.started


class _Window:
    """Sums over the steps since the last log line."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.steps, self.tokens, self.started = 0, 0.0, 0.0

    def start_step(self, tokens: float) -> None:
        if self.steps == 0:
            self.started = time.monotonic()
        self.steps += 1
        self.tokens += tokens

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.double()
            self.values[name] = self.values[name] + value if name in self.values else value

    def close(self) -> dict[str, float]:
        """Means a step over all processes, seconds a step, tokens a second; the next window starts."""
        if self.steps == 0:
            return {}
        logs: dict[str, float] = {}
        if self.values:
            names = sorted(self.values)
            sums = processes.total(torch.stack([self.values[name] for name in names])) / self.steps
            # of the steps' bounds the mean is at most this, however much their errors go together
            logs = bounded(dict(zip(names, sums.tolist(), strict=True)))
            logs = {name: round(value, 8) for name, value in logs.items()}
        seconds = time.monotonic() - self.started
        logs |= {"step_seconds": round(seconds / self.steps, 4), "tokens_per_second": round(self.tokens / seconds, 1)}
        self.__init__()  # type: ignore[misc]
        return logs


def _arguments(config: TrainConfig) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoint.folder(config.out)),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_steps=config.save_every,
        save_total_limit=None,  # checkpoint.publish deletes old ones, after the new one is whole
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        fsdp=True if config.fsdp and processes.world() > 1 else None,
        ddp_timeout=int(processes.PATIENCE.total_seconds()),
        report_to=[],
        run_name=config.out.name,
        project="align-edge",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        label_names=["response"],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would split the objective's single-device batch
    return arguments


def _shard_on_cpu(trainer: DistillTrainer) -> None:
    """Have accelerate take on a CPU the path it takes on GPUs: it looks at the FSDP settings there only."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state = trainer.accelerator.state
    if trainer.args.bf16:
        plugin.set_mixed_precision("bf16")
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
