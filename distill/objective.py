"""One batch -> the weighted sum of the four terms.

Shape legend: B = batch, T = tokens, D = hidden, N = response positions of the batch, J = visual positions, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill import attention, losses, ribbon
from distill.config import Align, LossWeights


@dataclass(frozen=True)
class Batch:
    """Tensors of a batch; the span masks come from token ids (see vlm.chat), never from fixed positions."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    image_BT: Tensor
    instruction_BT: Tensor
    response_BT: Tensor
    pixels_NCHW: Tensor | None

    @property
    def position_BT(self) -> Tensor:
        """Position ids that ignore padding on either side."""
        return (self.attention_mask_BT.cumsum(dim=1) - 1).clamp(min=0)

    def response_tokens(self) -> Tensor:
        """Trained tokens. Token 0 of a row has no predicting position, so it can never count."""
        return self.response_BT[:, 1:].sum()

    def image_samples(self) -> Tensor:
        return self.image_BT.any(dim=1).sum()


@dataclass(frozen=True)
class Normaliser:
    """What the terms are divided by: totals over all micro-batches of a step."""

    response_tokens: Tensor | float
    image_samples: Tensor | float

    @staticmethod
    def of(batch: Batch) -> Normaliser:
        return Normaliser(batch.response_tokens().clamp(min=1), batch.image_samples().clamp(min=1))


