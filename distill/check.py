"""`python -m distill check`: every stage once in small, before money is spent. Writes nothing."""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distill import check_blind, check_parts, check_steps, irs, placement
from distill.batch import Batch
from distill.check_parts import DataFigures, Finding, TokenRow
from distill.check_steps import Disk, Gradients, Memory, Point
from distill.cli import AS_JSON, Extra, parse
from distill.config import TrainConfig
from distill.data import Example, Examples, at_hand, to_batch
from distill.objective import Objective
from distill.stages import standing_in
from vlm.console import note, print_json
from vlm.errors import GateFailed, UserError

if TYPE_CHECKING:
    from distill.train import Run

EXTRAS = (
    AS_JSON,
    Extra("blind_samples", int, 32, "samples of the blind-image test; 0 leaves it out"),
)
# samples read to describe the data; lengths of all are known where the data set has counted them
DRAWN = 256
IRS_PAIRS = 24
STANDS_IN = "will start from the student of the stage before; checked with the student the first stage starts from"


@dataclass(frozen=True)
class Times:
    """Seconds of the optimiser steps alone, without evaluation and saving."""

    step: float
    step_longest: float
    total: float
    total_longest: float


@dataclass(frozen=True)
class StageReport:
    """Everything that was found out about one stage."""

    name: str
    config: TrainConfig
    notes: tuple[str, ...]
    data: DataFigures
    tokens: tuple[TokenRow, ...]
    vocabulary: dict[str, Any]
    terms: dict[str, float]
    points: tuple[Point, ...]
    memory_method: str
    memory_available: int
    memory_needed: float
    stopped: str
    times: Times
    disk: Disk
    gains: tuple[check_blind.Gain, ...]
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        return all(finding.status != "fail" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "objective": self.config.objective,
            "holds": self.holds,
            "findings": [finding.to_json() for finding in self.findings],
            "data": self.data.to_json(),
            "tokens": [dataclasses.asdict(row) for row in self.tokens],
            "vocabulary": self.vocabulary,
            "first_step": self.terms,
            "memory": {
                "method": self.memory_method,
                "measured": [dataclasses.asdict(point) for point in self.points],
                "batch_size": self.config.batch_size,
                "needed_bytes": self.memory_needed,
                "available_bytes": self.memory_available,
                "stopped": self.stopped,
            },
            "seconds": dataclasses.asdict(self.times),
            "disk_bytes": self.disk.to_json(),
            "blind_test": [gain.to_json() for gain in self.gains],
            "notes": list(self.notes),
        }


