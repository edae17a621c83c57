"""How many greedy answers of random students a float16 GGUF leaves as they were: every near tie turned counts as a loss.

    python -m benchmarks.gguf_random --seeds 5 --out benchmarks/results/gguf_random.json

Random logits have no margin, so this is the hardest case there is; see `tests/tiny.py` for the students (SigLIP tower with
each decoder). Weights are as transformers draws them (spread 1) or four times as large (spread 4), stored in float32 or
as numbers that float16 holds. Every student goes through the ordinary export command with 200 questions.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine
from export.artefact import export_all
from export.evidence import collect
from export.options import ExportOptions
from export.student import open_student
from tests.tiny import make_student
from vlm.load import open_checkpoint

DECODERS = ("qwen2", "qwen3", "llama")


def measured(decoder: str, spread: float, half: bool, seed: int, pairs: int, folder: Path) -> dict[str, Any]:
    """One student: strictly equal answers, with near ties counted equal, and how various the answers are."""
    student = make_student(folder / "student", seed, spread, half, decoder=decoder)
    answers = collect(open_student(open_checkpoint(student)), pairs, 0).answers
    (result,) = export_all([ExportOptions("gguf", student, folder / "out", "f16", pairs)])
    return {
        "decoder": decoder,
        "spread": spread,
        "stored": "float16" if half else "float32",
        "seed": seed,
        "n": result.accuracy["n"],
        "tokens_equal": result.accuracy["tokens_equal"],
        "tokens_equal_or_tied": result.accuracy["tokens_equal_or_tied"],
        "first_step": result.parity["worst"]["prefill"],
        "cosine": result.parity["worst"]["cosine"],
        "tokens_an_answer": float(np.mean([len(answer) for answer in answers])),
        "distinct_answers": len({*answers}),
        "verified": result.verified,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per decoder, spread and type: mean, least and greatest share over the seeds."""
    kinds = collections.defaultdict(list)
    for row in rows:
        kinds[row["stored"], row["spread"], row["decoder"]].append(row)
    return [
        {
            "stored": stored,
            "spread": spread,
            "decoder": decoder,
            "seeds": len(found),
            "tokens_equal": float(np.mean([row["tokens_equal"] for row in found])),
            "range": [f(row["tokens_equal"] for row in found) for f in (min, max)],
            "tokens_equal_or_tied": float(np.mean([row["tokens_equal_or_tied"] for row in found])),
            "first_step": max(row["first_step"] for row in found),
        }
        for (stored, spread, decoder), found in kinds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--out", type=Path, help="keep the JSON here too")
    given = parser.parse_args()
    rows = []
    for half, spread, seed, decoder in itertools.product((True, False), (1.0, 4.0), range(given.seeds), DECODERS):
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(measured(decoder, spread, half, seed, given.pairs, Path(scratch)))
        print(json.dumps(rows[-1]), flush=True)
    value = {"summary": summary(rows), "rows": rows, "pairs": given.pairs, "machine": machine()}
    if given.out:
        given.out.write_text(json.dumps(value, indent=1) + "\n")
    print(json.dumps(value["summary"], indent=1))


if __name__ == "__main__":
    main()
