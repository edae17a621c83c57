"""Teacher distributions in a few bytes: the likeliest tokens as they are, the rest by an unbiased sample.

Plain top-k is biased: the student never learns how much mass lies outside (Sparse Logit Sampling, arXiv 2503.16870).
Here the tokens outside the head are drawn with probability proportional to theirs and share the tail's mass, so the
expectation of the stored distribution, and with it of the gradient, is the full one. The draws are systematic (evenly
spaced points on the cumulative tail), which has the mean of independent draws and less variance.

A row costs 8 bytes and 4 (vocabularies up to 65,536) or 5 bytes a stored token: the id, and the mass as a 16-bit
logarithm, hence with the same relative error whatever its size. A drawn token takes 2 more for its own probability: how
log(p / q) scatters over the draws says how far the stored row's divergence may be from the full one (`SparseTarget`).

Shape legend: R = rows, V = vocabulary, K = head tokens, S = tail draws, X = K + S, M = stored tokens of all rows,
N = drawn ones of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distill.teacher import Scatter, SparseTarget
from vlm.errors import UserError

# masses from 1 down to e^-32 in 65,535 steps
STEP = 32.0 / 65535
# largest relative error of one stored mass: half a step either way, once more when the row is made to sum to one
QUANTISATION = 2 * (2.718281828459045 ** (STEP / 2) - 1)
# a tail smaller than S of these is drawn fewer than S times: its sample is accurate enough, relative to the whole row
TAIL_UNIT = 1e-3
MAX_TOKENS = 65535
MAX_DRAWS = 255


@dataclass(frozen=True)
class Compression:
    """How a row is shortened.

    Attributes:
        top_k: tokens kept as they are.
        tail: draws from the rest; 0 drops it and makes the row sum to one again (biased), 1 has no scatter to tell the
            error from.
        min_prob: tokens of the head below this go to the tail.
    """

    top_k: int
    tail: int
    min_prob: float

    def __post_init__(self) -> None:
        if self.top_k < 0 or self.tail < 0 or self.top_k + self.tail < 1:
            raise UserError(f"top_k {self.top_k} and tail {self.tail}: at least one token a row must be stored")
        if self.top_k + self.tail > MAX_TOKENS:
            raise UserError(f"top_k {self.top_k} and tail {self.tail}: at most {MAX_TOKENS} tokens a row")
        if self.tail > MAX_DRAWS:
            raise UserError(f"tail {self.tail}: at most {MAX_DRAWS} draws a row")
        if not 0 <= self.min_prob < 1:
            raise UserError(f"min_prob is a probability from 0 to below 1, got {self.min_prob}")


@dataclass(frozen=True)
class PackedRows:
    """Rows of stored distributions; `tensors` are what a file holds.

    Attributes:
        count_R: stored tokens of each row, uint16.
        negentropy_R: sum of stored mass times log p (see `compress`), float32.
        drawn_R: how many of a row's tokens, the last ones, were drawn, uint8.
        draws_R: draws they came from, repeats included, uint8.
        low_M, high_M: lower 16 and upper 8 bits of the ids; high_M is empty for small vocabularies.
        code_M: -log(mass) / STEP, uint16.
        logp_N: -log(p) / STEP of the drawn tokens, uint16.
    """

    count_R: Tensor
    negentropy_R: Tensor
    drawn_R: Tensor
    draws_R: Tensor
    low_M: Tensor
    high_M: Tensor
    code_M: Tensor
    logp_N: Tensor

    @staticmethod
    def join(blocks: Sequence[PackedRows]) -> PackedRows:
        """Rows of all blocks, one after the other."""
        if not blocks:
            short, byte = torch.zeros(0, dtype=torch.uint16), torch.zeros(0, dtype=torch.uint8)
            return PackedRows(short, torch.zeros(0), byte, byte, short, byte, short, short)
        return PackedRows(*(torch.cat([getattr(block, item.name) for block in blocks]) for item in fields(PackedRows)))

    def size(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in vars(self).values())


def compress(logits_RV: Tensor, uniform_R: Tensor, how: Compression, temperature: float = 1.0) -> PackedRows:
    """Shorten the distributions softmax(logits / temperature).

    `negentropy_R` is sum m log p over the stored masses m, an unbiased estimate of sum p log p whose error goes along
    with that of the cross-entropy: the divergence of equal distributions is exactly zero, and its noise shrinks with
    it. The exact negentropy would leave the noise of the cross-entropy in the value (never in the gradient).

    Args:
        uniform_R: one number in [0, 1) a row, from which its tail is drawn.
    """
    logp_RV = torch.log_softmax(logits_RV.float() / temperature, dim=-1)
    ids_RX, mass_RX, draws_R = _select(logp_RV, uniform_R, how)
    code_RX = (-mass_RX.log() / STEP).round()
    keep_RX = (mass_RX > 0) & (code_RX <= MAX_TOKENS)
    stored_RX = _masses(code_RX, keep_RX)
    logp_RX = logp_RV.gather(1, ids_RX).masked_fill(~keep_RX, 0)
    negentropy_R = (stored_RX * logp_RX).sum(dim=-1)
    head = ids_RX.shape[1] - how.tail
    drawn_RX = keep_RX & (torch.arange(ids_RX.shape[1], device=ids_RX.device) >= head)
    logp_N = (-logp_RX[drawn_RX] / STEP).round().clamp(max=MAX_TOKENS)
    ids_M, code_M = ids_RX[keep_RX].to(torch.int32).cpu(), code_RX[keep_RX].to(torch.int32).cpu()
    high_M = (ids_M >> 16) if logp_RV.shape[1] > 1 << 16 else ids_M[:0]
    return PackedRows(
        count_R=keep_RX.sum(dim=1).to(torch.int32).cpu().to(torch.uint16),
        negentropy_R=negentropy_R.float().cpu(),
        drawn_R=drawn_RX.sum(dim=1).to(torch.uint8).cpu(),
        draws_R=draws_R.to(torch.uint8).cpu(),
        low_M=(ids_M & 0xFFFF).to(torch.uint16),
        high_M=high_M.to(torch.uint8),
        code_M=code_M.to(torch.uint16),
        logp_N=logp_N.to(torch.int32).cpu().to(torch.uint16),
    )


def _select(logp_RV: Tensor, uniform_R: Tensor, how: Compression) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_RX, mass_RX) of head and tail, mass 0 marks unused slots; and draws_R."""
    p_RV = logp_RV.exp()
    top = p_RV.topk(min(how.top_k, p_RV.shape[1]), dim=-1)
    ids_RX, mass_RX = top.indices, torch.where(top.values >= how.min_prob, top.values, 0)
    if not how.tail:
        return ids_RX, mass_RX, torch.zeros(len(ids_RX), device=ids_RX.device)
    rest_RV = p_RV.scatter(1, ids_RX, torch.where(mass_RX > 0, 0.0, top.values))
    cumulative_RV = rest_RV.cumsum(dim=-1, dtype=torch.float64)
    total_R1 = cumulative_RV[:, -1:]
    draws_R1 = (total_R1 / TAIL_UNIT).ceil().clamp(min(2, how.tail), how.tail)
    slot_S = torch.arange(how.tail, device=logp_RV.device)
    point_RS = (slot_S + uniform_R.double()[:, None]) / draws_R1 * total_R1
    last_R1 = cumulative_RV.argmax(dim=-1, keepdim=True)
    tail_RS = torch.searchsorted(cumulative_RV, point_RS, right=True).minimum(last_R1)
    used_RS = (slot_S < draws_R1) & (total_R1 > 0)
    same_RSS = (tail_RS[:, :, None] == tail_RS[:, None, :]) & used_RS[:, None, :]
    first_RS = used_RS & ~same_RSS.tril(-1).any(dim=-1)
    each_RS = same_RSS.sum(dim=-1) * total_R1 / draws_R1
    drawn_RS = torch.where(first_RS, each_RS, 0).float()
    return torch.cat([ids_RX, tail_RS], dim=1), torch.cat([mass_RX, drawn_RS], dim=1), draws_R1.squeeze(1)


