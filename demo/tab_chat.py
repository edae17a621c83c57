"""The Chat tab: images, questions, streamed answers, and under each where its milliseconds went."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from demo import examples, page
from demo.answering import Run, replies, sampling_of
from demo.examples import Example
from demo.instruments import Instruments
from demo.session import Engines, Picture, Session
from runtime.api import ContextOverflow
from runtime.images import read_image
from vlm import preprocess
from vlm.errors import BadImage, ToolError

LONGEST_QUESTION = 2000
MOST_IMAGES = 8
NO_IMAGE = "Choose an image first: drop a file, or click an example."
NO_QUESTION = "Write a question about the image first."
BUSY = "The last answer is still running; wait for it or press Stop."
STOPPED = "Stopped before its turn came."
TOO_MANY = "Not answered: too many questions are waiting. Ask again in a moment."
TOO_MANY_IMAGES = f"At most {MOST_IMAGES} images a question; the others were left out."
Updates: TypeAlias = dict[Any, Any]


@dataclass(frozen=True)
class Widgets:
    """The components that event handlers write to."""

    session: Any
    pictures: Any
    examples: Any
    chat: Any
    question: Any
    ask: Any
    stop: Any
    new_chat: Any
    notice: Any
    image_notice: Any
    remember: Any
    sampling: tuple[Any, ...]


class Handlers:
    """What happens when a person does something; shares nothing between people but the engines."""

    def __init__(
        self, widgets: Widgets, engines: Engines, shown: Sequence[Example], instruments: Instruments | None = None
    ) -> None:
        self.w, self.engines, self.shown = widgets, engines, shown
        self.instruments = instruments or Instruments()

    def take_images(self, chosen: list[dict[str, Any]] | None, session: Session | None) -> Updates:
        """Decode every new upload once to find out whether it is an image; the engine decodes it again, timed.

        Runs after every change of the widget, also after those the server made: what is known already is kept.
        """
        import gradio as gr

        session = session or Session()
        paths = [str((item.get("image") or item.get("video") or {}).get("path") or "") for item in chosen or []]
        known = {picture.path: picture for picture in session.pictures}
        problem = TOO_MANY_IMAGES if len(paths) > MOST_IMAGES else ""
        pictures: list[Picture] = []
        for path in paths[:MOST_IMAGES]:
            try:
                pictures.append(known[path] if path in known else _picture(path))
                session.files.add(path)
            except BadImage as error:
                problem = error.message.replace(path, "the image")
        same = [p.image.data for p in pictures] == [p.image.data for p in session.pictures]
        if same and not problem:
            session.pictures = tuple(pictures)  # the same images under other paths: the server's own change
            return {self.w.session: session}
        if not same:
            session.show(pictures)
        shown = [picture.path for picture in pictures] if problem else gr.skip()
        return {
            self.w.session: session,
            self.w.pictures: shown,
            self.w.image_notice: page.notice(problem),
            self.w.notice: "",
        }

    def take_example(self, session: Session | None, index: int) -> Updates:
        session = session or Session()
        example = self.shown[index % len(self.shown)]
        session.show([_picture(str(example.path))])
        return {
            self.w.session: session,
            self.w.pictures: [str(example.path)],
            self.w.image_notice: "",
            self.w.notice: "",
            self.w.question: example.question,
        }

    def begin(self, session: Session | None, question: str) -> Updates:
        """Check and echo the question at once; the answer may have to wait for the model."""
        import gradio as gr

        session = session or Session()
        question = question.strip()[:LONGEST_QUESTION]
        problem = BUSY if session.busy else NO_IMAGE if not session.pictures else "" if question else NO_QUESTION
        if problem:
            return {self.w.session: session, self.w.notice: page.notice(problem)}
        content: list[Any] = [_text(question)]
        if not session.shown:
            thumbnails = "".join(picture.thumbnail for picture in session.pictures)
            content.insert(0, _html(f'<div class="asked-row">{thumbnails}</div>'))
            session.shown = True
        session.question, session.busy, session.cancel = question, True, threading.Event()
        session.messages = [*session.messages, {"role": "user", "content": content}]
        waiting = "Waiting for the model …" if self.engines.turn.locked() else "…"
        return {
            self.w.session: session,
            self.w.notice: "",
            self.w.question: "",
            self.w.chat: [*session.messages, _assistant(waiting)],
            self.w.ask: gr.update(interactive=False),
            self.w.stop: gr.update(interactive=True),
        }

    async def answer(
        self, session: Session | None, model: str, remember: bool, *controls: Any
    ) -> AsyncIterator[Updates]:
        """Stream one answer and its breakdown into the chat."""
        import gradio as gr

        if session is None or not session.question or not session.pictures or session.cancel is None:
            yield {self.w.notice: gr.skip()}  # `begin` has said why; a generator that yields nothing would wipe that
            return
        cancel, earlier, said, problem = session.cancel, session.messages, "", ""
        asked = session.asks(session.question, remember)
        session.question = ""
        try:
            sampling = sampling_of(*controls)
            async with self.engines.wanted(cancel) as mine:
                if session.cancel is not cancel:
                    return
                if not mine:
                    session.messages = [*earlier, _assistant(STOPPED)]
                    yield {self.w.chat: session.messages}
                    return
                if not self.engines.holds(model):
                    yield {self.w.chat: [*earlier, _assistant("Loading the model …")]}
                engine = await asyncio.to_thread(self.engines.use, model)
                label = self.engines.entries[model].label
                run = Run(engine, self.instruments, label, cancel, self.engines.count_answer())
                async with aclosing(replies(run, asked, sampling)) as stream:
                    async for reply in stream:
                        said = reply.text
                        if session.cancel is not cancel:  # a new chat was begun: nobody waits for this answer
                            return
                        session.messages = [*earlier, _assistant(said, reply.html)]
                        yield {self.w.chat: session.messages}
            if remember and session.cancel is cancel:
                session.heard(asked, said)
            return
        except ContextOverflow as error:
            problem = f"{error.message}, or begin a new chat"
        except ToolError as error:
            problem = error.message
        except Exception as error:
            problem = failure(error)
        if session.cancel is not cancel:
            return
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
        """Forget the conversation; the images stay."""
        session = session or Session()
        session.forget()
        return session, [], ""


def failure(error: Exception) -> str:
    """What to tell a person about a fault of the model; the log has the rest."""
    logging.getLogger(__name__).error("the model failed", exc_info=error)
    return f"The model failed ({type(error).__name__}); the terminal that runs this page shows why."


def lay_out(session: Any, shown: Sequence[Example], plain: dict[str, Any]) -> Widgets:
    """The tab's components, inside the caller's `gr.Tab`."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            pictures = gr.Gallery(
                label="Images",
                type="filepath",
                file_types=["image"],
                sources=["upload", "clipboard"],
                buttons=["fullscreen"],
                interactive=True,
                columns=2,
                height=340,
                object_fit="contain",
                elem_id="picture",
            )
            image_notice = gr.HTML("", elem_id="image-notice", **plain)
            cards = gr.HTML(
                examples.render(tuple(shown)),
                js_on_load=page.EXAMPLES_JS,
                visible=bool(shown),
                elem_id="examples",
                **plain,
            )
        with gr.Column(scale=7, min_width=300):
            chat = gr.Chatbot(
                label="Conversation",
                show_label=False,
                elem_id="chat",
                height=560,
                placeholder=page.CHAT_EMPTY,
                buttons=[],
                feedback_options=None,
                layout="bubble",
                render_markdown=False,
                allow_tags=False,
            )
            notice = gr.HTML("", elem_id="notice", **plain)
            question = gr.Textbox(
                label="Question",
                placeholder="What do you want to know about the image?",
                max_length=LONGEST_QUESTION,
                lines=1,
                max_lines=4,
                elem_id="question",
            )
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80)
                new_chat = gr.Button("New chat", elem_id="new-chat", min_width=80)
            remember, sampling = _settings()
    return Widgets(
        session,
        pictures,
        cards,
        chat,
        question,
        ask,
        stop,
        new_chat,
        notice,
        image_notice,
        remember,
        sampling,
    )


