"""Held-out task accuracy and loss terms during training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from distill.data import Collator, Examples, batches
from distill.objective import Normaliser, Objective, gold_pass
from vlm.score import bootstrap_interval


@dataclass(frozen=True)
class Accuracy:
    """Share of answers greedy decoding reproduces token for token, with a 95 % bootstrap interval."""

    exact_match: float
    n: int
    interval: tuple[float, float]


@torch.no_grad()
def greedy_matches(model: nn.Module, examples: Examples, n: int, collate: Collator, size: int = 100) -> list[bool]:
    """Per example: would greedy decoding give exactly the reference answer, end of turn included?

    Greedy decoding reproduces the reference exactly when each reference token is the most likely one after the
    reference prefix, so one forward pass decides it.
    """
    was_training = model.training
    model.eval()
    matches: list[bool] = []
    for batch in batches(examples, range(min(n, len(examples))), size, collate, model.device):
        hidden_BTD = gold_pass(model, batch, keep_cache=False).hidden_BTD
        sample_N, place_N = batch.response_BT[:, 1:].nonzero(as_tuple=True)
        best_N = model.lm_head(hidden_BTD[sample_N, place_N]).argmax(dim=-1)
        wrong_N = best_N != batch.input_ids_BT[sample_N, place_N + 1]
        misses_B = torch.zeros(len(batch.input_ids_BT), device=wrong_N.device).index_add_(0, sample_N, wrong_N.float())
        matches += (misses_B == 0).tolist()
    model.train(was_training)
    return matches


def accuracy(model: nn.Module, examples: Examples, n: int, collate: Collator) -> Accuracy:
    matches = greedy_matches(model, examples, n, collate)
    scores = [float(match) for match in matches]
    return Accuracy(sum(scores) / len(scores), len(scores), bootstrap_interval(scores))


@torch.no_grad()
def held_out_terms(
    model: nn.Module, objective: Objective, examples: Examples, n: int, collate: Collator, size: int = 100
) -> dict[str, float]:
    """Every loss term of the objective on held-out examples, averaged over batches."""
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    count = 0
    # candidates are random; evaluation must not disturb the training stream, or a resumed run would differ
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in batches(examples, range(min(n, len(examples))), size, collate, model.device):
            _, values = objective(model, batch, Normaliser.of(batch))
            count += 1
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    model.train(was_training)
    return {name: value / count for name, value in sums.items()}
