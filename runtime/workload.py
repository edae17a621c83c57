"""Images for speed runs: every request gets another one, so that no cache can answer for the model."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from runtime.images import decode_image, read_image, to_pillow
from vlm import digits
from vlm.errors import MissingPiece

SIDE = 224


@dataclass(frozen=True)
class Workload:
    """Where the images come from: a photograph, or the digits test scans, each under seeded noise."""

    name: str
    seed: int
    photo: Pillow.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of every image in pixels."""
        if self.photo is not None:
            return self.photo.size
        return (digits.SIDE, digits.SIDE) if self.name == "digits" else (SIDE, SIDE)

    def png(self, index: int) -> bytes:
        """The `index`-th image as a PNG file."""
        rng = np.random.default_rng([self.seed, index])
        base = self.photo
        if base is None and self.name == "digits":
            base = digits.sample("test", index, self.seed).image
        if base is None:
            base = Pillow.new("RGB", (SIDE, SIDE), (128, 128, 128))
        noisy = np.asarray(base, np.int16) + rng.integers(-8, 9, (base.height, base.width, 3), np.int16)
        buffer = io.BytesIO()
        Pillow.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()


def make_workload(image: Path | None, seed: int) -> Workload:
    """Noise over `image`; without one, over digits, or over grey where scikit-learn is not installed."""
    if image is not None:
        return Workload(f"{image.name} + noise", seed, to_pillow(decode_image(read_image(image))))
    try:
        digits.scan_indices("test")
    except MissingPiece:
        return Workload("grey + noise", seed)
    return Workload("digits", seed)
