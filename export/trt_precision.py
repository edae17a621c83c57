"""Precisions of a TensorRT artefact. All of them are in the graph: TensorRT 11 has no other way, and 10 allows this one.

| kind | matrices | products and residual stream |
|---|---|---|
| fp32, fp16, bf16 | as named | as named |
| int8 | int8 per output column | inputs rounded to int8 over a calibrated range, zero point 0; the rest float16 |
| int4 | int4 in blocks of 128 or 64 rows, zero point 0 | float16 |
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from export.precision import KINDS, Kind
from vlm.errors import UserError

BLOCKS = (128, 64)  # the block sizes of TensorRT's int4 kernels, the preferred one first


@dataclass(frozen=True)
class TrtKind:
    """One precision of one part.

    Attributes:
        kind: bits of the matrices, and whether activations are 16 bits wide.
        activation: element type of everything that is not a matrix.
        opset: the first that can say it.
    """

    kind: Kind
    activation: str
    opset: int


TRT_KINDS: dict[str, TrtKind] = {
    "fp16": TrtKind(KINDS["fp16"], "float16", 18),
    "bf16": TrtKind(KINDS["fp16"], "bfloat16", 18),
    "int8": TrtKind(replace(KINDS["int8"], half=True), "float16", 19),  # the first with float16 scales
    "int4": TrtKind(KINDS["q4f16"], "float16", 21),  # the first with int4 and blocks
    "fp32": TrtKind(KINDS["fp32"], "float32", 18),
}


@dataclass(frozen=True)
class TrtPrecision:
    """One kind per part; the head lives in the decoder's graph and shares its activation type."""

    vision: str
    decoder: str
    head: str

    @property
    def activation(self) -> str:
        """Of the decoder: element type of its cache."""
        return TRT_KINDS[self.decoder].activation

    @property
    def io(self) -> str:
        """Element type of what the host hands over; NumPy has no bfloat16."""
        return "float32" if self.activation == "bfloat16" else self.activation

    @property
    def decoder_opset(self) -> int:
        return max(TRT_KINDS[self.decoder].opset, TRT_KINDS[self.head].opset)

    @property
    def calibrated(self) -> bool:
        """Whether anything here has a range to be measured."""
        return "int8" in (self.vision, self.decoder, self.head)


PRESETS: dict[str, TrtPrecision] = {
    "fp16": TrtPrecision("fp16", "fp16", "fp16"),
    "bf16": TrtPrecision("bf16", "bf16", "bf16"),
    "int8": TrtPrecision("int8", "int8", "fp16"),
    "int4": TrtPrecision("fp16", "int4", "int4"),
    "fp32": TrtPrecision("fp32", "fp32", "fp32"),
}
TRT_PARTS: tuple[str, ...] = tuple(f.name for f in fields(TrtPrecision))


def parse_trt_precision(text: str) -> TrtPrecision:
    """`fp16`, `int4`, `int4,vision=int8,head=fp16`.

    Raises:
        UserError: a word that is no precision or part, or a head that cannot share its decoder's activations.
    """
    base, *overrides = text.split(",")
    if base not in PRESETS:
        raise UserError(f"precision {base!r} is not available for tensorrt; choose from {', '.join(PRESETS)}")
    chosen = PRESETS[base]
    for item in overrides:
        part, _, kind = item.partition("=")
        if part not in TRT_PARTS or kind not in TRT_KINDS:
            raise UserError(
                f"precision override {item!r} is not PART=KIND; parts: {', '.join(TRT_PARTS)}; "
                f"kinds: {', '.join(TRT_KINDS)}"
            )
        chosen = replace(chosen, **{part: kind})
    if TRT_KINDS[chosen.head].activation != chosen.activation:
        raise UserError(
            f"precision {text!r}: a {chosen.head} head does not fit a {chosen.decoder} decoder, whose activations are "
            f"{chosen.activation}; give the head a kind of the same activations"
        )
    return chosen
