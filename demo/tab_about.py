"""The About tab: where a model comes from, how large it is, how near to PyTorch, how often right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from demo.catalogue import Entry, size_text
from vlm.errors import ToolError
from vlm.files import read_json
from vlm.manifest import NAME, Manifest, read_manifest

ABSENT = "–"
PROVENANCE = "vlm.json"  # what training leaves beside a checkpoint


def render(entry: Entry) -> str:
    """The model card, read anew from the artefact's manifest or the checkpoint's provenance."""
    try:
        is_artefact = (entry.path / NAME).is_file()
        body = _artefact(read_manifest(entry.path)) if is_artefact else _checkpoint(entry)
    except ToolError as error:
        body = f'<p class="warning">{escape(error.message)}</p>'
    return f'<article class="about" aria-label="Model card"><h2>{escape(entry.name)}</h2>{body}</article>'


def _artefact(found: Manifest) -> str:
    verdict = "yes: every gate held" if found.verified else "NO: not every gate held; do not trust its answers yet"
    source = found.source
    facts = {
        "format": found.format,
        "verified against PyTorch": verdict,
        "created": found.created,
        "student": source.get("student"),
        "student sha256": source.get("student_sha256"),
        "teacher": _flat(source.get("teacher")),
        "objective": source.get("objective"),
        "recipe": source.get("recipe"),
        "data": _flat(source.get("data")),
        "licence": source.get("licence"),
        "tools": _flat(found.tools),
    }
    return (
        _table("Provenance", ("fact", "value"), facts.items(), "texts")
        + _table("Weights", ("part", "type", "bits per weight", "kept at higher precision"), _weights(found.precision))
        + _table("Files", ("file", "role", "size"), ((f.path, f.role, size_text(f.bytes)) for f in found.files))
        + _parity(found.parity)
        + _accuracy(found.accuracy)
    )


def _checkpoint(entry: Entry) -> str:
    path = entry.path / PROVENANCE
    known = read_json(path) if path.is_file() else {}
    facts = {
        "format": "PyTorch checkpoint: the reference artefacts are verified against",
        "size": size_text(entry.bytes),
        "precision": entry.precision,
        **{name: value if name == "recipe" else _flat(value) for name, value in known.items()},
    }
    return _table("Provenance", ("fact", "value"), facts.items(), "texts")


def _weights(precision: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    for part, value in precision.items():
        if isinstance(value, dict):
            bits = value.get("bits_per_weight")
            kept = len(value.get("fallbacks") or ())
            yield part, value.get("type"), None if bits is None else f"{bits:.2f}", kept or "none"
        else:
            yield part, value, None, None


def _parity(parity: Mapping[str, Any]) -> str:
    worst, gate = parity.get("worst") or {}, parity.get("gate") or {}
    rows = [(name, _number(value), _number(gate.get(name))) for name, value in worst.items()]
    return _table("Parity with PyTorch, worst case", ("measure", "value", "limit"), rows)


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    rows = [
        (title, _number(accuracy.get(key)), _interval(accuracy.get(f"{key}_interval")))
        for title, key in (
            ("PyTorch student", "before"),
            ("this artefact", "after"),
            ("same tokens as PyTorch", "tokens_equal"),
        )
        if accuracy.get(key) is not None
    ]
    title = f"Accuracy on {accuracy.get('task', 'no task')}, n = {accuracy.get('n', 0)}"
    return _table(title, ("answers", "share", "95 % interval"), rows)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "numbers") -> str:
    """A titled table; without rows it says that nothing is known.

    Args:
        kind: CSS class; rows of "numbers" stay on one line, where a screen is narrow the table scrolls.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = ""
    for first, *others in rows:
        cells = "".join(f"<td>{_cell(value)}</td>" for value in others)
        body += f'<tr><th scope="row">{_cell(first)}</th>{cells}</tr>'
    if not body:
        return f"<h3>{escape(title)}</h3><p>Not recorded.</p>"
    return (
        f'<h3>{escape(title)}</h3><div class="wide"><table class="figures {kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, dict):  # too much to read past
        return f"<details><summary>{len(value)} settings</summary>{escape(_flat(value) or '')}</details>"
    return ABSENT if value is None or value == "" else escape(str(value))


def _flat(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(part)}" for name, part in value.items() if part not in (None, "", {}))
    return None if value is None else str(value)


def _number(value: Any) -> str | None:
    return f"{value:.3g}" if isinstance(value, int | float) else None


def _interval(value: Any) -> str | None:
    return f"{value[0]:.3g} to {value[1]:.3g}" if isinstance(value, list | tuple) and len(value) == 2 else None
