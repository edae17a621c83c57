"""Several questions at once, where the backend can: the weights are read once for all of them.

For scores only: people are served one after the other by `runtime.engine`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from runtime.api import ContextOverflow, EncodedImage, Message, ModelInfo, Prompt
from runtime.images import decode_image, question
from runtime.tasks.base import Item
from runtime.text import Detokenizer
from vlm.errors import BadImage


@runtime_checkable
class Batches(Protocol):
    """A backend that answers several prompts at once, greedily."""

    info: ModelInfo

    def prepare(self, messages: Sequence[Message]) -> Prompt: ...

    def answer_batch(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> list[list[int]]:
        """Tokens of each answer, the end token included, at most `limits` of them."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str: ...

    def close(self) -> None: ...


def ask_batch(backend: Batches, items: Sequence[Item], max_new_tokens: int) -> list[dict[str, Any]]:
    """Answers in the form of `runtime.evaluation.ask`; `ms` is the batch's time per question."""
    started = time.monotonic()
    answers: list[dict[str, Any]] = []
    places, prompts, limits = [], [], []
    for place, item in enumerate(items):
        try:
            pictures = [picture.read() for picture in item.pictures]
            decoded = [decode_image(p) if isinstance(p, EncodedImage) else p for p in pictures]
            prompt = backend.prepare([question(item.prompt, *decoded)])
            room = backend.info.context_length - len(prompt.ids)
            if room < 1:
                raise ContextOverflow(len(prompt.ids) + 1, backend.info.context_length)
        except BadImage as error:
            answers.append({"prediction": "", "error": "image_damaged", "cause": error.message})
        except ContextOverflow as error:
            answers.append({"prediction": "", "error": "context_overflow", "cause": error.message})
        else:
            answers.append({})
            places.append(place)
            prompts.append(prompt)
            limits.append(min(max_new_tokens, room))
    found = backend.answer_batch(prompts, limits) if prompts else []
    ms = 1000 * (time.monotonic() - started) / max(len(prompts), 1)
    for place, ids in zip(places, found, strict=True):
        ended = bool(ids) and ids[-1] in backend.info.eos_token_ids
        detokenizer = Detokenizer(backend.detokenize)
        text = "".join(detokenizer.add(token_id) for token_id in (ids[:-1] if ended else ids)) + detokenizer.flush()
        finish = "stop" if ended else "length"
        answers[place] = {"prediction": text.strip(), "finish": finish, "tokens": len(ids), "ms": round(ms, 3)}
    return answers
