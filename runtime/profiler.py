"""Speed of models side by side: one process each, requests taken in turn, every image a different one.

Four scenarios: `single_stream` (caches off and asserted), `stages` (the same with the device waited for at every stage
border), `follow_up` (second question about an image, caches on), `stop` (cancelled on the way). Nothing is tried again
and nothing is thrown away: a request that fails is counted as failed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.clock import Clock, SystemClock
from runtime.energy import Recorder, Window, idle_watts
from runtime.latency import Timing
from runtime.options import LoadOptions
from runtime.runner import ProcessRunner, Runner, turn
from runtime.stats import variation
from runtime.workload import Workload
from vlm.console import Progress
from vlm.errors import MissingPiece, UserError

WARM_LAST = 5
WARM_CAP = 20
WARM_CV = 0.05
IDLE_NS = 3_000_000_000
BANDWIDTH_S = 0.5
FOLLOW_UP_QUESTION = "And the bottom row?"
FOLLOW_UP_ANSWER = "7"
Opener = Callable[[str], Runner]


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured, the same for every model.

    Attributes:
        requests: measured requests per model; p90 needs 64, p99 needs 662.
        output_tokens: exact length of every answer (the end-of-sequence token is ignored).
        seed: of the images.
        extra: rounds of each of the other scenarios (stages, follow_up, stop); 0 leaves them out.
        slo: latency limits in milliseconds by metric; goodput counts the requests that keep all of them.
    """

    backend: str = "auto"
    requests: int = 64
    output_tokens: int = 32
    question: str = "Read the top row."
    seed: int = 0
    extra: int = 16
    slo: tuple[tuple[str, float], ...] = ()
    load: LoadOptions = field(default_factory=LoadOptions)

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise UserError(f"requests is {self.requests}; give 1 or more")
        if self.output_tokens < 2:
            raise UserError(f"output-tokens is {self.output_tokens}; give 2 or more, or there is no time per token")
        if self.extra < 0:
            raise UserError(f"extra is {self.extra}; give 0 (leave out) or more")
        for name, _ in self.slo:
            if name not in ("ttft_ms", "tpot_ms", "e2el_ms"):
                raise UserError(f"slo is for {name!r}; known: ttft_ms, tpot_ms, e2el_ms")


@dataclass
class FollowUp:
    """One round: time to the first token of a second question, about an image and about text of the same length."""

    image: Timing
    text: Timing
    text_cold: Timing


@dataclass
class Measured:
    """Everything seen of one model. `started_s` is when each measured request began, on one common clock."""

    artifact: str
    info: dict[str, Any]
    load_s: float
    cold_ttft_ms: float | None = None
    warm_runs: int = 0
    warm_cv: float = 0.0
    timings: list[Timing] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stages: list[Timing] = field(default_factory=list)
    stages_plain: list[Timing] = field(default_factory=list)
    follow_ups: list[FollowUp] = field(default_factory=list)
    stop_ms: list[float] = field(default_factory=list)
    not_stopped: int = 0
    bandwidth_gbs: float | None = None
    peak_rss: int | None = None
    peak_device: int | None = None
    memory_method: str = ""
    device_method: str = ""


@dataclass
class Session:
    """`skipped`: artefacts this machine cannot run, and why. `recorder`: energy and heat over the whole session."""

    results: list[Measured] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    recorder: Recorder | None = None
    idle_w: float | None = None


