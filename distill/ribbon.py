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
from distill.packing import additive

# columns that are summed up before a draw looks inside
BLOCK = 512
# constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed 64-bit numbers
_GOLDEN, _MIX_A, _MIX_B = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Candidates:
    """Candidate tokens of a batch, padded to C slots.

    Attributes:
        ids_BC: token ids.
        place_BC: index of the gold token each candidate replaces.
        weight_BC: share of its position's mean over candidates.
        keep_BC: True for real candidates; padding and dropped ones are False.
    """

    ids_BC: Tensor
    place_BC: Tensor
    weight_BC: Tensor
    keep_BC: Tensor


def propose(
    logits_NV: Tensor, uniform_NK: Tensor, sampling: Sampling, forbidden: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Draw K candidates a row from p_S (T = 1).

    Args:
        uniform_NK: one number in [0, 1) a draw; the draw is the inverse of the cumulative distribution, so that equal
            numbers give equal candidates on any device and however the rows are batched.
        sampling: `multinomial` draws independently, `distinct` without replacement, `top-k` takes the likeliest.
        forbidden: ids never drawn.

    Returns:
        (ids_NK, weight_NK): weights of a row sum to one; a repeated draw counts once with the weight of its repeats, so
        sum_m weight_m f(c_m) is the mean of f over the draws.
    """
    count = uniform_NK.shape[1]
    probs_NV = logits_NV.detach().float().softmax(dim=-1)
    for token in forbidden:
        probs_NV[:, token] = 0
    even_NK = torch.full_like(uniform_NK, 1 / count, dtype=torch.float32)
    if sampling == "top-k":
        return probs_NV.topk(count, dim=-1).indices, even_NK
    if sampling == "multinomial":
        ids_NK = _inverse(probs_NV, uniform_NK)
        same_NKK = ids_NK[:, :, None] == ids_NK[:, None, :]
        repeated_NK = same_NKK.tril(-1).any(dim=-1)
        return ids_NK, torch.where(repeated_NK, 0.0, same_NKK.sum(dim=-1) * even_NK)
    columns = []
    for m in range(count):
        columns.append(_inverse(probs_NV, uniform_NK[:, m : m + 1]))
        probs_NV.scatter_(1, columns[-1], 0)
    return torch.cat(columns, dim=1), even_NK


def _inverse(probs_NV: Tensor, uniform_NK: Tensor) -> Tensor:
    """The token at which each number's share of a row's mass is reached: first the block of columns, then within it.

    A sum over the whole vocabulary for every token would cost more than the softmax.
    """
    rows, columns = probs_NV.shape
    whole = columns // BLOCK * BLOCK
    mass_NB = torch.cat(
        [probs_NV[:, :whole].view(rows, -1, BLOCK).sum(dim=-1), probs_NV[:, whole:].sum(dim=-1, keepdim=True)], dim=1
    )
    upto_NB = mass_NB.cumsum(dim=-1)
    wanted_NK = uniform_NK.to(upto_NB.dtype) * upto_NB[:, -1:]
    block_NK = _reached(upto_NB, wanted_NK)
    left_NK = wanted_NK - (upto_NB - mass_NB).gather(1, block_NK)
    column_NKC = block_NK[..., None] * BLOCK + torch.arange(BLOCK, device=block_NK.device)
    inside_NKC = probs_NV.gather(1, column_NKC.clamp(max=columns - 1).flatten(1)).view_as(column_NKC)
    inside_NKC = inside_NKC * (column_NKC < columns)
    return block_NK * BLOCK + _reached(inside_NKC.cumsum(dim=-1), left_NK[..., None])[..., 0]


def _reached(upto: Tensor, wanted: Tensor) -> Tensor:
    # rounding may lift a product to the total itself, beyond the last entry that has any mass
    last = upto.argmax(dim=-1, keepdim=True)
    return torch.searchsorted(upto, wanted, right=True).minimum(last)


def entropy(logits_NV: Tensor) -> Tensor:
    """Entropy of every row in nats."""
    logp_NV = logits_NV.float().log_softmax(dim=-1)
    return -(logp_NV.exp() * logp_NV).sum(dim=-1)


def uniforms(key_N: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1) that depend on the keys alone (SplitMix64), float32.

    Args:
        key_N: int64.

    Returns:
        uniform_NK.
    """
    state_NK = key_N[:, None] + _GOLDEN * torch.arange(1, count + 1, device=key_N.device)
    return (_shift(mix(state_NK), 40).to(torch.float32)) * 2.0**-24


def mix(value: Tensor) -> Tensor:
    """The SplitMix64 finaliser on int64 tensors, elementwise."""
    value = (value ^ _shift(value, 30)) * _MIX_A
    value = (value ^ _shift(value, 27)) * _MIX_B
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def sample_keys(input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """key_B of each sample from its own tokens, the same in any batch, order or padding."""
    token_BT = mix(input_ids_BT + _GOLDEN * attention_mask_BT.cumsum(dim=1))
    return mix((token_BT * attention_mask_BT).sum(dim=1))


def thin(weight_NK: Tensor, sample_N: Tensor, share: float, uniform_B: Tensor) -> Tensor:
    """Fewer candidates of the same expected weights: about `share` of a sample's draws are kept.

    Evenly spaced points on a sample's cumulative weights (systematic sampling) hand their weight to the candidate they
    fall on, so likely candidates and all parts of a response are kept in proportion.

    Args:
        weight_NK: a draw weighs 1 / K; candidates that are not computed weigh nothing.
        sample_N: ascending.
        uniform_B: one number in [0, 1) a sample.

    Returns:
        weight_NK, mostly zero.
    """
    if share >= 1:
        return weight_NK
    spacing = 1 / (weight_NK.shape[1] * share)
    upto_NK = weight_NK.double().flatten().cumsum(dim=0).view_as(weight_NK)
    before_NK = upto_NK - weight_NK
    first_N = torch.searchsorted(sample_N, sample_N)
    start_N1 = before_NK[first_N, :1] - uniform_B[sample_N, None].double() * spacing
    points_NK = ((upto_NK - start_N1) / spacing).floor() - ((before_NK - start_N1) / spacing).floor()
    return torch.where(weight_NK > 0, points_NK * spacing, 0.0).to(weight_NK.dtype)


def arrange(
    ids_NK: Tensor,
    weight_NK: Tensor,
    sample_N: Tensor,
    place_N: Tensor,
    gold_N: Tensor,
    batch: int,
    drop_gold: bool = True,
) -> Candidates:
    """Pack candidates of N response positions into one padded row a sample.

    Args:
        weight_NK: candidates of weight zero are dropped.
        sample_N, place_N: which sample and which gold token index each position belongs to.
        gold_N: the gold token; a candidate equal to it is dropped when `drop_gold`.
    """
    keep_NK = weight_NK > 0
    if drop_gold:
        keep_NK = keep_NK & (ids_NK != gold_N[:, None])
    row, column = keep_NK.nonzero(as_tuple=True)
    sample = sample_N[row]
    per_sample_B = torch.bincount(sample, minlength=batch)
    width = int(per_sample_B.max()) if len(row) else 0
    first_B = per_sample_B.cumsum(0) - per_sample_B
    slot = torch.arange(len(row), device=ids_NK.device) - first_B[sample]
    ids_BC = torch.zeros(batch, width, dtype=torch.long, device=ids_NK.device)
    place_BC = torch.zeros_like(ids_BC)
    weight_BC = torch.zeros(batch, width, device=ids_NK.device)
    keep_BC = torch.zeros_like(ids_BC, dtype=torch.bool)
    ids_BC[sample, slot], place_BC[sample, slot] = ids_NK[row, column], place_N[row]
    weight_BC[sample, slot], keep_BC[sample, slot] = weight_NK[row, column].float(), True
    return Candidates(ids_BC, place_BC, weight_BC, keep_BC)


def no_candidates(input_ids_BT: Tensor) -> Candidates:
    """One slot a sample that holds no candidate."""
    zero_B1 = torch.zeros_like(input_ids_BT[:, :1])
    return Candidates(zero_B1, zero_B1, zero_B1.float(), zero_B1.bool())


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


def for_decoder(position_BTX: Tensor) -> Tensor:
    """Position ids as decoders take them: [B, T], or [3, B, T] for those with time, height and width."""
    return position_BTX.movedim(-1, 0) if position_BTX.ndim == 3 else position_BTX


def deepstack(deep: Sequence[Tensor]) -> dict[str, Any]:
    """Arguments that add deep_BTD after each of the first decoder layers (nothing for classes without them)."""
    if not deep:
        return {}
    everywhere_BT = torch.ones(deep[0].shape[:2], dtype=torch.bool, device=deep[0].device)
    return {"visual_pos_masks": everywhere_BT, "deepstack_visual_embeds": [part.flatten(0, 1) for part in deep]}


def _at(position_BTX: Tensor, place_BC: Tensor) -> Tensor:
    return position_BTX.gather(1, place_BC) if position_BTX.ndim == 2 else _take(position_BTX, place_BC)


def run_cached(
    decoder: nn.Module,
    candidates: Candidates,
    cache: Any,
    attention_mask_BT: Tensor,
    position_BT: Tensor,
    key_bias_BT: Tensor | None = None,
) -> Tensor:
    """Hidden states of the candidates over the gold pass's keys and values (gradients flow into them).

    Args:
        key_bias_BT: added to every candidate's attention logits of the gold tokens.

    Returns:
        hidden_BCD. The cache is extended in place and must not be used again.
    """
    embeds_BCD = decoder.get_input_embeddings()(candidates.ids_BC)
    mask = additive(candidate_mask(candidates, attention_mask_BT), embeds_BCD.dtype)
    if key_bias_BT is not None:
        mask[..., : key_bias_BT.shape[1]] += key_bias_BT[:, None, None].to(mask.dtype)
    output = decoder(
        inputs_embeds=embeds_BCD,
        attention_mask=mask,
        position_ids=for_decoder(_at(position_BT, candidates.place_BC)),
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
    deep: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """One forward over gold and candidates together.

    Args:
        position_BT: or position_BT3; candidates take the position of the gold token they replace.
        deep: see `deepstack`; candidates are text and get nothing added.

    Returns:
        (hidden_BTD of the gold tokens, hidden_BCD of the candidates), in their own order whatever the layout.
    """
    length = gold_BTD.shape[1]
    embeds = torch.cat([gold_BTD, decoder.get_input_embeddings()(candidates.ids_BC)], dim=1)
    positions = torch.cat([position_BT, _at(position_BT, candidates.place_BC)], dim=1)
    added = [torch.cat([part, part.new_zeros(embeds[:, length:].shape)], dim=1) for part in deep]
    visible = torch.cat(
        [gold_mask(attention_mask_BT, candidates.ids_BC.shape[1]), candidate_mask(candidates, attention_mask_BT)],
        dim=1,
    )
    order = _interleaved_order(candidates, length) if layout == "interleaved" else None
    if order is not None:
        embeds, positions = _take(embeds, order), _at(positions, order)
        added = [_take(part, order) for part in added]
        visible = _take(visible, order).gather(2, order[:, None, :].expand(-1, visible.shape[1], -1))
    output = decoder(
        inputs_embeds=embeds,
        attention_mask=additive(visible, embeds.dtype),
        position_ids=for_decoder(positions),
        use_cache=False,
        **deepstack(added),
    ).last_hidden_state
    if order is not None:
        output = _take(output, order.argsort(dim=1))
    return output[:, :length], output[:, length:]


def gold_mask(attention_mask_BT: Tensor, candidates: int) -> Tensor:
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
