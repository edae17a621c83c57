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
    """

    def __init__(self, model: nn.Module, align: Align, iva_layer: int = 0) -> None:
        self.model, self.align, self.iva_layer = model, align, iva_layer

    @torch.no_grad()
    def __call__(self, batch: Batch, iva: bool, tpa: bool) -> TeacherPass:
        layers = [self.iva_layer] if iva else []
        with attention.AttentionTap(access.decoder(self.model), layers, batch.packing) as tap:
            gold = access.gold_pass(self.model, batch, keep_cache=tpa and self.align.layout == "cached")
            weight_BT = self._visual_weights(tap, batch) if iva else None
        return LivePass(self.model, batch, gold, weight_BT, self.align)

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
    model: nn.Module, batch: Batch, gold: GoldPass, candidates: ribbon.Candidates, align: Align
) -> Tensor:
    """hidden_BCD of every candidate slot, in the layout the settings ask for."""
    decoder: Any = access.decoder(model)
    if align.layout == "cached":
        return ribbon.run_cached(decoder, candidates, gold.cache, batch.attention_mask_BT, gold.inputs.position_BT)
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
