"""The picture of a run: loss terms and held-out accuracy over steps, from metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TERM_COLOURS = {"loss": "#24292f", "sft": "#1f6feb", "kd": "#bf3989", "iva": "#1a7f37", "tpa": "#bc4c00"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The log lines of a run, in order."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def loss_curve(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG: one line per term (log scale), held-out terms as dots, exact match on the right-hand plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, colour in TERM_COLOURS.items():
        points = [(m["step"], m[name]) for m in metrics if name in m]
        if points:
            left.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=1.4)
        held_out = [(m["step"], m[f"eval_{name}"]) for m in metrics if f"eval_{name}" in m]
        if held_out:
            left.scatter(*zip(*held_out, strict=True), color=colour, s=22, zorder=3)
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("loss (dots: held out)")
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, ncols=5, fontsize=8)
    matches = [(m["step"], m["eval_exact_match"]) for m in metrics if "eval_exact_match" in m]
    if matches:
        right.plot(*zip(*matches, strict=True), color="#1f6feb", marker="o")
    right.set_ylim(0, 1)
    right.set_xlabel("step")
    right.set_ylabel("exact match, held out")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
