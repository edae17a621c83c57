"""Any OpenAI-compatible server as a model: ours, llama.cpp's, vLLM, TensorRT-Edge-LLM, measured by the same ruler.

What happens behind the address cannot be seen: one span, the arrival of each piece of text, and the server's own
report beside it. Standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from runtime.api import (
    ContextOverflow,
    EncodedImage,
    Finish,
    Image,
    Message,
    ModelFailed,
    ModelInfo,
    QueueFull,
    Reported,
    Reuse,
    Sampling,
    Usage,
)
from runtime.images import to_pillow
from runtime.options import LoadOptions
from vlm.errors import BadImage, MissingPiece, UserError

CONNECT_S = 10.0
SILENCE_S = 600.0
WATCH_S = 0.05
MAX_REPLY = 1 << 20
KEY_VARIABLE = "ALIGN_EDGE_API_KEY"
FINISH: dict[str, Finish] = {"stop": "stop", "length": "length"}
# ours, OpenAI's, llama.cpp's, and what vLLM and llama-cpp-python write
TOO_LONG = (
    *(ContextOverflow.code, "context_length_exceeded", "exceed_context_size_error"),
    *("maximum context length", "exceeds the available context size"),
)
MAGIC = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"RIFF", "image/webp"),
)


class TooLong(ContextOverflow):
    """In the server's words; how many tokens it counted is its own affair."""

    def __init__(self, text: str) -> None:
        UserError.__init__(self, text)

    def __reduce__(self) -> tuple[type[TooLong], tuple[Any, ...]]:
        return TooLong, (self.message,)


class OpenAiBackend:
    """See `runtime.api.StreamBackend`. One connection per request, closed by a watcher when the request is stopped."""

    def __init__(self, url: str, options: LoadOptions) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
            self._host.encode("idna")
        except ValueError:  # a port beyond 65535, half a bracket, an empty label
            parts, self._host = urlsplit(""), ""
        if parts.scheme not in ("http", "https") or not self._host:
            raise UserError(f"{url!r} is not an address; write http://127.0.0.1:8080")
        self._url, self._tls = url, parts.scheme == "https"
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._key = os.environ.get(KEY_VARIABLE, "")
        name = self._model_name()
        self.info = ModelInfo(
            name=name,
            backend="openai",
            device="remote",
            precision="unknown",
            threads=0,
            context_length=0,
            vocab_size=0,
            tokens_per_image=0,
            eos_token_ids=(),
        )

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_S)
        connection.connect()
        connection.sock.settimeout(SILENCE_S)
        # small pieces must not wait for more to come
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}"} if self._key else {})}

    def _model_name(self) -> str:
        try:
            with contextlib.closing(self._connect()) as connection:
                connection.request("GET", f"{self._base}/v1/models", headers=self._headers())
                response = connection.getresponse()
                body = response.read(MAX_REPLY)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"nothing answers at {self._url} ({error}); start the server or check the address"
            ) from None
        if response.status != 200:
            hint = f"; put the key into {KEY_VARIABLE}" if response.status == 401 else ""
            raise UserError(f"{self._url}/v1/models answers {response.status}{hint}")
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self._url} is not an OpenAI-compatible server (no models listed)") from None

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, reuse: Reuse, stopped: Callable[[], bool]
    ) -> Generator[str | Reported, None, None]:
        body = json.dumps(request_json(self.info.name, messages, sampling, reuse)).encode()
        ended = threading.Event()
        try:
            with contextlib.closing(self._connect()) as connection:
                raw = connection.sock
                watcher = threading.Thread(target=_watch, args=(raw, stopped, ended), daemon=True)
                watcher.start()
                try:
                    connection.request("POST", f"{self._base}/v1/chat/completions", body, self._headers())
                    response = connection.getresponse()
                    if response.status != 200:
                        raise _refusal(response.status, response.read(MAX_REPLY))
                    yield from _replies(_events(response))
                finally:
                    ended.set()
                    watcher.join()  # it may hold the socket
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not stopped():
                raise ModelFailed(f"{self._url} broke off ({type(error).__name__}: {error}); see its log") from None

    def close(self) -> None:
        """Nothing is held between requests."""


