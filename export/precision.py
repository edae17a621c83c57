"""How many bits each part of an ONNX artefact gets, and how the four parts share three files."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from vlm.errors import UserError

Flavour = Literal["portable", "ort"]
Algorithm = Literal["default", "search"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
BLOCK = 32


@dataclass(frozen=True)
class Kind:
    """One precision of one part.

    Attributes:
        bits: stored bits of a matrix element, block scales not counted.
        half: activations, scales and cache are float16 instead of float32.
        suffix: of the file name, as transformers.js picks files by `dtype`.
        dtype: the `dtype` transformers.js calls it.
    """

    bits: int
    half: bool
    suffix: str
    dtype: str


KINDS: dict[str, Kind] = {
    "fp32": Kind(32, False, "", "fp32"),
    "fp16": Kind(16, True, "_fp16", "fp16"),
    "int8": Kind(8, False, "_int8", "int8"),
    "int4": Kind(4, False, "_q4", "q4"),
    "q4f16": Kind(4, True, "_q4f16", "q4f16"),
}
# from coarse to exact: the order in which --auto-precision raises a part
LADDER = ("int4", "int8", "fp16", "fp32")


@dataclass(frozen=True)
class Precision:
    """One kind per part; `head` lives in the decoder's file and shares the decoder's activation type."""

    vision: str
    embed: str
    decoder: str
    head: str

    @property
    def preset(self) -> str:
        """The name if all parts agree, else `mixed`."""
        names = {getattr(self, part) for part in PARTS}
        return names.pop() if len(names) == 1 else "mixed"

    @property
    def quantised(self) -> bool:
        return any(KINDS[getattr(self, part)].bits < 16 for part in PARTS)

    @property
    def flavour(self) -> Flavour:
        """Block-quantised decoders are made for ONNX Runtime's operators; plain ones for every reader."""
        return "ort" if KINDS[self.decoder].bits < 16 else "portable"

    def raised(self, part: str) -> Precision | None:
        """The same with one part a step closer to exact; None if it is exact already."""
        now = getattr(self, part)
        step = "fp16" if now == "q4f16" else next(iter(LADDER[LADDER.index(now) + 1 :]), None)
        return None if step is None else replace(self, **{part: step})

    def text(self) -> str:
        """The shortest --precision that gives this."""
        if self.preset != "mixed":
            return self.preset
        base = self.decoder
        return ",".join([base, *(f"{p}={getattr(self, p)}" for p in PARTS if getattr(self, p) != base)])


PARTS: tuple[str, ...] = tuple(f.name for f in fields(Precision))


def parse_precision(text: str) -> Precision:
    """`int4` or `int4,vision=fp16,head=int8`.

    Raises:
        UserError: a word that is no precision or part.
    """
    base, *overrides = text.split(",")
    if base not in KINDS:
        raise UserError(f"precision {base!r} is not available for onnx; choose from {', '.join(KINDS)}")
    chosen = Precision(base, base, base, base)
    for item in overrides:
        part, _, kind = item.partition("=")
        if part not in PARTS or kind not in KINDS:
            raise UserError(
                f"precision override {item!r} is not PART=KIND; parts: {', '.join(PARTS)}; kinds: {', '.join(KINDS)}"
            )
        chosen = replace(chosen, **{part: kind})
    return chosen
