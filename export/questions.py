"""The student's own questions from a file: what accuracy is measured on, and what calibration sees of the rest.

A record is `{"image": "a.png", "question": "...", "answer": "..."}`, `answers` being a list of accepted ones, or LLaVA's
`{"image": "a.png", "conversations": [...]}`, of which the first question and its answer are taken.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm import digits
from vlm.errors import UserError
from vlm.preprocess import open_image

PLACEHOLDER = "<image>"
FORMS = '{"image", "question", "answer" or "answers"} or {"image", "conversations"}'


@dataclass(frozen=True)
class Question:
    """One question about one image, decoded when it is asked; any of `answers` is right."""

    source: Image.Image | Path
    text: str
    answers: tuple[str, ...]

    def image(self) -> Image.Image:
        return open_image(self.source) if isinstance(self.source, Path) else self.source


def digit_questions(split: digits.Split, count: int, seed: int) -> list[Question]:
    """Of the embedded task."""
    drawn = (digits.sample(split, index, seed=seed) for index in range(count))
    return [Question(s.image, s.question, (s.answer,)) for s in drawn]


def read_questions(path: Path, images: Path | None = None) -> list[Question]:
    """All records of a JSON list or of JSON lines.

    Args:
        images: folder that image names are relative to; None takes the folder of the file.

    Raises:
        UserError: names the file, the record and what is wrong with it.
    """
    try:
        text = path.read_text()
        records = (
            json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(r) for r in text.splitlines() if r.strip()]
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path} cannot be read ({error}); name a JSON file of questions") from None
    except ValueError as error:
        raise UserError(f"--data {path} is neither a JSON list nor JSON lines ({error})") from None
    if not records:
        raise UserError(f"--data {path} holds no record; expected {FORMS}")
    folder = images or path.parent
    return [_question(f"--data {path}, record {index}", record, folder) for index, record in enumerate(records)]


def _question(where: str, record: Any, folder: Path) -> Question:
    if not isinstance(record, dict):
        raise UserError(f"{where} is a {type(record).__name__}; expected {FORMS}")
    name, turns = record.get("image"), record.get("conversations")
    if isinstance(turns, list):
        asked = [t.get("value") if isinstance(t, dict) else None for t in turns[:2]]
        text, answers = asked[0] if asked else None, asked[1:]
    else:
        text, answers = record.get("question"), record.get("answers", [record.get("answer")])
    if not (isinstance(text, str) and text.strip() and isinstance(name, str)):
        raise UserError(f"{where} has no image name or no question; expected {FORMS}")
    if not (isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)):
        raise UserError(f"{where} has no answer; expected {FORMS}")
    if not (folder / name).is_file():
        raise UserError(f"{where}: no image at {folder / name}; --images names the folder of the images")
    return Question(folder / name, text.replace(PLACEHOLDER, "").strip(), tuple(answers))


def divide(questions: Sequence[Question], samples: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Evaluation questions drawn at random, and the others, which are free to calibrate on."""
    order = np.random.default_rng(seed).permutation(len(questions)).tolist()
    return [questions[i] for i in order[:samples]], [questions[i] for i in order[samples:]]
