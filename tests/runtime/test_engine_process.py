"""An engine behind the pipes of another process: the same events, the same ends, and what happens when it dies."""

from __future__ import annotations

import io
import os
import signal
import threading
from typing import Any

import pytest

from runtime.api import (
    ContextOverflow,
    Done,
    EngineClosed,
    Event,
    Failed,
    ModelFailed,
    QueueFull,
    Sampling,
    Span,
    Token,
)
from runtime.backend_fake import IMAGE_TOKENS, FakeBackend, FakeScript
from runtime.child import Child
from runtime.engine import Engine
from runtime.engine_process import ProcessEngine, load_apart
from runtime.engine_worker import Outbox, Post
from runtime.images import question
from tests.apart import apart
from vlm.errors import BadImage, UserError

from .scripted import picture, run


class Heard:
    """A listener that can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event | Failed] = []
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: Event | Failed) -> None:
        self.events.append(event)
        if isinstance(event, Token):
            self.begun.set()
        if isinstance(event, (Done, Failed)):
            self.ended.set()

    def all(self) -> list[Event | Failed]:
        assert self.ended.wait(60)
        return self.events


def ask(engine: ProcessEngine, text: str = "hi", sampling: Sampling | None = None, **options: Any) -> Heard:
    heard = Heard()
    engine.submit([question(text, picture())], sampling, listener=heard, **options)  # type: ignore[arg-type]
    return heard


def failure(heard: Heard) -> Exception:
    last = heard.all()[-1]
    assert isinstance(last, Failed)
    return last.error


def test_the_events_are_those_of_the_engine() -> None:
    def script() -> Engine:
        return Engine(FakeBackend(FakeScript("a😀ñ STOP and more")))

    sampling = Sampling(stop=("STOP",))
    with script() as plain, apart(script()) as engine:
        expected = run(plain, "hi", sampling)
        got = ask(engine, "hi", sampling).all()
        assert engine.info == plain.info

    def without_times(events: list[Any]) -> list[Any]:
        kinds = [(e.stage, e.tokens) if isinstance(e, Span) else e[:2] for e in events[:-1]]
        return [*kinds, (events[-1].finish, events[-1].text, events[-1].usage)]

    assert without_times(got) == without_times(expected)
    done = got[-1]
    assert isinstance(done, Done)
    assert done.spans[0].start_ns == done.received_ns
    assert all(a.end_ns == b.start_ns for a, b in zip(done.spans, done.spans[1:], strict=False))


def test_a_request_counts_from_when_this_process_received_it() -> None:
    with apart(Engine(FakeBackend())) as engine:
        before_ns = engine.clock.now_ns()
        done = ask(engine).all()[-1]
    assert isinstance(done, Done)
    assert before_ns <= done.received_ns <= done.spans[0].end_ns


def test_many_threads_each_get_their_own_answer() -> None:
    backend = FakeBackend(FakeScript(lambda messages: f"reply to {messages[0].content[-1]}"))
    with apart(Engine(backend, queue_size=64)) as engine:
        heard = {i: ask(engine, str(i)) for i in range(32)}
        for i, each in heard.items():
            done = each.all()[-1]
            assert isinstance(done, Done)
            assert done.text == f"reply to \n{i}"


def test_a_cancel_and_a_deadline_are_passed_on() -> None:
    long = FakeScript("x" * 60_000, step_ns=1_000_000, context_length=100_000)
    with apart(Engine(FakeBackend(long))) as engine:
        cancel = threading.Event()
        heard = ask(engine, "hi", Sampling(max_new_tokens=50_000), cancel=cancel)
        assert heard.begun.wait(60)
        cancel.set()
        cancelled = heard.all()[-1]
        late = ask(engine, deadline_s=0).all()[-1]
    assert isinstance(cancelled, Done)
    assert isinstance(late, Done)
    assert (cancelled.finish, late.finish) == ("cancelled", "deadline")


def test_errors_arrive_as_they_are_and_a_librarys_own_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with apart(Engine(FakeBackend(FakeScript(fail_at="step", context_length=10)))) as engine:
        overflow = failure(ask(engine, "far too long"))
        assert isinstance(overflow, ContextOverflow)
        assert (overflow.need, overflow.have) == (IMAGE_TOKENS + len("\nfar too long") + 1, 10)
        broken = failure(ask(engine, "x"))
    with (
        apart(Engine(FakeBackend(FakeScript(fail_at="prefill")))) as engine,
        pytest.raises(ModelFailed, match="RuntimeError"),
    ):
        engine.warmup()
    assert isinstance(broken, ModelFailed)
    assert "the model failed (RuntimeError)" in broken.message
    assert "scripted failure in step" in caplog.text


def test_warm_up() -> None:
    with apart(Engine(FakeBackend())) as engine:
        warm = engine.warmup(2)
    assert warm.cold_ttft_ms > 0 < warm.warm_ttft_ms


def test_a_full_queue_is_told_to_the_listener() -> None:
    hold, running = threading.Event(), threading.Event()

    class Held(FakeBackend):
        def prefill(self, *given: Any, **options: Any) -> Any:
            running.set()
            assert hold.wait(60)
            return super().prefill(*given, **options)

    with apart(Engine(Held(), queue_size=1)) as engine:
        first = ask(engine)
        assert running.wait(60)
        second, third = ask(engine), ask(engine)
        assert isinstance(failure(third), QueueFull)
        hold.set()
        assert isinstance(first.all()[-1], Done)
        assert isinstance(second.all()[-1], Done)


def test_closing_ends_what_runs_and_refuses_the_rest() -> None:
    backend = FakeBackend(FakeScript("x" * 60_000, step_ns=1_000_000, context_length=100_000))
    engine = apart(Engine(backend))
    running = ask(engine, "hi", Sampling(max_new_tokens=50_000))
    assert running.begun.wait(60)
    waiting = ask(engine)
    engine.close()
    engine.close()
    last = running.all()[-1]
    assert isinstance(last, Done)
    assert last.finish == "cancelled"
    assert isinstance(failure(waiting), EngineClosed)
    assert backend.closed
    assert not engine.alive
    with pytest.raises(EngineClosed):
        ask(engine)
    with pytest.raises(EngineClosed):
        engine.warmup()


def test_a_failing_listener_does_not_stop_the_next(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event | Failed) -> None:
        raise RuntimeError("listener")

    with apart(Engine(FakeBackend())) as engine:
        engine.submit([question("a")], listener=broken)
        assert isinstance(ask(engine).all()[-1], Done)
    assert "a listener failed" in caplog.text


def test_a_listener_may_close_the_engine() -> None:
    backend = FakeBackend(FakeScript("abc"))
    engine = apart(Engine(backend))
    closed = threading.Event()

    def close(event: Event | Failed) -> None:
        if isinstance(event, Token) and not closed.is_set():
            closed.set()
            engine.close()

    engine.submit([question("hi")], listener=close)
    assert closed.wait(60)
    engine._reader.join(60)
    assert backend.closed


def test_a_process_of_its_own_answers_and_goes() -> None:
    with load_apart("x", "fake") as engine:
        link = engine._link
        assert isinstance(link, Child)
        assert link.pid != os.getpid()
        done = ask(engine).all()[-1]
    assert isinstance(done, Done)
    assert done.text == "7"
    with pytest.raises(ProcessLookupError):
        os.kill(link.pid, 0)


def test_a_process_that_is_killed_fails_its_requests_and_says_so() -> None:
    engine = load_apart("x", "fake")
    assert isinstance(engine._link, Child)
    os.kill(engine._link.pid, signal.SIGSTOP)  # so that the request is sure to be there
    heard = ask(engine)
    os.kill(engine._link.pid, signal.SIGKILL)
    assert "ended with status -9" in str(failure(heard))
    assert not engine.alive
    with pytest.raises(ModelFailed, match="ended with status -9"):
        ask(engine)
    engine.close()


def test_what_does_not_load_is_refused_as_in_this_process() -> None:
    with pytest.raises(UserError, match="nowhere is not a directory"):
        load_apart("nowhere")
    with pytest.raises(UserError, match="unknown option 'colour'"):
        load_apart("x", "fake", colour=1)

    class Dead:
        stdin, stdout = io.BytesIO(), io.BytesIO()

        def end(self) -> int:
            return -11

    with pytest.raises(ModelFailed, match="ended with status -11"):
        ProcessEngine(Dead(), "x")


def test_tokens_travel_together_and_the_first_and_the_last_at_once() -> None:
    sent: list[list[Event | Failed]] = []
    post = Post()  # not started: nobody sends by the clock
    outbox = Outbox(lambda news: sent.append(news[1]), 3, post)
    outbox.put(Span("queue", 0, 1))
    assert sent == []
    for n in range(5):
        outbox.put(Token(n, "x", n))
    assert [len(news) for news in sent] == [2], "the first token brings what came before it"
    assert post.open
    outbox.put(Failed(BadImage("no")))
    assert [len(news) for news in sent] == [2, 5]
    assert not post.open


def test_a_token_does_not_wait_for_the_next_one() -> None:
    permits = threading.Semaphore(2)

    class Gated(FakeBackend):
        def step(self, token_id: int) -> Any:
            assert permits.acquire(timeout=60)
            return super().step(token_id)

    seen: list[str] = []
    stalled, ended = threading.Event(), threading.Event()

    def listen(event: Event | Failed) -> None:
        if isinstance(event, Token):
            seen.append(event.text)
            if len(seen) == 3:
                stalled.set()
        if isinstance(event, (Done, Failed)):
            ended.set()

    with apart(Engine(Gated(FakeScript("seven")))) as engine:
        engine.submit([question("hi")], listener=listen)
        assert stalled.wait(60)
        permits.release(9)
        assert ended.wait(60)
    assert "".join(seen) == "seven"
