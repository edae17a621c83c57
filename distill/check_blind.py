"""The blind-image test: do teacher and student get worse when the images are exchanged?

A model that does not look at the image loses nothing by a wrong one, and its loss falls all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from distill import latents, visual
from distill.batch import Batch, Normaliser
from distill.check_parts import Finding
from distill.data import Example
from distill.objective import Objective
from distill.placement import computes_on
from distill.teacher import Teacher, TeacherPass
from vlm.score import bootstrap_interval

# fewer cannot tell a small gain from none
ENOUGH = 8


@dataclass(frozen=True)
class Gain:
    """One term with right and with exchanged images over the same samples.

    Attributes:
        interval: 95 % paired bootstrap interval of exchanged minus right.
    """

    who: str
    term: str
    right: float
    exchanged: float
    interval: tuple[float, float]
    n: int

    @property
    def gain(self) -> float:
        return self.exchanged - self.right

    @property
    def sees(self) -> bool:
        """Whether the images help beyond doubt."""
        return self.interval[0] > 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.gain, "sees": self.sees}


class OnRightImages:
    """A teacher that looks at the right images whatever the student is shown."""

    def __init__(self, teacher: Teacher, right: Batch) -> None:
        self.teacher, self.right = teacher, right

    def __call__(self, batch: Batch, iva: bool, tpa: bool) -> TeacherPass:
        return self.teacher(self.right, iva, tpa)


@torch.no_grad()
def gains(
    objective: Objective,
    student: nn.Module,
    teacher: nn.Module | None,
    examples: Sequence[Example],
    batch_of: Callable[[Sequence[Example], torch.device], Batch],
) -> list[Gain]:
    """Every term of the student, and the teacher's own cross-entropy, sample by sample, right and exchanged."""
    device = next(student.parameters()).device
    values: dict[tuple[str, str], list[tuple[float, float]]] = {}
    was_training = student.training
    student.eval()
    for own, other in zip(*visual.swapped(examples), strict=True):
        right, wrong = batch_of([own], device), batch_of([other], device)
        ours = objective(student, right, Normaliser.of(right))[1]
        # the teacher's answer to the right image is the target in both
        fixed = objective.teacher and OnRightImages(objective.teacher, latents.plain(right))
        blind = Objective(
            objective.terms, objective.weights, objective.align, fixed, objective.vocabulary, objective.lavit
        )
        theirs = blind(student, wrong, Normaliser.of(wrong))[1]
        for term in objective.terms:
            values.setdefault(("student", term), []).append((float(ours[term]), float(theirs[term])))
        if teacher is not None:
            place = computes_on(teacher)
            costs = [float(visual.answers(teacher, latents.plain(batch_of([seen], place)))[0]) for seen in (own, other)]
            values.setdefault(("teacher", "sft"), []).append((costs[0], costs[1]))
    student.train(was_training)
    return [_gain(who, term, pairs) for (who, term), pairs in values.items()]


def _gain(who: str, term: str, pairs: Sequence[tuple[float, float]]) -> Gain:
    right, exchanged = np.array(pairs).T
    interval = bootstrap_interval(list(exchanged - right))
    return Gain(who, term, float(right.mean()), float(exchanged.mean()), interval, len(pairs))


def findings(found: Sequence[Gain], has_images: bool) -> list[Finding]:
    """The verdict: a blind teacher fails the check, a student may still have to learn to look."""
    if not has_images:
        return [Finding("blind-image test", "warn", "no sample has an image; nothing to see")]
    n = max((gain.n for gain in found), default=0)
    if n < ENOUGH:
        return [Finding("blind-image test", "warn", f"only {n} samples have images to exchange; {ENOUGH} needed")]
    verdicts = []
    for gain in (gain for gain in found if gain.who == "teacher"):
        text = (
            f"cross-entropy {gain.right:.3f} with the right image, {gain.exchanged:.3f} with another ({gain.n} samples)"
        )
        if gain.sees:
            verdicts.append(Finding("teacher looks at the image", "ok", text))
        else:
            reason = f"{text}: it has nothing visual to teach here; is it the right checkpoint, is --images the right folder?"
            verdicts.append(Finding("teacher looks at the image", "fail", reason))
    seeing = [gain.term for gain in found if gain.who == "student" and gain.sees]
    text = f"by {', '.join(seeing)}" if seeing else "not yet, as expected of a fresh projector"
    verdicts.append(Finding("student looks at the image", "ok" if seeing else "warn", text))
    return verdicts
