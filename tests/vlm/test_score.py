"""Intervals and paired tests against closed forms, exhaustive enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vlm.score import bootstrap_interval, mcnemar, paired, share_interval, summary_interval
from vlm.scoring.benchmarks import BENCHMARKS
from vlm.scoring.summary import Record, Summary, Unit


def _summary(values: list[float], statistic: str = "mean", strata: list[str] | None = None) -> Summary:
    units = tuple(Unit(str(i), (strata or [""] * len(values))[i], (v,)) for i, v in enumerate(values))
    return Summary(float(np.mean(values)), "x", "share", statistic, len(values), units, {})  # type: ignore[arg-type]


def test_counting_bootstrap_is_the_plain_bootstrap() -> None:
    """Drawing counts of different values has the distribution of drawing the values: same interval up to noise."""
    rng = np.random.default_rng(0)
    for values in (list(map(float, rng.integers(0, 2, 400))), list(rng.random(300))):
        plain, counted = bootstrap_interval(values, rounds=4000), share_interval(values)
        assert plain == pytest.approx(counted, abs=0.01)
        assert summary_interval(_summary(values)) == pytest.approx(plain, abs=0.01)


@pytest.mark.parametrize(("n", "bound"), [(10, 0.6915), (200, 0.9817), (1, 0.025)])
def test_all_right_is_not_certainly_right(n: int, bound: float) -> None:
    """Ten of ten leave room for a model that is wrong at three of ten; drawing the ten anew would not."""
    for interval in (share_interval([1.0] * n), summary_interval(_summary([1.0] * n))):
        assert interval == pytest.approx((bound, 1.0), abs=1e-4)
    for interval in (share_interval([0.0] * n), summary_interval(_summary([0.0] * n))):
        assert interval == pytest.approx((0.0, 1 - bound), abs=1e-4)
    assert share_interval([0.5] * n) == (0.5, 0.5)


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        low, high = share_interval(list(map(float, rng.random(200) < 0.7)))
        covered += low <= 0.7 <= high
    assert 270 <= covered <= 297  # 95 % of 300 is 285; a percentile bootstrap runs a little short


def test_strata_are_resampled_within_themselves() -> None:
    """A sum over strata without spread inside them has no interval, however much the strata differ."""
    summary = _summary([0.0] * 10 + [100.0] * 10, "sum", ["a"] * 10 + ["b"] * 10)
    assert summary_interval(summary) == (100.0, 100.0)


@pytest.mark.parametrize(("better", "worse"), list(itertools.product(range(7), repeat=2)))
def test_mcnemar_against_enumeration(better: int, worse: int) -> None:
    n = better + worse
    outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
    extreme = sum(abs(heads - n / 2) >= abs(better - n / 2) for heads in outcomes)
    assert mcnemar(better, worse) == pytest.approx(min(1.0, extreme / 2**n))


def test_mcnemar_of_many() -> None:
    assert mcnemar(500, 500) == 1
    below, above = mcnemar(440, 559), mcnemar(441, 560)  # on both sides of where logarithms take over
    assert below == pytest.approx(above, rel=0.05)


def _records(rights: list[float]) -> list[Record]:
    return [{"id": str(i), "group": {}, "score": r} for i, r in enumerate(rights)]


def test_a_copy_never_differs_and_a_clear_loss_does() -> None:
    rng = np.random.default_rng(2)
    first = list(map(float, rng.random(300) < 0.9))
    worse = [0.0 if rng.random() < 0.1 else v for v in first]
    summarise = BENCHMARKS["gqa"].summarise
    same = paired(summarise(_records(first)), summarise(_records(first)))
    assert (same.p, same.difference, same.interval, same.better, same.worse) == (1.0, 0.0, (0.0, 0.0), 0, 0)
    lost = paired(summarise(_records(first)), summarise(_records(worse)))
    assert lost.test == "McNemar"
    assert lost.p < 1e-4
    assert lost.interval[1] < 0
    assert lost.worse > 0 == lost.better


def test_the_test_is_level_when_nothing_differs() -> None:
    """Two runs of one quality: p below 0.05 in no more than about 5 % of cases, with either test."""
    rng = np.random.default_rng(3)
    mcnemars = permutations = 0
    for _ in range(200):
        a, b = (list(map(float, rng.random(100) < 0.6)) for _ in range(2))
        mcnemars += paired(_summary(a), _summary(b), rounds=10).p < 0.05
        soft = [[0.9 * v + 0.05 for v in values] for values in (a, b)]
        result = paired(_summary(soft[0]), _summary(soft[1]), rounds=10)
        assert result.test == "permutation"
        permutations += result.p < 0.05
    bound = 200 * 0.05 + 4 * math.sqrt(200 * 0.05 * 0.95)
    assert mcnemars <= bound
    assert permutations <= bound


def test_permutation_of_f1_against_enumeration() -> None:
    """All 2^8 ways to exchange two runs' answers, against the random ones."""
    labels = [1, 1, 1, 1, 0, 0, 0, 0]
    first, second = [1, 1, 1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0, 1, 1]

    def records(said: list[int]) -> list[Record]:
        return [
            {
                "id": str(i),
                "group": {"split": "random"},
                "truth": {"answer": "yes" if y else "no"},
                "parsed": "yes" if s else "no",
                "score": float(s == y),
            }
            for i, (s, y) in enumerate(zip(said, labels, strict=True))
        ]

    def f1(said: list[int]) -> float:
        return BENCHMARKS["pope"].summarise(records(said)).score

    found = paired(BENCHMARKS["pope"].summarise(records(first)), BENCHMARKS["pope"].summarise(records(second)))
    seen = f1(second) - f1(first)
    exchanged = []
    for swaps in itertools.product((False, True), repeat=8):
        a = [y if s else x for x, y, s in zip(first, second, swaps, strict=True)]
        b = [x if s else y for x, y, s in zip(first, second, swaps, strict=True)]
        exchanged.append(abs(f1(b) - f1(a)) >= abs(seen) - 1e-12)
    assert found.difference == pytest.approx(seen)
    assert found.p == pytest.approx(sum(exchanged) / len(exchanged), abs=0.02)


@pytest.mark.parametrize(("truth", "expected"), [("yes", 2 / 3), ("no", 2 / 3)])
def test_a_question_that_was_not_asked_is_wrong_in_f1_too(truth: str, expected: float) -> None:
    """An empty reply is read as no, which would be right for half of the questions."""
    asked = {"id": "a", "group": {"split": "s"}, "truth": {"answer": "yes"}, "parsed": "yes", "score": 1.0}
    lost = {**asked, "id": "b", "truth": {"answer": truth}, "parsed": None, "score": 0.0, "error": "image_missing"}
    assert BENCHMARKS["pope"].summarise([asked, lost]).score == pytest.approx(expected)


def test_runs_over_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="1 questions are only in one"):
        paired(_summary([1.0, 0.0]), _summary([1.0]))


def test_no_scores_are_refused() -> None:
    for compute in (bootstrap_interval, share_interval):
        with pytest.raises(ValueError, match="no scores"):
            compute([])
    with pytest.raises(ValueError, match="no units"):
        summary_interval(_summary([1.0]).__class__(0.0, "x", "share", "mean", 0, (), {}))
