"""Images, students and models that answer only when a test lets them."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime.api import Logits, Message, Sampling
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


class GatedBackend(FakeBackend):
    """Takes a decode step only when a test hands it a permit, so that an answer stands still to be looked at."""

    def __init__(self, script: FakeScript, name: str) -> None:
        super().__init__(script, name)
        self.permits = threading.Semaphore(0)

    def step(self, token_id: int) -> Logits:
        if not self.permits.acquire(timeout=60):
            raise RuntimeError("no permit within a minute")
        return super().step(token_id)

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self.permits.release()


class WatchedEngine(Engine):
    """Keeps what each request was and how it can be cancelled."""

    def __init__(self, backend: FakeBackend) -> None:
        super().__init__(backend)
        self.asked: list[tuple[Message, ...]] = []
        self.cancels: list[threading.Event] = []

    def submit(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        listener: Listener,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> None:
        assert cancel is not None
        self.asked.append(tuple(messages))
        self.cancels.append(cancel)
        super().submit(messages, sampling, listener=listener, cancel=cancel, **options)