def _masses(code_RX: Tensor, keep_RX: Tensor) -> Tensor:
    """Masses of the codes, each row made to sum to one; float32."""
    mass_RX = torch.exp(code_RX.float() * -STEP) * keep_RX
    return mass_RX / mass_RX.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def expand(rows: PackedRows) -> SparseTarget:
    """The stored distributions, padded to the longest row with mass 0."""
    count_R = rows.count_R.to(torch.long)
    width = max(int(count_R.max()) if len(count_R) else 1, 1)
    slot_X = torch.arange(width)
    used_RX = slot_X < count_R[:, None]
    drawn_RX = used_RX & (slot_X >= (count_R - rows.drawn_R.to(torch.long))[:, None])
    ids_RX = torch.zeros(used_RX.shape, dtype=torch.long)
    code_RX = torch.zeros(used_RX.shape)
    ids_M = rows.low_M.to(torch.long)
    if len(rows.high_M):
        ids_M |= rows.high_M.to(torch.long) << 16
    ids_RX[used_RX], code_RX[used_RX] = ids_M, rows.code_M.to(torch.float32)
    mass_RX = _masses(code_RX, used_RX)
    code_RX[drawn_RX] = rows.logp_N.to(torch.float32)
    draws_R = rows.draws_R.to(torch.float32)
    # a dropped tail, or a single draw, leaves no trace of its error
    known = bool((draws_R >= 2).all())
    scatter = Scatter(code_RX * -STEP, drawn_RX, draws_R, STEP) if known else None
    return SparseTarget(ids_RX, mass_RX, rows.negentropy_R, scatter)
