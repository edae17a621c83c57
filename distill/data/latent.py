"""Puts a student's latent tokens into an example (see distill.latents). No torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from distill.data.batch import Example


def put_in(example: Example, latents: tuple[int, ...]) -> Example:
    """The example with the latents before every answer, as part of it."""
    ids: list[int] = []
    spans: list[str] = []
    at: list[int] = []
    for place, (token, span) in enumerate(zip(example.ids, example.spans, strict=True)):
        if span == "response" and (place == 0 or example.spans[place - 1] != "response"):
            ids += latents
            spans += ["response"] * len(latents)
            at += [place] * len(latents)
        ids.append(token)
        spans.append(span)
    steps = None if example.steps is None else np.insert(example.steps, at, 0).astype(np.int16)
    weights = None if example.weights is None else np.insert(example.weights, at, 1.0).astype(np.float32)
    return dataclasses.replace(example, ids=tuple(ids), spans=tuple(spans), steps=steps, weights=weights)
