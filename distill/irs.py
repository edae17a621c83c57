"""IRS: which teacher layer's visual focus changes most with the instruction (computed once, before training)."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distill.attention import AttentionTap, instruction_to_vision
from distill.data import Collator, Example, Examples, to_batch
from distill.objective import gold_pass
from vlm.errors import DataError


@dataclass(frozen=True)
class LayerScores:
    """IRS(l) = 1 - mean over pairs of cos(a_l(x_1), a_l(x_2)), one image with two instructions (paper, IRS)."""

    scores: tuple[float, ...]
    pairs: int

    @property
    def best(self) -> int:
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best": self.best}


def instruction_pairs(examples: Examples, pairs: int) -> list[tuple[Example, Example]]:
    """Pair each image with its own instruction and with another example's, response cut off.

    Raises:
        DataError: fewer than two different instructions about one image each.
    """
    usable = (examples[i] for i in range(len(examples)))
    prompts = []
    for example in usable:
        prompt = _prompt(example)
        if len(prompt.pixels) == 1 and "instruction" in prompt.spans:
            prompts.append(prompt)
        if len(prompts) == pairs + 1:
            break
    found = []
    for one, other in itertools.pairwise(prompts):
        if one.ids != other.ids:
            found.append((one, Example(other.ids, other.spans, one.pixels)))
    if not found:
        raise DataError("no two different instructions with one image each; set --align.iva_layer by hand")
    return found


def _prompt(example: Example) -> Example:
    """The first question only: a later turn's tokens would mix several instructions into one map."""
    end = example.spans.index("response") if "response" in example.spans else len(example.spans)
    return Example(example.ids[:end], example.spans[:end], example.pixels)


@torch.no_grad()
def layer_scores(teacher: nn.Module, examples: Examples, pairs: int, collate: Collator, size: int = 32) -> LayerScores:
    """IRS of every decoder layer of the teacher."""
    found = instruction_pairs(examples, pairs)
    decoder = teacher.model.language_model
    layers = range(len(decoder.layers))
    similarity = torch.zeros(len(decoder.layers), dtype=torch.float64)
    for start in range(0, len(found), size):
        chunk = found[start : start + size]
        maps = []
        for side in (0, 1):
            tensors = collate([pair[side] for pair in chunk])
            batch = to_batch({name: value.to(teacher.device) for name, value in tensors.items()})
            with AttentionTap(decoder, layers) as tap:
                gold_pass(teacher, batch, keep_cache=False)
                maps.append(
                    [
                        instruction_to_vision(
                            tap, layer, batch.instruction_BT, batch.image_BT, batch.attention_mask_BT
                        )[batch.image_BT].view(len(chunk), -1)
                        for layer in layers
                    ]
                )
        for layer in layers:
            if not (maps[0][layer].any(dim=-1) & maps[1][layer].any(dim=-1)).all():
                raise DataError("an instruction stands before its image and cannot attend to it; put images first")
            similarity[layer] += F.cosine_similarity(maps[0][layer], maps[1][layer], dim=-1).sum().double().cpu()
    return LayerScores(tuple((1 - similarity / len(found)).tolist()), len(found))


def plot(scores: LayerScores, path: Path) -> None:
    """Bar chart of IRS by layer, the chosen layer marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 0.35 * len(scores.scores)), 3), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#1f6feb" if layer == scores.best else "#9fb3c8" for layer in range(len(scores.scores))]
    axes.bar(range(len(scores.scores)), scores.scores, color=colours)
    axes.set_xlabel("teacher layer")
    axes.set_ylabel("IRS")
    axes.set_title(f"layer {scores.best} chosen over {scores.pairs} pairs", fontsize=10)
    axes.set_xticks(range(len(scores.scores)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