class Profiler:
    """Drives several runners through all scenarios, always in turns."""

    def __init__(
        self, options: ProfileOptions, workload: Workload, clock: Clock | None = None, recorder: Recorder | None = None
    ) -> None:
        self._options, self._workload = options, workload
        self._clock: Clock = clock or SystemClock()
        self._recorder = recorder
        self._next_image = 0

    def run(self, artifacts: Sequence[str], opener: Opener | None = None) -> Session:
        """Load every artefact, warm each up, measure.

        Raises:
            UserError: an artefact is wrong. MissingPiece: not one of them can be run on this machine.
        """
        session = Session(recorder=self._recorder)
        with ExitStack() as stack:
            pairs = self._open(artifacts, opener or self._process, session, stack)
            if self._recorder is not None:
                stack.callback(self._recorder.stop)
                session.idle_w = self._idle(self._recorder)
            for runner, result in pairs:
                self._warm_up(runner, result)
            self._single_stream(pairs)
            extra = Progress(max(4 * self._options.extra * len(pairs), 1), "stages, follow-ups, stops")
            for scenario in (self._stages, self._follow_ups, self._stops) if self._options.extra else ():
                scenario(pairs, extra)
            for runner, result in pairs:  # last: its buffers would count as the model's memory
                result.bandwidth_gbs = runner.ask({"bandwidth_s": BANDWIDTH_S})["gbs"]
        return session

    def _process(self, artifact: str) -> Runner:
        return ProcessRunner(artifact, self._options.backend, self._options.load)

    def _open(
        self, artifacts: Sequence[str], opener: Opener, session: Session, stack: ExitStack
    ) -> list[tuple[Runner, Measured]]:
        pairs = []
        for artifact in artifacts:
            try:
                runner = opener(artifact)
            except MissingPiece as missing:
                session.skipped[artifact] = missing.message
                continue
            stack.callback(runner.close)
            pairs.append((runner, Measured(artifact, runner.info, runner.load_s)))
        if not pairs:
            raise MissingPiece(next(iter(session.skipped.values())))
        session.results = [result for _, result in pairs]
        return pairs

    def _idle(self, recorder: Recorder) -> float | None:
        """Models are loaded and silent: what the machine takes anyway."""
        recorder.start()
        if recorder.meter is None:
            return None
        start = self._clock.now_ns()
        self._clock.wait_ns(IDLE_NS)
        return idle_watts(recorder.curve, (start, self._clock.now_ns()))

    def _warm_up(self, runner: Runner, result: Measured) -> None:
        ttfts: list[float] = []
        for index in range(WARM_CAP):
            got = self._answer(runner, result, self._image(result, index))
            if isinstance(got, str) or got.ttft_ms is None:
                raise UserError(f"{result.artifact} does not answer: {got if isinstance(got, str) else 'no token'}")
            self._check(got, result)
            ttfts.append(got.ttft_ms)
            result.warm_cv = variation(ttfts[1:][-WARM_LAST:])  # the first is the cold one
            if len(ttfts) > WARM_LAST and result.warm_cv < WARM_CV:
                break
        result.cold_ttft_ms, result.warm_runs = ttfts[0], len(ttfts)

    def _single_stream(self, pairs: Sequence[tuple[Runner, Measured]]) -> None:
        progress = Progress(self._options.requests * len(pairs), "profile")
        begin = self._clock.now_ns()
        for index in range(self._options.requests):
            for runner, result in pairs:
                image = self._image(result, WARM_CAP + index)
                start = self._clock.now_ns()
                got = self._answer(runner, result, image)
                result.windows.append((start, self._clock.now_ns()))
                if isinstance(got, str):
                    result.failures.append(got)
                else:
                    self._check(got, result)
                    result.started_s.append((start - begin) / 1e9)
                    result.timings.append(got)
                progress.advance()

    def _stages(self, pairs: Sequence[tuple[Runner, Measured]], progress: Progress) -> None:
        """With and without waiting at the stage borders, in turns: the difference is what the waiting costs."""
        for index in range(2 * self._options.extra):
            for runner, result in pairs:
                image = self._image(result, WARM_CAP + self._options.requests + index)
                got = self._answer(runner, result, image, sync="none" if index % 2 else "all")
                if not isinstance(got, str):
                    (result.stages_plain if index % 2 else result.stages).append(got)
                progress.advance()

    def _follow_ups(self, pairs: Sequence[tuple[Runner, Measured]], progress: Progress) -> None:
        fillers: dict[str, str] = {}
        for index in range(self._options.extra):
            for runner, result in pairs:
                image = self._image(result, WARM_CAP + self._options.requests + 2 * self._options.extra + index)
                if result.artifact not in fillers:
                    fillers[result.artifact] = self._filler(runner, image)
                about_image = turn("user", self._options.question, image)
                # the number makes every text new to the caches
                about_text = turn("user", f"{index % 10}{index // 10 % 10}{fillers[result.artifact]}")
                rounds = [self._second(runner, first) for first in (about_image, about_text)]
                cold = self._ask(runner, [about_text], reuse="none")
                if all(isinstance(got, Timing) for got in (*rounds, cold)):
                    result.follow_ups.append(FollowUp(rounds[0], rounds[1], cold))  # type: ignore[arg-type]
                progress.advance()

    def _second(self, runner: Runner, first: dict[str, Any]) -> Timing | str:
        self._ask(runner, [first], reuse="all", tokens=1)
        later = [turn("assistant", FOLLOW_UP_ANSWER), turn("user", FOLLOW_UP_QUESTION)]
        return self._ask(runner, [first, *later], reuse="all")

    def _filler(self, runner: Runner, image: bytes) -> str:
        """Text that makes a prompt as long as the image makes it, found by asking the model itself."""

        def length(text: str, picture: bytes | None = None) -> int:
            got = self._ask(runner, [turn("user", text, picture)], reuse="all", tokens=1)
            return (got.prompt_tokens or 0) if isinstance(got, Timing) else 0

        wanted = length(self._options.question, image)
        one, many = length("00" + "7 "), length("00" + "7 " * 17)
        each = max((many - one) / 16, 0.1)
        text = "7 " * max(int((wanted - one) / each), 0)
        for _ in range(8):
            missing = wanted - length("00" + text)
            if missing == 0:
                break
            text = text + "a" * missing if missing > 0 else text[:missing]
        return text

    def _stops(self, pairs: Sequence[tuple[Runner, Measured]], progress: Progress) -> None:
        """Half of the cancels fall into the prefill, half between tokens, each at a moment of its own."""
        rng = np.random.default_rng(self._options.seed)
        for index in range(self._options.extra):
            for runner, result in pairs:
                image = self._image(result, WARM_CAP + self._options.requests + 3 * self._options.extra + index)
                where: str | int = "preprocess" if index % 2 else 2
                got = runner.ask(
                    {
                        **self._request([turn("user", self._options.question, image)], "none", "none"),
                        "stop_after": where,
                        "wait_share": float(rng.uniform(0, 2)),
                        "output_tokens": 8 * self._options.output_tokens,
                    }
                )
                if got.get("stop_ms") is None:
                    result.not_stopped += 1
                else:
                    result.stop_ms.append(got["stop_ms"])
                progress.advance()

    def _image(self, result: Measured, index: int) -> bytes:
        png = self._workload.png(index)
        digest = hashlib.sha256(png).hexdigest()
        if digest in result.digests:
            raise RuntimeError("an image came twice: a cache could answer for the model")
        result.digests.append(digest)
        return png

    def _request(self, turns: Sequence[dict[str, Any]], reuse: str, sync: str) -> dict[str, Any]:
        return {"turns": list(turns), "output_tokens": self._options.output_tokens, "reuse": reuse, "sync": sync}

    def _answer(self, runner: Runner, result: Measured, png: bytes, sync: str = "none") -> Timing | str:
        request = self._request([turn("user", self._options.question, png)], "none", sync)
        reply = runner.ask(request)
        result.peak_rss, result.peak_device = reply["peak_rss"], reply["peak_device"]
        result.memory_method, result.device_method = reply["memory_method"], reply["device_method"]
        return reply["failed"] if "failed" in reply else Timing.from_json(reply["timing"])

    def _ask(self, runner: Runner, turns: Sequence[dict[str, Any]], reuse: str, tokens: int = 2) -> Timing | str:
        reply = runner.ask({**self._request(turns, reuse, "none"), "output_tokens": tokens})
        return reply["failed"] if "failed" in reply else Timing.from_json(reply["timing"])

    def _check(self, got: Timing, result: Measured) -> None:
        """What must hold of every request with the caches off; a remote server's faults are warnings in the report."""
        if got.remote_ms is not None:
            return
        if got.cached_tokens or got.cached_images:
            raise RuntimeError(f"{result.artifact} took {got.cached_tokens} prompt tokens from a cache")
        if got.completion_tokens != self._options.output_tokens:
            raise UserError(
                f"{result.artifact} has room for {got.completion_tokens} of {self._options.output_tokens} output tokens; "
                "lower --output-tokens or raise --context"
            )
        if abs(sum(got.stages_ms.values()) - got.e2el_ms) > 0.01 * got.e2el_ms:
            raise RuntimeError("the stages do not add up to the request")