def _settings() -> tuple[Any, tuple[Any, ...]]:
    """Controls in the order of `sampling_of`."""
    import gradio as gr

    with gr.Accordion("Answer settings", open=False, elem_id="settings"):
        remember = gr.Checkbox(True, label="Earlier questions and answers are part of the conversation")
        length = gr.Slider(1, 512, value=64, step=1, label="Longest answer (tokens)", elem_id="length")
        temperature = gr.Slider(
            0, 1.5, value=0, step=0.1, label="Temperature (0 = always the likeliest token)", elem_id="temperature"
        )
        with gr.Row():
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top p", min_width=200)
            top_k = gr.Slider(0, 100, value=0, step=1, label="Top k (0 = all tokens)", min_width=200, elem_id="top-k")
        with gr.Row():
            min_p = gr.Slider(0, 1, value=0, step=0.05, label="Min p", min_width=200)
            penalty = gr.Slider(0.5, 2, value=1, step=0.05, label="Repetition penalty (1 = off)", min_width=200)
        # not a number field: an empty one of those is 0
        seed = gr.Textbox("", label="Seed (empty = another one each time)", max_length=20)
        stop = gr.Textbox("", label="Stop at these words (one per line)", lines=1, max_lines=4)
    return remember, (length, temperature, top_p, top_k, min_p, penalty, seed, stop)


