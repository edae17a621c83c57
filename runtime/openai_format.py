"""The OpenAI chat-completions format <-> messages, sampling and events. Pure functions; no server, no clock.

What is accepted: text and images as data URIs; the sampling fields of OpenAI, vLLM and llama.cpp's server. What cannot be
honoured is refused by name, never ignored. Without a temperature answers are greedy, as everywhere in this project.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.api import Done, EncodedImage, Finish, Message, Part, Reuse, Role, Sampling
from runtime.images import image_size, question
from runtime.latency import Timing
from vlm.errors import BadImage, UserError

FINISH: dict[Finish, str] = {"stop": "stop", "length": "length", "cancelled": "stop", "deadline": "length"}
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# fields that do not change what one answer says
HARMLESS = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)
# fields that are fine as long as they ask for nothing
OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
}
DATA_URI = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.ASCII)
DEFAULT_TOKENS = 256


class NoSuchModel(UserError):
    """Another model was asked for than the one that is loaded."""

    code = "model_not_found"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body_bytes: of the whole request. images: per conversation. image_pixels: per image, width times height.
        text: characters over all messages. messages: turns. new_tokens: length of an answer.
    """

    body_bytes: int = 16 << 20
    images: int = 8
    image_pixels: int = 16_000_000
    text: int = 200_000
    messages: int = 256
    new_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")


@dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    messages: tuple[Message, ...]
    sampling: Sampling
    stream: bool
    include_usage: bool
    reuse: Reuse


def parse(body: bytes, model: str, limits: Limits) -> ChatRequest:
    """Request body -> ChatRequest.

    Raises:
        UserError: says which field is wrong. BadImage: an image that is none, or too large. NoSuchModel.
    """
    try:
        return _parse(body, model, limits)
    except RecursionError:
        raise UserError("the body is nested too deeply; send plain messages") from None


def _parse(body: bytes, model: str, limits: Limits) -> ChatRequest:
    fields = _Fields(_json_object(body), "the request")
    wanted = fields.take("model", str, model)
    if wanted not in (model, "", "default"):
        raise NoSuchModel(f"the model {wanted[:80]!r} is not loaded here; this server has {model!r}")
    for name, allowed in OFF.items():
        value = fields.pop(name)
        if value is not None and value not in allowed:
            raise UserError(f"{name} is not supported; leave it out")
    for name in HARMLESS:
        fields.pop(name)
    messages = _messages(fields.take("messages", list, None), limits)
    stream = fields.take("stream", bool, False)
    options = _Fields(fields.take("stream_options", dict, {}), "stream_options")
    include_usage = options.take("include_usage", bool, False)
    options.pop("include_obfuscation")
    options.end()
    reuse: Reuse = "all" if fields.take("cache_prompt", bool, True) else "none"
    sampling = _sampling(fields, limits)
    fields.end()
    return ChatRequest(messages, sampling, stream, include_usage, reuse)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_not_json)
    except UnicodeDecodeError:
        raise UserError("the body is not UTF-8; send JSON") from None
    except ValueError as error:  # not JSON, or a number with thousands of digits
        reason = getattr(error, "msg", "a value out of range")
        raise UserError(f"the body is not JSON ({reason}); send an object with `messages`") from None
    if not isinstance(value, dict):
        raise UserError("the body is not a JSON object; send an object with `messages`")
    return value


def _not_json(name: str) -> NoReturn:
    raise ValueError(name)


class _Fields:
    """The keys of an object, taken one by one with their types; what is left over at the end is a mistake."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._left = dict(values)
        self._where = where

    def pop(self, name: str) -> Any:
        return self._left.pop(name, None)

    def take(self, name: str, kind: type, default: Any) -> Any:
        """The value, or the default if it is absent or null.

        Raises:
            UserError: absent without a default, or of another type.
        """
        value = self._left.pop(name, None)
        if value is None:
            if default is None:
                raise UserError(f"{self._where} lacks {name!r}")
            return default
        if isinstance(value, str):
            _unicode(value, name)
        right = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not right or (isinstance(value, bool) and kind is not bool):
            names = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}
            raise UserError(f"{name} in {self._where} must be {names.get(kind, 'a number')}")
        if kind in (int, float) and not abs(value) < 2**63:  # JSON has no largest number, and 1e999 is infinite
            raise UserError(f"{name} in {self._where} is out of range")
        return float(value) if kind is float else value

    def given(self, name: str, kind: type) -> Any:
        """As `take`, None where it is absent or null."""
        if self._left.get(name) is None:
            return self.pop(name)
        return self.take(name, kind, None)

    def end(self) -> None:
        if self._left:
            raise UserError(f"{self._where} has the unknown field {sorted(self._left)[0][:80]!r}; remove it")


def _unicode(text: str, where: str) -> str:
    r"""JSON can write half a character (\ud800); no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate); send whole text") from None
    return text


