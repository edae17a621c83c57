"""How requests end before their last token, wait, fail and stay apart: the engine on a scripted backend."""

from __future__ import annotations

import threading
from typing import Any

import pytest

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
    Token,
)
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from runtime.images import question
from runtime.latency import timing
from vlm.errors import BadImage

from .scripted import MS, fake, last, picture, run


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
