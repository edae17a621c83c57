"""The newest frame wins, every other one is counted, and a silent camera ends the answer that runs."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.camera import STALE_NS, Feed, frame_bytes
from demo.catalogue import Entry
from demo.instruments import Instruments
from demo.session import Engines, Session
from demo.tab_live import Handlers
from runtime.api import EncodedImage, Message
from runtime.api import Image as RgbImage
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.clock import VirtualClock
from tests.demo.conftest import GatedBackend, WatchedEngine
from vlm.errors import BadImage


def frame(data: bytes) -> dict[str, Any]:
    return {"path": None, "url": "data:image/png;base64," + base64.b64encode(data).decode()}


def test_the_newest_frame_wins() -> None:
    feed = Feed(VirtualClock())
    for data in (b"1", b"2", b"3"):
        feed.put(EncodedImage(data))
    taken = feed.take()
    assert taken is not None
    assert taken.image.data == b"3"
    assert (feed.received, feed.dropped, feed.take()) == (3, 2, None)
    feed.put(EncodedImage(b"4"))
    assert feed.dropped == 2


def test_a_camera_falls_silent_by_the_clock_or_when_the_page_goes() -> None:
    clock = VirtualClock()
    feed = Feed(clock)
    feed.put(EncodedImage(b"1"))
    clock.wait_ns(STALE_NS)
    assert not feed.silent
    clock.wait_ns(1)
    assert feed.silent
    feed.put(EncodedImage(b"2"))
    assert not feed.silent
    feed.close()
    assert feed.silent
    assert feed.cancel.is_set()


@pytest.mark.parametrize("url", ["", "http://somewhere/a.png", "data:text/html;base64,aaaa", "data:image/png;base64,?"])
def test_what_is_no_image_is_refused(url: str) -> None:
    with pytest.raises(BadImage, match="the camera sent"):
        frame_bytes(url)


def live(backend: FakeBackend) -> tuple[Handlers, Engines, Session]:
    engines = Engines([Entry(Path("m"), "m", "onnx", "int8", 1, True)], lambda path: WatchedEngine(backend))
    return Handlers(engines, Instruments(Path("/nowhere"), VirtualClock())), engines, Session()


def test_frames_are_answered_while_newer_ones_replace_each_other(png: bytes) -> None:
    gated = GatedBackend(FakeScript("ab"), "gated")
    on, engines, session = live(gated)

    async def run() -> tuple[str, int, int]:
        await on.take_frame(frame(png), "what ?", "m", session)
        feed = session.feed
        assert feed is not None
        while not gated.standing.is_set():  # the first frame is being answered and stands still
            await asyncio.sleep(0.01)
        for _ in range(5):
            await on.take_frame(frame(png), "what ?", "m", session)
        gated.let(100)
        while feed.answered < 2:
            await asyncio.sleep(0.01)
        dropped, html = feed.dropped, feed.html
        feed.close()
        await asyncio.gather(*on._tasks)
        return html, feed.answered, dropped

    html, answered, dropped = asyncio.run(run())
    engines.close()
    assert answered >= 2
    assert dropped >= 4  # of five that came while the first was answered, the newest was taken
    assert ">ab</p>" in html
    assert "Time to answer" in html


def test_the_newest_frame_is_answered_when_others_had_the_model() -> None:
    seen = []

    def reply(messages: Sequence[Message]) -> str:
        (image,) = (part for part in messages[-1].content if isinstance(part, RgbImage))
        seen.append(image.rgb.shape[1])
        return "x"

    on, engines, session = live(FakeBackend(FakeScript(reply)))

    async def run() -> None:
        async with engines.turn:
            for width in (1, 2, 3):
                await on.take_frame(frame(picture(width)), "what ?", "m", session)
                for _ in range(5):
                    await asyncio.sleep(0)  # whoever has something to answer asks for its turn
        feed = session.feed
        assert feed is not None
        while not feed.answered:
            await asyncio.sleep(0.01)
        feed.close()
        await asyncio.gather(*on._tasks)

    asyncio.run(run())
    assert seen == [3]
    engines.close()


def picture(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def test_leaving_ends_the_answer_in_the_engine(png: bytes) -> None:
    gated = GatedBackend(FakeScript("a very long answer"), "gated")
    on, engines, session = live(gated)

    async def run() -> None:
        await on.take_frame(frame(png), "what ?", "m", session)
        while not gated.standing.is_set():
            await asyncio.sleep(0.01)
        assert session.feed is not None
        session.feed.close()
        gated.let(1)
        await asyncio.gather(*on._tasks)

    asyncio.run(run())
    assert gated.calls.count("step") == 1
    assert session.feed is not None
    assert session.feed.answered == 0
    engines.close()


def test_a_failing_model_is_said_and_the_camera_goes_on(png: bytes) -> None:
    fake = FakeBackend(FakeScript("7", fail_at="prefill"))
    on, engines, session = live(fake)

    async def run() -> str:
        await on.take_frame(frame(png), "what ?", "m", session)
        feed = session.feed
        assert feed is not None
        while "notice" not in feed.html:
            await asyncio.sleep(0.01)
        said = feed.html
        fake.script = FakeScript("8")
        while not feed.answered:
            feed.put(EncodedImage(png))
            await asyncio.sleep(0.01)
        feed.close()
        await asyncio.gather(*on._tasks)
        return said

    assert "The model failed (RuntimeError)" in asyncio.run(run())
    engines.close()


def test_an_engine_is_one_for_all(png: bytes) -> None:
    """A frame waits while somebody else holds the model."""
    on, engines, session = live(FakeBackend())

    async def run() -> int:
        async with engines.turn:
            await on.take_frame(frame(png), "what ?", "m", session)
            await asyncio.sleep(0)
            assert session.feed is not None
            waiting = session.feed.answered
        while not session.feed.answered:
            await asyncio.sleep(0.01)
        session.feed.close()
        await asyncio.gather(*on._tasks)
        return waiting

    assert asyncio.run(run()) == 0
    engines.close()
