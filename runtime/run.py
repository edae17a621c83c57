"""One request from messages to the last token: the only generation loop, whatever the backend."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from runtime.api import (
    Backend,
    Constrains,
    Constraint,
    ContextOverflow,
    Done,
    EncodedImage,
    Event,
    Failed,
    Finish,
    Image,
    Logits,
    Message,
    ModelFailed,
    Part,
    Prompt,
    Reported,
    Reuse,
    Sampling,
    Span,
    Stage,
    StreamBackend,
    Sync,
    Token,
    Usage,
)
from runtime.cache import Context, ImageCache, prompt_keys
from runtime.clock import Clock
from runtime.images import decode_image
from runtime.patience import Patience, Watched
from runtime.sampling import Sampler
from runtime.text import Detokenizer, StopStrings, TableDetokenizer
from vlm.errors import UserError

Listener: TypeAlias = "Callable[[Event | Failed], None]"
_NEW: Any = tuple.__new__
NO_PIXELS = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class Job:
    """A request as it waits in line; `ended` is called after the listener has had the last event."""

    messages: tuple[Message, ...]
    sampling: Sampling
    listener: Listener
    cancel: threading.Event
    received_ns: int
    deadline_ns: int | None
    reuse: Reuse
    sync: Sync
    ended: Callable[[], None] | None = None


@dataclass(frozen=True)
class Shared:
    """What all requests to one model have in common; touched by its worker thread only.

    Attributes:
        prefill_chunk: prompt tokens between two looks at the cancel flag.
        pieces: text of every token by itself, from a backend that knows.
        patience: for grammars.
    """

    clock: Clock
    images: ImageCache
    context: Context
    closing: threading.Event
    prefill_chunk: int
    pieces: Mapping[int, str | bytes] | None = None
    patience: Patience = field(default_factory=Patience)


class _Stopped(Exception):
    def __init__(self, finish: Finish) -> None:
        self.finish: Finish = finish


@dataclass
class _Timed:
    """State of one request. `_lap` closes the current span at "now", so that spans tile the request exactly."""

    job: Job
    shared: Shared
    spans: list[Span] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    completion_tokens: int | None = 0
    usage: Usage = field(default_factory=lambda: Usage(0, 0, 0, 0))
    reported: dict[str, Any] | None = None

    def run(self) -> Done:
        self._lap("queue", announce=True)
        finish: Finish
        try:
            self._check()
            finish = self._answer()
        except _Stopped as stopped:
            finish = stopped.finish
        usage = replace(self.usage, completion_tokens=self.completion_tokens)
        return Done(finish, "".join(self.pieces), usage, self.job.received_ns, tuple(self.spans), self.reported)

    def _answer(self) -> Finish:
        raise NotImplementedError

    def _check(self) -> None:
        if self.job.cancel.is_set() or self.shared.closing.is_set():
            raise _Stopped("cancelled")
        if self.job.deadline_ns is not None and self.shared.clock.now_ns() >= self.job.deadline_ns:
            raise _Stopped("deadline")

    def _lap(
        self, stage: Stage, tokens: int = 0, announce: bool = False, cached: bool = False, cached_tokens: int = 0
    ) -> int:
        spans = self.spans
        end_ns = self.shared.clock.now_ns()
        span = Span(stage, spans[-1].end_ns if spans else self.job.received_ns, end_ns, tokens, cached, cached_tokens)
        spans.append(span)
        if announce:
            self.job.listener(span)
        return end_ns


@dataclass
class StepRun(_Timed):
    """A request to a backend whose steps we take ourselves."""

    backend: Backend = field(kw_only=True)

    def _answer(self) -> Finish:
        try:
            return self._steps()
        except _Stopped:
            raise
        except BaseException:
            self.shared.context.keep(0)  # a step that failed leaves keys and values nobody can vouch for
            raise

    def _steps(self) -> Finish:
        messages = self._decode_images()
        self._check()
        images = self.shared.images
        constraint = self._constraint()
        prompt = self.backend.prepare(messages, images if self.job.reuse != "none" else frozenset())
        limit = self._limit(len(prompt.ids))
        tokens_per_image = self.backend.info.tokens_per_image
        self.usage = Usage(len(prompt.ids), tokens_per_image * len(prompt.images), 0, 0)
        keys = prompt_keys(prompt, tokens_per_image)
        kept = self.shared.context.shared(keys) if self.job.reuse == "all" else 0
        self._lap("preprocess", announce=True)
        embeds, cached_images = self._encode(prompt, kept)
        self.usage = Usage(len(prompt.ids), self.usage.image_tokens, kept, 0, cached_images)
        logits_V = self._prefill(prompt, embeds, keys, kept)
        return self._decode(logits_V, prompt, Sampler(self.job.sampling, prompt.ids, constraint), limit, kept)

    def _constraint(self) -> Constraint | None:
        if not (self.job.sampling.grammar or self.job.sampling.json_schema):
            return None
        if not isinstance(self.backend, Constrains):
            raise UserError(
                f"backend {self.backend.info.backend} cannot hold answers to a grammar or JSON schema; "
                "use a GGUF artefact or leave it out"
            )
        backend = self.backend
        return Watched(lambda: backend.constrain(self.job.sampling), self.shared.patience, self._check)

    def _decode_images(self) -> list[Message]:
        files = 0
        unknown = False
        messages = []
        for message in self.job.messages:
            if not any(isinstance(part, EncodedImage) for part in message.content):
                messages.append(message)
                continue
            parts: list[Part] = []
            for part in message.content:
                if isinstance(part, EncodedImage):
                    files += 1
                    image = self._decoded(part)
                    unknown |= image.rgb is not NO_PIXELS
                    parts.append(image)
                else:
                    parts.append(part)
            messages.append(Message(message.role, tuple(parts)))
        if files:
            self._lap("image_decode", announce=True, cached=not unknown)
        return messages

    def _decoded(self, encoded: EncodedImage) -> Image:
        images = self.shared.images
        if self.job.reuse != "none" and (digest := images.digest_of(encoded.data)) is not None:
            return Image(NO_PIXELS, digest)
        image = decode_image(encoded)
        if self.job.reuse != "none":
            images.remember(encoded.data, image.digest)
        return image

    def _encode(self, prompt: Prompt, kept: int) -> tuple[list[Any], int]:
        """One embedding per image, None for those the kept context covers; and how many were not computed."""
        if not prompt.images:
            return [], 0
        images, tokens = self.shared.images, self.backend.info.tokens_per_image
        embeds: list[Any] = [None] * len(prompt.images)
        missing: dict[str, list[int]] = {}
        for at, image in enumerate(prompt.images):
            if image.start + tokens <= kept:
                continue
            if self.job.reuse != "none":
                embeds[at] = images.get(image.digest)
            if embeds[at] is None:
                # the same picture twice in one request is encoded once only where caches may be used
                key = image.digest if self.job.reuse != "none" else f"{image.digest} {at}"
                missing.setdefault(key, []).append(at)
        for done, places in enumerate(missing.values()):  # one at a time: a request can be stopped between two pictures
            if done:
                self._end_vision(tokens)
            self._check()
            image = prompt.images[places[0]]
            (embeds_TD,) = self.backend.encode([image])
            for at in places:
                embeds[at] = embeds_TD
            if self.job.reuse != "none":
                images.put(image.digest, embeds_TD)
        self._end_vision(tokens if missing else 0)
        return embeds, len(prompt.images) - len(missing)

    def _end_vision(self, tokens: int) -> None:
        if self.job.sync != "none":
            self.backend.sync()
        self._lap("vision_encode", tokens, announce=True, cached=not tokens)

    def _prefill(self, prompt: Prompt, embeds: list[Any], keys: list[Any], kept: int) -> Logits:
        context, chunk = self.shared.context, self.shared.prefill_chunk
        logits_V: Logits | None = None
        context.keep(0)  # until the backend has done its part, nothing it holds can be relied on
        for start in range(kept, len(keys), chunk):
            if start > kept:
                self._lap("prefill", chunk)
            self._check()
            stop = min(start + chunk, len(keys))
            logits_V = self.backend.prefill(prompt, embeds, start, stop)
            context.keep(0)
            context.add(keys[:stop])
        if logits_V is None:
            raise UserError("the prompt is empty; write a question")
        if self.job.sync == "all":
            self.backend.sync()
        return logits_V

    def _decode(self, logits_V: Logits, prompt: Prompt, sampler: Sampler, limit: int, kept: int) -> Finish:
        """Every microsecond here is paid per token: names are local, and `new` makes events without a call in Python."""
        job, sample, step, emit, spans = self.job, sampler.draw, self.backend.step, self.job.listener, self.spans
        taken_in, keep, now, new = self.shared.context.add_one, self.pieces.append, self.shared.clock.now_ns, _NEW
        cancelled, closing, deadline_ns = job.cancel.is_set, self.shared.closing.is_set, job.deadline_ns
        end_ids = () if job.sampling.ignore_eos else self.backend.info.eos_token_ids
        detokenizer, stops = self._detokenizer(), StopStrings(job.sampling.stop)
        text_of, any_stops = detokenizer.add, bool(job.sampling.stop)
        sync = self.backend.sync if job.sync == "all" else None
        end_ns = 0
        for count in range(1, limit + 1):
            token_id = sample(logits_V)
            if count == 1:
                last_chunk = (len(prompt.ids) - kept - 1) % self.shared.prefill_chunk + 1
                t_ns = self._lap("prefill", last_chunk, announce=True, cached_tokens=kept)
            else:
                t_ns = now()
                spans.append(new(Span, ("decode", end_ns, t_ns, 1, False, 0)))
            ended, stopped = token_id in end_ids, False
            piece = "" if ended else text_of(token_id)
            if any_stops:
                piece, stopped = stops.add(piece)
            if (ended or count == limit) and not stopped:
                tail, stopped = stops.add(detokenizer.flush())
                piece += tail + ("" if stopped else stops.flush())
            keep(piece)
            self.completion_tokens = count
            emit(new(Token, (token_id, piece, t_ns)))
            end_ns = now()
            spans.append(new(Span, ("detokenize", t_ns, end_ns, 0, False, 0)))
            if ended or stopped:
                return "stop"
            if count < limit:
                if cancelled() or closing() or (deadline_ns is not None and end_ns >= deadline_ns):
                    keep(stops.flush())
                    self._check()
                logits_V = step(token_id)
                taken_in(token_id)
                if sync is not None:
                    sync()
        return "length"

    def _detokenizer(self) -> Detokenizer | TableDetokenizer:
        pieces = self.shared.pieces
        return Detokenizer(self.backend.detokenize) if pieces is None else TableDetokenizer(pieces)

    def _limit(self, prompt_tokens: int) -> int:
        have = self.backend.info.context_length
        if prompt_tokens + 1 > have:
            raise ContextOverflow(prompt_tokens + 1, have)
        return min(self.job.sampling.max_new_tokens, have - prompt_tokens)


@dataclass
class RemoteRun(_Timed):
    """A request to somebody else's server: one span, the arrival of each piece of text, and what the server reports."""

    backend: StreamBackend = field(kw_only=True)

    def _answer(self) -> Finish:
        self.usage, self.completion_tokens = Usage(None, None, None, None, None), None
        job = self.job
        end: Reported | None = None
        pieces = self.backend.stream(job.messages, job.sampling, job.reuse, self._stopped)
        try:
            for piece in pieces:
                if isinstance(piece, Reported):
                    end = piece
                elif piece:  # an empty first piece (role only) is not a token
                    self.pieces.append(piece)
                    job.listener(Token(-1, piece, self.shared.clock.now_ns()))
                    self._check()
        finally:
            pieces.close()
            self._lap("remote")
        if end is None:
            self._check()
            raise ModelFailed("the server ended its stream without saying why; look at its log")
        self.usage, self.reported = end.usage, dict(end.timings)
        self.completion_tokens = end.usage.completion_tokens
        return end.finish

    def _stopped(self) -> bool:
        try:
            self._check()
        except _Stopped:
            return True
        return False
