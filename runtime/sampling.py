"""logits_V -> token id. NumPy only; the same for every backend, so that greedy answers can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from runtime.api import Constraint, Logits, Sampling
from vlm.errors import UserError


class Sampler:
    """Draws the tokens of one request; its random state and history belong to that request alone.

    Order: constraint, repetition penalty, temperature, top-k, top-p, min-p, as in the Hugging Face generation loop.

    `draw` is the call itself, or the shortest one that does the same.

    Args:
        prompt_ids: tokens that count as seen for the repetition penalty.
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int] = (), constraint: Constraint | None = None
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._seen = set(prompt_ids) if sampling.repetition_penalty != 1 else None
        # greedy requests do not pay for seeding: it takes milliseconds the first time
        self._rng = None if sampling.greedy else np.random.default_rng(sampling.seed)
        plain = sampling.greedy and constraint is None and self._seen is None
        self.draw: Callable[[Logits], int] = likeliest if plain else self

    def __call__(self, logits_V: Logits) -> int:
        if self._constraint is not None:
            logits_V = self._constraint.mask(logits_V)
            if np.isneginf(logits_V).all():
                raise UserError("no token of this model can go on under the grammar; change the grammar or schema")
        if self._seen is not None:
            logits_V = penalised(logits_V, self._seen, self._sampling.repetition_penalty)
        token_id = int(np.argmax(logits_V)) if self._rng is None else self._draw(logits_V, self._rng)
        if self._seen is not None:
            self._seen.add(token_id)
        if self._constraint is not None:
            self._constraint.accept(token_id)
        return token_id

    def _draw(self, logits_V: Logits, rng: np.random.Generator) -> int:
        sampling = self._sampling
        scaled_V = logits_V.astype(np.float64) / sampling.temperature
        order_V = np.argsort(-scaled_V, kind="stable")
        if sampling.top_k:
            order_V = order_V[: sampling.top_k]
        weights = np.exp(scaled_V[order_V] - scaled_V[order_V[0]])
        probabilities = weights / weights.sum()
        # keep the smallest set that reaches top_p: a token stays if the mass before it is still short of it
        kept = np.cumsum(probabilities) - probabilities < sampling.top_p
        kept &= probabilities >= sampling.min_p * probabilities[0]
        probabilities = probabilities[kept] / probabilities[kept].sum()
        return int(rng.choice(order_V[kept], p=probabilities))


def likeliest(logits_V: Logits) -> int:
    return int(logits_V.argmax())


def penalised(logits_V: Logits, seen: set[int], penalty: float) -> Logits:
    """Logits of seen tokens divided by the penalty if positive, multiplied if negative (CTRL, as everybody runs it)."""
    at = [token_id for token_id in seen if 0 <= token_id < len(logits_V)]
    changed_V: Logits = logits_V.copy()
    values = changed_V[at]
    changed_V[at] = np.where(values > 0, values / penalty, values * penalty)
    return changed_V
