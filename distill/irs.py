"""IRS: which teacher layer's visual focus changes most with the instruction (computed once, before training)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill import access
from distill.attention import AttentionTap, instruction_to_vision
from distill.data import Collator, Example, Examples, at_hand, to_batch
from distill.objective import gold_pass
from distill.placement import computes_on
from vlm.errors import DataError

Interval = tuple[float, float]
# what the tapped layers' inputs may take together; the batch is made as large as that allows
TAP_BYTES = 512 << 20


@dataclass(frozen=True)
class LayerScores:
    """IRS(l) = 1 - mean over pairs of cos(a_l(x_1), a_l(x_2)), one image with two instructions (paper, IRS).

    Attributes:
        pairs: pairs compared.
        same_image: of these, pairs whose two instructions both belong to the image in the data; in the others the
            second instruction is borrowed from another image.
        intervals: 95 % bootstrap interval of each layer's score over the pairs.
        stability: share of bootstrap resamples in which the chosen layer has the highest score.
    """

    scores: tuple[float, ...]
    pairs: int
    same_image: int = 0
    intervals: tuple[Interval, ...] = ()
    stability: float | None = None

    @property
    def best(self) -> int:
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best": self.best}


@dataclass(frozen=True)
class Pairs:
    """Image-instruction pairs, and how the data allowed them to be built.

    Attributes:
        found: (one, other) with the same image and different instructions, responses cut off.
        same_image: how many of `found` need no borrowed instruction; they come first.
        looked_at: samples drawn; `usable` of them have one image before an instruction.
    """

    found: list[tuple[Example, Example]]
    same_image: int
    looked_at: int
    usable: int


@dataclass(frozen=True)
class _Prompt:
    """A conversation's first question, and the instructions of all its questions."""

    first: Example
    instructions: tuple[tuple[int, ...], ...]
    image: bytes


def build_pairs(examples: Examples, pairs: int, seed: int = 0) -> Pairs:
    """Draw samples at random (of a stream from its head) and pair instructions about one image.

    An image with several questions (turns of a conversation, or several records) gives pairs of its own questions;
    an image with a single one gets its second instruction from another sample.

    Raises:
        DataError: no two different instructions with one image each.
    """
    rng = np.random.default_rng(seed)
    by_image: dict[bytes, list[_Prompt]] = defaultdict(list)
    looked_at = usable = 0
    for index in rng.permutation(at_hand(examples)):
        if usable > pairs or looked_at >= 8 * pairs + 8:
            break
        looked_at += 1
        prompt = _prompt(examples[int(index)])
        if prompt is not None:
            usable += 1
            by_image[prompt.image].append(prompt)
    own = list(itertools.chain.from_iterable(_own_pairs(prompts, rng) for prompts in by_image.values()))
    found = own[:pairs]
    found += _borrowed_pairs([group[0] for group in by_image.values()], pairs - len(found))
    if not found:
        raise DataError("no two different instructions with one image each; set --align.iva_layer by hand")
    return Pairs(found, min(len(own), pairs), looked_at, usable)


def instruction_pairs(examples: Examples, pairs: int, seed: int = 0) -> list[tuple[Example, Example]]:
    """The pairs of `build_pairs` alone."""
    return build_pairs(examples, pairs, seed).found


def _prompt(example: Example) -> _Prompt | None:
    """None where there is not exactly one image, or no instruction that could look at it."""
    spans = example.spans
    end = spans.index("response") if "response" in spans else len(spans)
    first = example.cut(end)
    if len(example.pixels) != 1 or "instruction" not in first.spans or "image" not in first.spans:
        return None
    # a response ends a turn, so runs of it separate the turns' instructions
    turns = [list(run) for is_response, run in itertools.groupby(range(len(spans)), lambda i: spans[i] == "response")]
    instructions = [tuple(example.ids[i] for i in run if spans[i] == "instruction") for run in turns]
    image = hashlib.sha256(np.ascontiguousarray(example.pixels[0]).tobytes()).digest()
    return _Prompt(first, tuple(dict.fromkeys(ids for ids in instructions if ids)), image)


def _own_pairs(prompts: list[_Prompt], rng: np.random.Generator) -> list[tuple[Example, Example]]:
    """Different instructions of one image, each used once."""
    instructions = list(dict.fromkeys(itertools.chain.from_iterable(prompt.instructions for prompt in prompts)))
    order = [instructions[i] for i in rng.permutation(len(instructions))]
    first = prompts[0].first
    return [
        (_with_instruction(first, one), _with_instruction(first, other))
        for one, other in zip(order[::2], order[1::2], strict=False)
    ]


def _borrowed_pairs(prompts: list[_Prompt], wanted: int) -> list[tuple[Example, Example]]:
    """Each image with its own first instruction and that of the next image that asks something else."""
    found: list[tuple[Example, Example]] = []
    for index, prompt in enumerate(prompts):
        if len(found) >= wanted:
            break
        if len(prompt.instructions) > 1:  # it has a pair of its own
            continue
        others = (prompts[(index + step) % len(prompts)].instructions[0] for step in range(1, len(prompts)))
        other = next((ids for ids in others if ids != prompt.instructions[0]), None)
        if other is not None:
            found.append((prompt.first, _with_instruction(prompt.first, other)))
    return found


