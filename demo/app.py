"""The page: its tabs, and what they share. Gradio is imported inside functions only."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import examples, page, tab_about, tab_chat, tab_compare, tab_live, tab_profile
from demo.instruments import Instruments
from demo.session import Engines, People, Session
from vlm.errors import ToolError

MODEL = "model"  # events that use the engine for long share this concurrency id
MAX_UPLOAD = 15 << 20
DEVICE_EVERY_S = 2.0
SWITCH_S = 0.0005
QUEUE_LOOK_S = 0.02
PLAIN: dict[str, Any] = {"apply_default_css": False, "elem_classes": "page-html"}
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# who uses the engine is settled by `Engines.turn`, where one who waits can still press Stop
QUEUED: dict[str, Any] = {"concurrency_id": MODEL, "concurrency_limit": 16, "api_visibility": "private"}


@dataclass(frozen=True)
class Setting:
    """What the page is built around.

    Attributes:
        default: key of the model chosen at first; "" is the first one.
        folder: where profiles are written; None is a new temporary folder.
        backend: every model is profiled on it.
        opener: how the profiler gets a model.
    """

    shown: tuple[examples.Example, ...] = ()
    default: str = ""
    folder: Path | None = None
    backend: str = "auto"
    instruments: Instruments | None = None
    opener: tab_profile.Opener = tab_profile.process_runner


class Choice:
    """Switching models: the one in memory is freed, whoever uses it now ends first."""

    def __init__(self, engines: Engines, model: Any, card: Any, about: Any, notice: Any) -> None:
        self._engines = engines
        self._card, self._about, self._notice, self.model = card, about, notice, model

    async def choose(self, key: str) -> AsyncIterator[dict[Any, Any]]:
        try:
            entry = self._engines.entry(key)
        except ToolError as error:
            yield {self._notice: page.notice(error.message)}
            return
        about = tab_about.render(entry)
        yield {self._card: page.model_card(entry, state="Loading …"), self._about: about, self._notice: ""}
        try:
            async with self._engines.turn:
                engine = await asyncio.to_thread(self._engines.use, key)
        except Exception as error:
            card = page.model_card(entry, state="Not loaded.")
            problem = error.message if isinstance(error, ToolError) else tab_chat.failure(error)
            yield {self._card: card, self._notice: page.notice(problem)}
            return
        yield {self._card: page.model_card(entry, info=engine.info)}

    def connect(self) -> None:
        outputs = [self._card, self._about, self._notice]
        self.model.change(self.choose, [self.model], outputs, show_progress="hidden", **QUEUED)


def build(engines: Engines, setting: Setting | None = None) -> Any:
    """The whole page as `gradio.Blocks`, not launched."""
    import gradio as gr

    # the engine's thread asks for the interpreter's lock between any two native calls; while the server renders a
    # page, it would by default wait 5 ms each time, which is ten tokens of a small model
    sys.setswitchinterval(SWITCH_S)
    setting = setting or Setting()
    instruments = setting.instruments or Instruments()
    people = People()
    with gr.Blocks(title="align-edge", delete_cache=(3600, 86400), analytics_enabled=False) as blocks:
        session = gr.State(None, time_to_live=86400)
        gr.HTML(page.HEADER, **PLAIN)
        first = setting.default or next(iter(engines.entries))
        model, card = _model_row(engines, first)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat", id="chat-tab"):
                chat = tab_chat.lay_out(session, setting.shown, PLAIN)
            with gr.Tab("Compare", id="compare-tab"):
                compare = tab_compare.lay_out(engines, PLAIN)
            with gr.Tab("Live", id="live-tab"):
                live = tab_live.lay_out(PLAIN)
            with gr.Tab("Profile", id="profile-tab"):
                profile = tab_profile.lay_out(engines, PLAIN)
            with gr.Tab("About", id="about-tab"):
                about = gr.HTML(tab_about.render(engines.entries[first]), elem_id="about", **PLAIN)
        _device(instruments)
        tab_chat.connect(chat, tab_chat.Handlers(chat, engines, setting.shown, instruments), model, QUICK, QUEUED)
        tab_compare.connect(compare, tab_compare.Handlers(compare, engines, instruments), session, QUICK, QUEUED)
        tab_live.connect(live, tab_live.Handlers(engines, instruments), model, session)
        profiling = tab_profile.Handlers(profile, engines, instruments, setting.folder, setting.backend, setting.opener)
        tab_profile.connect(profile, profiling, session, QUICK, QUEUED)
        Choice(engines, model, card, about, chat.notice).connect()
        _welcome(blocks, people, session)
    blocks.queue(max_size=16, default_concurrency_limit=8, api_open=False)
    _calm(blocks)
    return blocks


def _calm(blocks: Any) -> None:
    """Gradio looks into its empty queue a thousand times a second, which takes the engine a twentieth of its core."""
    queue: Any = getattr(blocks, "_queue", None)
    if hasattr(queue, "sleep_when_free"):
        queue.sleep_when_free = QUEUE_LOOK_S


def _model_row(engines: Engines, first: str) -> tuple[Any, Any]:
    import gradio as gr

    with gr.Row(elem_id="model-row"):
        with gr.Column(scale=5, min_width=300):
            model = gr.Dropdown(
                [(entry.label, key) for key, entry in engines.entries.items()],
                value=first,
                label="Model",
                filterable=False,
                elem_id="model",
            )
        with gr.Column(scale=7, min_width=300):
            card = gr.HTML(page.model_card(engines.entries[first], engines.info(first)), elem_id="card", **PLAIN)
    return model, card


def _device(instruments: Instruments) -> None:
    """A card that is read anew every few seconds."""
    import gradio as gr

    def look() -> str:
        return page.device_card(instruments.look())

    card = gr.HTML(look(), elem_id="device", **PLAIN)
    gr.Timer(DEVICE_EVERY_S).tick(look, None, [card], **QUICK)


def _welcome(blocks: Any, people: People, session: Any) -> None:
    """A session for every page that opens; what it runs and its files end with it."""
    import gradio as gr

    def enter(request: Any) -> Session:
        return people.enter(str(request.session_hash))

    def leave(request: Any) -> None:
        people.leave(str(request.session_hash))

    # by this annotation Gradio knows what to pass; the name is not global, so it cannot be written above
    enter.__annotations__["request"] = leave.__annotations__["request"] = gr.Request
    blocks.load(enter, None, [session], **QUICK)
    blocks.unload(leave)


def launch_options() -> dict[str, Any]:
    """Arguments of `Blocks.launch` that are the same everywhere: nothing leaves this machine, nothing is kept."""
    return {
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": False,
        "max_file_size": MAX_UPLOAD,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "mcp_server": False,
        "strict_cors": True,
        # its only use: without it, launching fails when the page takes longer than 3 s to come, as on a busy board
        "_frontend": False,
        "theme": _theme(),
        "css": page.CSS.read_text(),
    }


def _theme() -> Any:
    import gradio as gr

    # fonts the machine has: the default theme's would be fetched from the internet
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=[gr.themes.Font("sans-serif")],
        font_mono=[gr.themes.Font("monospace")],
    )
    # the stock grey and the stock button miss the contrast of 4.5 : 1 that small text needs
    return theme.set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="#556274",
        body_text_color_subdued_dark="#a7b3c4",
        block_label_text_color="#556274",
        block_title_text_color="#556274",
        block_title_text_color_dark="#a7b3c4",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        block_shadow="0 1px 2px rgba(15, 23, 42, .05)",
        input_background_fill="*neutral_50",
        input_placeholder_color="#616e80",
        input_placeholder_color_dark="#a7b3c4",
    )
