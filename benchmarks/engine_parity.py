"""The same greedy tokens from every format of one student, through the engine: 200 digits questions.

    python -m benchmarks.engine_parity runs/NAME/student artifacts/NAME-onnx artifacts/NAME-gguf \\
        --out benchmarks/results/engine_parity.json

The first model is the reference. A quarter of the questions each: one image; two images; second turn about the same image;
second turn with another image. The second turns run with the caches on (image embeddings and shared beginnings reused), the
reference without any. A difference counts as `tied` where the reference itself is undecided: its two best logits lie closer
than the tolerance of the format.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine
from runtime.api import Message, Reuse, Sampling, StreamBackend, Token
from runtime.engine import Engine
from runtime.images import answer, from_pillow, question
from runtime.loading import load
from vlm import digits

TOKENS = 16
TIE = 0.03
KINDS = ("one image", "two images", "second turn", "second turn, another image")


def conversation(index: int) -> tuple[str, list[Message]]:
    """The `index`-th conversation; histories are fixed, so that every model is asked the same."""
    first, second = digits.sample("test", 2 * index), digits.sample("test", 2 * index + 1)
    a, b = from_pillow(first.image), from_pillow(second.image)
    kind = KINDS[index % len(KINDS)]
    if kind == "one image":
        return kind, [question(first.question, a)]
    if kind == "two images":
        return kind, [question(first.question, a, b)]
    later = question(second.question, *([b] if "another" in kind else []))
    return kind, [question(first.question, a), answer(first.answer), later]


def tokens(engine: Engine, messages: list[Message], reuse: Reuse) -> list[int]:
    sampling = Sampling(max_new_tokens=TOKENS)
    if reuse != "none" and len(messages) > 1:  # the first turn fills the caches
        engine.complete(messages[:1], sampling, reuse=reuse)
    return [event.id for event in engine.complete(messages, sampling, reuse=reuse) if isinstance(event, Token)]


def margins(engine: Engine, messages: list[Message], ids: list[int]) -> list[float]:
    """How far the chosen logit leads the runner-up, in standard deviations, at every token."""
    backend = engine._backend
    assert not isinstance(backend, StreamBackend)
    prompt = backend.prepare(messages)
    logits_V, found = backend.prefill(prompt, backend.encode(prompt.images)), []
    for token_id in ids:
        second, best = np.partition(logits_V, -2)[-2:]
        found.append(float((best - second) / max(1.0, float(logits_V.std()))))
        logits_V = backend.step(token_id)
    engine._shared.context.keep(0)
    return found


def compare(reference: list[list[int]], got: list[list[int]], lead: list[list[float]]) -> dict[str, Any]:
    equal = tied = 0
    different = []
    by_kind = dict.fromkeys(KINDS, 0)
    for index, (a, b, margin) in enumerate(zip(reference, got, lead, strict=True)):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if a == b:
            equal += 1
            by_kind[KINDS[index % len(KINDS)]] += 1
        elif at is not None and margin[at] < 2 * TIE:
            tied += 1
        else:
            different.append(index)
    return {"n": len(got), "equal": equal, "tied": tied, "different": different, "equal_by_kind": by_kind}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--out", type=Path, help="keep the JSON here too")
    arguments = parser.parse_args()
    asked = [conversation(index) for index in range(arguments.pairs)]
    with load(arguments.artifacts[0]) as engine:
        reference = [tokens(engine, messages, "none") for _, messages in asked]
        lead = [margins(engine, messages, ids) for (_, messages), ids in zip(asked, reference, strict=True)]
    rows = []
    for artifact in arguments.artifacts:
        with load(artifact) as engine:
            for reuse in ("none", "all"):
                got = [tokens(engine, messages, reuse) for _, messages in asked]  # type: ignore[arg-type]
                row = {"backend": engine.info.backend, "precision": engine.info.precision, "reuse": reuse}
                rows.append({**row, **compare(reference, got, lead)})
                print(rows[-1], flush=True)
    kinds = {kind: sum(k == kind for k, _ in asked) for kind in KINDS}
    value = {"name": "engine_parity", "rows": rows, "kinds": kinds, "tie_below": 2 * TIE, "machine": machine()}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(value, indent=1) + "\n")
    print(json.dumps(value))
    raise SystemExit(1 if any(row["different"] for row in rows) else 0)


if __name__ == "__main__":
    main()