def _finite(value: Any) -> Any:
    """The value with None for what JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        from distill.cli_help import page

        print(page("check", EXTRAS), end="")
        return 0
    request = parse(list(argv), "check", EXTRAS)
    if request.stages[0].config.resume:
        raise UserError("check looks at a run before it starts; drop --resume")
    if request.extra["blind_samples"] < 0:
        raise UserError(f"--blind_samples must be 0 or more, got {request.extra['blind_samples']}")
    from distill.__main__ import quiet
    from distill.check_print import printed

    quiet()
    reports = []
    for number, stage in enumerate(request.stages, 1):
        config = stage.config
        notes: tuple[str, ...] = ()
        if number > 1:
            config, notes = standing_in(config, request.stages[0].config), (STANDS_IN,)
        if request.staged:
            note(f"checking stage {number} of {len(request.stages)}, {stage.name}")
        report = check_stage(stage.name, config, int(request.extra["blind_samples"]), notes)
        print(printed(report, number if request.staged else 0), flush=True)
        reports.append(report)
        gc.collect()
    holds = all(report.holds for report in reports)
    if request.extra["json"]:
        print_json(_finite({"holds": holds, "stages": [report.to_json() for report in reports]}))
    if not holds:
        failed = [
            f"{r.name + ': ' if r.name else ''}{f.name}" for r in reports for f in r.findings if f.status == "fail"
        ]
        raise GateFailed(f"{len(failed)} of the checks failed: {'; '.join(failed)}")
    return 0


def check_stage(name: str, config: TrainConfig, blind_samples: int, notes: tuple[str, ...] = ()) -> StageReport:
    """Load a stage's models and data, and look at everything once.

    Raises:
        UserError: what training itself would refuse.
    """
    from distill.train import load_run

    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    memory = Memory()
    with tempfile.TemporaryDirectory() as work:  # a student made of parts is written down before it is loaded
        run = load_run(dataclasses.replace(config, out=Path(work)))
    device = placement.student_device()
    run.student.to(device)
    collate = run.collate()

    def batch_of(examples: Sequence[Example], where: torch.device = device) -> Batch:
        return to_batch({key: value.to(where) for key, value in collate(examples).items()})

    drawn, longest, lengths = _draw(run.data.train, config.seed)
    has_images = any(example.pixels for example in drawn)
    objective, layer_note = _objective(run)
    tokenizer = run.student_source.tokenizer
    typical = next((example for example in drawn if example.pixels), drawn[0])
    found = check_parts.alignment_findings(typical, tokenizer, "iva" in config.terms)
    gains: list[check_blind.Gain] = []
    if blind_samples:
        with_images = [example for example in drawn if example.pixels][:blind_samples]
        gains = check_blind.gains(objective, run.student, run.teacher, with_images, batch_of)
    gradients = Gradients()
    if config.fira.per_layer:
        gradients.watch(run.student)
    step = check_steps.stepper(config, run.student, objective, _optimizer(config, run, objective), gradients)
    with_images_first = sorted(longest, key=lambda example: not example.pixels)
    steps = _Steps(config, step, batch_of, with_images_first, drawn, memory)
    points, stopped, terms, times = steps.run()
    needed = check_steps.line(points, "peak_bytes")(config.batch_size) if points else math.inf
    space = check_steps.disk(config, run.student, config.keep_checkpoints)
    if points:
        found += check_steps.gradient_findings(run.student, gradients, has_images)
    found += _resource_findings(needed, memory.available, stopped if not points else "", space)
    if blind_samples:
        found += check_blind.findings(gains, has_images)
    return StageReport(
        name,
        config,
        notes + layer_note,
        check_parts.data_figures(run.data.train, drawn, lengths),
        # padded to the longest sample, as in training
        tuple(check_parts.token_rows(batch_of([typical, longest[0]]), 0, tokenizer)),
        check_parts.vocabulary(
            run.teacher_source if config.needs_teacher else None, run.student_source, run.vocabulary
        ),
        terms,
        tuple(points),
        memory.method,
        memory.available,
        needed,
        stopped,
        times,
        space,
        tuple(gains),
        tuple(found),
    )


def _draw(examples: Examples, seed: int) -> tuple[list[Example], list[Example], Sequence[int]]:
    """Random samples, the longest ones, and the lengths that are known."""
    rng = np.random.default_rng(seed)
    drawn = [examples[int(i)] for i in rng.permutation(at_hand(examples))[:DRAWN]]
    counted = getattr(examples, "lengths", None)
    if counted is None:
        ordered = sorted(drawn, key=lambda example: -len(example.ids))
        return drawn, ordered, [len(example.ids) for example in drawn]
    return drawn, [examples[int(i)] for i in np.argsort(-counted, kind="stable")[:DRAWN]], counted.tolist()


def _objective(run: Run) -> tuple[Objective, tuple[str, ...]]:
    from distill import train

    config, layer = run.config, max(run.config.align.iva_layer, 0)
    notes: tuple[str, ...] = ()
    if run.teacher is not None and "iva" in config.terms and config.align.iva_layer < 0:
        pairs = min(IRS_PAIRS, config.align.irs_pairs)
        layer = irs.layer_scores(run.teacher, run.data.train, pairs, run.plain()).best
        notes = (f"IVA layer {layer}, chosen here over {pairs} pairs (training: {config.align.irs_pairs})",)
    if run.cached is not None:
        notes = ("the teacher is read from its cache, so its own use of the images is not tested",)
    align = train.recomputed(run)
    return run.objective(align, layer), notes


def _optimizer(config: TrainConfig, run: Run, objective: Objective) -> torch.optim.Optimizer:
    from distill.optimizers import build_optimizer

    return build_optimizer(config, run.student, objective.extra_parameters())


@dataclass
class _Steps:
    """Runs the measured steps of one stage."""

    config: TrainConfig
    step: Callable[[Batch], dict[str, float]]
    batch_of: Callable[[Sequence[Example]], Batch]
    longest: Sequence[Example]
    drawn: Sequence[Example]
    memory: Memory

    def run(self) -> tuple[list[Point], str, dict[str, float], Times]:
        first: list[dict[str, float]] = []

        def step(batch: Batch) -> dict[str, float]:
            first.append(self.step(batch))
            return first[-1]

        config = self.config
        points, stopped = check_steps.measure(
            step, lambda size: self.batch_of(_cycle(self.longest, size)), config.batch_size, self.memory
        )
        if not points:
            return [], stopped, {}, Times(math.inf, math.inf, math.inf, math.inf)
        slow = check_steps.line(points, "seconds")(config.batch_size)
        # the same size with samples as they come
        largest = points[-1]
        random = self._seconds(self.batch_of(_cycle(self.drawn, largest.size)))
        usual = min(slow, slow * random / largest.seconds)
        steps = config.steps * config.accumulate
        return points, stopped, first[0], Times(usual, slow, usual * steps, slow * steps)

    def _seconds(self, batch: Batch) -> float:
        import time

        times = []
        for _ in range(2):
            started = time.perf_counter()
            self.step(batch)
            times.append(time.perf_counter() - started)
        return max(times)


def _cycle(examples: Sequence[Example], size: int) -> list[Example]:
    return [examples[i % len(examples)] for i in range(size)]


def _resource_findings(needed: float, available: int, stopped: str, space: Disk) -> list[Finding]:
    from distill.check_print import size

    if stopped:
        found = [Finding("memory", "fail", f"{stopped}; lower batch_size and raise accumulate")]
    elif available and needed > available:
        text = f"needs about {size(needed)}, {size(available)} available; lower batch_size and raise accumulate"
        found = [Finding("memory", "fail", text)]
    else:
        found = [Finding("memory", "ok", f"needs about {size(needed)} of {size(available)} available")]
    fits = space.peak < space.free
    advice = "" if fits else "; raise save_every, or choose another --out"
    text = f"needs up to {size(space.peak)}, {size(space.free)} free{advice}"
    return [*found, Finding("disk", "ok" if fits else "fail", text)]
