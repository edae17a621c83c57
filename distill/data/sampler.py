"""The order of training samples: batches of similar length, the same for a seed and an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler

from distill.data.records import Records
from distill.data.stream import Streamed


class LengthGrouped(Sampler[int]):
    """Every record once an epoch, neighbours of similar length, the longest batch first (it decides the memory).

    The library's grouping leaves batches sorted from long to short inside each of its large groups; here whole batches
    are shuffled, so that length does not drift while training.

    Args:
        records: gives the lengths and holds the epoch, which resuming and multi-process loaders set on the data set.
        batch: samples of one optimiser step over all processes and micro-batches.
    """

    def __init__(self, records: Records, batch: int, seed: int) -> None:
        self.records, self.batch, self.seed = records, batch, seed

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        self.records.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.records.epoch)
        order = get_length_grouped_indices(self.records.lengths.tolist(), self.batch, generator=generator)
        whole = len(order) // self.batch
        grouped = torch.tensor(order[: whole * self.batch]).view(whole, self.batch)
        if whole > 1:
            grouped = torch.cat([grouped[:1], grouped[1:][torch.randperm(whole - 1, generator=generator)]])
        yield from grouped.flatten().tolist()
        yield from order[whole * self.batch :]


def train_sampler(examples: Any, batch: int, seed: int, group_by_length: bool) -> Sampler[int] | None:
    """The order a data set asks for; None leaves it to the caller.

    Args:
        batch: samples of one optimiser step over all processes and micro-batches.
    """
    if isinstance(examples, Streamed):  # it mixes its rows itself, and can only be read forwards
        return SequentialSampler(examples)
    records = getattr(examples, "examples", examples)  # with weights around them
    return LengthGrouped(records, batch, seed) if group_by_length and isinstance(records, Records) else None
