"""OpenAI-compatible HTTP server over one engine: chat completions with images, models, health, metrics.

Every answer a client can cause is a 2xx or 4xx; 503 means that the model is loading or has failed. Messages name no
paths and hold no traceback. Needs `starlette` and `prometheus_client`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtime.api import Done, Event, Failed, Token
from runtime.engine import Engine, EngineStats
from runtime.http_errors import HttpError, error_response, from_failure
from runtime.latency import timing
from runtime.metrics import Metrics
from runtime.openai_format import FINISH, ChatRequest, Limits, NoSuchModel, parse, timings_json, usage_json
from vlm.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
BODY_S = 30.0
SMALL_BYTES = 32 << 10  # a thread would take longer than reading this much
DISCARD_BYTES = 64 << 20


@dataclass(frozen=True)
class ServerOptions:
    """How the server behaves to the outside.

    Attributes:
        api_key: clients must send it as a bearer token; "" for none.
        hosts: Host headers that are answered; a page in a browser cannot reach a loopback server by another name.
        in_flight: requests being read, waiting or answered; more are refused with 429 before their body is read.
        answer_s: longest time for one answer, waiting in line included; it then ends with `length`.
    """

    limits: Limits = field(default_factory=Limits)
    api_key: str = ""
    hosts: tuple[str, ...] = LOOPBACK
    in_flight: int = 24
    answer_s: float = 300.0


class Service:
    """The engine behind the server, or the reason why there is none yet."""

    def __init__(self, name: str, options: ServerOptions) -> None:
        self.name, self.options = name, options
        self.engine: Engine | None = None
        self.created = int(time.time())
        self.metrics = Metrics(self.stats)
        self.open_requests = 0

    def stats(self) -> EngineStats | None:
        return None if self.engine is None else self.engine.stats

    def ready(self) -> Engine:
        if self.engine is None:
            raise HttpError(503, "loading", "the model is loading; try again in a moment")
        return self.engine

    @contextlib.contextmanager
    def admitted(self) -> Any:
        """A place for one request, from its first byte to its last.

        Raises:
            HttpError: 429 where there is none.
        """
        if self.open_requests >= self.options.in_flight:
            raise HttpError(429, "queue_full", f"{self.open_requests} requests are open already; try again later")
        self.open_requests += 1
        self.metrics.in_flight.set(self.open_requests)
        try:
            yield
        finally:
            self.open_requests -= 1
            self.metrics.in_flight.set(self.open_requests)


def make_app(service: Service) -> Starlette:
    """The ASGI application; the engine may be put into `service` later."""

    def route(path: str, method: str, handler: Callable[[Request, Service], Any], guarded: bool = True) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                if guarded:
                    _authorise(request, service.options.api_key)
                response: Response = await handler(request, service)
            except HttpError as error:
                await _discard(request)
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=400)  # nobody is there to read it
            except Exception as error:
                logging.getLogger(__name__).error("a request failed", exc_info=error)
                message = "the server failed on this request; its log says why"
                response = error_response(HttpError(503, "server_failed", message))
            service.metrics.response(response.status_code)
            return response

        return Route(path, endpoint, methods=[method])

    return Starlette(
        routes=[
            route("/v1/chat/completions", "POST", _chat),
            route("/v1/models", "GET", _models),
            route("/v1/models/{model:path}", "GET", _model),
            route("/health", "GET", _health, guarded=False),
            route("/metrics", "GET", _metrics),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(service.options.hosts))],
        exception_handlers={HTTPException: _http_exception},
    )


def _authorise(request: Request, key: str) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key and not hmac.compare_digest(given.encode(), key.encode()):
        raise HttpError(401, "invalid_api_key", "the API key is missing or wrong; send it as a bearer token")


def _http_exception(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 400
    return error_response(
        HttpError(status, "not_found" if status == 404 else "bad_request", f"HTTP {status}; see /v1/models")
    )


async def _health(_: Request, service: Service) -> Response:
    if service.engine is None:
        return JSONResponse({"status": "loading model"}, 503)
    stats = service.engine.stats
    return JSONResponse({"status": "ok", "waiting": stats.waiting, "running": stats.running})


async def _metrics(_: Request, service: Service) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _model_json(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "local",
        "input_modalities": ["text", "image"],
        "output_modalities": ["text"],
        "context_length": service.engine.info.context_length if service.engine else None,
    }


async def _models(_: Request, service: Service) -> Response:
    return JSONResponse({"object": "list", "data": [_model_json(service)]})


async def _model(request: Request, service: Service) -> Response:
    if request.path_params["model"] != service.name:
        raise HttpError(404, NoSuchModel.code, f"no such model; this server has {service.name!r}")
    return JSONResponse(_model_json(service))


async def _chat(request: Request, service: Service) -> Response:
    engine = service.ready()
    with contextlib.ExitStack() as place:
        place.enter_context(service.admitted())
        body = await _body(request, service.options.limits.body_bytes)
        what = (body, service.name, service.options.limits)
        try:
            # large pictures take milliseconds to decode: not in the loop that answers /health
            chat = parse(*what) if len(body) <= SMALL_BYTES else await run_in_threadpool(parse, *what)
        except UserError as error:
            raise from_failure(error) from None
        del body, what
        answer = _Answer(service, engine, chat)
        place.callback(answer.cancel.set)
        gone = asyncio.create_task(_disconnected(request, answer.cancel))
        place.callback(gone.cancel)
        if not chat.stream:
            return JSONResponse(await answer.whole())
        first = await answer.start()
        # from here on place and watch belong to the stream
        return _EventStream(answer.stream(first), place.pop_all())


class _EventStream(StreamingResponse):
    """Gives back what the request held however sending ends, even before the first byte."""

    def __init__(self, pieces: AsyncIterator[bytes], held: contextlib.ExitStack) -> None:
        super().__init__(pieces, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _body(request: Request, limit: int) -> bytes:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HttpError(415, "bad_content_type", "send Content-Type: application/json")
    too_large = HttpError(413, "too_large", f"the request is larger than {limit} bytes; send fewer or smaller images")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(BODY_S):
            async for piece in _pieces(request):
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise HttpError(408, "timeout", f"the request did not arrive within {BODY_S:.0f} s") from None
    return bytes(body)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """What is left of the body; unlike `request.stream()` it can be taken up again."""
    while not getattr(request.state, "body_read", False):
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        request.state.body_read = not message.get("more_body", False)
        yield message.get("body", b"")


async def _discard(request: Request) -> None:
    """Read a refused body to its end: a client that is still sending when the connection closes never sees the answer."""
    left = DISCARD_BYTES
    with contextlib.suppress(ClientDisconnect), anyio.move_on_after(BODY_S):
        async for piece in _pieces(request):
            left -= len(piece)
            if left < 0:
                return


class _Answer:
    """One request on its way through the engine, seen from the event loop; set `cancel` however it ends."""

    def __init__(self, service: Service, engine: Engine, chat: ChatRequest) -> None:
        self._service, self._engine, self._chat = service, engine, chat
        self.cancel = threading.Event()
        self._arrived: deque[Event | Failed] = deque()  # filled by the engine's thread, emptied by the loop
        self._some = asyncio.Event()
        self._waking = False
        self._events: list[Event] = []
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": engine.info.backend,
        }

    def _submit(self) -> None:
        loop = asyncio.get_running_loop()

        def listen(event: Event | Failed) -> None:  # on the engine's thread
            self._arrived.append(event)
            if not self._waking:  # one call for all that comes before the loop gets to it
                self._waking = True
                with contextlib.suppress(RuntimeError):  # the loop is gone: the server is shutting down
                    loop.call_soon_threadsafe(wake)

        def wake() -> None:
            self._waking = False  # before the queue is read: what comes now calls again
            self._some.set()

        try:
            self._engine.submit(
                self._chat.messages,
                self._chat.sampling,
                listener=listen,
                cancel=self.cancel,
                deadline_s=self._service.options.answer_s,
                reuse=self._chat.reuse,
            )
        except UserError as error:
            raise from_failure(error) from None

    async def _next(self) -> Event:
        while not self._arrived:
            self._some.clear()
            await self._some.wait()
        return self._took(self._arrived.popleft())

    def _took(self, event: Event | Failed) -> Event:
        if isinstance(event, Failed):
            raise from_failure(event.error)
        self._events.append(event)
        return event

    def _text_so_far(self, text: str) -> str:
        """`text` and that of all tokens waiting behind it: what is ready together travels together."""
        pieces = [text]
        while self._arrived and isinstance(self._arrived[0], Token):
            event = self._took(self._arrived.popleft())
            pieces.append(event.text if isinstance(event, Token) else "")
        return "".join(pieces)

    def _finish(self, done: Done) -> dict[str, Any]:
        measured = timing(self._events)
        self._service.metrics.finished(done.finish, measured)
        return timings_json(measured)

    async def whole(self) -> dict[str, Any]:
        """The complete answer as one object."""
        self._submit()
        while not isinstance(event := await self._next(), Done):
            pass
        message = {"role": "assistant", "content": event.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": FINISH[event.finish], "logprobs": None}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage_json(event),
            "timings": self._finish(event),
        }

    async def start(self) -> Event:
        """Wait for the first token: until then a mistake can still be answered with its own status."""
        self._submit()
        while not isinstance(event := await self._next(), Token | Done):
            pass
        return event

    async def stream(self, event: Event) -> AsyncIterator[bytes]:
        """Server-sent events: role, text as it appears, the reason for the end, usage if asked for.

        Each piece is one write to the socket, so the role goes out with the first text and all that ends an answer together.
        """
        said, ready = "", self._chunk({"role": "assistant", "content": ""})
        try:
            while not isinstance(event, Done):
                if isinstance(event, Token) and (text := self._text_so_far(event.text)):
                    said += text
                    yield ready + self._chunk({"content": text})
                    ready = b""
                event = await self._next()
            if rest := event.text[len(said) :]:
                ready += self._chunk({"content": rest})
            timings = self._finish(event)
            ready += self._chunk({}, FINISH[event.finish], timings=timings)
            if self._chat.include_usage:
                last = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_json(event)}
                ready += _sse({**last, "timings": timings})
            yield ready + b"data: [DONE]\n\n"
        except HttpError as error:  # the status is sent already: the error travels as an event
            yield b"data: " + bytes(error_response(error).body) + b"\n\n"

    def _chunk(self, delta: dict[str, str], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _sse({**self._head, "object": "chat.completion.chunk", "choices": [choice], **more})


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _disconnected(request: Request, cancel: threading.Event) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    cancel.set()
