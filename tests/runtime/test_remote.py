"""A model behind an address: our own server, and servers that misbehave on purpose."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from runtime import load
from runtime.api import ContextOverflow, Done, EncodedImage, Message, ModelFailed, QueueFull, Sampling, Token
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.backend_openai import OpenAiBackend, request_json
from runtime.engine import Engine
from runtime.images import answer, question
from runtime.latency import timing
from runtime.options import LoadOptions
from vlm.errors import BadImage, UserError

from .serving import png, running

pytest.importorskip("starlette", reason="needs the serve extra")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(Engine(FakeBackend(FakeScript(reply="a remote answer")))) as it:
        yield it.url


def test_an_address_answers_like_an_artefact(address: str) -> None:
    message = question("what?", EncodedImage(png()))
    with load(address) as engine:
        events = engine.complete([message], Sampling(max_new_tokens=40), reuse="none")
    tokens = [event for event in events if isinstance(event, Token)]
    done = events[-1]
    assert isinstance(done, Done)
    assert "".join(token.text for token in tokens) == done.text == "a remote answer"
    assert {token.id for token in tokens} == {-1}
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (10, 16)
    measured = timing(events)
    assert set(measured.stages_ms) == {"queue"}, "stages that cannot be seen are not guessed"
    assert measured.remote_ms is not None
    assert measured.ttft_ms is not None
    assert measured.remote_ms > measured.ttft_ms > 0
    assert measured.reported is not None
    assert measured.reported["stages_ms"]["prefill"] >= 0
    assert len(measured.itl_ms) in (0, 14), "gaps are between single tokens or not at all: quick ones travel together"


def test_histories_and_sampling_cross_the_wire(address: str) -> None:
    messages = [Message("system", ("s",)), question("a", EncodedImage(png())), answer("b"), question("c")]
    with load(address) as engine:
        *_, first = engine.generate(messages, Sampling(max_new_tokens=3))
        *_, stopped = engine.generate(messages, Sampling(stop=("mote",), top_k=1, temperature=0.5, seed=3))
    assert isinstance(first, Done)
    assert isinstance(stopped, Done)
    assert (first.finish, first.text) == ("length", "a r")
    assert (stopped.finish, stopped.text) == ("stop", "a re")
    assert stopped.usage.cached_tokens


def test_only_what_asks_for_something_is_sent() -> None:
    plain = request_json("m", [question("x")], Sampling(), "all")
    assert set(plain) == {"model", "messages", "max_tokens", "temperature", "top_p", "stream", "stream_options"}
    full = Sampling(top_k=3, min_p=0.1, repetition_penalty=1.2, seed=1, ignore_eos=True, json_schema="{}")
    assert request_json("m", [question("x")], Sampling(seed=0), "all")["seed"] == 0
    assert {"top_k", "min_p", "repetition_penalty", "seed", "ignore_eos", "response_format", "cache_prompt"} <= set(
        request_json("m", [question("x")], full, "none")
    )


def test_errors_of_the_server_keep_their_meaning(address: str) -> None:
    with load(address) as engine:
        with pytest.raises(UserError, match="image 1 is not a readable image"):
            list(engine.generate([question("x", EncodedImage(b"none"))]))
        *_, done = engine.generate([question("x")])
    assert isinstance(done, Done)


def test_addresses_are_checked() -> None:
    with pytest.raises(UserError, match="nothing answers at"):
        load("http://127.0.0.1:1")
    for wrong in ("http://", "http://127.0.0.1:99999", "http://[::1", "http://foo..bar", "http://a:b"):
        with pytest.raises(UserError, match="is not an address"):
            OpenAiBackend(wrong, LoadOptions())
    with pytest.raises(UserError, match="backend openai takes an address"):
        load("folder", backend="openai")


def _read_request(connection: socket.socket) -> None:
    """Take the whole request: closing a connection with bytes unread resets it, and the client may lose the reply."""
    with connection.makefile("rb") as stream:
        length = 0
        while line := stream.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        stream.read(length)


@contextmanager
def scripted(
    *replies: bytes, hold: threading.Event | None = None, gone: threading.Event | None = None
) -> Iterator[str]:
    """A server that sends these bytes, one reply per connection; `hold` keeps the last one open."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for number, reply in enumerate(replies):
                connection, _ = listener.accept()
                with connection:
                    _read_request(connection)
                    connection.sendall(reply)
                    if hold is not None and number == len(replies) - 1:
                        hold.set()
                        while connection.recv(1 << 16):
                            pass
                        assert gone is not None
                        gone.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(60)


