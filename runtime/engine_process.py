"""An engine in a process of its own, for programs that have other work to do while it answers.

The threads of one Python process share its interpreter lock. A model that takes a token every half millisecond asks for
it between any two native calls, so a web server that renders a page beside it takes a fifth of its speed. Between
processes nothing is shared but the cores. A model that takes its process down does not take the caller with it, and all of
its memory is given back when it is closed.

Events carry the times of the engine's own clock, which on Linux, macOS and Windows is the same in all processes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from runtime.api import Done, EngineClosed, Event, Failed, Message, ModelFailed, ModelInfo, Reuse, Sampling, Sync
from runtime.child import Child, job
from runtime.clock import Clock, SystemClock
from runtime.engine import Warmup
from runtime.options import options_from
from runtime.run import Listener

LOOK_S = 0.02  # how soon a cancelled request is passed on


class Link(Protocol):
    """The two pipes to the process that runs the model."""

    stdin: IO[bytes]
    stdout: IO[bytes]

    def end(self) -> int:
        """Close `stdin`, wait for the process, give its exit status."""
        ...


@dataclass
class _Request:
    listener: Listener
    cancel: threading.Event
    ended: threading.Event = field(default_factory=threading.Event)


class ProcessEngine:
    """The part of `Engine` that a program with a user interface needs. Thread-safe.

    Listeners run on one thread of this process; events that are ready together come together.

    Raises:
        ToolError: what `runtime.load` raises, raised in the other process.
    """

    def __init__(self, link: Link, name: str) -> None:
        self.clock: Clock = SystemClock()
        self._link, self._name = link, name
        self._sending, self._lock = threading.Lock(), threading.Lock()
        self._numbers = itertools.count()
        self._requests: dict[int, _Request] = {}
        self._warm: dict[int, Any] = {}
        self._closed = False
        self._gone: Exception | None = None
        try:
            first = self._receive()
            if isinstance(first, Exception):
                raise first
        except BaseException:
            link.end()
            link.stdout.close()
            raise
        self.info: ModelInfo = first
        self._reader = threading.Thread(target=self._read, name=f"events-{name}", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """False once it was closed or its process has ended: nothing will be answered any more."""
        return self._gone is None and not self._closed

    def submit(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        listener: Listener,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        reuse: Reuse = "all",
        sync: Sync = "vision",
    ) -> None:
        """Queue a request; see `Engine.submit`. A full queue is reported to the listener, like any other failure.

        Raises:
            EngineClosed: after `close`. ModelFailed: the process has ended.
        """
        received_ns = self.clock.now_ns()
        request = _Request(listener, cancel or threading.Event())
        number = self._enter(request)
        options = {"deadline_s": deadline_s, "reuse": reuse, "sync": sync, "received_ns": received_ns}
        self._send(("submit", number, (tuple(messages), sampling, options)))
        threading.Thread(target=self._watch, args=(number, request), daemon=True).start()

    def warmup(self, requests: int = 2, seed: int = 0) -> Warmup:
        """See `Engine.warmup`."""
        request = _Request(lambda _: None, threading.Event())
        number = self._enter(request)
        self._send(("warmup", number, (requests, seed)))
        request.ended.wait()
        result = self._warm.pop(number, self._gone)
        if isinstance(result, Warmup):
            return result
        raise result

    def close(self) -> None:
        """End the running request, free the model and its process. Safe to call twice."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            with self._sending:
                self._link.end()
        if threading.current_thread() is not self._reader:  # a listener may close the engine too
            self._reader.join()
            self._link.stdout.close()

    def __enter__(self) -> ProcessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self, request: _Request) -> int:
        with self._lock:
            if self._closed:
                raise EngineClosed(f"the engine of {self._name} is closed; load it again")
            if self._gone is not None:
                raise self._gone
            number = next(self._numbers)
            self._requests[number] = request
            return number

    def _send(self, message: tuple[str, int, Any]) -> None:
        data = pickle.dumps(message)
        # it may have ended or be closed: then the reader tells everybody who waits
        with contextlib.suppress(OSError, ValueError), self._sending:
            self._link.stdin.write(data)
            self._link.stdin.flush()

    def _watch(self, number: int, request: _Request) -> None:
        while not request.ended.wait(LOOK_S):
            if request.cancel.is_set():
                self._send(("cancel", number, None))
                return

    def _receive(self) -> Any:
        try:
            return pickle.load(self._link.stdout)  # noqa: S301 - written by our own process
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            status = self._link.end()
            raise ModelFailed(f"the process that ran {self._name} ended with status {status}; ask again") from None

    def _read(self) -> None:
        while True:
            try:
                number, news = self._receive()
            except ModelFailed as gone:
                self._end_all(gone)
                return
            if isinstance(news, Warmup | Exception):
                self._warm[number] = news
                self._requests.pop(number).ended.set()
                continue
            for event in news:
                self._tell(number, event)

    def _tell(self, number: int, event: Event | Failed) -> None:
        last = isinstance(event, Done | Failed)
        request = self._requests.pop(number) if last else self._requests[number]
        self._hand_over(request, event, last)

    def _hand_over(self, request: _Request, event: Event | Failed, last: bool) -> None:
        if last:
            request.ended.set()
        try:
            request.listener(event)
        except Exception:  # a listener's fault does not stop the requests behind it
            logging.getLogger(__name__).exception("a listener failed")

    def _end_all(self, gone: ModelFailed) -> None:
        with self._lock:
            if self._closed:
                self._gone = EngineClosed(f"the engine of {self._name} was closed; load it again")
            else:
                self._gone = gone
            waiting, self._requests = dict(self._requests), {}
        for request in waiting.values():
            self._hand_over(request, Failed(self._gone), True)


def load_apart(artifact: str | Path, backend: str = "auto", **options: Any) -> ProcessEngine:
    """`runtime.load` in a process of its own; same arguments.

    Raises:
        What `runtime.load` raises. ModelFailed: the process ended while it loaded the model.
    """
    chosen = options_from(options)
    child = Child("runtime.engine_worker", job(str(artifact), backend, chosen), chosen)
    return ProcessEngine(child, Path(artifact).name)
