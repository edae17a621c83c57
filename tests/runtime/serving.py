"""A real server on a free port, in a thread, over an engine the test holds in its hand."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from PIL import Image as Pillow

from runtime.engine import Engine
from runtime.serve_command import HEADER_BYTES, listen
from runtime.server import ServerOptions, Service, make_app


@dataclass
class Running:
    url: str
    port: int
    service: Service


@contextlib.contextmanager
def running(engine: Engine | None, options: ServerOptions | None = None, name: str = "fake") -> Iterator[Running]:
    """Serve until the block ends; the engine is closed with it."""
    service = Service(name, options or ServerOptions())
    service.engine = engine
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        make_app(service),
        http="h11",
        ws="none",
        lifespan="off",
        log_level="critical",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{port}", port, service)
    finally:
        if service.engine is not None:
            service.engine.close()
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def png(value: int = 0, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (side, side), (value % 256, value // 256 % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user(text: str, *images: bytes) -> dict[str, Any]:
    pictures = [{"type": "image_url", "image_url": {"url": uri(image)}} for image in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}
