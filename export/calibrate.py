"""One calibration for every target: what each matrix sees on images and text, and scales folded before rounding.

`observe` runs the student in PyTorch on real prompts. `fold_scales` moves per-channel scales between a matrix and the
norm or matrix before it, as AWQ does (Lin et al. 2023, arXiv:2306.00978, section 3.2): the network computes the same,
and channels with large activations are rounded more finely. The ONNX and TensorRT writers read weights through
`Student.weight`, which applies the scales; llama.cpp gets `importance` instead.

A prompt has many more image tokens than text tokens; both kinds count the same in every statistic.

Shape legend: T sampled tokens, K input columns, N output rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from export.blocks import quantise
from export.replay import Prompt
from export.student import Fold, Student
from vlm.preprocess import pixels

if TYPE_CHECKING:
    from torch import Tensor

    from export.linear import Range

TOKENS_KEPT = 256
ROWS_TRIED = 1024
EXPONENTS = tuple(i / 10 for i in range(11))
CLIPS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
HALF_LIMIT = 0.5 * 65504


@dataclass
class Seen:
    """Input of one matrix. Sums are over tokens, weighted so that image and text tokens have equal total weight."""

    low: float = float("inf")
    high: float = float("-inf")
    weight: float = 0.0
    magnitude_K: Any = 0.0
    power_K: Any = 0.0
    tokens_TK: list[Any] = field(default_factory=list)

    def add(self, x_TK: Tensor, weight_T: Tensor, keep: int) -> None:
        self.low, self.high = min(self.low, float(x_TK.min())), max(self.high, float(x_TK.max()))
        self.weight += float(weight_T.sum())
        self.magnitude_K = self.magnitude_K + weight_T @ x_TK.abs()
        self.power_K = self.power_K + weight_T @ x_TK.square()
        if not keep:
            return
        stride = max(len(x_TK) // keep, 1)
        # rows scaled by sqrt(weight): squared errors on them are then weighted like the sums
        self.tokens_TK.append((x_TK * weight_T.sqrt()[:, None])[::stride][:keep].clone())


@dataclass(frozen=True)
class Calibration:
    """What was seen.

    Attributes:
        seen: module path -> input of that matrix.
        peaks: part -> largest magnitude in its residual stream or at a matrix's output.
        prompts: how many image-question pairs; sha256: of their pixels and token ids.
    """

    seen: dict[str, Seen]
    peaks: dict[str, float]
    prompts: int
    sha256: str

    def ranges(self) -> dict[str, Range]:
        """Per matrix: the input range with least squared rounding error at 8 bits, and the mean square per column."""
        from export.linear import Range

        return {path: Range(*_clip(seen), seen.power_K / seen.weight) for path, seen in self.seen.items()}

    def wide(self) -> frozenset[str]:
        """Parts whose activations come near the end of float16."""
        return frozenset(part for part, peak in self.peaks.items() if not peak <= HALF_LIMIT)

    def to_json(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "sha256": self.sha256, "peaks": self.peaks}


def observe(
    student: Student, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]], keep: int = TOKENS_KEPT
) -> Calibration:
    """Run each prompt with its continuation and record the input of every matrix.

    Args:
        keep: tokens whose inputs are kept as they are, per matrix; 0 keeps sums only.
    """
    import torch
    from torch import nn

    seen: dict[str, Seen] = {}
    peaks = {"vision": 0.0, "decoder": 0.0}
    digest = hashlib.sha256()
    weights: dict[str, Any] = {}
    keep = max(keep // max(len(prompts), 1), 4) if keep else 0

    def part(path: str) -> str:
        return "vision" if "vision_tower" in path or "projector" in path else "decoder"

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            x_TK = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            weight = weights["tokens"] if len(weights["tokens"]) == len(x_TK) else torch.ones(len(x_TK)) / len(x_TK)
            seen.setdefault(path, Seen()).add(x_TK, weight, keep)
            peaks[part(path)] = max(peaks[part(path)], _peak(x_TK), _peak(output))

        return hook

    def stream(path: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            peaks[part(path)] = max(peaks[part(path)], _peak(state))

        return hook

    language, tower = student.model.model.language_model, student.model.model.vision_tower
    layers = {*language.layers, *tower.encoder.layers}
    handles = [m.register_forward_hook(watch(p)) for p, m in student.model.named_modules() if isinstance(m, nn.Linear)]
    handles += [m.register_forward_hook(stream(student.paths[m])) for m in layers]
    image_id = student.checkpoint.tokenizer.spec.image_token_id
    try:
        for prompt, more in zip(prompts, continuations, strict=True):
            ids = torch.tensor([[*prompt.ids, *more]])
            image = pixels(prompt.image, student.checkpoint.image)
            digest.update(image.tobytes() + ids.numpy().tobytes())
            is_image = (ids[0] == image_id).float()
            weights["tokens"] = is_image / is_image.sum() / 2 + (1 - is_image) / (1 - is_image).sum() / 2
            with torch.no_grad():
                student.model(input_ids=ids, pixel_values=torch.from_numpy(image[None]))
    finally:
        for handle in handles:
            handle.remove()
    return Calibration(seen, peaks, len(prompts), digest.hexdigest())


def _peak(values: Tensor) -> float:
    """Largest magnitude, without a copy: a vocabulary's logits are large."""
    low, high = values.aminmax()
    return max(-float(low), float(high))


