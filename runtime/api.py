"""What callers and backends agree on: messages in, events out, and the steps a backend must offer.

Standard library and NumPy only. Times are integer nanoseconds of one monotonic clock (`Engine.clock`).
Shape legend: H = height, W = width, T = visual tokens of one image, D = decoder width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vlm.errors import UserError

Stage = Literal["queue", "image_decode", "preprocess", "vision_encode", "prefill", "decode", "detokenize"]
STAGES: tuple[Stage, ...] = (
    "queue",
    "image_decode",
    "preprocess",
    "vision_encode",
    "prefill",
    "decode",
    "detokenize",
)
Finish = Literal["stop", "length", "cancelled", "deadline"]
Role = Literal["system", "user", "assistant"]
Logits: TypeAlias = npt.NDArray[np.float32]


class QueueFull(UserError):
    """Too many requests wait for this model; nothing of this one was started."""

    code = "queue_full"


class EngineClosed(UserError):
    """The engine was closed before or while the request ran."""

    code = "engine_closed"


class ContextOverflow(UserError):
    """The prompt does not fit the model's context."""

    code = "context_overflow"

    def __init__(self, need: int, have: int) -> None:
        super().__init__(
            f"the prompt needs {need} tokens of context, the model has {have}; shorten it or send fewer images"
        )
        self.need, self.have = need, have


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A PNG, JPEG, WebP, BMP or GIF file as received; the engine decodes it, so that decoding is timed.

    Attributes:
        name: how error messages call it.
    """

    data: bytes = field(repr=False)
    name: str = "the image"


@dataclass(frozen=True, slots=True)
class Image:
    """A decoded image: rgb uint8 [H, W, 3] and a hash of its content (the key under which embeddings may be cached)."""

    rgb: npt.NDArray[np.uint8] = field(repr=False)
    digest: str


Part: TypeAlias = "str | EncodedImage | Image"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; the order of text and images is kept. See `runtime.images.question` for the trained form."""

    role: Role
    content: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop.

    Attributes:
        temperature: 0 is greedy; top_p, top_k and seed then play no part.
        top_k: 0 keeps all tokens.
        seed: None draws a fresh one per request.
        stop: the answer ends before the first of these strings.
        ignore_eos: go on to exactly `max_new_tokens` (speed runs).

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        _require(0 <= self.temperature <= 100, "temperature", self.temperature, "0 (greedy) to 100")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")
        _require(all(self.stop), "stop", self.stop, "strings that are not empty")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}; give {allowed}")


@dataclass(frozen=True, slots=True)
class Span:
    """Time spent in one stage. The spans of a request tile it: each starts where the one before ended.

    Attributes:
        tokens: tokens the stage worked on (prompt tokens for prefill, 1 per decode step, else 0).
        cached: the stage was answered from a cache.
    """

    stage: Stage
    start_ns: int
    end_ns: int
    tokens: int = 0
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, the end-of-sequence token included.

    Attributes:
        text: what became visible with it; "" inside a multi-byte character, a possible stop string, or at the end.
        t_ns: when it was chosen.
    """

    id: int
    text: str
    t_ns: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `prompt_tokens` includes `image_tokens`; `cached_tokens` of them were not computed again."""

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a request.

    Attributes:
        text: the whole answer: the texts of all Token events, plus what was still held back at the end.
        received_ns: when the request reached the engine; the first span starts here.
        spans: every span in time order, one decode and one detokenize span per token.
    """

    finish: Finish
    text: str
    usage: Usage
    received_ns: int
    spans: tuple[Span, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that raised; `Engine.generate` raises it, `Engine.submit` hands it over."""

    error: Exception


# Span events are sent for the stages before the first token, as each ends; later spans come with Done only
Event: TypeAlias = "Span | Token | Done"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known about a loaded model; None where the artefact does not say.

    Attributes:
        context_length: tokens this engine accepts: the model's own, or the lower cap it was loaded with.
        artifact_bytes: size of the files it takes to answer: weights, graphs, tokenizer.
        weights_sha256: of the student's weights, the same for every format made of it.
        decoder_weight_bytes: read once per token, the output head included. lm_head_bytes: the head alone.
        kv_bytes_per_token: read per token of context.
        verified: every gate held at export; None for a checkpoint, which is the reference itself.
    """

    name: str
    backend: str
    device: str
    precision: str
    threads: int
    context_length: int
    vocab_size: int
    tokens_per_image: int
    eos_token_ids: tuple[int, ...]
    artifact_bytes: int | None = None
    weights_sha256: str | None = None
    decoder_weight_bytes: int | None = None
    lm_head_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    verified: bool | None = None


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One image as the vision tower of a backend takes it; `pixels` is the backend's own business."""

    digest: str
    pixels: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with every image expanded to its visual tokens, and the images in order."""

    ids: tuple[int, ...]
    images: tuple[PreparedImage, ...] = ()


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Logits [V] after the last prompt token, and how many prompt tokens were computed (the rest came from a cache)."""

    logits: Logits
    computed_tokens: int


class Backend(Protocol):
    """The steps every model format offers; `runtime.engine` is the only loop over them.

    One request at a time, from one thread. `prefill` forgets the request before it.
    """

    info: ModelInfo

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """Template, tokenise, resize. Every image part is an `Image` by now."""
        ...

    def encode(self, images: Sequence[PreparedImage]) -> list[Any]:
        """Vision tower and projector: one embeds_TD per image, in whatever form `prefill` takes."""
        ...

    def prefill(self, prompt: Prompt, embeds: Sequence[Any]) -> Prefilled:
        """Run the decoder over the prompt from an empty context."""
        ...

    def step(self, token_id: int) -> Logits:
        """Append one token; logits_V of the next."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out, U+FFFD for incomplete characters."""
        ...

    def sync(self) -> None:
        """Wait for the device, so that a stage's time is not booked on the next one."""
        ...

    def close(self) -> None:
        """Free the model; the backend is not used again."""
        ...
