"""Intervals of scores and paired tests between two runs. Needs NumPy; the scorers themselves are in `vlm.scoring`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from vlm.scoring.summary import Statistic, Summary, Unit
from vlm.scoring.text import exact_match

__all__ = ["Paired", "bootstrap_interval", "exact_match", "paired", "share_interval", "summary_interval"]

F64 = npt.NDArray[np.float64]
CHUNK = 1 << 22  # random numbers drawn at a time
PERMUTATIONS = 20_000


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


# Shape legend below: R = rounds, S = strata, K = values per unit, N = units, U = different units.
def _mean(means_RSK: F64) -> F64:
    return means_RSK[:, 0, 0]


def _sum(means_RSK: F64) -> F64:
    return np.asarray(means_RSK[:, :, 0].sum(axis=1))


def _macro_f1(means_RSK: F64) -> F64:
    twice = 2 * means_RSK[:, :, 0]
    lower = twice + means_RSK[:, :, 1] + means_RSK[:, :, 2]
    return np.asarray(np.divide(twice, lower, out=np.zeros_like(twice), where=lower > 0).mean(axis=1))


STATISTICS: dict[Statistic, Callable[[F64], F64]] = {"mean": _mean, "sum": _sum, "macro_f1": _macro_f1}


def summary_interval(summary: Summary, level: float = 0.95, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a benchmark's score: units are drawn anew within their stratum; where all are right, or
    all wrong, the exact bound as in `share_interval`.

    Raises:
        ValueError: no units.
    """
    strata, rng = _strata(summary.units), np.random.default_rng(seed)
    if summary.statistic == "mean" and (bound := _all_alike(np.concatenate(strata), level)):
        return bound
    means_RSK = np.stack([_resampled(rows_NK, rounds, rng) for rows_NK in strata], axis=1)
    low, high = np.quantile(STATISTICS[summary.statistic](means_RSK), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(scores: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """`bootstrap_interval` for many samples of few different values, in time that does not grow with their number.

    Of right and wrong answers that are all one or the other, drawing anew says nothing: there the exact bound is given
    (Clopper and Pearson 1934), e.g. 0.982 to 1 for 200 of 200.
    """
    rows_N1 = np.asarray(scores, dtype=np.float64)[:, None]
    if rows_N1.size == 0:
        raise ValueError("no scores")
    if bound := _all_alike(rows_N1, level):
        return bound
    means_R1 = _resampled(rows_N1, 2000, np.random.default_rng(seed))
    low, high = np.quantile(means_R1[:, 0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _all_alike(rows_NK: F64, level: float) -> tuple[float, float] | None:
    """Clopper and Pearson's interval of N successes in N, or none in N; None for anything else."""
    same = rows_NK[0, 0]
    if same not in (0.0, 1.0) or (rows_NK != same).any():
        return None
    bound = float(((1 - level) / 2) ** (1 / len(rows_NK)))
    return (bound, 1.0) if same else (0.0, 1 - bound)


def _strata(units: Sequence[Unit]) -> list[F64]:
    """rows_NK per stratum, strata in the order of their names."""
    if not units:
        raise ValueError("no units")
    rows: dict[str, list[tuple[float, ...]]] = {}
    for unit in units:
        rows.setdefault(unit.stratum, []).append(unit.values)
    return [np.asarray(rows[name], np.float64) for name in sorted(rows)]


def _resampled(rows_NK: F64, rounds: int, rng: np.random.Generator) -> F64:
    """means_RK of `rounds` samples of N rows drawn with replacement.

    Drawing N rows is drawing how often each different row comes up, and there are few different ones.
    """
    values_UK, counts_U = np.unique(rows_NK, axis=0, return_counts=True)
    n = len(rows_NK)
    step = max(1, CHUNK // len(counts_U))
    parts = [
        rng.multinomial(n, counts_U / n, size=min(step, rounds - start)) @ values_UK / n
        for start in range(0, rounds, step)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Paired:
    """Two runs over the same questions.

    Attributes:
        difference: second minus first, with its bootstrap `interval`.
        better, worse: units on which the second run did better, and worse.
        p: chance of a difference at least as large if the runs were alike (two-sided).
        test: `McNemar`, exact, where every unit is right or wrong; otherwise a `permutation` test.
    """

    difference: float
    interval: tuple[float, float]
    better: int
    worse: int
    p: float
    test: Literal["McNemar", "permutation"]
    n: int


def paired(first: Summary, second: Summary, level: float = 0.95, rounds: int = 2000, seed: int = 0) -> Paired:
    """Compare two runs unit by unit.

    Raises:
        ValueError: they did not answer the same questions.
    """
    before, after = ({(unit.stratum, unit.key): unit for unit in s.units} for s in (first, second))
    if set(before) != set(after) or first.statistic != second.statistic:
        raise ValueError(f"{len(set(before) ^ set(after))} questions are only in one of the runs")
    names = sorted(before)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for name in names:
        rows.setdefault(name[0], []).append((*before[name].values, *after[name].values))
    strata = [np.asarray(rows[stratum], np.float64) for stratum in sorted(rows)]
    statistic, width = STATISTICS[first.statistic], len(first.units[0].values)
    rng = np.random.default_rng(seed)
    drawn_RSJ = np.stack([_resampled(both_NJ, rounds, rng) for both_NJ in strata], axis=1)
    spread = statistic(drawn_RSJ[:, :, width:]) - statistic(drawn_RSJ[:, :, :width])
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    moved = np.concatenate([_gain(both_NJ, width) for both_NJ in strata])
    better, worse = int((moved > 0).sum()), int((moved < 0).sum())
    binary = first.statistic == "mean" and all(set(np.unique(both_NJ)) <= {0.0, 1.0} for both_NJ in strata)
    p = mcnemar(better, worse) if binary else _permutation(strata, width, statistic, rng)
    difference = second.score - first.score
    test: Literal["McNemar", "permutation"] = "McNemar" if binary else "permutation"
    return Paired(difference, (float(low), float(high)), better, worse, p, test, len(names))


def _gain(both_NJ: F64, width: int) -> F64:
    """Sign of the change of a unit; of counts (hit, wrong, missed), hits count for and the others against."""
    change_NK = both_NJ[:, width:] - both_NJ[:, :width]
    signs_K = np.array([1.0] + [-1.0] * (width - 1))
    return np.asarray(np.sign((change_NK * signs_K).sum(axis=1)))


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided McNemar test: are the units on which two runs differ split evenly?"""
    n, fewer = better + worse, min(better, worse)
    if not n:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**n)) if n < 1000 else min(1.0, 2 * _binomial_tail(n, fewer))


def _binomial_tail(n: int, k: int) -> float:
    """P(X <= k) for X ~ Binomial(n, 1/2), through logarithms."""
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    top = max(logs)
    return math.exp(top) * sum(math.exp(log - top) for log in logs)


def _permutation(strata: Sequence[F64], width: int, statistic: Callable[[F64], F64], rng: np.random.Generator) -> float:
    """Exchange the two runs' results unit by unit at random: how often is the difference as large as the real one?"""
    moved_RSK, first_SK, second_SK = [], [], []
    for both_NJ in strata:
        values_UJ, counts_U = np.unique(both_NJ, axis=0, return_counts=True)
        change_UK = values_UJ[:, width:] - values_UJ[:, :width]
        swapped_RU = rng.binomial(counts_U, 0.5, size=(PERMUTATIONS, len(counts_U)))
        moved_RSK.append(swapped_RU @ change_UK / len(both_NJ))
        first_SK.append(both_NJ[:, :width].mean(axis=0))
        second_SK.append(both_NJ[:, width:].mean(axis=0))
    moved, first, second = np.stack(moved_RSK, axis=1), np.stack(first_SK)[None], np.stack(second_SK)[None]
    seen = abs(float((statistic(second) - statistic(first))[0]))
    chance = np.abs(statistic(second - moved) - statistic(first + moved))
    return float((1 + (chance >= seen - 1e-12).sum()) / (PERMUTATIONS + 1))
