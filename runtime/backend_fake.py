"""A scripted backend: says what it is told, takes as long as it is told. For tests of everything above a backend."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from runtime.api import Image, Logits, Message, ModelInfo, PreparedImage, Prompt
from runtime.cache import Key, prompt_keys
from runtime.clock import Clock, SystemClock

VOCABULARY = 257  # one token per byte, so that every character outside ASCII is split over tokens
END = 256
IMAGE_TOKENS = 4
Reply: TypeAlias = "str | Callable[[Sequence[Message]], str]"


@dataclass(frozen=True)
class FakeScript:
    """What the fake says and how long its stages take (0 = no waiting at all).

    Attributes:
        reply: the answer, or a function of the messages.
        prefill_token_ns: on top of `prefill_ns`, per prompt token really computed.
        fail_at: name of the step (`prepare`, `encode`, `prefill`, `step`) that raises RuntimeError.
    """

    reply: Reply = "7"
    prepare_ns: int = 0
    encode_ns: int = 0
    prefill_ns: int = 0
    prefill_token_ns: int = 0
    step_ns: int = 0
    context_length: int = 4096
    fail_at: str = ""
    clock: Clock = field(default_factory=SystemClock)


class FakeBackend:
    """One token per byte; the visual "embedding" of an image is its digest.

    Keeps the content of its context and refuses to go on from a beginning that is not the prompt's, so that a cache
    that mixes requests up cannot go unnoticed.
    """

    def __init__(self, script: FakeScript | None = None, name: str = "fake") -> None:
        self.script = script or FakeScript()
        self.info = ModelInfo(
            name=name,
            backend="fake",
            device="cpu",
            precision="none",
            threads=1,
            context_length=self.script.context_length,
            vocab_size=VOCABULARY,
            tokens_per_image=IMAGE_TOKENS,
            eos_token_ids=(END,),
            preprocess_sha256="fake",
        )
        self.calls: list[str] = []
        self.closed = False
        self._answer = b""
        self._replies: dict[Prompt, str] = {}
        self._position = 0
        self.context: list[Key] = []

    def prepare(self, messages: Sequence[Message], at_hand: Container[str] = frozenset()) -> Prompt:
        self._enter("prepare", self.script.prepare_ns)
        ids: list[int] = []
        images: list[PreparedImage] = []
        for message in messages:
            for part in message.content:
                if isinstance(part, str):
                    ids += part.encode()
                else:
                    assert isinstance(part, Image)
                    pixels = None if part.digest in at_hand else part.digest
                    images.append(PreparedImage(part.digest, pixels, len(ids)))
                    ids += [END] * IMAGE_TOKENS
        reply = self.script.reply
        prompt = Prompt(tuple(ids), tuple(images))
        self._replies = {prompt: reply if isinstance(reply, str) else reply(messages)}
        return prompt

    def encode(self, images: Sequence[PreparedImage]) -> list[Any]:
        self._enter("encode", self.script.encode_ns * len(images))
        return [np.frombuffer(image.pixels.encode(), np.uint8) for image in images]

    def prefill(self, prompt: Prompt, embeds: Sequence[Any], start: int = 0, stop: int | None = None) -> Logits:
        stop = len(prompt.ids) if stop is None else stop
        self._enter("prefill", self.script.prefill_ns + self.script.prefill_token_ns * (stop - start))
        for image, seen in zip(prompt.images, embeds, strict=True):
            before = image.start + IMAGE_TOKENS <= start
            if not (seen is None and before) and (seen is None or seen.tobytes().decode() != image.digest):
                raise RuntimeError("embeddings of another request")
        keys = prompt_keys(prompt, IMAGE_TOKENS)
        if self.context[:start] != keys[:start]:
            raise RuntimeError("the context kept is not the beginning of this prompt")
        self.context = keys[:stop]
        self._answer, self._position = self._replies[prompt].encode(), 0
        return self._logits()

    def step(self, token_id: int) -> Logits:
        self._enter("step", self.script.step_ns)
        if not 0 <= token_id < VOCABULARY:
            raise RuntimeError(f"token {token_id} is not in the vocabulary")
        self._position += 1
        self.context.append(token_id)
        return self._logits()

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != END).decode("utf-8", "replace")

    def sync(self) -> None:
        self.calls.append("sync")

    def close(self) -> None:
        self.closed = True

    def _enter(self, step: str, duration_ns: int) -> None:
        self.calls.append(step)
        if self.script.fail_at == step:
            raise RuntimeError(f"scripted failure in {step}")
        if duration_ns:
            self.script.clock.wait_ns(duration_ns)

    def _logits(self) -> Logits:
        logits_V = np.zeros(VOCABULARY, np.float32)
        ended = self._position >= len(self._answer)
        logits_V[END if ended else self._answer[self._position]] = 10.0
        return logits_V
