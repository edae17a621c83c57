"""The process behind a `ProcessEngine`: requests come in on stdin, events go out, as pickles between our own processes.

Out goes what the model is or why it does not load, then pairs of a request's number and its news.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from runtime.api import Done, Event, Failed, ModelFailed, Token
from runtime.engine import Engine
from runtime.loading import load
from vlm.errors import ToolError

HOLD_S = 0.02  # tokens that come faster than this travel together
Send = Callable[[Any], None]


def main() -> int:
    """argv[1]: see `runtime.child.job`. Ends when stdin does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us decides when to stop
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up between the pickles
    job = json.loads(sys.argv[1])
    try:
        engine = load(job["artifact"], job["backend"], **job["options"])
    except Exception as error:
        pickle.dump(portable(error), out)
        out.flush()
        return error.exit_code if isinstance(error, ToolError) else 1
    serve(engine, sys.stdin.buffer, out)
    return 0


def serve(engine: Engine, requests: IO[bytes], out: IO[bytes]) -> None:
    """Answer until `requests` ends; then what still runs is cancelled and the engine closed."""
    lock = threading.Lock()

    def send(value: Any) -> None:
        data = pickle.dumps(value)
        with lock, contextlib.suppress(BrokenPipeError):  # nobody listens any more: soon `requests` ends too
            out.write(data)
            out.flush()

    cancels: dict[int, threading.Event] = {}
    with engine, Post() as post:
        send(engine.info)
        while True:
            try:
                what, number, value = pickle.load(requests)  # noqa: S301 - written by our own process
            except EOFError:
                break
            if what == "submit":
                cancels[number] = threading.Event()
                _submit(engine, Outbox(send, number, post), value, cancels[number])
                cancels = {each: cancel for each, cancel in cancels.items() if each in post.open or each == number}
            elif what == "warmup":
                send((number, _warmup(engine, *value)))
            elif number in cancels:
                cancels[number].set()


class Post:
    """A thread that sends what outboxes hold every HOLD_S, while there are any."""

    def __init__(self) -> None:
        self.open: dict[int, Outbox] = {}
        self._busy, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="post", daemon=True)

    def add(self, number: int, outbox: Outbox) -> None:
        self.open[number] = outbox
        self._busy.set()

    def __enter__(self) -> Post:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._busy.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closed:
            self._busy.wait()
            self._busy.clear()  # before anything is looked at: whatever changes from here on sets it again
            time.sleep(HOLD_S)
            for outbox in list(self.open.values()):
                outbox.send()
            if self.open:
                self._busy.set()


class Outbox:
    """A request's listener. The first token and the last event go at once, others when the post is sent.

    What it costs to send is not paid per token, and a token does not wait for the next one.
    """

    def __init__(self, send: Send, number: int, post: Post) -> None:
        self._send, self._number, self._post = send, number, post
        self._held: collections.deque[Event | Failed] = collections.deque()
        self._lock = threading.Lock()
        self._begun = False
        post.add(number, self)

    def put(self, event: Event | Failed) -> None:
        """On the engine's thread."""
        if isinstance(event, Failed):
            event = Failed(portable(event.error))
        self._held.append(event)
        if isinstance(event, Token):
            if not self._begun:
                self._begun = True
                self.send()
        elif isinstance(event, (Done, Failed)):
            self._post.open.pop(self._number, None)
            self.send()

    def send(self) -> None:
        with self._lock:  # or a later batch could overtake an earlier one
            news = [self._held.popleft() for _ in range(len(self._held))]
            if news:
                self._send((self._number, news))


def _submit(engine: Engine, outbox: Outbox, value: Any, cancel: threading.Event) -> None:
    messages, sampling, options = value
    try:
        engine.submit(messages, sampling, listener=outbox.put, cancel=cancel, **options)
    except ToolError as error:
        outbox.put(Failed(error))


def _warmup(engine: Engine, requests: int, seed: int) -> Any:
    try:
        return engine.warmup(requests, seed)
    except Exception as error:
        return portable(error)


def portable(error: Exception) -> Exception:
    """An error the other process can read: a library's own exceptions would make it import that library."""
    if isinstance(error, ToolError):
        return error
    logging.getLogger(__name__).error("the model failed", exc_info=error)
    return ModelFailed(f"the model failed ({type(error).__name__}); the terminal it was started from shows why")


if __name__ == "__main__":
    raise SystemExit(main())
