"""What happens when a person does something: one method per event, state in the Session it is given."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from demo import page, timeline
from demo.examples import Example
from demo.session import Engines, Session, batches
from runtime.api import Done, EncodedImage, Event, Sampling, Token
from runtime.images import question as question_message
from runtime.images import read_image
from vlm import preprocess
from vlm.errors import BadImage, ToolError

LONGEST_QUESTION = 2000
NO_IMAGE = "Choose an image first: drop a file, or click an example."
NO_QUESTION = "Write a question about the image first."
BUSY = "The last answer is still running; wait for it or press Stop."
TOO_MANY = "Not answered: too many questions are waiting. Ask again in a moment."
Updates: TypeAlias = dict[Any, Any]


@dataclass(frozen=True)
class Widgets:
    """The components that event handlers write to."""

    session: Any
    model: Any
    card: Any
    picture: Any
    examples: Any
    chat: Any
    question: Any
    ask: Any
    stop: Any
    new_chat: Any
    notice: Any
    image_notice: Any
    length: Any
    temperature: Any


class Handlers:
    """Shares nothing between people but the engines."""

    def __init__(self, widgets: Widgets, engines: Engines, shown: tuple[Example, ...]) -> None:
        self.w, self.engines, self.shown = widgets, engines, shown

    def open_page(self) -> Session:
        return Session()

    def take_image(self, upload: dict[str, Any] | None, session: Session | None) -> Updates:
        """Decode an upload once to find out whether it is an image; the engine decodes it again under its clock."""
        path = Path((upload or {}).get("path") or "")
        try:
            image = read_image(path)
            return self._show(session, image, path)
        except BadImage as error:
            message = error.message.replace(str(path), "the image")
            return {**self.drop_image(session), self.w.picture: None, self.w.image_notice: page.notice(message)}

    def take_example(self, session: Session | None, index: int) -> Updates:
        example = self.shown[index % len(self.shown)]
        updates = self._show(session, read_image(example.path), example.path)
        return {**updates, self.w.question: example.question}

    def drop_image(self, session: Session | None) -> Updates:
        session = session or Session()
        session.image = None
        return {self.w.session: session, self.w.image_notice: "", self.w.notice: ""}

    def _show(self, session: Session | None, image: EncodedImage, path: Path) -> Updates:
        session = session or Session()
        session.show(image, page.thumbnail(preprocess.open_image(image.data)))
        return {self.w.session: session, self.w.picture: str(path), self.w.image_notice: "", self.w.notice: ""}

    def begin(self, session: Session | None, question: str) -> Updates:
        """Check and echo the question at once; the answer may have to wait for the model."""
        import gradio as gr

        session = session or Session()
        question = question.strip()[:LONGEST_QUESTION]
        problem = BUSY if session.busy else NO_IMAGE if session.image is None else "" if question else NO_QUESTION
        if problem:
            return {self.w.session: session, self.w.notice: page.notice(problem)}
        content: list[Any] = [_text(question)]
        if not session.image_told:
            content.insert(0, _html(session.thumbnail))
            session.image_told = True
        session.question, session.busy, session.cancel = question, True, threading.Event()
        session.messages = [*session.messages, {"role": "user", "content": content}]
        return {
            self.w.session: session,
            self.w.notice: "",
            self.w.question: "",
            self.w.chat: [*session.messages, _assistant("…")],
            self.w.ask: gr.update(interactive=False),
            self.w.stop: gr.update(interactive=True),
        }

    async def answer(
        self, session: Session | None, model: str, length: float, temperature: float
    ) -> AsyncIterator[Updates]:
        """Stream one answer and its breakdown into the chat."""
        import gradio as gr

        if session is None or not session.question or session.image is None or session.cancel is None:
            yield {self.w.notice: gr.skip()}  # `begin` has said why; a generator that yields nothing would wipe that
            return
        message = question_message(session.question, session.image)
        cancel, earlier, said, problem = session.cancel, session.messages, "", ""
        session.question = ""
        events: list[Event] = []
        breakdown = ""
        try:
            if not self.engines.holds(model):
                yield {self.w.chat: [*earlier, _assistant("Loading the model …")]}
            engine = await asyncio.to_thread(self.engines.use, model)
            sampling = Sampling(max_new_tokens=int(length), temperature=float(temperature))
            async for batch in batches(engine, [message], sampling, cancel):
                events += batch
                said += "".join(event.text for event in batch if isinstance(event, Token))
                if batch and isinstance(batch[-1], Done):
                    said = batch[-1].text
                    view = timeline.break_down(events)
                    breakdown = timeline.render(view, self.engines.entries[model].label, self.engines.count_answer())
                if session.cancel is not cancel:  # a new chat was begun meanwhile: nobody waits for this answer
                    return
                session.messages = [*earlier, _assistant(said, breakdown)]
                yield {self.w.chat: session.messages}
            return
        except ToolError as error:
            problem = error.message
        except Exception as error:
            logging.getLogger(__name__).exception("the model failed")
            problem = f"The model failed ({type(error).__name__}); the terminal that runs this page shows why."
        session.messages = [*earlier, _assistant(said or "No answer.")]
        yield {self.w.chat: session.messages, self.w.notice: page.notice(problem)}

    def end(self, session: Session | None) -> tuple[Any, ...]:
        """Runs after `answer`, and also when the waiting line was too long for `answer` to run at all."""
        import gradio as gr

        session = session or Session()
        if session.question:
            session.messages = [*session.messages, _assistant(TOO_MANY)]
        session.busy, session.question = False, ""
        return session.messages, gr.update(interactive=True), gr.update(interactive=False)

    def stop(self, session: Session | None) -> Any:
        """The engine ends after its current step and reports what there is; `answer` shows it like any other."""
        import gradio as gr

        if session is not None:
            session.stop()
        return gr.update(interactive=False)

    def new_chat(self, session: Session | None) -> tuple[Any, ...]:
        """Forget the conversation; the image stays."""
        session = session or Session()
        session.stop()
        session.cancel, session.messages, session.image_told = None, [], False
        return session, [], ""

    async def choose_model(self, model: str) -> AsyncIterator[Updates]:
        """Free the model in memory and load another."""
        entry = self.engines.entries[model]
        yield {self.w.card: page.model_card(entry, state="Loading …"), self.w.notice: ""}
        try:
            engine = await asyncio.to_thread(self.engines.use, model)
        except ToolError as error:
            state = "Not loaded."
            yield {self.w.card: page.model_card(entry, state=state), self.w.notice: page.notice(error.message)}
            return
        yield {self.w.card: page.model_card(entry, info=engine.info)}


def _assistant(text: str, breakdown: str = "") -> dict[str, Any]:
    words = _text(text) or ("(empty answer)" if breakdown else "…")
    return {"role": "assistant", "content": [words, _html(breakdown)] if breakdown else [words]}


def _text(words: str) -> str:
    """What a person or a model wrote, as the chat must get it: with Markdown off it still takes text for HTML."""
    return escape(words, quote=False)


def _html(value: str) -> dict[str, Any]:
    """Our own markup inside a chat message."""
    return {"type": "component", "component": "html", "value": value, "constructor_args": {}, "props": {}}
