"""The digits task is reproducible, its answers are right, and its splits share no scan."""

from __future__ import annotations

import collections

import numpy as np

from vlm import digits, score


def test_splits_share_no_scan_and_cover_all() -> None:
    parts = [set(digits.scan_indices(split).tolist()) for split in ("train", "validation", "test")]
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 1797
    assert len(parts[2]) == digits.TEST_SCANS


def test_samples_are_reproducible_and_streams_differ() -> None:
    one, again = digits.sample("test", 17), digits.sample("test", 17)
    assert one.image.tobytes() == again.image.tobytes()
    assert (one.question, one.answer) == (again.question, again.answer)
    assert digits.sample("train", 17).image.tobytes() != one.image.tobytes()
    assert digits.sample("test", 17, seed=1).image.tobytes() != one.image.tobytes()


def expected(question: str, d: tuple[int, int, int, int]) -> str:
    """The answer worked out from the words of the question alone."""
    a, b, c, e = d
    if "largest" in question or "highest" in question:
        return str(max(d))
    for name, digit in zip(digits.PLACES, d, strict=True):
        if name in question:
            return str(digit)
    pairs = {"top row": (a, b), "bottom row": (c, e), "left column": (a, c), "right column": (b, e)}
    pair = next(value for name, value in pairs.items() if name in question)
    return f"{pair[0]} + {pair[1]} = {sum(pair)}" if "sum" in question or "Add" in question else f"{pair[0]} {pair[1]}"


def test_answers_follow_from_question_and_digits() -> None:
    kinds: collections.Counter[str] = collections.Counter()
    for index in range(600):
        sample = digits.sample("test", index)
        kinds[sample.kind] += 1
        assert sample.answer == expected(sample.question, sample.digits)
    assert set(kinds) == set(digits.KINDS)
    assert min(kinds.values()) > 30


def test_each_cell_shows_its_own_scan() -> None:
    images, labels = digits._scans()
    sample = digits.sample("test", 4)
    for place, digit in enumerate(sample.digits):
        left, top = digits.CELL * (place % 2), digits.CELL * (place // 2)
        cell = np.asarray(sample.image.convert("L").crop((left, top, left + digits.CELL, top + digits.CELL)), float)
        small = cell.reshape(8, 4, 8, 4).mean(axis=(1, 3))
        candidates = digits.scan_indices("test")
        nearest = candidates[np.abs(images[candidates] - small).mean(axis=(1, 2)).argmin()]
        assert labels[nearest] == digit


def test_bootstrap_interval_covers_the_mean_and_narrows() -> None:
    few, many = [1.0, 0.0] * 10, [1.0, 0.0] * 1000
    low, high = score.bootstrap_interval(few)
    assert low < 0.5 < high
    narrow = score.bootstrap_interval(many)
    assert narrow[1] - narrow[0] < (high - low) / 5
    assert score.bootstrap_interval([1.0] * 50) == (1.0, 1.0)


def test_exact_match_ignores_case_and_spacing_only() -> None:
    assert score.exact_match(" 3  +  4 = 7 ", "3 + 4 = 7")
    assert not score.exact_match("34", "3 4")
