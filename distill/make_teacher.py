"""The digits teacher from scratch: tokenizer, a tower that can read single digits, then the whole model.

A LLaVA model starts from a tower that was trained on images before. Here the tower first learns to name the digit in
each cell; without that, next-token training alone spends thousands of steps before it looks at the image at all.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.assemble import build_model, build_processor, build_tokenizer, save_checkpoint
from distill.config import TrainConfig
from distill.presets import DIGITS_TEACHER, TEACHER_TRAIN
from vlm import digits, preprocess
from vlm.console import Progress, note
from vlm.files import atomic_dir
from vlm.load import PROVENANCE, open_checkpoint

TOWER_STEPS, TOWER_BATCH, TOWER_LR = 800, 128, 2e-3


def teacher_config(config: TrainConfig) -> TrainConfig:
    """The configuration that trains the digits teacher, keeping seed, output, threads and resume of `config`.

    Writes the starting point (tokenizer, processor, tower trained on single digits) to OUT/initial.
    """
    initial = config.out / "initial"
    if not (initial / PROVENANCE).is_file():
        if config.threads:
            torch.set_num_threads(config.threads)
        tokenizer = build_tokenizer(digits.texts())
        processor = build_processor(tokenizer, DIGITS_TEACHER)
        model = build_model(DIGITS_TEACHER, tokenizer, config.seed)
        with atomic_dir(initial) as work:
            save_checkpoint(model, processor, work, {})
            train_tower(model, open_checkpoint(work).image, config.seed)
            save_checkpoint(model, processor, work, {"objective": "tower"})
    return dataclasses.replace(
        TrainConfig(**TEACHER_TRAIN),
        seed=config.seed,
        out=config.out,
        resume=config.resume,
        threads=config.threads,
        student=str(initial),
    )


def train_tower(model: nn.Module, spec: preprocess.ImageSpec, seed: int, steps: int = TOWER_STEPS) -> float:
    """Teach the vision tower to name the digit of each cell; returns its accuracy on validation scans."""
    torch.manual_seed(seed)
    tower = model.model.vision_tower
    head = nn.Linear(tower.config.hidden_size, 10)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=TOWER_LR, weight_decay=0.01)
    progress = Progress(steps, "tower", every_s=10)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = TOWER_LR * rate
        samples = [
            digits.sample("train", step * TOWER_BATCH + i, seed=seed + 1, augment=True) for i in range(TOWER_BATCH)
        ]
        logits_NV, target_N = _read_cells(model, head, samples, spec)
        loss = F.cross_entropy(logits_NV, target_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.advance(1, f"loss {loss.item():.3f}")
    with torch.no_grad():
        held_out = [digits.sample("validation", i) for i in range(300)]
        logits_NV, target_N = _read_cells(model, head, held_out, spec)
    correct = float((logits_NV.argmax(dim=-1) == target_N).float().mean())
    note(f"tower: {correct:.3f} of single validation digits named")
    return correct


def _read_cells(
    model: nn.Module, head: nn.Module, samples: list[digits.Sample], spec: preprocess.ImageSpec
) -> tuple[Tensor, Tensor]:
    """Class logits and labels of every grid cell: mean of the cell's patch features through a linear head."""
    tower = model.model.vision_tower
    pixels = torch.from_numpy(np.stack([preprocess.pixels(sample.image, spec) for sample in samples]))
    features_BPD = tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    side = math.isqrt(features_BPD.shape[1]) // digits.GRID
    grid = features_BPD.unflatten(1, (digits.GRID, side, digits.GRID, side)).mean(dim=(2, 4))
    target = torch.tensor([sample.digits for sample in samples])
    return head(grid.flatten(0, 2)), target.flatten()
