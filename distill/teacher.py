"""What a teacher offers the objective, and the teacher that runs beside the student.

Shape legend: B = batch, T = tokens, R = rows asked for, K = stored tokens a row, E = teacher hidden, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill import access, attention, ribbon
from distill.access import GoldPass, Head
from distill.batch import Batch
from distill.config import Align
from distill.methods import LavitOptions

# of a divergence summed in float32 over a whole vocabulary, relative to the row's entropy
FLOAT_ERROR = 1e-6


@dataclass(frozen=True)
class DenseTarget:
    """Teacher distributions as hidden states: the loss multiplies them with the teacher's head chunk by chunk."""

    hidden_RE: Tensor
    head: Head


@dataclass(frozen=True)
class Scatter:
    """What the error of stored rows is estimated from.

    Attributes:
        logp_RK: the teacher's log p of the stored tokens, where a drawn token's mass is another figure.
        drawn_RK: which tokens were drawn, the others are in the row for certain.
        draws_R: draws of the row, repeats included; 2 or more.
        step: largest distance between neighbouring stored values of log(mass).
    """

    logp_RK: Tensor
    drawn_RK: Tensor
    draws_R: Tensor
    step: float

    def take(self, at_R: Tensor, used: int) -> Scatter:
        """The given rows, cut to `used` tokens."""
        return Scatter(self.logp_RK[at_R, :used], self.drawn_RK[at_R, :used], self.draws_R[at_R], self.step)

    def to(self, device: Any) -> Scatter:
        return Scatter(self.logp_RK.to(device), self.drawn_RK.to(device), self.draws_R.to(device), self.step)


@dataclass(frozen=True)
class SparseTarget:
    """Teacher distributions as stored tokens, at the temperature they were stored with.

    Attributes:
        ids_RK: token ids; repeats add up.
        probs_RK: their probability mass, each row sums to one (exact head plus a sampled tail is unbiased).
        negentropy_R: sum p log p in nats, so that the divergence, not only its gradient, is right.
        scatter: for the error of the divergence; None leaves it unknown.
    """

    ids_RK: Tensor
    probs_RK: Tensor
    negentropy_R: Tensor
    scatter: Scatter | None = None

    def take(self, at_R: Tensor) -> SparseTarget:
        """The given rows, no wider than they need."""
        probs_RK = self.probs_RK[at_R]
        # stored tokens come first in a row
        used = max(int((probs_RK > 0).sum(dim=1).max()), 1) if len(at_R) else 1
        scatter = None if self.scatter is None else self.scatter.take(at_R, used)
        return SparseTarget(self.ids_RK[at_R, :used], probs_RK[:, :used], self.negentropy_R[at_R], scatter)

    def to(self, device: Any) -> SparseTarget:
        scatter = None if self.scatter is None else self.scatter.to(device)
        return SparseTarget(self.ids_RK.to(device), self.probs_RK.to(device), self.negentropy_R.to(device), scatter)

    def variance(self, log_q_RK: Tensor) -> Tensor | None:
        """Variance of each row's divergence about that of the full distribution; None where it cannot be known.

        The tail's part of a row is tau / S sum_v c_v f_v, with f = log(p / q), tau the tail's mass and c_v how many of
        its S draws hit token v. Evenly spaced points hit a token of x_v = S p_v / tau either floor(x_v) or ceil(x_v)
        times, so only the fraction phi_v is chance:

            variance = S / (S - 1) (tau / S)^2 sum_v phi_v (1 - phi_v) / min(1, x_v) (f_v - mean f)^2

        over the tokens drawn (Horvitz and Thompson's weights, Hajek's variance). Rounded masses and float32 sums add
        theirs.

        Args:
            log_q_RK: the student's log q of the stored tokens.
        """
        scatter = self.scatter
        if scatter is None:
            return None
        zero = torch.zeros((), device=log_q_RK.device)
        mass_RK = self.probs_RK.float()
        gain_RK = torch.where(mass_RK > 0, scatter.logp_RK - log_q_RK, zero)
        value_R1 = (mass_RK * gain_RK).sum(dim=1, keepdim=True)
        rounded_R = ((mass_RK * (gain_RK - value_R1)) ** 2).sum(dim=1) * scatter.step**2 / 12
        tail_RK = mass_RK * scatter.drawn_RK
        tail_R1 = tail_RK.sum(dim=1, keepdim=True)
        mean_R1 = (tail_RK * gain_RK).sum(dim=1, keepdim=True) / tail_R1.clamp(min=torch.finfo(torch.float32).tiny)
        draws_R1 = scatter.draws_R[:, None]
        each_R1 = tail_R1 / draws_R1
        hits_RK = torch.where(scatter.drawn_RK, scatter.logp_RK.exp() / each_R1, zero)
        fraction_RK = hits_RK % 1
        chance_RK = fraction_RK * (1 - fraction_RK) / hits_RK.clamp(min=torch.finfo(torch.float32).tiny, max=1)
        spread_R1 = (chance_RK * (gain_RK - mean_R1) ** 2).sum(dim=1, keepdim=True)
        drawn_R = (each_R1**2 * spread_R1 * draws_R1 / (draws_R1 - 1)).squeeze(1)
        summed_R = (FLOAT_ERROR * self.negentropy_R.float()) ** 2
        return torch.where(tail_R1.squeeze(1) > 0, drawn_R, zero) + rounded_R + summed_R


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


def join(targets: Sequence[Target]) -> Target:
    """The rows of several targets of one teacher, one after the other."""
    if len(targets) == 1:
        return targets[0]
    dense = [target for target in targets if isinstance(target, DenseTarget)]
    if len(dense) == len(targets):
        return DenseTarget(torch.cat([target.hidden_RE for target in dense]), dense[0].head)
    sparse = [target for target in targets if isinstance(target, SparseTarget)]
    width = max(target.ids_RK.shape[1] for target in sparse)

    def wide(rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([nn.functional.pad(row_RK, (0, width - row_RK.shape[1])) for row_RK in rows])

    known = [target.scatter for target in sparse if target.scatter is not None]
    scatter = None
    if len(known) == len(sparse):
        scatter = Scatter(
            wide([one.logp_RK for one in known]),
            wide([one.drawn_RK for one in known]),
            torch.cat([one.draws_R for one in known]),
            known[0].step,
        )
    return SparseTarget(
        wide([target.ids_RK for target in sparse]),
        wide([target.probs_RK for target in sparse]),
        torch.cat([target.negentropy_R for target in sparse]),
        scatter,
    )


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
