"""Inputs and outputs of each graph: names, types, symbolic shapes, and example tensors to trace with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.student import Facts, Student

if TYPE_CHECKING:
    from torch import Tensor

BATCH, NEW, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
# sizes that torch.export does not specialise on, all different so that a mixed-up axis fails at once
EXAMPLE = {BATCH: 2, NEW: 5, PAST: 3, TOTAL: 8}


@dataclass(frozen=True)
class Port:
    """One graph input or output; a dimension is a number or the name of a free size."""

    name: str
    dtype: str
    dims: tuple[str | int, ...]

    def to_json(self) -> list[Any]:
        return [self.name, self.dtype, list(self.dims)]


@dataclass(frozen=True)
class GraphSpec:
    """The outside of one graph."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def to_json(self) -> dict[str, Any]:
        return {"inputs": [p.to_json() for p in self.inputs], "outputs": [p.to_json() for p in self.outputs]}


def vision_spec(facts: Facts, tokens: int, dtype: str = "float32") -> GraphSpec:
    side = facts.image_size
    return GraphSpec(
        (Port("pixel_values", dtype, (BATCH, 3, side, side)),),
        (Port("image_features", dtype, (BATCH, tokens, facts.hidden)),),
    )


def embed_spec(facts: Facts) -> GraphSpec:
    return GraphSpec(
        (Port("input_ids", "int64", (BATCH, NEW)),), (Port("inputs_embeds", "float32", (BATCH, NEW, facts.hidden)),)
    )


def decoder_spec(facts: Facts, dtype: str = "float32") -> GraphSpec:
    """transformers.js names; the cache is of `dtype`, in axis order [batch, head, position, width]."""

    def cache(prefix: str, length: str) -> tuple[Port, ...]:
        dims = (BATCH, facts.kv_heads, length, facts.head_dim)
        return tuple(
            Port(f"{prefix}.{i}.{part}", dtype, dims) for i in range(facts.layers) for part in ("key", "value")
        )

    return GraphSpec(
        (
            Port("inputs_embeds", "float32", (BATCH, NEW, facts.hidden)),
            Port("attention_mask", "int64", (BATCH, TOTAL)),
            Port("position_ids", "int64", (BATCH, NEW)),
            Port("num_logits_to_keep", "int64", ()),
            *cache("past_key_values", PAST),
        ),
        (Port("logits", "float32", (BATCH, "num_logits", facts.vocab_size)), *cache("present", TOTAL)),
    )


def delta_spec(facts: Facts, dtype: str, cache_dtype: str) -> GraphSpec:
    """Batch one, cache rows [position, head, width] so that new rows land behind the old ones in memory.

    Args:
        dtype: of embeddings and bias. cache_dtype: of keys and values.
    """

    def cache(prefix: str, length: str) -> tuple[Port, ...]:
        dims = (1, length, facts.kv_heads, facts.head_dim)
        return tuple(Port(f"{prefix}_{p}.{i}", cache_dtype, dims) for i in range(facts.layers) for p in "kv")

    return GraphSpec(
        (
            Port("inputs_embeds", dtype, (1, NEW, facts.hidden)),
            Port("position_ids", "int64", (1, NEW)),
            Port("attention_bias", dtype, (1, 1, NEW, TOTAL)),
            *cache("past", PAST),
        ),
        (Port("logits", "float32", (1, 1, facts.vocab_size)), Port("token", "int64", (1, 1)), *cache("new", NEW)),
    )


def example_inputs(spec: GraphSpec, student: Student) -> dict[str, Tensor]:
    """One tensor per input, by optimum's dummy generators where they know the input."""
    import torch
    from optimum.utils import (
        DummyTextInputGenerator,
        DummyVisionInputGenerator,
        NormalizedTextConfigWithGQA,
        NormalizedVisionConfig,
    )

    config = student.model.config
    text = DummyTextInputGenerator(
        "text-generation",
        NormalizedTextConfigWithGQA(config.text_config),
        batch_size=EXAMPLE[BATCH],
        sequence_length=EXAMPLE[NEW],
    )
    vision = DummyVisionInputGenerator(
        "image-text-to-text", NormalizedVisionConfig(config.vision_config), batch_size=EXAMPLE[BATCH]
    )
    made: dict[str, Tensor] = {}
    for port in spec.inputs:
        dtype = getattr(torch, port.dtype)
        shape = [EXAMPLE[d] if isinstance(d, str) else d for d in port.dims]
        if port.name == "pixel_values":
            made[port.name] = vision.generate(port.name, framework="pt").to(dtype)
        elif port.name == "input_ids":
            made[port.name] = text.generate(port.name, framework="pt")
        elif port.name == "position_ids":
            made[port.name] = torch.arange(EXAMPLE[NEW]).expand(shape) + EXAMPLE[PAST]
        elif port.dtype == "int64":
            made[port.name] = torch.ones(shape, dtype=dtype)
        else:
            made[port.name] = torch.randn(shape).to(dtype)
    return made
