"""Runs on digits from a cached teacher beside the same runs with the live one: losses step by step, bytes, seconds.

    python -m benchmarks.teacher_cache --steps 100 --out benchmarks/results/teacher_cache.json

The same student, samples and seed in every run, in one process; the two caches (all logits, compressed with the default
options) are made first. Per term, over the steps:

- along the live run: |cached - live| of the same student against the bound the cache gives for that step,
- runs of their own: |loss of the run from the cache / loss of the live run - 1|, beside the same figure of a second live
  run whose student starts with weights changed by `--nudge` of themselves: what training makes of any small change.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine
from distill.__main__ import quiet
from distill.assemble import save_checkpoint
from distill.cache_build import CacheOptions
from distill.cache_run import Built, build
from distill.cache_verify import verify
from distill.config import TrainConfig
from distill.models import processor_of
from distill.presets import defaults
from distill.report import read_metrics
from distill.train import load_run, train
from vlm.files import write_atomic

KINDS = ("all logits", "compressed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--nudge", type=float, default=1e-4, help="relative change of the second live run's weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        value = compare(args, Path(folder))
    print(json.dumps(value, indent=1))
    if args.out:
        write_atomic(args.out, json.dumps(value, indent=1) + "\n")


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    base = dataclasses.replace(
        defaults("digits"),
        steps=args.steps,
        samples=args.samples,
        batch_size=args.batch_size,
        threads=args.threads,
        eval_every=0,
        eval_samples=50,
        log_every=1,
        visual_every=0,
    )
    options = {"all logits": CacheOptions(all_logits=True), "compressed": CacheOptions()}
    caches = {kind: build(dataclasses.replace(base, out=folder / kind), options[kind], (0, 1), False) for kind in KINDS}
    value: dict[str, Any] = {
        "settings": {**vars(args), "out": None},
        "machine": machine(),
        "caches": {kind: _cache(made) for kind, made in caches.items()},
        "along the live run": {},
        "runs": {},
    }
    nudged = _nudged(base, folder / "nudged", args.nudge)
    for objective in ("kd", "kd+iva"):
        config = dataclasses.replace(base, objective=objective, out=folder / "unused")
        found = {kind: verify(config, folder / kind, args.steps) for kind in KINDS}
        value["along the live run"][objective] = {kind: item.to_json() for kind, item in found.items()}
        runs = {"live": _run(base, folder / f"{objective}-live", objective)}
        for kind in KINDS:
            runs[kind] = _run(base, folder / f"{objective}-{kind}", objective, teacher_cache=folder / kind)
        runs["live, nudged"] = _run(base, folder / f"{objective}-nudged", objective, student=str(nudged))
        value["runs"][objective] = _differences(runs)
    return value


def _nudged(base: TrainConfig, out: Path, share: float) -> Path:
    """The student every run starts from, each weight changed by about `share` of itself."""
    torch.manual_seed(base.seed)
    run = load_run(base)
    with torch.no_grad():
        for parameter in run.student.parameters():
            parameter.mul_(1 + share * torch.randn_like(parameter))
    out.mkdir()
    save_checkpoint(run.student, processor_of(run.student_source), out, {"schema": "vlm-student/1"})
    return out


def _cache(made: Built) -> dict[str, Any]:
    facts = made.to_json()
    return {name: facts[name] for name in ("samples", "bytes", "seconds", "measured")}


def _run(base: TrainConfig, out: Path, objective: str, **changes: Any) -> dict[str, Any]:
    result = train(dataclasses.replace(base, objective=objective, out=out, **changes))
    return {
        "steps": [line for line in read_metrics(out / "metrics.jsonl") if "sft" in line],
        "exact_match": result.exact_match,
    }


def _differences(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    live = runs["live"]["steps"]
    found: dict[str, Any] = {
        "live": {
            "exact_match": runs["live"]["exact_match"],
            "step_seconds": statistics.median(line["step_seconds"] for line in live),
            "first_and_last": {term: [live[0][term], live[-1][term]] for term in ("kd", "iva") if term in live[0]},
        }
    }
    for kind in [kind for kind in runs if kind != "live"]:
        steps = runs[kind]["steps"]
        assert len(steps) == len(live)
        one: dict[str, Any] = {
            "exact_match": runs[kind]["exact_match"],
            "step_seconds": statistics.median(line["step_seconds"] for line in steps),
        }
        for term in ("sft", "kd", "iva"):
            if term in live[0]:
                ratios = [abs(a[term] / b[term] - 1) for a, b in zip(steps, live, strict=True)]
                one[term] = {"mean": statistics.fmean(ratios), "max": max(ratios), "first": ratios[0]}
        found[kind] = one
    return found


if __name__ == "__main__":
    main()
