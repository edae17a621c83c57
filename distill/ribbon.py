"""The ribbon: candidate tokens beside the gold sequence, one extra block instead of K*R forwards.

At every response position t, candidates c ~ p_S(.|x, y_<t) take the place of gold token t: same position id, same
visible prefix. A candidate sees the gold prefix and itself; nothing else ever sees a candidate, so the gold path is
what it would be without the ribbon.

Three layouts give the same logits:
    cached       candidates run as a second block over the keys and values of the gold pass (cheapest)
    appended     one pass over [gold | candidates]
    interleaved  one pass over [c_1^1 .. c_1^K g_1 c_2^1 ..], the published code's order
The last two need no cache, hence work under gradient checkpointing.

Shape legend: B = batch, T = gold tokens, C = candidate slots, D = hidden, V = vocabulary, K = candidates a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import Layout, Sampling


@dataclass(frozen=True)
class Candidates:
    """Candidate tokens of a batch, padded to C slots.

    Attributes:
        ids_BC: token ids.
        place_BC: index of the gold token each candidate replaces.
        keep_BC: True for real candidates; padding and dropped ones are False.
    """

    ids_BC: Tensor
    place_BC: Tensor
    keep_BC: Tensor


def propose(student_NV: Tensor, count: int, sampling: Sampling, noise_NV: Tensor | None = None) -> Tensor:
    """Draw `count` distinct candidates a row from p_S: multinomial without replacement (T = 1), or the top ones.

    Args:
        noise_NV: Exponential(1) draws to use (see `seeded_noise`); None takes them from torch's global stream.

    Returns:
        ids_NK.
    """
    scores = student_NV.detach().float()
    if sampling == "multinomial":
        noise_NV = torch.empty_like(scores).exponential_() if noise_NV is None else noise_NV
        # adding Gumbel noise to the logits and taking the largest draws without replacement, exactly
        scores = scores - noise_NV.clamp(min=torch.finfo(scores.dtype).tiny).log()
    return scores.topk(count, dim=-1).indices


def seeded_noise(seeds: Sequence[int], sample_N: Tensor, width: int) -> Tensor:
    """Exponential(1) noise_NV that depends on each sample's own seed, not on the micro-batch or process that holds it.

    Args:
        seeds: one a sample of the batch.
        sample_N: which sample each row belongs to, in ascending order.
    """
    noise_NV = torch.empty(len(sample_N), width, device=sample_N.device)
    generator = torch.Generator(sample_N.device)
    rows = torch.bincount(sample_N, minlength=len(seeds)).tolist()
    for seed, part in zip(seeds, noise_NV.split(rows), strict=True):
        part.exponential_(generator=generator.manual_seed(seed))
    return noise_NV


def arrange(
    ids_NK: Tensor, sample_N: Tensor, place_N: Tensor, gold_N: Tensor, batch: int, drop_gold: bool = True
) -> Candidates:
    """Pack candidates of N response positions into one padded row a sample.

    Args:
        sample_N, place_N: which sample and which gold token index each position belongs to.
        gold_N: the gold token; a candidate equal to it is dropped when `drop_gold`.
    """
    keep_NK = ids_NK != gold_N[:, None] if drop_gold else torch.ones_like(ids_NK, dtype=torch.bool)
    count = ids_NK.shape[1]
    flat = keep_NK.reshape(-1)
    sample = sample_N.repeat_interleave(count)[flat]
    place, ids = place_N.repeat_interleave(count)[flat], ids_NK.reshape(-1)[flat]
    per_sample_B = torch.bincount(sample, minlength=batch)
    width = int(per_sample_B.max()) if flat.any() else 0
    first_B = per_sample_B.cumsum(0) - per_sample_B
    slot = torch.arange(sample.numel(), device=ids.device) - first_B[sample]
    ids_BC = torch.zeros(batch, width, dtype=torch.long, device=ids.device)
    place_BC = torch.zeros_like(ids_BC)
    keep_BC = torch.zeros_like(ids_BC, dtype=torch.bool)
    ids_BC[sample, slot], place_BC[sample, slot], keep_BC[sample, slot] = ids, place, True
    return Candidates(ids_BC, place_BC, keep_BC)


def candidate_mask(candidates: Candidates, attention_mask_BT: Tensor) -> Tensor:
    """Which keys [gold T | candidates C] each candidate may see: its gold prefix and itself.

    Returns:
        visible_BCX with X = T + C, bool. Padding slots see themselves, which keeps softmax finite.
    """
    batch, width = candidates.ids_BC.shape
    key_T = torch.arange(attention_mask_BT.shape[1], device=attention_mask_BT.device)
    prefix_BCT = (key_T < candidates.place_BC[..., None]) & attention_mask_BT[:, None, :].bool()
    itself_BCC = torch.eye(width, dtype=torch.bool, device=prefix_BCT.device).expand(batch, -1, -1)
    return torch.cat([prefix_BCT & candidates.keep_BC[..., None], itself_BCC], dim=-1)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean mask -> additive mask with a head axis, understood by SDPA and eager attention alike."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def run_cached(
    decoder: nn.Module, candidates: Candidates, cache: Any, attention_mask_BT: Tensor, position_BT: Tensor
) -> Tensor:
    """Hidden states of the candidates over the gold pass's keys and values (gradients flow into them).

    Returns:
        hidden_BCD. The cache is extended in place and must not be used again.
    """
    embeds_BCD = decoder.get_input_embeddings()(candidates.ids_BC)
    output = decoder(
        inputs_embeds=embeds_BCD,
        attention_mask=additive(candidate_mask(candidates, attention_mask_BT), embeds_BCD.dtype),
        position_ids=position_BT.gather(1, candidates.place_BC),
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state


def run_single_pass(
    decoder: nn.Module,
    gold_BTD: Tensor,
    candidates: Candidates,
    attention_mask_BT: Tensor,
    position_BT: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """One forward over gold and candidates together.

    Returns:
        (hidden_BTD of the gold tokens, hidden_BCD of the candidates), in their own order whatever the layout.
    """
    length = gold_BTD.shape[1]
    embeds = torch.cat([gold_BTD, decoder.get_input_embeddings()(candidates.ids_BC)], dim=1)
    positions = torch.cat([position_BT, position_BT.gather(1, candidates.place_BC)], dim=1)
    visible = torch.cat(
        [_gold_mask(attention_mask_BT, candidates.ids_BC.shape[1]), candidate_mask(candidates, attention_mask_BT)],
        dim=1,
    )
    order = _interleaved_order(candidates, length) if layout == "interleaved" else None
    if order is not None:
        embeds, positions = _take(embeds, order), positions.gather(1, order)
        visible = _take(visible, order).gather(2, order[:, None, :].expand(-1, visible.shape[1], -1))
    output = decoder(
        inputs_embeds=embeds,
        attention_mask=additive(visible, embeds.dtype),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    if order is not None:
        output = _take(output, order.argsort(dim=1))
    return output[:, :length], output[:, length:]


def _gold_mask(attention_mask_BT: Tensor, candidates: int) -> Tensor:
    length = attention_mask_BT.shape[1]
    key_T = torch.arange(length, device=attention_mask_BT.device)
    causal_TT = key_T[None, :] <= key_T[:, None]
    real_BTT = causal_TT & attention_mask_BT[:, None, :].bool()
    visible_BTT = real_BTT | torch.eye(length, dtype=torch.bool, device=key_T.device)  # padding rows see themselves
    return torch.cat([visible_BTT, visible_BTT.new_zeros(len(visible_BTT), length, candidates)], dim=2)


def _interleaved_order(candidates: Candidates, length: int) -> Tensor:
    batch = len(candidates.ids_BC)
    gold_key = torch.arange(length, device=candidates.ids_BC.device).expand(batch, -1) * 2 + 1
    candidate_key = torch.where(candidates.keep_BC, candidates.place_BC * 2, 2 * length + 1)
    return torch.argsort(torch.cat([gold_key, candidate_key], dim=1), dim=1, stable=True)


def _take(value_BXY: Tensor, order_BX: Tensor) -> Tensor:
    return value_BXY.gather(1, order_BX[..., None].expand(-1, -1, value_BXY.shape[-1]))
