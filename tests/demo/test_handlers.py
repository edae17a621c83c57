"""What each event does to a session, without a page around it."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo import tab_compare
from demo.answering import sampling_of
from demo.app import Choice
from demo.catalogue import Entry
from demo.instruments import Instruments
from demo.session import Engines, Picture, Session
from demo.tab_chat import BUSY, NO_IMAGE, NO_QUESTION, STOPPED, TOO_MANY, Handlers, Widgets
from runtime.api import EncodedImage
from runtime.backend_fake import FakeBackend
from runtime.engine import Engine
from vlm.errors import MissingPiece, UserError

gr = pytest.importorskip("gradio")
NAMES = Widgets.__dataclass_fields__
BROKEN = Picture(EncodedImage(b"broken"), "<img>", "/broken.png")
CONTROLS = (8, 0, 1, 0, 0, 1, "", "")  # as the page sends them
W = Widgets(**{name: name for name in NAMES})  # handlers use widgets as keys only


def handlers(loader: Any = None) -> Handlers:
    engines = Engines([Entry(Path("m"), "m", "onnx", "int8", 1, True)], loader or (lambda path: Engine(FakeBackend())))
    return Handlers(W, engines, (), Instruments(Path("/nowhere")))


def asked(question: str = "what ?") -> Session:
    session = Session()
    session.show([BROKEN])
    handlers().begin(session, question)
    return session


def updates(on: Handlers, session: Session | None) -> list[dict[Any, Any]]:
    async def collect() -> list[dict[Any, Any]]:
        return [update async for update in on.answer(session, "m", True, *CONTROLS)]

    try:
        return asyncio.run(collect())
    finally:
        on.engines.close()


def test_questions_that_cannot_be_answered_are_not_begun() -> None:
    on, session = handlers(), Session()
    assert NO_IMAGE in on.begin(session, "what ?")["notice"]
    session.show([BROKEN])
    assert NO_QUESTION in on.begin(session, "  \n ")["notice"]
    on.begin(session, "what ?")
    assert BUSY in on.begin(session, "again ?")["notice"]
    assert len(session.messages) == 1


@pytest.mark.parametrize("session", [None, Session()])
def test_nothing_to_answer_leaves_the_notice_alone(session: Session | None) -> None:
    assert updates(handlers(), session) == [{"notice": gr.skip()}]


def test_a_question_that_never_got_its_turn_is_said_to_be_unanswered() -> None:
    on, session = handlers(), asked()
    messages, ask, stop = on.end(session)
    assert messages[-1]["content"] == [TOO_MANY]
    assert (ask["interactive"], stop["interactive"]) == (True, False)
    assert not session.busy
    assert NO_QUESTION in on.begin(session, "")["notice"]


def test_a_bad_image_found_by_the_engine_is_one_line() -> None:
    session = asked()
    last = updates(handlers(), session)[-1]
    assert "not a readable image" in last["notice"]
    assert session.messages[-1] == {"role": "assistant", "content": ["No answer."]}


def test_a_model_that_cannot_be_loaded_says_what_to_install() -> None:
    def loader(path: Path) -> Engine:
        raise MissingPiece("run `pip install onnxruntime`")

    assert "pip install onnxruntime" in updates(handlers(loader), asked())[-1]["notice"]


def test_stop_works_while_others_have_the_model() -> None:
    on, session = handlers(), asked()

    async def wait_and_stop() -> list[dict[Any, Any]]:
        async with on.engines.turn:
            answer = on.answer(session, "m", True, *CONTROLS)
            waiting = asyncio.ensure_future(anext(answer))
            await asyncio.sleep(0)
            assert not waiting.done()
            on.stop(session)
            return [await waiting, *[update async for update in answer]]

    (said,) = asyncio.run(wait_and_stop())
    assert said["chat"][-1]["content"] == [STOPPED]
    assert not on.engines.turn.locked()
    assert on.engines.info("m") is None  # the model was not even loaded


def test_a_model_that_breaks_while_loading_is_said_on_its_card() -> None:
    def loader(path: Path) -> Engine:
        raise ValueError("a native library's own error")

    on = handlers(loader)
    choice = Choice(on.engines, "model", "card", "about", "notice")

    async def choose() -> list[dict[Any, Any]]:
        return [update async for update in choice.choose("m")]

    last = asyncio.run(choose())[-1]
    assert "Not loaded." in last["card"]
    assert "The model failed (ValueError)" in last["notice"]


def test_an_empty_seed_is_none_and_a_wrong_one_is_said() -> None:
    assert sampling_of(8, seed=" ").seed is None
    assert sampling_of(8, seed=" 0 ").seed == 0
    for wrong in ("-1", "1.5", "²", "x"):
        with pytest.raises(UserError, match="whole number"):
            sampling_of(8, seed=wrong)


def test_words_are_escaped_and_an_image_is_told_once() -> None:
    on, session = handlers(), Session()
    session.show([BROKEN])
    on.begin(session, "a < b ?")
    on.end(session)
    on.begin(session, "again ?")
    first, _, second = session.messages
    assert "<img>" in first["content"][0]["value"]
    assert first["content"][1] == "a &lt; b ?"
    assert second["content"] == ["again ?"]


def test_a_new_chat_stops_the_answer_and_keeps_the_image() -> None:
    on, session = handlers(), asked()
    cancel = session.cancel
    on.new_chat(session)
    assert cancel is not None
    assert cancel.is_set()
    assert (session.messages, session.turns, session.pictures) == ([], [], (BROKEN,))


@pytest.mark.parametrize("when", ["waiting", "loading"])
def test_a_new_chat_stays_empty_whatever_becomes_of_the_old_question(when: str) -> None:
    session = asked()

    def loader(path: Path) -> Engine:
        on.new_chat(session)  # while the model loads, which then fails
        raise MissingPiece("pip install onnxruntime")

    on = handlers(loader)

    async def go() -> list[dict[Any, Any]]:
        if when == "loading":
            return [update async for update in on.answer(session, "m", True, *CONTROLS)]
        async with on.engines.turn:
            answer = on.answer(session, "m", True, *CONTROLS)
            waiting = asyncio.ensure_future(anext(answer, {}))
            await asyncio.sleep(0)
            on.new_chat(session)
            return [await waiting, *[update async for update in answer]]

    last = asyncio.run(go())[-1]
    assert not last.get("notice")
    assert session.messages == []
    assert on.end(session)[0] == []


def test_a_new_chat_after_the_last_word_remembers_nothing() -> None:
    """The answer is whole and shown, its generator is not done yet."""
    session = asked()
    session.show([Picture(EncodedImage(png_bytes()), "<img>", "/x.png")])
    on = handlers()

    async def go() -> None:
        async for _ in on.answer(session, "m", True, *CONTROLS):
            if session.messages and "…" not in str(session.messages[-1]["content"][0]):
                on.new_chat(session)
        assert (session.messages, session.turns, session.given) == ([], [], None)

    try:
        asyncio.run(go())
    finally:
        on.engines.close()


def png_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_session_that_expired_starts_over() -> None:
    on = handlers()
    assert NO_IMAGE in on.begin(None, "what ?")["notice"]
    on.stop(None)
    assert on.new_chat(None)[1:] == ([], "")
    assert on.take_images(None, None)["session"].pictures == ()


def compared(models: tuple[str, ...], stop: bool = False, length: float | None = None) -> dict[Any, Any]:
    """The last update of a comparison over fakes."""
    names = {name: name for name in tab_compare.Widgets.__dataclass_fields__}
    on = tab_compare.Handlers(tab_compare.Widgets(**names), handlers().engines, Instruments(Path("/nowhere")))
    session = Session()
    session.show([Picture(from_bytes(), "<img>", "/red.png")])
    on.begin(session, models, "what ?")
    if stop:
        on.stop(session)

    async def last() -> dict[Any, Any]:
        return [update async for update in on.compare(session, models, "what ?", length)][-1]

    try:
        return asyncio.run(last())
    finally:
        on.engines.close()


def from_bytes() -> EncodedImage:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(data, "PNG")
    return EncodedImage(data.getvalue())


def test_a_stopped_comparison_compares_nothing() -> None:
    html = compared(("m", "m"), stop=True)["columns"]
    assert html.count('data-state="stopped"') == 2
    assert "verdict" not in html


def test_an_emptied_length_is_its_default_and_a_wrong_one_is_said() -> None:
    assert compared(("m", "m"))["columns"].count('data-state="done"') == 2
    assert "give 1 to 512" in compared(("m", "m"), length=513)["notice"]
    assert "not on offer" in compared(("m", "gone"))["notice"]
