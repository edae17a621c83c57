"""A `ProcessEngine` whose other process is a thread of this one, so that a test can hold the engine behind it in its hand."""

from __future__ import annotations

import os
import threading
from typing import IO

from runtime.engine import Engine
from runtime.engine_process import ProcessEngine
from runtime.engine_worker import serve


class ThreadLink:
    """The pipes of `runtime.child.Child`, the same bytes through them."""

    def __init__(self, engine: Engine) -> None:
        requests, answers = os.pipe(), os.pipe()
        self.stdin: IO[bytes] = os.fdopen(requests[1], "wb")
        self.stdout: IO[bytes] = os.fdopen(answers[0], "rb")
        self._thread = threading.Thread(target=self._run, args=(engine, requests[0], answers[1]), daemon=True)
        self._thread.start()

    def _run(self, engine: Engine, requests: int, answers: int) -> None:
        with os.fdopen(requests, "rb") as inbox, os.fdopen(answers, "wb") as outbox:
            serve(engine, inbox, outbox)

    def end(self) -> int:
        self.stdin.close()
        self._thread.join()
        return 0


def apart(engine: Engine) -> ProcessEngine:
    return ProcessEngine(ThreadLink(engine), engine.info.name)
