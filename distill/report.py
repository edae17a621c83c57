"""Pictures of a run: loss terms, held-out scores and the use of images over steps, from metrics.jsonl."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TERM_COLOURS = {"loss": "#24292f", "sft": "#1f6feb", "kd": "#bf3989", "iva": "#1a7f37", "tpa": "#bc4c00"}
TERM_COLOURS |= {"concept": "#0a7d91", "traj": "#8250df"}
TERM_NAMES = {
    "loss": "loss, weighted sum",
    "sft": "sft: next token",
    "kd": "kd: divergence on the answer",
    "iva": "iva: divergence at visual tokens",
    "tpa": "tpa: divergence after candidates",
    "concept": "concept: latents and the teacher's image",
    "traj": "traj: where latents look",
}
Point = tuple[float, float]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The log lines of a run, in order; none of a run shorter than its logging interval."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed process may be cut
            found.append(json.loads(line))
    return found


def series(metrics: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """(step, value) of one logged quantity, where it is a number."""
    return [(m["step"], float(m[name])) for m in metrics if isinstance(m.get(name), int | float)]


def loss_curve(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG: one line per term (log scale), held-out terms as dots, exact match on the right-hand plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, colour in TERM_COLOURS.items():
        points = series(metrics, name)
        if points:
            left.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=1.4)
        held_out = series(metrics, f"eval_{name}")
        if held_out:
            left.scatter(*zip(*held_out, strict=True), color=colour, s=22, zorder=3)
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("loss (dots: held out)")
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, ncols=5, fontsize=8)
    matches = series(metrics, "eval_exact_match")
    if matches:
        right.plot(*zip(*matches, strict=True), color="#1f6feb", marker="o")
    right.set_ylim(0, 1)
    right.set_xlabel("step")
    right.set_ylabel("exact match, held out")
    for axes in (left, right):
        _plain(axes)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def term_panels(metrics: Sequence[dict[str, Any]]) -> Any:
    """One panel a term: training as a line, held out as dots. None where nothing was logged."""
    names = [name for name in TERM_COLOURS if series(metrics, name) or series(metrics, f"eval_{name}")]
    # a single term is the loss itself
    if len(names) == 2 and names[0] == "loss":
        names = names[1:]
    if not names:
        return None
    panels = _panels(len(names))
    for axes, name in zip(panels.axes, names, strict=False):
        colour = TERM_COLOURS[name]
        training, held_out = series(metrics, name), series(metrics, f"eval_{name}")
        if training:
            axes.plot(*zip(*training, strict=True), color=colour, linewidth=1.3, alpha=0.85, label="training")
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), color=colour, marker="o", markersize=5, linewidth=0, label="held out"
            )
        values = [value for _, value in training + held_out]
        if min(values) > 0 and max(values) / min(values) > 5:
            _log_scale(axes)
        axes.set_title(TERM_NAMES[name], fontsize=9, loc="left", color=colour)
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    return panels


def score_panels(metrics: Sequence[dict[str, Any]]) -> Any:
    """Held-out accuracy and visual gain over steps. None where neither was measured."""
    matches, gain = series(metrics, "eval_exact_match"), series(metrics, "visual_gain")
    if not matches and not gain:
        return None
    panels = _panels(bool(matches) + bool(gain))
    free = list(panels.axes)
    if matches:
        axes = free.pop(0)
        axes.plot(*zip(*matches, strict=True), color="#1f6feb", marker="o", markersize=5, linewidth=1.3)
        axes.set_ylim(0, 1.02)
        axes.set_title("exact match, held out", fontsize=9, loc="left")
    if gain:
        _gain_panel(free.pop(0), metrics, gain)
    return panels


def _gain_panel(axes: Any, metrics: Sequence[dict[str, Any]], gain: list[Point]) -> None:
    low, high = dict(series(metrics, "visual_gain_low")), dict(series(metrics, "visual_gain_high"))
    steps = [step for step, _ in gain if step in low and step in high]
    if steps:
        bounds = [low[step] for step in steps], [high[step] for step in steps]
        axes.fill_between(steps, *bounds, color="#1a7f37", alpha=0.15, linewidth=0)
    axes.plot(*zip(*gain, strict=True), color="#1a7f37", marker="o", markersize=4, linewidth=1.3, label="student")
    teacher = series(metrics, "visual_gain_teacher")
    if teacher:
        axes.plot(*zip(*teacher, strict=True), color="#57606a", linestyle="--", linewidth=1.1, label="teacher")
    axes.axhline(0, color="#24292f", linewidth=0.8)
    axes.set_title("visual gain: what a wrong image costs an answer, nats a token", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="best")


def _panels(count: int) -> Any:
    """A figure with `count` plots, two a row."""
    from matplotlib.figure import Figure

    rows = -(-count // 2)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    for number, axes in enumerate(figure.subplots(rows, 2, squeeze=False).flat):
        if number >= count:
            figure.delaxes(axes)
            continue
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        _plain(axes)
    return figure


def _log_scale(axes: Any) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def svg(figure: Any, key: str) -> str:
    """A figure as an inline SVG element whose text stays text; `key` keeps its ids apart from other figures'."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # every figure calls its groups figure_1, axes_1 ...; nothing refers to them
    text = re.sub(r'<g id="[a-zA-Z0-9._]+_\d+">', "<g>", text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]+"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]+"', r"\1", text, count=1), count=1
    )
