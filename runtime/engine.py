"""A loaded model: a bounded line of requests and one worker thread that runs them in order (see `runtime.run`).

Everything that belongs to a request lives in its run; what requests share are caches keyed by content.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.api import (
    Backend,
    Done,
    EngineClosed,
    Event,
    Failed,
    Image,
    Message,
    ModelInfo,
    QueueFull,
    Reuse,
    Sampling,
    SpellsTokens,
    StreamBackend,
    Sync,
    Token,
)
from runtime.cache import CacheStats, Context, ImageCache
from runtime.clock import Clock, SystemClock
from runtime.images import from_rgb, question
from runtime.run import Job, Listener, RemoteRun, Shared, StepRun

__all__ = ["Engine", "EngineLike", "EngineStats", "EventStream", "Listener", "Warmup"]

WARMUP_SIDE = 224
REST_S = 0.001
LEFT_S = 10.0  # for a call that somebody gave up on
LAST = (Done, Failed)  # not `Done | Failed`: that makes a new type object each time it is evaluated


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; the counters run since loading."""

    waiting: int
    running: bool
    requests: int
    images: CacheStats


@dataclass(frozen=True, slots=True)
class Warmup:
    """Time to the first token of the first request after loading, and of the last warm-up request."""

    cold_ttft_ms: float
    warm_ttft_ms: float


