"""Speed of artefacts side by side: one process per artefact, requests taken in turn, every image a different one.

Writes `vlm-profile/1`. Fields that were not measured are null, never 0.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from runtime.latency import Timing
from runtime.options import LoadOptions
from runtime.stats import variation
from runtime.workload import Workload
from vlm.console import Progress
from vlm.errors import MissingPiece, ToolError, UserError

WARM_LAST = 5
WARM_CAP = 20
WARM_CV = 0.05


@dataclass(frozen=True)
class ProfileOptions:
    """One scenario, the same for every artefact.

    Attributes:
        requests: measured requests per artefact; p90 needs 64, p99 needs 662.
        output_tokens: exact length of every answer (the end-of-sequence token is ignored).
        seed: of the images.
    """

    backend: str = "auto"
    requests: int = 64
    output_tokens: int = 32
    question: str = "Read the top row."
    seed: int = 0
    load: LoadOptions = field(default_factory=LoadOptions)

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise UserError(f"requests is {self.requests}; give 1 or more")
        if self.output_tokens < 2:
            raise UserError(f"output-tokens is {self.output_tokens}; give 2 or more, or there is no time per token")


@dataclass
class Measured:
    """Everything seen of one artefact. `started_s` is when each measured request began, on one common clock."""

    artifact: str
    info: dict[str, Any]
    load_s: float
    cold_ttft_ms: float | None = None
    warm_runs: int = 0
    warm_cv: float = 0.0
    timings: list[Timing] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    peak_rss: int | None = None
    memory_method: str = ""


class Child:
    """The process of one artefact (see `runtime.worker`)."""

    def __init__(self, artifact: str, options: ProfileOptions) -> None:
        self._artifact = artifact
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        job = {"artifact": artifact, "backend": options.backend, "options": asdict(options.load)}
        packages = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runtime.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # read by the libraries when they load: too late to set from inside
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(options.load.threads)},
        )

    def receive(self) -> dict[str, Any]:
        """Next reply.

        Raises:
            ToolError: the one the child reported, or MissingPiece if it died.
        """
        line = _pipe(self._process.stdout).readline()
        if not line:
            status = self._process.wait()
            raise MissingPiece(
                f"the process that ran {self._artifact} ended with status {status}: {self._last_words()}"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise _error(reply["exit_code"], reply["error"])
        return reply

    def send(self, value: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died: `receive` says how
            _pipe(self._process.stdin).write(json.dumps(value) + "\n")
            _pipe(self._process.stdin).flush()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # unsent bytes to a process that died
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _pipe(self._process.stdout).close()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else "no message"


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("the process was started without pipes")
    return stream


def _error(exit_code: int, message: str) -> ToolError:
    return {2: UserError, 3: MissingPiece}.get(exit_code, ToolError)(message)


@dataclass
class Session:
    """`skipped`: artefacts this machine cannot run, and why."""

    results: list[Measured] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def measure(artifacts: Sequence[str], options: ProfileOptions, workload: Workload) -> Session:
    """Load every artefact in a process of its own, warm each up, then take turns request by request.

    Taking turns spreads whatever else happens on the machine (heat, neighbours) over all of them.

    Raises:
        UserError: an artefact is wrong. MissingPiece: not one of them can be run on this machine.
    """
    session = Session()
    results = session.results
    with ExitStack() as stack:
        children: list[Child] = []
        for artifact in artifacts:
            child = Child(artifact, options)
            stack.callback(child.close)
            try:
                ready = child.receive()
            except MissingPiece as missing:
                session.skipped[artifact] = missing.message
                continue
            children.append(child)
            results.append(Measured(artifact, ready["info"], ready["load_s"]))
        if not results:
            raise MissingPiece(next(iter(session.skipped.values())))
        for child, result in zip(children, results, strict=True):
            _warm_up(child, result, options, workload)
        progress = Progress(options.requests * len(children), "profile")
        begin = time.perf_counter()
        for index in range(options.requests):
            png = workload.png(WARM_CAP + index)
            for child, result in zip(children, results, strict=True):
                result.started_s.append(time.perf_counter() - begin)
                result.timings.append(_request(child, result, options, png))
                progress.advance()
    return session


def _warm_up(child: Child, result: Measured, options: ProfileOptions, workload: Workload) -> None:
    ttfts: list[float] = []
    for index in range(WARM_CAP):
        ttft = _request(child, result, options, workload.png(index)).ttft_ms
        if ttft is None:
            raise RuntimeError(f"{result.artifact} gave no token")
        ttfts.append(ttft)
        result.warm_cv = variation(ttfts[1:][-WARM_LAST:])  # the first is the cold one
        if len(ttfts) > WARM_LAST and result.warm_cv < WARM_CV:
            break
    result.cold_ttft_ms, result.warm_runs = ttfts[0], len(ttfts)


def _request(child: Child, result: Measured, options: ProfileOptions, png: bytes) -> Timing:
    digest = hashlib.sha256(png).hexdigest()
    if digest in result.digests:
        raise RuntimeError("an image came twice: a cache could answer for the model")
    result.digests.append(digest)
    image = base64.b64encode(png).decode()
    child.send({"image": image, "question": options.question, "output_tokens": options.output_tokens})
    reply = child.receive()
    result.peak_rss, result.memory_method = reply["peak_rss"], reply["memory_method"]
    got = Timing.from_json(reply["timing"])
    if got.cached_tokens:
        raise RuntimeError(f"{result.artifact} took {got.cached_tokens} prompt tokens from a cache")
    if got.completion_tokens != options.output_tokens:
        raise UserError(
            f"{result.artifact} has room for {got.completion_tokens} of {options.output_tokens} output tokens; "
            "lower --output-tokens or raise --context"
        )
    if abs(sum(got.stages_ms.values()) - got.e2el_ms) > 0.01 * got.e2el_ms:
        raise RuntimeError("the stages do not add up to the request")
    return got
