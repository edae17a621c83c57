"""Matrices and tables in every storage: float, 4 and 8 bits in blocks, static 8 bits. Importing this imports torch.

Shape legend: K input columns, N output columns, G blocks per row, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.blocks import Blocks, block_of, quantise
from export.hold import hold
from export.precision import BLOCK, KINDS, Algorithm, Flavour, Kind
from export.student import Student

CHUNK = 1 << 24  # elements widened to float32 at a time
ACCURACY_LEVEL = 4  # int8 products inside MatMulNBits


@dataclass(frozen=True)
class Range:
    """What a matrix sees on the calibration set.

    Attributes:
        low, high: of its input.
        power_K: mean square of each input column, image and text tokens counting the same.
    """

    low: float
    high: float
    power_K: Tensor


@dataclass(frozen=True)
class Recipe:
    """How the modules of one graph keep and multiply their matrices.

    Attributes:
        ranges: module path -> calibration, where there was one.
        wide: keep the residual stream in float32 although the rest is float16.
        fallbacks: filled with what could not be done as asked: reason -> count.
    """

    student: Student
    kind: Kind = KINDS["fp32"]
    flavour: Flavour = "portable"
    algorithm: Algorithm = "default"
    ranges: Mapping[str, Range] = field(default_factory=dict)
    wide: bool = False
    fallbacks: dict[str, int] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return torch.float16 if self.kind.half else torch.float32

    @property
    def stream(self) -> torch.dtype:
        """Of the residual stream."""
        return torch.float32 if self.wide else self.dtype

    @property
    def storage(self) -> torch.dtype:
        """Of matrices kept as floats."""
        return torch.float16 if self.kind.bits == 16 or (self.kind.half and self.kind.bits < 16) else torch.float32

    def fell_back(self, reason: str) -> None:
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1

    def special(self, sources: tuple[Any, ...], compute: torch.dtype) -> nn.Module | None:
        """A module of another target's own for these matrices; None for the ones below."""
        return None

    def with_kind(self, kind: Kind) -> Recipe:
        """Another storage under the same activation type (the head under a decoder)."""
        return replace(self, kind=replace(kind, half=self.kind.half))


def linear(recipe: Recipe, *sources: Any, out: bool = False) -> nn.Module:
    """The module for `nn.Linear`s that share an input; several are packed side by side.

    Args:
        out: this one writes to the residual stream, and works in its type.
    """
    compute = recipe.stream if out else recipe.dtype
    if (made := recipe.special(sources, compute)) is not None:
        return made
    if recipe.kind.bits >= 16:
        return FloatLinear(recipe, sources, compute)
    if recipe.flavour == "ort":
        return BlockLinear(recipe, sources, compute)
    return PlainBlockLinear(recipe, sources, compute)


def vision_linear(recipe: Recipe, source: Any, out: bool = False) -> nn.Module:
    """As `linear`; 8 bits are static, because vision activations have a known range and images come in whole."""
    if (
        recipe.kind.bits == 8
        and (made := recipe.special((source,), recipe.stream if out else recipe.dtype)) is not None
    ):
        return made
    if recipe.kind.bits == 8:
        return StaticLinear(recipe, source)
    return linear(recipe, source, out=out)


