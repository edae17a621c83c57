"""The page: which widgets there are, and which handler each event runs. Gradio is imported inside functions only."""

from __future__ import annotations

from typing import Any

from demo import examples, page
from demo.handlers import LONGEST_QUESTION, Handlers, Updates, Widgets
from demo.session import Engines, Session

MODEL = "model"  # every event that touches the engine shares this concurrency id
MAX_UPLOAD = 15 << 20


def build(engines: Engines, shown: tuple[examples.Example, ...] = (), default: str = "") -> Any:
    """The whole page as `gradio.Blocks`, not launched.

    Args:
        default: key of the model chosen at first.
    """
    import gradio as gr

    first = default or next(iter(engines.entries))
    with gr.Blocks(title="align-edge", delete_cache=(3600, 86400), analytics_enabled=False) as blocks:
        widgets = _lay_out(engines, shown, first)
        _connect(blocks, widgets, Handlers(widgets, engines, shown))
    blocks.queue(max_size=16, default_concurrency_limit=8, api_open=False)
    return blocks


def _lay_out(engines: Engines, shown: tuple[examples.Example, ...], first: str) -> Widgets:
    import gradio as gr

    session = gr.State(None, time_to_live=86400, delete_callback=_forget)
    plain: dict[str, Any] = {"apply_default_css": False, "elem_classes": "page-html"}
    gr.HTML(page.HEADER, **plain)
    model, card = _model_row(engines, first, plain)
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            picture = gr.Image(
                label="Image",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                buttons=["fullscreen"],
                height=340,
                elem_id="picture",
                alt_text="The image your questions are about",
                placeholder="Drop an image here\nor click to choose one",
            )
            image_notice = gr.HTML("", elem_id="image-notice", **plain)
            cards = gr.HTML(
                examples.render(shown),
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
            with gr.Accordion("Answer settings", open=False, elem_id="settings"):
                length = gr.Slider(1, 512, value=64, step=1, label="Longest answer (tokens)", elem_id="length")
                temperature = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0 = always the likeliest token)")
    return Widgets(
        session,
        model,
        card,
        picture,
        cards,
        chat,
        question,
        ask,
        stop,
        new_chat,
        notice,
        image_notice,
        length,
        temperature,
    )


def _model_row(engines: Engines, first: str, plain: dict[str, Any]) -> tuple[Any, Any]:
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
            card = gr.HTML(page.model_card(engines.entries[first], engines.info(first)), elem_id="card", **plain)
    return model, card


def _connect(blocks: Any, w: Widgets, on: Handlers) -> None:
    import gradio as gr

    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    model: dict[str, Any] = {"concurrency_id": MODEL, "concurrency_limit": 1, "api_visibility": "private"}
    blocks.load(on.open_page, None, [w.session], **quick)
    # preprocess=False: the widget would decode the file itself and answer a bad one with a stack trace;
    # that the path lies in the upload folder is checked either way
    shown = [w.session, w.picture, w.image_notice, w.notice]
    w.picture.upload(on.take_image, [w.picture, w.session], shown, preprocess=False, **quick)
    w.picture.clear(on.drop_image, [w.session], shown, **quick)

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
        [w.session, w.model, w.length, w.temperature],
        [w.chat, w.notice],
        show_progress="hidden",
        **model,
    ).then(on.end, [w.session], [w.chat, w.ask, w.stop], **quick)
    w.stop.click(on.stop, [w.session], [w.stop], **quick)
    for begin_again in (w.new_chat.click, w.chat.clear):
        begin_again(on.new_chat, [w.session], [w.session, w.chat, w.notice], **quick)
    w.model.change(on.stop, [w.session], [w.stop], **quick)
    w.model.change(on.choose_model, [w.model], [w.card, w.notice], show_progress="hidden", **model)


def _forget(session: Session | None) -> None:
    if session is not None:
        session.stop()


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
