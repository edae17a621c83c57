"""Runs on digits from a cached teacher beside the same runs with the live one: losses step by step, bytes, seconds.

    python benchmarks/teacher_cache.py --steps 100 --out benchmarks/results/teacher_cache.json

The same student, samples and seed in every run, interleaved by objective in one process; the two caches (all logits,
compressed with the default options) are made first. Reported per term: the largest and the mean |cached / live - 1| of
the logged losses over the steps, beside the per-sample error that the cache itself reported for the initial student.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from distill.__main__ import quiet
from distill.cache_build import CacheOptions
from distill.cache_run import Built, build
from distill.config import TrainConfig
from distill.presets import defaults
from distill.report import read_metrics
from distill.train import train
from vlm.files import write_atomic

KINDS = ("all logits", "compressed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=16)
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
        "caches": {kind: _cache(made) for kind, made in caches.items()},
        "runs": {},
    }
    for objective in ("kd", "kd+iva"):
        runs = {"live": _run(base, folder, objective, None)}
        for kind in KINDS:
            runs[kind] = _run(base, folder, objective, folder / kind)
        value["runs"][objective] = _differences(runs)
    return value


def _cache(made: Built) -> dict[str, Any]:
    facts = made.to_json()
    return {name: facts[name] for name in ("samples", "bytes", "seconds", "measured")}


def _run(base: TrainConfig, folder: Path, objective: str, cache: Path | None) -> dict[str, Any]:
    out = folder / f"{objective}-{cache.name if cache else 'live'}"
    result = train(dataclasses.replace(base, objective=objective, teacher_cache=cache, out=out))
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
    for kind in KINDS:
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
