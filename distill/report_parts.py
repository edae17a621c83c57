"""Sections of the HTML report, each a string of HTML with every foreign text escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distill import report

if TYPE_CHECKING:
    from distill.report_html import Record

NUMBERS = {"steps": "steps", "batch": "samples a step", "lr": "learning rate", "seed": "seed"}


def text(value: Any) -> str:
    """A value for a table cell, escaped."""
    if value is None or value == "":
        return '<span class="none">not measured</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return html.escape(", ".join(str(item) for item in value))
    return html.escape(str(value))


def duration(seconds: float | None) -> str | None:
    """Seconds for a person."""
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def accuracy(column: dict[str, Any]) -> str | None:
    """Exact match with its interval, or its spread over seeds."""
    if column["exact_match"] is None:
        return None
    if column.get("spread") is not None:
        return f"{column['exact_match']:.3f} ± {column['spread']:.3f}"
    if column["interval"]:
        low, high = column["interval"]
        return f"{column['exact_match']:.3f} ({low:.3f} to {high:.3f})"
    return f"{column['exact_match']:.3f}"


def headline(stages: Sequence[Record], own: dict[str, Any], data: dict[str, Any]) -> str:
    """The figures somebody opens the page for; of several stages the last one's, and what all took together."""
    record = stages[-1]
    finished = bool(record.result)
    verdict = [m["visual_verdict"] for m in record.metrics if "visual_verdict" in m]
    gain = None if own["visual_gain"] is None else f"{own['visual_gain']:.3f}"
    score = None if own["exact_match"] is None else f"{own['exact_match']:.3f}"
    low, high = own["interval"] or (0.0, 1.0)
    tiles = [
        (f"exact match ({low:.3f} to {high:.3f}, n = {own['n']})", score),
        (f"visual gain, {verdict[-1]}" if verdict else "visual gain", gain),
        ("steps", str(sum(one.config["steps"] for one in stages))),
        ("training time", duration(sum(one.result.get("seconds") or 0.0 for one in stages) or None)),
    ]
    teacher = (record.result.get("teacher") or {}).get("name") or record.config.get("teacher")
    said = [
        f"{' → '.join(one.config['objective'] for one in stages)} on {data.get('name', 'unnamed data')}",
        f"seed {own['seed']}",
    ]
    said += [f"teacher {teacher}"] if teacher else []
    said += [record.result["created"].replace("T", " ").replace("+00:00", " UTC")] if finished else ["not finished yet"]
    cells = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in tiles if value
    )
    return f'<p class="lead">{html.escape(", ".join(said))}</p><div class="tiles">{cells}</div>'


def columns(found: Sequence[dict[str, Any]]) -> str:
    """This run and its controls side by side."""
    rows: list[tuple[str, list[Any]]] = [("objective", [column["objective"] for column in found])]
    rows += [(label, [column[key] for column in found]) for key, label in NUMBERS.items()]
    rows.append(("exact match", [accuracy(column) for column in found]))
    terms = ("sft", "kd", "iva", "tpa", "concept", "traj")
    for key in (*(f"held out {term}" for term in terms), "visual_gain"):
        values = [column.get(key) for column in found]
        if any(value is not None for value in values):
            rows.append((key.replace("_", " "), values))
    rows.append(("training time", [duration(column["seconds"]) for column in found]))
    head = "".join(
        f"<th{' class=own' if number == 0 else ''}>{html.escape(column['name'])}</th>"
        for number, column in enumerate(found)
    )
    body = "".join(f"<tr><th>{html.escape(name)}</th>{_cells(values)}</tr>" for name, values in rows)
    return _section(
        "Beside other runs",
        f'<div class="wide"><table class="columns"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "<p class=note>Exact match with its 95 % interval over samples, or mean ± standard deviation over seeds. Held-out "
        "terms are the last ones measured during training; a term a run was not trained on is not measured in it.</p>",
    )


def _cells(values: Sequence[Any]) -> str:
    return "".join(
        f"<td{' class=own' if number == 0 else ''}>{text(value)}</td>" for number, value in enumerate(values)
    )


