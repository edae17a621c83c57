"""Images, students and models that answer only when a test lets them."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime.api import Done, Event, Failed, Logits, Message, Sampling
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine, Listener
from tests.tiny import make_student
from vlm import digits


@pytest.fixture(scope="session")
def png() -> bytes:
    data = io.BytesIO()
    digits.sample("test", 0).image.save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("runs") / "tiny" / "student")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for all tests of a module; every test opens windows of its own in it.

    Not for the whole run: while it is open, its event loop occupies the thread, and `asyncio.run` refuses to work.
    """
    from tests.demo import browser

    with browser.chromium() as found:
        yield found


@pytest.fixture
def visits() -> Iterator[list[Any]]:
    """What a test opens is put here, and closed at its end, the last first."""
    opened: list[Any] = []
    yield opened
    with contextlib.ExitStack() as stack:  # one that fails to close must not leave the others open
        for thing in opened:
            stack.callback(thing.close)


class GatedBackend(FakeBackend):
    """Takes a decode step only when a test hands it a permit, so that an answer stands still to be looked at."""

    def __init__(self, script: FakeScript, name: str) -> None:
        super().__init__(script, name)
        self.permits = threading.Semaphore(0)
        self.standing = threading.Event()  # from the first step on

    def step(self, token_id: int) -> Logits:
        self.standing.set()
        if not self.permits.acquire(timeout=60):
            raise RuntimeError("no permit within a minute")
        return super().step(token_id)

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self.permits.release()


class WatchedEngine(Engine):
    """Keeps what each request was, how it can be cancelled, and what the engine said of it."""

    def __init__(self, backend: FakeBackend) -> None:
        super().__init__(backend)
        self.asked: list[tuple[Message, ...]] = []
        self.cancels: list[threading.Event] = []
        self.samplings: list[Sampling | None] = []
        self.events: list[list[Event | Failed]] = []
        self.ended: list[threading.Event] = []

    def submit(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        listener: Listener,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> None:
        cancel = cancel or threading.Event()
        self.asked.append(tuple(messages))
        self.cancels.append(cancel)
        self.samplings.append(sampling)
        said: list[Event | Failed] = []
        ended = threading.Event()
        self.events.append(said)
        self.ended.append(ended)

        def listen(event: Event | Failed) -> None:
            said.append(event)
            listener(event)
            if isinstance(event, (Done, Failed)):
                ended.set()

        super().submit(messages, sampling, listener=listen, cancel=cancel, **options)
