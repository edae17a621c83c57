"""Symmetric block quantisation of matrices: codes and scales in the layout of ONNX Runtime's MatMulNBits.

Shape legend: K input columns, N output rows, G = ceil(K / block) blocks.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.precision import BLOCK, Algorithm

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
# scales tried around the one that maps the largest magnitude to the end of the range
CANDIDATES = np.arange(-9, 10, dtype=np.float32) * np.float32(0.1)
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix: value = (code - 2^(bits-1)) * scale.

    Attributes:
        packed_NGb: codes, low bits first, each block padded to full length: [N, G, block * bits / 8].
        scales_NG: one per block.
        columns: K.
        bits: 4 or 8.
    """

    packed_NGb: U8
    scales_NG: F32
    columns: int
    bits: int

    def codes_NK(self) -> npt.NDArray[np.int8]:
        """Signed codes."""
        flat = self.packed_NGb.reshape(len(self.packed_NGb), -1)
        if self.bits == 4:
            flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(len(flat), -1)
        return (flat[:, : self.columns].astype(np.int16) - (1 << (self.bits - 1))).astype(np.int8)

    def values_NK(self) -> F32:
        """What a runtime multiplies by."""
        block = self.packed_NGb.shape[2] * 8 // self.bits
        scales = np.repeat(self.scales_NG, block, axis=1)[:, : self.columns]
        values: F32 = self.codes_NK().astype(np.float32) * scales
        return values


def quantise(
    weight_NK: Any, bits: int, algorithm: Algorithm = "default", importance_K: Any = None, block: int = BLOCK
) -> Blocks:
    """Quantise a torch [out, in] matrix.

    Args:
        algorithm: `default` is ONNX Runtime's own rounding; `search` tries scales around it and keeps the one with the
            least squared error, each column weighted by `importance_K` (mean squared activation) where given, like
            the k-quant search of llama.cpp. 8-bit codes are fine enough for the former.
    """
    weight = np.ascontiguousarray(weight_NK.detach().float().numpy())
    if algorithm == "search" and bits == 4:
        importance = None if importance_K is None else np.asarray(importance_K, np.float32)
        parts = [
            _search(weight[start : start + ROWS_AT_ONCE], importance, block)
            for start in range(0, len(weight), ROWS_AT_ONCE)
        ]
        packed, scales = (np.concatenate(pair) for pair in zip(*parts, strict=True))
        return Blocks(packed, scales, weight.shape[1], bits)
    return _by_runtime(weight, bits, block)


def _by_runtime(weight_NK: F32, bits: int, block: int) -> Blocks:
    packed, scales, _ = _quantizer(bits, block).qbits_block_quant(np.ascontiguousarray(weight_NK.T))
    return Blocks(packed, scales.reshape(len(packed), -1).astype(np.float32), weight_NK.shape[1], bits)


@functools.cache
def _quantizer(bits: int, block: int) -> Any:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    root.handlers[:] = handlers
    root.setLevel(level)  # the import turns on everybody's messages
    config = DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=True, quant_format=QuantFormat.QOperator, bits=bits
    )
    return DefaultWeightOnlyQuantizer(config)


def _search(weight_NK: F32, importance_K: F32 | None, block: int) -> tuple[U8, F32]:
    rows, columns = weight_NK.shape
    padding = -columns % block
    x = np.pad(weight_NK, ((0, 0), (0, padding))).reshape(rows, -1, block)
    ones = np.ones(columns, np.float32) if importance_K is None else importance_K / max(importance_K.mean(), 1e-30)
    # a channel that was silent on the calibration set still counts a little
    weights = np.pad(np.maximum(ones, 1e-3), (0, padding)).reshape(1, -1, block)
    peak = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    best_gain = np.full(peak.shape, -np.inf, np.float32)
    best_codes, best_scales = np.zeros(x.shape, np.float32), np.zeros(peak.shape, np.float32)
    for shift in CANDIDATES:
        inverse = np.divide(-(8 + shift), peak, out=np.zeros_like(peak), where=peak != 0)
        codes = np.clip(np.rint(x * inverse[..., None]), -8, 7)
        cross, power = (weights * x * codes).sum(-1), (weights * codes * codes).sum(-1)
        # the least-squares scale for these codes, and how much error it removes
        scale = np.divide(cross, power, out=np.zeros_like(cross), where=power > 0)
        gain = cross * scale
        better = gain > best_gain
        best_gain[better], best_scales[better], best_codes[better] = gain[better], scale[better], codes[better]
    nibbles = (best_codes + 8).astype(np.uint8)
    packed: U8 = nibbles[..., ::2] | (nibbles[..., 1::2] << np.uint8(4))
    return packed, np.asarray(best_scales, np.float32)


def block_of(columns: int) -> int | None:
    """The block size that divides a row exactly, for operators that do not pad; None if there is none."""
    return next((size for size in (BLOCK, 16) if columns % size == 0), None)
