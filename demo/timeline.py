"""An engine's events -> numbers -> the latency breakdown under an answer. Pure: no clock, no widgets.

Every number comes from the engine. A browser, a queue of messages and a chat widget lie between the engine and the
eye; timing them would tell a person about this page, not about the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from demo.instruments import Cost
from runtime.api import STAGES, Done, Event, Finish, Stage
from runtime.latency import Timing, timing

LABELS: dict[Stage, str] = {
    "queue": "queue",
    "image_decode": "image decode",
    "preprocess": "preprocess",
    "vision_encode": "vision",
    "prefill": "prefill",
    "decode": "decode",
    "detokenize": "detokenize",
}
MEANING: dict[Stage, str] = {
    "queue": "in the engine's own line",
    "image_decode": "file bytes to RGB",
    "preprocess": "resize, normalise, tokenise",
    "vision_encode": "vision tower and projector",
    "prefill": "the prompt, up to the first token",
    "decode": "every token after the first",
    "detokenize": "token ids to text",
}
ENDS: dict[Finish, str] = {
    "stop": "",
    "length": "cut at the token limit",
    "cancelled": "stopped by you",
    "deadline": "cut at the time limit",
}


@dataclass(frozen=True)
class StageTime:
    """One stage of one answer, all its spans added up."""

    stage: Stage
    ms: float
    cached: bool


@dataclass(frozen=True)
class Breakdown:
    """Where the time of one answer went; every stage is present, at 0 ms if it did not happen."""

    stages: tuple[StageTime, ...]
    timing: Timing
    finish: Finish

    @property
    def total_ms(self) -> float:
        return self.timing.e2el_ms

    @property
    def sum_ms(self) -> float:
        return sum(stage.ms for stage in self.stages)

    @property
    def tokens_per_s(self) -> float | None:
        return 1000 / self.timing.tpot_ms if self.timing.tpot_ms else None


def break_down(events: Sequence[Event]) -> Breakdown:
    """All events of one finished request -> its breakdown.

    Raises:
        ValueError: the last event is not Done.
    """
    measured = timing(events)
    done = events[-1]
    if not isinstance(done, Done):
        raise ValueError("the request did not finish")
    cached = {span.stage for span in done.spans if span.cached}
    stages = tuple(StageTime(stage, measured.stages_ms.get(stage, 0.0), stage in cached) for stage in STAGES)
    return Breakdown(stages, measured, done.finish)


def milliseconds(value: float) -> str:
    """Three significant digits are what one run can support."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def render(view: Breakdown, model: str, first: bool = False, cost: Cost | None = None) -> str:
    """The breakdown as HTML: headline figures, a stacked bar, one label per stage, and the same as a table.

    Args:
        model: whose answer this is; escaped here.
        first: the first answer since the model was loaded, which pays for caches and lazy set-up.
        cost: what the answer took of the machine; left out where nobody looked.
    """
    adds_up = f"stages add up to {milliseconds(view.sum_ms)} of {milliseconds(view.total_ms)} ms"
    remarks = [escape(model), adds_up, ENDS[view.finish], "first answer since loading" if first else ""]
    return (
        f'<section class="lat" aria-label="Latency breakdown" data-total-ms="{view.total_ms:.6f}"'
        f' data-finish="{view.finish}">'
        f"{_headline(view, cost)}{_bar(view)}{_labels(view)}{_table(view)}"
        f'<p class="lat-note">{" · ".join(filter(None, remarks))}</p></section>'
    )


