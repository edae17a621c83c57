"""The embedded default task: grids of handwritten digits with questions that make a model look at one place.

The scans are the UCI optical digits shipped inside scikit-learn (1,797 images of 8 x 8). Train and test are split
by scan, never by composition, so a test image shows only handwriting the student has not seen.
Needs scikit-learn, imported on first use.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm.errors import MissingPiece, UserError

Split = Literal["train", "validation", "test"]
CELL = 32
GRID = 2
SIDE = CELL * GRID
TEST_SCANS = 397
VALIDATION_SCANS = 150
PLACES = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("where", "row", "column", "sum", "largest")


@dataclass(frozen=True)
class Sample:
    """One question about one image; `kind` is one of KINDS."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    digits: tuple[int, int, int, int]


@functools.cache
def _scans() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPiece("the digits task needs scikit-learn; run `pip install scikit-learn`") from None
    data = load_digits()
    return (data.images * (255 / 16)).round().astype(np.uint8), data.target.astype(np.int64)


@functools.cache
def scan_indices(split: Split) -> npt.NDArray[np.int64]:
    """Indices of the scans of a split: a fixed shuffle, test first, then validation, then train."""
    order = np.random.default_rng(20260210).permutation(len(_scans()[1]))
    held_out = TEST_SCANS + VALIDATION_SCANS
    return {"test": order[:TEST_SCANS], "validation": order[TEST_SCANS:held_out], "train": order[held_out:]}[split]


def sample(split: Split, index: int, seed: int = 0, augment: bool = False) -> Sample:
    """The `index`-th sample of an endless, reproducible stream.

    Args:
        seed: another stream over the same scans.
        augment: shift, turn, scale and re-ink each scan (used to train the teacher).

    Raises:
        UserError: a negative seed. MissingPiece: scikit-learn is not installed.
    """
    if seed < 0:
        raise UserError(f"seed must be 0 or more, got {seed}")
    images, labels = _scans()
    rng = np.random.default_rng([seed, index, ("train", "test", "validation").index(split)])
    chosen = rng.choice(scan_indices(split), GRID * GRID, replace=True)
    digits = tuple(int(labels[i]) for i in chosen)
    canvas = Image.new("L", (SIDE, SIDE))
    for place, scan in enumerate(chosen):
        cell = Image.fromarray(images[scan]).resize((CELL, CELL), Image.Resampling.BICUBIC)
        if augment:
            cell = _augment(cell, rng)
        canvas.paste(cell, (CELL * (place % GRID), CELL * (place // GRID)))
    a, b, c, d = digits
    question, answer, kind = _ask((a, b, c, d), rng)
    return Sample(canvas.convert("RGB"), question, answer, kind, (a, b, c, d))


def _augment(cell: Image.Image, rng: np.random.Generator) -> Image.Image:
    angle, scale = rng.uniform(-15, 15) * np.pi / 180, rng.uniform(0.85, 1.15)
    shear = rng.uniform(-0.15, 0.15)
    dx, dy = rng.uniform(-3.0, 3.0, 2)
    cos, sin, centre = np.cos(angle) / scale, np.sin(angle) / scale, CELL / 2
    a, b, d, e = cos, sin + shear, -sin, cos
    coefficients = (a, b, centre - a * centre - b * centre + dx, d, e, centre - d * centre - e * centre + dy)
    turned = cell.transform((CELL, CELL), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    ink = np.asarray(turned, np.float32) / 255
    ink = np.clip(ink ** rng.uniform(0.7, 1.4) * rng.uniform(0.75, 1.1) + rng.normal(0, 0.03, ink.shape), 0, 1)
    return Image.fromarray((ink * 255).astype(np.uint8))


def _ask(digits: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[str, str, str]:
    kind = KINDS[rng.choice(len(KINDS), p=(0.3, 0.2, 0.2, 0.2, 0.1))]
    style = int(rng.integers(2))
    if kind == "where":
        place = int(rng.integers(4))
        name = PLACES[place]
        question = (f"Which digit is at the {name}?", f"What is written in the {name} corner?")[style]
        return question, str(digits[place]), kind
    if kind == "largest":
        return ("What is the largest digit?", "Which of the four digits is the highest?")[style], str(max(digits)), kind
    if kind == "column" or (kind == "sum" and rng.integers(2)):
        side = int(rng.integers(2))
        name, pair = ("left column", "right column")[side], (digits[side], digits[side + 2])
    else:
        line = int(rng.integers(2))
        name, pair = ("top row", "bottom row")[line], (digits[2 * line], digits[2 * line + 1])
    if kind == "sum":
        question = (f"Add up the {name}.", f"What is the sum of the {name}?")[style]
        return question, f"{pair[0]} + {pair[1]} = {sum(pair)}", kind
    return (f"Read the {name}.", f"Which digits are in the {name}?")[style], f"{pair[0]} {pair[1]}", kind


def texts() -> list[str]:
    """Every question and answer form, for training a tokenizer."""
    drawn = (sample("train", i) for i in range(2000))
    return sorted({text for s in drawn for text in (s.question, s.answer)})


def data_sha256() -> str:
    """Fingerprint of the scans and the split, for provenance."""
    import hashlib

    images, labels = _scans()
    digest = hashlib.sha256(images.tobytes())
    digest.update(labels.tobytes())
    digest.update(scan_indices("test").tobytes())
    return digest.hexdigest()
