"""One batch -> the weighted sum of the four terms.

Shape legend: B = batch, T = tokens, D = hidden, N = response positions of the batch, J = visual positions, K = draws a
position, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill import access, attention, packing, ribbon
from distill.access import GoldPass
from distill.access import embed as embed
from distill.access import gold_pass as gold_pass
from distill.batch import Batch as Batch
from distill.batch import Normaliser as Normaliser
from distill.config import Align, LossWeights
from distill.distiller import is_sharded
from distill.head import HeadLoss, RowLosses, Rows
from distill.teacher import Teacher, TeacherPass, candidate_hidden, fixed_candidates


@dataclass(frozen=True)
class _Response:
    """The trained positions of a batch."""

    sample_N: Tensor
    place_N: Tensor
    gold_N: Tensor
    weight_N: Tensor


class Objective:
    """Computes the chosen terms for a student and a frozen teacher.

    Args:
        terms: subset of sft, kd, iva, tpa.
        vocabulary: number of leading token ids both models share; KL terms compare only these.
    """

    def __init__(
        self,
        terms: tuple[str, ...],
        weights: LossWeights,
        align: Align,
        teacher: Teacher | None,
        vocabulary: int,
    ) -> None:
        if teacher is None and set(terms) - {"sft"}:
            raise ValueError(f"terms {terms} need a teacher")
        self.terms, self.weights, self.align = terms, weights, align
        self.teacher, self.vocabulary = teacher, vocabulary

    def __call__(
        self, student: nn.Module, batch: Batch, normaliser: Normaliser, seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss and the unweighted value of each term.

        Args:
            seeds: one a sample; what is drawn for a sample (candidates, positions) depends on its seed alone, whatever
                batch or process it is in. None derives them from the sample's tokens: the same at every call.
        """
        needs_teacher = bool(set(self.terms) - {"sft"})
        tpa, iva = "tpa" in self.terms, "iva" in self.terms
        if self.align.packing:
            batch = replace(batch, packing=packing.plan(batch.attention_mask_BT))
        gold = gold_pass(student, batch, keep_cache=tpa and self.align.layout == "cached")
        seen = self.teacher(batch, iva, tpa) if self.teacher is not None and needs_teacher else None
        key_B = _keys(batch, seeds)
        loss = HeadLoss(access.head(student), self.vocabulary, self.align.temperature, self.align.direction)
        response = _response(batch)
        fixed = fixed_candidates(seen) if seen is not None and tpa else None
        draw = tpa and fixed is None
        draws = _Draws(response, batch, key_B, self.align, access.image_token(student)) if draw else None
        values = self._response_terms(loss, gold, response, seen, draws, normaliser)
        if seen is not None and iva:
            values["iva"] = self._iva(loss, batch, gold, seen, key_B, normaliser)
        candidates = draws.candidates() if draws is not None else fixed
        if seen is not None and candidates is not None:
            values["tpa"] = self._tpa(loss, student, batch, gold, seen, candidates, normaliser)
        # a batch without rows of its own still belongs to the graph
        total = loss.total() + _zero(gold.hidden_BTD)
        return total, {name: values[name] for name in self.terms}

    def _response_terms(
        self,
        loss: HeadLoss,
        gold: GoldPass,
        response: _Response,
        seen: TeacherPass | None,
        draws: _Draws | None,
        normaliser: Normaliser,
    ) -> dict[str, Tensor]:
        """L_sft and L_kd; the same logits propose the candidates of L_tpa."""
        # the token at t is predicted by the hidden state at t - 1
        at = response.sample_N, response.place_N - 1
        share_N = response.weight_N / normaliser.response_tokens
        kd = seen is not None and "kd" in self.terms
        result = loss.add(
            Rows(
                hidden_RD=gold.hidden_BTD[at],
                label_R=response.gold_N,
                ce_weight_R=self.weights.sft * share_N if "sft" in self.terms else None,
                target=seen.rows(*at) if seen is not None and kd else None,
                kl_weight_R=self.weights.kd * share_N if kd else None,
                look=None if draws is None else draws.look,
            )
        )
        return _means(result, share_N)

    def _iva(
        self,
        loss: HeadLoss,
        batch: Batch,
        gold: GoldPass,
        seen: TeacherPass,
        key_B: Tensor,
        normaliser: Normaliser,
    ) -> Tensor:
        weight_BT = seen.weights()
        rows = self.align.iva_rows
        if rows:
            drawn_BT = attention.draw_visual(weight_BT, rows, ribbon.uniforms(key_B, 1)[:, 0])
            weight_BT = torch.where(batch.image_BT.sum(dim=1, keepdim=True) > rows, drawn_BT, weight_BT)
        at = (weight_BT * batch.image_BT).nonzero(as_tuple=True)
        share_J = weight_BT[at] / normaliser.image_samples
        result = loss.add(
            Rows(gold.hidden_BTD[at], target=seen.rows(*at), kl_weight_R=self.weights.iva * share_J),
        )
        return _means(result, share_J)["kd"]

    def _tpa(
        self,
        loss: HeadLoss,
        student: nn.Module,
        batch: Batch,
        gold: GoldPass,
        seen: TeacherPass,
        candidates: ribbon.Candidates,
        normaliser: Normaliser,
    ) -> Tensor:
        if not candidates.keep_BC.any():
            if not is_sharded(student):
                return torch.zeros((), device=gold.hidden_BTD.device)
            candidates = ribbon.no_candidates(batch.input_ids_BT)  # other processes have some: follow their passes
        hidden_BCD = candidate_hidden(student, batch, gold, candidates, self.align)
        share_C = candidates.weight_BC[candidates.keep_BC] / normaliser.response_tokens
        result = loss.add(
            Rows(
                hidden_BCD[candidates.keep_BC],
                target=seen.candidates(candidates),
                kl_weight_R=self.weights.tpa * share_C,
            )
        )
        return _means(result, share_C)["kd"]


