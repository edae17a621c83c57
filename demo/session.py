"""One person's session, the one engine in memory, and the bridge from the engine's thread to the page's event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.camera import Feed
from demo.catalogue import Entry
from runtime.api import Done, EncodedImage, Event, Failed, Message, ModelInfo, Reuse, Sampling
from runtime.engine import EngineLike
from runtime.images import answer as answer_message
from runtime.images import question as question_message
from vlm.errors import UserError

FRAME_S = 0.1  # more than 10 updates a second cost the engine's speed and show a person nothing
FRAMES_PER_COST = 30  # on a slow board, or in a long chat, updates are rarer: they take a thirtieth of one core
HEARTBEAT_S = 0.25  # how soon a closed tab is noticed while the model is silent; no frame is longer
READABLE = 40  # a frame with more tokens is not read as it comes: the next update can wait for the heartbeat
LOOK_S = 0.05  # how soon one who waits for the model notices that nobody wants the answer any more


@dataclass(frozen=True)
class Picture:
    """One image a person chose: as the engine gets it, as the chat shows it (HTML), and where the upload lies."""

    image: EncodedImage
    thumbnail: str
    path: str


@dataclass
class Session:
    """What belongs to one open page. Lives in the page's state, never in a global.

    Attributes:
        pictures: what the next question is about.
        shown: the chat already shows these pictures.
        given: the images at the end of the conversation the model gets; the next question needs others only.
        sent: those of the question that is being answered, whatever is chosen meanwhile.
        messages: the chat as the widget takes it.
        turns: the conversation as the model takes it.
        question: what the next answer is for; "" when there is nothing to answer.
        busy: a question waits for its answer or is being answered; `activity` says where, "" is the chat.
        cancel: ends the running answer. None until the first question.
        files: uploads to delete when the page is left.
        feed: the camera of the Live tab, while it is on.
    """

    pictures: tuple[Picture, ...] = ()
    shown: bool = False
    given: tuple[Picture, ...] | None = None
    sent: tuple[Picture, ...] = ()
    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    question: str = ""
    busy: bool = False
    activity: str = ""
    cancel: threading.Event | None = None
    files: set[str] = field(default_factory=set)
    feed: Feed | None = None

    def show(self, pictures: Sequence[Picture]) -> None:
        """From now on questions are about these images."""
        self.pictures, self.shown, self.given = tuple(pictures), False, None

    def asks(self, question: str, remember: bool) -> list[Message]:
        """The conversation to send: all of it, or this question and its images alone.

        Args:
            remember: earlier questions and answers are part of it, so images told once are not sent again.
        """
        self.sent = self.pictures
        if remember and self.given is self.pictures:
            return [*self.turns, question_message(question)]
        asked = question_message(question, *(picture.image for picture in self.pictures))
        return [*self.turns, asked] if remember else [asked]

    def heard(self, asked: Sequence[Message], said: str) -> None:
        """Keep a question and its answer for follow-ups; an empty answer leaves nothing to refer to."""
        if said:
            self.turns, self.given = [*asked, answer_message(said)], self.sent

    def forget(self) -> None:
        """A new conversation about the same images."""
        self.stop()
        self.cancel, self.messages, self.turns, self.shown, self.given = None, [], [], False, None

    def stop(self) -> None:
        if self.cancel is not None:
            self.cancel.set()


class People:
    """The open pages by the web server's own name for them, so that a closed one can be cleaned up after."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def enter(self, name: str) -> Session:
        return self._sessions.setdefault(name, Session())

    def leave(self, name: str) -> None:
        """The page is gone: end what it runs, delete its files (the same upload of two people is one file)."""
        session = self._sessions.pop(name, None)
        if session is None:
            return
        session.stop()
        if session.feed is not None:
            session.feed.close()
        others = set[str]().union(*(other.files for other in self._sessions.values()))
        for path in session.files - others:
            with contextlib.suppress(OSError):
                Path(path).unlink(missing_ok=True)
        session.files.clear()


