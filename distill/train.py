"""One training run from a TrainConfig to a student directory."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import (
    access,
    cache,
    checkpoint,
    evaluate,
    groups,
    irs,
    lora,
    models,
    optimizers,
    placement,
    presets,
    processes,
    report,
    visual,
)
from distill.assemble import save_checkpoint
from distill.config import Align, TrainConfig
from distill.data import (
    Collator,
    DataOptions,
    DigitsExamples,
    Examples,
    StreamOptions,
    open_split,
    open_streaming_split,
    write_skipped,
)
from distill.objective import Objective
from distill.pair import shared_vocabulary
from distill.reporter import check_loggers
from distill.stored import config_from_json, config_to_json
from distill.teacher import Teacher
from distill.trainer import METRICS, DistillTrainer
from vlm import digits
from vlm.console import note
from vlm.errors import UserError
from vlm.files import atomic_dir, read_json, write_atomic
from vlm.load import PROVENANCE, Checkpoint, open_checkpoint

CONFIG = "config.json"


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with; `exact_match` is on held-out data the student was never tuned on."""

    student: Path
    objective: str
    exact_match: float | None
    n: int
    interval: tuple[float, float] | None
    seconds: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "student": str(self.student)}


@dataclass(frozen=True)
class Data:
    """Training examples, a validation set for choices made during training, and the test set for the final figure."""

    train: Examples
    validation: Examples | None
    test: Examples | None
    description: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything a run has loaded; the teacher is live (`placed`) or read from disk (`cached`)."""

    config: TrainConfig
    student: nn.Module
    student_source: Checkpoint
    placed: placement.Placed | None
    teacher_source: Checkpoint | None
    data: Data
    vocabulary: int
    cached: cache.Cached | None = None

    @property
    def teacher(self) -> nn.Module | None:
        """The live teacher's model."""
        return None if self.placed is None else self.placed.model

    def collate(self) -> Collator:
        return Collator(self.student_source.tokenizer.spec.pad_token_id, keys=self.cached is not None)

    def asked(self, align: Align, iva_layer: int) -> Teacher | None:
        """The teacher as the objective asks it."""
        if self.cached is not None:
            return self.cached.teacher
        return None if self.placed is None else self.placed.teacher(align, iva_layer)

    def validate(self, trainer: DistillTrainer) -> dict[str, float]:
        """Held-out value of every term, their sum, and task accuracy; in every process."""
        held_out = self.data.validation
        if held_out is None:
            return {}
        collate = self.collate()
        count = self.config.eval_samples

        def work(student: nn.Module) -> dict[str, float]:
            terms = evaluate.held_out_terms(student, trainer.objective, held_out, min(count, 200), collate)
            return {**terms, "exact_match": evaluate.accuracy(student, held_out, count, collate).exact_match}

        return trainer.on_student(work)


