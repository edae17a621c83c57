"""Does the answer depend on the right image? The blind-image test, repeated during training as `visual_gain`.

The images of a few samples are swapped among them so that every sample gets a different one. What the gold answer costs
with the wrong image minus what it costs with the right one, in nats a response token, is the visual gain; it is
measured sample by sample, so its mean has an interval. Three things can be wrong, each with a sign of its own:

    the data      the teacher, who knows how to look, gains nothing either: images and answers do not belong together
    the wiring    the student's answers do not change at all when its image does
    the learning  the student has had its time and still gains nothing

Shape legend: B = samples, T = tokens, N = response positions of the batch, V = vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill import access
from distill.batch import Batch
from distill.data import Collator, Example, Examples, at_hand, to_batch

Verdict = Literal["sees", "early", "blind", "unwired", "mismatched"]
# two-sided 99 % quantile of Student's t by degrees of freedom; between entries the next lower one is used
T_99 = {1: 63.66, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 6: 3.707, 7: 3.499, 8: 3.355, 10: 3.169, 12: 3.055}
T_99 |= {15: 2.947, 20: 2.845, 30: 2.750, 60: 2.660, 120: 2.617}
ROWS = 256
# steps and samples before having learned nothing from images counts against a student
PATIENCE = 100
FEWEST = 8  # samples from which the teacher is held to a gain
PATIENCE_SAMPLES = 3200


@dataclass(frozen=True)
class Gain:
    """Mean over samples of cost(wrong image) - cost(right image), nats a response token, with a 99 % t interval."""

    mean: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(differences: Sequence[float]) -> Gain:
        n = len(differences)
        mean = statistics.fmean(differences)
        if n < 2:
            return Gain(mean, -math.inf, math.inf, n)
        quantile = T_99[max(key for key in T_99 if key <= n - 1)]
        half = quantile * statistics.stdev(differences) / math.sqrt(n)
        return Gain(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Probe:
    """The same samples twice: with their own images and with each other's."""

    right: dict[str, Tensor]
    wrong: dict[str, Tensor]
    n: int


