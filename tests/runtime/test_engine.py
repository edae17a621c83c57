"""The generation loop against a scripted backend on a clock that moves only when told to."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest
from PIL import Image as Pillow

from runtime.api import (
    ContextOverflow,
    Done,
    EncodedImage,
    EngineClosed,
    Event,
    Failed,
    Message,
    QueueFull,
    Sampling,
    Span,
    Token,
)
from runtime.backend_fake import END, IMAGE_TOKENS, FakeBackend, FakeScript
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.images import from_pillow, question
from runtime.latency import timing
from vlm.errors import BadImage

MS = 1_000_000


def fake(reply: object = "abc", queue_size: int = 8, **script: object) -> tuple[Engine, FakeBackend, VirtualClock]:
    clock = VirtualClock(start_ns=5 * MS)
    backend = FakeBackend(FakeScript(reply=reply, clock=clock, **script))  # type: ignore[arg-type]
    return Engine(backend, clock, queue_size), backend, clock


def picture(value: int = 0) -> object:
    return from_pillow(Pillow.new("RGB", (6, 4), (value, 1, 2)))


def run(engine: Engine, text: str = "hi", sampling: Sampling | None = None, **options: object) -> list[Event]:
    return list(engine.generate([question(text, picture())], sampling, **options))  # type: ignore[arg-type]


def last(events: Iterable[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done


def test_latencies_are_exactly_the_scripted_ones() -> None:
    engine, _, _ = fake("abc", prepare_ns=3 * MS, encode_ns=50 * MS, prefill_ns=20 * MS, step_ns=7 * MS)
    with engine:
        got = timing(run(engine))
    assert got.ttft_ms == 73.0
    assert got.tpot_ms == 7.0  # a, b, c and the end token: three gaps, not four
    assert got.itl_ms == (7.0, 7.0, 7.0)
    assert got.e2el_ms == 94.0
    assert got.completion_tokens == 4
    assert got.stages_ms == {
        "queue": 0.0,
        "preprocess": 3.0,
        "vision_encode": 50.0,
        "prefill": 20.0,
        "decode": 21.0,
        "detokenize": 0.0,
    }


def test_spans_tile_the_request() -> None:
    engine, _, _ = fake("some answer", prepare_ns=3, encode_ns=5, prefill_ns=7, step_ns=11)
    with engine:
        done = last(run(engine))
    assert done.spans[0].start_ns == done.received_ns
    assert all(a.end_ns == b.start_ns for a, b in zip(done.spans, done.spans[1:], strict=False))
    assert sum(s.tokens for s in done.spans if s.stage == "decode") == done.usage.completion_tokens - 1


def test_events_come_in_order_and_early_stages_are_announced() -> None:
    engine, backend, _ = fake("ok")
    with engine:
        events = run(engine)
    kinds = [event.stage if isinstance(event, Span) else type(event).__name__ for event in events]
    assert kinds == ["queue", "preprocess", "vision_encode", "prefill", "Token", "Token", "Token", "Done"]
    assert backend.calls == ["prepare", "encode", "sync", "prefill", "step", "step"]
    assert backend.closed


def test_usage_counts_token_ids() -> None:
    engine, _, _ = fake("é")
    with engine:
        events = run(engine, "hi")
    usage = last(events).usage
    assert (usage.prompt_tokens, usage.image_tokens) == (IMAGE_TOKENS + 3, IMAGE_TOKENS)
    assert (usage.cached_tokens, usage.completion_tokens) == (0, 3)
    assert [e.id for e in events if isinstance(e, Token)] == [*"é".encode(), END]


def test_text_only_request_skips_the_vision_tower() -> None:
    engine, backend, _ = fake("x")
    with engine:
        done = last(engine.generate([question("hi")]))
    assert "encode" not in backend.calls
    assert "vision_encode" not in timing([done]).stages_ms


def test_encoded_images_are_decoded_inside_the_request() -> None:
    import io

    buffer = io.BytesIO()
    Pillow.new("RGB", (9, 9)).save(buffer, "PNG")
    engine, _, _ = fake("x")
    with engine:
        done = last(engine.generate([question("hi", EncodedImage(buffer.getvalue()))]))
    assert [span.stage for span in done.spans][:3] == ["queue", "image_decode", "preprocess"]


def test_emoji_split_over_tokens_appears_whole() -> None:
    engine, _, _ = fake("a😀ñ")
    with engine:
        events = run(engine)
    texts = [event.text for event in events if isinstance(event, Token)]
    assert texts == ["a", "", "", "", "😀", "", "ñ", ""]
    assert last(events).text == "a😀ñ"


def test_answer_cut_inside_a_character_ends_with_a_replacement() -> None:
    engine, _, _ = fake("a😀")
    with engine:
        events = run(engine, sampling=Sampling(max_new_tokens=3))
    assert last(events).text == "a\ufffd"
    assert last(events).finish == "length"


def test_stop_string_across_tokens_is_never_shown() -> None:
    engine, backend, _ = fake("one STOP two")
    with engine:
        events = run(engine, sampling=Sampling(stop=("nothing", " STOP")))
    shown = "".join(event.text for event in events if isinstance(event, Token))
    assert shown == last(events).text == "one"
    assert last(events).finish == "stop"
    assert backend.calls.count("step") == len("one STOP") - 1


def test_half_a_stop_string_is_given_out_at_the_end() -> None:
    engine, _, _ = fake("wait ST")
    with engine:
        done = last(run(engine, sampling=Sampling(stop=("STOP",))))
    assert done.text == "wait ST"


def test_ignore_eos_gives_exactly_the_length_asked_for() -> None:
    engine, _, _ = fake("ab")
    with engine:
        done = last(run(engine, sampling=Sampling(max_new_tokens=9, ignore_eos=True)))
    assert (done.usage.completion_tokens, done.finish) == (9, "length")


def test_deadline_ends_the_answer_where_it_is() -> None:
    engine, _, _ = fake("abcdefgh", prepare_ns=10 * MS, prefill_ns=10 * MS, step_ns=10 * MS)
    with engine:
        done = last(run(engine, deadline_s=0.045))
    assert done.finish == "deadline"
    assert done.text == "abcd"  # tokens at 20, 30, 40, 50 ms: the one that crosses the line is kept


def test_deadline_passed_while_waiting_runs_nothing() -> None:
    engine, backend, _ = fake("abc")
    with engine:
        done = last(engine.generate([question("b")], deadline_s=0))
    assert (done.finish, backend.calls) == ("deadline", [])


def test_cancel_takes_effect_after_the_current_step() -> None:
    engine, backend, _ = fake("abcdefgh")
    cancel, events, finished = threading.Event(), list[object](), threading.Event()

    def listen(event: Event | Failed) -> None:  # runs between two steps, so there is nothing to race
        events.append(event)
        if isinstance(event, Token) and event.text == "c":
            cancel.set()
        if isinstance(event, Done | Failed):
            finished.set()

    with engine:
        engine.submit([question("hi")], listener=listen, cancel=cancel)
        assert finished.wait(60)
    assert isinstance(events[-1], Done)
    assert (events[-1].finish, events[-1].text) == ("cancelled", "abc")
    assert backend.calls.count("step") == 2


def test_cancel_takes_effect_between_two_images() -> None:
    cancel = threading.Event()

    class Interrupted(FakeBackend):
        def encode(self, images: Any) -> Any:
            cancel.set()
            return super().encode(images)

    backend = Interrupted(FakeScript(reply="abc"))
    with Engine(backend) as engine:
        images = [picture(value) for value in range(3)]
        done = last(engine.generate([question("hi", *images)], cancel=cancel))  # type: ignore[arg-type]
        assert (done.finish, done.text, backend.calls.count("encode")) == ("cancelled", "", 1)
        assert done.spans[-1].stage == "vision_encode", "the time of the finished picture is accounted for"
        again = last(engine.generate([question("hi", *images)]))  # type: ignore[arg-type]
    assert (again.text, again.usage.cached_images) == ("abc", 1), "the picture that was finished is kept"


def test_closing_the_iterator_cancels_only_its_own_request() -> None:
    engine, _, _ = fake(lambda messages: messages[0].content[-1] * 1000)
    with engine:
        events = engine.generate([Message("user", ("a",))])
        next(events)
        events.close()
        assert list(events) == []
        done = last(engine.generate([Message("user", ("b",))], Sampling(max_new_tokens=5)))
    assert done.text == "bbbbb"


def test_a_stream_given_up_before_its_first_event_runs_nothing() -> None:
    engine, backend, _ = fake("abc")
    running, go_on = threading.Event(), threading.Event()

    def hold(event: Event | Failed) -> None:
        running.set()
        assert go_on.wait(60)

    with engine:
        engine.submit([question("0")], listener=hold)
        assert running.wait(60)
        del backend.calls[:]
        engine.generate([question("1")]).close()
        engine.generate([question("2")])  # dropped
        go_on.set()
        assert last(engine.generate([question("3")])).text == "abc"
    assert backend.calls.count("prepare") == 2


def test_full_queue_refuses_at_once_and_recovers() -> None:
    engine, _, _ = fake("x", queue_size=2)
    running, go_on, finished = threading.Event(), threading.Event(), threading.Event()

    def hold(event: Event | Failed) -> None:
        running.set()
        assert go_on.wait(60)

    def note_end(event: Event | Failed) -> None:
        if isinstance(event, Done):
            finished.set()

    with engine:
        engine.submit([question("0")], listener=hold)
        assert running.wait(60)
        for _ in range(2):
            engine.submit([question("1")], listener=note_end)
        assert engine.waiting == 2
        with pytest.raises(QueueFull, match="2 requests already wait"):
            engine.generate([question("2")])
        go_on.set()
        assert finished.wait(60)
        assert last(engine.generate([question("3")])).text == "x"


def test_waiting_counts_as_queue_time() -> None:
    engine, _, _ = fake("x", prefill_ns=40 * MS)
    running, go_on, finished = threading.Event(), threading.Event(), threading.Event()
    second: list[Done] = []

    def hold(event: Event | Failed) -> None:
        running.set()
        assert go_on.wait(60)

    def keep(event: Event | Failed) -> None:
        if isinstance(event, Done):
            second.append(event)
            finished.set()

    with engine:
        engine.submit([question("0")], listener=hold)
        assert running.wait(60)
        engine.submit([question("1")], listener=keep)
        go_on.set()
        assert finished.wait(60)
    assert timing([second[0]]).stages_ms["queue"] == 40.0


def test_many_threads_each_get_their_own_answer() -> None:
    engine, _, _ = fake(lambda messages: f"reply to {messages[0].content[-1]} 😀", queue_size=64)
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        answers[i] = last(engine.generate([question(str(i), picture(i))])).text

    with engine:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert answers == {i: f"reply to \n{i} 😀" for i in range(32)}


@pytest.mark.parametrize("step", ["prepare", "encode", "prefill", "step"])
def test_a_failing_request_does_not_stop_the_next(step: str) -> None:
    engine, backend, _ = fake("abc", fail_at=step)
    with engine:
        with pytest.raises(RuntimeError, match=f"scripted failure in {step}"):
            run(engine)
        backend.script = FakeScript(reply="fine")
        assert last(run(engine)).text == "fine"


def test_a_failing_listener_does_not_stop_the_next(caplog: pytest.LogCaptureFixture) -> None:
    engine, _, _ = fake("abc")

    def broken(event: Event | Failed) -> None:
        raise RuntimeError("listener")

    with engine:
        engine.submit([question("a")], listener=broken)
        assert last(run(engine)).text == "abc"
    assert "a listener failed" in caplog.text


def test_context_overflow_says_need_and_have() -> None:
    engine, _, _ = fake("abc", context_length=10)
    with engine:
        with pytest.raises(ContextOverflow, match="needs 13 tokens of context, the model has 10") as caught:
            run(engine, "seven77")
        assert (caught.value.need, caught.value.have) == (13, 10)
        assert caught.value.exit_code == 2


def test_answer_stops_where_the_context_ends() -> None:
    engine, _, _ = fake("abcdefgh", context_length=10)
    with engine:
        done = last(run(engine, "hi", Sampling(max_new_tokens=50)))
    assert (done.text, done.finish) == ("abc", "length")


def test_bad_image_is_named_and_the_engine_lives_on() -> None:
    engine, _, _ = fake("abc")
    with engine:
        with pytest.raises(BadImage, match=r"^cat\.png is not a readable image"):
            list(engine.generate([question("hi", EncodedImage(b"not an image", "cat.png"))]))
        assert last(run(engine)).text == "abc"


def test_close_fails_waiting_requests_and_refuses_new_ones() -> None:
    engine, backend, _ = fake("abc")
    running, go_on = threading.Event(), threading.Event()
    seen: list[Event | Failed] = []
    first: list[Event | Failed] = []

    def hold(event: Event | Failed) -> None:
        first.append(event)
        running.set()
        assert go_on.wait(60)

    engine.submit([question("0")], listener=hold)
    assert running.wait(60)

    def wait_and_note(event: Event | Failed) -> None:
        seen.append(event)
        go_on.set()

    engine.submit([question("1")], listener=wait_and_note)
    engine.close()
    engine.close()
    assert isinstance(seen[0], Failed)
    assert isinstance(seen[0].error, EngineClosed)
    assert isinstance(first[-1], Done)
    assert first[-1].finish == "cancelled"
    assert backend.closed
    with pytest.raises(EngineClosed):
        engine.generate([question("2")])


def test_complete_gives_the_events_of_generate() -> None:
    engine, backend, _ = fake("abc")
    with engine:
        streamed, complete = run(engine, reuse="none"), engine.complete([question("hi", picture())], reuse="none")
        assert complete == streamed
        assert last(engine.complete([question("hi")], Sampling(stop=("c",)), deadline_s=9)).text == "ab"
        backend.script = FakeScript(fail_at="step")
        with pytest.raises(RuntimeError, match="scripted failure"):
            engine.complete([question("hi")])


def test_a_listener_may_close_the_engine() -> None:
    engine, backend, _ = fake("abc")
    seen: list[Event | Failed] = []

    def close_at_first_token(event: Event | Failed) -> None:
        seen.append(event)
        if isinstance(event, Token):
            engine.close()

    engine.submit([question("a")], listener=close_at_first_token)
    engine._worker.join(60)
    assert backend.closed
    assert isinstance(seen[-1], Done)
    assert seen[-1].finish == "cancelled"
