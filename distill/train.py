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
from torch import Tensor

from distill import (
    access,
    checkpoint,
    evaluate,
    groups,
    irs,
    kpod,
    lavit,
    lora,
    models,
    optimizers,
    placement,
    processes,
    replacement,
    report,
    visual,
)
from distill.assemble import save_checkpoint
from distill.config import Align, TrainConfig
from distill.data import (
    Collator,
    write_skipped,
)
from distill.reporter import check_loggers
from distill.run import Run as Run
from distill.run import load_run as load_run
from distill.stored import config_from_json, config_to_json
from distill.trainer import METRICS, Adjust, DistillTrainer
from vlm.console import note
from vlm.errors import UserError
from vlm.files import atomic_dir, read_json, write_atomic
from vlm.load import PROVENANCE

CONFIG = "config.json"
DATA = "data.json"


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
    if config.resume:
        processes.first(lambda: _refuse_other_data(run))
    iva_layer, scores = processes.first(lambda: _iva_layer(run))
    processes.first(lambda: _start_run_directory(run, scores))
    processes.first(lambda: write_skipped(run.data.train, config.out))
    run, adjust = _weighted(run)
    if config.has_latents:
        processes.say(lavit.header(config.lavit))
    align = recomputed(run)
    objective = run.objective(align, iva_layer)
    collate = run.collate()
    watch, processor = _watch(run, collate), models.processor_of(run.student_source)
    trainer = DistillTrainer(
        config, run.student, objective, run.data.train, collate, run.validate, watch, adjust, processor
    )
    trainer.started = started
    found = processes.first(lambda: checkpoint.last(config.out)) if config.resume else None
    if found:
        trainer.seconds_before = processes.first(lambda: checkpoint.seconds_of(found))
    if config.resume:
        processes.say(f"going on from {found.name}" if found else "no complete checkpoint yet: starting at step 0")
    trainer.go(found)
    return _finish(run, trainer, collate)


def _weighted(run: Run) -> tuple[Run, Adjust | None]:
    """With token weights or a schedule asked for, the training examples that carry them, and what a stage takes away."""
    if not kpod.wanted(run.config):
        return run, None
    processes.say(kpod.header(run.config))
    pad = run.student_source.tokenizer.spec.pad_token_id
    found = kpod.prepare(run.config, run.student, run.data.train, pad, placement.student_device())
    data = dataclasses.replace(run.data, train=kpod.Weighted(run.data.train, found))
    return dataclasses.replace(run, data=data), kpod.curriculum(run.config, found)


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
    shown = visual.probe(run.data.train, config.visual_samples, run.plain()) if run.teacher is not None else None
    held_out = (
        None if run.data.validation is None else visual.probe(run.data.validation, config.visual_samples, collate)
    )
    if seen is None:
        return None
    probe = held_out or seen
    teacher = None
    if run.teacher is not None and shown is not None:
        teacher = visual.read(run.teacher, shown, placement.computes_on(run.teacher))
    a_step = config.batch_size * config.accumulate * processes.world()
    watch = visual.VisualWatch(visual.patience(config.warmup_steps, a_step), teacher)

    def inspect(trainer: DistillTrainer, step: int) -> dict[str, Any]:
        reading = trainer.on_student(lambda student: visual.read(student, probe, trainer.args.device))
        warning = watch.warning(step, reading)
        if warning:
            processes.say(warning)
        return watch.log(step, reading)

    return inspect


def _content(run: Run) -> dict[str, Any]:
    """What tells the data of a run from other data, wherever it lies."""
    found = run.data.description
    return {
        name: {key: part[key] for key in ("content_sha256", "sha256", "samples") if key in part}
        for name, part in (("train", found), ("eval", found.get("eval") or {}))
    }


def _refuse_other_data(run: Run) -> None:
    """Samples trained on before could be held out now, and nobody would see it."""
    stored = run.config.out / DATA
    if stored.is_file() and read_json(stored) != _content(run):
        raise UserError(
            f"the data of {run.config.out} has changed since it was begun; put it back to --resume, or begin a new run"
        )


def _start_run_directory(run: Run, scores: irs.LayerScores | None) -> None:
    config = run.config
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {config.out} ({error.strerror}); choose another --out") from None
    write_atomic(config.out / CONFIG, json.dumps(config_to_json(config), indent=1) + "\n")
    write_atomic(config.out / DATA, json.dumps(_content(run), indent=1) + "\n")
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
        return dataclasses.replace(config_from_json(read_json(stored)), out=config.out, resume=True)
    if stored.exists():
        raise UserError(f"{config.out} already holds a run; add --resume to go on or choose another --out")
    return config


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
    test, size = run.data.test, evaluate.batch_size(config.batch_size)
    scored = test and trainer.on_student(
        lambda model: evaluate.accuracy(model, test, config.eval_samples, collate, size)
    )
    if run.student_source.tokenizer.spec.latent_token_ids:
        asked = test or run.data.train
        found = trainer.on_student(lambda model: replacement.measure(model, asked, config.eval_samples, collate, size))
        named = dataclasses.replace(found, data="held-out" if test else "training")
        processes.first(lambda: replacement.report(named, config.out))
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
        "licence": "Apache-2.0" if str(run.data.description["name"]).startswith("digits") else None,
        "tools": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
