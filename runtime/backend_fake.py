"""A scripted backend: says what it is told, takes as long as it is told. For tests of everything above a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from runtime.api import Image, Logits, Message, ModelInfo, Prefilled, PreparedImage, Prompt
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
        fail_at: name of the step (`prepare`, `encode`, `prefill`, `step`) that raises RuntimeError.
    """

    reply: Reply = "7"
    prepare_ns: int = 0
    encode_ns: int = 0
    prefill_ns: int = 0
    step_ns: int = 0
    context_length: int = 4096
    fail_at: str = ""
    clock: Clock = field(default_factory=SystemClock)


class FakeBackend:
    """One token per byte; the visual "embedding" of an image is its digest."""

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
        )
        self.calls: list[str] = []
        self.closed = False
        self._answer = b""
        self._replies: dict[Prompt, str] = {}
        self._position = 0

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        self._enter("prepare", self.script.prepare_ns)
        ids: list[int] = []
        images: list[PreparedImage] = []
        for message in messages:
            for part in message.content:
                if isinstance(part, str):
                    ids += part.encode()
                else:
                    assert isinstance(part, Image)
                    ids += [END] * IMAGE_TOKENS
                    images.append(PreparedImage(part.digest, None))
        reply = self.script.reply
        prompt = Prompt(tuple(ids), tuple(images))
        self._replies = {prompt: reply if isinstance(reply, str) else reply(messages)}
        return prompt

    def encode(self, images: Sequence[PreparedImage]) -> list[Any]:
        self._enter("encode", self.script.encode_ns * len(images))
        return [image.digest for image in images]

    def prefill(self, prompt: Prompt, embeds: Sequence[Any]) -> Prefilled:
        self._enter("prefill", self.script.prefill_ns)
        if list(embeds) != [image.digest for image in prompt.images]:
            raise RuntimeError("embeddings of another request")
        self._answer, self._position = self._replies[prompt].encode(), 0
        return Prefilled(self._logits(), len(prompt.ids))

    def step(self, token_id: int) -> Logits:
        self._enter("step", self.script.step_ns)
        if not 0 <= token_id < VOCABULARY:
            raise RuntimeError(f"token {token_id} is not in the vocabulary")
        self._position += 1
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