def swapped(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Samples with an image, and the same with the images exchanged so that none keeps its own.

    Every image moves on by as many places as the commonest one has copies, in an order that keeps copies together:
    nobody gets a copy of what they had. Where one image makes up more than half, copies of it are left out.
    """
    single = [example for example in examples if len(example.pixels) == 1]
    groups: dict[tuple[Any, ...], list[Example]] = {}
    for example in single:
        groups.setdefault(_content(example), []).append(example)
    # only images of one shape can stand in for each other: another one would have another number of tokens
    shapes: dict[Any, int] = {}
    for key, members in groups.items():
        shapes[key[0]] = shapes.get(key[0], 0) + len(members)
    if not shapes:
        return [], []
    common = max(shapes, key=lambda shape: shapes[shape])
    kept = [members for key, members in sorted(groups.items(), key=lambda item: item[0][1]) if key[0] == common]
    total, largest = sum(map(len, kept)), max(map(len, kept))
    if 2 * largest > total:
        kept = [members[: max(1, total - largest)] for members in kept]
        largest = max(map(len, kept))
    right = [example for members in kept for example in members]
    if len(kept) < 2:
        return [], []
    moved = right[largest:] + right[:largest]
    return right, [dataclasses.replace(own, pixels=other.pixels) for own, other in zip(right, moved, strict=True)]


def _content(example: Example) -> tuple[tuple[int, ...], str]:
    pixels = example.pixels[0]
    return tuple(pixels.shape), hashlib.sha256(pixels.tobytes()).hexdigest()


def probe(examples: Examples, n: int, collate: Collator) -> Probe | None:
    """A probe of up to n samples, taken evenly over the data set (a stream: its head); None where no two samples have different images."""
    within = at_hand(examples)
    look = min(within, 4 * n)
    found: list[Example] = []
    for i in range(look):
        example = examples[i * within // look]
        found += [example] if example.pixels else []
        if len(found) == n:
            break
    right, wrong = swapped(found)
    return Probe(collate(right), collate(wrong), len(right)) if len(right) >= 2 else None


@torch.no_grad()
def answers(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(cost_B, top_NX): what the gold answer costs each sample a token, and the logits' values at the gold tokens."""
    was_training = model.training
    model.eval()
    hidden_BTD = access.gold_pass(model, batch, keep_cache=False).hidden_BTD
    sample_N, place_N = batch.response_places()
    head = access.head(model)
    gold_N = batch.input_ids_BT[sample_N, place_N]
    logp_N = torch.empty(len(sample_N), device=hidden_BTD.device)
    for start in range(0, len(sample_N), ROWS):
        part = slice(start, start + ROWS)
        logits = head.logits(hidden_BTD[sample_N[part], place_N[part] - 1]).float()
        logp_N[part] = logits.log_softmax(dim=-1).gather(1, gold_N[part, None])[:, 0]
    tokens_B = torch.bincount(sample_N, minlength=len(batch.input_ids_BT)).clamp(min=1)
    cost_B = torch.zeros(len(tokens_B), device=logp_N.device).index_add_(0, sample_N, -logp_N) / tokens_B
    model.train(was_training)
    return cost_B, logp_N


def patience(warmup_steps: int, samples_a_step: int) -> int:
    """Steps a student may take before it must see: 100, twice its warm-up, or 3,200 samples, whichever is more."""
    return max(PATIENCE, 2 * warmup_steps, -(-PATIENCE_SAMPLES // samples_a_step))


@dataclass(frozen=True)
class Reading:
    """A model's gain on a probe; `moved` is the largest change of a gold token's log-probability."""

    gain: Gain
    moved: float
    cost: float


def read(model: nn.Module, found: Probe, device: torch.device) -> Reading:
    """Measure a model on a probe: two forward passes without gradient."""
    right, wrong = ({name: value.to(device) for name, value in part.items()} for part in (found.right, found.wrong))
    cost_B, logp_N = answers(model, to_batch(right))
    other_B, other_N = answers(model, to_batch(wrong))
    moved = float((other_N - logp_N).abs().max()) if len(logp_N) else 0.0
    return Reading(Gain.of((other_B - cost_B).tolist()), moved, float(cost_B.mean()))


class VisualWatch:
    """Judges the student's gain, step after step, and warns once.

    Args:
        patience: steps a student may take before having learned nothing from its images counts against it; warming up
            and learning the form of answers come first.
        teacher: the teacher's reading on training samples, None where no teacher runs.
    """

    def __init__(self, patience: int, teacher: Reading | None) -> None:
        self.patience, self.teacher = patience, teacher
        self.warned: Verdict | None = None

    def verdict(self, step: int, student: Reading) -> Verdict:
        if self.teacher is not None and self.teacher.gain.low <= 0 and self.teacher.gain.n >= FEWEST:
            return "mismatched"
        if student.moved == 0.0:
            return "unwired"
        if student.gain.low > 0:
            return "sees"
        return "early" if step < self.patience else "blind"

    def log(self, step: int, student: Reading) -> dict[str, float | str]:
        """What goes into the metrics."""
        gain = student.gain
        logs: dict[str, float | str] = {
            "visual_gain": gain.mean,
            "visual_gain_low": gain.low,
            "visual_gain_high": gain.high,
        }
        if self.teacher is not None:
            logs["visual_gain_teacher"] = self.teacher.gain.mean
        rounded: dict[str, float | str] = {name: round(float(value), 6) for name, value in logs.items()}
        return {**rounded, "visual_verdict": self.verdict(step, student)}

    def warning(self, step: int, student: Reading) -> str | None:
        """One line the first time a verdict is bad."""
        verdict = self.verdict(step, student)
        if verdict in ("sees", "early") or verdict == self.warned:
            return None
        self.warned = verdict
        gain = student.gain
        figures = f"visual_gain {gain.mean:.4f} nats a token (99 % {gain.low:.4f} to {gain.high:.4f}, n = {gain.n})"
        if verdict == "mismatched":
            assert self.teacher is not None
            theirs = self.teacher.gain
            return (
                f"warning: the teacher answers no better with the right image than with another "
                f"({theirs.mean:.4f} nats a token, 99 % {theirs.low:.4f} to {theirs.high:.4f}, n = {theirs.n}): images "
                "and answers of the training data do not belong together; compare a few records with their images"
            )
        if verdict == "unwired":
            return (
                "warning: the student's answers do not change at all when its image does: image features do not reach "
                "its decoder; check the image token, the projector and the preprocessing"
            )
        return (
            f"warning: after {step} steps the student answers no better with the right image than with another: "
            f"{figures}; it learns blind: check that images and answers belong together"
        )
