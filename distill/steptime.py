"""Seconds per optimiser step of several configurations, measured in turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from distill.config import TrainConfig
from distill.data import batches
from distill.objective import Normaliser
from distill.optimizers import build_optimizer
from distill.run import load_run
from distill.train import recomputed


def measure(configs: Mapping[str, TrainConfig], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds a step by name: data, forward and backward of every micro-batch, and optimiser; A B C A B C ... order."""
    before = torch.get_num_threads()
    torch.set_num_threads(next(iter(configs.values())).threads or before)
    steps = {name: _stepper(config) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step(turn)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _stepper(config: TrainConfig) -> Callable[[int], None]:
    run = load_run(config)
    objective = run.objective(recomputed(run), max(config.align.iva_layer, 0))
    optimizer = build_optimizer(config, run.student, objective.extra_parameters())
    collate = run.collate()

    samples, device = config.batch_size * config.accumulate, run.student.device

    def step(turn: int) -> None:
        indices = [index % len(run.data.train) for index in range(turn * samples, (turn + 1) * samples)]
        for batch in batches(run.data.train, indices, config.batch_size, collate, device):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                loss, _ = objective(run.student, batch, Normaliser.of(batch))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(run.student.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step
