"""Some hundred malformed requests in seconds; `python -m scripts.fuzz_server` runs ten thousand, guided by coverage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="needs the serve extra")

from runtime.backend_fake import FakeBackend
from runtime.engine import Engine
from runtime.openai_format import Limits, parse
from runtime.server import ServerOptions, Service, make_app
from vlm.errors import UserError

from .fuzzing import Case, bomb, call, fault, mutated, pictures, seeds
from .serving import png, running, user

LIMITS = Limits(body_bytes=200_000, images=4, image_pixels=100_000, new_tokens=8)


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    service = Service("fake", ServerOptions(limits=LIMITS))
    service.engine = Engine(FakeBackend())
    yield make_app(service)
    service.engine.close()
    assert service.open_requests == 0


def test_damaged_requests_never_crash_the_server(app: Any) -> None:
    rng, images = random.Random(0), pictures()

    async def main() -> set[int]:
        statuses = set()
        for number in range(400):
            case = mutated(rng, rng.choice(seeds()), images)
            status, body = await call(app, case)
            assert fault(status, body) is None, (number, case, status, body[:300])
            statuses.add(status)
        good = json.dumps({"messages": [user("hi", png())], "temperature": 0}).encode()
        status, body = await call(app, Case(good))
        assert json.loads(body)["choices"][0]["message"]["content"] == "7"
        return statuses

    assert {200, 400, 413} <= asyncio.run(main()), "the mutations must reach past the first check"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from([*seeds()[2], "tools", "grammar", "logprobs", "x"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(fields, values, max_size=4), st.booleans())
def test_any_json_is_parsed_or_refused_in_one_line(extra: dict[str, Any], valid: bool) -> None:
    body = json.dumps({**({"messages": [user("hi")]} if valid else {}), **extra}).encode()
    message = "fine"
    with contextlib.suppress(UserError):
        try:
            parse(body, "fake", LIMITS)
        except UserError as error:
            message = error.message
            raise
    assert message.strip()
    assert "\n" not in message.strip()


def test_a_decompression_bomb_is_refused_by_its_header(app: Any) -> None:
    body = json.dumps({"messages": [user("x", bomb())]}).encode()
    status, answer = asyncio.run(call(app, Case(body)))
    assert status == 400
    assert b"pixels" in answer


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"".join([b"GET / HTTP/1.1\r\n", *[b"X-%d: y\r\n" % i for i in range(20_000)], b"\r\n"]),
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\r\n\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["long header", "many headers", "negative length", "broken chunk", "TLS", "nothing", "HTTP/2"],
)
def test_what_is_not_http_is_turned_away(raw: bytes) -> None:
    with running(Engine(FakeBackend())) as it:
        with socket.create_connection(("127.0.0.1", it.port), 120) as connection:
            try:
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(1 << 16)
            except OSError:  # hung up on us: as good an answer
                answer = b""
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:200]
        assert b"Traceback" not in answer
        assert httpx.get(f"{it.url}/health", timeout=120).status_code == 200