def _clip(seen: Seen) -> tuple[float, float]:
    """Shrink the range if rounding the bulk more finely gains more than cutting the rare values loses."""
    import torch

    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    sample = torch.cat(seen.tokens_TK)
    if not len(sample) or high <= low:
        return low, high
    # undo the token weights: each row was scaled by one factor
    values = sample / sample.abs().amax(1, keepdim=True).clamp(min=1e-30) * max(abs(low), abs(high))
    best, least = (low, high), float("inf")
    for ratio in CLIPS:
        step = (high - low) * ratio / 255
        rounded = ((values - low * ratio) / step).round().clamp(0, 255) * step + low * ratio
        error = float((rounded - values).square().mean())
        if error < least:
            best, least = (low * ratio, high * ratio), error
    return best


@dataclass(frozen=True)
class Group:
    """Matrices that share an input, and the module whose output can be divided to make up for it.

    Attributes:
        repeat: query heads per key/value head where one output channel feeds several input columns (v -> o).
    """

    before: Any
    after: tuple[Any, ...]
    repeat: tuple[int, int, int] | None = None


def groups(student: Student, parts: Sequence[str]) -> list[Group]:
    """Every place where a scale can be moved without changing the function."""
    found = []
    language, facts = student.model.model.language_model, student.facts
    if "decoder" in parts:
        for layer in language.layers:
            a, m = layer.self_attn, layer.mlp
            found += [
                Group(layer.input_layernorm, (a.q_proj, a.k_proj, a.v_proj)),
                Group(a.v_proj, (a.o_proj,), (facts.kv_heads, facts.heads // facts.kv_heads, facts.head_dim)),
                Group(layer.post_attention_layernorm, (m.gate_proj, m.up_proj)),
                Group(m.up_proj, (m.down_proj,)),
            ]
    if "head" in parts:
        found.append(Group(language.norm, (student.model.lm_head,)))
    if "vision" in parts:
        for layer in student.model.model.vision_tower.encoder.layers:
            a = layer.self_attn
            found += [
                Group(layer.layer_norm1, (a.q_proj, a.k_proj, a.v_proj)),
                Group(a.v_proj, (a.out_proj,)),
                Group(layer.layer_norm2, (layer.mlp.fc1,)),
            ]
    return found


def fold_scales(student: Student, calibration: Calibration, bits: int, parts: Sequence[str]) -> Student:
    """The same student whose weights, read through `Student.weight`, carry the best scale of each group."""
    from vlm.console import track

    every = [g for g in groups(student, parts) if student.paths[g.after[0]] in calibration.seen]
    for group in track(every, len(every), "fold scales"):
        seen = calibration.seen[student.paths[group.after[0]]]
        scale_K = best_scale(student, group, seen, bits)
        if scale_K is None:
            continue
        folds = dict(student.folds)
        for module in group.after:
            folds[student.paths[module]] = _times(folds.get(student.paths[module]), Fold(input=scale_K))
        outward = scale_K if group.repeat is None else _per_kv_channel(scale_K, group.repeat)
        before = student.paths[group.before]
        folds[before] = _times(folds.get(before), Fold(output=outward))
        student = replace(student, folds=folds)
    return student


def best_scale(student: Student, group: Group, seen: Seen, bits: int) -> Tensor | None:
    """Scale per input column with the least squared error of the rounded products on the sampled tokens; None if 1 is."""
    import torch

    x_TK = torch.cat(seen.tokens_TK)
    weights = [_some_rows(student.weight(module)) for module in group.after]
    magnitude_K = (seen.magnitude_K / seen.weight).clamp(min=1e-8)
    fold = student.folds.get(student.paths[group.after[0]])
    if fold is not None and fold.input is not None:
        raise ValueError(f"{student.paths[group.after[0]]} has an input scale already")
    if group.repeat is not None:
        kv, share, width = group.repeat
        magnitude_K = magnitude_K.reshape(kv, share, width).mean(1, keepdim=True).expand(kv, share, width).reshape(-1)
    best, least = None, float("inf")
    for exponent in EXPONENTS:
        scale_K = magnitude_K.pow(exponent)
        scale_K = scale_K / (scale_K.max() * scale_K.min()).sqrt()
        error = 0.0
        for weight_NK in weights:
            rounded = torch.from_numpy(quantise(weight_NK * scale_K, bits).values_NK()) / scale_K
            error += float((x_TK @ (rounded - weight_NK).t()).square().sum())
        if error < least:
            best, least = (None if exponent == 0 else scale_K), error
    return best


def _some_rows(weight_NK: Tensor) -> Tensor:
    stride = max(len(weight_NK) // ROWS_TRIED, 1)
    return weight_NK[::stride][:ROWS_TRIED]


def _per_kv_channel(scale_K: Tensor, repeat: tuple[int, int, int]) -> Tensor:
    kv, share, width = repeat
    return scale_K.reshape(kv, share, width)[:, 0].reshape(-1)


def _times(old: Fold | None, new: Fold) -> Fold:
    def product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return b if a is None else a if b is None else a * b

    return new if old is None else Fold(product(old.input, new.input), product(old.output, new.output))


def importance(calibration: Calibration, path: str) -> np.ndarray[Any, Any] | None:
    """Mean squared activation per input column: llama.cpp's imatrix entry of that matrix."""
    seen = calibration.seen.get(path)
    return None if seen is None else np.asarray(seen.power_K / seen.weight, np.float32)
