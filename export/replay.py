"""One image and one question through any backend: the seam parity, accuracy and `verify` share. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm.chat import ChatTokenizer, user_message

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """A question about an image, in the two forms backends take.

    Attributes:
        text: rendered template with one image token per image.
        ids: token ids of the text with the image token repeated over the visual tokens.
    """

    image: Image.Image
    question: str
    text: str
    ids: tuple[int, ...]


def make_prompt(tokenizer: ChatTokenizer, image: Image.Image, question: str) -> Prompt:
    messages = [user_message(question)]
    text = tokenizer.render(messages, add_generation_prompt=True)
    return Prompt(image, question, text, tuple(tokenizer.prompt_ids(messages)))


class Backend(Protocol):
    """Runs one sequence at a time; `prefill` starts a new one."""

    def features(self, image: Image.Image) -> F32:
        """Visual tokens after the projector, [N, hidden]."""
        ...

    def prefill(self, prompt: Prompt) -> F32:
        """Logits [vocab] after the last prompt token."""
        ...

    def step(self, token: int) -> F32:
        """Append a token to the running sequence; logits [vocab] after it."""
        ...

    def close(self) -> None: ...


def forced_logits(backend: Backend, prompt: Prompt, forced: Sequence[int]) -> F32:
    """Teacher forcing through the cache: logits [1 + len(forced), vocab]."""
    return np.stack([backend.prefill(prompt), *(backend.step(token) for token in forced)])


def greedy(backend: Backend, prompt: Prompt, stop: Sequence[int], limit: int) -> tuple[int, ...]:
    """Most likely tokens up to and including the first stop token, at most `limit`."""
    ids: list[int] = []
    logits = backend.prefill(prompt)
    while True:
        ids.append(int(logits.argmax()))
        if ids[-1] in stop or len(ids) == limit:
            return tuple(ids)
        logits = backend.step(ids[-1])
