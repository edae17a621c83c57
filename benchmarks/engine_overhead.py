"""What the engine adds to the time per token: engine against a bare loop over the same model, in turns.

    python -m benchmarks.engine_overhead runs/NAME/student artifacts/NAME-onnx artifacts/NAME-gguf --tokens 200

ours = TPOT through the engine (sampling, detokenising, stop strings, timing, events, cancel checks), once with the caller
asleep until the end (`complete`) and once with a caller that wakes for every token (`generate`); theirs = the bare loop:
argmax and one step per token, nothing else. `raw` is the bare loop written directly on llama.cpp's C functions, with its
token, batch and logits made once. All are medians over the tokens of one answer: `wall` is the interval between two steps on
the clock, `cpu` the same in processor time of the thread that runs the model. Steps are the same code on all sides but vary by
more than the engine adds, so `outside` takes the time between the end of one step and the start of the next of each side, and
adds one step time, the median of all sides and rounds, to both.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import Result, compare, finish, parser
from runtime.api import Backend, Sampling, StreamBackend
from runtime.backend_gguf import GgufBackend
from runtime.engine import Engine
from runtime.images import from_pillow, question
from runtime.loading import load
from vlm import digits


@dataclass(frozen=True)
class Timed:
    """Medians of one answer in milliseconds: between two steps on the clock and in processor time, outside steps, inside."""

    wall: float
    cpu: float
    outside: float
    inside: float


class Stamps:
    """Clock and processor time at the start of every step, clock at its end."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.cpu: list[int] = []

    def start(self) -> None:
        self.cpu.append(time.thread_time_ns())
        self.starts.append(time.perf_counter_ns())

    def end(self) -> None:
        self.ends.append(time.perf_counter_ns())

    def medians(self) -> Timed:
        between = [[b - a for a, b in itertools.pairwise(times)] for times in (self.starts, self.cpu)]
        outside = [start - end for end, start in zip(self.ends, self.starts[1:], strict=False)]
        inside = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        return Timed(*(statistics.median(values) / 1e6 for values in (*between, outside, inside)))


@contextmanager
def stamped(engine: Engine, stamps: Stamps) -> Iterator[Backend]:
    """The engine's backend, every step stamped, in the engine and outside of it alike."""
    backend = engine._backend
    assert not isinstance(backend, StreamBackend)
    step = backend.step

    def watched(token_id: int) -> Any:
        stamps.start()
        logits_V = step(token_id)
        stamps.end()
        return logits_V

    backend.step = watched  # type: ignore[method-assign]
    try:
        yield backend
    finally:
        backend.step = step  # type: ignore[method-assign]


def engine_loop(engine: Engine, messages: list[Any], tokens: int) -> Timed:
    """Through the engine, the caller asleep until the end."""
    stamps = Stamps()
    with stamped(engine, stamps):
        engine.complete(messages, Sampling(max_new_tokens=tokens, ignore_eos=True), reuse="none")
    return stamps.medians()


def stream_loop(engine: Engine, messages: list[Any], tokens: int) -> Timed:
    """Through the engine, the caller awake for every token."""
    stamps = Stamps()
    with stamped(engine, stamps):
        for _ in engine.generate(messages, Sampling(max_new_tokens=tokens, ignore_eos=True), reuse="none"):
            pass
    return stamps.medians()


def bare_loop(engine: Engine, messages: list[Any], tokens: int) -> Timed:
    """The same steps with an argmax between them."""
    stamps = Stamps()
    with stamped(engine, stamps) as backend:
        prompt = backend.prepare(messages)
        logits_V = backend.prefill(prompt, backend.encode(prompt.images))
        engine._shared.context.keep(0)
        for _ in range(tokens - 1):
            logits_V = backend.step(int(np.argmax(logits_V)))
    return stamps.medians()


def raw_loop(engine: Engine, messages: list[Any], tokens: int) -> Timed:
    """llama_decode and an argmax over its own logits, no class of ours in between."""
    backend, stamps = engine._backend, Stamps()
    assert isinstance(backend, GgufBackend)
    prompt = backend.prepare(messages)
    logits_V = backend.prefill(prompt, backend.encode(prompt.images))
    engine._shared.context.keep(0)
    llama, context = backend._llama, backend._context
    token = (llama.llama_token * 1)()
    batch = llama.llama_batch_get_one(token, 1)
    decode, logits_of = llama.llama_decode, llama.llama_get_logits_ith
    for _ in range(tokens - 1):
        token[0] = int(np.argmax(logits_V))
        stamps.start()
        failed = decode(context, batch) or not logits_of(context, -1)  # asking for them is what waits for the device
        stamps.end()
        if failed:
            raise RuntimeError("llama_decode failed")
    return stamps.medians()


def measure(engine: Engine, tokens: int, rounds: int) -> list[Result]:
    """Rounds of every side, each round starting with another one."""
    sides: dict[str, Callable[[Engine, list[Any], int], Timed]] = {
        "engine": engine_loop,
        "stream": stream_loop,
        "bare": bare_loop,
    }
    if isinstance(engine._backend, GgufBackend):
        sides["raw"] = raw_loop
    seen: dict[str, list[Timed]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds + 1):
        messages = [question("Read the top row.", from_pillow(digits.sample("test", turn).image))]
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            timed = sides[name](engine, messages, tokens)
            if turn:
                seen[name].append(timed)
    step = statistics.median(timed.inside for values in seen.values() for timed in values)
    measures: dict[str, Callable[[Timed], float]] = {
        "outside": lambda timed: timed.outside + step,
        "wall": lambda timed: timed.wall,
        "cpu": lambda timed: timed.cpu,
    }
    results = []
    for measure_name, of in measures.items():
        times = {name: [of(timed) for timed in values] for name, values in seen.items()}
        for ours, theirs in itertools.product(("engine", "stream"), names[2:]):
            label = (
                f"{ours} / {theirs}, {engine.info.name}, {engine.info.backend} {engine.info.precision}, {measure_name}"
            )
            results.append(compare(label, times[ours], times[theirs], "ms per token"))
    return results


def main() -> None:
    arguments_of = parser(__doc__ or "")
    arguments_of.add_argument("artifacts", nargs="+")
    arguments_of.add_argument("--tokens", type=int, default=200)
    arguments = arguments_of.parse_args()
    results = []
    for artifact in arguments.artifacts:
        with load(artifact, threads=max(arguments.threads, 1)) as engine:
            results += measure(engine, arguments.tokens, arguments.rounds)
    finish(results, {"tokens": arguments.tokens, "rounds": arguments.rounds}, arguments.out)


if __name__ == "__main__":
    main()