class Engines:
    """At most one model in memory: an edge board rarely has room for two.

    Attributes:
        turn: held by whoever uses the model: an answer, one camera frame, a comparison, a profile. Served in order.
    """

    def __init__(self, entries: Sequence[Entry], loader: Callable[[Path], EngineLike]) -> None:
        self.entries = {entry.key: entry for entry in entries}
        self.turn = asyncio.Lock()
        self._loader = loader
        self._lock = threading.Lock()
        self._key = ""
        self._engine: EngineLike | None = None
        self._answers = 0

    @contextlib.asynccontextmanager
    async def wanted(self, cancel: threading.Event) -> AsyncIterator[bool]:
        """`turn`, or False as soon as `cancel` is set while others still have it."""
        mine = asyncio.ensure_future(self.turn.acquire())
        try:
            while not (mine.done() or cancel.is_set()):
                await asyncio.wait([mine], timeout=LOOK_S)
            yield mine.done()
        finally:
            mine.cancel()
            await asyncio.wait([mine])
            if not mine.cancelled():
                self.turn.release()

    def use(self, key: str) -> EngineLike:
        """The engine of this model; another one is freed first.

        Raises:
            UserError: no such model on offer, or it cannot be loaded.
        """
        self.entry(key)
        with self._lock:
            if self._engine is None or key != self._key or not self._engine.alive:
                self._free()
                self._engine = self._loader(self.entries[key].path)
                self._key, self._answers = key, 0
            return self._engine

    def entry(self, key: str) -> Entry:
        """What is known of a model.

        Raises:
            UserError: no such model on offer.
        """
        if key not in self.entries:
            raise UserError("this model is not on offer any more; reload the page")
        return self.entries[key]

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

    def free(self) -> None:
        """Hold no model, until the next `use`."""
        with self._lock:
            self._free()

    close = free

    def _free(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine, self._key = None, ""


async def batches(
    engine: EngineLike, messages: Sequence[Message], sampling: Sampling, cancel: threading.Event, reuse: Reuse = "all"
) -> AsyncGenerator[list[Event], None]:
    """Events of one request, gathered into at most one batch per frame; the last batch ends with Done.

    A batch may be empty: the web server notices that a tab was closed only when it is given something.
    However the caller leaves (stop, closed tab, error), the engine is told to stop too.

    Raises:
        Exception: whatever the request failed with.
    """
    inbox, frame_s = _Inbox(asyncio.get_running_loop()), FRAME_S
    engine.submit(messages, sampling, listener=inbox.put, cancel=cancel, reuse=reuse)
    try:
        while True:
            batch = await inbox.gather(frame_s)
            began_s = time.thread_time()
            yield batch
            if batch and isinstance(batch[-1], Done):
                return
            frame_s = min(max(FRAME_S, FRAMES_PER_COST * (time.thread_time() - began_s)), HEARTBEAT_S)
    finally:
        cancel.set()


class _Inbox:
    """Events from the engine's thread; the loop is woken once per frame, not once per token."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: collections.deque[Event | Failed] = collections.deque()
        self._arrived, self._ended = asyncio.Event(), asyncio.Event()
        self._called = False

    def put(self, event: Event | Failed) -> None:
        """On the engine's thread."""
        self._events.append(event)
        ended = isinstance(event, (Done, Failed))
        if ended or not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop is gone: the server is shutting down
                self._loop.call_soon_threadsafe(self._wake, ended)

    def _wake(self, ended: bool) -> None:
        self._arrived.set()
        if ended:
            self._ended.set()

    async def gather(self, frame_s: float) -> list[Event]:
        """What came since the last call and within a frame of its first event, or nothing after HEARTBEAT_S.

        The end of the answer is never waited with; a fast model is left alone until the heartbeat.
        """
        await self._wait(self._arrived, HEARTBEAT_S)
        if self._events:
            await self._wait(self._ended, frame_s)
            if len(self._events) > READABLE:
                await self._wait(self._ended, HEARTBEAT_S - frame_s)
        self._arrived.clear()
        self._called = False  # before the events are taken: one that comes now calls again
        gathered = [self._events.popleft() for _ in range(len(self._events))]
        if gathered and isinstance(gathered[-1], Failed):
            raise gathered[-1].error
        return [event for event in gathered if not isinstance(event, Failed)]

    @staticmethod
    async def _wait(event: asyncio.Event, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)
