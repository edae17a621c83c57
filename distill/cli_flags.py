"""Options that are true or false may stand alone on a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from distill.config import TrainConfig


def spell_out(words: Sequence[str], more: Sequence[str]) -> list[str]:
    """`--resume` alone means `--resume=true`; the parser itself wants a value for every option.

    Args:
        more: names of flags that are a command's own.
    """
    flags = {f"--{name}" for name in (*_flags(TrainConfig(), ""), *more)}
    bare = [word in flags and (i + 1 == len(words) or words[i + 1].startswith("-")) for i, word in enumerate(words)]
    return [f"{word}=true" if alone else word for word, alone in zip(words, bare, strict=True)]


def _flags(group: Any, prefix: str) -> Iterator[str]:
    """Dotted names, those of nested options too."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, f"{prefix}{field.name}.")
        elif isinstance(value, bool):
            yield f"{prefix}{field.name}"
