"""A tiny student as TensorRT artefact, and a machine with TensorRT and a GPU that there is not.

The stand-ins execute the graphs an engine would be built from, so numbers are real; what they cannot show is what
TensorRT itself makes of a graph. `scripts/check-gpu` does that on a device.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.api import Backend, Image, Message, Sampling, Token
from runtime.backend_tensorrt import open_tensorrt
from runtime.backend_torch import TorchBackend, open_torch
from runtime.delta import DeltaBackend
from runtime.engine import Engine
from runtime.images import answer, from_pillow, question
from runtime.options import LoadOptions
from tests.fake_tensorrt import Fake
from vlm import digits, engine_key
from vlm.manifest import read_manifest

STEPS = 32


TOLERANCE = {"fp32": 3e-4, "fp16": 0.05}


ORIN = {"gpu": "Orin", "sm": "8.7", "cuda": "12.6", "l4t": "36.4.3"}


CONTEXT = 160


# row bytes: 2 heads x 64 x 2 are a multiple of 256, 1 x 32 x 2 are not
SHAPES: dict[str, dict[str, Any]] = {
    "fp32": {"decoder": "qwen3", "kv_heads": 1, "heads": 4, "head_dim": 32},
    "fp16": {"decoder": "qwen2"},
}


@dataclasses.dataclass(frozen=True)
class Made:
    student: Path
    root: Path
    precision: str
    torch: TorchBackend


def make(precision: str, folder: Path) -> Made:
    """A tiny student and its artefact, written but not measured."""
    from export.artefact import build
    from export.evidence import collect
    from export.options import ExportOptions
    from export.student import open_student
    from export.to_tensorrt import TrtStorage
    from export.trt_precision import parse_trt_precision
    from tests.tiny import make_student
    from vlm.load import open_checkpoint
    from vlm.manifest import write_manifest

    where = make_student(folder / "student", seed=3, context=CONTEXT, vision_layers=1, **SHAPES[precision])
    student = open_student(open_checkpoint(where))
    root = folder / "artefact"
    root.mkdir()
    run = ExportOptions("tensorrt", where, root, precision)
    storage = TrtStorage(parse_trt_precision(precision))
    write_manifest(root, build(student, collect(student, 1, seed=0, limit=1), run, root, storage))
    return Made(where, root, precision, open_torch(where, LoadOptions()))


def install(fake: Fake, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str] = ORIN) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setattr("runtime.cuda.load_cudart", lambda: fake.cudart)
    monkeypatch.setattr(engine_key, "device_facts", lambda: facts)
    monkeypatch.setattr(engine_key, "free_memory", lambda: (8 << 30, 4 << 30))


def opened(made: Made, provider: str, **options: Any) -> DeltaBackend:
    return open_tensorrt(made.root, LoadOptions(provider=provider, **options), read_manifest(made.root))  # type: ignore[arg-type]


def picture(index: int) -> Image:
    return from_pillow(digits.sample("test", index).image)


def forced(backend: Backend, messages: list[Message], steps: int = STEPS, chunk: int = 10**6) -> np.ndarray:
    """logits of the prompt's end and of fixed tokens after it."""
    prompt = backend.prepare(messages)
    embeds = backend.encode(prompt.images) if prompt.images else []
    for start in range(0, len(prompt.ids), chunk):
        logits = backend.prefill(prompt, embeds, start, min(start + chunk, len(prompt.ids)))
    rows = [np.array(logits)]
    rows += [np.array(backend.step(int(token))) for token in np.random.default_rng(0).integers(4, 300, steps)]
    return np.stack(rows)


def close_to(expected: np.ndarray, got: np.ndarray, precision: str) -> bool:
    assert expected.std() > 0.25, "flat logits would pass any comparison"
    return bool(np.abs(expected - got).max() < TOLERANCE[precision] * max(1.0, float(expected.std())))


QUESTIONS: dict[str, list[Message]] = {
    "one image": [question("Read the top row.", picture(0))],
    "three images": [question("Compare.", picture(1), picture(2), picture(0))],
    "no image": [question("Say something.")],
    # 128 rows is where one bucket ends and the next begins
    "across a bucket": [question("7 " * 45, picture(2))],
    "second turn": [question("Add.", picture(2)), answer("3 + 4 = 7"), question("And below?")],
}


class Borrowed:
    """A backend the engine does not close."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return (lambda: None) if name == "close" else getattr(self._backend, name)


def tokens(engine: Engine, messages: list[Message], sampling: Sampling | None = None) -> list[int]:
    chosen = sampling or Sampling(max_new_tokens=STEPS, ignore_eos=True)
    return [event.id for event in engine.generate(messages, chosen) if isinstance(event, Token)]


def engines(made: Made, device: Fake) -> DeltaBackend:
    from export.build_engine import build

    build(made.root)
    return opened(made, "auto")
