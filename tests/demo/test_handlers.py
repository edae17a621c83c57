"""What each event does to a session, without a page around it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from demo.catalogue import Entry
from demo.instruments import Instruments
from demo.session import Engines, Picture, Session
from demo.tab_chat import BUSY, NO_IMAGE, NO_QUESTION, TOO_MANY, Handlers, Widgets
from runtime.api import EncodedImage
from runtime.backend_fake import FakeBackend
from runtime.engine import Engine
from vlm.errors import MissingPiece

gr = pytest.importorskip("gradio")
NAMES = Widgets.__dataclass_fields__
BROKEN = Picture(EncodedImage(b"broken"), "<img>", "/broken.png")
CONTROLS = (8, 0, 1, 0, 0, 1, None, "")  # as the page sends them
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


def test_a_session_that_expired_starts_over() -> None:
    on = handlers()
    assert NO_IMAGE in on.begin(None, "what ?")["notice"]
    on.stop(None)
    assert on.new_chat(None)[1:] == ([], "")
    assert on.take_images(None, None)["session"].pictures == ()
