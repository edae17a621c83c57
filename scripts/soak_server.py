"""Many clients at once against a real server process: no wrong answer, no cross-talk, bounded memory, quick /health.

    python -m scripts.soak_server ARTEFACT --clients 64 --seconds 60

Each client keeps a chat about pictures of its own. The right answers are computed beforehand, one by one, by the same
artefact without caches; an answer counts as wrong unless it equals the one for that picture and question. Overload must be
answered 429 at once. Beside /health a server with nothing to do is asked: its delay is that of the machine. Exit code 1 if anything is wrong; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import io
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image as Pillow

from runtime.api import Done, EncodedImage, Sampling
from runtime.environment import cpu_name, usable_cores
from runtime.images import question
from runtime.loading import load
from vlm import digits

QUESTIONS = ("Read the top row.", "Read the bottom row.", "What is the largest digit?", "Add up the top row.")
HEALTH_P99_S = 0.1
GROWTH_BYTES = 200 << 20
TOKENS = 12


def pictures(count: int) -> list[bytes]:
    """Digits test images that differ from one another."""
    found = []
    for index in range(count):
        buffer = io.BytesIO()
        digits.sample("test", index).image.save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def blank(count: int) -> list[bytes]:
    """Plain pictures, for the scripted backend, which needs no scikit-learn."""
    found = []
    for index in range(count):
        buffer = io.BytesIO()
        Pillow.new("RGB", (8, 8), (index % 256, index // 256, 5)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def expected(artifact: str, backend: str, images: list[bytes]) -> dict[tuple[int, int], str]:
    """Answer to every question about every picture, one after the other, caches off."""
    right = {}
    with load(artifact, backend) as engine:
        for i, image in enumerate(images):
            for q, text in enumerate(QUESTIONS):
                events = engine.complete(
                    [question(text, EncodedImage(image))], Sampling(max_new_tokens=TOKENS), reuse="none"
                )
                right[i, q] = next(event.text for event in events if isinstance(event, Done))
    return right


class Wire:
    """One connection kept open, by hand: a client library would take more of the machine than the server under test."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = (host, int(port))
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, body: bytes) -> tuple[int, AsyncIterator[bytes]]:
        """Status and the pieces of the reply, to be read to the end or given up with `close`."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(*self._address)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await self._writer.drain()
        first, *lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines if line)
        return int(first.split()[1]), self._pieces(self._reader, fields)

    async def _pieces(self, reader: asyncio.StreamReader, fields: dict[str, str]) -> AsyncIterator[bytes]:
        if "content-length" in fields:
            yield await reader.readexactly(int(fields["content-length"]))
        elif "chunked" in fields.get("transfer-encoding", ""):
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        if fields.get("connection") == "close":
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


class Soak:
    """Counts of one run."""

    def __init__(self, url: str, images: list[bytes], right: dict[tuple[int, int], str]) -> None:
        self.url, self.images, self.right = url, images, right
        self.statuses: Counter[int | str] = Counter()
        self.wrong: list[str] = []
        self.health_s: list[float] = []
        self.idle_s: list[float] = []
        self.answer_s: list[float] = []
        self.refusal_s: list[float] = []
        self.deadline = 0.0

    async def client(self, number: int, seed: int) -> None:
        """Ask about random pictures; a few requests are given up on the way."""
        rng, wire = random.Random(seed * 1000 + number), Wire(self.url)
        while time.monotonic() < self.deadline:
            i, q = rng.randrange(len(self.images)), rng.randrange(len(QUESTIONS))
            body = self.body(i, q, stream := rng.random() < 0.5)
            started = time.monotonic()
            try:
                status, text = await self.ask(wire, body, stream, give_up=rng.random() < 0.05)
            except (OSError, asyncio.IncompleteReadError) as error:
                status, text = f"{type(error).__name__} ({error})", None
                wire.close()
            self.statuses[status] += 1
            if status == 429:
                self.refusal_s.append(time.monotonic() - started)
                await asyncio.sleep(rng.uniform(0.05, 0.5))
            elif text is not None:
                self.answer_s.append(time.monotonic() - started)
                if text != self.right[i, q]:
                    self.wrong.append(f"picture {i}, {QUESTIONS[q]!r}: {text!r} instead of {self.right[i, q]!r}")
        wire.close()

    async def ask(self, wire: Wire, body: bytes, stream: bool, give_up: bool) -> tuple[int | str, str | None]:
        status, pieces = await wire.post(body)
        if status != 200 or not stream:
            whole = b"".join([piece async for piece in pieces])
            return status, json.loads(whole)["choices"][0]["message"]["content"] if status == 200 else None
        said = rest = ""
        async for piece in pieces:
            *lines, rest = (rest + piece.decode()).split("\n")
            for line in lines:
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices") or [{"delta": {}}]
                    said += choices[0]["delta"].get("content") or ""
            if give_up and said:
                wire.close()
                return "given up", None
        return 200, said

    def body(self, i: int, q: int, stream: bool) -> bytes:
        link = f"data:image/png;base64,{base64.b64encode(self.images[i]).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": QUESTIONS[q]}]
        value = {"messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS, "stream": stream}
        return json.dumps({**value, "temperature": 0}).encode()

    async def run(self, clients: int, seconds: float, seed: int) -> None:
        self.deadline = time.monotonic() + seconds
        await asyncio.gather(*[self.client(number, seed) for number in range(clients)])


def idle_server(ports: Any) -> None:
    """The least a server can be, with nothing else to do: what it takes to answer is the machine's delay, not a server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ports.put(listener.getsockname()[1])
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while connection.recv(1 << 12):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def probe(url: str, idle_port: int, seconds: float, results: Any) -> None:
    """A process of its own asks /health, and the idle server, ten times a second, so that no client's delay is seen."""
    host, port = url.removeprefix("http://").split(":")
    connections = [http.client.HTTPConnection(host, int(p), timeout=60) for p in (port, idle_port)]
    delays: list[list[float]] = [[], []]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for connection, seen in zip(connections, delays, strict=True):
            started = time.monotonic()
            connection.request("GET", "/health")
            reply = connection.getresponse()
            reply.read()
            seen.append((time.monotonic() - started) if reply.status == 200 else float("inf"))
        time.sleep(0.1)
    results.put(delays)


