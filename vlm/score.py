"""Task scorers and intervals. Pure functions; NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def exact_match(prediction: str, answer: str) -> bool:
    """Equal after collapsing white space and case."""
    return " ".join(prediction.split()).casefold() == " ".join(answer.split()).casefold()


def bootstrap_interval(
    scores: Sequence[float], level: float = 0.95, rounds: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-sample scores.

    Raises:
        ValueError: `scores` is empty.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no scores")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, values.size, (rounds, values.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
