"""Built-in set-ups. `digits` trains from a committed teacher on data that ships with scikit-learn."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

from distill.assemble import Shape
from distill.config import TrainConfig
from vlm.errors import CheckpointError

DIGITS_TEACHER = Shape(vision_hidden=128, vision_layers=4, vision_intermediate=384, layers=4, intermediate=512)
# as in the paper, the student keeps the teacher's kind of tower; its decoder is half as deep and starts from scratch
DIGITS_STUDENT = dataclasses.replace(DIGITS_TEACHER, layers=2)

DIGITS_TRAIN: dict[str, Any] = {
    "preset": "digits",
    "steps": 700,
    "batch_size": 32,
    "lr": 1e-3,
    "warmup": 0.05,
    "weight_decay": 0.01,
    "samples": 20_000,
    "eval_every": 350,
    "eval_samples": 1000,
    "save_every": 100,
}
TEACHER_TRAIN: dict[str, Any] = {
    "preset": "digits",
    "objective": "sft",
    "steps": 2500,
    "batch_size": 48,
    "lr": 1e-3,
    "warmup": 0.04,
    "weight_decay": 0.01,
    "samples": 1_000_000,
    "augment": True,
    "bf16": True,
    "save_dtype": "float16",
    "eval_every": 1000,
    "eval_samples": 1000,
    "save_every": 500,
}
PRESETS = {"digits": DIGITS_TRAIN}


def defaults(preset: str) -> TrainConfig:
    """The configuration a preset starts from."""
    return TrainConfig(**PRESETS[preset])


def digits_teacher() -> Path:
    """Directory of the committed teacher.

    Raises:
        CheckpointError: the installed package lacks it.
    """
    path = Path(str(resources.files("distill"))) / "assets" / "digits-teacher"
    if not (path / "config.json").is_file():
        raise CheckpointError(f"no teacher at {path}; make it with `python -m distill teacher --preset digits`")
    return path
