"""Matrices as TensorRT's strongly typed networks want them; see `export.trt_precision`. Importing this imports torch.

Shape legend: K input columns, N output columns, G blocks per column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.hold import hold
from export.linear import FloatLinear, Range, Recipe, _Packed
from export.precision import KINDS
from export.trt_precision import BLOCKS, TRT_KINDS

TINY = 1e-6  # smallest scale: float16 still has a few bits there


@dataclass(frozen=True)
class TrtRecipe(Recipe):
    """A recipe whose activations may be bfloat16 and whose 8 and 4 bits are TensorRT's."""

    activation: str = "float16"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.activation)  # type: ignore[no-any-return]

    @property
    def storage(self) -> torch.dtype:
        return self.dtype if self.kind.bits >= 16 else torch.float16

    def special(self, sources: tuple[Any, ...], compute: torch.dtype) -> nn.Module | None:
        columns = sources[0].weight.shape[1]
        if self.kind.bits == 8:
            return Int8Linear(self, sources, compute)
        if self.kind.bits == 4:
            block = next((size for size in BLOCKS if columns % size == 0), None)
            rows = sum(source.weight.shape[0] for source in sources)
            if block is not None and rows % 2 == 0:
                return Int4Linear(self, sources, compute, block)
            self.fell_back(f"{columns} columns by {rows} rows do not divide into int4 blocks, fp16 instead")
            return FloatLinear(self.with_kind(KINDS["fp16"]), sources, compute)
        return Bf16Linear(self, sources, compute) if self.activation == "bfloat16" else None


def recipe_of(recipe: TrtRecipe, kind: str) -> TrtRecipe:
    """The same for another part of the same graph."""
    other = recipe.with_kind(TRT_KINDS[kind].kind)
    assert isinstance(other, TrtRecipe)
    return other


class Bf16Linear(_Packed):
    """x @ weight_KN + bias_N in bfloat16."""

    def __init__(self, recipe: Recipe, sources: tuple[Any, ...], compute: torch.dtype) -> None:
        super().__init__(recipe, sources, compute)
        shape = (self.columns, self.rows)
        hold(self, "weight", shape, torch.bfloat16, self._values)

    def _values(self) -> Any:
        import ml_dtypes

        parts = ((rows, values.t().numpy().astype(ml_dtypes.bfloat16)) for rows, values in self.chunks())
        return self.gather((self.columns, self.rows), ml_dtypes.bfloat16, parts, axis=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x.to(self.compute), self.weight.to(self.compute))
        return y if self.bias is None else y + self.bias


class Int8Linear(_Packed):
    """QuantizeLinear and DequantizeLinear around both factors: TensorRT makes one int8 product of it.

    Symmetric throughout: the input over its calibrated range, the weight per output column.
    """

    def __init__(self, recipe: Recipe, sources: tuple[Any, ...], compute: torch.dtype) -> None:
        super().__init__(recipe, sources, compute)
        step = max(_reach(recipe.ranges.get(recipe.student.paths[sources[0]])) / 127, TINY)
        self.register_buffer("step", torch.tensor(step).to(compute))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int8))
        element = np.float32 if compute == torch.float32 else np.float16
        hold(self, "weight", (self.columns, self.rows), torch.int8, self._codes)
        hold(self, "scales", (self.rows,), compute, lambda: self._scales().astype(element))

    def _scales(self) -> Any:
        steps = ((r, np.maximum(w.abs().amax(1).numpy() / 127, TINY)) for r, w in self.chunks())
        scales = self.gather((self.rows,), np.float32, steps)
        # codes are made for the scale as it is stored
        return scales if self.compute == torch.float32 else scales.astype(np.float16).astype(np.float32)

    def _codes(self) -> Any:
        scales = torch.from_numpy(self._scales())
        rounded = ((r, (w / scales[r, None]).round().clamp(-127, 127)) for r, w in self.chunks())
        codes = ((r, w.to(torch.int8).t().numpy()) for r, w in rounded)
        return self.gather((self.columns, self.rows), np.int8, codes, axis=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.compute)
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, self.step, self.zero), dtype=torch.int8, shape=x.shape, version=19
        )
        rounded = torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, self.step, self.zero), dtype=self.compute, shape=x.shape, version=19
        )
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.weight, self.scales),
            {"axis": 1},
            dtype=self.compute,
            shape=(self.columns, self.rows),
            version=19,
        )
        y = torch.matmul(rounded, weight)
        return y if self.bias is None else y + self.bias


def _reach(seen: Range | None) -> float:
    return 1.0 if seen is None else max(abs(seen.low), abs(seen.high))


class Int4Linear(_Packed):
    """Weight only: int4 codes and scales in blocks along K, widened where the product is taken."""

    def __init__(self, recipe: Recipe, sources: tuple[Any, ...], compute: torch.dtype, block: int) -> None:
        super().__init__(recipe, sources, compute)
        self.block = block
        element = np.float32 if compute == torch.float32 else np.float16
        groups = (self.columns // block, self.rows)
        scales = lambda: ((r, b.scales_NG.T) for r, b in self.blocks())  # noqa: E731
        hold(self, "weight", (self.columns, self.rows), torch.int8, self._codes, "INT4")
        hold(self, "scales", groups, compute, lambda: self.gather(groups, element, scales(), axis=1))

    def _codes(self) -> Any:
        import ml_dtypes

        codes = ((r, b.codes_NK().T) for r, b in self.blocks())
        return self.gather((self.columns, self.rows), np.int8, codes, axis=1).astype(ml_dtypes.int4)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.weight, self.scales),
            {"axis": 0, "block_size": self.block},
            dtype=self.compute,
            shape=(self.columns, self.rows),
            version=21,
        )
        y = torch.matmul(x.to(self.compute), weight)
        return y if self.bias is None else y + self.bias
