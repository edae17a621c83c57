"""Several samples in one row of the decoder: less padding when lengths differ, the same numbers.

Only the decoder sees packed rows. Everything else keeps one sample a row: values are gathered into packed rows before the
decoder and back after it, keys and values included, so no loss term knows about packing.

Shape legend: B = samples, T = tokens of the longest sample, P = packed rows, L = tokens a packed row (L = T), D = hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each real token of a padded batch stands in packed rows.

    Attributes:
        source_PL: flat index into [B, T] of the token in each packed slot (0 where empty).
        sample_PL: which sample the slot belongs to; -1 where empty.
        slot_BT: flat index into [P, L] of each token (0 where padded).
        real_BT: which tokens are no padding.
    """

    source_PL: Tensor
    sample_PL: Tensor
    slot_BT: Tensor
    real_BT: Tensor

    def pack(self, value_BTX: Tensor) -> Tensor:
        """[B, T, ...] -> [P, L, ...]; empty slots repeat the first token and are seen by nobody."""
        return value_BTX.flatten(0, 1)[self.source_PL]

    def unpack(self, value_PLX: Tensor) -> Tensor:
        """[P, L, ...] -> [B, T, ...], zero where padded."""
        found_BTX = value_PLX.flatten(0, 1)[self.slot_BT]
        return found_BTX * self.real_BT.view(*self.real_BT.shape, *[1] * (found_BTX.ndim - 2))

    def visible(self) -> Tensor:
        """visible_PLL: a token sees the earlier tokens of its own sample and itself."""
        same_PLL = self.sample_PL[:, :, None] == self.sample_PL[:, None, :]
        earlier_LL = torch.ones(same_PLL.shape[1:], dtype=torch.bool, device=same_PLL.device).tril()
        # an empty slot sees the empty slots before it and itself, which keeps its softmax finite
        return same_PLL & earlier_LL

    def unpack_cache(self, cache: Any) -> Any:
        """Keys and values of packed rows -> a cache with one sample a row (gradients flow through)."""
        from transformers import DynamicCache

        unpacked = DynamicCache()
        for index, layer in enumerate(cache.layers):
            keys, values = (self.unpack(t.transpose(1, 2)).transpose(1, 2) for t in (layer.keys, layer.values))
            unpacked.update(keys, values, index)
        return unpacked


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean mask -> additive mask with a head axis, understood by SDPA and eager attention alike."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def plan(attention_mask_BT: Tensor) -> Packing | None:
    """First-fit-decreasing packing into rows as long as the longest sample; None when it would save no row."""
    lengths = attention_mask_BT.sum(dim=1).tolist()
    rows = _first_fit(lengths, attention_mask_BT.shape[1])
    if len(rows) == len(lengths):
        return None
    device, width = attention_mask_BT.device, attention_mask_BT.shape[1]
    first = attention_mask_BT.long().argmax(dim=1).tolist()  # left padding starts later
    source = torch.zeros(len(rows), width, dtype=torch.long)
    sample = torch.full((len(rows), width), -1)
    slot = torch.zeros(len(lengths), width, dtype=torch.long)
    for p, members in enumerate(rows):
        at = 0
        for b in members:
            here = torch.arange(lengths[b])
            source[p, at : at + lengths[b]] = b * width + first[b] + here
            sample[p, at : at + lengths[b]] = b
            slot[b, first[b] : first[b] + lengths[b]] = p * width + at + here
            at += lengths[b]
    return Packing(source.to(device), sample.to(device), slot.to(device), attention_mask_BT.bool())


def _first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        fits = next((p for p, left in enumerate(room) if lengths[b] <= left), None)
        if fits is None:
            rows.append([])
            room.append(width)
            fits = len(rows) - 1
        rows[fits].append(b)
        room[fits] -= lengths[b]
    return rows