def train(config: TrainConfig) -> TrainResult:
    """Train as told, save the student as a plain Hugging Face directory, return its held-out accuracy.

    Raises:
        UserError: wrong input; nothing was written.
        KeyboardInterrupt: stopped by Ctrl-C after writing a checkpoint.
    """
    processes.join()
    config = processes.first(lambda: _open_run_directory(config))
    if processes.first(lambda: config.resume and (config.out / "student" / PROVENANCE).is_file()):
        processes.say(f"{config.out} is finished already")
        return _stored_result(config)
    check_loggers(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    started = time.monotonic()
    run = processes.one_after_another(lambda: load_run(config))
    processes.say(groups.table(groups.parameter_groups(config, run.student), run.student))
    processes.say("\n".join(optimizers.header(config, run.student)))
    iva_layer, scores = processes.first(lambda: _iva_layer(run))
    processes.first(lambda: _start_run_directory(config, scores))
    processes.first(lambda: write_skipped(run.data.train, config.out))
    align = recomputed(run)
    objective = Objective(config.terms, config.weights, align, run.asked(align, iva_layer), run.vocabulary)
    collate = run.collate()
    trainer = DistillTrainer(
        config, run.student, objective, run.data.train, collate, run.validate, _watch(run, collate)
    )
    trainer.started = started
    found = processes.first(lambda: checkpoint.last(config.out)) if config.resume else None
    if found:
        trainer.seconds_before = processes.first(lambda: checkpoint.seconds_of(found))
    if config.resume:
        processes.say(f"going on from {found.name}" if found else "no complete checkpoint yet: starting at step 0")
    trainer.go(found)
    return _finish(run, trainer, collate)


def recomputed(run: Run) -> Align:
    """With gradient checkpointing on, the settings that work with it."""
    if not run.config.gradient_checkpointing:
        return run.config.align
    run.student.gradient_checkpointing_enable({"use_reentrant": False})
    if run.config.align.layout != "cached" or "tpa" not in run.config.terms:
        return run.config.align
    processes.say("gradient checkpointing keeps no keys and values: align.layout cached becomes appended")
    return dataclasses.replace(run.config.align, layout="appended")


def _watch(run: Run, collate: Collator) -> Callable[[DistillTrainer, int], dict[str, Any]] | None:
    """What is logged about the student's use of its images; the teacher's use says whether the data are right."""
    config = run.config
    if not config.visual_every:
        return None
    seen = visual.probe(run.data.train, config.visual_samples, collate)
    held_out = (
        None if run.data.validation is None else visual.probe(run.data.validation, config.visual_samples, collate)
    )
    if seen is None:
        return None
    probe = held_out or seen
    teacher = None
    if run.teacher is not None:
        teacher = visual.read(run.teacher, seen, placement.computes_on(run.teacher))
    a_step = config.batch_size * config.accumulate * processes.world()
    watch = visual.VisualWatch(visual.patience(config.warmup_steps, a_step), teacher)

    def inspect(trainer: DistillTrainer, step: int) -> dict[str, Any]:
        reading = trainer.on_student(lambda student: visual.read(student, probe, trainer.args.device))
        warning = watch.warning(step, reading)
        if warning:
            processes.say(warning)
        return watch.log(step, reading)

    return inspect


def _start_run_directory(config: TrainConfig, scores: irs.LayerScores | None) -> None:
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {config.out} ({error.strerror}); choose another --out") from None
    write_atomic(config.out / CONFIG, json.dumps(config_to_json(config), indent=1) + "\n")
    if scores is not None:
        write_atomic(config.out / "irs.json", json.dumps(scores.to_json()) + "\n")
        irs.plot(scores, config.out / "irs.png")


def _stored_result(config: TrainConfig) -> TrainResult:
    stored = read_json(config.out / "student" / PROVENANCE)
    interval = tuple(stored["interval"]) if stored["interval"] else None
    return TrainResult(
        config.out / "student",
        stored["objective"],
        stored["exact_match"],
        stored["n"],
        interval,
        stored["seconds"],
        config.seed,
    )


def _open_run_directory(config: TrainConfig) -> TrainConfig:
    stored = config.out / CONFIG
    if config.resume:
        if not stored.is_file():
            raise UserError(f"{config.out} holds no run to resume; drop --resume or name its folder with --out")
        note(f"resuming {config.out} with the options stored there")
        return dataclasses.replace(config_from_json(json.loads(stored.read_text())), out=config.out, resume=True)
    if stored.exists():
        raise UserError(f"{config.out} already holds a run; add --resume to go on or choose another --out")
    return config


def load_run(config: TrainConfig) -> Run:
    """Open teacher, student and data of a configuration.

    Raises:
        UserError: one of them is missing, damaged, or they do not fit together.
    """
    teacher_source = None
    if config.teacher:
        teacher_source = models.open_model(config.teacher)
    elif config.preset == "digits" and (config.needs_teacher or not (config.student or config.llm)):
        teacher_source = open_checkpoint(presets.digits_teacher())
    from_cache = config.needs_teacher and config.teacher_cache is not None
    if config.needs_teacher and teacher_source is None and not from_cache:
        raise UserError(f"objective {config.objective!r} needs a teacher; pass --teacher DIR or --objective sft")
    student, student_source = models.open_student(config, teacher_source)
    data = _data(config, student_source)
    if len(data.train) < config.batch_size:
        raise UserError(
            f"{len(data.train)} training samples do not fill one batch of {config.batch_size}; lower batch_size"
        )
    vocabulary = int(student_source.config["text_config"]["vocab_size"])
    placed = cached = None
    if from_cache:
        device = placement.student_device()
        cached = cache.open_cached(config, student_source, teacher_source, device, data.train)
        vocabulary = cached.vocabulary
    elif config.needs_teacher and teacher_source is not None:
        vocabulary = shared_vocabulary(teacher_source, student_source)
        if config.align.candidates >= vocabulary:
            raise UserError(f"align.candidates {config.align.candidates}: the vocabulary has only {vocabulary} tokens")
        placed = placement.place(teacher_source, config)
    models.prepare(config, student)
    return Run(config, student, student_source, placed, teacher_source, data, vocabulary, cached)


def _data(config: TrainConfig, student: Checkpoint) -> Data:
    if config.preset == "digits" and config.data is None:
        tokenizer, image = student.tokenizer, student.image
        return Data(
            DigitsExamples("train", config.samples, tokenizer, image, config.seed, config.augment),
            DigitsExamples("validation", config.eval_samples, tokenizer, image),
            DigitsExamples("test", config.eval_samples, tokenizer, image),
            {"name": "digits", "sha256": digits.data_sha256(), "samples": config.samples, "augment": config.augment},
        )
    if config.data is None:
        raise UserError("no data to train on; pass --data F --images D or --preset digits")
    form = None if config.format == "auto" else config.format
    options = DataOptions(config.images, form, config.on_bad_image, config.check_images == "decode")
    context = int(student.config["text_config"].get("max_position_embeddings", 32768))
    read = student.tokenizer, student.image
    if config.streaming:
        asked = config.steps * config.batch_size * config.accumulate * processes.world()
        stream = StreamOptions(asked, config.seed, context)
        split = open_streaming_split(config.data, config.eval_data, options, stream, *read)
    else:
        split = open_split(config.data, config.eval_data, config.holdout, options, *read, context)
    return Data(split.train, split.validation, split.test, split.description)


def _iva_layer(run: Run) -> tuple[int, irs.LayerScores | None]:
    config = run.config
    if run.cached is not None:
        return run.cached.layer, None
    if "iva" not in config.terms or run.teacher is None or run.teacher_source is None:
        return 0, None
    layers = len(access.decoder(run.teacher).layers)
    if config.align.iva_layer >= layers:
        raise UserError(f"align.iva_layer {config.align.iva_layer}: the teacher has layers 0 to {layers - 1}")
    if config.align.iva_layer >= 0:
        return config.align.iva_layer, None
    collate = Collator(run.teacher_source.tokenizer.spec.pad_token_id)
    scores = irs.layer_scores(run.teacher, run.data.train, config.align.irs_pairs, collate)
    shown = " ".join(f"{score:.3f}" for score in scores.scores)
    note(f"IRS by teacher layer over {scores.pairs} pairs: {shown}; layer {scores.best} weights the visual tokens")
    return scores.best, scores


def _finish(run: Run, trainer: DistillTrainer, collate: Collator) -> TrainResult:
    config = run.config
    seconds = trainer.seconds()
    best = processes.first(lambda: checkpoint.best_student(config.out)) if config.final == "best" else None
    if best is not None:
        processes.say(f"the student is the best one, of {best.name.replace('-', ' ')}")
        trainer.load_weights(best)
    if lora.attached(run.student):
        base = str(run.student_source.directory)
        processes.first(lambda: lora.save_adapter(run.student, config.out / "adapter", base))
        lora.merge(run.student)
    dtype = getattr(torch, config.save_dtype)
    with torch.no_grad():
        for parameter in run.student.parameters():
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    test = run.data.test
    scored = test and trainer.on_student(lambda model: evaluate.accuracy(model, test, config.eval_samples, collate))
    result = TrainResult(
        config.out / "student",
        config.objective,
        scored.exact_match if scored else None,
        scored.n if scored else 0,
        scored.interval if scored else None,
        round(seconds, 1),
        config.seed,
    )
    weights = trainer.full_weights()
    processes.first(lambda: _write_student(run, result, weights, dtype))
    return result


def _write_student(run: Run, result: TrainResult, weights: dict[str, Tensor] | None, dtype: torch.dtype) -> None:
    model: Any = run.student
    if weights is not None:  # sharded: put together again
        model = type(run.student)(run.student.config)
        model.load_state_dict(weights)
    out = run.config.out
    with atomic_dir(result.student) as work:
        processor = models.processor_of(run.student_source)
        save_checkpoint(model.to("cpu", dtype), processor, work, _provenance(run, result))
    title = f"{result.objective} on {run.data.description['name']}, seed {result.seed}"
    report.loss_curve(report.read_metrics(out / METRICS), title, out / "loss.png")
    for spent in ("checkpoints", "best") if run.config.final == "best" else ("checkpoints",):
        shutil.rmtree(out / spent, ignore_errors=True)  # the student supersedes them


def _provenance(run: Run, result: TrainResult) -> dict[str, Any]:
    teacher = run.teacher_source
    known = {"name": teacher.directory.name, "sha256": teacher.weights_sha256()} if teacher else None
    return {
        "schema": "vlm-student/1",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "objective": result.objective,
        "teacher": run.cached.provenance() if run.cached else known if run.config.needs_teacher else None,
        "data": run.data.description,
        "recipe": config_to_json(run.config),
        "exact_match": result.exact_match,
        "n": result.n,
        "interval": result.interval,
        "seconds": result.seconds,
        "licence": "Apache-2.0" if run.data.description["name"] == "digits" else None,
        "tools": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
