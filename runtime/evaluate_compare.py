"""`python -m runtime compare` on two evaluations: the same questions, a paired test, and what changed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime.evaluation import JUDGED, SCHEMA
from runtime.tasks.tables import json_lines
from vlm.console import note, print_json, table
from vlm.errors import GateFailed, UserError
from vlm.score import paired
from vlm.scoring.benchmarks import BENCHMARKS
from vlm.scoring.summary import Record, Summary

ALPHA = 0.05
SHOWN = 5


def is_evaluation(path: Path) -> bool:
    """A run directory of `eval`, or its result.json."""
    root = path if path.is_dir() else path.parent
    if path.is_file() and path.name != "result.json":
        return False
    try:
        return json.loads((root / "result.json").read_text()).get("schema") == SCHEMA
    except (OSError, ValueError, AttributeError):
        return False


def compare(arguments: argparse.Namespace) -> int:
    """Print the difference with its interval and p.

    Raises:
        UserError: not two finished runs of one task over the same questions.
        GateFailed: `--fail-if worse`, and the second is worse beyond chance.
    """
    if wrong := [text for text in arguments.fail_if if text != "worse"]:
        raise UserError(f"--fail-if is {wrong[0]!r}; for evaluations write `--fail-if worse`")
    (first, a), (second, b) = (read_run(path) for path in (arguments.before, arguments.after))
    if first["task"] != second["task"]:
        raise UserError(f"{arguments.before} is {first['task']}, {arguments.after} is {second['task']}: not comparable")
    if first["mode"] != second["mode"]:
        raise UserError(
            f"replies were read in mode {first['mode']} and {second['mode']}; evaluate one again with "
            f"`--mode {first['mode']}` (no model is run for it)"
        )
    told = ["judge" in value for value in (first, second)]
    if first["task"] == JUDGED and not all(told):
        note("warning: a run of an earlier version does not say whether a judge decided its open questions")
    elif bool(first.get("judge")) != bool(second.get("judge")):
        raise UserError(
            f"open questions were decided by {_decided(first)} and by {_decided(second)}; evaluate one again "
            "as the other (no model is run for it)"
        )
    questions = [value.get("identity", {}).get("data") for value in (first, second)]
    if questions[0] != questions[1]:
        raise UserError(
            f"{arguments.before} and {arguments.after} are over other questions (or images, or answers); "
            "use the same --data, --split, --seed and --samples"
        )
    summaries = [BENCHMARKS[first["task"]].summarise(records) for records in (a, b)]
    try:
        found = paired(summaries[0], summaries[1])
    except ValueError as error:
        raise UserError(
            f"{arguments.before} and {arguments.after}: {error}; use the same --data and --samples"
        ) from None
    _print(first, second, summaries, asdict(found))
    changed = _changed(a, b)
    if arguments.json:
        print_json(
            {
                "task": first["task"],
                **asdict(found),
                "before": first["score"],
                "after": second["score"],
                "significant": found.p < ALPHA,
                "changed": [row["id"] for row in changed],
            }
        )
    for row in changed[:SHOWN]:
        note(f"{row['id']}: {row['before']!r} -> {row['after']!r}")
    if found.p < ALPHA and found.difference < 0 and "worse" in arguments.fail_if:
        raise GateFailed(f"{arguments.after} is worse by {-found.difference:.4g} (p = {found.p:.2g})")
    return 0


def _decided(value: dict[str, Any]) -> str:
    return f"the judge at {value['judge']}" if value.get("judge") else "rules"


def read_run(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """result.json and the samples of a run.

    Raises:
        UserError: not a finished evaluation.
    """
    root = path if path.is_dir() else path.parent
    try:
        value = json.loads((root / "result.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{root} holds no finished evaluation; run `python -m runtime eval ... --out {root}`") from None
    if value.get("schema") != SCHEMA or value.get("score") is None or value.get("task") not in BENCHMARKS:
        raise UserError(f"{root} holds no scored evaluation of this version; run `eval` again")
    return value, json_lines(root / "samples.jsonl")


def _print(first: dict[str, Any], second: dict[str, Any], summaries: list[Summary], found: dict[str, Any]) -> None:
    points = first["unit"] == "points"
    show = (lambda x: f"{x:.1f}") if points else (lambda x: f"{100 * x:.1f} %")
    rows = [
        [name, value["artifact"], str(summary.n), show(summary.score)]
        for name, value, summary in zip("AB", (first, second), summaries, strict=True)
    ]
    print(table(["run", "model", "n", f"{first['task']} {first['metric']}"], rows))
    low, high = found["interval"]
    verdict = "no difference beyond chance"
    if found["p"] < ALPHA:
        verdict = "B is better" if found["difference"] > 0 else "B is worse"
    print(f"B - A: {_signed(found['difference'], points)}, 95 % interval {_signed(low, points)} to", end=" ")
    print(f"{_signed(high, points)}; {found['better']} better, {found['worse']} worse of {found['n']};", end=" ")
    print(f"{found['test']} test p = {found['p']:.3g}: {verdict}")


def _signed(value: float, points: bool) -> str:
    return f"{value:+.1f}" if points else f"{100 * value:+.1f} %"


def _changed(a: list[Record], b: list[Record]) -> list[dict[str, Any]]:
    after = {record["id"]: record for record in b}
    return [
        {"id": r["id"], "before": r["prediction"], "after": after[r["id"]]["prediction"]}
        for r in a
        if r["id"] in after and r["score"] != after[r["id"]]["score"]
    ]
