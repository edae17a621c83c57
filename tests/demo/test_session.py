"""One model in memory, events in order across threads, and every way out of an answer ends it in the engine."""

from __future__ import annotations

import asyncio
import copy
import threading
from pathlib import Path

import pytest

from demo import session
from demo.catalogue import Entry
from demo.session import Engines, People, Picture, Session, batches
from runtime.api import Done, EncodedImage, Event, Message, Sampling, Token
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from runtime.engine_process import ProcessEngine
from tests.apart import apart
from tests.demo.conftest import GatedBackend, WatchedEngine
from vlm.errors import MissingPiece, UserError

HELLO = [Message("user", ("hi",))]


def entry(name: str) -> Entry:
    return Entry(Path(name), name, "onnx", "int8", 1, True)


def test_switching_frees_the_model_before_loading_the_next() -> None:
    backends: dict[str, FakeBackend] = {}

    def loader(path: Path) -> Engine:
        assert all(backend.closed for backend in backends.values())
        backends[path.name] = FakeBackend(name=path.name)
        return Engine(backends[path.name])

    engines = Engines([entry("a"), entry("b")], loader)
    first = engines.use("a")
    assert engines.use("a") is first
    assert engines.count_answer()
    assert not engines.count_answer()
    assert engines.use("b").info.name == "b"
    assert engines.count_answer()
    assert (engines.info("a"), engines.holds("b")) == (None, True)
    engines.close()
    assert all(backend.closed for backend in backends.values())


def test_a_model_whose_process_has_ended_is_loaded_again() -> None:
    loaded: list[ProcessEngine] = []

    def loader(path: Path) -> ProcessEngine:
        loaded.append(apart(Engine(FakeBackend(name=path.name))))
        return loaded[-1]

    engines = Engines([entry("a")], loader)
    first = engines.use("a")
    assert engines.use("a") is first
    loaded[0]._link.stdin.close()  # as when the kernel has killed it
    loaded[0]._reader.join(60)
    assert engines.use("a") is loaded[1]
    assert engines.count_answer()
    engines.close()


def test_a_model_that_fails_to_load_leaves_room_for_another() -> None:
    def loader(path: Path) -> Engine:
        if path.name == "a":
            raise MissingPiece("install it")
        return Engine(FakeBackend())

    engines = Engines([entry("a"), entry("b")], loader)
    with pytest.raises(MissingPiece):
        engines.use("a")
    assert not engines.holds("a")
    assert engines.use("b")
    with pytest.raises(UserError, match="not on offer"):
        engines.use("../../elsewhere")
    engines.close()


def test_batches_keep_order_and_end_with_done() -> None:
    async def collect(engine: Engine) -> list[Event]:
        found = batches(engine, HELLO, Sampling(), threading.Event())
        return [event async for batch in found for event in batch]

    with Engine(FakeBackend(FakeScript("seven"))) as engine:
        events = asyncio.run(collect(engine))
    assert "".join(event.text for event in events if isinstance(event, Token)) == "seven"
    assert isinstance(events[-1], Done)


def test_leaving_early_stops_the_engine() -> None:
    backend = GatedBackend(FakeScript("a long answer"), "gated")

    async def leave(engine: Engine) -> None:
        stream = batches(engine, HELLO, Sampling(), cancel)
        async for batch in stream:
            if any(isinstance(event, Token) for event in batch):
                break
        await stream.aclose()

    cancel = threading.Event()
    with WatchedEngine(backend) as engine:
        asyncio.run(leave(engine))
        assert cancel.is_set()
        backend.let(1)
        backend.script = FakeScript("")
        list(engine.generate(HELLO, cancel=threading.Event()))  # runs after the first has ended
    assert backend.calls.count("step") == 1


def test_a_silent_model_still_gives_the_server_something_to_notice_a_closed_tab_by() -> None:
    backend = GatedBackend(FakeScript("ab"), "gated")

    async def quiet(engine: Engine) -> None:
        async for batch in batches(engine, HELLO, Sampling(), threading.Event()):
            if not batch:
                return

    with WatchedEngine(backend) as engine:
        asyncio.run(quiet(engine))
        backend.let(1)


