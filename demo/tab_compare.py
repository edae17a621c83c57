"""The Compare tab: the same question to several models, one after the other, answers and latency side by side."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from demo import page
from demo.answering import Reply, Run, replies, sampling_of
from demo.instruments import Instruments
from demo.session import Engines, Session
from demo.tab_chat import BUSY, LONGEST_QUESTION, NO_IMAGE, NO_QUESTION, Updates, failure
from demo.timeline import milliseconds
from runtime.api import Message, Sampling
from runtime.images import question as question_message
from vlm.errors import ToolError

MOST_MODELS = 4
TOO_FEW = "Choose two models or more."
WARMUPS = 2
ACTIVITY = "compare"


@dataclass(frozen=True)
class Column:
    """One model's part of a comparison.

    Attributes:
        load_s: seconds to load it; None while it is not loaded.
    """

    name: str
    label: str
    state: str = "waits for its turn"
    text: str = ""
    problem: str = ""
    load_s: float | None = None
    reply: Reply | None = None


@dataclass(frozen=True)
class Widgets:
    models: Any
    question: Any
    length: Any
    run: Any
    stop: Any
    columns: Any
    notice: Any


class Handlers:
    def __init__(self, widgets: Widgets, engines: Engines, instruments: Instruments) -> None:
        self.w, self.engines, self.instruments = widgets, engines, instruments

    def begin(self, session: Session | None, models: Sequence[str], question: str) -> Updates:
        """Check, and switch the buttons; `compare` runs only where `session.busy` was set here."""
        import gradio as gr

        session = session or Session()
        problem = ""
        if session.busy:
            problem = BUSY
        elif not session.pictures:
            problem = NO_IMAGE + " (in the Chat tab)"
        elif not question.strip():
            problem = NO_QUESTION
        elif len(models) < 2:
            problem = TOO_FEW
        elif len(models) > MOST_MODELS:
            problem = f"Choose at most {MOST_MODELS} models."
        if problem:
            return {self.w.notice: page.notice(problem)}
        session.busy, session.cancel, session.activity = True, threading.Event(), ACTIVITY
        return {
            self.w.notice: "",
            self.w.columns: page.status("Waiting for the model …"),
            self.w.run: gr.update(interactive=False),
            self.w.stop: gr.update(interactive=True),
        }

    async def compare(
        self, session: Session | None, models: Sequence[str], question: str, length: float | None
    ) -> AsyncIterator[Updates]:
        """Load, warm up, ask, free; then the next."""
        import gradio as gr

        if session is None or session.activity != ACTIVITY or session.cancel is None:
            yield {self.w.columns: gr.skip()}
            return
        asked = [question_message(question.strip()[:LONGEST_QUESTION], *(p.image for p in session.pictures))]
        try:
            sampling = sampling_of(length)
            columns = [Column(self.engines.entry(key).name, self.engines.entry(key).label) for key in models]
        except ToolError as error:
            yield {self.w.columns: "", self.w.notice: page.notice(error.message)}
            return
        async with self.engines.wanted(session.cancel):
            for index, key in enumerate(models):
                async with aclosing(self._one(columns[index], key, asked, sampling, session.cancel)) as stream:
                    async for column in stream:
                        columns[index] = column
                        yield {self.w.columns: render(columns)}
        yield {self.w.columns: render(columns)}

    async def _one(
        self, column: Column, key: str, asked: Sequence[Message], sampling: Sampling, cancel: threading.Event
    ) -> AsyncGenerator[Column, None]:
        if cancel.is_set():
            yield replace(column, state="stopped")
            return
        yield replace(column, state="loading …")
        try:
            began_ns = self.instruments.clock.now_ns()
            held = self.engines.holds(key)
            engine = await asyncio.to_thread(self.engines.use, key)
            load_s = None if held else (self.instruments.clock.now_ns() - began_ns) / 1e9
            column = replace(column, load_s=load_s)
            yield replace(column, state="warming up …")
            await asyncio.to_thread(engine.warmup, WARMUPS)
            # an event of its own: the stream sets it when it ends, and the next model must still be asked
            own = threading.Event()
            run = Run(engine, self.instruments, column.label, own, reuse="none")
            async with aclosing(replies(run, asked, sampling)) as stream:
                async for reply in stream:
                    if cancel.is_set():
                        own.set()
                    column = replace(column, state="answering …", text=reply.text, reply=reply)
                    yield column
            yield replace(column, state="stopped" if cancel.is_set() else "done")
        except ToolError as error:
            yield replace(column, state="failed", problem=error.message)
        except Exception as error:
            yield replace(column, state="failed", problem=failure(error))

    def end(self, session: Session | None) -> tuple[Any, ...]:
        import gradio as gr

        if session is not None and session.activity == ACTIVITY:
            session.busy, session.activity = False, ""
        return gr.update(interactive=True), gr.update(interactive=False)

    def stop(self, session: Session | None) -> Any:
        import gradio as gr

        if session is not None and session.activity == ACTIVITY:
            session.stop()
        return gr.update(interactive=False)


def render(columns: Sequence[Column]) -> str:
    """Verdict, table and one column per model."""
    done = [column for column in columns if column.state == "done"]
    return (
        f"{_verdict(done, len(columns))}{_table(done)}"
        f'<div class="answer-columns">{"".join(_column(column) for column in columns)}</div>'
    )


def _verdict(done: Sequence[Column], wanted: int) -> str:
    if len(done) < 2:
        return ""
    same = len({column.text for column in done}) == 1
    missing = "" if len(done) == wanted else f" ({len(done)} of {wanted} answered)"
    text = "All answers are the same" if same else "The answers differ"
    return (
        f'<p class="verdict" role="status">{text}{missing}. Models ran one after the other, caches off, warmed up.</p>'
    )


def _table(done: Sequence[Column]) -> str:
    if len(done) < 2:
        return ""
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("model", "total ms", "first token ms", "per token ms", "tokens/s", "load s")
    )
    rows = ""
    for column in done:
        view = column.reply.view if column.reply else None
        if view is None:
            continue
        speed = None if view.tokens_per_s is None else view.tokens_per_s
        values = (view.total_ms, view.timing.ttft_ms, view.timing.tpot_ms, speed)
        cells = "".join(f"<td>{'–' if value is None else milliseconds(value)}</td>" for value in values)
        load = "held" if column.load_s is None else f"{column.load_s:.2f}"
        rows += f'<tr><th scope="row">{escape(column.name)}</th>{cells}<td>{load}</td></tr>'
    return f'<div class="wide"><table class="figures numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _column(column: Column) -> str:
    breakdown = column.reply.html if column.reply else ""
    problem = page.notice(column.problem) if column.problem else ""
    return (
        f'<section class="answer-column" aria-label="{escape(column.name)}" data-state="{column.state}">'
        f'<h3>{escape(column.label)}</h3><p class="column-state">{column.state}</p>'
        f'<p class="column-answer">{escape(column.text)}</p>{problem}{breakdown}</section>'
    )


def lay_out(engines: Engines, plain: dict[str, Any]) -> Widgets:
    """The tab's components, inside the caller's `gr.Tab`."""
    import gradio as gr

    choices = [(entry.label, key) for key, entry in engines.entries.items()]
    models = gr.CheckboxGroup(
        choices,
        value=[key for _, key in choices[:2]],
        label="Models (run one after the other)",
        elem_id="compare-models",
    )
    with gr.Row():
        question = gr.Textbox(
            label="Question about the images of the Chat tab",
            max_length=LONGEST_QUESTION,
            elem_id="compare-question",
            scale=4,
            min_width=240,
        )
        length = gr.Slider(1, 512, value=64, step=1, label="Longest answer (tokens)", scale=2, min_width=240)
    with gr.Row():
        run = gr.Button("Compare", variant="primary", elem_id="compare", min_width=80)
        stop = gr.Button("Stop comparing", variant="stop", interactive=False, elem_id="compare-stop", min_width=80)
    notice = gr.HTML("", elem_id="compare-notice", **plain)
    columns = gr.HTML("", elem_id="columns", **plain)
    return Widgets(models, question, length, run, stop, columns, notice)


def connect(w: Widgets, on: Handlers, session: Any, quick: dict[str, Any], queued: dict[str, Any]) -> None:
    import gradio as gr

    gr.on(
        [w.run.click, w.question.submit],
        on.begin,
        [session, w.models, w.question],
        [w.notice, w.columns, w.run, w.stop],
        trigger_mode="once",
        **quick,
    ).then(
        on.compare, [session, w.models, w.question, w.length], [w.columns, w.notice], show_progress="hidden", **queued
    ).then(on.end, [session], [w.run, w.stop], **quick)
    w.stop.click(on.stop, [session], [w.stop], **quick)
