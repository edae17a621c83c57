"""What a teacher offers the objective, and the teacher that runs beside the student.

Shape legend: B = batch, T = tokens, R = rows asked for, K = stored tokens a row, E = teacher hidden, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill import access, attention, ribbon
from distill.access import GoldPass, Head
from distill.batch import Batch
from distill.config import Align
from distill.methods import LavitOptions


@dataclass(frozen=True)
class DenseTarget:
    """Teacher distributions as hidden states: the loss multiplies them with the teacher's head chunk by chunk."""

    hidden_RE: Tensor
    head: Head


@dataclass(frozen=True)
class SparseTarget:
    """Teacher distributions as stored tokens, at the temperature they were stored with.

    Attributes:
        ids_RK: token ids; repeats add up.
        probs_RK: their probability mass, each row sums to one (exact head plus a sampled tail is unbiased).
        negentropy_R: sum p log p of the full distribution in nats, so that the divergence, not only its gradient, is right.
    """

    ids_RK: Tensor
    probs_RK: Tensor
    negentropy_R: Tensor


Target = DenseTarget | SparseTarget


@dataclass(frozen=True)
class Gaze:
    """What LaViT's terms take from a teacher.

    Attributes:
        mass_BT: its attention from text to each visual token, the largest few, summing to one; zero elsewhere.
        semantics_BE: mean of its last hidden states at the image.
    """

    mass_BT: Tensor
    semantics_BE: Tensor


class TeacherPass(Protocol):
    """The teacher's view of one batch. Row indices are (sample, token) of the PREDICTING position."""

    def weights(self) -> Tensor:
        """w_BT: instruction-aware weight of every visual token, one in total per sample with an image."""
        ...

    def rows(self, sample_R: Tensor, token_R: Tensor) -> Target:
        """Next-token distributions after the given tokens of the gold sequence."""
        ...

    def candidates(self, candidates: ribbon.Candidates) -> Target:
        """Next-token distributions after each kept candidate, in the order of `keep_BC.nonzero()`."""
        ...

    def gaze(self) -> Gaze:
        """Where it looks and what it sees there; only of a teacher set up for LaViT."""
        ...


def fixed_candidates(seen: TeacherPass) -> ribbon.Candidates | None:
    """Candidates a pass brings along because it knows no others (a teacher read from disk); None: draw from the student."""
    offered: Callable[[], ribbon.Candidates] | None = getattr(seen, "fixed_candidates", None)
    return offered() if offered is not None else None


class Teacher(Protocol):
    """Anything that can stand in for the teacher model."""

    def __call__(self, batch: Batch, iva: bool, tpa: bool) -> TeacherPass:
        """Look at a batch; `iva` and `tpa` say which signals will be asked for."""
        ...


class LiveTeacher:
    """The teacher model itself, run beside the student.

    Args:
        model: frozen model in eval mode.
        iva_layer: layer whose attention weights the visual tokens.
        lavit: take its gaze too, in the same pass.
    """

    def __init__(self, model: nn.Module, align: Align, iva_layer: int = 0, lavit: LavitOptions | None = None) -> None:
        self.model, self.align, self.iva_layer, self.lavit = model, align, iva_layer, lavit

    @torch.no_grad()
    def __call__(self, batch: Batch, iva: bool, tpa: bool) -> TeacherPass:
        decoder = access.decoder(self.model)
        total = len(decoder.layers)
        watched = range(max(0, total - self.lavit.layers), total) if self.lavit else range(0)
        with (
            attention.AttentionTap(decoder, [self.iva_layer] if iva else [], batch.packing) as tap,
            attention.AttentionTap(decoder, watched, batch.packing) as last,
        ):
            gold = access.gold_pass(self.model, batch, keep_cache=tpa and self.align.layout == "cached")
            weight_BT = self._visual_weights(tap, batch) if iva else None
            gaze = self._gaze(last, batch, gold) if self.lavit else None
        return LivePass(self.model, batch, gold, weight_BT, self.align, gaze)

    def _gaze(self, tap: attention.AttentionTap, batch: Batch, gold: GoldPass) -> Gaze:
        assert self.lavit is not None
        text_BT = attention.after_images(batch.image_BT, batch.attention_mask_BT)
        score_BT = attention.text_to_vision(tap, text_BT, batch.image_BT, batch.attention_mask_BT)
        count_B1 = batch.image_BT.sum(dim=1, keepdim=True).clamp(min=1)
        semantics_BE = (gold.hidden_BTD * batch.image_BT[..., None]).sum(dim=1) / count_B1
        return Gaze(attention.trajectory_of(score_BT, batch.image_BT, self.lavit.keep), semantics_BE.float())

    def _visual_weights(self, tap: attention.AttentionTap, batch: Batch) -> Tensor:
        a_BT = attention.instruction_to_vision(
            tap, self.iva_layer, batch.instruction_BT, batch.image_BT, batch.attention_mask_BT
        )
        return attention.visual_weights(a_BT, batch.image_BT)


@dataclass(frozen=True)
class LivePass:
    """One gold pass of the live teacher."""

    model: nn.Module
    batch: Batch
    gold: GoldPass
    weight_BT: Tensor | None
    align: Align
    seen: Gaze | None = None

    def gaze(self) -> Gaze:
        assert self.seen is not None, "the gaze was not asked for"
        return self.seen

    def weights(self) -> Tensor:
        assert self.weight_BT is not None, "weights were not asked for"
        return self.weight_BT

    def rows(self, sample_R: Tensor, token_R: Tensor) -> Target:
        return DenseTarget(self.gold.hidden_BTD[sample_R, token_R], access.head(self.model))

    @torch.no_grad()
    def candidates(self, candidates: ribbon.Candidates) -> Target:
        hidden_BCD = candidate_hidden(self.model, self.batch, self.gold, candidates, self.align)
        return DenseTarget(hidden_BCD[candidates.keep_BC], access.head(self.model))


def candidate_hidden(
    model: nn.Module,
    batch: Batch,
    gold: GoldPass,
    candidates: ribbon.Candidates,
    align: Align,
    key_bias_BT: Tensor | None = None,
) -> Tensor:
    """hidden_BCD of every candidate slot, in the layout the settings ask for.

    Args:
        key_bias_BT: added to the candidates' attention logits; in the cached layout only.
    """
    decoder: Any = access.decoder(model)
    if align.layout == "cached":
        place = gold.inputs.position_BT
        return ribbon.run_cached(decoder, candidates, gold.cache, batch.attention_mask_BT, place, key_bias_BT)
    if key_bias_BT is not None:
        raise ValueError(f"layout {align.layout} takes no bias; use cached")
    taken = gold.inputs
    return ribbon.run_single_pass(
        decoder,
        taken.embeds_BTD,
        candidates,
        batch.attention_mask_BT,
        taken.position_BT,
        align.layout,
        taken.deep,
    )[1]
