"""`python -m runtime eval`: exact match on unseen data through the same engine that serves people."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from runtime.api import Done, Sampling
from runtime.engine import Engine
from runtime.images import from_pillow, question
from runtime.loading import load
from runtime.options import LoadOptions
from vlm import digits
from vlm.console import print_json, track
from vlm.errors import UserError
from vlm.score import bootstrap_interval, exact_match

TASKS = ("digits",)
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Score:
    """Exact match of `n` answers with a 95 % bootstrap interval; `kinds` gives the mean per kind of question."""

    task: str
    n: int
    score: float
    interval: tuple[float, float]
    kinds: dict[str, float]


def evaluate(arguments: argparse.Namespace, options: LoadOptions) -> int:
    if arguments.task not in TASKS:
        raise UserError(f"unknown task {arguments.task!r}; known: {', '.join(TASKS)}")
    if arguments.samples < 1:
        raise UserError(f"samples is {arguments.samples}; give 1 or more")
    digits.scan_indices("test")  # a missing package should be known before the model is loaded
    with load(arguments.artifact, arguments.backend, **asdict(options)) as engine:
        result = score_digits(engine, arguments.samples, arguments.seed)
    low, high = result.interval
    kinds = ", ".join(f"{kind} {100 * value:.0f} %" for kind, value in result.kinds.items())
    print(f"{result.task}: {100 * result.score:.1f} % exact match, n = {result.n}, 95 % interval", end=" ")
    print(f"{100 * low:.1f} to {100 * high:.1f} % ({kinds})")
    if arguments.json:
        print_json(asdict(result))
    return 0


def score_digits(engine: Engine, samples: int, seed: int = 0) -> Score:
    """Greedy answers to the first `samples` questions of the test stream."""
    scores: list[float] = []
    kinds: dict[str, list[float]] = {}
    for sample, text in _answers(engine, samples, seed):
        right = float(exact_match(text, sample.answer))
        scores.append(right)
        kinds.setdefault(sample.kind, []).append(right)
    means = {kind: sum(values) / len(values) for kind, values in sorted(kinds.items())}
    return Score("digits", samples, sum(scores) / samples, bootstrap_interval(scores), means)


def _answers(engine: Engine, samples: int, seed: int) -> Iterator[tuple[digits.Sample, str]]:
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
    for index in track(range(samples), samples, "eval"):
        sample = digits.sample("test", index, seed)
        # no caches: a score must not depend on the order of the questions
        events = engine.complete([question(sample.question, from_pillow(sample.image))], sampling, reuse="none")
        text = next(event.text for event in events if isinstance(event, Done))
        yield sample, text