def reply(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode() + body


def chunk(text: str = "", finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


MODELS = reply(b'{"data": [{"id": "m"}]}')


def test_the_role_chunk_is_not_the_first_token() -> None:
    body = chunk("") + chunk("hello ") + chunk("world") + chunk("", "stop", usage={"completion_tokens": 7})
    with scripted(MODELS, reply(body + b"data: [DONE]\n\n")) as url, load(url) as engine:
        events = engine.complete([question("x")])
    pieces = [event.text for event in events if isinstance(event, Token)]
    assert pieces == ["hello ", "world"]
    measured = timing(events)
    assert measured.completion_tokens == 7, "counted by the server in token ids, not in pieces"
    assert measured.itl_ms == (), "two pieces for seven tokens say nothing about the time between tokens"
    assert measured.tpot_ms is not None


def test_a_server_that_does_not_count_leaves_tpot_unknown() -> None:
    body = chunk("hello ") + chunk("world", "stop") + b"data: [DONE]\n\n"
    with scripted(MODELS, reply(body)) as url, load(url) as engine:
        measured = timing(engine.complete([question("x")]))
    assert (measured.completion_tokens, measured.tpot_ms, measured.cached_tokens) == (None, None, None)
    assert measured.ttft_ms is not None


@pytest.mark.parametrize(
    ("answered", "error", "message"),
    [
        (reply(b"{}", "429 Too Many"), QueueFull, "busy"),
        (reply(b'{"error": {"message": "no"}}', "400 Bad"), UserError, "refuses the request: 400, no"),
        (reply(b'{"error": {"message": "9 > 4", "code": "context_overflow"}}', "400 Bad"), ContextOverflow, "9 > 4"),
        (reply(b'{"error": {"message": "9 > 4", "code": "context_length_exceeded"}}', "400 Bad"), ContextOverflow, ""),
        (reply(b'{"error": {"message": "no GIF", "code": "bad_image"}}', "400 Bad"), BadImage, "no GIF"),
        (reply(b'{"error": {"message": "64 MB"}}', "413 Large"), UserError, "413, 64 MB"),
        (
            reply(b'{"error": {"code": 400, "type": "exceed_context_size_error", "message": "x"}}', "400 B"),
            ContextOverflow,
            "x",
        ),
        (
            reply(b'{"error": {"code": 400, "message": "Maximum context length is 9"}}', "400 B"),
            ContextOverflow,
            "is 9",
        ),
        (reply(b'{"error": "no such model"}', "404 Bad"), UserError, "404"),
        (reply(b"oops", "500 Bad"), ModelFailed, "answers 500"),
        (reply(chunk("half")), ModelFailed, "ended its stream without saying why"),
        (reply(b"data: {nonsense\n\n"), ModelFailed, "broke off"),
        (reply(b'data: {"error": {"message": "late"}}\n\n'), ModelFailed, "failed in the middle"),
        (reply(b'data: {"error": "late"}\n\n'), ModelFailed, "failed in the middle .late."),
        (b"\x00\x01", ModelFailed, "broke off"),
        (b"", ModelFailed, "broke off"),
    ],
)
def test_servers_that_misbehave(answered: bytes, error: type[Exception], message: str) -> None:
    with scripted(MODELS, answered) as url, load(url) as engine, pytest.raises(error, match=message):
        list(engine.generate([question("x")]))


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_silent_server_is_left_when_the_request_is_stopped(how: str) -> None:
    hold, gone, cancel = threading.Event(), threading.Event(), threading.Event()
    stop: Callable[[], None] = cancel.set if how == "cancel" else (lambda: None)
    with scripted(MODELS, reply(chunk("he")), hold=hold, gone=gone) as url, load(url) as engine:
        deadline_s = 0.3 if how == "deadline" else None
        events = engine.generate([question("x")], cancel=cancel, deadline_s=deadline_s)
        assert hold.wait(60)
        stop()
        *_, done = events
        assert isinstance(done, Done)
        assert done.finish == ("cancelled" if how == "cancel" else "deadline")
        assert gone.wait(60), "closing the connection is what tells the server"
