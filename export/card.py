"""README.md of an artefact: where it comes from, what was measured, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.console import table
from vlm.manifest import Manifest


def card(name: str, manifest: Manifest) -> str:
    """Markdown for a person who finds the folder; every figure is taken from the manifest."""
    source, scores = manifest.source, manifest.accuracy
    facts = [
        ("format", f"{manifest.format}, decoder {manifest.precision['decoder']['type']}"),
        ("verified", "yes" if manifest.verified else "NO: " + "; ".join(manifest.parity["failures"])),
        ("student sha256", str(source["student_sha256"])),
        ("objective", _text(source.get("objective"))),
        ("teacher", _text(source.get("teacher"))),
        ("data", _text(source.get("data"))),
        ("licence", _text(source.get("licence"))),
        ("created", manifest.created),
        ("tools", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
    ]
    weights = [
        (part, str(value["type"]), f"{value['bits_per_weight']:.2f}", _text(value["fallbacks"] or None))
        for part, value in manifest.precision.items()
    ]
    gate, worst = manifest.parity["gate"], manifest.parity["worst"]
    measured = [(key, f"{value:.3g}", f"{gate[key]:.3g}" if key in gate else "-") for key, value in worst.items()]
    files = [(f"`{entry.path}`", entry.role, str(entry.bytes)) for entry in manifest.files]
    return (
        "\n\n".join(
            [
                f"# {name}",
                table(("fact", "value"), facts),
                "## Weights",
                table(("part", "type", "bits per weight", "fallbacks"), weights),
                "## Against PyTorch (logits per unit of their standard deviation, worst case)",
                table(("measure", "value", "limit"), measured),
                "## Answers",
                _answers(scores),
                "## Files",
                table(("path", "role", "bytes"), files),
                f"Replay on this machine: `python -m export verify {name}`",
            ]
        )
        + "\n"
    )


def _answers(scores: dict[str, Any]) -> str:
    if not scores["n"]:
        return "No greedy answers were compared."
    low, high = scores["tokens_equal_interval"]
    text = f"{scores['n']} unseen samples: {scores['tokens_equal']:.2%} token for token as PyTorch ({low:.2%} to {high:.2%})."
    if scores["task"]:
        text += f" Exact match on {scores['task']}: {scores['before']:.2%} before, {scores['after']:.2%} after."
    return text


def _text(value: Any) -> str:
    """One table cell; nested values as `key value` pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "-" if value is None else str(value).replace("|", "/")


def write_card(root: Path, name: str, manifest: Manifest) -> Path:
    path = root / "README.md"
    path.write_text(card(name, manifest))
    return path
