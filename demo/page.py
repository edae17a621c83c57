"""The fixed parts of the page as HTML, and the look of everything. Pure strings."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from demo.catalogue import Entry, size_text
from demo.instruments import Reading
from runtime.api import ModelInfo

CSS = Path(__file__).parent / "assets" / "page.css"
HEADER = (
    '<header class="head"><h1>align-edge</h1>'
    "<p>Ask a compressed vision-language model about a picture, and see where every millisecond went.</p></header>"
)
THUMBNAIL = 216  # twice the size it is shown at
UNKNOWN = '<abbr title="cannot be read on this machine">n/a</abbr>'
CHAT_EMPTY = "Choose an image, then ask.\n\nUnder each answer you will see how long every stage of the model took."
# a click anywhere in an example's button sends its number to the server
EXAMPLES_JS = """
element.addEventListener('click', (event) => {
    const card = event.target.closest('[data-index]');
    if (card) trigger('click', {index: Number(card.dataset.index)});
});
"""


def model_card(entry: Entry, info: ModelInfo | None = None, state: str = "") -> str:
    """What a person should know about the model that will answer.

    Args:
        info: what the engine says, once the model is loaded.
        state: what goes on meanwhile.
    """
    facts = [("format", entry.engine), ("precision", entry.precision), ("size", size_text(entry.bytes))]
    if info is not None:
        threads = f", {info.threads} thread{'s' if info.threads > 1 else ''}" if info.device == "cpu" else ""
        facts.append(("runs on", info.device.upper() + threads))
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    status = f'<p class="card-state" role="status">{escape(state)}</p>' if state else ""
    return (
        f'<section class="card" aria-label="Model"><div class="card-line"><strong>{escape(entry.name)}</strong>'
        f"{_verdict(entry)}<dl>{cells}</dl></div>{_warning(entry)}{status}</section>"
    )


def device_card(now: Reading) -> str:
    """Memory, heat, power and clocks as they are; what cannot be read is said to be unknown."""
    used = None if now.memory_total is None or now.memory_free is None else now.memory_total - now.memory_free
    clocks = ", ".join(f"{name} {mhz:.0f} MHz" for name, mhz in now.clock_mhz.items())
    throttled = {None: None, False: "no", True: "YES: " + ", ".join(now.reasons)}[now.throttled]
    facts = [
        ("memory", used and f"{size_text(used)} of {size_text(now.memory_total or 0)}", "used by all programs"),
        (
            "this page and model",
            now.own_memory and size_text(now.own_memory),
            "resident memory of this program and of the process that runs the model",
        ),
        ("temperature", now.celsius and f"{now.celsius:.0f} °C", "hottest zone"),
        ("power", None if now.watts is None else f"{now.watts:.1f} W", now.power_source or "no meter found"),
        ("clocks", clocks or None, "right now"),
        ("throttled", throttled, "slowed down by heat or power limits"),
        ("power mode", now.power_mode, "nvpmodel"),
    ]
    cells = "".join(
        f'<div title="{escape(meaning)}" data-fact="{name}"><dt>{name}</dt><dd>{escape(value) if value else UNKNOWN}</dd></div>'
        for name, value, meaning in facts
        if value or name != "power mode"  # only Jetsons have one
    )
    return (
        f'<section class="card device" aria-label="Device"><div class="card-line"><strong>{escape(now.device)}</strong>'
        f"<dl>{cells}</dl></div></section>"
    )


def status(message: str) -> str:
    """One line about what goes on, announced politely."""
    return f'<p class="card-state" role="status">{escape(message)}</p>'


def thumbnail(image: Image.Image) -> str:
    """The image a question is about, small, as part of the page."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "PNG")
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img class="asked" alt="The image in question" src="data:image/png;base64,{encoded}">'


def notice(message: str) -> str:
    """One line the person must see, announced by screen readers; "" clears it."""
    line = " ".join(message.split())
    return f'<p class="notice" role="alert">{escape(line[:1].upper() + line[1:])}</p>' if line else ""


def _verdict(entry: Entry) -> str:
    if entry.verified is None:
        return '<span class="badge">checkpoint</span>'
    if entry.verified:
        return '<span class="badge good">verified</span>'
    return '<span class="badge bad">not verified</span>'


def _warning(entry: Entry) -> str:
    if entry.verified is not False:
        return ""
    return (
        '<p class="warning"><strong>Do not trust these answers yet.</strong> This artefact did not pass its parity and '
        f"accuracy checks. Find out why: <code>python -m export verify {escape(str(entry.path))}</code></p>"
    )
