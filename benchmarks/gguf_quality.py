"""What every GGUF kind costs one student: KL from PyTorch, greedy tokens, exact match, with and without importance matrix.

    python -m benchmarks.gguf_quality runs/NAME/student --out benchmarks/results/gguf_quality.json

Every artefact goes through the ordinary export with its gates. The KL here is the mean over the answer tokens of `--pairs`
test questions (PyTorch's own greedy answers, fed to both sides), in nats, with a bootstrap interval over questions; the
comparison with and without importance matrix is paired by question.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import machine
from export.artefact import export_all
from export.backends import open_backend
from export.options import ExportOptions
from export.reference import TorchBackend, greedy_batch
from export.replay import Backend, Prompt, forced_logits, make_prompt
from export.student import open_student
from vlm import digits
from vlm.load import open_checkpoint
from vlm.manifest import read_manifest
from vlm.score import bootstrap_interval

KINDS = "f32,f16,bf16,q8_0,q6_k,q5_k_m,q4_k_m,q4_0,iq4_xs,iq3_m,iq3_xxs,iq2_m,iq2_xs"
LIMIT = 16
Logits = list[npt.NDArray[np.float64]]


def log_softmax(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def rows_of(backend: Backend, prompts: list[Prompt], answers: list[tuple[int, ...]]) -> Logits:
    """Log probabilities at every answer token of every question."""
    return [log_softmax(forced_logits(backend, p, a[:-1])) for p, a in zip(prompts, answers, strict=True)]


def divergence(wanted: Logits, got: Logits) -> list[float]:
    """Mean KL per question."""
    return [float((np.exp(a) * (a - b)).sum(axis=1).mean()) for a, b in zip(wanted, got, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--out", type=Path, help="keep the JSON here too")
    given = parser.parse_args()
    student = open_student(open_checkpoint(given.student))
    tokenizer = student.checkpoint.tokenizer
    drawn = [digits.sample("test", index, seed=2) for index in range(given.pairs)]
    prompts = [make_prompt(tokenizer, s.image, s.question) for s in drawn]
    answers = greedy_batch(student, prompts, tokenizer.spec.eos_token_ids, LIMIT)
    wanted = rows_of(TorchBackend(student), prompts, answers)
    rows: list[dict[str, Any]] = []
    plain: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for kind in given.kinds.split(","):
            base = ExportOptions("gguf", given.student, Path(scratch) / kind, kind, given.pairs)
            weighted = kind.startswith(("q6", "q5", "q4"))
            if weighted:
                runs.append(ExportOptions("gguf", given.student, Path(scratch) / f"{kind}-plain", kind, given.pairs, no_imatrix=True))  # fmt: skip
            runs.append(base)
        for run, result in zip(runs, export_all(runs), strict=True):
            manifest = read_manifest(run.out)
            backend = open_backend(run.out, manifest)
            kl = divergence(wanted, rows_of(backend, prompts, answers))
            backend.close()
            row = {
                "kind": run.precision,
                "imatrix": "imatrix" in manifest.precision["decoder"],
                "verified": result.verified,
                "text_bytes": manifest.path_of(run.out, "text_gguf").stat().st_size,
                "decoder_bits_per_weight": manifest.precision["decoder"]["bits_per_weight"],
                "kl": float(np.mean(kl)),
                "kl_interval": bootstrap_interval(kl),
                "first_step": result.parity["worst"]["prefill"],
                "cosine": result.parity["worst"]["cosine"],
                "gate_kl": result.parity["pooled"]["kl"],
                "tokens_equal": result.accuracy["tokens_equal"],
                "exact_match": [result.accuracy["before"], result.accuracy["after"]],
                "change": [result.accuracy["change"], result.accuracy["change_interval"]],
                "n": result.accuracy["n"],
                "failures": result.parity["failures"],
            }
            if run.no_imatrix:
                plain[run.precision] = kl
            elif run.precision in plain:
                gain = [b - a for a, b in zip(kl, plain[run.precision], strict=True)]
                row["kl_saved"], row["kl_saved_interval"] = float(np.mean(gain)), bootstrap_interval(gain)
            rows.append(row)
            print(json.dumps(row), flush=True)
    value = {"rows": rows, "student": given.student.parent.name, "pairs": given.pairs, "machine": machine()}
    if given.out:
        given.out.write_text(json.dumps(value, indent=1) + "\n")
    print(json.dumps(value))


if __name__ == "__main__":
    main()
