"""`python -m runtime compare`: two profile files, ratios with intervals, and a gate for continuous integration."""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.report import SCHEMA
from vlm.console import note, print_json, table
from vlm.errors import GateFailed, UserError

METRICS = ("ttft_ms", "tpot_ms", "e2el_ms")
ROUNDS = 2000
STATISTICS: dict[str, Callable[..., Any]] = {
    "p50": np.median,
    "p90": functools.partial(np.quantile, q=0.9),
    "mean": np.mean,
}


@dataclass(frozen=True)
class Row:
    """One statistic of one metric before and after; `ratio` = after / before with a 95 % bootstrap interval."""

    model: str
    metric: str
    before: float
    after: float
    ratio: float
    interval: tuple[float, float]
    statistic: str = "p50"


@dataclass(frozen=True)
class Limit:
    """`ttft_ms.p50+5%`: fail if this statistic of the metric got slower by more than 5 % beyond doubt."""

    metric: str
    slower: float
    statistic: str = "p50"

    @staticmethod
    def parse(text: str) -> Limit:
        names, statistics = "|".join(METRICS), "|".join(STATISTICS)
        match = re.fullmatch(rf"({names})(?:\.({statistics}))?\+(\d+(?:\.\d+)?)%", text)
        if not match:
            raise UserError(f"--fail-if is {text!r}; write METRIC+PERCENT%, for example ttft_ms.p50+5%")
        return Limit(match[1], float(match[3]) / 100, match[2] or "p50")


def compare(arguments: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        UserError: not a profile, or nothing to pair. GateFailed: a `--fail-if` limit is exceeded.
    """
    limits = [Limit.parse(text) for text in arguments.fail_if]
    before, after = read_profile(arguments.before), read_profile(arguments.after)
    for difference in _different_conditions(before, after):
        note(f"warning: {difference}")
    wanted = sorted({limit.statistic for limit in limits} | {"p50"})
    rows = [row for name in wanted for row in pair_up(before["profiles"], after["profiles"], name)]
    if not rows:
        raise UserError(f"no model of {arguments.before} has the backend and precision of one in {arguments.after}")
    cells = [
        [
            r.model,
            f"{r.metric}.{r.statistic}",
            f"{r.before:.2f}",
            f"{r.after:.2f}",
            f"{r.ratio:.3f}",
            f"{r.interval[0]:.3f} to {r.interval[1]:.3f}",
        ]
        for r in rows
    ]
    print(table(["model", "metric", "before", "after", "ratio", "95 % interval"], cells))
    if arguments.json:
        print_json({"rows": [asdict(row) for row in rows]})
    slower = []
    for limit in limits:
        bound = [row for row in rows if (row.metric, row.statistic) == (limit.metric, limit.statistic)]
        if not bound:
            raise UserError(f"--fail-if {limit.metric}: not measured in both files; leave it out")
        # the whole interval must lie above the limit, so that noise alone does not fail a build
        slower += [row for row in bound if row.interval[0] > 1 + limit.slower]
    if slower:
        worst = max(slower, key=lambda row: row.ratio)
        raise GateFailed(f"{worst.model}: {worst.metric} is {100 * (worst.ratio - 1):.1f} % slower, over the limit")
    return 0


def read_profile(path: Path) -> dict[str, Any]:
    """Raises UserError if the file is not a `vlm-profile/1`."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); make it with `profile --out`") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; make it with `profile --out`") from None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a {SCHEMA} file; make it with `profile --out`")
    if missing := [name for name in ("valid", "environment", "profiles") if name not in value]:
        raise UserError(f"{path} lacks {missing[0]!r}; make it again with `profile --out`")
    return value


def pair_up(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], statistic: str = "p50") -> list[Row]:
    """Rows for models with the same backend, precision and device; by name where that leaves a choice."""
    rows = []
    for old in before:
        same, peers = ([one for one in side if _kind(one) == _kind(old)] for side in (after, before))
        if len(same) > 1 or len(peers) > 1:
            same = [new for new in same if new["model"]["id"] == old["model"]["id"]]
        if len(same) == 1:
            rows += _rows(old, same[0], statistic)
    return rows


def _kind(profile: dict[str, Any]) -> tuple[str, str, str]:
    model = profile["model"]
    return model["backend"], model["dtype"], model["device"]


def _rows(old: dict[str, Any], new: dict[str, Any], statistic: str) -> list[Row]:
    rows = []
    reduce = STATISTICS[statistic]
    for metric in METRICS:
        a, b = ([r[metric] for r in p["requests"] if r[metric] is not None] for p in (old, new))
        if not a or not b:
            continue
        rng = np.random.default_rng(0)
        drawn = [np.array(v, np.float64)[rng.integers(0, len(v), (ROUNDS, len(v)))] for v in (a, b)]
        low, high = np.quantile(reduce(drawn[1], axis=1) / reduce(drawn[0], axis=1), [0.025, 0.975])
        name = f"{new['model']['id']} ({new['model']['backend']} {new['model']['dtype']})"
        first, second = float(reduce(a)), float(reduce(b))
        rows.append(Row(name, metric, first, second, second / first, (float(low), float(high)), statistic))
    return rows


def _different_conditions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found = [f"{name} says itself that it is not valid" for name, v in (("A", before), ("B", after)) if not v["valid"]]
    for name in ("cpu", "usable_cores"):
        a, b = before["environment"]["host"][name], after["environment"]["host"][name]
        if a != b:
            found.append(f"not the same machine: {name} {a} and {b}")
    threads = [{p["model"]["threads"] for p in value["profiles"]} for value in (before, after)]
    if threads[0] != threads[1]:
        found.append(f"not the same threads: {_listed(threads[0])} and {_listed(threads[1])}")
    for name in ("image_px", "image_tokens", "text_tokens", "output_tokens"):
        values = [{str(p["scenario"][name]) for p in value["profiles"]} for value in (before, after)]
        if values[0] != values[1]:
            found.append(f"not the same work: {name} {', '.join(values[0])} and {', '.join(values[1])}")
    return found


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted("unknown" if value is None else str(value) for value in values))
