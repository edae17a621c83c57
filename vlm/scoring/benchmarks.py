"""Benchmark name -> how one reply is scored and how the scores are summed up. All on plain dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.scoring import answers, choice, mme_reasoning, summary, text
from vlm.scoring.summary import Record, Summary

# truth and reply -> score (0 to 1) and what was read from the reply
Scorer = Callable[[Mapping[str, Any], str], tuple[float, Any]]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark judges replies.

    Attributes:
        official: as the benchmark's own script.
        strict: our reading, where there are two; None where there is only one.
        mode: which of the two is used unless the user says otherwise (`choice.MODES`).
        unit: group field whose records belong together; "" where every record stands alone.
    """

    official: Scorer
    summarise: Callable[[Sequence[Record]], Summary]
    strict: Scorer | None = None
    mode: str = "official"
    unit: str = ""

    def score(self, truth: Mapping[str, Any], reply: str, mode: str) -> tuple[float, Any]:
        scorer = self.strict if mode == "strict" and self.strict else self.official
        return scorer(truth, reply)


def _right(said: Any, truth: Mapping[str, Any]) -> tuple[float, Any]:
    return float(said is not None and said == truth["answer"]), said


def _gqa(truth: Mapping[str, Any], reply: str) -> tuple[float, Any]:
    return float(text.gqa_match(reply, truth["answer"])), reply.strip().rstrip(".").lower()


def _scienceqa(truth: Mapping[str, Any], reply: str) -> tuple[float, Any]:
    return _right(choice.scienceqa(reply.strip(), len(truth["options"])), truth)


def _textvqa(truth: Mapping[str, Any], reply: str) -> tuple[float, Any]:
    return text.vqa_soft_accuracy(reply, truth["answers"]), text.vqa_normalise(reply)


def _pope(truth: Mapping[str, Any], reply: str) -> tuple[float, Any]:
    return _right(text.pope_label(reply), truth)


def _mme(truth: Mapping[str, Any], reply: str) -> tuple[float, Any]:
    return _right(text.mme_label(reply), truth)


def _choice(read: Callable[[str, Mapping[str, str]], str | None]) -> Scorer:
    return lambda truth, reply: _right(read(reply, truth["options"]), truth)


_strict = _choice(choice.strict)


def _reasoning(full: bool) -> Scorer:
    return lambda truth, reply: mme_reasoning.score(truth, reply, full)


def _typed(truth: Mapping[str, Any], reply: str) -> tuple[float, Any]:
    return answers.check(truth["metric"], reply, truth["answer"], truth.get("options")), None


_circular = summary.all_right("circular accuracy", "index", "split", "l2", "category")

BENCHMARKS: dict[str, Benchmark] = {
    "digits": Benchmark(_typed, summary.mean_of("exact match", "kind")),
    "gqa": Benchmark(_gqa, summary.mean_of("accuracy", "form", "structural", "semantic")),
    "scienceqa": Benchmark(_scienceqa, summary.mean_of("accuracy", "context", "subject", "grade"), _strict),
    "scienceqa-img": Benchmark(_scienceqa, summary.mean_of("accuracy", "subject", "grade"), _strict),
    "textvqa": Benchmark(_textvqa, summary.mean_of("VQA accuracy")),
    "pope": Benchmark(_pope, summary.pope),
    "mme": Benchmark(_mme, summary.mme, unit="image_key"),
    "mmbench": Benchmark(_choice(choice.mmbench), _circular, _strict, unit="index"),
    "mmvp": Benchmark(_strict, summary.all_right("pair accuracy", "pair"), _strict, mode="strict", unit="pair"),
    "blink": Benchmark(_choice(choice.blink), summary.mean_of("accuracy", "sub_task"), _strict, mode="strict"),
    "vstar": Benchmark(_strict, summary.mean_of("accuracy", "category"), _strict, mode="strict"),
    "mmstar": Benchmark(_choice(choice.mmbench), summary.mean_of("accuracy", "category", "l2"), _strict, mode="strict"),
    "mme-reasoning": Benchmark(_reasoning(full=False), summary.mme_reasoning, _reasoning(full=True)),
    "av-odyssey": Benchmark(
        _choice(choice.av_odyssey), summary.mean_of("accuracy", "subfield", "question_type"), _strict, mode="strict"
    ),
    "json": Benchmark(_typed, summary.mean_of("score", "category")),
}


def scored(benchmark: Benchmark, record: Record, mode: str) -> Record:
    """The record with `score` and `parsed`."""
    value, parsed = benchmark.score(record["truth"], record["prediction"], mode)
    return {**record, "score": value, "parsed": parsed}