def _with_instruction(prompt: Example, instruction: tuple[int, ...]) -> Example:
    """The prompt with other words in place of its instruction; image tokens and template stay."""
    at = prompt.spans.index("instruction")
    kept = [i for i, span in enumerate(prompt.spans) if span != "instruction"]
    before, after = [i for i in kept if i < at], [i for i in kept if i > at]
    ids = (*(prompt.ids[i] for i in before), *instruction, *(prompt.ids[i] for i in after))
    spans = (
        *(prompt.spans[i] for i in before),
        *("instruction" for _ in instruction),
        *(prompt.spans[i] for i in after),
    )
    return dataclasses.replace(prompt, ids=ids, spans=spans)


@torch.no_grad()
def layer_scores(
    teacher: nn.Module, examples: Examples, pairs: int, collate: Collator, size: int = 0, seed: int = 0
) -> LayerScores:
    """IRS of every decoder layer of the teacher.

    Args:
        size: pairs a forward pass; 0 takes what TAP_BYTES allows, 32 at most.

    Raises:
        DataError: no pairs, or an instruction stands before its image.
    """
    built = build_pairs(examples, pairs, seed)
    decoder = access.decoder(teacher)
    longest = max(len(example.ids) for pair in built.found for example in pair)
    per_pair = 4 * longest * int(decoder.config.hidden_size) * len(decoder.layers)
    size = size or max(1, min(32, TAP_BYTES // per_pair))
    chunks = [built.found[start : start + size] for start in range(0, len(built.found), size)]
    distance_LP = 1 - torch.cat([_similarity(teacher, decoder, chunk, collate) for chunk in chunks], dim=1).numpy()
    return _summary(distance_LP, built.same_image)


def _similarity(teacher: nn.Module, decoder: Any, chunk: list[tuple[Example, Example]], collate: Collator) -> Tensor:
    """cos(a_l(x_1), a_l(x_2)) by layer and pair, float64 on the CPU."""
    layers = range(len(decoder.layers))
    maps: list[list[Tensor]] = []
    for side in (0, 1):
        tensors = collate([pair[side] for pair in chunk])
        batch = to_batch({name: value.to(computes_on(teacher)) for name, value in tensors.items()})
        with AttentionTap(decoder, layers) as tap:
            gold_pass(teacher, batch, keep_cache=False)
            # one image a prompt, but towers that keep the aspect ratio give each its own number of tokens
            maps.append(
                [
                    instruction_to_vision(tap, layer, batch.instruction_BT, batch.image_BT, batch.attention_mask_BT)
                    for layer in layers
                ]
            )
        counts = batch.image_BT.sum(dim=1)
        maps[side] = [_visual_part(a_BT, batch.image_BT, int(counts.max())) for a_BT in maps[side]]
    for one, other in zip(*maps, strict=True):
        if not (one.any(dim=-1) & other.any(dim=-1)).all():
            raise DataError("an instruction stands before its image and cannot attend to it; put images first")
    pairs = zip(*maps, strict=True)
    return torch.stack([F.cosine_similarity(one, other, dim=-1).double().cpu() for one, other in pairs])


def _visual_part(a_BT: Tensor, image_BT: Tensor, width: int) -> Tensor:
    """a_BJ: the visual tokens of each row in order, zeros behind them."""
    order_BJ = torch.argsort(~image_BT, dim=1, stable=True)[:, :width]
    return a_BT.gather(1, order_BJ) * image_BT.gather(1, order_BJ)


def _summary(distance_LP: np.ndarray[Any, Any], same_image: int, rounds: int = 2000) -> LayerScores:
    scores = distance_LP.mean(axis=1)
    pairs = distance_LP.shape[1]
    # the same resamples for all layers: whether a layer leads is a paired question
    drawn = np.random.default_rng(0).multinomial(pairs, np.full(pairs, 1 / pairs), size=rounds) / pairs
    means_LR = distance_LP @ drawn.T
    low, high = np.quantile(means_LR, [0.025, 0.975], axis=1)
    stability = float((means_LR.argmax(axis=0) == int(scores.argmax())).mean())
    intervals = tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))
    return LayerScores(tuple(scores.tolist()), pairs, same_image, intervals, stability)


def plot(scores: LayerScores, path: Path) -> None:
    """Bar chart of IRS by layer with bootstrap intervals, the chosen layer marked."""
    figure(scores).savefig(path, dpi=120)


def figure(scores: LayerScores) -> Any:
    """The chart of `plot` as a matplotlib figure."""
    from matplotlib.figure import Figure

    layers = range(len(scores.scores))
    drawing = Figure(figsize=(max(4.0, min(12.0, 1.5 + 0.35 * len(layers))), 3), layout="constrained")
    axes = drawing.add_subplot()
    colours = ["#1f6feb" if layer == scores.best else "#b6c6d9" for layer in layers]
    axes.bar(layers, scores.scores, color=colours, width=0.7)
    if scores.intervals:
        below = [max(score - low, 0.0) for score, (low, _) in zip(scores.scores, scores.intervals, strict=True)]
        above = [max(high - score, 0.0) for score, (_, high) in zip(scores.scores, scores.intervals, strict=True)]
        axes.errorbar(layers, scores.scores, yerr=[below, above], fmt="none", ecolor="#57606a", capsize=3, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("teacher layer")
    axes.set_ylabel("IRS")
    axes.set_title(f"layer {scores.best} has the highest IRS, {scores.pairs} pairs", fontsize=10)
    axes.set_xticks(layers if len(layers) <= 40 else range(0, len(layers), 4))
    axes.tick_params(axis="x", labelsize=10 if len(layers) <= 24 else 7)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing
