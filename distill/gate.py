"""Sensory gating: attention from some tokens to the image, its odds multiplied by a factor that grows to one.

    gamma(t) = eps + (1 - eps) / 2 (1 - cos(pi t / Tw))   for t < Tw, else 1
    attention logits from gated queries to image keys get + ln gamma(t)

With logit mass E_I on the image and E_R elsewhere, the image's share becomes gamma E_I / (gamma E_I + E_R).

Shape legend: B = samples, T = tokens, P, L = packed rows and their length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.packing import Packing

# a shut gate: as good as no attention at all in float32, and still finite
SHUT = -30.0


def gamma(t: float, until: float, floor: float) -> float:
    """The factor at step t."""
    if t >= until:
        return 1.0
    return floor + (1 - floor) / 2 * (1 - math.cos(math.pi * t / until))


@dataclass(frozen=True)
class Gate:
    """What is gated, and by how much.

    Attributes:
        log_factor: ln gamma.
        query_BT: tokens whose attention is gated.
        key_BT: tokens that are attended less.
    """

    log_factor: float
    query_BT: Tensor
    key_BT: Tensor

    def bias(self, packing: Packing | None = None) -> Tensor:
        """Added to attention logits: bias_B1TT, or of packed rows."""
        query, key = (
            (self.query_BT, self.key_BT) if packing is None else map(packing.pack, (self.query_BT, self.key_BT))
        )
        found = (query[:, :, None] & key[:, None, :]).to(torch.float32) * self.log_factor
        return found[:, None]

    def key_bias(self) -> Tensor:
        """bias_BT of a gated query."""
        return self.key_BT.to(torch.float32) * self.log_factor
