"""logits_V -> token id. NumPy only; the same for every backend, so that greedy answers can be compared."""

from __future__ import annotations

import numpy as np

from runtime.api import Logits, Sampling


class Sampler:
    """Draws the tokens of one request; its random state belongs to that request alone."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        # greedy requests do not pay for seeding: it takes milliseconds the first time
        self._rng = None if sampling.greedy else np.random.default_rng(sampling.seed)

    def __call__(self, logits_V: Logits) -> int:
        if self._rng is None:
            return int(np.argmax(logits_V))
        scaled_V = logits_V.astype(np.float64) / self._sampling.temperature
        order_V = np.argsort(-scaled_V, kind="stable")
        if self._sampling.top_k:
            order_V = order_V[: self._sampling.top_k]
        weights = np.exp(scaled_V[order_V] - scaled_V[order_V[0]])
        probabilities = weights / weights.sum()
        # keep the smallest set that reaches top_p: a token stays if the mass before it is still short of it
        kept = np.cumsum(probabilities) - probabilities < self._sampling.top_p
        probabilities = probabilities[kept] / probabilities[kept].sum()
        return int(self._rng.choice(order_V[kept], p=probabilities))