class EngineLike(Protocol):
    """What `Engine` and `ProcessEngine` have in common."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def alive(self) -> bool: ...

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
    ) -> None: ...

    def warmup(self, requests: int = 2, seed: int = 0) -> Warmup: ...

    def close(self) -> None: ...


class Engine:
    """A loaded model. Thread-safe: any thread may submit, requests run one after the other."""

    def __init__(
        self,
        backend: Backend | StreamBackend,
        clock: Clock | None = None,
        queue_size: int = 8,
        image_cache_bytes: int = 256 << 20,
        prefill_chunk: int = 512,
    ) -> None:
        self.clock: Clock = clock or SystemClock()
        self._backend = backend
        self._jobs: queue.Queue[Job | None] = queue.Queue(queue_size)
        self._closing = threading.Event()
        images = ImageCache(image_cache_bytes, backend.info.preprocess_sha256)
        # asked once: whether a backend spells its tokens is a slow question to put to a protocol
        pieces = backend.pieces() if isinstance(backend, SpellsTokens) else None
        self._shared = Shared(self.clock, images, Context(), self._closing, prefill_chunk, pieces)
        self._running = False
        self._requests = 0
        self._lock = threading.Lock()
        self._worker = threading.Thread(target=self._serve, name=f"engine-{backend.info.name}", daemon=True)
        self._worker.start()
        # a worker still inside native code while the interpreter goes away would abort the process
        atexit.register(self.close)

    @property
    def info(self) -> ModelInfo:
        return self._backend.info

    @property
    def alive(self) -> bool:
        """False once it was closed."""
        return not self._closing.is_set()

    @property
    def waiting(self) -> int:
        """Requests in the queue, the running one not counted."""
        return self._jobs.qsize()

    @property
    def stats(self) -> EngineStats:
        """Readable from any thread; the numbers may be a request apart."""
        return EngineStats(self.waiting, self._running, self._requests, self._shared.images.stats)

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
        received_ns: int | None = None,
    ) -> None:
        """Queue a request; `listener` gets its events on the worker thread, the last is Done or Failed.

        Args:
            reuse: what this request may take from the caches and leave in them; "none" computes everything.
            sync: where to wait for the device; "all" makes every stage exact and the whole a little slower.
            received_ns: when somebody before this engine received it, on the same clock; None is now.

        Raises:
            QueueFull: too many requests wait. EngineClosed: after `close`.
        """
        self._queue(self._job(messages, sampling, listener, cancel, deadline_s, reuse, sync, received_ns))

    def _job(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None,
        listener: Listener,
        cancel: threading.Event | None,
        deadline_s: float | None,
        reuse: Reuse,
        sync: Sync,
        received_ns: int | None = None,
        ended: Callable[[], None] | None = None,
    ) -> Job:
        if received_ns is None:
            received_ns = self.clock.now_ns()
        return Job(
            tuple(messages),
            sampling or Sampling(),
            listener,
            cancel or threading.Event(),
            received_ns,
            None if deadline_s is None else received_ns + int(deadline_s * 1e9),
            reuse,
            sync,
            ended,
        )

    def _queue(self, job: Job) -> None:
        with self._lock:  # so that no job slips in behind the end mark of `close`
            if self._closing.is_set():
                raise EngineClosed(f"the engine of {self.info.name} is closed; load it again")
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                raise QueueFull(f"{self._jobs.maxsize} requests already wait for {self.info.name}; try later") from None

    def generate(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        reuse: Reuse = "all",
        sync: Sync = "vision",
    ) -> EventStream:
        """Queue a request now and return its events; the last is Done.

        Closing or dropping the stream, even before its first event, cancels the request.

        Args:
            cancel: set it from any thread to end the request after the current step (`finish == "cancelled"`).
            deadline_s: seconds from now after which the answer ends where it is (`finish == "deadline"`).

        Raises:
            QueueFull: at once. While iterating: BadImage, ContextOverflow, EngineClosed, or the backend's own error.
        """
        events: queue.SimpleQueue[Event | Failed] = queue.SimpleQueue()
        cancel = cancel or threading.Event()
        self.submit(
            messages, sampling, listener=events.put, cancel=cancel, deadline_s=deadline_s, reuse=reuse, sync=sync
        )
        return EventStream(events, cancel)

    def complete(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
        reuse: Reuse = "all",
        sync: Sync = "vision",
    ) -> list[Event]:
        """Run a request to its end and return all its events: for scores and speed runs.

        The calling thread sleeps until the end. One that wakes for every token takes Python's interpreter lock each
        time, and on a busy machine the model then waits for that thread to get a core.

        Raises:
            What `generate` raises.
        """
        events: list[Event | Failed] = []
        ended = threading.Event()
        # the listener is the list's own method: nothing of Python runs per token
        self._queue(self._job(messages, sampling, events.append, cancel, deadline_s, reuse, sync, ended=ended.set))
        ended.wait()
        if isinstance(events[-1], Failed):
            raise events[-1].error
        return [event for event in events if not isinstance(event, Failed)]

    def warmup(self, requests: int = 2, seed: int = 0) -> Warmup:
        """Answer questions about noise, so that the first person does not wait for lazy set-up; the image path runs too.

        Raises:
            What `generate` raises.
        """
        rng = np.random.default_rng(seed)
        ttfts = []
        for _ in range(max(requests, 1)):
            image: Image = from_rgb(rng.integers(0, 256, (WARMUP_SIDE, WARMUP_SIDE, 3), np.uint8))
            sampling = Sampling(max_new_tokens=4, ignore_eos=True)
            events = self.complete([question("What is this?", image)], sampling, reuse="none")
            done = events[-1]
            first_ns = next((event.t_ns for event in events if isinstance(event, Token)), None)
            if first_ns is None or not isinstance(done, Done):
                raise RuntimeError("the model gave no token")
            ttfts.append((first_ns - done.received_ns) / 1e6)
        return Warmup(ttfts[0], ttfts[-1])

    def close(self) -> None:
        """End the running request, fail the waiting ones with EngineClosed, free the model. Safe to call twice."""
        with self._lock:
            first = not self._closing.is_set()
            self._closing.set()
        if first:
            self._refuse_waiting()
            self._jobs.put(None)
        if threading.current_thread() is not self._worker:  # a listener may close the engine too
            self._worker.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._running = True
            run = (
                RemoteRun(job, self._shared, backend=self._backend)
                if isinstance(self._backend, StreamBackend)
                else StepRun(job, self._shared, backend=self._backend)
            )
            try:
                last: Event | Failed = run.run()
            except Exception as error:  # whatever a backend raises belongs to this request, not to the worker
                last = Failed(error)
            self._running, self._requests = False, self._requests + 1
            self._end(job, last)
        if self._shared.patience.finished(LEFT_S):  # else a call that was left still reads the model
            self._backend.close()

    def _end(self, job: Job, last: Event | Failed) -> None:
        try:
            job.listener(last)
            if job.ended is not None:
                job.ended()
        except Exception:  # a listener's fault does not stop the requests behind it
            logging.getLogger(__name__).exception("a listener failed")

    def _refuse_waiting(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                self._end(job, Failed(EngineClosed(f"the engine of {self.info.name} was closed; load it again")))


class EventStream(Iterator[Event]):
    """Events of one request, in order. Not a generator: closing one that was never started would cancel nothing.

    Whoever reads tokens faster than they can be looked at would only take the interpreter lock from the model: a reader
    that has just seen a token and finds none waiting rests until a millisecond has passed since it last woke.
    """

    def __init__(self, events: queue.SimpleQueue[Event | Failed], cancel: threading.Event) -> None:
        self._events, self._cancel, self._ended = events, cancel, False
        self._woke_s = 0.0
        self._token = False

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        if self._events.empty():
            if self._token and (pause := self._woke_s + REST_S - time.perf_counter()) > 0:
                time.sleep(pause)
            event = self._events.get()
            self._woke_s = time.perf_counter()
        else:
            event = self._events.get()
        self._token = isinstance(event, Token)
        self._ended = isinstance(event, LAST)
        if isinstance(event, Failed):
            raise event.error
        return event

    def close(self) -> None:
        """Give the request up: it ends after its current step."""
        self._ended = True
        self._cancel.set()

    def __del__(self) -> None:
        self.close()
