"""`python -m runtime serve`: open the port at once, load the model behind it, answer until stopped."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from dataclasses import asdict

from runtime.api import ModelFailed
from runtime.loading import load
from runtime.options import LoadOptions
from runtime.source import need_package
from vlm.console import note
from vlm.errors import ToolError, UserError

KEY_VARIABLE = "ALIGN_EDGE_API_KEY"
HEADER_BYTES = 32 << 10
GRACE_S = 5
KEEP_ALIVE_S = 75  # longer than clients pause: closing a connection that is just being used again looks like a failure


def serve(arguments: argparse.Namespace, options: LoadOptions) -> int:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UserError: the address cannot be used, or is open to others without an API key. What `load` raises.
    """
    for package in ("starlette", "uvicorn", "prometheus_client"):
        need_package(package, "serve")
    key = arguments.api_key or os.environ.get(KEY_VARIABLE, "")
    local = _is_loopback(arguments.host)
    if not local and not key:
        raise UserError(
            f"--host {arguments.host} is open to other machines; give --api-key (or {KEY_VARIABLE}), or stay on 127.0.0.1"
        )
    with listen(arguments.host, arguments.port) as listener:
        return _run(arguments, options, listener, key, local)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with its protocol named: asyncio switches Nagle's delay off only then, and without that every reply waits 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from None
    return listener


def _run(arguments: argparse.Namespace, options: LoadOptions, listener: socket.socket, key: str, local: bool) -> int:
    import uvicorn

    from runtime.openai_format import Limits
    from runtime.server import LOOPBACK, ServerOptions, Service, make_app

    limits = Limits(
        body_bytes=arguments.max_body_mb << 20, images=arguments.max_images, new_tokens=arguments.max_new_tokens
    )
    outside = ServerOptions(
        limits=limits,
        api_key=key,
        hosts=(*LOOPBACK, f"[{arguments.host}]" if ":" in arguments.host else arguments.host) if local else ("*",),
        in_flight=3 * options.queue_size,
        answer_s=arguments.deadline,
    )
    service = Service(arguments.name or arguments.artifact.resolve().name, outside)
    config = uvicorn.Config(
        make_app(service),
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    failure: list[Exception] = []

    async def main() -> None:
        loading = asyncio.create_task(_load(arguments, options, service, server, failure))
        await server.serve([listener])
        await loading

    host, port = listener.getsockname()[:2]
    note(f"http://{f'[{host}]' if ':' in host else host}:{port}: loading {arguments.artifact}")
    # uvicorn raises the signal again once it is done; SIGTERM must then not end the process before the model is freed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(main())
    finally:
        if service.engine is not None:
            service.engine.close()
    if failure:
        raise failure[0]
    note("stopped")
    return 0


async def _load(
    arguments: argparse.Namespace, options: LoadOptions, service: object, server: object, failure: list[Exception]
) -> None:
    from runtime.server import Service

    assert isinstance(service, Service)
    engine = None
    try:
        engine = await asyncio.to_thread(load, arguments.artifact, arguments.backend, **asdict(options))
        warm = await asyncio.to_thread(engine.warmup)
        service.engine = engine
        note(
            f"ready: {service.name} ({engine.info.backend}, {engine.info.precision}); first token after "
            f"{warm.warm_ttft_ms:.1f} ms warm, {warm.cold_ttft_ms:.1f} ms cold"
        )
    except Exception as error:  # a native library raises its own kinds
        known = isinstance(error, ToolError)
        if not known:
            logging.getLogger(__name__).error("the model failed while it was loaded", exc_info=error)
        failure.append(error if known else ModelFailed(f"the model failed while it was loaded ({_in_short(error)})"))
        if engine is not None:
            await asyncio.to_thread(engine.close)
        server.should_exit = True  # type: ignore[attr-defined]


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
