"""The HTTP server as its clients see it: the official OpenAI client, plain requests, disconnects."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")

from runtime.api import Done, Event, Failed, Image, Logits
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from runtime.images import question
from runtime.openai_format import Limits, parse
from runtime.server import ServerOptions, Service, _Answer

from .serving import Running, png, running, uri, user


def echo(messages: Any) -> str:
    parts = [p for m in messages for p in m.content]
    return " ".join(p.digest[:6] if isinstance(p, Image) else p.strip() for p in parts)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    limits = Limits(body_bytes=200_000, images=3, image_pixels=10_000, new_tokens=64)
    with running(Engine(FakeBackend(FakeScript(reply=echo))), ServerOptions(limits=limits)) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


class Gated(FakeBackend):
    """Takes a step only when the test says so."""

    def __init__(self, script: FakeScript | None = None) -> None:
        super().__init__(script or FakeScript(reply="abcdefgh"))
        self.permits, self.stepping = threading.Semaphore(0), threading.Event()

    def step(self, token_id: int) -> Logits:
        self.stepping.set()
        assert self.permits.acquire(timeout=120)
        return super().step(token_id)


def post(server: Running, **fields: Any) -> httpx.Response:
    value = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=value, timeout=120)


def test_openai_client_gets_an_answer_with_images(client: Any) -> None:
    images = [png(1), png(2)]
    got = client.chat.completions.create(model="fake", messages=[user("what?", *images)], max_tokens=60, temperature=0)
    assert got.choices[0].message.content == echo([question("what?", *_decoded(images))])
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.prompt_tokens == 2 * 4 + len("\nwhat?")
    assert got.usage.completion_tokens == len(got.choices[0].message.content) + 1
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    timings = got.model_extra["timings"]
    assert timings["ttft_ms"] > 0
    assert timings["prompt_n"] == got.usage.prompt_tokens - got.usage.prompt_tokens_details.cached_tokens
    assert sum(timings["stages_ms"].values()) == pytest.approx(timings["e2el_ms"])


def _decoded(images: list[bytes]) -> list[Image]:
    from runtime.api import EncodedImage
    from runtime.images import decode_image

    return [decode_image(EncodedImage(image)) for image in images]


def test_openai_client_streams_tokens_usage_and_timings(client: Any) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=[user("tell me")], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in chunks[1:-2]) == "tell me"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("tell me") + 1
    assert chunks[-1].model_extra["timings"]["tpot_ms"] > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_every_token_is_sent_as_soon_as_it_is_there() -> None:
    backend = Gated()
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    with (
        running(Engine(backend)) as it,
        httpx.stream("POST", f"{it.url}/v1/chat/completions", json=body, timeout=120) as reply,
    ):
        events = (json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {"))
        assert next(events)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        for letter in "abcdefgh":  # each is here before the next step may begin
            assert next(events)["choices"][0]["delta"] == {"content": letter}
            backend.permits.release()
        assert next(events)["choices"][0]["finish_reason"] == "stop"


def test_tokens_that_are_ready_together_travel_together() -> None:
    async def main() -> list[str]:
        service = Service("fake", ServerOptions())
        with Engine(FakeBackend(FakeScript(reply="hello"))) as engine:
            request = parse(json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode(), "fake", Limits())
            answer = _Answer(service, engine, request)
            first = await answer.start()
            while not (answer._arrived and isinstance(answer._arrived[-1], Done)):  # until the whole answer waits
                await asyncio.sleep(0)
            return [piece.decode() async for piece in answer.stream(first)]

    first, last = asyncio.run(main())
    role, text = first.strip().split("\n\n")
    assert '"content":""' in role
    assert '"content":"hello"' in text
    end, done = last.strip().split("\n\n")
    assert '"finish_reason":"stop"' in end
    assert done == "data: [DONE]"


def test_the_second_turn_reports_what_came_from_the_cache(client: Any) -> None:
    first = user("look at this", png(77))
    got = client.chat.completions.create(model="fake", messages=[first])
    answer = {"role": "assistant", "content": got.choices[0].message.content}
    again = client.chat.completions.create(model="fake", messages=[first, answer, user("and?")])
    details = again.usage.prompt_tokens_details
    assert details.cached_tokens == again.usage.prompt_tokens - len("and?")
    assert details.model_extra["cached_images"] == 1
    none = client.chat.completions.create(
        model="fake", messages=[first, answer, user("and?")], extra_body={"cache_prompt": False}
    )
    assert none.usage.prompt_tokens_details.cached_tokens == 0


def test_fields_that_are_null_are_left_to_their_defaults() -> None:
    """Clients with types send every field they know."""
    names = ("max_tokens", "max_completion_tokens", "repetition_penalty", "repeat_penalty", "seed", "stop", "grammar")
    with running(Engine(FakeBackend())) as server:
        reply = post(server, messages=[{"role": "user", "content": "x"}], **dict.fromkeys(names))
    assert reply.status_code == 200, reply.text


def test_openai_client_lists_the_model(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").model_extra["input_modalities"] == ["text", "image"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages has 0 entries"),
        ({"messages": [user("x", b"not an image")]}, "image 1 is not a readable image"),
        ({"messages": [user("x", png()[:45])]}, "damaged"),
        ({"messages": [user("x", png(side=101))]}, "more than 10000 pixels"),
        ({"messages": [user("x", *[png()] * 4)]}, "more than 3 images"),
        ({"max_tokens": 0}, "max_tokens is 0; send 1 or more"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0; send 1 or more"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty is 0"),
        ({"extra_body": {"repetition_penalty": 1.1, "repeat_penalty": 1.2}}, "send one of them"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 7.0}, "top_p is 7"),
        ({"response_format": {"type": "json_object"}}, "cannot hold answers"),
        ({"seed": "x"}, "seed must be"),
        ({"stop": [""]}, "stop must be"),
        ({"n": 2}, "n is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools is not supported"),
        ({"extra_body": {"temprature": 1}}, "unknown field 'temprature'"),
    ],
)
def test_mistakes_are_400_with_a_safe_message(client: Any, change: dict[str, Any], message: str) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**{"model": "fake", "messages": [user("x")], **change})
    assert caught.value.status_code == 400
    assert "/" not in caught.value.body["message"].replace("data:image/png", "").replace("image/", "")
    assert client.chat.completions.create(model="fake", messages=[user("ok")]).choices[0].message.content == "ok"


def test_mistakes_while_streaming_keep_their_status(client: Any) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    with pytest.raises(openai.BadRequestError, match="damaged"):
        client.chat.completions.create(model="fake", messages=[user("x", png()[:45])], stream=True)


def test_another_model_is_404_and_too_large_is_413(client: Any) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    with pytest.raises(openai.NotFoundError, match="'gpt' is not loaded here"):
        client.chat.completions.create(model="gpt", messages=[user("x")])
    with pytest.raises(openai.APIStatusError, match="larger than 200000 bytes") as caught:
        client.chat.completions.create(model="fake", messages=[user("x" * 300_000)])
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    "url",
    ["https://example.com/a.png", "http://127.0.0.1/a.png", "file:///etc/passwd", "data:image/png,raw", "data:,", ""],
)
def test_only_data_uris_are_read(server: Running, url: str) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    got = post(server, messages=[message])
    assert got.status_code == 400
    assert "is not a data URI" in got.json()["error"]["message"]


def test_text_and_picture_in_either_order_become_the_trained_form(server: Running) -> None:
    picture = {"type": "image_url", "image_url": {"url": uri(png(5))}}
    text = {"type": "text", "text": "what?"}
    answers = [
        post(server, messages=[{"role": "user", "content": parts}], temperature=0).json()["choices"][0]["message"]
        for parts in ([picture, text], [text, picture], [picture, {"type": "text", "text": "\nwhat?"}])
    ]
    assert answers[0] == answers[1] == answers[2]


def test_health_models_metrics_and_unknown_paths(server: Running) -> None:
    assert httpx.get(f"{server.url}/health", timeout=120).json() == {"status": "ok", "waiting": 0, "running": False}
    post(server)
    text = httpx.get(f"{server.url}/metrics", timeout=120).text
    for name in (
        "vlm_ttft_seconds_bucket",
        "vlm_tokens_total",
        "vlm_image_cache_bytes",
        "process_resident_memory_bytes",
    ):
        assert name in text
    for method, path in (("GET", "/nothing"), ("GET", "/v1/models/none"), ("GET", "/v1/chat/completions")):
        got = httpx.request(method, server.url + path, timeout=120)
        assert got.status_code in (404, 405)
        assert got.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}, timeout=120).status_code == 400
    plain = httpx.post(
        f"{server.url}/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}, timeout=120
    )
    assert plain.status_code == 415


def test_loading_is_503_and_an_api_key_is_asked_for() -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    with running(None, ServerOptions(api_key="secret")) as it:
        assert httpx.get(f"{it.url}/health", timeout=120).status_code == 503
        wrong = openai.OpenAI(base_url=f"{it.url}/v1", api_key="guess", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        right = openai.OpenAI(base_url=f"{it.url}/v1", api_key="secret", max_retries=0)
        with pytest.raises(openai.InternalServerError) as caught:
            right.chat.completions.create(model="fake", messages=[user("x")])
        assert (caught.value.status_code, caught.value.code) == (503, "loading")
        it.service.engine = Engine(FakeBackend())
        assert httpx.get(f"{it.url}/health", timeout=120).status_code == 200
        assert right.chat.completions.create(model="fake", messages=[user("x")]).choices[0].message.content == "7"


def test_overload_is_429_at_once_and_nothing_is_lost() -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    backend = Gated()
    with running(Engine(backend, queue_size=1), ServerOptions(in_flight=2)) as it:
        client = openai.OpenAI(base_url=f"{it.url}/v1", api_key="none", max_retries=0)
        answers: list[str] = []

        def ask() -> None:
            got = client.chat.completions.create(model="fake", messages=[user("x")])
            answers.append(got.choices[0].message.content)

        first = threading.Thread(target=ask)
        first.start()
        assert backend.stepping.wait(60)
        second = threading.Thread(target=ask)
        second.start()
        while it.service.open_requests < 2:  # ends: the request is on its way
            pass
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="fake", messages=[user("x")])
        assert caught.value.response.headers["retry-after"] == "1"
        for _ in range(40):
            backend.permits.release()
        first.join(60)
        second.join(60)
        assert answers == ["abcdefgh"] * 2
        assert it.service.open_requests == 0


def test_a_model_that_fails_is_503_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(FakeScript(fail_at="step"))
    with running(Engine(backend)) as it:
        for stream in (False, True):
            got = post(it, stream=stream)
            text = got.text
            assert "scripted failure" not in text
            assert "Traceback" not in text
            assert "model_failed" in text
            assert got.status_code == (200 if stream else 503), "a stream that has begun carries its error as an event"
        backend.script = FakeScript(reply="fine")
        assert post(it).json()["choices"][0]["message"]["content"] == "fine"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_stops_the_model_within_a_step(stream: bool) -> None:
    backend = Gated(FakeScript(reply="x" * 1000))
    engine = Engine(backend)
    ended: list[Event | Failed] = []
    submit = engine.submit

    def watched(*arguments: Any, listener: Any, **options: Any) -> None:
        def listen(event: Event | Failed) -> None:
            listener(event)
            if isinstance(event, Done | Failed):
                ended.append(event)
                finished.set()

        cancels.append(options["cancel"])
        submit(*arguments, listener=listen, **options)

    engine.submit = watched  # type: ignore[method-assign]
    finished, cancels = threading.Event(), list[threading.Event]()
    with running(engine) as it:
        body = json.dumps(
            {"messages": [{"role": "user", "content": "x"}], "stream": stream, "max_tokens": 900}
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", it.port)) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert backend.stepping.wait(60)
        assert cancels[0].wait(60), "the hang-up must reach the engine"
        steps = backend.calls.count("step")
        for _ in range(5):
            backend.permits.release()
        assert finished.wait(60)
        assert backend.calls.count("step") <= steps + 1
        assert isinstance(ended[0], Done)
        assert ended[0].finish == "cancelled"
        backend.script = FakeScript(reply="next")
        for _ in range(9):
            backend.permits.release()
        assert post(it).json()["choices"][0]["message"]["content"] == "next"
        assert it.service.open_requests == 0