def _watch(connection: socket.socket, stopped: Callable[[], bool], ended: threading.Event) -> None:
    """A blocked read wakes up only when the connection goes away, which also tells the server to stop."""
    while not ended.wait(WATCH_S):
        if stopped():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            return


def _refusal(status: int, body: bytes) -> Exception:
    code = ""
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), f"{error.get('code')} {error.get('type')}"
    except (ValueError, LookupError, TypeError):
        message = body[:200].decode("utf-8", "replace")
    if status == 429:
        return QueueFull(f"the server is busy ({message})")
    if status >= 500:
        return ModelFailed(f"the server answers {status} ({message})")
    text = f"the server refuses the request: {status}, {message}"
    if any(words in f"{code} {message.lower()}" for words in TOO_LONG):
        return TooLong(text)
    return BadImage(text) if BadImage.code in code.split() else UserError(text)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Objects of a stream of server-sent events."""
    while line := response.readline(MAX_REPLY):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)


def _replies(events: Iterator[dict[str, Any]]) -> Generator[str | Reported, None, None]:
    finish: str | None = None
    usage: dict[str, Any] = {}
    timings: dict[str, Any] = {}
    for event in events:
        if "error" in event:
            error = event["error"]
            message = error.get("message", "no message") if isinstance(error, dict) else error
            raise ModelFailed(f"the server failed in the middle ({message})")
        usage = event.get("usage") or usage
        timings = event.get("timings") or timings
        for choice in event.get("choices") or ():
            finish = choice.get("finish_reason") or finish
            yield str((choice.get("delta") or {}).get("content") or "")
    if finish is not None:
        yield Reported(FINISH.get(finish, "stop"), _usage(usage, timings), timings)


def _usage(usage: dict[str, Any], timings: dict[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=usage.get("prompt_tokens"),
        image_tokens=details.get("image_tokens"),
        cached_tokens=details.get("cached_tokens", timings.get("cache_n")),
        completion_tokens=usage.get("completion_tokens"),
        cached_images=details.get("cached_images"),
    )


def request_json(model: str, messages: Sequence[Message], sampling: Sampling, reuse: Reuse) -> dict[str, Any]:
    """The body of a streamed request. Fields outside OpenAI's own are sent only where they ask for something."""
    value: dict[str, Any] = {
        "model": model,
        "messages": [_message(message) for message in messages],
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    extra = {
        "stop": list(sampling.stop),
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 0 if sampling.repetition_penalty == 1 else sampling.repetition_penalty,
        "ignore_eos": sampling.ignore_eos,
        "grammar": sampling.grammar,
    }
    value.update({name: setting for name, setting in extra.items() if setting})
    if sampling.seed is not None:  # zero is a seed too
        value["seed"] = sampling.seed
    if sampling.json_schema:
        schema = {"name": "answer", "schema": json.loads(sampling.json_schema)}
        value["response_format"] = {"type": "json_schema", "json_schema": schema}
    if reuse == "none":
        value["cache_prompt"] = False
    return value


def _message(message: Message) -> dict[str, Any]:
    if all(isinstance(part, str) for part in message.content):
        return {"role": message.role, "content": "".join(str(part) for part in message.content)}
    return {"role": message.role, "content": [_part(part) for part in message.content]}


def _part(part: str | EncodedImage | Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image):
        buffer = io.BytesIO()
        to_pillow(part).save(buffer, "PNG")
        part = EncodedImage(buffer.getvalue())
    kind = next((kind for magic, kind in MAGIC if part.data.startswith(magic)), "image/png")
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(part.data).decode()}"}}


def open_url(url: str, options: LoadOptions) -> OpenAiBackend:
    """Address of a server -> backend.

    Raises:
        UserError: nothing answers there, or it is no such server. MissingPiece: `--device` makes no sense here.
    """
    if options.device != "cpu":
        raise MissingPiece("the device of a remote server is chosen where it runs; leave --device out")
    return OpenAiBackend(url, options)
