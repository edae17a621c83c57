"""Instruction -> vision attention of chosen layers, without asking the framework for attention maps.

Asking for `output_attentions` forces eager attention in every layer (and is silently empty under flash attention).
Here a hook keeps one layer's input, and only the rows of the instruction tokens are recomputed from its query and
key projections after rotary embedding.

Shape legend: B = batch, T = tokens, D = hidden, H = heads, K = key/value heads, I = query rows, L = layers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from distill.packing import Packing


class AttentionTap:
    """Context manager that records what `rows` needs while a decoder runs forward.

    Args:
        decoder: the language model (its `layers[i].self_attn` are tapped).
        layers: which layers.
        packing: how the pass's samples share rows, if they do.
    """

    def __init__(self, decoder: nn.Module, layers: Iterable[int], packing: Packing | None = None) -> None:
        self._packing = packing
        self._attention = {layer: decoder.layers[layer].self_attn for layer in layers}
        self.layers = tuple(self._attention)
        self._inputs: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> AttentionTap:
        for layer, module in self._attention.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(layer), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, layer: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._inputs[layer] = (hidden, kwargs["position_embeddings"])

        return keep

    def rows(self, layer: int, query_BI: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Attention probabilities of the given query positions over all keys.

        Args:
            query_BI: positions of the wanted rows (any valid position where a row is padding).
            attention_mask_BT: 1 for real tokens, 0 for padding.

        Returns:
            attention_BHIT, float32, causal and blind to padding.
        """
        hidden_BTD, (cos_BTE, sin_BTE) = self._inputs[layer]
        if self._packing is not None:
            hidden_BTD, cos_BTE, sin_BTE = map(self._packing.unpack, (hidden_BTD, cos_BTE, sin_BTE))
        module = self._attention[layer]
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        index = query_BI[..., None].expand(-1, -1, hidden_BTD.shape[-1])
        q_BHIE = _heads(module.q_proj(hidden_BTD.gather(1, index)), module, "q_norm")
        k_BKTE = _heads(module.k_proj(hidden_BTD), module, "k_norm")
        cos_BTE, sin_BTE = (t.expand(hidden_BTD.shape[0], -1, -1) for t in (cos_BTE, sin_BTE))
        at = query_BI[..., None].expand(-1, -1, cos_BTE.shape[-1])
        q_BHIE, _ = rotate(q_BHIE, q_BHIE, cos_BTE.gather(1, at), sin_BTE.gather(1, at))
        k_BKTE, _ = rotate(k_BKTE, k_BKTE, cos_BTE, sin_BTE)
        k_BHTE = k_BKTE.repeat_interleave(q_BHIE.shape[1] // k_BKTE.shape[1], dim=1)
        scores_BHIT = (q_BHIE @ k_BHTE.transpose(-1, -2)).float() * module.scaling
        key_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        visible_BIT = (key_T <= query_BI[..., None]) & attention_mask_BT[:, None, :].bool()
        scores_BHIT = scores_BHIT.masked_fill(~visible_BIT[:, None], torch.finfo(torch.float32).min)
        return scores_BHIT.softmax(dim=-1)


def _heads(flat_BTX: Tensor, module: Any, norm: str) -> Tensor:
    heads = flat_BTX.view(*flat_BTX.shape[:2], -1, module.head_dim)
    if hasattr(module, norm):  # Qwen3 normalises queries and keys per head
        heads = getattr(module, norm)(heads)
    return heads.transpose(1, 2)


def instruction_to_vision(
    tap: AttentionTap, layer: int, instruction_BT: Tensor, image_BT: Tensor, attention_mask_BT: Tensor
) -> Tensor:
    """a_l(x)[j]: mean over heads and instruction tokens of the attention to visual token j.

    Returns:
        attention_BT, float32, zero outside visual tokens and for samples without image or instruction.
    """
    counts_B = instruction_BT.sum(dim=1)
    width = max(int(counts_B.max()), 1)
    # stable sort puts the instruction positions first, in order
    query_BI = torch.argsort(~instruction_BT, dim=1, stable=True)[:, :width]
    valid_BI = torch.arange(width, device=counts_B.device) < counts_B[:, None]
    rows_BHIT = tap.rows(layer, query_BI, attention_mask_BT)
    total_BT = (rows_BHIT.mean(dim=1) * valid_BI[..., None]).sum(dim=1)
    return total_BT / counts_B.clamp(min=1)[:, None] * image_BT


def text_to_vision(tap: AttentionTap, text_BT: Tensor, image_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """S_BT: mean over the tapped layers, their heads and the given text tokens of the attention to each visual token."""
    found = [instruction_to_vision(tap, layer, text_BT, image_BT, attention_mask_BT) for layer in tap.layers]
    return torch.stack(found).mean(dim=0)


def after_images(image_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The real tokens behind each sample's last visual token."""
    left_BT = image_BT.flip(1).long().cumsum(dim=1).flip(1)
    return attention_mask_BT.bool() & (left_BT == 0) & image_BT.any(dim=1, keepdim=True)


def trajectory_of(score_BT: Tensor, image_BT: Tensor, keep: int) -> Tensor:
    """A_traj: scores of each sample's visual tokens from 0 to 1, the largest `keep` of them, made to sum to one.

    Where all scores are equal, every visual token gets the same.
    """
    low, high = torch.finfo(score_BT.dtype).min, torch.finfo(score_BT.dtype).max
    most_B1 = score_BT.masked_fill(~image_BT, low).amax(dim=1, keepdim=True)
    least_B1 = score_BT.masked_fill(~image_BT, high).amin(dim=1, keepdim=True)
    spread_B1 = most_B1 - least_B1
    scaled_BT = torch.where(image_BT, (score_BT - least_B1) / spread_B1.clamp(min=1e-20), 0.0)
    kept = scaled_BT.topk(min(keep, scaled_BT.shape[1]), dim=1)
    sharp_BT = torch.zeros_like(scaled_BT).scatter(1, kept.indices, kept.values) * image_BT
    total_B1 = sharp_BT.sum(dim=1, keepdim=True)
    even_BT = image_BT / image_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where((total_B1 > 0) & (spread_B1 > 0), sharp_BT / total_B1.clamp(min=1e-20), even_BT)


def visual_weights(attention_BT: Tensor, image_BT: Tensor) -> Tensor:
    """w_j = a[j] / sum_j a[j] over each sample's visual tokens; uniform where the attention is all zero."""
    total_B1 = attention_BT.sum(dim=1, keepdim=True)
    uniform_BT = image_BT / image_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(total_B1 > 0, attention_BT / total_B1.clamp(min=torch.finfo(torch.float32).tiny), uniform_BT)


def draw_visual(weight_BT: Tensor, rows: int, uniform_B: Tensor) -> Tensor:
    """Weights of `rows` systematic draws a sample from w: mostly zero, equal to w in expectation.

    Evenly spaced points on the cumulative weights give every token j either floor or ceil of rows * w_j draws, hence
    little variance, and at most `rows` tokens to compute a divergence at.
    """
    cumulative_BT = weight_BT.double().cumsum(dim=1)
    total_B1 = cumulative_BT[:, -1:]
    points_BR = (torch.arange(rows, device=weight_BT.device) + uniform_B.double()[:, None]) / rows * total_B1
    drawn_BR = torch.searchsorted(cumulative_BT, points_BR, right=True).minimum(cumulative_BT.argmax(1, keepdim=True))
    each_BR = (total_B1 / rows).to(weight_BT.dtype).expand(-1, rows)
    return torch.zeros_like(weight_BT).scatter_add_(1, drawn_BR, each_BR)