class _Draws:
    """Candidates of the response positions, drawn while the student's logits pass by."""

    def __init__(self, response: _Response, batch: Batch, key_B: Tensor, align: Align, image_token: int) -> None:
        self.response, self.align, self.forbidden = response, align, (image_token,)
        self.batch = len(batch.input_ids_BT)
        sample_N = response.sample_N
        key_N = ribbon.mix(key_B[sample_N] + batch.position_BT[sample_N, response.place_N])
        self.uniform_NK = ribbon.uniforms(key_N, align.candidates)
        self.ids_NK = torch.zeros_like(self.uniform_NK, dtype=torch.long)
        self.weight_NK = torch.zeros_like(self.uniform_NK)
        count_B = torch.bincount(sample_N, minlength=self.batch)
        rank_N = torch.arange(len(sample_N), device=sample_N.device) - (count_B.cumsum(0) - count_B)[sample_N]
        self.chosen_N = ribbon.systematic(rank_N, align.tpa_share, ribbon.uniforms(key_B, 2)[sample_N, 1])

    def look(self, logits_NV: Tensor, part: slice) -> None:
        """Draw for the rows of one chunk."""
        chosen = torch.arange(part.start, part.stop, device=logits_NV.device)[self.chosen_N[part]]
        logits_NV = logits_NV[chosen - part.start]
        if self.align.tpa_entropy > 0:
            uncertain = ribbon.entropy(logits_NV) >= self.align.tpa_entropy
            chosen, logits_NV = chosen[uncertain], logits_NV[uncertain]
        ids, weight = ribbon.propose(logits_NV, self.uniform_NK[chosen], self.align.sampling, self.forbidden)
        self.ids_NK[chosen], self.weight_NK[chosen] = ids, weight / self.align.tpa_share

    def candidates(self) -> ribbon.Candidates:
        response = self.response
        weight_NK = self.weight_NK * response.weight_N[:, None]
        return ribbon.arrange(
            self.ids_NK,
            weight_NK,
            response.sample_N,
            response.place_N,
            response.gold_N,
            self.batch,
            self.align.drop_gold,
        )


def _keys(batch: Batch, seeds: Sequence[int] | None) -> Tensor:
    if seeds is None:
        return ribbon.sample_keys(batch.input_ids_BT, batch.attention_mask_BT)
    return ribbon.mix(torch.tensor(list(seeds), dtype=torch.long, device=batch.input_ids_BT.device))


def _response(batch: Batch) -> _Response:
    sample_N, place_N = batch.response_places()
    weight_BT = batch.token_weight_BT
    weight_N = torch.ones(len(sample_N), device=sample_N.device) if weight_BT is None else weight_BT[sample_N, place_N]
    return _Response(sample_N, place_N, batch.input_ids_BT[sample_N, place_N], weight_N)


def _means(result: RowLosses, share_R: Tensor) -> dict[str, Tensor]:
    values = {"sft": result.ce_R, "kd": result.kl_R}
    return {name: (value_R * share_R).sum() for name, value_R in values.items() if value_R is not None}


def _zero(hidden: Tensor) -> Tensor:
    return hidden.sum() * 0.0
