"""A task played through the real engine with scripted replies: what a benchmark makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.api import Message
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from runtime.evaluate import record_of
from runtime.evaluation import Identity, Run, answer_all, check_items
from runtime.tasks import read_task
from runtime.tasks.base import Task, TaskOptions
from tests.runtime.serving import png
from vlm.scoring.benchmarks import BENCHMARKS
from vlm.scoring.summary import Record, Summary


@dataclass(frozen=True)
class Played:
    task: Task
    records: list[Record]
    summary: Summary

    @property
    def scores(self) -> list[float]:
        return [record["score"] for record in self.records]

    def part(self, name: str) -> float:
        return self.summary.parts[name].score


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))
    return path


def said(messages: Sequence[Message]) -> str:
    """The text of the last message, without the line break that follows the images."""
    return "".join(part for part in messages[-1].content if isinstance(part, str)).strip("\n")


def scripted(replies: Mapping[str, str]) -> Engine:
    """An engine that answers each prompt with its reply; any other prompt is a fault of the reader."""
    return Engine(FakeBackend(FakeScript(reply=lambda messages: replies[said(messages)], context_length=1 << 16)))


def play(
    name: str, replies: Sequence[str], out: Path, data: Path, mode: str = "", split: str = "", samples: int = 0
) -> Played:
    """Read the task, answer its items in order with `replies`, score as the command does."""
    task = read_task(name, TaskOptions(data=data, split=split, samples=samples))
    assert len(replies) == len(task.items), (len(replies), [item.id for item in task.items])
    by_prompt = {item.prompt.strip("\n"): reply for item, reply in zip(task.items, replies, strict=True)}
    assert len(by_prompt) == len(task.items), "prompts must differ for the script to tell them apart"
    checked = check_items(task.items)
    with (
        scripted(by_prompt) as engine,
        Run(out, Identity(name, "a", "b", "c", "d"), task.items, checked.digests) as run,
    ):
        answer_all(run, task, [engine], 4096)
        answers = dict(run.answers)
    benchmark = BENCHMARKS[name]
    records = [record_of(item, answers[item.id], mode or benchmark.mode, name) for item in task.items]
    return Played(task, records, benchmark.summarise(records))