@dataclass(frozen=True)
class GoldPass:
    """Result of one decoder pass over the gold sequence."""

    hidden_BTD: Tensor
    embeds_BTD: Tensor
    cache: Any


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Token embeddings with image features scattered over the placeholder tokens: embeds_BTD."""
    llava = model.model
    embeds_BTD = llava.get_input_embeddings()(batch.input_ids_BT)
    if batch.pixels_NCHW is None or len(batch.pixels_NCHW) == 0:
        return embeds_BTD
    config = model.config
    features = llava.get_image_features(
        pixel_values=batch.pixels_NCHW,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        return_dict=True,
    ).pooler_output
    flat = torch.cat(list(features), dim=0).to(embeds_BTD.dtype)
    if flat.shape[0] != int(batch.image_BT.sum()):
        raise ValueError(f"{int(batch.image_BT.sum())} image tokens but {flat.shape[0]} image features")
    return embeds_BTD.masked_scatter(batch.image_BT[..., None], flat)


def gold_pass(model: nn.Module, batch: Batch, keep_cache: bool) -> GoldPass:
    embeds_BTD = embed(model, batch)
    output = model.model.language_model(
        inputs_embeds=embeds_BTD,
        attention_mask=batch.attention_mask_BT,
        position_ids=batch.position_BT,
        use_cache=keep_cache,
    )
    return GoldPass(output.last_hidden_state, embeds_BTD, output.past_key_values if keep_cache else None)


class Objective:
    """Computes the chosen terms for a student and a frozen teacher.

    Args:
        terms: subset of sft, kd, iva, tpa.
        vocabulary: number of leading token ids both models share; KL terms compare only these.
        iva_layer: teacher layer whose attention weights the visual tokens.
    """

    def __init__(
        self,
        terms: tuple[str, ...],
        weights: LossWeights,
        align: Align,
        teacher: nn.Module | None,
        vocabulary: int,
        iva_layer: int = 0,
    ) -> None:
        if teacher is None and set(terms) - {"sft"}:
            raise ValueError(f"terms {terms} need a teacher")
        self.terms, self.weights, self.align = terms, weights, align
        self.teacher, self.vocabulary, self.iva_layer = teacher, vocabulary, iva_layer

    def __call__(
        self, student: nn.Module, batch: Batch, normaliser: Normaliser, seeds: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss and the unweighted value of each term.

        Args:
            seeds: one a sample, from which its candidates are drawn; None uses torch's global stream.
        """
        cached = self.align.layout == "cached"
        gold = gold_pass(student, batch, keep_cache=cached and "tpa" in self.terms)
        # the token at t is predicted by the hidden state at t - 1
        sample_N, place_N = batch.response_BT[:, 1:].nonzero(as_tuple=True)
        place_N = place_N + 1
        target_N = batch.input_ids_BT[sample_N, place_N]
        student_NV = student.lm_head(gold.hidden_BTD[sample_N, place_N - 1])
        values: dict[str, Tensor] = {}
        if "sft" in self.terms:
            values["sft"] = losses.sft_loss(student_NV, target_N, normaliser.response_tokens)
        if self.teacher is not None and set(self.terms) & {"kd", "iva", "tpa"}:
            values |= self._teacher_terms(
                student, batch, gold, normaliser, student_NV, sample_N, place_N, target_N, seeds
            )
        total = sum(
            (getattr(self.weights, name) * value for name, value in values.items()),
            start=losses.zero_like(gold.hidden_BTD),
        )
        return total, {name: value.detach() for name, value in values.items()}

    def _teacher_terms(
        self,
        student: nn.Module,
        batch: Batch,
        gold: GoldPass,
        normaliser: Normaliser,
        student_NV: Tensor,
        sample_N: Tensor,
        place_N: Tensor,
        target_N: Tensor,
        seeds: Sequence[int] | None,
    ) -> dict[str, Tensor]:
        assert self.teacher is not None
        cached = self.align.layout == "cached" and "tpa" in self.terms
        layers = [self.iva_layer] if "iva" in self.terms else []
        values: dict[str, Tensor] = {}
        with attention.AttentionTap(self.teacher.model.language_model, layers) as tap, torch.no_grad():
            teacher_gold = gold_pass(self.teacher, batch, keep_cache=cached)
            weight_BT = self._visual_weights(tap, batch) if layers else None
        if "kd" in self.terms:
            with torch.no_grad():
                teacher_NV = self._shared(self.teacher.lm_head(teacher_gold.hidden_BTD[sample_N, place_N - 1]))
            values["kd"] = losses.kd_loss(
                self._shared(student_NV),
                teacher_NV,
                normaliser.response_tokens,
                self.align.temperature,
                self.align.direction,
            )
        if weight_BT is not None:
            values["iva"] = self._iva(student, batch, gold, teacher_gold, weight_BT, normaliser)
        if "tpa" in self.terms:
            ids_NK = self._propose(student, student_NV, sample_N, seeds)
            candidates = ribbon.arrange(
                ids_NK, sample_N, place_N, target_N, len(batch.input_ids_BT), self.align.drop_gold
            )
            values["tpa"] = self._tpa(student, batch, gold, teacher_gold, candidates, normaliser)
        return values

    def _propose(self, student: nn.Module, student_NV: Tensor, sample_N: Tensor, seeds: Sequence[int] | None) -> Tensor:
        scores_NV = self._shared(student_NV).detach().clone()
        # the image placeholder stands for pixels, as a candidate it would mean nothing
        scores_NV[:, student.config.image_token_id] = -torch.inf
        noise_NV = None if seeds is None else ribbon.seeded_noise(seeds, sample_N, scores_NV.shape[1])
        return ribbon.propose(scores_NV, self.align.candidates, self.align.sampling, noise_NV)

    def _visual_weights(self, tap: attention.AttentionTap, batch: Batch) -> Tensor:
        a_BT = attention.instruction_to_vision(
            tap, self.iva_layer, batch.instruction_BT, batch.image_BT, batch.attention_mask_BT
        )
        return attention.visual_weights(a_BT, batch.image_BT)

    def _iva(
        self,
        student: nn.Module,
        batch: Batch,
        gold: GoldPass,
        teacher_gold: GoldPass,
        weight_BT: Tensor,
        normaliser: Normaliser,
    ) -> Tensor:
        assert self.teacher is not None
        if not batch.image_BT.any():
            return losses.zero_like(gold.hidden_BTD)
        at = batch.image_BT.nonzero(as_tuple=True)
        with torch.no_grad():
            teacher_JV = self._shared(self.teacher.lm_head(teacher_gold.hidden_BTD[at]))
        return losses.iva_loss(
            self._shared(student.lm_head(gold.hidden_BTD[at])),
            teacher_JV,
            weight_BT[at],
            normaliser.image_samples,
            self.align.temperature,
            self.align.direction,
        )

    def _tpa(
        self,
        student: nn.Module,
        batch: Batch,
        gold: GoldPass,
        teacher_gold: GoldPass,
        candidates: ribbon.Candidates,
        normaliser: Normaliser,
    ) -> Tensor:
        assert self.teacher is not None
        if not candidates.keep_BC.any():
            return losses.zero_like(gold.hidden_BTD)
        student_CD = self._candidate_hidden(student, batch, gold, candidates)[candidates.keep_BC]
        with torch.no_grad():
            teacher_CD = self._candidate_hidden(self.teacher, batch, teacher_gold, candidates)[candidates.keep_BC]
            teacher_CV = self._shared(self.teacher.lm_head(teacher_CD))
        return losses.tpa_loss(
            self._shared(student.lm_head(student_CD)),
            teacher_CV,
            normaliser.response_tokens * self.align.candidates,
            self.align.temperature,
            self.align.direction,
        )

    def _candidate_hidden(
        self, model: nn.Module, batch: Batch, gold: GoldPass, candidates: ribbon.Candidates
    ) -> Tensor:
        decoder = model.model.language_model
        if self.align.layout == "cached":
            return ribbon.run_cached(decoder, candidates, gold.cache, batch.attention_mask_BT, batch.position_BT)
        return ribbon.run_single_pass(
            decoder, gold.embeds_BTD, candidates, batch.attention_mask_BT, batch.position_BT, self.align.layout
        )[1]

    def _shared(self, logits_NV: Tensor) -> Tensor:
        return logits_NV[..., : self.vocabulary]
