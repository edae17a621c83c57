"""What callers and backends agree on: messages in, events out, and the steps a backend must offer.

Standard library and NumPy only. Times are integer nanoseconds of one monotonic clock (`Engine.clock`).
Shape legend: H = height, W = width, T = visual tokens of one image, D = decoder width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from vlm.errors import ToolError, UserError

# `remote` is all that happens behind somebody else's server: it is not one of the stages and never split by guessing
Stage = Literal["queue", "image_decode", "preprocess", "vision_encode", "prefill", "decode", "detokenize", "remote"]
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
# what a request may take from earlier ones: nothing, image embeddings, or also the keys and values of a shared beginning
Reuse = Literal["none", "images", "all"]
# stage borders at which the device is waited for, so that no stage's time is booked on the next one
Sync = Literal["none", "vision", "all"]
Logits: TypeAlias = npt.NDArray[np.float32]


class QueueFull(UserError):
    """Too many requests wait for this model; nothing of this one was started."""

    code = "queue_full"


class EngineClosed(UserError):
    """The engine was closed before or while the request ran."""

    code = "engine_closed"


class ModelFailed(ToolError):
    """The model behind this request failed; the next request may well succeed."""

    code = "model_failed"


class ContextOverflow(UserError):
    """The prompt does not fit the model's context."""

    code = "context_overflow"

    def __init__(self, need: int, have: int) -> None:
        super().__init__(
            f"the prompt needs {need} tokens of context, the model has {have}; shorten it or send fewer images"
        )
        self.need, self.have = need, have

    def __reduce__(self) -> tuple[type[ContextOverflow], tuple[Any, ...]]:
        return ContextOverflow, (self.need, self.have)  # by default an exception is copied by its message


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
    """A decoded image: rgb uint8 [H, W, 3] and a hash of its content (the key under which embeddings may be cached).

    `rgb` is empty [0, 0, 3] where the engine already holds what it needs of an image with this content.
    """

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
        temperature: 0 is greedy; top_p, top_k, min_p and seed then play no part.
        top_k: 0 keeps all tokens.
        min_p: drop tokens less likely than this share of the likeliest one; 0 keeps all.
        repetition_penalty: divides the logits of tokens that already occurred, prompt included (CTRL, Keskar et al.
            2019, section 4.1); 1 is off.
        seed: None draws a fresh one per request.
        stop: the answer ends before the first of these strings.
        ignore_eos: go on to exactly `max_new_tokens` (speed runs).
        grammar: the answer must match this GBNF grammar; only where the backend can constrain answers.
        json_schema: the answer must be JSON of this schema (given as JSON text); same restriction.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    grammar: str = ""
    json_schema: str = ""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        _require(0 <= self.temperature <= 100, "temperature", self.temperature, "0 (greedy) to 100")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 (off) to 1")
        _require(0 < self.repetition_penalty <= 10, "repetition_penalty", self.repetition_penalty, "above 0, up to 10")
        _require(not (self.grammar and self.json_schema), "json_schema", "set together with grammar", "only one")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")
        _require(all(self.stop), "stop", self.stop, "strings that are not empty")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}; give {allowed}")


class Span(NamedTuple):
    """Time spent in one stage. The spans of a request tile it: each starts where the one before ended.

    Attributes:
        tokens: tokens the stage worked on (prompt tokens for prefill, 1 per decode step, else 0).
        cached: the stage was answered from a cache.
        cached_tokens: prefill only: prompt tokens taken over from an earlier request.
    """

    stage: Stage
    start_ns: int
    end_ns: int
    tokens: int = 0
    cached: bool = False
    cached_tokens: int = 0


