"""The report of `distill check` as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm.console import table

if TYPE_CHECKING:
    from distill.check import StageReport

MARKS = {"ok": "ok  ", "warn": "note", "fail": "FAIL"}
TOKEN_ROWS = 60


def size(count: float) -> str:
    """Bytes for a person."""
    if not math.isfinite(count):
        return "?"
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.{1 if power == 30 else 0}f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for a person."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def printed(report: StageReport, number: int) -> str:
    """Everything about one stage; `number` 0 where there is only one."""
    config = report.config
    title = f"stage {number}, {report.name}: " if number else ""
    title += f"{config.objective}, {config.steps} steps of {config.batch_size} x {config.accumulate} samples"
    parts = [f"== {title} ==", *(f"note: {line}" for line in report.notes)]
    parts += ["", "data", _data(report), "", "tokens (one sample, padded to the longest)", _tokens(report)]
    parts += ["", "vocabulary", _vocabulary(report.vocabulary), "", "first step, one sample", _terms(report.terms)]
    parts += ["", "memory and time", _resources(report)]
    if report.gains:
        parts += ["", "blind-image test: right images against exchanged ones", _gains(report)]
    parts += ["", "checks", *(f"  {MARKS[f.status]}  {f.name}: {f.text}" for f in report.findings), ""]
    return "\n".join(parts)


def _data(report: StageReport) -> str:
    data = report.data
    rows = [
        [name, *(str(v) for v in values.values())]
        for name, values in (("tokens", data.length), ("trained", data.response))
    ]
    text = table(["a sample", *data.length], rows)
    known = "" if data.looked_at == data.samples else f", {data.looked_at} of them read here"
    return f"{text}\n{data.samples} samples{known}; {data.images_per_sample:g} images each, {data.without_image} without one"


def _tokens(report: StageReport) -> str:
    header = ["token", "id", "text", "span", "position", "trained"]
    return table(header, _shortened([row.cells() for row in report.tokens]))


def _shortened(rows: Sequence[list[str]]) -> list[list[str]]:
    if len(rows) <= TOKEN_ROWS:
        return list(rows)
    left_out = len(rows) - TOKEN_ROWS
    middle = ["...", "", f"({left_out} more; --json has them all)", "", "", ""]
    return [*rows[: TOKEN_ROWS // 2], middle, *rows[-TOKEN_ROWS // 2 :]]


def _vocabulary(value: dict[str, Any]) -> str:
    rows = []
    for who in ("teacher", "student"):
        if who in value:
            one = value[who]
            rows.append([who, *(f"{one[name]:,}" for name in ("tokens", "rows", "padded_rows"))])
    text = table(["model", "tokens", "embedding rows", "rows without a token"], rows)
    if "teacher" not in value:
        return text
    differing = value["special_tokens_that_differ"]
    lines = [f"{value['shared']:,} rows are compared; special tokens " + ("agree" if not differing else "differ:")]
    lines += [f"  {d['token']}: student {d['student']}, teacher {d['teacher']}" for d in differing]
    return "\n".join([text, *lines])


def _terms(terms: dict[str, float]) -> str:
    return table(list(terms), [[f"{value:.4f}" for value in terms.values()]]) if terms else "no step could be taken"


def _resources(report: StageReport) -> str:
    config, times = report.config, report.times
    rows = [[str(p.size), size(p.peak_bytes), duration(p.seconds), "measured"] for p in report.points]
    if report.points and report.points[-1].size != config.batch_size:
        known = [str(config.batch_size), size(report.memory_needed), duration(times.step_longest)]
        rows.append([*known, f"calculated: {report.stopped}"])
    text = table(["batch size, longest samples", "peak memory", "a step", ""], rows)
    disk = report.disk
    lines = [
        f"memory: {report.memory_method}",
        f"time: {duration(times.step)} a step with samples as they come; the {config.steps} x {config.accumulate} steps take "
        f"about {duration(times.total)}, {duration(times.total_longest)} were all as long as the longest (without "
        "evaluation and saving)",
        f"disk: up to {size(disk.peak)}: {disk.kept + 1} checkpoints of {size(disk.checkpoint)}, "
        f"{f'the best student twice ({size(disk.best)}), ' if disk.best else ''}the student "
        f"{size(disk.student)}",
    ]
    return "\n".join([text, *lines])


def _gains(report: StageReport) -> str:
    rows = [
        [
            gain.who,
            gain.term,
            f"{gain.right:.4f}",
            f"{gain.exchanged:.4f}",
            f"{gain.gain:+.4f} ({gain.interval[0]:+.4f} to {gain.interval[1]:+.4f})",
            "yes" if gain.sees else "no",
        ]
        for gain in report.gains
    ]
    text = table(["model", "term", "right", "exchanged", "gain, 95 % interval", "sees"], rows)
    return (
        f"{text}\n{report.gains[0].n} samples, each with its own and another's image; the teacher always sees its own"
    )
