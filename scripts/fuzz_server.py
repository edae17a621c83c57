"""Ten thousand malformed requests against the HTTP server, guided by which lines they reach.

    python -m scripts.fuzz_server --cases 10000 --seed 0

A request that reaches a line no other has reached joins the pool that is mutated further. Exit code 1 and the request
itself if the server crashes, answers with a traceback or a 5xx, or keeps growing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from runtime.backend_fake import FakeBackend
from runtime.engine import Engine
from runtime.openai_format import Limits
from runtime.server import ServerOptions, Service, make_app
from tests.runtime.fuzzing import Case, call, fault, mutated, pictures, seeds
from tests.runtime.serving import png, user
from vlm.console import Progress

ROOT = Path(__file__).resolve().parent.parent
WATCHED = tuple(
    str(ROOT / name)
    for name in ("runtime/openai_format.py", "runtime/server.py", "runtime/images.py", "vlm/preprocess.py")
)
GROWTH_BYTES = 150 << 20
GOOD = json.dumps({"messages": [user("hi", png())]}).encode()


class Coverage:
    """Lines of the watched files seen so far."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, int]] = set()

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace


async def fuzz(app: Any, cases: int, seed: int, coverage: Coverage) -> dict[str, Any]:
    rng, images, pool = random.Random(seed), pictures(), seeds()
    statuses: dict[int, int] = {}
    process, progress = psutil.Process(), Progress(cases, "fuzz")
    await call(app, Case(GOOD))
    start = process.memory_info().rss
    for number in range(cases):
        parent = rng.choice(pool)
        case = mutated(rng, parent, images)
        before = len(coverage.lines)
        status, body = await call(app, case)
        if problem := fault(status, body):
            raise SystemExit(f"case {number} of seed {seed}: {problem}\n{case}\n{body[:500]!r}")
        statuses[status] = statuses.get(status, 0) + 1
        if len(coverage.lines) > before:
            keep_if_json(pool, case.body)
        progress.advance(detail=f"{len(coverage.lines)} lines, pool {len(pool)}")
    _, body = await call(app, Case(GOOD))
    if json.loads(body)["choices"][0]["message"]["content"] != "7":
        raise SystemExit(f"the server answers wrongly after the run: {body[:300]!r}")
    growth = process.memory_info().rss - start
    if growth > GROWTH_BYTES:
        raise SystemExit(f"memory grew by {growth / 1e6:.0f} MB")
    return {
        "cases": cases,
        "seed": seed,
        "statuses": statuses,
        "lines": len(coverage.lines),
        "pool": len(pool),
        "growth_mb": growth / 1e6,
    }


def keep_if_json(pool: list[dict[str, Any]], body: bytes) -> None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict) and value:
        pool.append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    coverage = Coverage()
    threading.settrace(coverage.trace)
    service = Service(
        "fake", ServerOptions(limits=Limits(body_bytes=200_000, images=4, image_pixels=100_000, new_tokens=8))
    )
    service.engine = Engine(FakeBackend())
    sys.settrace(coverage.trace)
    try:
        result = asyncio.run(fuzz(make_app(service), arguments.cases, arguments.seed, coverage))
    finally:
        sys.settrace(None)
        service.engine.close()
    if service.open_requests:
        raise SystemExit(f"{service.open_requests} places were not given back")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
