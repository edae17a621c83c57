"""Malformed requests for the server: seeds, mutations, and what must hold of every answer."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import random
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from PIL import Image as Pillow

from .serving import png, user

ALLOWED = frozenset((200, 400, 401, 404, 405, 408, 413, 415, 429))
WEIRD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, "", "\x00", "\ud800", "a" * 5000,
    "<image>", "<|im_end|>", "data:", "data:image/png;base64,", "data:image/png;base64,!!!!", "http://169.254.169.254/",
    "file:///etc/passwd", "../../etc/passwd", [], {}, [[]], [None], {"": {}}, {"type": "text"}, {"type": "image_url"},
    {"type": "image_url", "image_url": {}}, {"role": "user"}, {"role": "tool", "content": "x"}, "🙂" * 50, "\u202e",
)  # fmt: skip
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Case:
    """One request as it goes over the wire."""

    body: bytes
    path: str = CHAT
    method: str = "POST"
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"), (b"host", b"localhost"))


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few hundred bytes that claims to be enormous."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 4096))
        + chunk(b"IEND", b"")
    )


def pictures() -> list[bytes]:
    """One small file per format, and the usual traps."""
    found = [png(), bomb(), b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n"]
    for kind in ("JPEG", "GIF", "BMP", "WEBP", "TIFF", "ICO"):
        buffer = io.BytesIO()
        Pillow.new("RGB", (9, 7), (1, 2, 3)).save(buffer, kind)
        found.append(buffer.getvalue())
    for mode in ("CMYK", "L", "1"):
        buffer = io.BytesIO()
        Pillow.new(mode, (5, 5)).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
        found.append(buffer.getvalue())
    wide = io.BytesIO()
    Pillow.new("L", (20_000, 1)).save(wide, "PNG")
    return [*found, wide.getvalue()]


def seeds() -> list[dict[str, Any]]:
    """Valid requests that reach every field."""
    turns = [{"role": "system", "content": "s"}, user("a", png()), {"role": "assistant", "content": "7"}, user("b")]
    full = {
        "model": "fake", "messages": turns, "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1,
        "seed": 1, "stop": ["x"], "stream": True, "stream_options": {"include_usage": True}, "n": 1, "user": "me",
        "repetition_penalty": 1.1, "ignore_eos": False, "cache_prompt": True, "response_format": {"type": "text"},
    }  # fmt: skip
    return [{"messages": [user("hi")]}, {"messages": [user("what?", png(3))], "max_completion_tokens": 3}, full]


def mutated(rng: random.Random, value: dict[str, Any], images: list[bytes]) -> Case:
    """Some damage: to the tree of values, to an image, to the bytes, or to the headers."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _harm_tree(rng, value)
    if rng.random() < 0.4:
        value["messages"] = [user("x", *[_harmed(rng, rng.choice(images)) for _ in range(rng.choice((1, 1, 2, 9)))])]
    body = json.dumps(value).encode()
    roll = rng.random()
    if roll < 0.15:
        body = _harmed(rng, body)
    elif roll < 0.18:
        body = rng.choice(
            (b"[" * 200_000, b'{"messages":' * 3000, b'{"a":' + b"9" * 10_000 + b"}", b"\xff\xfe", b"NaN", b"")
        )
    elif roll < 0.20:
        body = b'{"messages": "' + b"x" * 300_000 + b'"}'
    headers = Case(b"").headers
    if rng.random() < 0.06:
        odd = (b"text/plain", b"", b"application/json; charset=utf-16", b"APPLICATION/JSON", b"\xff")
        headers = ((b"content-type", rng.choice(odd)), (b"host", rng.choice((b"localhost", b"evil", b""))))
    if rng.random() < 0.06:
        headers = (*headers, (b"content-length", rng.choice((b"-1", b"9" * 30, b"abc", b"0", b"99999999"))))
    path = (
        CHAT
        if rng.random() < 0.97
        else rng.choice(("/", "/v1/models/%00", "/v1/models/" + "x" * 3000, "/../etc", "/metrics"))
    )
    method = "POST" if rng.random() < 0.98 else rng.choice(("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"))
    return Case(body, path, method, headers)


def _harm_tree(rng: random.Random, value: Any) -> None:
    node = value
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        child = node[key]
        if not isinstance(child, dict | list) or not child or rng.random() < 0.3:
            break
        node = child
    if not isinstance(node, dict | list) or not node:
        return
    roll = rng.random()
    if roll < 0.7:
        node[key] = copy.deepcopy(rng.choice(WEIRD))
    elif roll < 0.8:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(("unknown", "tools", "logprobs", "\ud800", "n", "functions"))] = copy.deepcopy(
            rng.choice(WEIRD)
        )
    else:
        node.extend(copy.deepcopy(node) * rng.choice((1, 50)))


def _harmed(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    roll, at = rng.random(), rng.randrange(len(data))
    if roll < 0.4:
        return data[:at]
    if roll < 0.8:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]


async def call(app: Any, case: Case) -> tuple[int, bytes]:
    """Straight into the application, without a socket: status and body."""
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": case.body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop(0)
        await asyncio.Event().wait()  # the client stays until it is answered
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": case.method,
        "scheme": "http", "path": case.path, "raw_path": case.path.encode(), "query_string": b"", "root_path": "",
        "headers": list(case.headers), "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 60)
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return next(m["status"] for m in sent if m["type"] == "http.response.start"), body


def fault(status: int, body: bytes) -> str | None:
    """Why this answer must not have been given; None if it is fine."""
    if status not in ALLOWED:
        return f"status {status}"
    for sign in (b"Traceback", b'File "', b"/work", b"/usr", b"site-packages", b"server_failed", b"model_failed"):
        if sign in body:
            return f"{sign!r} in the answer"
    return None