def connect(w: Widgets, on: Handlers, model: Any, quick: dict[str, Any], queued: dict[str, Any]) -> None:
    """Which handler each event runs."""
    import gradio as gr

    # preprocess=False: the widget would decode the files itself and answer a bad one with a stack trace;
    # that the paths lie in the upload folder is checked either way
    shown = [w.session, w.pictures, w.image_notice, w.notice]
    w.pictures.change(on.take_images, [w.pictures, w.session], shown, preprocess=False, **quick)

    def take_example(session: Session | None, event: Any) -> Updates:
        return on.take_example(session, event.index)

    # by this annotation Gradio knows what to pass; the name is not global, so it cannot be written above
    take_example.__annotations__["event"] = gr.EventData
    w.examples.click(take_example, [w.session], [*shown, w.question], **quick)
    asked = [w.session, w.question, w.chat, w.ask, w.stop, w.notice]
    gr.on(
        [w.ask.click, w.question.submit], on.begin, [w.session, w.question], asked, trigger_mode="once", **quick
    ).then(
        on.answer,
        [w.session, model, w.remember, *w.sampling],
        [w.chat, w.notice],
        show_progress="hidden",
        **queued,
    ).then(on.end, [w.session], [w.chat, w.ask, w.stop], **quick)
    w.stop.click(on.stop, [w.session], [w.stop], **quick)
    for begin_again in (w.new_chat.click, w.chat.clear):
        begin_again(on.new_chat, [w.session], [w.session, w.chat, w.notice], **quick)
    model.change(on.stop, [w.session], [w.stop], **quick)


def _picture(path: str) -> Picture:
    image = read_image(Path(path))
    return Picture(image, page.thumbnail(preprocess.open_image(image.data)), path)


def _assistant(text: str, breakdown: str = "") -> dict[str, Any]:
    words = _text(text) or ("(empty answer)" if breakdown else "…")
    return {"role": "assistant", "content": [words, _html(breakdown)] if breakdown else [words]}


def _text(words: str) -> str:
    """What a person or a model wrote, as the chat must get it: with Markdown off it still takes text for HTML."""
    return escape(words, quote=False)


def _html(value: str) -> dict[str, Any]:
    """Our own markup inside a chat message."""
    return {"type": "component", "component": "html", "value": value, "constructor_args": {}, "props": {}}
