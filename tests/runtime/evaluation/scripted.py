"""A data set of numbers, a scripted model that is right on two of three, and how tests run `eval` on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime import cli
from runtime.api import Message
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from tests.runtime.serving import png


def last_letter(messages: Sequence[Message]) -> str:
    return str(messages[-1].content[-1]).strip()[-1]


def make_data(root: Path, count: int = 20) -> Path:
    """Questions that end in a digit; the scripted model says that digit, and is right on two of three."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(count):
        (root / f"{n}.png").write_bytes(png(n))
        answer = str(n % 10) if n % 3 else "x"
        rows.append({"id": n, "question": f"Say {n}", "image": f"{n}.png", "answer": answer, "category": "ab"[n % 2]})
    (root / "task.json").write_text(json.dumps(rows))
    return root


class Scripted:
    """Stands for `load`: counts how often a model is opened and what it is asked."""

    def __init__(self, reply: Callable[[Sequence[Message]], str] = last_letter) -> None:
        self.opened, self.asked = 0, 0
        self._reply = reply

    def __call__(self, *_: Any, **__: Any) -> Engine:
        self.opened += 1

        def reply(messages: Sequence[Message]) -> str:
            self.asked += 1
            return self._reply(messages)

        return Engine(FakeBackend(FakeScript(reply=reply)))


def evaluate(data: Path, out: Path, *more: str, artefact: str = "x") -> int:
    given = ["eval", artefact, "--backend", "fake", "--task", "json", "--data", str(data), "--out", str(out), *more]
    return cli.main(given)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "ms"} for row in lines(path)]