def stage(number: int, record: Record, total: int) -> str:
    """Curves and IRS of one training."""
    from distill import irs

    key = f"{number}-{record.name}"
    figures = []
    terms, scores = report.term_panels(record.metrics), report.score_panels(record.metrics)
    if terms is not None:
        figures.append(f"<figure>{report.svg(terms, key + 'terms')}</figure>")
    if scores is not None:
        figures.append(f"<figure>{report.svg(scores, key + 'scores')}</figure>")
    if not figures:
        figures.append("<p class=none>nothing logged yet</p>")
    if record.irs is not None:
        value = {name: record.irs[name] for name in record.irs if name != "best"}
        value |= {"scores": tuple(value["scores"]), "intervals": tuple(tuple(i) for i in value.get("intervals", ()))}
        found = irs.LayerScores(**value)
        figures.append(
            f'<figure class="half">{report.svg(irs.figure(found), key + "irs")}<figcaption>IRS of the teacher\'s layers: '
            f"how much the visual focus changes with the instruction. Layer {found.best} weights the visual tokens of iva; "
            f"bars are 95 % intervals over {found.pairs} pairs.</figcaption></figure>"
        )
    config = record.config
    told = f"{config['objective']}, {config['steps']} steps of {config['batch_size'] * config['accumulate']} samples"
    title = "Training" if total == 1 else f"Stage {number}: {record.name}"
    return _section(title, f"<p class=lead>{html.escape(told)}</p>{''.join(figures)}")


def samples(record: Record, others: Sequence[dict[str, Any]]) -> str:
    """Answers beside the reference; another run's where it was asked the same."""
    from distill.report_html import sample_key

    found = record.facts.get("samples")
    if not found:
        return ""
    beside = [column for column in others if any(sample_key(sample) in column["answers"] for sample in found)]
    names = [
        "reference",
        "student",
        *(["teacher"] if any("teacher" in s for s in found) else []),
        *(c["name"] for c in beside),
    ]
    rows = []
    for sample in found:
        image = f'<img src="{html.escape(sample["image"])}" alt="what the model saw">' if sample["image"] else ""
        cells = [f"<td class=reference>{text(sample['reference'])}</td>"]
        answers = [sample["student"], *([sample["teacher"]] if "teacher" in sample else [])]
        answers += [column["answers"].get(sample_key(sample)) for column in beside]
        cells += [_answer(answer, sample["reference"]) for answer in answers]
        rows.append(f"<tr><td class=thumb>{image}</td><td>{text(sample['question'])}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", "question", *names))
    split = record.facts.get("split", "")
    where = "training samples, which it has seen" if split == "training" else f"{split} samples, not trained on"
    return _section(
        "Answers",
        f'<div class="wide"><table class="samples"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f"<p class=note>{len(found)} {html.escape(where)}, taken evenly; greedy decoding from the saved student.</p>",
    )


def _answer(answer: str | None, reference: str) -> str:
    if answer is None:
        return f"<td>{text(None)}</td>"
    same = " ".join(answer.split()).casefold() == " ".join(reference.split()).casefold()
    mark = '<i class="yes" title="the reference">✓</i>' if same else '<i class="no" title="not the reference">✗</i>'
    return f"<td>{mark} {html.escape(answer) or '<span class=none>(empty)</span>'}</td>"


def data(value: dict[str, Any]) -> str:
    """The training data in figures."""
    if not value:
        return ""
    figures = value.get("figures")
    plain = {name: item for name, item in value.items() if name != "figures"}
    table = ""
    if figures:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in figures["length"])
        rows = "".join(
            f"<tr><th>{label}</th>{''.join(f'<td>{v}</td>' for v in figures[key].values())}</tr>"
            for key, label in (("length", "tokens a sample"), ("response", "trained tokens"))
        )
        table = f"<table class=columns><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
        plain["images a sample"] = figures["images_per_sample"]
    return _section("Data", _pairs(plain) + table)


def pairs(title: str, value: dict[str, Any]) -> str:
    """A section of names and values."""
    return _section(title, _pairs(value)) if value else ""


def _pairs(value: dict[str, Any]) -> str:
    return f"<dl>{''.join(f'<dt>{html.escape(str(k))}</dt><dd>{text(v)}</dd>' for k, v in value.items())}</dl>"


def recipe(record: Record) -> str:
    """Every option of a training, as a recipe that can be run again."""
    import yaml

    skipped = ("out", "resume")
    value = {name: item for name, item in record.config.items() if name not in skipped}
    shown = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    title = f"Recipe{f' of {record.name}' if record.name else ''}"
    return f"<section><details><summary><h2>{html.escape(title)}</h2></summary><pre>{html.escape(shown)}</pre></details></section>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"
