"""`python -m distill irs`: IRS of every teacher layer as a table and a plot, and the layer to train with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.cli import AS_JSON, Extra, parse
from distill.config import NEW_RUN, LossWeights, TrainConfig
from distill.methods import LavitOptions
from vlm.console import note, print_json, table
from vlm.errors import UserError
from vlm.files import write_atomic

if TYPE_CHECKING:
    from distill.irs import LayerScores

HELP = """usage: python -m distill irs (--preset digits | --teacher DIR --data F) [options]

IRS(l) = 1 - mean cosine of layer l's instruction-to-vision attention over pairs of instructions about one image.
A high score means that what the layer looks at follows the instruction. Needs the teacher alone, no student.

  --teacher DIR     LLaVA checkpoint directory or hub id
  --data F          training data; several questions about one image pair best, otherwise questions are borrowed
  --images D        folder the data's image paths are relative to
  --preset digits   the built-in teacher and data
  --pairs N         image-instruction pairs [200]
  --seed N          which samples are drawn [0]
  --out DIR         write irs.json and irs.png there
  --json            print the result as one JSON line at the end
The other options of `train` that say how teacher and data are read work here too.

examples:
  python -m distill irs --preset digits
  python -m distill irs --teacher DIR --data train.json --images images/ --pairs 500 --out runs/irs
"""
EXTRAS = (
    AS_JSON,
    Extra("pairs", int, 0, "image-instruction pairs"),
)


def main(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP, end="")
        return 0
    request = parse(list(argv), "irs", EXTRAS)
    if request.staged:
        raise UserError("a recipe with stages has several data sets; name one with --teacher and --data")
    config, pairs = request.stages[0].config, int(request.extra["pairs"])
    if config.resume:
        raise UserError("irs has nothing to resume; drop --resume")
    if pairs < 0 or pairs == 1:
        raise UserError(f"--pairs must be at least 2, got {pairs}")
    scores = measure(config, pairs or config.align.irs_pairs)
    if config.out != NEW_RUN:
        write(scores, config.out)
    print(shown(scores))
    if request.extra["json"]:
        print_json(scores.to_json())
    return 0


def measure(config: TrainConfig, pairs: int) -> LayerScores:
    """IRS of the teacher of a configuration on its data; the student is not looked at.

    Raises:
        UserError: no teacher or no data, or they do not fit.
    """
    import torch

    from distill import presets
    from distill.__main__ import quiet
    from distill.data import Collator, at_hand
    from distill.irs import layer_scores
    from distill.stages import starting_from
    from distill.train import load_run

    if config.teacher is None and config.preset == "none":
        raise UserError("no teacher to look at; pass --teacher DIR or --preset digits")
    quiet()
    if config.threads:
        torch.set_num_threads(config.threads)
    # read as the student of a plain run, the teacher comes with its tokenizer, its pixels and the data
    source = Path(config.teacher) if config.teacher else presets.digits_teacher()
    alone = starting_from(config, source, plain=True)
    plain: dict[str, Any] = {"objective": "sft", "weights": LossWeights(), "lavit": LavitOptions()}
    run = load_run(dataclasses.replace(alone, **plain, teacher=None, teacher_cache=None, batch_size=1))
    teacher = run.student.eval().requires_grad_(False)
    if torch.cuda.is_available():
        teacher = teacher.to("cuda", getattr(torch, config.teacher_dtype))
    note(f"IRS over {pairs} pairs from {at_hand(run.data.train)} samples")
    collate = Collator(run.student_source.tokenizer.spec.pad_token_id)
    return layer_scores(teacher, run.data.train, pairs, collate, seed=config.seed)


def write(scores: LayerScores, out: Path) -> None:
    """Write OUT/irs.json and OUT/irs.png."""
    from distill.irs import plot

    try:
        write_atomic(out / "irs.json", json.dumps(scores.to_json()) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); choose another --out") from None
    plot(scores, out / "irs.png")
    note(f"wrote {out / 'irs.json'} and {out / 'irs.png'}")


def shown(scores: LayerScores) -> str:
    """The table and the sentence that says what to do with it."""
    top = max(*scores.scores, 1e-12)
    rows = []
    for layer, score in enumerate(scores.scores):
        low, high = scores.intervals[layer]
        bar = "█" * round(24 * max(score, 0.0) / top)
        rows.append(
            [str(layer), f"{score:.4f}", f"{low:.4f} to {high:.4f}", bar + (" ←" if layer == scores.best else "")]
        )
    borrowed = scores.pairs - scores.same_image
    lines = [
        table(["layer", "IRS", "95 % interval", ""], rows),
        f"{scores.pairs} pairs: {scores.same_image} of questions the data asks about the same image, {borrowed} with a "
        "question borrowed from another image",
    ]
    if scores.stability is not None:
        lines.append(f"layer {scores.best} has the highest score in {scores.stability:.0%} of the bootstrap resamples")
    return "\n".join([*lines, f"next: python -m distill train ... --align.iva_layer {scores.best}"])