def test_the_end_of_an_answer_is_not_waited_with_and_a_fast_model_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With frames longer than any test, only the end of the answer can end them."""
    monkeypatch.setattr(session, "FRAME_S", 3600.0)

    async def collect(engine: Engine) -> list[int]:
        return [len(batch) async for batch in batches(engine, HELLO, Sampling(max_new_tokens=500), threading.Event())]

    for said in ("short", "x" * 400):
        with Engine(FakeBackend(FakeScript(said))) as engine:
            assert len(asyncio.run(asyncio.wait_for(collect(engine), 60))) == 1

    waits: list[float] = []

    async def follow(tokens: int) -> None:
        inbox = session._Inbox(asyncio.get_running_loop())

        async def note(event: asyncio.Event, seconds: float) -> None:
            waits.append(seconds)

        monkeypatch.setattr(inbox, "_wait", note)
        for n in range(tokens):
            inbox.put(Token(n, "x", n))
        assert len(await inbox.gather(0.1)) == tokens

    asyncio.run(follow(session.READABLE))
    asyncio.run(follow(session.READABLE + 1))
    assert waits == pytest.approx([0.25, 0.1, 0.25, 0.1, 0.15])


def test_the_models_own_error_reaches_the_caller() -> None:
    async def run(engine: Engine) -> None:
        async for _ in batches(engine, HELLO, Sampling(), threading.Event()):
            pass

    with Engine(FakeBackend(FakeScript(fail_at="prefill"))) as engine, pytest.raises(RuntimeError, match="prefill"):
        asyncio.run(run(engine))


def test_a_fresh_session_can_be_copied_and_stopped() -> None:
    copied = copy.deepcopy(Session())
    copied.stop()
    copied.cancel = threading.Event()
    copied.stop()
    assert copied.cancel.is_set()


def test_a_page_that_closes_takes_its_files_but_not_those_of_others(tmp_path: Path) -> None:
    people, mine, shared = People(), tmp_path / "mine", tmp_path / "shared"
    for path in (mine, shared):
        path.write_text("x")
    me, other = people.enter("a"), people.enter("b")
    me.files, other.files = {str(mine), str(shared)}, {str(shared)}
    me.cancel = threading.Event()
    people.leave("a")
    people.leave("a")
    assert me.cancel.is_set()
    assert (mine.exists(), shared.exists()) == (False, True)
    people.leave("b")
    assert not shared.exists()


def test_a_conversation_holds_each_image_once_and_can_be_left_out() -> None:
    chat = Session()
    chat.show([Picture(EncodedImage(b"1"), "", "1"), Picture(EncodedImage(b"2"), "", "2")])
    first = chat.asks("one?", remember=True)
    assert [len(message.content) for message in first] == [3]
    chat.heard(first, "")  # nothing was said: nothing to follow up
    assert chat.asks("one?", remember=True) == first
    chat.heard(first, "7")
    follow_up = chat.asks("two?", remember=True)
    assert [message.role for message in follow_up] == ["user", "assistant", "user"]
    assert all(isinstance(part, str) for part in follow_up[-1].content)
    assert [len(message.content) for message in chat.asks("two?", remember=False)] == [3]
    chat.forget()
    assert [len(message.content) for message in chat.asks("one?", remember=True)] == [3]


def test_images_chosen_while_an_answer_runs_come_with_the_next_question() -> None:
    chat = Session()
    chat.show([Picture(EncodedImage(b"1"), "", "1")])
    asked = chat.asks("one?", remember=True)
    chat.show([Picture(EncodedImage(b"2"), "", "2")])
    chat.heard(asked, "7")
    assert EncodedImage(b"2") in chat.asks("two?", remember=True)[-1].content
    chat.heard(chat.asks("two?", remember=True), "8")
    assert all(isinstance(part, str) for part in chat.asks("three?", remember=True)[-1].content)
