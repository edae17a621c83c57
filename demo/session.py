"""One person's session, the one engine in memory, and the bridge from the engine's thread to the page's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.catalogue import Entry
from runtime.api import Done, EncodedImage, Event, Failed, Message, ModelInfo, Sampling
from runtime.engine import Engine
from vlm.errors import UserError

FRAME_S = 0.05  # more than 20 updates a second cost the browser and show a person nothing
HEARTBEAT_S = 0.25  # how soon a closed tab is noticed while the model is silent


@dataclass
class Session:
    """What belongs to one open page. Lives in the page's state, never in a global.

    Attributes:
        thumbnail: the image as the chat shows it, HTML.
        image_told: the chat already shows this image.
        messages: the chat as the widget takes it.
        question: what the next answer is for; "" when there is nothing to answer.
        busy: a question waits for its answer or is being answered.
        cancel: ends the running answer. None until the first question.
    """

    image: EncodedImage | None = None
    thumbnail: str = ""
    image_told: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    question: str = ""
    busy: bool = False
    cancel: threading.Event | None = None

    def show(self, image: EncodedImage, thumbnail: str) -> None:
        """From now on questions are about this image."""
        self.image, self.thumbnail, self.image_told = image, thumbnail, False

    def stop(self) -> None:
        if self.cancel is not None:
            self.cancel.set()


class Engines:
    """At most one model in memory: an edge board rarely has room for two."""

    def __init__(self, entries: Sequence[Entry], loader: Callable[[Path], Engine]) -> None:
        self.entries = {entry.key: entry for entry in entries}
        self._loader = loader
        self._lock = threading.Lock()
        self._key = ""
        self._engine: Engine | None = None
        self._answers = 0

    def use(self, key: str) -> Engine:
        """The engine of this model; another one is freed first.

        Raises:
            UserError: no such model on offer, or it cannot be loaded.
        """
        if key not in self.entries:
            raise UserError("this model is not on offer any more; reload the page")
        with self._lock:
            if self._engine is None or key != self._key:
                self._free()
                self._engine = self._loader(self.entries[key].path)
                self._key, self._answers = key, 0
            return self._engine

    def holds(self, key: str) -> bool:
        return self._engine is not None and key == self._key

    def info(self, key: str) -> ModelInfo | None:
        """What the engine says about this model, if it is the one in memory."""
        engine = self._engine
        return engine.info if engine is not None and key == self._key else None

    def count_answer(self) -> bool:
        """Note one more answer; True for the first since loading."""
        self._answers += 1
        return self._answers == 1

    def close(self) -> None:
        with self._lock:
            self._free()

    def _free(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine, self._key = None, ""


async def batches(
    engine: Engine, messages: Sequence[Message], sampling: Sampling, cancel: threading.Event
) -> AsyncIterator[list[Event]]:
    """Events of one request, gathered into at most one batch per frame; the last batch ends with Done.

    A batch may be empty: the web server notices that a tab was closed only when it is given something.
    However the caller leaves (stop, closed tab, error), the engine is told to stop too.

    Raises:
        Exception: whatever the request failed with.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Event | Failed] = asyncio.Queue()

    def listen(event: Event | Failed) -> None:  # on the engine's thread
        with contextlib.suppress(RuntimeError):  # the loop is gone: the server is shutting down
            loop.call_soon_threadsafe(arrived.put_nowait, event)

    engine.submit(messages, sampling, listener=listen, cancel=cancel)
    try:
        while True:
            batch = await _gather(arrived)
            yield batch
            if batch and isinstance(batch[-1], Done):
                return
    finally:
        cancel.set()


async def _gather(arrived: asyncio.Queue[Event | Failed]) -> list[Event]:
    try:
        first = await asyncio.wait_for(arrived.get(), HEARTBEAT_S)
    except asyncio.TimeoutError:
        return []
    gathered = [first, *_drain(arrived)]
    if not isinstance(gathered[-1], (Done, Failed)):
        await asyncio.sleep(FRAME_S)
        gathered += _drain(arrived)
    if isinstance(gathered[-1], Failed):
        raise gathered[-1].error
    return [event for event in gathered if not isinstance(event, Failed)]


def _drain(arrived: asyncio.Queue[Event | Failed]) -> list[Event | Failed]:
    return [arrived.get_nowait() for _ in range(arrived.qsize())]
