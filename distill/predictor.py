"""What predicts answers while KPOD's token weights are learned: a copy of the student, shown masked prefixes.

Shape legend: B = samples of a batch, T = tokens, R = rationale tokens, X = masked prefixes (several a sample), D = hidden.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill import access, lora
from distill.batch import Batch
from distill.config import Lora
from distill.families import family
from distill.methods import KpodOptions
from distill.ribbon import for_decoder
from vlm.errors import UserError


@dataclass(frozen=True)
class Places:
    """Where the rationale tokens of a batch stand: token_BR, and real_BR (False is padding)."""

    token_BR: Tensor
    real_BR: Tensor

    @staticmethod
    def of(batch: Batch, steps_BT: Tensor) -> Places:
        inside_BT = (steps_BT > 0) & batch.response_BT
        width = max(int(inside_BT.sum(dim=1).max()), 1)
        token_BR = torch.argsort(~inside_BT, dim=1, stable=True)[:, :width]
        return Places(token_BR, inside_BT.gather(1, token_BR))

    def ids(self, batch: Batch) -> Tensor:
        return batch.input_ids_BT.gather(1, self.token_BR)


def refuse(model: nn.Module) -> None:
    """Raises UserError for a class that cannot be the predictor."""
    if family(model).extended:
        raise UserError(
            "kpod's predictor does not serve classes with deep visual features or three position ids; drop --tokens.weights kpod "
            "(--schedule kpod alone works)"
        )


class Prefixes:
    """The predictor: what an answer costs after masked prefixes of its rationale.

    Question and image are the batch's own; rationale tokens behind the prefix are taken out of the attention mask, and
    positions close up as if they had never been there.
    """

    def __init__(self, model: nn.Module, batch: Batch, at: Places, prefixes: int) -> None:
        self.model, self.at, self.prefixes = model, at, prefixes
        taken = access.inputs(model, batch)
        self.batch, self.embeds_BTD = batch, taken.embeds_BTD

    def __call__(self, shown_XRD: Tensor, keep_XR: Tensor) -> Tensor:
        """cost_X of the tokens after the rationale."""
        batch, count = self.batch, self.prefixes
        token_XR = self.at.token_BR.repeat_interleave(count, dim=0)
        real_XR1 = self.at.real_BR.repeat_interleave(count, dim=0)[..., None]
        embeds_XTD = self.embeds_BTD.repeat_interleave(count, dim=0)
        old_XRD = embeds_XTD.gather(1, token_XR[..., None].expand(-1, -1, embeds_XTD.shape[-1]))
        new_XRD = torch.where(real_XR1, shown_XRD.to(embeds_XTD.dtype), old_XRD)
        embeds_XTD = embeds_XTD.scatter(1, token_XR[..., None].expand_as(new_XRD), new_XRD)
        seen_XT = batch.attention_mask_BT.repeat_interleave(count, dim=0)
        seen_XT = seen_XT.scatter(
            1, token_XR, torch.where(real_XR1[..., 0], keep_XR.to(seen_XT.dtype), seen_XT.gather(1, token_XR))
        )
        hidden_XTD = access.decoder(self.model)(
            inputs_embeds=embeds_XTD,
            attention_mask=seen_XT,
            position_ids=for_decoder((seen_XT.cumsum(dim=1) - 1).clamp(min=0)),
            use_cache=False,
        ).last_hidden_state
        inside_BT = torch.zeros_like(batch.response_BT).scatter(1, self.at.token_BR, self.at.real_BR)
        answer_XT = (batch.response_BT & ~inside_BT).repeat_interleave(count, dim=0)
        ids_XT = batch.input_ids_BT.repeat_interleave(count, dim=0)
        return _cost(self.model, hidden_XTD, ids_XT, answer_XT, seen_XT)


def _cost(model: nn.Module, hidden_XTD: Tensor, ids_XT: Tensor, wanted_XT: Tensor, seen_XT: Tensor) -> Tensor:
    """Minus log probability of the wanted tokens, each predicted by the last seen token before it: cost_X."""
    row_N, place_N = wanted_XT[:, 1:].nonzero(as_tuple=True)
    place_N = place_N + 1
    index_T = torch.arange(seen_XT.shape[1], device=seen_XT.device)
    last_XT = torch.where(seen_XT.bool(), index_T, 0).cummax(dim=1).values
    before_N = last_XT[row_N, place_N - 1]
    logits = access.head(model).logits(hidden_XTD[row_N, before_N]).float()
    cost_N = nn.functional.cross_entropy(logits, ids_XT[row_N, place_N], reduction="none")
    return torch.zeros(len(ids_XT), device=cost_N.device).index_add(0, row_N, cost_N)


def predictor(student: nn.Module, kpod: KpodOptions) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the student that learns to answer, and what of it trains."""
    model = copy.deepcopy(student).eval().requires_grad_(False)
    if lora.attached(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif kpod.predictor_rank:
        lora.attach(model, Lora(r=kpod.predictor_rank, alpha=2.0 * kpod.predictor_rank))
    else:
        access.decoder(model).requires_grad_(True)
    # images are looked at as the student sees them now; a weigher does not need a better tower
    trained = [p for p in access.decoder(model).parameters() if p.requires_grad]
    return model, trained
