"""What the engine adds to the time per token: engine against a bare loop over the same model, in turns.

    python -m benchmarks.engine_overhead runs/NAME/student artifacts/NAME-onnx artifacts/NAME-gguf --rounds 200 --threads 1

ours = the engine (sampling, detokenising, stop strings, timing, events, cancel checks), once with the caller asleep until the
end (`complete`) and once with a caller that wakes for the tokens (`generate`); theirs = the bare loop: argmax and one step per
token, nothing else, on a thread of its own like the engine's. `raw` is the bare loop written directly on llama.cpp's C
functions, with its token, batch and logits made once.

Steps are the same code on all sides and vary by more than the engine adds, so answers are short and many: every round has one
of each side on the same picture, in another order, and what counts is the median over the rounds of the ratio within a round,
with a bootstrap interval. Time per token runs from the start of the first step of an answer to the start of its last: `wall` on
the clock, `cpu` in processor time of the thread that runs the model. Exit code 1 if an interval of `engine / bare` ends above
the limit of 3 %.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.common import Result, finish, paired, parser
from runtime.api import Backend, Sampling, StreamBackend
from runtime.backend_gguf import GgufBackend
from runtime.engine import Engine
from runtime.images import from_pillow, question
from runtime.loading import load
from vlm import digits

LIMIT = 1.03
WARM_UP = 3


@dataclass
class Stamps:
    """Clock and processor time at the start of the first and of the last of `steps` steps."""

    steps: int
    seen: int = 0
    wall: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)

    def step(self) -> None:
        self.seen += 1
        if self.seen in (1, self.steps):
            self.wall.append(time.perf_counter_ns())
            self.cpu.append(time.thread_time_ns())

    def per_token_ms(self) -> tuple[float, float]:
        return tuple((b - a) / 1e6 / (self.steps - 1) for a, b in (self.wall, self.cpu))  # type: ignore[return-value]


@contextmanager
def stamped(engine: Engine, stamps: Stamps) -> Iterator[Backend]:
    """The engine's backend with every step counted, inside the engine and outside of it alike."""
    backend = engine._backend
    assert not isinstance(backend, StreamBackend)
    step, stamp = backend.step, stamps.step

    def watched(token_id: int) -> Any:
        stamp()
        return step(token_id)

    backend.step = watched  # type: ignore[method-assign]
    try:
        yield backend
    finally:
        backend.step = step  # type: ignore[method-assign]


def engine_loop(engine: Engine, messages: list[Any], stamps: Stamps) -> None:
    """Through the engine, the caller asleep until the end."""
    with stamped(engine, stamps):
        engine.complete(messages, Sampling(max_new_tokens=stamps.steps + 1, ignore_eos=True), reuse="none")


def stream_loop(engine: Engine, messages: list[Any], stamps: Stamps) -> None:
    """Through the engine, the caller awake for the tokens."""
    with stamped(engine, stamps):
        for _ in engine.generate(messages, Sampling(max_new_tokens=stamps.steps + 1, ignore_eos=True), reuse="none"):
            pass


def bare_loop(engine: Engine, messages: list[Any], stamps: Stamps) -> None:
    """The same steps with an argmax between them."""
    with stamped(engine, stamps) as backend:
        prompt = backend.prepare(messages)
        logits_V = backend.prefill(prompt, backend.encode(prompt.images))
        engine._shared.context.keep(0)
        for _ in range(stamps.steps):
            logits_V = backend.step(int(np.argmax(logits_V)))


def raw_loop(engine: Engine, messages: list[Any], stamps: Stamps) -> None:
    """llama_decode and an argmax over its own logits, no class of ours in between."""
    backend = engine._backend
    assert isinstance(backend, GgufBackend)
    prompt = backend.prepare(messages)
    logits_V = backend.prefill(prompt, backend.encode(prompt.images))
    engine._shared.context.keep(0)
    llama, context = backend._llama, backend._context
    token = (llama.llama_token * 1)()
    batch = llama.llama_batch_get_one(token, 1)
    decode, logits_of, stamp = llama.llama_decode, llama.llama_get_logits_ith, stamps.step
    for _ in range(stamps.steps):
        token[0] = int(np.argmax(logits_V))
        stamp()
        if decode(context, batch) or not logits_of(context, -1):  # asking for them is what waits for the device
            raise RuntimeError("llama_decode failed")


def measure(engine: Engine, tokens: int, rounds: int) -> list[Result]:
    """Rounds of every side; the orders of a round take turns."""
    sides: dict[str, Callable[[Engine, list[Any], Stamps], None]] = {
        "engine": engine_loop,
        "stream": stream_loop,
        "bare": bare_loop,
    }
    if isinstance(engine._backend, GgufBackend):
        sides["raw"] = raw_loop
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    orders = list(itertools.permutations(sides))
    with ThreadPoolExecutor(1) as own_thread:
        for turn in range(WARM_UP + rounds):
            messages = [question("Read the top row.", from_pillow(digits.sample("test", turn).image))]
            for name in orders[turn % len(orders)]:
                stamps = Stamps(tokens)
                if name in ("bare", "raw"):
                    own_thread.submit(sides[name], engine, messages, stamps).result()
                else:
                    sides[name](engine, messages, stamps)
                if turn >= WARM_UP:
                    each = stamps.per_token_ms()
                    wall[name].append(each[0])
                    cpu[name].append(each[1])
    results = []
    model = f"{engine.info.name}, {engine.info.backend} {engine.info.precision}"
    for (clock, times), theirs in itertools.product((("wall", wall), ("cpu", cpu)), list(sides)[2:]):
        for ours in ("engine", "stream"):
            label = f"{ours} / {theirs}, {model}, {clock}"
            results.append(paired(label, times[ours], times[theirs], "ms per token"))
        print(f"{model}: quickest {theirs} {min(times[theirs]):.4f} ms, median {statistics.median(times[theirs]):.4f}")
    return results


def main() -> int:
    arguments_of = parser(__doc__ or "")
    arguments_of.add_argument("artifacts", nargs="+")
    arguments_of.add_argument("--tokens", type=int, default=48, help="steps of one answer")
    arguments_of.set_defaults(rounds=100)
    arguments = arguments_of.parse_args()
    results = []
    for artifact in arguments.artifacts:
        with load(artifact, threads=max(arguments.threads, 1)) as engine:
            results += measure(engine, arguments.tokens, arguments.rounds)
    finish(results, {"tokens": arguments.tokens, "rounds": arguments.rounds, "limit": LIMIT}, arguments.out)
    held = [r.interval is not None and r.interval[1] <= LIMIT for r in results if r.name.startswith("engine / bare")]
    return 0 if all(held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
