"""Batches of similar length: an exact epoch, and a function of seed and epoch."""

from __future__ import annotations

import random

import numpy as np

from distill.data import LengthGrouped


class Lengths:
    """What the sampler needs of a data set."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.epoch = np.array(lengths, np.int32), 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def order(lengths: list[int], batch: int, seed: int, epoch: int) -> list[int]:
    sampler = LengthGrouped(Lengths(lengths), batch, seed)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return list(sampler)


def test_length_grouped_order_is_an_exact_epoch_and_a_function_of_seed_and_epoch() -> None:
    drawn = random.Random(1)
    lengths = [drawn.randint(10, 2000) for _ in range(1003)]
    one = order(lengths, 8, 5, 2)
    assert sorted(one) == list(range(1003))
    assert order(lengths, 8, 5, 2) == one
    assert order(lengths, 8, 5, 3) != one
    assert order(lengths, 8, 6, 2) != one
    assert max(lengths) in [lengths[i] for i in one[:8]]

    def padding(indices: list[int]) -> float:
        rows = [[lengths[i] for i in indices[at : at + 8]] for at in range(0, 1003, 8)]
        return sum(len(row) * max(row) - sum(row) for row in rows) / sum(lengths)

    shuffled = list(range(1003))
    drawn.shuffle(shuffled)
    assert padding(one) < 0.2 * padding(shuffled)
    # whole batches are shuffled: no drift from long to short
    means = [np.mean([lengths[i] for i in one[at : at + 8]]) for at in range(8, 992, 8)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3
    assert sorted(order([5] * 3, 8, 0, 0)) == [0, 1, 2]
