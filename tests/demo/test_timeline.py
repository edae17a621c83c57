"""The breakdown says what the engine measured: exact on a clock that stands still, and safe to put on a page."""

from __future__ import annotations

import re
import threading

import pytest

from demo.instruments import Cost, Figure
from demo.timeline import Breakdown, break_down, cache_text, milliseconds, render
from runtime.api import STAGES, Done, EncodedImage, Event, Message, Sampling, Span, Token, Usage
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.images import question
from runtime.latency import Timing, timing

MS = 1_000_000


def answer(reply: str = "seven", **limits: int) -> list[Event]:
    clock = VirtualClock()
    script = FakeScript(reply, prepare_ns=2 * MS, encode_ns=5 * MS, prefill_ns=7 * MS, step_ns=3 * MS, clock=clock)
    with Engine(FakeBackend(script), clock) as engine:
        return list(engine.generate([Message("user", ("hi",))], Sampling(**limits)))


def table_ms(html: str) -> dict[str, float]:
    return {stage: float(ms) for stage, ms in re.findall(r'data-stage="(\w+)" data-ms="([\d.]+)"', html)}


def test_every_stage_has_the_time_the_backend_took() -> None:
    view = break_down(answer())
    assert {s.stage: s.ms for s in view.stages} == {
        "queue": 0.0,
        "image_decode": 0.0,
        "preprocess": 2.0,
        "vision_encode": 0.0,
        "prefill": 7.0,
        "decode": 15.0,
        "detokenize": 0.0,
    }
    assert view.total_ms == view.sum_ms == 24.0
    assert view.timing.ttft_ms == 9.0
    assert view.timing.tpot_ms == 3.0
    assert view.tokens_per_s == pytest.approx(1000 / 3)
    assert view.timing.completion_tokens == 6  # five letters and the end mark


def test_the_page_holds_the_same_numbers() -> None:
    html = render(break_down(answer()), "m")
    stages = table_ms(html)
    assert list(stages) == list(STAGES)
    total = re.search(r'data-total-ms="([\d.]+)"', html)
    assert total is not None
    assert sum(stages.values()) == pytest.approx(float(total[1]), rel=1e-6)
    assert "sum of stages" in html
    assert "stages add up to 24.0 of 24.0 ms" in html
    assert html.count('scope="row"') == len(STAGES) + 1
    assert 'aria-label="Stages: queue 0.00 ms, image decode 0.00 ms, preprocess 2.00 ms' in html


def test_what_a_person_named_is_escaped() -> None:
    html = render(break_down(answer()), '<script>alert("x")</script>')
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_first_answer_and_early_ends_are_said() -> None:
    assert "first answer since loading" in render(break_down(answer()), "m", first=True)
    assert "first answer" not in render(break_down(answer()), "m")
    assert "cut at the token limit" in render(break_down(answer(max_new_tokens=2)), "m")


def test_an_answer_stopped_before_its_first_token_has_no_speed() -> None:
    cancel = threading.Event()
    cancel.set()
    with Engine(FakeBackend(), VirtualClock()) as engine:
        view = break_down(list(engine.generate([Message("user", ("hi",))], cancel=cancel)))
    html = render(view, "m")
    assert view.timing.ttft_ms is view.timing.tpot_ms is view.tokens_per_s is None
    assert html.count("n/a") == 3
    assert "stopped by you" in html


def test_one_token_has_no_time_per_token() -> None:
    view = break_down(answer(max_new_tokens=1))
    assert view.timing.tpot_ms is None
    assert view.timing.ttft_ms == 9.0


def test_a_cached_stage_is_marked() -> None:
    spans = (Span("queue", 0, MS), Span("vision_encode", MS, 2 * MS, 16, cached=True))
    done = Done("stop", "", Usage(20, 16, 16, 1), 0, spans)
    html = render(break_down([Token(1, "", 2 * MS), done]), "m")
    assert html.count(", from cache") == 2  # bar, label
    assert "(from cache)" in html  # table


def test_what_came_from_a_cache_is_said_in_numbers() -> None:
    assert cache_text(timed(cached_tokens=17, cached_images=1)) == "17 of 20 tokens, 1 image"
    assert cache_text(timed(cached_tokens=0, cached_images=2)) == "2 images"
    assert cache_text(timed(cached_tokens=0, cached_images=0)) == "nothing"
    assert "does not say" in cache_text(timed(cached_tokens=None, cached_images=None))


def timed(cached_tokens: int | None, cached_images: int | None) -> Timing:
    done = Done("stop", "", Usage(20, 16, cached_tokens, 1, cached_images), 0, (Span("queue", 0, MS),))
    return timing([Token(1, "", MS), done])


def test_what_was_not_measured_is_absent_and_says_why() -> None:
    cost = Cost(Figure(None, "no bandwidth"), Figure(None, "no <meter>"))
    html = render(break_down(answer()), "m", cost=cost)
    assert figure(html, "MBU") == '<abbr title="no bandwidth">n/a</abbr>'
    assert figure(html, "energy") == '<abbr title="no &lt;meter&gt;">n/a</abbr>'
    cached = render(break_down(answer()), "m", cost=Cost(Figure(None, "1 MB", "in cache"), Figure(None)))
    assert figure(cached, "MBU") == '<abbr title="1 MB">in cache</abbr>'
    measured = render(break_down(answer()), "m", cost=Cost(Figure(0.416, "x"), Figure(1.2345, "y")))
    assert figure(measured, "MBU") == "42<span> %</span>"
    assert figure(measured, "energy") == "1.23<span> J</span>"


def figure(html: str, name: str) -> str:
    found = re.search(rf'data-figure="{name}" title="[^"]*"><dt>{name}</dt><dd>(.*?)</dd>', html)
    assert found is not None
    return found[1]


def test_an_unfinished_request_is_refused() -> None:
    with pytest.raises(ValueError, match="did not finish"):
        break_down([Token(1, "a", 0)])


def test_a_real_image_fills_the_image_stages(png: bytes) -> None:
    with Engine(FakeBackend()) as engine:
        view: Breakdown = break_down(list(engine.generate([question("what ?", EncodedImage(png))])))
    assert view.timing.image_tokens > 0
    assert view.timing.stages_ms["image_decode"] > 0
    assert view.sum_ms == pytest.approx(view.total_ms, rel=0.05)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.00"), (0.1234, "0.12"), (9.99, "9.99"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_milliseconds(value: float, text: str) -> None:
    assert milliseconds(value) == text
