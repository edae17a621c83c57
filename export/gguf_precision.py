"""How many bits each part of a GGUF artefact gets: `q4_k_m`, or `q4_k_m,vision=q8_0,embed=q6_k,head=q6_k`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlm.errors import UserError

FLOATS = ("f16", "f32", "bf16")
# llama.cpp's file type numbers, and the type most matrices get
FILE_TYPES: dict[str, tuple[int, str]] = {
    "f32": (0, "F32"),
    "f16": (1, "F16"),
    "q4_0": (2, "Q4_0"),
    "q8_0": (7, "Q8_0"),
    "q4_k_m": (15, "Q4_K"),
    "q5_k_m": (17, "Q5_K"),
    "q6_k": (18, "Q6_K"),
    "iq2_xxs": (19, "IQ2_XXS"),
    "iq2_xs": (20, "IQ2_XS"),
    "iq3_xxs": (23, "IQ3_XXS"),
    "iq4_nl": (25, "IQ4_NL"),
    "iq3_s": (26, "IQ3_S"),
    "iq3_m": (27, "IQ3_S"),
    "iq2_s": (28, "IQ2_XS"),
    "iq2_m": (29, "IQ2_S"),
    "iq4_xs": (30, "IQ4_XS"),
    "bf16": (32, "BF16"),
}
KINDS = ("f16", "q8_0", *(k for k in FILE_TYPES if k not in ("f16", "q8_0")))
VISION = ("f16", "f32", "q8_0")
TABLES = ("f32", "f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0")
PARTS = ("vision", "embed", "head")
# of a row, in elements
BLOCK = {
    **dict.fromkeys(("F32", "F16", "BF16"), 1),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"), 32),
}


@dataclass(frozen=True)
class GgufPrecision:
    """One kind per part; `embed` and `head` None leave the choice to llama.cpp's mixture."""

    decoder: str
    vision: str = "f16"
    embed: str | None = None
    head: str | None = None

    @property
    def quantised(self) -> bool:
        """Whether llama.cpp has to write the text file once more."""
        return self.decoder not in FLOATS or self.embed is not None or self.head is not None

    @property
    def weighted(self) -> bool:
        """Whether an importance matrix improves the result: below 8 bits."""
        return self.decoder not in (*FLOATS, "q8_0")

    @property
    def needs_importance(self) -> bool:
        return self.decoder.startswith("iq")

    def text(self) -> str:
        """The shortest --precision that gives this."""
        default = parse_gguf(self.decoder)
        changed = [f"{p}={getattr(self, p)}" for p in PARTS if getattr(self, p) != getattr(default, p)]
        return ",".join([self.decoder, *changed])


def parse_gguf(text: str) -> GgufPrecision:
    """`q4_k_m` or `q4_k_m,vision=q8_0`; upper case as in file names is read too.

    Raises:
        UserError: a word that is no precision or part.
    """
    base, *overrides = text.lower().split(",")
    if base not in FILE_TYPES:
        raise UserError(f"precision {base!r} is not available for gguf; choose from {', '.join(KINDS)}")
    chosen = GgufPrecision(base, "f32" if base == "f32" else "f16")
    for item in overrides:
        part, _, kind = item.partition("=")
        offered = {"vision": VISION, "embed": TABLES, "head": TABLES}.get(part, ())
        if kind not in offered:
            raise UserError(
                f"precision override {item!r} is not PART=KIND; vision: {', '.join(VISION)}; "
                f"embed and head: {', '.join(TABLES)}"
            )
        chosen = replace(chosen, **{part: kind})
    return chosen


def block_of(type_name: str) -> int:
    """Elements of a row that are rounded together."""
    return BLOCK.get(type_name, 256)


def fell_back(precision: GgufPrecision, shapes: dict[str, tuple[int, ...]], types: dict[str, str]) -> dict[str, int]:
    """Matrices whose rows do not divide into the blocks of the kind asked for, by what they got instead.

    Args:
        shapes: of every tensor, rows first.
        types: GGML type of every tensor in the file.

    Returns: `{"Q4_K -> Q5_0 (rows of 896)": 24}`.
    """
    wanted = FILE_TYPES[precision.decoder][1]
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        asked = {"token_embd.weight": precision.embed, "output.weight": precision.head}.get(name)
        if len(shape) < 2 or asked or shape[-1] % block_of(wanted) == 0 or block_of(types[name]) > 32:
            continue
        line = f"{wanted} -> {types[name]} (rows of {shape[-1]})"
        found[line] = found.get(line, 0) + 1
    return found
