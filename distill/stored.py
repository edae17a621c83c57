"""A TrainConfig as JSON and back: what a run's folder, a plan of stages and a student's provenance hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distill.config import Align, LearningRates, Lora, LossWeights, TrainConfig
from distill.methods import FiraOptions, KpodOptions, LavitOptions, Tokens
from vlm.errors import UserError

PATHS = ("data", "images", "eval_data", "teacher_cache", "optim_state", "out")
NESTED: dict[str, Any] = {
    "lora": Lora,
    "lrs": LearningRates,
    "weights": LossWeights,
    "align": Align,
    "fira": FiraOptions,
    "tokens": Tokens,
    "kpod": KpodOptions,
    "lavit": LavitOptions,
}


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    value = dataclasses.asdict(config)
    return {name: str(item) if isinstance(item, Path) else item for name, item in value.items()}


def config_from_json(value: dict[str, Any]) -> TrainConfig:
    """What `config_to_json` wrote, also by an earlier version: options it did not know have their defaults."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(value) - fields):
        raise UserError(f"the stored run has the option {unknown[0]!r}, which this version does not know; update it")
    paths = {name: Path(value[name]) for name in PATHS if value.get(name) is not None}
    nested = {name: make(**value[name]) for name, make in NESTED.items() if name in value}
    return TrainConfig(**{**value, **paths, **nested})