class Token(NamedTuple):
    """One generated token, the end-of-sequence token included. From a remote server: one piece of text, id -1.

    Attributes:
        text: what became visible with it; "" inside a multi-byte character, a possible stop string, or at the end.
        t_ns: when it was chosen.
    """

    id: int
    text: str
    t_ns: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; None where a remote server does not say.

    Attributes:
        prompt_tokens: includes `image_tokens`; `cached_tokens` of them were not computed again.
        cached_images: images whose embedding was not computed again.
    """

    prompt_tokens: int | None
    image_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    cached_images: int | None = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a request.

    Attributes:
        text: the whole answer: the texts of all Token events, plus what was still held back at the end.
        received_ns: when the request reached the engine; the first span starts here.
        spans: every span in time order, one decode and one detokenize span per token.
        reported: what a remote server said about its own timings, untouched.
    """

    finish: Finish
    text: str
    usage: Usage
    received_ns: int
    spans: tuple[Span, ...] = field(repr=False)
    reported: Mapping[str, Any] | None = None


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
        preprocess_sha256: of the image settings: part of the key under which embeddings are kept.
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
    preprocess_sha256: str = ""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One image as the vision tower of a backend takes it.

    Attributes:
        pixels: the backend's own business; None where the embedding is at hand.
        start: index of its first visual token in the prompt.
    """

    digest: str
    pixels: Any = field(repr=False)
    start: int = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with every image expanded to its visual tokens, and the images in order."""

    ids: tuple[int, ...]
    images: tuple[PreparedImage, ...] = ()


class Backend(Protocol):
    """The steps every model format offers; `runtime.run` is the only loop over them.

    One request at a time, from one thread. Logits may be the backend's own memory: they hold until its next call, and
    nobody writes to them. The context (keys and values of all tokens so far) outlives a request, so
    that the next one may go on from a beginning they share; who may share what is decided by the engine alone.
    """

    info: ModelInfo

    def prepare(self, messages: Sequence[Message], at_hand: Container[str] = frozenset()) -> Prompt:
        """Template, tokenise, resize. Every image part is an `Image` by now; no pixels for digests `at_hand`."""
        ...

    def encode(self, images: Sequence[PreparedImage]) -> list[Any]:
        """Vision tower and projector: one embeds_TD per image, in whatever form `prefill` takes; it has `nbytes`."""
        ...

    def prefill(self, prompt: Prompt, embeds: Sequence[Any], start: int = 0, stop: int | None = None) -> Logits:
        """Forget the context from token `start` on, then take in the prompt's tokens start..stop; logits_V after them.

        Args:
            embeds: one per image of the prompt; None for an image that lies before `start`.
        """
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


@runtime_checkable
class SpellsTokens(Protocol):
    """A backend that knows the text of each token by itself: detokenising is then a look into a table."""

    def pieces(self) -> Mapping[int, str | bytes] | None:
        """Text of every token id, bytes where it is not whole characters; None where text depends on its neighbours."""
        ...


class Constraint(Protocol):
    """Follows one answer and knows which tokens may come next."""

    def mask(self, logits_V: Logits) -> Logits:
        """A copy with -inf for every token that would break the rule."""
        ...

    def accept(self, token_id: int) -> None:
        """This token was chosen."""
        ...


@runtime_checkable
class Constrains(Protocol):
    """A backend that can hold answers to a grammar."""

    def constrain(self, sampling: Sampling) -> Constraint:
        """Constraint for `sampling.grammar` or `sampling.json_schema`.

        Raises:
            UserError: the grammar or schema is not valid.
        """
        ...


@dataclass(frozen=True, slots=True)
class Reported:
    """What a remote server says at the end of its stream; None where it says nothing."""

    finish: Finish
    usage: Usage
    timings: Mapping[str, Any]


@runtime_checkable
class StreamBackend(Protocol):
    """A model behind somebody else's loop: text pieces come out, stages cannot be seen and are never guessed."""

    info: ModelInfo

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, reuse: Reuse, stopped: Callable[[], bool]
    ) -> Generator[str | Reported, None, None]:
        """Pieces of text as they arrive, at the end one Reported; ends early, without one, once `stopped()` is true."""
        ...

    def close(self) -> None: ...