def start(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """The server as people start it, in a process of its own; returns when it is ready."""
    command = [
        sys.executable,
        "-m",
        "runtime",
        "serve",
        arguments.artifact,
        "--backend",
        arguments.backend,
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = process.stderr.readline().split(": ")[0]
    if "ready" not in (line := process.stderr.readline()):
        raise SystemExit(f"the server did not start: {line}")
    return process, url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.load_before = round(os.getloadavg()[0], 2)
    images = (blank if arguments.backend == "fake" else pictures)(arguments.pictures)
    right = expected(arguments.artifact, arguments.backend, images)
    process, url = start(arguments)
    try:
        soak = Soak(url, images, right)
        asyncio.run(soak.run(4, 2.0, seed=99))  # every buffer has its size before memory is compared
        server = psutil.Process(process.pid)
        before = server.memory_info().rss
        soak = Soak(url, images, right)
        context = multiprocessing.get_context("spawn")
        results, ports = context.Queue(), context.Queue()
        context.Process(target=idle_server, args=(ports,), daemon=True).start()
        prober = context.Process(target=probe, args=(url, ports.get(timeout=60), arguments.seconds, results))
        prober.start()
        asyncio.run(soak.run(arguments.clients, arguments.seconds, arguments.seed))
        soak.health_s, soak.idle_s = results.get(timeout=120)
        prober.join()
        growth = server.memory_info().rss - before
    finally:
        process.terminate()
        process.wait(20)
    finish(soak, growth, arguments)


def finish(soak: Soak, growth: int, arguments: argparse.Namespace) -> None:
    health_p99 = float(np.quantile(soak.health_s, 0.99))
    result: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), "cores": usable_cores(), "load_before": arguments.load_before},
        "model": Path(arguments.artifact).name,
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "statuses": {str(status): count for status, count in soak.statuses.items()},
        "wrong": len(soak.wrong),
        "growth_mb": growth / 1e6,
        "health_n": len(soak.health_s),
        "health_p50_ms": 1000 * float(np.median(soak.health_s)),
        "health_p99_ms": 1000 * health_p99,
        "health_max_ms": 1000 * max(soak.health_s),
        "idle_server_p99_ms": 1000 * float(np.quantile(soak.idle_s, 0.99)),
        "answer_p50_ms": 1000 * float(np.median(soak.answer_s)) if soak.answer_s else None,
        "answer_p99_ms": 1000 * float(np.quantile(soak.answer_s, 0.99)) if soak.answer_s else None,
        "refusal_p99_ms": 1000 * float(np.quantile(soak.refusal_s, 0.99)) if soak.refusal_s else None,
    }
    problems = soak.wrong[:3]
    problems += [f"status {status}" for status in soak.statuses if status not in (200, 429, "given up")]
    problems += [f"/health p99 {1000 * health_p99:.0f} ms"] if health_p99 > HEALTH_P99_S else []
    problems += [f"memory grew by {growth / 1e6:.0f} MB"] if growth > GROWTH_BYTES else []
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    text = json.dumps({**result, "problems": problems})
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
