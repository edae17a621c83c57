"""A scripted engine on a clock that moves only when told to, and what tests say to it."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image as Pillow

from runtime.api import Done, Event, Sampling
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.clock import VirtualClock
from runtime.engine import Engine
from runtime.images import from_pillow, question

MS = 1_000_000


def fake(reply: object = "abc", queue_size: int = 8, **script: object) -> tuple[Engine, FakeBackend, VirtualClock]:
    clock = VirtualClock(start_ns=5 * MS)
    backend = FakeBackend(FakeScript(reply=reply, clock=clock, **script))  # type: ignore[arg-type]
    return Engine(backend, clock, queue_size), backend, clock


def picture(value: int = 0) -> object:
    return from_pillow(Pillow.new("RGB", (6, 4), (value, 1, 2)))


def run(engine: Engine, text: str = "hi", sampling: Sampling | None = None, **options: object) -> list[Event]:
    return list(engine.generate([question(text, picture())], sampling, **options))  # type: ignore[arg-type]


def last(events: Iterable[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done