def _sampling(fields: _Fields, limits: Limits) -> Sampling:
    old, new = fields.take("max_tokens", int, DEFAULT_TOKENS), fields.given("max_completion_tokens", int)
    tokens = old if new is None else new
    if tokens < 1:
        raise UserError(f"{'max_tokens' if new is None else 'max_completion_tokens'} is {tokens}; send 1 or more")
    stop = fields.pop("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if (
        not isinstance(stops, list)
        or len(stops) > 16
        or not all(isinstance(s, str) and 0 < len(s) < 500 for s in stops)
    ):
        raise UserError("stop must be text or a list of up to 16 short texts, none of them empty")
    _unicode("".join(stops), "stop")
    seed = fields.pop("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) > 2**63):
        raise UserError("seed must be a whole number of at most 64 bits")
    penalty, other = (fields.given(name, float) for name in ("repetition_penalty", "repeat_penalty"))
    if penalty is not None and other is not None and penalty != other:
        raise UserError(f"repetition_penalty is {penalty} and repeat_penalty {other}; send one of them")
    penalty = other if penalty is None else penalty
    return Sampling(
        max_new_tokens=min(tokens, limits.new_tokens),
        temperature=fields.take("temperature", float, 0.0),
        top_p=fields.take("top_p", float, 1.0),
        top_k=max(fields.take("top_k", int, 0), 0),  # other servers write -1 for "all"
        min_p=fields.take("min_p", float, 0.0),
        repetition_penalty=1.0 if penalty is None else penalty,
        seed=None if seed is None else abs(seed),
        stop=tuple(stops),
        ignore_eos=fields.take("ignore_eos", bool, False),
        grammar=fields.take("grammar", str, ""),
        json_schema=_schema(fields.take("response_format", dict, {})),
    )


def _schema(response_format: dict[str, Any]) -> str:
    kind = response_format.get("type", "text")
    if kind == "text":
        return ""
    if kind == "json_object":
        return '{"type": "object"}'
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if isinstance(schema, dict):
            return json.dumps(schema)
    raise UserError("response_format must be of type text, json_object, or json_schema with json_schema.schema")


def _messages(values: list[Any], limits: Limits) -> tuple[Message, ...]:
    if not 1 <= len(values) <= limits.messages:
        raise UserError(f"messages has {len(values)} entries; send 1 to {limits.messages}")
    messages, images, text = [], 0, 0
    for number, value in enumerate(values, 1):
        message = _message(value, number, images, limits)
        images += sum(not isinstance(part, str) for part in message.content)
        text += sum(len(part) for part in message.content if isinstance(part, str))
        if images > limits.images:
            raise UserError(f"the conversation has more than {limits.images} images; send fewer")
        if text > limits.text:
            raise UserError(f"the conversation has more than {limits.text} characters; shorten it")
        messages.append(message)
    return tuple(messages)


def _message(value: Any, number: int, images_before: int, limits: Limits) -> Message:
    where = f"message {number}"
    if not isinstance(value, dict):
        raise UserError(f"{where} is not an object")
    role = ROLES.get(value["role"]) if isinstance(value.get("role"), str) else None
    if role is None:
        raise UserError(f"{where}: role must be one of {', '.join(ROLES)}")
    if value.get("tool_calls") or value.get("function_call"):
        raise UserError(f"{where}: tool calls are not supported")
    content = value.get("content")
    if isinstance(content, str):
        return Message(role, (_unicode(content, where),))
    if not isinstance(content, list) or not content:
        raise UserError(f"{where}: content must be text or a list of parts")
    parts: list[Part] = []
    for part in content:
        images = images_before + sum(not isinstance(p, str) for p in parts)
        if images > limits.images:
            raise UserError(f"the conversation has more than {limits.images} images; send fewer")
        parts.append(_part(part, where, images + 1, limits))
    pictures = [part for part in parts if isinstance(part, EncodedImage)]
    if pictures and role != "user":
        raise UserError(f"{where}: images belong into user messages")
    texts = [part for part in parts if isinstance(part, str)]
    if pictures and len(texts) == 1:
        # one text and its pictures, in whichever order: the form the student was trained on
        return question(texts[0].removeprefix("\n"), *pictures)
    return Message(role, tuple(parts))


def _part(part: Any, where: str, number: int, limits: Limits) -> str | EncodedImage:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _unicode(part["text"], where)
    if kind == "image_url":
        link = part.get("image_url")
        url = link.get("url") if isinstance(link, dict) else link
        if isinstance(url, str):
            return _image(url, f"image {number}", limits)
    raise UserError(f"{where}: a part must be {{type: text, text}} or {{type: image_url, image_url: {{url}}}}")


def _image(url: str, name: str, limits: Limits) -> EncodedImage:
    match = DATA_URI.match(url)
    if not match:
        raise BadImage(f"{name} is not a data URI (data:image/png;base64,...); send the file itself")
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise BadImage(f"{name} is not valid base64; encode the file again") from None
    encoded = EncodedImage(data, name)
    width, height = image_size(encoded)
    if width * height > limits.image_pixels:
        raise BadImage(f"{name} is {width}x{height}, more than {limits.image_pixels} pixels; scale it down first")
    return encoded


def usage_json(done: Done) -> dict[str, Any]:
    usage = done.usage
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens or 0,
            "image_tokens": usage.image_tokens or 0,
            "cached_images": usage.cached_images or 0,
        },
    }


def timings_json(measured: Timing) -> dict[str, Any]:
    """The names of llama.cpp's server, and our own: TTFT, TPOT and every stage. Milliseconds."""
    queue = measured.stages_ms.get("queue", 0.0)
    prompt_n = (measured.prompt_tokens or 0) - (measured.cached_tokens or 0)
    predicted_n = measured.completion_tokens or 0
    prompt_ms = None if measured.ttft_ms is None else measured.ttft_ms - queue
    predicted_ms = None if measured.ttft_ms is None else measured.e2el_ms - measured.ttft_ms
    return {
        "cache_n": measured.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_second": 1000 * prompt_n / prompt_ms if prompt_ms else None,
        "predicted_n": predicted_n,
        "predicted_ms": predicted_ms,
        "predicted_per_second": 1000 * (predicted_n - 1) / predicted_ms if predicted_ms else None,
        "ttft_ms": measured.ttft_ms,
        "tpot_ms": measured.tpot_ms,
        "e2el_ms": measured.e2el_ms,
        "stages_ms": measured.stages_ms,
    }
