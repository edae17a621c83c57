"""Calls that nobody can interrupt, waited for by somebody who can be."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from runtime.api import Constraint, Logits, QueueFull

T = TypeVar("T")
LOOK_S = 0.05


class Patience:
    """One thread for calls into native code that may take any time; at most one of them is ever given up on.

    A grammar can be written so that llama.cpp works on it for hours. Whoever waits looks at its own cancel flag and deadline
    meanwhile, and leaves; the call goes on until it ends, and until then others are refused.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], Future[object]]] = queue.SimpleQueue()
        self._left: Future[object] | None = None
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], T], check: Callable[[], None]) -> T:
        """What the function gives.

        Args:
            check: asked every 50 ms; raises to leave.

        Raises:
            QueueFull: a call that was left is still running.
        """
        if not self.finished(0.0):
            raise QueueFull("the grammar of an earlier request is still being worked on; try later, or a simpler one")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="patience", daemon=True)
            self._thread.start()
        answer: Future[T] = Future()
        self._calls.put((function, answer))  # type: ignore[arg-type]
        while not wait([answer], LOOK_S).done:
            self._left = answer  # type: ignore[assignment]
            check()
        self._left = None
        return answer.result()

    def finished(self, timeout_s: float) -> bool:
        """Whether no call that was left is running any more, within this time."""
        return self._left is None or bool(wait([self._left], timeout_s).done)

    def _work(self) -> None:
        while True:
            function, answer = self._calls.get()
            try:
                answer.set_result(function())
            except BaseException as error:  # belongs to whoever asked
                answer.set_exception(error)
            del function, answer  # a grammar is freed when its request is done, not when the next one comes


class Watched:
    """A constraint whose every step can be left; see `runtime.api.Constraint`."""

    def __init__(self, make: Callable[[], Constraint], patience: Patience, check: Callable[[], None]) -> None:
        self._patience, self._check = patience, check
        self._constraint = patience.call(make, check)

    def mask(self, logits_V: Logits) -> Logits:
        return self._patience.call(lambda: self._constraint.mask(logits_V), self._check)

    def accept(self, token_id: int) -> None:
        self._patience.call(lambda: self._constraint.accept(token_id), self._check)