class _Packed(nn.Module):
    """What all kinds share: where the weight comes from, and the bias."""

    block = BLOCK

    def __init__(self, recipe: Recipe, sources: tuple[Any, ...], compute: torch.dtype) -> None:
        super().__init__()
        self.recipe, self.sources, self.compute = recipe, sources, compute
        self.rows = sum(source.weight.shape[0] for source in sources)
        self.columns = sources[0].weight.shape[1]
        biases = [
            torch.zeros(len(s.weight)) if getattr(s, "bias", None) is None else recipe.student.weight(s, "bias")
            for s in sources
        ]
        has_bias = any(getattr(s, "bias", None) is not None for s in sources)
        self.register_buffer("bias", torch.cat(biases).to(compute) if has_bias else None)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Output rows [n, K] in float32, at most CHUNK elements at a time: a vocabulary head is the largest matrix."""
        done, step = 0, max(CHUNK // self.columns, 1)
        for source in self.sources:
            for start in range(0, source.weight.shape[0], step):
                rows = self.recipe.student.weight(source, rows=slice(start, start + step))
                yield slice(done, done + len(rows)), rows
                done += len(rows)

    def blocks(self) -> Iterator[tuple[slice, Blocks]]:
        """Quantised on every call: reading codes and scales separately costs time, keeping them would cost memory."""
        path = self.recipe.student.paths[self.sources[0]]
        found, fold = self.recipe.ranges.get(path), self.recipe.student.folds.get(path)
        power_K = None if found is None else found.power_K
        if power_K is not None and fold is not None and fold.input is not None:
            power_K = power_K / fold.input.square()  # the columns a folded matrix sees are divided by its scale
        for rows, weight_NK in self.chunks():
            yield rows, quantise(weight_NK, self.recipe.kind.bits, self.recipe.algorithm, power_K, self.block)

    def gather(self, shape: tuple[int, ...], dtype: Any, parts: Iterator[tuple[slice, Any]], axis: int = 0) -> Any:
        """Assemble an array whose `axis` is the output row."""
        whole = np.empty(shape, dtype)
        for rows, values in parts:
            whole[(slice(None),) * axis + (rows,)] = values
        return whole

    def shape(self, x: Tensor) -> tuple[Any, ...]:
        return (*x.shape[:-1], self.rows)


class FloatLinear(_Packed):
    """x @ weight_KN + bias_N; weights kept in 16 bits are widened if the product is to be in float32."""

    def __init__(self, recipe: Recipe, sources: tuple[Any, ...], compute: torch.dtype) -> None:
        storage = recipe.storage
        super().__init__(recipe, sources, torch.float32 if storage == torch.float32 else compute)
        shape, element = (self.columns, self.rows), np.float16 if storage == torch.float16 else np.float32
        parts = lambda: ((rows, values.t().numpy()) for rows, values in self.chunks())  # noqa: E731
        hold(self, "weight", shape, storage, lambda: self.gather(shape, element, parts(), axis=1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x.to(self.compute), self.weight.to(self.compute))
        return y if self.bias is None else y + self.bias


class BlockLinear(_Packed):
    """com.microsoft.MatMulNBits: blocks along K, symmetric, bias inside."""

    def __init__(self, recipe: Recipe, sources: tuple[Any, ...], compute: torch.dtype) -> None:
        super().__init__(recipe, sources, compute)
        groups, width = -(-self.columns // BLOCK), BLOCK * recipe.kind.bits // 8
        element = np.float16 if compute == torch.float16 else np.float32
        codes, scales = (self.rows, groups, width), (self.rows, groups)
        hold(
            self,
            "weight",
            codes,
            torch.uint8,
            lambda: self.gather(codes, np.uint8, ((rows, b.packed_NGb) for rows, b in self.blocks())),
        )
        hold(
            self,
            "scales",
            scales,
            compute,
            lambda: self.gather(scales, element, ((rows, b.scales_NG) for rows, b in self.blocks())),
        )

    def forward(self, x: Tensor) -> Tensor:
        inputs: list[Tensor | None] = [x.to(self.compute), self.weight, self.scales]
        if self.bias is not None:
            inputs += [None, None, self.bias]
        bits = self.recipe.kind.bits
        attributes = {"K": self.columns, "N": self.rows, "bits": bits, "block_size": BLOCK}
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            inputs,
            {**attributes, "accuracy_level": ACCURACY_LEVEL},
            dtype=self.compute,
            shape=self.shape(x),
            version=1,
        )


class PlainBlockLinear(_Packed):
    """The same numbers in ai.onnx operators: DequantizeLinear in blocks (opset 21), then MatMul."""

    def __init__(self, recipe: Recipe, sources: tuple[Any, ...], compute: torch.dtype) -> None:
        super().__init__(recipe, sources, compute)
        element = np.float16 if compute == torch.float16 else np.float32
        shape, groups = (self.columns, self.rows), -(-self.columns // BLOCK)
        hold(self, "weight", shape, torch.int8, self._codes, f"INT{recipe.kind.bits}")
        hold(
            self,
            "scales",
            (groups, self.rows),
            compute,
            lambda: self.gather((groups, self.rows), element, ((r, b.scales_NG.T) for r, b in self.blocks()), axis=1),
        )

    def _codes(self) -> Any:
        import ml_dtypes

        codes = self.gather((self.columns, self.rows), np.int8, ((r, b.codes_NK().T) for r, b in self.blocks()), axis=1)
        return codes.astype(ml_dtypes.int4) if self.recipe.kind.bits == 4 else codes

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.weight, self.scales),
            {"axis": 0, "block_size": BLOCK},
            dtype=self.compute,
            shape=(self.columns, self.rows),
            version=21,
        )
        y = torch.matmul(x.to(self.compute), weight)
        return y if self.bias is None else y + self.bias


class StaticLinear(_Packed):
    """Static QDQ: activations uint8 over their calibrated range, weights symmetric per output column.

    Weights are uint8 around 128: processors with AVX2 alone add pairs of uint8 x int8 products in 16 bits, where they
    saturate, and the result is off by several times the rounding error.
    """

    def __init__(self, recipe: Recipe, source: Any) -> None:
        super().__init__(recipe, (source,), torch.float32)
        found = recipe.ranges.get(recipe.student.paths[source])
        low, high = (0.0, 1.0) if found is None else (min(found.low, 0.0), max(found.high, 0.0))
        step = max((high - low) / 255, 1e-12)
        self.register_buffer("step", torch.tensor(step))
        self.register_buffer("zero", torch.tensor(round(-low / step), dtype=torch.uint8))
        self.register_buffer("middle", torch.full((self.rows,), 128, dtype=torch.uint8))
        hold(self, "weight", (self.columns, self.rows), torch.uint8, self._codes)
        hold(self, "scales", (self.rows,), torch.float32, self._scales)

    def _scales(self) -> Any:
        scales = ((rows, weight.abs().amax(1).clamp(min=1e-12).numpy() / 127) for rows, weight in self.chunks())
        return self.gather((self.rows,), np.float32, scales)

    def _codes(self) -> Any:
        scales = torch.from_numpy(self._scales())
        codes = ((r, ((w / scales[r, None]).round() + 128).to(torch.uint8).t().numpy()) for r, w in self.chunks())
        return self.gather((self.columns, self.rows), np.uint8, codes, axis=1)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, self.step, self.zero), dtype=torch.uint8, shape=x.shape, version=13
        )
        rounded = torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, self.step, self.zero), dtype=torch.float32, shape=x.shape, version=13
        )
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.weight, self.scales, self.middle),
            {"axis": 1},
            dtype=torch.float32,
            shape=(self.columns, self.rows),
            version=13,
        )
        y = torch.matmul(rounded, weight)
        return y if self.bias is None else y + self.bias


class EmbedTokens(_Packed):
    """input_ids [B,S] -> inputs_embeds [B,S,H] in float32; a table is a matrix whose rows are looked up."""

    def __init__(self, recipe: Recipe) -> None:
        source = recipe.student.model.model.language_model.embed_tokens
        block = block_of(source.weight.shape[1]) or 0
        if recipe.kind.bits < 16 and not block:
            recipe.fell_back(f"embedding rows of {source.weight.shape[1]} do not divide into blocks, fp16 instead")
        if recipe.kind.bits == 4 and recipe.flavour == "portable" and block:
            recipe.fell_back("no plain operator looks up 4-bit rows, int8 instead")
            recipe = recipe.with_kind(replace(recipe.kind, bits=8))
        super().__init__(recipe, (source,), recipe.dtype)
        self.block = 0 if recipe.kind.bits >= 16 else block
        rows, bits, columns = self.rows, recipe.kind.bits, self.columns
        if not self.block:
            storage, element = (torch.float32, np.float32) if bits == 32 else (torch.float16, np.float16)
            parts = lambda: ((r, w.numpy()) for r, w in self.chunks())  # noqa: E731
            hold(self, "weight", (rows, columns), storage, lambda: self.gather((rows, columns), element, parts()))
            return
        if recipe.flavour == "portable":
            codes = lambda: ((r, b.codes_NK()) for r, b in self.blocks())  # noqa: E731
            hold(self, "weight", (rows, columns), torch.int8, lambda: self.gather((rows, columns), np.int8, codes()))
        else:
            shape = (rows, columns * bits // 8)
            packed = lambda: ((r, b.packed_NGb.reshape(-1, shape[1])) for r, b in self.blocks())  # noqa: E731
            hold(self, "weight", shape, torch.uint8, lambda: self.gather(shape, np.uint8, packed()))
        groups = (rows, columns // self.block)
        element = np.float16 if recipe.kind.half else np.float32
        scales = lambda: ((r, b.scales_NG) for r, b in self.blocks())  # noqa: E731
        hold(self, "scales", groups, recipe.dtype, lambda: self.gather(groups, element, scales()))

    def forward(self, input_ids: Tensor) -> Tensor:
        if not self.block:
            return nn.functional.embedding(input_ids, self.weight).float()
        if self.recipe.flavour == "portable":
            codes = gather(self.weight, input_ids).float().reshape(*input_ids.shape, -1, self.block)
            scales = gather(self.scales, input_ids).float()[..., None]
            return (codes * scales).reshape(*input_ids.shape, self.columns)
        rows = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            (self.weight, input_ids, self.scales),
            {"bits": self.recipe.kind.bits, "block_size": self.block, "gather_axis": 0, "quantize_axis": 1},
            dtype=self.scales.dtype,
            shape=(*input_ids.shape, self.columns),
            version=1,
        )
        return rows.float()


def gather(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table as one Gather; indexing in torch would copy the table into the graph."""
    shape = (*ids.shape, *table.shape[1:])
    return torch.onnx.ops.symbolic("Gather", (table, ids), {"axis": 0}, dtype=table.dtype, shape=shape, version=13)
