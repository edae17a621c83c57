"""The one generation loop over every backend: queue, timing, sampling, stopping, detokenising, cancelling.

One worker thread per model takes requests in order; everything that belongs to a request lives in its `_Run`.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from runtime.api import (
    Backend,
    ContextOverflow,
    Done,
    EncodedImage,
    EngineClosed,
    Event,
    Failed,
    Finish,
    Message,
    ModelInfo,
    QueueFull,
    Sampling,
    Span,
    Stage,
    Token,
    Usage,
)
from runtime.clock import Clock, SystemClock
from runtime.images import decode_image
from runtime.sampling import Sampler
from runtime.text import Detokenizer, StopStrings

Listener: TypeAlias = "Callable[[Event | Failed], None]"


@dataclass(frozen=True)
class _Job:
    messages: tuple[Message, ...]
    sampling: Sampling
    listener: Listener
    cancel: threading.Event
    received_ns: int
    deadline_ns: int | None


class Engine:
    """A loaded model. Thread-safe: any thread may submit, requests run one after the other."""

    def __init__(self, backend: Backend, clock: Clock | None = None, queue_size: int = 8) -> None:
        self.clock: Clock = clock or SystemClock()
        self._backend = backend
        self._jobs: queue.Queue[_Job | None] = queue.Queue(queue_size)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._worker = threading.Thread(target=self._serve, name=f"engine-{backend.info.name}", daemon=True)
        self._worker.start()
        # a worker still inside native code while the interpreter goes away would abort the process
        atexit.register(self.close)

    @property
    def info(self) -> ModelInfo:
        return self._backend.info

    @property
    def waiting(self) -> int:
        """Requests in the queue, the running one not counted."""
        return self._jobs.qsize()

    def submit(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        listener: Listener,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
    ) -> None:
        """Queue a request; `listener` gets its events on the worker thread, the last is Done or Failed.

        Raises:
            QueueFull: too many requests wait. EngineClosed: after `close`.
        """
        received_ns = self.clock.now_ns()
        deadline_ns = None if deadline_s is None else received_ns + int(deadline_s * 1e9)
        job = _Job(
            tuple(messages),
            sampling or Sampling(),
            listener,
            cancel or threading.Event(),
            received_ns,
            deadline_ns,
        )
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
        self.submit(messages, sampling, listener=events.put, cancel=cancel, deadline_s=deadline_s)
        return EventStream(events, cancel)

    def complete(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
    ) -> list[Event]:
        """Run a request to its end and return all its events: for scores and speed runs.

        The calling thread sleeps until the end. One that wakes for every token takes Python's interpreter lock each
        time, and on a busy machine the model then waits for that thread to get a core.

        Raises:
            What `generate` raises.
        """
        events: list[Event | Failed] = []
        ended = threading.Event()

        def listen(event: Event | Failed) -> None:
            events.append(event)
            if isinstance(event, Done | Failed):
                ended.set()

        self.submit(messages, sampling, listener=listen, cancel=cancel, deadline_s=deadline_s)
        ended.wait()
        if isinstance(events[-1], Failed):
            raise events[-1].error
        return [event for event in events if not isinstance(event, Failed)]

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
            try:
                last: Event | Failed = _Run(self._backend, self.clock, job, self._closing).run()
            except Exception as error:  # whatever a backend raises belongs to this request, not to the worker
                last = Failed(error)
            try:
                job.listener(last)
            except Exception:  # nor does a listener's fault stop the requests behind it
                logging.getLogger(__name__).exception("a listener failed")
        self._backend.close()

    def _refuse_waiting(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job.listener(Failed(EngineClosed(f"the engine of {self.info.name} was closed; load it again")))


class EventStream(Iterator[Event]):
    """Events of one request, in order. Not a generator: closing one that was never started would cancel nothing."""

    def __init__(self, events: queue.SimpleQueue[Event | Failed], cancel: threading.Event) -> None:
        self._events, self._cancel, self._ended = events, cancel, False

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        event = self._events.get()
        self._ended = isinstance(event, Done | Failed)
        if isinstance(event, Failed):
            raise event.error
        return event

    def close(self) -> None:
        """Give the request up: it ends after its current step."""
        self._ended = True
        self._cancel.set()

    def __del__(self) -> None:
        self.close()


class _Stopped(Exception):
    def __init__(self, finish: Finish) -> None:
        self.finish: Finish = finish


@dataclass
class _Run:
    """State of one request. `_lap` closes the current span at "now", so that spans tile the request exactly."""

    backend: Backend
    clock: Clock
    job: _Job
    closing: threading.Event
    spans: list[Span] = field(default_factory=list)
    text: str = ""
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0, 0))

    def run(self) -> Done:
        self._lap("queue", announce=True)
        finish: Finish
        try:
            finish = self._answer()
        except _Stopped as stopped:
            finish = stopped.finish
        return Done(finish, self.text, self.usage, self.job.received_ns, tuple(self.spans))

    def _answer(self) -> Finish:
        self._check()
        messages = self._decode_images()
        self._check()
        prompt = self.backend.prepare(messages)
        limit = self._limit(len(prompt.ids))
        image_tokens = self.backend.info.tokens_per_image * len(prompt.images)
        self.usage = Usage(len(prompt.ids), image_tokens, 0, 0)
        self._lap("preprocess", announce=True)
        embeds: list[Any] = []
        if prompt.images:
            self._check()
            embeds = self.backend.encode(prompt.images)
            self.backend.sync()
            self._lap("vision_encode", tokens=image_tokens, announce=True)
        self._check()
        prefilled = self.backend.prefill(prompt, embeds)
        self.usage = replace(self.usage, cached_tokens=len(prompt.ids) - prefilled.computed_tokens)
        return self._decode(prefilled.logits, prefilled.computed_tokens, limit)

    def _decode(self, logits_V: Any, prefill_tokens: int, limit: int) -> Finish:
        sampling, end_ids = self.job.sampling, self.backend.info.eos_token_ids
        sample, pieces, stops = Sampler(sampling), Detokenizer(self.backend.detokenize), StopStrings(sampling.stop)
        for count in range(1, limit + 1):
            token_id = sample(logits_V)
            t_ns = self._lap("prefill", prefill_tokens, announce=True) if count == 1 else self._lap("decode", 1)
            ended = token_id in end_ids and not sampling.ignore_eos
            piece, stopped = stops.add("" if ended else pieces.add(token_id))
            if not stopped and (ended or count == limit):
                tail, stopped = stops.add(pieces.flush())
                piece += tail + ("" if stopped else stops.flush())
            self.text += piece
            self.usage = replace(self.usage, completion_tokens=count)
            self.job.listener(Token(token_id, piece, t_ns))
            self._lap("detokenize")
            if ended or stopped:
                return "stop"
            if count < limit:
                try:
                    self._check()
                except _Stopped:
                    self.text += stops.flush()
                    raise
                logits_V = self.backend.step(token_id)
        return "length"

    def _decode_images(self) -> list[Message]:
        encoded = 0
        messages = []
        for message in self.job.messages:
            parts = []
            for part in message.content:
                is_encoded = isinstance(part, EncodedImage)
                encoded += is_encoded
                parts.append(decode_image(part) if isinstance(part, EncodedImage) else part)
            messages.append(Message(message.role, tuple(parts)))
        if encoded:
            self._lap("image_decode", announce=True)
        return messages

    def _limit(self, prompt_tokens: int) -> int:
        have = self.backend.info.context_length
        if prompt_tokens + 1 > have:
            raise ContextOverflow(prompt_tokens + 1, have)
        return min(self.job.sampling.max_new_tokens, have - prompt_tokens)

    def _check(self) -> None:
        if self.job.cancel.is_set() or self.closing.is_set():
            raise _Stopped("cancelled")
        if self.job.deadline_ns is not None and self.clock.now_ns() >= self.job.deadline_ns:
            raise _Stopped("deadline")

    def _lap(self, stage: Stage, tokens: int = 0, announce: bool = False) -> int:
        start_ns = self.spans[-1].end_ns if self.spans else self.job.received_ns
        end_ns = self.clock.now_ns()
        span = Span(stage, start_ns, end_ns, tokens)
        self.spans.append(span)
        if announce:
            self.job.listener(span)
        return end_ns
