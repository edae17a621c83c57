"""`python -m runtime ask`: one question, streamed."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from runtime.api import Done, Event, Sampling, Token
from runtime.images import question, read_image
from runtime.latency import Timing, timing
from runtime.loading import load
from runtime.options import LoadOptions
from vlm.console import note, print_json


def ask(arguments: argparse.Namespace, options: LoadOptions) -> int:
    """Stream the answer to stdout, timings to stderr; `--json` adds a last line."""
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        json_schema=arguments.json_schema,
        grammar=arguments.grammar,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )
    images = [read_image(path) for path in arguments.image]  # before the model: a wrong path should not take a load
    events: list[Event] = []
    printed = ""
    with load(arguments.artifact, arguments.backend, **asdict(options)) as engine:
        if engine.info.verified is False:
            note(f"warning: {arguments.artifact} did not pass its checks at export; its answers may differ")
        for event in engine.generate([question(arguments.question, *images)], sampling, deadline_s=arguments.deadline):
            events.append(event)
            if isinstance(event, Token) and event.text:
                print(event.text, end="", flush=True)
                printed += event.text
    done = events[-1]
    if not isinstance(done, Done):
        raise RuntimeError("the request did not finish")
    print(done.text[len(printed) :], flush=True)
    measured = timing(events)
    note(describe(measured, done))
    if arguments.json:
        print_json(_json(measured, done))
    return 0


def describe(measured: Timing, done: Done) -> str:
    """One line: why it ended, tokens, latencies, stages."""
    parts = [f"{done.finish}: {measured.prompt_tokens} prompt + {measured.completion_tokens} new tokens"]
    if measured.ttft_ms is not None:
        loaded = " (first request after load)" if done.reported is None else ""  # a server has its own past
        parts.append(f"first token after {measured.ttft_ms:.1f} ms{loaded}")
    if measured.tpot_ms:
        parts.append(f"then {measured.tpot_ms:.2f} ms per token ({1000 / measured.tpot_ms:.0f} tokens/s)")
    stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in measured.stages_ms.items())
    return f"{'; '.join(parts)}\nstages in ms: {stages}; together {measured.e2el_ms:.1f}"


def _json(measured: Timing, done: Done) -> dict[str, Any]:
    return {
        "text": done.text,
        "finish": done.finish,
        "tokens": measured.completion_tokens,
        "prompt_tokens": measured.prompt_tokens,
        "ttft_ms": measured.ttft_ms,
        "tpot_ms": measured.tpot_ms,
        "e2el_ms": measured.e2el_ms,
        "stages_ms": measured.stages_ms,
    }
