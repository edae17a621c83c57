"""Events of one request -> its latencies, by the definitions of vLLM: TTFT, TPOT, ITL, E2EL. Pure functions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from runtime.api import STAGES, Done, Event, Span, Token

MS = 1e6


@dataclass(frozen=True)
class Timing:
    """Latencies of one request in milliseconds, counted in token ids, never in pieces of text.

    Attributes:
        ttft_ms: receipt of the request (encoded image bytes) to the choice of the first token; None without tokens.
        tpot_ms: (E2EL - TTFT) / (tokens - 1); None with fewer than two tokens, or where nobody counted them.
        itl_ms: each gap between consecutive tokens; empty where a remote server sends several in one piece.
        e2el_ms: receipt to the end of the last stage.
        stages_ms: sums over the spans; a stage that did not happen is absent. They add up to e2el_ms, except for a
            remote server, whose stages cannot be seen.
        remote_ms: time spent waiting for a remote server; None for a model of our own.
        reported: a remote server's own word on its timings.
    """

    ttft_ms: float | None
    tpot_ms: float | None
    itl_ms: tuple[float, ...]
    e2el_ms: float
    stages_ms: dict[str, float]
    prompt_tokens: int | None
    image_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    cached_images: int | None = 0
    remote_ms: float | None = None
    reported: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Timing:
        return Timing(**{**value, "itl_ms": tuple(value["itl_ms"])})


def timing(events: Iterable[Event]) -> Timing:
    """All events of one finished request -> its latencies.

    Raises:
        ValueError: there is no Done event.
    """
    token_ns: list[int] = []
    done: Done | None = None
    for event in events:
        if isinstance(event, Token):
            token_ns.append(event.t_ns)
        elif isinstance(event, Done):
            done = event
    if done is None:
        raise ValueError("the request did not finish")
    end_ns = done.spans[-1].end_ns
    n, remote = done.usage.completion_tokens, [span for span in done.spans if span.stage == "remote"]
    gaps = tuple((b - a) / MS for a, b in itertools.pairwise(token_ns))
    return Timing(
        ttft_ms=(token_ns[0] - done.received_ns) / MS if token_ns else None,
        tpot_ms=(end_ns - token_ns[0]) / MS / (n - 1) if token_ns and n is not None and n > 1 else None,
        # a remote server leaves the end-of-sequence token out of its pieces
        itl_ms=gaps if not remote or n in (len(token_ns), len(token_ns) + 1) else (),
        e2el_ms=(end_ns - done.received_ns) / MS,
        stages_ms=stages_ms(done.spans),
        prompt_tokens=done.usage.prompt_tokens,
        image_tokens=done.usage.image_tokens,
        cached_tokens=done.usage.cached_tokens,
        completion_tokens=n,
        cached_images=done.usage.cached_images,
        remote_ms=sum(span.end_ns - span.start_ns for span in remote) / MS if remote else None,
        reported=None if done.reported is None else dict(done.reported),
    )


def stages_ms(spans: Iterable[Span]) -> dict[str, float]:
    """Milliseconds per stage, in the order of STAGES; stages that did not happen are absent."""
    sums_ns: dict[str, int] = {}
    for span in spans:
        sums_ns[span.stage] = sums_ns.get(span.stage, 0) + span.end_ns - span.start_ns
    return {stage: sums_ns[stage] / MS for stage in STAGES if stage in sums_ns}
