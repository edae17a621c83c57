"""The Live tab: a camera, one question, and an answer as often as the model can give one."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from dataclasses import dataclass
from html import escape
from typing import Any

from demo import page
from demo.answering import Run, replies
from demo.camera import Feed, frame_bytes
from demo.instruments import Instruments
from demo.session import Engines, Session
from demo.tab_chat import LONGEST_QUESTION, failure
from demo.timeline import milliseconds
from runtime.api import EncodedImage, Sampling
from runtime.images import question as question_message
from vlm.errors import BadImage, ToolError

EVERY_S = 0.1
LOOK_S = 0.02
ANSWER_TOKENS = 32
DEFAULT_QUESTION = "What do you see?"
OFF = "Switch the camera on, then press Record. Frames stay between this browser and this machine."


@dataclass(frozen=True)
class Widgets:
    camera: Any
    question: Any
    answer: Any
    counts: Any


class Handlers:
    """Frames come in on one side, answers are made on the other; neither waits for the other."""

    def __init__(self, engines: Engines, instruments: Instruments) -> None:
        self.engines, self.instruments = engines, instruments
        self._tasks: set[asyncio.Task[None]] = set()

    async def take_frame(
        self, frame: dict[str, Any] | None, question: str, model: str, session: Session | None
    ) -> tuple[str, str]:
        """Keep the newest frame and say what the tab shows now: the newest answer, the counts."""
        if session is None or not frame or not frame.get("url"):
            return page.status(OFF), ""
        try:
            image = EncodedImage(frame_bytes(frame["url"]), "the frame")
        except BadImage as error:
            return page.notice(error.message), ""
        if session.feed is None or session.feed.silent:
            session.feed = feed = Feed(self.instruments.clock)
            feed.html = page.status("Waiting for the model …")
            task = asyncio.create_task(self._serve(feed))
            self._tasks.add(task)  # the loop itself keeps no task alive
            task.add_done_callback(self._tasks.discard)
        feed = session.feed
        feed.model, feed.question = model, question.strip()[:LONGEST_QUESTION] or DEFAULT_QUESTION
        feed.put(image)
        return feed.html, counts(feed)

    async def _serve(self, feed: Feed) -> None:
        """Answer the newest frame, again and again, until the camera falls silent."""
        while not feed.silent:
            if not feed.waits:
                await asyncio.sleep(LOOK_S)
                continue
            try:
                await self._answer(feed)
            except ToolError as error:
                feed.html = page.notice(error.message)
            except Exception as error:
                feed.html = page.notice(failure(error))

    async def _answer(self, feed: Feed) -> None:
        async with self.engines.turn:  # one frame at a time: a question in the chat waits for one at most
            frame = feed.take()  # while others had the model, newer ones came
            if feed.silent or frame is None:
                return
            engine = await asyncio.to_thread(self.engines.use, feed.model)
            label = self.engines.entries[feed.model].label
            feed.cancel = threading.Event()
            run = Run(engine, self.instruments, label, feed.cancel, self.engines.count_answer())
            began_ns = self.instruments.clock.now_ns()
            asked = [question_message(feed.question, frame.image)]
            async with aclosing(replies(run, asked, Sampling(max_new_tokens=ANSWER_TOKENS))) as stream:
                async for reply in stream:
                    if feed.silent:
                        feed.cancel.set()
                    if reply.view is None:
                        continue
                    if reply.done is not None and reply.done.finish == "cancelled":
                        return
                    waited_ms = (began_ns - frame.arrived_ns) / 1e6
                    feed.html = caption(reply.text, waited_ms, reply.view.total_ms, reply.html)
            feed.answered += 1


def caption(text: str, waited_ms: float, engine_ms: float, breakdown: str) -> str:
    """One answer; the time to it runs from the frame's arrival at this machine."""
    total = waited_ms + engine_ms
    return (
        f'<p class="live-answer" aria-live="polite">{escape(text) or "(empty answer)"}</p>'
        f'<p class="live-time" data-total-ms="{total:.3f}">Time to answer: <b>{milliseconds(total)} ms</b> '
        f"({milliseconds(waited_ms)} ms for its turn, {milliseconds(engine_ms)} ms in the engine)</p>{breakdown}"
    )


def counts(feed: Feed) -> str:
    seconds = max((feed.clock.now_ns() - feed.started_ns) / 1e9, 1e-9)
    rate = f"{feed.answered / seconds:.1f}" if seconds >= 1 else "…"
    cells = [
        ("frames", feed.received),
        ("answered", feed.answered),
        ("dropped", feed.dropped),
        ("answers/s", rate),
    ]
    body = "".join(f'<div data-count="{name}"><dt>{name}</dt><dd>{value}</dd></div>' for name, value in cells)
    return f'<dl class="live-counts" aria-label="Frames">{body}</dl>'


def lay_out(plain: dict[str, Any]) -> Widgets:
    """The tab's components, inside the caller's `gr.Tab`."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            camera = gr.Image(
                label="Camera",
                sources=["webcam"],
                streaming=True,
                webcam_options=gr.WebcamOptions(mirror=False, constraints={"video": {"width": {"ideal": 640}}}),
                height=360,
                elem_id="camera",
            )
        with gr.Column(scale=7, min_width=300):
            question = gr.Textbox(
                DEFAULT_QUESTION,
                label="Question about every frame",
                max_length=LONGEST_QUESTION,
                elem_id="live-question",
            )
            counts_ = gr.HTML("", elem_id="live-counts", **plain)
            answer = gr.HTML(page.status(OFF), elem_id="live", **plain)
    return Widgets(camera, question, answer, counts_)


def connect(w: Widgets, on: Handlers, model: Any, session: Any) -> None:
    w.camera.stream(
        on.take_frame,
        [w.camera, w.question, model, session],
        [w.answer, w.counts],
        preprocess=False,
        stream_every=EVERY_S,
        time_limit=None,
        concurrency_limit=None,
        show_progress="hidden",
        api_visibility="private",
    )
