"""Summaries that claim no more than n allows, and the known measurement mistakes of other tools."""

from __future__ import annotations

import pytest

from runtime.api import Done, Span, Token, Usage
from runtime.latency import timing
from runtime.stats import drift_percent_per_minute, needed_for, summary, variation


def test_tail_percentiles_need_enough_samples() -> None:
    assert (needed_for(90), needed_for(95), needed_for(99)) == (64, 130, 662)
    few, some, many = summary(list(range(63))), summary(list(range(64))), summary(list(range(662)))
    assert few["p50"] == 31.0
    assert few["p90"] is None
    assert some["p90"] == pytest.approx(56.7)
    assert some["p99"] is None
    assert many["p99"] == pytest.approx(654.39)


def test_nothing_measured_is_null_not_zero() -> None:
    empty = summary([])
    assert empty.pop("n") == 0
    assert set(empty.values()) == {None}
    assert summary([2.0])["std"] is None


def test_variation_and_drift() -> None:
    assert variation([10.0, 10.0, 10.0]) == 0.0
    assert variation([9.0, 11.0]) == pytest.approx(0.1414, rel=1e-3)
    assert drift_percent_per_minute([0, 30, 60], [9.0, 10.0, 11.0]) == pytest.approx(20.0)
    assert drift_percent_per_minute([0, 1], [1.0, 2.0]) is None


def test_time_per_token_is_not_biased_by_the_first_token() -> None:
    """32 tokens, one every 10 ms after a first one at 100 ms: 10 ms, not 310 / 32."""
    spans = [Span("prefill", 0, 100_000_000)]
    tokens = [Token(1, "x", 100_000_000)]
    for i in range(31):
        end = 100_000_000 + 10_000_000 * (i + 1)
        spans.append(Span("decode", end - 10_000_000, end, 1))
        tokens.append(Token(1, "x", end))
    got = timing([*tokens, Done("length", "x" * 32, Usage(9, 4, 0, 32), 0, tuple(spans))])
    assert (got.ttft_ms, got.tpot_ms, got.completion_tokens) == (100.0, 10.0, 32)


def test_tokens_without_visible_text_count() -> None:
    spans = (Span("prefill", 0, 10), Span("decode", 10, 20), Span("decode", 20, 30))
    events = [Token(1, "", 10), Token(2, "", 20), Token(3, "😀", 30), Done("stop", "😀", Usage(1, 0, 0, 3), 0, spans)]
    assert len(timing(events).itl_ms) == 2


def test_one_token_has_no_time_per_token() -> None:
    done = Done("stop", "", Usage(1, 0, 0, 1), 0, (Span("prefill", 0, 10),))
    assert timing([Token(1, "", 10), done]).tpot_ms is None
    assert timing([Done("cancelled", "", Usage(0, 0, 0, 0), 0, (Span("queue", 0, 1),))]).ttft_ms is None
