"""Held-out task accuracy and loss terms during training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from distill import access, processes
from distill.data import Collator, Examples, batches
from distill.generate import concludes
from distill.objective import VARIANCE, Batch, Normaliser, Objective, bounded, gold_pass
from vlm.score import share_interval

# terms that are divided by samples with an image; the others are by response tokens
BY_IMAGE = ("iva", "concept", "traj")
MOST = 100


def batch_size(trained_with: int) -> int:
    """Samples a batch when nothing is kept for a backward pass; a training step holds what several layers need."""
    return min(MOST, 4 * trained_with)


@dataclass(frozen=True)
class Accuracy:
    """Share of answers greedy decoding reproduces token for token, with a 95 % interval, see `vlm.score`."""

    exact_match: float
    n: int
    interval: tuple[float, float]


@torch.no_grad()
def greedy_matches(model: nn.Module, examples: Examples, n: int, collate: Collator, size: int = MOST) -> list[bool]:
    """Per example: would greedy decoding give exactly the reference answer, end of turn included?

    Greedy decoding reproduces the reference exactly when each reference token is the most likely one after the
    reference prefix, so one forward pass decides it. Of answers with a reasoning only the conclusion must be the
    reference's, so those are decoded. With several processes each takes its share of the batches.
    """
    was_training = model.training
    model.eval()
    mine: list[list[bool]] = []
    for batch, counts in _turns(model, examples, n, collate, size):
        found = matches(model, batch) if batch.step_BT is None else concludes(model, batch)
        mine += [found] if counts else []
    model.train(was_training)
    return [match for part in processes.in_order(processes.gather(mine)) for match in part]


def matches(model: nn.Module, batch: Batch) -> list[bool]:
    """Per sample: is every response token the likeliest one after the reference prefix?"""
    hidden_BTD = gold_pass(model, batch, keep_cache=False).hidden_BTD
    sample_N, place_N = batch.response_places()
    head = access.head(model)
    misses_B = torch.zeros(len(batch.input_ids_BT), device=hidden_BTD.device)
    # a few rows at a time: all logits of a batch at once would be the largest tensor of the run
    for part in torch.arange(len(sample_N), device=hidden_BTD.device).split(512):
        sample, place = sample_N[part], place_N[part]
        wrong = head.logits(hidden_BTD[sample, place - 1]).argmax(dim=-1) != batch.input_ids_BT[sample, place]
        misses_B.index_add_(0, sample, wrong.float())
    found: list[bool] = (misses_B == 0).tolist()
    return found


def accuracy(model: nn.Module, examples: Examples, n: int, collate: Collator, size: int = MOST) -> Accuracy:
    scores = [float(match) for match in greedy_matches(model, examples, n, collate, size)]
    return Accuracy(sum(scores) / len(scores), len(scores), share_interval(scores))


@torch.no_grad()
def held_out_terms(
    model: nn.Module, objective: Objective, examples: Examples, n: int, collate: Collator, size: int = MOST
) -> dict[str, float]:
    """Every loss term of the objective on held-out examples, whatever the batches, and their weighted sum `loss`.

    With a sampled teacher also `kd_bound` and the like, see `distill.objective.bounded`.
    """
    was_training = model.training
    model.eval()
    mine: list[tuple[dict[str, float], dict[str, float]]] = []
    # candidates are drawn by content, so evaluation neither disturbs the training stream nor varies between calls
    for batch, counts in _turns(model, examples, n, collate, size):
        _, values = objective(model, batch, Normaliser(1, 1))
        tokens, images = float(batch.response_tokens()), float(batch.image_samples())
        divisors = {"sft": tokens, **dict.fromkeys(BY_IMAGE, images)}
        taught = float(batch.response_tokens(taught=True))
        shares = {name: divisors.get(name.removesuffix(VARIANCE), taught) for name in values}
        mine += [({name: float(value) for name, value in values.items()}, shares)] if counts else []
    model.train(was_training)
    found = processes.in_order(processes.gather(mine))
    # a batch without images knows no variance of iva
    names = {name for values, _ in found for name in values}
    total = {name: max(sum(shares.get(name, 0.0) for _, shares in found), 1.0) for name in names}
    means = {name: sum(values[name] for values, _ in found) / total[name] for name in objective.terms}
    loss = sum(getattr(objective.weights, name) * value for name, value in means.items())
    # errors of different samples are independent
    errors = {n: sum(v.get(n, 0.0) for v, _ in found) / total[n] ** 2 for n in sorted(names) if n.endswith(VARIANCE)}
    return bounded({**means, **errors, "loss": loss})


def _turns(model: nn.Module, examples: Examples, n: int, collate: Collator, size: int) -> Iterator[tuple[Batch, bool]]:
    device = next(model.parameters()).device
    for chunk, counts in processes.turns(min(n, len(examples)), size):
        for batch in batches(examples, chunk, size, collate, device):
            yield batch, counts
