"""KPOD's token weigher (arXiv 2405.16064): how much each token of a reasoning matters to the answer.

    e = SelfAttention(Emb(r))            with the student's own embedding table, frozen
    w_j = sigmoid(MLP(e_j))              probability that token j is kept
    m_j = relaxed Bernoulli(w_j)         a keep mask with a gradient
    L_p = - sum over prefixes k of log P(y | x, r[m]_<k)
    L_m = sum_j m_j
    L   = L_p + alpha L_m

A masked token's embedding is m e + (1 - m) e_mask, so L_p reaches w. (An unofficial implementation puts other token ids in
place instead: then only L_m acts, and all weights decay.) Of the prefixes a few are drawn, and L_p is scaled up to all.

The attention looks back only, of which the paper says nothing. A weigher that saw the whole reasoning told the predictor, by
which fillers of a prefix it kept, what comes behind the prefix, and the weights of those fillers rose with training.

Shape legend: B = samples, R = rationale tokens, X = B x prefixes drawn, T = tokens of the conversation, D = hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEADS, TEMPERATURE = 4, (1.0, 0.5)
# share of the steps in which a kept token costs nothing yet, and the keep probability's logit that training begins with
FREE, START = 0.5, 2.0


class Weigher(nn.Module):
    """One attention layer over the frozen embeddings of a rationale, and an MLP to one number a token.

    Args:
        hidden: D, of the embedding table.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, HEADS if hidden % HEADS == 0 else 1, batch_first=True)
        self.score = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden // 2), nn.GELU())
        self.last = nn.Linear(hidden // 2, 1)
        nn.init.constant_(self.last.bias, START)

    def forward(self, embeds_BRD: Tensor, real_BR: Tensor) -> Tensor:
        """logit_BR of w."""
        normed_BRD = self.norm(embeds_BRD)
        # a rationale of padding only still needs one key
        hidden_BR = ~real_BR & real_BR.any(dim=1, keepdim=True)
        later_RR = torch.ones(*hidden_BR.shape[1:] * 2, dtype=torch.bool, device=hidden_BR.device).triu(1)
        mixed_BRD, _ = self.attention(
            normed_BRD,
            normed_BRD,
            normed_BRD,
            key_padding_mask=hidden_BR,
            attn_mask=later_RR,
            need_weights=False,
        )
        logit_BR: Tensor = self.last(self.score(normed_BRD + mixed_BRD))[..., 0]
        return logit_BR


def concrete(logit_BR: Tensor, uniform_BR: Tensor, temperature: float) -> Tensor:
    """Relaxed Bernoulli draws m_BR (Maddison et al., 2017), differentiable in the logits.

    Args:
        uniform_BR: numbers in (0, 1).
    """
    noise_BR = uniform_BR.clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((logit_BR + noise_BR.log() - (1 - noise_BR).log()) / temperature)


def masked(embeds_BRD: Tensor, mask_BR: Tensor, blank_D: Tensor) -> Tensor:
    """m e + (1 - m) e_mask."""
    return blank_D + mask_BR[..., None] * (embeds_BRD - blank_D)


def draw_prefixes(real_BR: Tensor, count: int, uniform_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Prefixes of each rationale, evenly spread from one random offset, and what each stands for.

    Returns:
        (keep_XR, scale_X): tokens of the prefix, from 1 to all of them; number of prefixes / prefixes drawn.
    """
    length_B = real_BR.sum(dim=1).clamp(min=1)
    slot_P = torch.arange(count, device=real_BR.device)
    # strata: each of the count parts of 1 .. n gives one prefix, so the mean over draws is that over all prefixes
    at_BP = ((slot_P + uniform_BP) / count * length_B[:, None]).floor().long() + 1
    rank_BR = real_BR.long().cumsum(dim=1)
    keep_BPR = real_BR[:, None] & (rank_BR[:, None] <= at_BP.clamp(max=length_B[:, None])[..., None])
    scale_B = length_B / count
    return keep_BPR.flatten(0, 1), scale_B.repeat_interleave(count)


Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Losses:
    """Means over the samples of a batch."""

    prediction: Tensor
    mask: Tensor

    def total(self, alpha: float) -> Tensor:
        return self.prediction + alpha * self.mask


def losses(
    weigher: Weigher,
    embeds_BRD: Tensor,
    real_BR: Tensor,
    blank_D: Tensor,
    predict: Predict,
    prefixes: int,
    temperature: float,
    generator: torch.Generator,
) -> Losses:
    """L_p and L_m of a batch.

    Args:
        predict: (masked embeddings_XRD, keep_XR) -> minus log probability of the answer, cost_X.
    """
    logit_BR = weigher(embeds_BRD, real_BR)
    uniform_BR = torch.rand(logit_BR.shape, generator=generator).to(logit_BR)
    uniform_BP = torch.rand(len(logit_BR), prefixes, generator=generator).to(logit_BR)
    mask_BR = concrete(logit_BR, uniform_BR, temperature)
    keep_XR, scale_X = draw_prefixes(real_BR, prefixes, uniform_BP)
    shown_XRD = masked(embeds_BRD, mask_BR, blank_D).repeat_interleave(prefixes, dim=0)
    cost_X = predict(shown_XRD, keep_XR)
    count = len(real_BR)
    return Losses((cost_X * scale_X).sum() / count, (mask_BR * real_BR).sum() / count)


def price(step: int, steps: int, alpha: float) -> float:
    """alpha, once the predictor has had time to learn to read a reasoning.

    Until it can, only the price would act, however small (Adam makes up for size): all weights would fall to zero, and a
    predictor that is shown nothing would never learn.
    """
    return alpha if step >= FREE * steps else 0.0


def anneal(step: int, steps: int) -> float:
    """Temperature of the relaxation, from 1 down to 0.5."""
    first, last = TEMPERATURE
    return first + (last - first) * step / max(steps - 1, 1)


def fit(
    trained: list[tuple[list[nn.Parameter], float]],
    loss_of: Callable[[int, float], Losses],
    alpha: float,
    steps: int,
    look: Callable[[int, Losses], Any],
) -> None:
    """Train weigher and predictor together.

    Args:
        trained: (parameters, learning rate) of each.
        loss_of: (step, temperature) -> losses of that step's batch.
        look: told of every step.
    """
    optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in trained], weight_decay=0.0)
    every = [p for parameters, _ in trained for p in parameters]
    for step in range(steps):
        found = loss_of(step, anneal(step, steps))
        found.total(price(step, steps, alpha)).backward()
        nn.utils.clip_grad_norm_(every, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        look(step, found)
