"""Lists of measurements -> summaries that claim no more than the sample size allows. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# MLPerf asks for 64 queries before it reports a p90 and 662 before a p99: both are where p^n falls below this
CHANCE_TO_MISS_TAIL = 0.0013


def needed_for(percentile: int) -> int:
    """Smallest sample size at which a tail percentile is reported (p90: 64, p95: 130, p99: 662)."""
    return math.ceil(math.log(CHANCE_TO_MISS_TAIL) / math.log(percentile / 100))


def summary(values: Sequence[float], independent: int | None = None) -> dict[str, float | int | None]:
    """n, mean, std, min, p50, p90, p95, p99, max; null where n is too small for the claim, or nothing was measured.

    Args:
        independent: how many requests the values come from, where one gives several: that many decide about the tail.
    """
    n = len(values)
    trusted = n if independent is None else min(n, independent)
    array = np.asarray(values, np.float64)
    result: dict[str, float | int | None] = {"n": n}
    result["mean"] = float(array.mean()) if n else None
    result["std"] = float(array.std(ddof=1)) if n > 1 else None
    result["min"] = float(array.min()) if n else None
    result["p50"] = float(np.percentile(array, 50)) if n else None
    for percentile in (90, 95, 99):
        enough = trusted >= needed_for(percentile)
        result[f"p{percentile}"] = float(np.percentile(array, percentile)) if enough else None
    result["max"] = float(array.max()) if n else None
    return result


def variation(values: Sequence[float]) -> float:
    """Coefficient of variation (standard deviation / mean); 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / np.mean(values))


def drift_percent_per_minute(times_s: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of a line through the values over time, relative to their mean; None for fewer than three values."""
    if len(values) < 3 or max(times_s) == min(times_s):
        return None
    slope = np.polyfit(times_s, values, 1)[0]
    return float(100 * 60 * slope / np.mean(values))
