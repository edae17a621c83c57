"""Handwritten digits a person can click instead of looking for an image."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vlm import digits
from vlm.errors import MissingPiece

WANTED = ("where", "row", "sum", "column", "largest", "sum")


@dataclass(frozen=True)
class Example:
    """A test image on disk, exactly as the model gets it (64 x 64; the page enlarges it), and a question about it."""

    path: Path
    question: str


def write(folder: Path) -> tuple[Example, ...]:
    """Draw one example per wanted kind of question from the test split; none without scikit-learn."""
    found: list[Example] = []
    try:
        for index in range(200):
            if len(found) == len(WANTED):
                break
            sample = digits.sample("test", index)
            if sample.kind == WANTED[len(found)]:
                path = folder / f"digits-{len(found)}.png"
                sample.image.save(path)
                found.append(Example(path, sample.question))
    except MissingPiece:  # a board without scikit-learn shows the page without examples
        return ()
    return tuple(found)


def render(examples: tuple[Example, ...]) -> str:
    """A row of buttons; the images travel inside the page, so that they appear at once."""
    cards = "".join(
        f'<button type="button" class="example" data-index="{index}">'
        f'<img alt="Four handwritten digits" src="data:image/png;base64,{_base64(example.path)}">'
        f"<span>{escape(example.question)}</span></button>"
        for index, example in enumerate(examples)
    )
    return f'<p class="examples-title">Or try one of these handwritten digits</p><div class="examples" role="group" aria-label="Examples">{cards}</div>'


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
