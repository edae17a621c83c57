"""One loaded model as the profiler drives it: in this process, or in a process of its own.

A process of its own per model, so that one model's peak memory is not another's. What crosses the pipe is one JSON
object per line.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import tempfile
import threading
from typing import Any, Protocol

from runtime.api import Done, EncodedImage, Event, Failed, Message, Part, Role, Sampling, Span, Token
from runtime.child import Child, job
from runtime.engine import Engine
from runtime.images import question
from runtime.latency import timing
from runtime.memory import DeviceMemory, peak_rss
from runtime.options import LoadOptions
from runtime.roofline import device_bandwidth, host_bandwidth
from vlm.errors import MissingPiece, ToolError, UserError


class Runner(Protocol):
    """What the profiler needs of a model. `ask` takes and gives plain JSON values (see `EngineRunner`)."""

    info: dict[str, Any]
    load_s: float

    def ask(self, request: dict[str, Any]) -> dict[str, Any]: ...

    def close(self) -> None: ...


def turn(role: Role, text: str, image: bytes | None = None) -> dict[str, Any]:
    """One message of an `ask`."""
    return {"role": role, "text": text, "image": None if image is None else base64.b64encode(image).decode()}


class EngineRunner:
    """An engine in this process.

    `ask` understands
        {"turns": [...], "output_tokens", "reuse", "sync"}: answer; gives `timing`, `text` and peak memory, or `failed`
        {..., "stop_after": stage or number of tokens, "wait_share"}: cancel on the way; gives `stop_ms`
        {"bandwidth_s": s}: gives `gbs` of the device the model runs on
    """

    def __init__(self, engine: Engine, load_s: float, memory: DeviceMemory | None = None) -> None:
        self._engine = engine
        self._memory = memory or DeviceMemory(engine.info.device)
        self.load_s = load_s
        self.info = {name: getattr(engine.info, name) for name in engine.info.__dataclass_fields__}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if "bandwidth_s" in request:
            return {"gbs": self._bandwidth(request["bandwidth_s"])}
        try:
            reply = self._stop(request) if "stop_after" in request else self._answer(request)
        except ToolError as error:
            reply = {"failed": error.message}
        except Exception as error:  # a fault of the model ends a request, not a profile of an hour
            logging.getLogger(__name__).error("the model failed", exc_info=error)
            reply = {"failed": f"{type(error).__name__}: {error}"}
        peak, method = peak_rss()
        device, device_method = self._memory.look()
        memory = {"peak_rss": peak, "memory_method": method, "peak_device": device, "device_method": device_method}
        return {**reply, **memory}

    def close(self) -> None:
        self._engine.close()

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        events = self._engine.complete(
            _messages(request), _sampling(request), reuse=request["reuse"], sync=request["sync"]
        )
        done = events[-1]
        return {"timing": timing(events).to_json(), "text": done.text if isinstance(done, Done) else ""}

    def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        """Milliseconds from the cancel call, made by another thread at a moment of its own, to the end of the request."""
        after, seen, clock = request["stop_after"], 0, self._engine.clock
        cancel, reached, ended = threading.Event(), threading.Event(), threading.Event()
        end: list[tuple[int, Event | Failed]] = []

        def listen(event: Event | Failed) -> None:
            nonlocal seen
            seen += isinstance(event, Token)
            if (isinstance(event, Span) and event.stage == after) or seen == after:
                reached.set()
            if isinstance(event, Done | Failed):
                end.append((clock.now_ns(), event))
                reached.set()
                ended.set()

        self._engine.submit(
            _messages(request), _sampling(request), listener=listen, cancel=cancel, reuse="none", sync="none"
        )
        reached.wait()
        clock.wait_ns(int(request["wait_share"] * 1e6))
        called_ns = clock.now_ns()
        cancel.set()
        ended.wait()
        ended_ns, last = end[0]
        if isinstance(last, Failed):
            raise last.error
        cancelled = isinstance(last, Done) and last.finish == "cancelled"
        return {"stop_ms": max(ended_ns - called_ns, 0) / 1e6 if cancelled else None}

    def _bandwidth(self, seconds: float) -> float | None:
        device = self._engine.info.device
        if device == "remote":
            return None
        return device_bandwidth(seconds) if device == "cuda" else host_bandwidth(self._engine.info.threads, seconds)


def _messages(request: dict[str, Any]) -> list[Message]:
    messages = []
    for value in request["turns"]:
        parts: list[Part] = [value["text"]]
        if value["image"] is not None:
            messages.append(question(value["text"], EncodedImage(base64.b64decode(value["image"]))))
        else:
            messages.append(Message(value["role"], tuple(parts)))
    return messages


def _sampling(request: dict[str, Any]) -> Sampling:
    # lengths are fixed, so that every model does the same work
    return Sampling(max_new_tokens=request["output_tokens"], ignore_eos=True)


class ProcessRunner:
    """A model in a process of its own (`runtime.worker`)."""

    def __init__(self, artifact: str, backend: str, options: LoadOptions) -> None:
        self._artifact = artifact
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        self._child = Child("runtime.worker", job(artifact, backend, options), options, self._log)
        try:
            ready = self._receive()
        except BaseException:
            self.close()
            raise
        self.info: dict[str, Any] = ready["info"]
        self.load_s: float = ready["load_s"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it died: `_receive` says how
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        return self._receive()

    def close(self) -> None:
        self._child.end()
        self._child.stdout.close()
        self._log.close()

    def _receive(self) -> dict[str, Any]:
        line = self._child.stdout.readline()
        if not line:
            status = self._child.end()
            raise MissingPiece(
                f"the process that ran {self._artifact} ended with status {status}: {self._last_words()}"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise {2: UserError, 3: MissingPiece}.get(reply["exit_code"], ToolError)(reply["error"])
        return reply

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else "no message"
