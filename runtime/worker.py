"""The process that runs one model for the profiler: requests come in on stdin, timings go out, one JSON per line."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import IO, Any

from runtime.loading import load
from runtime.memory import DeviceMemory
from runtime.meters import open_nvml
from runtime.runner import EngineRunner
from vlm.errors import ToolError


def main() -> int:
    """argv[1]: JSON with `artifact`, `backend` and load options. Ends when stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up between the JSON lines
    job = json.loads(sys.argv[1])
    memory = DeviceMemory(job["options"]["device"], nvml=open_nvml())
    started = time.perf_counter()
    try:
        engine = load(job["artifact"], job["backend"], **job["options"])
    except ToolError as error:
        _send(out, {"error": error.message, "exit_code": error.exit_code})
        return error.exit_code
    with engine:
        memory.settle(engine.info.device)
        runner = EngineRunner(engine, time.perf_counter() - started, memory)
        _send(out, {"info": runner.info, "load_s": runner.load_s})
        for line in sys.stdin:
            _send(out, runner.ask(json.loads(line)))
    return 0


def _send(out: IO[str], value: dict[str, Any]) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    raise SystemExit(main())
