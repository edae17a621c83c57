"""The process that runs one model for the profiler: requests come in on stdin, timings go out, one JSON per line.

A process of its own per model, so that one model's peak memory is not another's.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import time
from typing import IO, Any

from runtime.api import EncodedImage, Sampling
from runtime.engine import Engine
from runtime.environment import peak_rss
from runtime.images import question
from runtime.latency import timing
from runtime.loading import load
from vlm.errors import ToolError


def main() -> int:
    """argv[1]: JSON with `artifact`, `backend` and load options. Ends when stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up between the JSON lines
    job = json.loads(sys.argv[1])
    started = time.perf_counter()
    try:
        engine = load(job["artifact"], job["backend"], **job["options"])
    except ToolError as error:
        _send(out, {"error": error.message, "exit_code": error.exit_code})
        return error.exit_code
    info = {name: getattr(engine.info, name) for name in engine.info.__dataclass_fields__}
    _send(out, {"info": info, "load_s": time.perf_counter() - started})
    with engine:
        for line in sys.stdin:
            _send(out, _answer(engine, json.loads(line)))
    return 0


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    image = EncodedImage(base64.b64decode(request["image"]))
    sampling = Sampling(max_new_tokens=request["output_tokens"], ignore_eos=True)
    try:
        events = engine.complete([question(request["question"], image)], sampling, reuse="none")
    except ToolError as error:
        return {"error": error.message, "exit_code": error.exit_code}
    peak, method = peak_rss()
    return {"timing": timing(events).to_json(), "peak_rss": peak, "memory_method": method}


def _send(out: IO[str], value: dict[str, Any]) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    raise SystemExit(main())
