"""One batch -> the weighted sum of the terms.

Shape legend: B = batch, T = tokens, D = hidden, N = response positions of the batch, J = visual positions, K = draws a
position, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill import access, attention, latents, packing, ribbon
from distill.access import GoldPass
from distill.access import embed as embed
from distill.access import gold_pass as gold_pass
from distill.attention import AttentionTap
from distill.batch import Batch as Batch
from distill.batch import Normaliser as Normaliser
from distill.config import Align, LossWeights
from distill.distiller import is_sharded
from distill.gate import Gate
from distill.head import HeadLoss, RowLosses, Rows
from distill.lavit import Lavit
from distill.teacher import Target, Teacher, TeacherPass, candidate_hidden, fixed_candidates, join

# after the name of a term: the variance of its value about the loss from the full teacher, where that was sampled
VARIANCE = "_variance"
# standard errors in a bound: of normal errors 1 in 16,000 lies beyond it
SIGMAS = 4.0


@dataclass(frozen=True)
class _Response:
    """The trained positions of a batch; `taught_N` are those a teacher knows (no latents)."""

    sample_N: Tensor
    place_N: Tensor
    gold_N: Tensor
    weight_N: Tensor
    taught_N: Tensor


class Objective:
    """Computes the chosen terms for a student and a frozen teacher.

    Args:
        terms: subset of sft, kd, iva, tpa, concept, traj.
        vocabulary: number of leading token ids both models share; KL terms compare only these.
        lavit: what concept and traj need; the gate acts on every term.
    """

    def __init__(
        self,
        terms: tuple[str, ...],
        weights: LossWeights,
        align: Align,
        teacher: Teacher | None,
        vocabulary: int,
        lavit: Lavit | None = None,
    ) -> None:
        if teacher is None and set(terms) - {"sft"}:
            raise ValueError(f"terms {terms} need a teacher")
        self.terms, self.weights, self.align = terms, weights, align
        self.teacher, self.vocabulary, self.lavit = teacher, vocabulary, lavit

    def __call__(
        self,
        student: nn.Module,
        batch: Batch,
        normaliser: Normaliser,
        seeds: Sequence[int] | None = None,
        step: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss and the unweighted value of each term; with a sampled teacher, the variance of each value too.

        Args:
            seeds: one a sample; what is drawn for a sample (candidates, positions) depends on its seed alone, whatever
                batch or process it is in. None derives them from the sample's tokens: the same at every call.
            step: of training, from 0, which a gate depends on; None outside training, where it is open.
        """
        needs_teacher = bool(set(self.terms) - {"sft"})
        tpa, iva = "tpa" in self.terms, "iva" in self.terms
        if self.align.packing:
            batch = replace(batch, packing=packing.plan(batch.attention_mask_BT))
        gate = self.lavit.gate(batch, step) if self.lavit is not None else None
        with self.lavit.tap(student, batch) if self.lavit is not None else nullcontext() as tap:
            gold = gold_pass(student, batch, tpa and self.align.layout == "cached", gate)
            seen = latents.ask(self.teacher, batch, iva, tpa) if self.teacher is not None and needs_teacher else None
            extra = self._latent_terms(batch, gold, tap, seen, normaliser)
        key_B = _keys(batch, seeds)
        loss = HeadLoss(access.head(student), self.vocabulary, self.align.temperature, self.align.direction)
        response = _response(batch)
        fixed = fixed_candidates(seen) if seen is not None and tpa else None
        draw = tpa and fixed is None
        untaught = (access.image_token(student), *access.latent_tokens(student))
        draws = _Draws(response, batch, key_B, self.align, untaught) if draw else None
        values = self._response_terms(loss, gold, response, seen, draws, normaliser)
        if seen is not None:
            blocks = [self._iva(batch, gold, seen, key_B, normaliser)] if iva else []
            candidates = draws.candidates() if draws is not None else fixed
            if candidates is not None:
                blocks.append(self._tpa(student, batch, gold, seen, candidates, normaliser, gate))
            values |= _add(loss, blocks, self.weights)
        # a batch without rows of its own still belongs to the graph
        total = loss.total() + _zero(gold.hidden_BTD, student)
        for name, value in extra.items():
            total = total + getattr(self.weights, name) * value
            values[name] = value.detach()
        return total, {name: value for name, value in values.items() if name.removesuffix(VARIANCE) in self.terms}

    def extra_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained beside the student."""
        return [] if self.lavit is None else [(f"lavit.{name}", p) for name, p in self.lavit.head.named_parameters()]

    def _latent_terms(
        self, batch: Batch, gold: GoldPass, tap: AttentionTap | None, seen: TeacherPass | None, normaliser: Normaliser
    ) -> dict[str, Tensor]:
        """concept and traj, where they are asked for."""
        asked = [name for name in ("concept", "traj") if name in self.terms]
        if self.lavit is None or not asked:
            return {}
        assert seen is not None
        found = self.lavit.losses(batch, gold, tap, seen.gaze(), normaliser)
        return {name: found[name] for name in asked}

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
        taught_N = response.weight_N * response.taught_N / normaliser.taught
        kd = seen is not None and "kd" in self.terms
        result = loss.add(
            Rows(
                hidden_RD=gold.hidden_BTD[at],
                label_R=response.gold_N,
                ce_weight_R=self.weights.sft * share_N if "sft" in self.terms else None,
                target=seen.rows(*at) if seen is not None and kd else None,
                kl_weight_R=self.weights.kd * taught_N if kd else None,
                look=None if draws is None else draws.look,
            )
        )
        return {**_means(result, share_N, "sft"), **_means(result, taught_N, "kd")}

    def _iva(self, batch: Batch, gold: GoldPass, seen: TeacherPass, key_B: Tensor, normaliser: Normaliser) -> _Block:
        weight_BT = seen.weights()
        rows = self.align.iva_rows
        if rows:
            drawn_BT = attention.draw_visual(weight_BT, rows, ribbon.uniforms(key_B, 1)[:, 0])
            weight_BT = torch.where(batch.image_BT.sum(dim=1, keepdim=True) > rows, drawn_BT, weight_BT)
        at = (weight_BT * batch.image_BT).nonzero(as_tuple=True)
        return _Block("iva", gold.hidden_BTD[at], seen.rows(*at), weight_BT[at] / normaliser.image_samples)

    def _tpa(
        self,
        student: nn.Module,
        batch: Batch,
        gold: GoldPass,
        seen: TeacherPass,
        candidates: ribbon.Candidates,
        normaliser: Normaliser,
        gate: Gate | None,
    ) -> _Block:
        if not candidates.keep_BC.any():
            if not is_sharded(student):
                return _Block("tpa", None, None, torch.zeros(0, device=gold.hidden_BTD.device))
            candidates = ribbon.no_candidates(batch.input_ids_BT)  # other processes have some: follow their passes
        bias_BT = None if gate is None else gate.key_bias()
        hidden_BCD = candidate_hidden(student, batch, gold, candidates, self.align, bias_BT)
        share_C = candidates.weight_BC[candidates.keep_BC] / normaliser.taught
        return _Block("tpa", hidden_BCD[candidates.keep_BC], seen.candidates(candidates), share_C)


@dataclass(frozen=True)
class _Block:
    """Rows of one term and how much each counts; no hidden states where there are no rows."""

    term: str
    hidden_RD: Tensor | None
    target: Target | None
    share_R: Tensor


def _add(loss: HeadLoss, blocks: Sequence[_Block], weights: LossWeights) -> dict[str, Tensor]:
    """Values of the terms; all blocks share chunks, because products of few rows are slow."""
    values = {block.term: torch.zeros((), device=block.share_R.device) for block in blocks}
    full = [block for block in blocks if block.hidden_RD is not None]
    if not full:
        return values
    result = loss.add(
        Rows(
            torch.cat([block.hidden_RD for block in full if block.hidden_RD is not None]),
            target=join([block.target for block in full if block.target is not None]),
            kl_weight_R=torch.cat([getattr(weights, block.term) * block.share_R for block in full]),
        )
    )
    sizes = [len(block.share_R) for block in full]
    parts = [None if value_R is None else value_R.split(sizes) for value_R in (result.kl_R, result.variance_R)]
    for i, block in enumerate(full):
        split = RowLosses(None, *(None if part is None else part[i] for part in parts))
        values |= _means(split, block.share_R, block.term)
    return values


def bounded(values: Mapping[str, float]) -> dict[str, float]:
    """Values of terms with a bound of |value - that from the full teacher| in place of each variance: kd, kd_bound."""
    return {
        f"{name.removesuffix(VARIANCE)}_bound" if name.endswith(VARIANCE) else name: (
            SIGMAS * math.sqrt(value) if name.endswith(VARIANCE) else value
        )
        for name, value in values.items()
    }


class _Draws:
    """Candidates of the response positions, drawn while the student's logits pass by.

    Args:
        forbidden: tokens a teacher cannot be shown after an answer: images, and latents, which it does not know.
    """

    def __init__(
        self, response: _Response, batch: Batch, key_B: Tensor, align: Align, forbidden: tuple[int, ...]
    ) -> None:
        self.response, self.align, self.forbidden = response, align, forbidden
        self.batch = len(batch.input_ids_BT)
        sample_N = response.sample_N
        key_N = ribbon.mix(key_B[sample_N] + batch.position_BT[sample_N, response.place_N])
        self.uniform_NK = ribbon.uniforms(key_N, align.candidates)
        self.ids_NK = torch.zeros_like(self.uniform_NK, dtype=torch.long)
        self.weight_NK = torch.zeros_like(self.uniform_NK)
        self.thinning_B = ribbon.uniforms(key_B, 2)[:, 1]

    def look(self, logits_NV: Tensor, part: slice) -> None:
        """Draw for the rows of one chunk."""
        chosen = torch.arange(part.start, part.stop, device=logits_NV.device)
        if self.align.tpa_entropy > 0:
            uncertain = ribbon.entropy(logits_NV) >= self.align.tpa_entropy
            chosen, logits_NV = chosen[uncertain], logits_NV[uncertain]
        forbidden = [token for token in self.forbidden if token < logits_NV.shape[1]]
        ids, weight = ribbon.propose(logits_NV, self.uniform_NK[chosen], self.align.sampling, forbidden)
        self.ids_NK[chosen], self.weight_NK[chosen] = ids, weight

    def candidates(self) -> ribbon.Candidates:
        response = self.response
        weight_NK = self.weight_NK
        if self.align.drop_gold:
            weight_NK = torch.where(self.ids_NK == response.gold_N[:, None], 0.0, weight_NK)
        weight_NK = ribbon.thin(weight_NK, response.sample_N, self.align.tpa_share, self.thinning_B)
        return ribbon.arrange(
            self.ids_NK,
            weight_NK * (response.weight_N * response.taught_N)[:, None],
            response.sample_N,
            response.place_N,
            response.gold_N,
            self.batch,
            drop_gold=False,
        )


def _keys(batch: Batch, seeds: Sequence[int] | None) -> Tensor:
    if seeds is None:
        return ribbon.sample_keys(batch.input_ids_BT, batch.attention_mask_BT)
    return ribbon.mix(torch.tensor(list(seeds), dtype=torch.long, device=batch.input_ids_BT.device))


def _response(batch: Batch) -> _Response:
    sample_N, place_N = batch.response_places()
    weight_BT = batch.token_weight_BT
    weight_N = torch.ones(len(sample_N), device=sample_N.device) if weight_BT is None else weight_BT[sample_N, place_N]
    latent_BT = batch.latent_BT
    taught_N = torch.ones_like(weight_N) if latent_BT is None else (~latent_BT[sample_N, place_N]).to(weight_N.dtype)
    return _Response(sample_N, place_N, batch.input_ids_BT[sample_N, place_N], weight_N, taught_N)


def _means(result: RowLosses, share_R: Tensor, divergence: str = "kd") -> dict[str, Tensor]:
    """Weighted sum of the rows' cross-entropy or divergences, and the variance of the latter's."""
    if divergence == "sft":
        return {} if result.ce_R is None else {"sft": (result.ce_R * share_R).sum()}
    if result.kl_R is None:
        return {}
    means = {divergence: (result.kl_R * share_R).sum()}
    if result.variance_R is not None:
        means[divergence + VARIANCE] = (result.variance_R * share_R**2).sum()
    return means


def _zero(hidden: Tensor, student: nn.Module) -> Tensor:
    if hidden.requires_grad or not torch.is_grad_enabled():
        return hidden.sum() * 0.0
    # only tower and projector train, and no sample of this batch has an image
    return sum(((p * 0.0).sum() for p in student.parameters() if p.requires_grad), start=hidden.new_zeros(()))
