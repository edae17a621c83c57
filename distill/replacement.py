"""The token replacement test: do answers read a student's latent tokens at all?

Later work found latent tokens bypassed in several systems: putting others in their place left the answers as they were. So
every run with latents ends with this test. What later tokens can read of a latent, its keys and values in every layer, is
replaced; the latents' own path through the model stays, since the last of them predicts the answer's first token.

    zero      nothing
    random    noise of the same spread
    first     the first latent's, in the place of all
    shuffled  those of another sample

Shape legend: B = samples, T = tokens, Q = groups of latents (one an answer), K = latents of a group, X = projection width.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill import access, evaluate, processes
from distill.batch import Batch
from distill.data import Collator, Examples, batches
from vlm.files import write_atomic
from vlm.score import bootstrap_interval

Kind = Literal["zero", "random", "first", "shuffled"]
KINDS: tuple[Kind, ...] = ("zero", "random", "first", "shuffled")
FILE = "latents.json"


@dataclass(frozen=True)
class Drop:
    """Exact match lost to one replacement, with a 95 % interval over samples."""

    kind: str
    exact_match: float
    drop: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """What the test found, on `data`: held-out or training samples."""

    n: int
    exact_match: float
    drops: tuple[Drop, ...]
    data: str = "held-out"

    @property
    def load_bearing(self) -> bool:
        """Whether at least one replacement costs answers beyond chance."""
        return any(drop.low > 0 for drop in self.drops)

    @property
    def text(self) -> str:
        shown = ", ".join(f"{d.kind} {d.drop:+.3f} ({d.low:+.3f} to {d.high:+.3f})" for d in self.drops)
        verdict = (
            "latents are load-bearing" if self.load_bearing else "latents not load-bearing: answers do not read them"
        )
        return f"token replacement test (exact match {self.exact_match:.3f} lost when latents are replaced, n = {self.n} {self.data} samples): {shown}; {verdict}"


@torch.no_grad()
def measure(model: nn.Module, examples: Examples, n: int, collate: Collator, size: int = 100) -> Report:
    """Exact match of the answers behind the latents, with latents as they are and with each replacement.

    Args:
        collate: puts the latents in.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    n = min(n, len(examples))
    size = max(-(-n // max(-(-n // size), 1)), 1)  # even batches: one sample alone has no other's latents to take
    mine: list[list[tuple[bool, ...]]] = []
    for chunk, counts in processes.turns(n, size):
        for batch in batches(examples, chunk, size, collate, device):
            found = outcomes(model, batch)
            mine += [found] if counts else []
    model.train(was_training)
    rows = [row for part in processes.in_order(processes.gather(mine)) for row in part]
    whole, *others = ([float(row[i]) for row in rows] for i in range(len(KINDS) + 1))
    drops = []
    for kind, scores in zip(KINDS, others, strict=True):
        lost = [a - b for a, b in zip(whole, scores, strict=True)]
        drops.append(Drop(kind, sum(scores) / len(rows), sum(lost) / len(rows), *bootstrap_interval(lost)))
    return Report(len(rows), sum(whole) / len(rows), tuple(drops))


def outcomes(model: nn.Module, batch: Batch) -> list[tuple[bool, ...]]:
    """Per sample: is the answer right as it is, and with each of KINDS?"""
    assert batch.latent_BT is not None
    # latents are said, not answered; and what they say of each other is not the question
    answers = replace(batch, response_BT=batch.response_BT & ~batch.latent_BT)
    columns = [evaluate.matches(model, answers)]
    for kind in KINDS:
        with replaced(model, kind, batch.latent_BT):
            columns.append(evaluate.matches(model, answers))
    return list(zip(*columns, strict=True))


def report(found: Report, out: Path) -> None:
    """Say it, and keep it in OUT/latents.json."""
    processes.say(found.text)
    value = {**asdict(found), "load_bearing": found.load_bearing}
    write_atomic(out / FILE, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def replaced(model: nn.Module, kind: Kind, latent_BT: Tensor, seed: int = 0) -> Iterator[None]:
    """While open, a pass over this batch reads something else than the latents' keys and values."""
    generator = torch.Generator().manual_seed(seed)

    def hook(_: nn.Module, __: Any, output_BTX: Tensor) -> Tensor:
        return replace_rows(output_BTX, latent_BT, kind, generator)

    parts = [
        part for layer in access.decoder(model).layers for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    handles = [part.register_forward_hook(hook) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replace_rows(value_BTX: Tensor, latent_BT: Tensor, kind: Kind, generator: torch.Generator) -> Tensor:
    """The tensor with other rows in the latents' places."""
    rows_JX = value_BTX[latent_BT]
    if kind == "zero":
        new_JX = torch.zeros_like(rows_JX)
    elif kind == "random":
        noise_JX = torch.randn(rows_JX.shape, generator=generator).to(rows_JX)
        new_JX = rows_JX.mean() + rows_JX.std() * noise_JX
    else:
        sample_Q = sample_of_groups(latent_BT)
        rows_QKX = rows_JX.view(len(sample_Q), len(rows_JX) // len(sample_Q), -1)
        new_QKX = rows_QKX[:, :1].expand_as(rows_QKX) if kind == "first" else rows_QKX[donors(sample_Q)]
        new_JX = new_QKX.reshape(rows_JX.shape)
    found_BTX = value_BTX.clone()
    found_BTX[latent_BT] = new_JX
    return found_BTX


def sample_of_groups(latent_BT: Tensor) -> list[int]:
    """sample_Q: which sample each group of latents (one an answer, over the whole batch) is of; all are of one size."""
    before_BT = torch.nn.functional.pad(latent_BT, (1, 0))[:, :-1]
    found: list[int] = (latent_BT & ~before_BT).nonzero()[:, 0].tolist()
    return found


def donors(sample_Q: Sequence[int]) -> list[int]:
    """donor_Q: the next group that is of another sample; a sample alone in its batch keeps its own."""
    count = len(sample_Q)
    return [
        next((o for step in range(1, count) if sample_Q[o := (q + step) % count] != sample_Q[q]), q)
        for q in range(count)
    ]