def _headline(view: Breakdown, cost: Cost | None) -> str:
    figures = [
        ("total", _or_dash(view.total_ms), "ms", "End to end: from the request's arrival to the last piece of text"),
        ("first token", _or_dash(view.timing.ttft_ms), "ms", "TTFT: time to first token, image decoding included"),
        (
            "per token",
            _or_dash(view.timing.tpot_ms),
            "ms",
            "TPOT: mean time per token after the first, up to the end of the answer",
        ),
        ("tokens/s", _or_dash(view.tokens_per_s), "", "Decode speed: the inverse of TPOT"),
        (
            "tokens",
            _or_dash(view.timing.completion_tokens, "not counted", ".0f"),
            "",
            "Generated, the end mark included",
        ),
        ("from cache", cache_text(view.timing), "", "Prompt tokens and images that were not computed again"),
    ]
    if cost is not None:
        share = None if cost.mbu.value is None else 100 * cost.mbu.value
        meaning = f"Model bandwidth utilisation while decoding: {cost.mbu.reason}"
        shown = _or_dash(share, cost.mbu.reason, ".0f", cost.mbu.instead)
        figures.append(("MBU", shown, "" if share is None else "%", meaning))
        unit = "" if cost.joules.value is None else "J"
        meaning = f"Energy of this answer: {cost.joules.reason}"
        figures.append(("energy", _or_dash(cost.joules.value, cost.joules.reason, ".3g"), unit, meaning))
    cells = "".join(
        f'<div data-figure="{name}" title="{escape(meaning)}"><dt>{name}</dt><dd>{value}{f"<span> {unit}</span>" if unit else ""}</dd></div>'
        for name, value, unit, meaning in figures
    )
    return f'<dl class="lat-figures">{cells}</dl>'


def cache_text(timing: Timing) -> str:
    """`17 of 40 tokens, 1 image`; "nothing" if all was computed."""
    parts = []
    if timing.cached_tokens:
        parts.append(f"{timing.cached_tokens} of {timing.prompt_tokens} tokens")
    if timing.cached_images:
        parts.append(f"{timing.cached_images} image{'s' if timing.cached_images > 1 else ''}")
    unknown = timing.cached_tokens is None
    return ", ".join(parts) or (_or_dash(None, "the server does not say") if unknown else "nothing")


def _or_dash(value: float | None, reason: str = "needs more tokens", form: str = "", instead: str = "n/a") -> str:
    if value is None:
        return f'<abbr title="{escape(reason)}">{instead}</abbr>'
    return format(value, form) if form else milliseconds(value)


def _bar(view: Breakdown) -> str:
    spoken = ", ".join(f"{LABELS[stage.stage]} {milliseconds(stage.ms)} ms" for stage in view.stages)
    segments = "".join(
        f'<i class="lat-{stage.stage}" style="flex-grow:{stage.ms:.6f}" title="{_tip(stage, view)}"></i>'
        for stage in view.stages
        if stage.ms > 0
    )
    return f'<div class="lat-bar" role="img" aria-label="Stages: {spoken}">{segments}</div>'


def _labels(view: Breakdown) -> str:
    items = "".join(
        f'<li title="{_tip(stage, view)}"><i class="lat-{stage.stage}" aria-hidden="true"></i>'
        f"<span>{LABELS[stage.stage]}</span><b>{milliseconds(stage.ms)} ms</b></li>"
        for stage in view.stages
    )
    # the table says the same to a screen reader, with headings
    return f'<ul class="lat-labels" aria-hidden="true">{items}</ul>'


def _tip(stage: StageTime, view: Breakdown) -> str:
    cached = ", from cache" if stage.cached else ""
    return f"{LABELS[stage.stage]}: {milliseconds(stage.ms)} ms, {_share(stage.ms, view)}{cached}"


def _share(ms: float, view: Breakdown) -> str:
    return f"{100 * ms / view.total_ms:.1f} %" if view.total_ms else "0.0 %"


def _table(view: Breakdown) -> str:
    rows = "".join(
        f'<tr data-stage="{stage.stage}" data-ms="{stage.ms:.6f}"><th scope="row">{LABELS[stage.stage]}</th>'
        f"<td>{milliseconds(stage.ms)}</td><td>{_share(stage.ms, view)}</td>"
        f"<td>{MEANING[stage.stage]}{' (from cache)' if stage.cached else ''}</td></tr>"
        for stage in view.stages
    )
    return (
        '<details class="lat-more"><summary>All stages as a table</summary><div><table>'
        '<thead><tr><th scope="col">stage</th><th scope="col">ms</th><th scope="col">share</th>'
        f'<th scope="col">what</th></tr></thead><tbody>{rows}</tbody>'
        f'<tfoot><tr><th scope="row">sum of stages</th><td class="lat-sum">{milliseconds(view.sum_ms)}</td>'
        f"<td>{_share(view.sum_ms, view)}</td><td>of {milliseconds(view.total_ms)} ms end to end</td></tr></tfoot>"
        f"</table><p>Prompt: {view.timing.prompt_tokens} tokens, {view.timing.image_tokens} of them from the image.</p>"
        "</div></details>"
    )
