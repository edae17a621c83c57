"""A checkpoint's tensors under one spelling of their names, read in pieces: no file is mapped and no model is built.

Peak memory of a conversion is then a few blocks, whatever the checkpoint holds. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm.errors import CheckpointError

BLOCK_BYTES = 16 << 20
HEADER_LIMIT = 100 << 20
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
# spellings of transformers 4 and 5, in files and in memory -> the one used here
PREFIXES = (
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
)
# never part of what a LLaVA student computes
IGNORED = ("vision_tower.head.", "vision_tower.post_layernorm.", ".rotary_emb.inv_freq", ".embeddings.position_ids")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies; `dtype` as safetensors calls it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        return self.count * DTYPES[self.dtype].itemsize


class Weights:
    """All tensors of some safetensors files by canonical name."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.stored: dict[str, Stored] = {}
        for path in paths:
            self.stored |= read_index(path)

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def __getitem__(self, name: str) -> Stored:
        """Raises CheckpointError where there is no such tensor."""
        if name not in self.stored:
            some = next(iter(self.stored.values()), None)
            raise CheckpointError(f"{some.path.parent if some else 'the checkpoint'} lacks {name}; save it again")
        return self.stored[name]

    @property
    def kind(self) -> str:
        """The narrowest GGUF type that holds every matrix exactly: f32, f16 or bf16."""
        kinds = {stored.dtype for stored in self.stored.values() if len(stored.shape) > 1}
        return kinds.pop().lower() if len(kinds) == 1 else "f32"

    def raw_blocks(self, name: str) -> Iterator[Array]:
        """Rows as stored (bfloat16 as uint16), about BLOCK_BYTES at a time."""
        stored = self[name]
        dtype = DTYPES[stored.dtype]
        tail = stored.shape[1:]
        row = int(np.prod(tail, dtype=np.int64))
        rows = stored.shape[0] if stored.shape else 1
        step = max(BLOCK_BYTES // max(row * dtype.itemsize, 1), 1)
        with stored.path.open("rb") as file:
            file.seek(stored.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                flat = np.fromfile(file, dtype, count * row)
                if len(flat) != count * row:
                    raise CheckpointError(f"{stored.path} ends inside {name}; copy it again")
                yield flat.reshape(count, *tail) if stored.shape else flat.reshape(())

    def blocks(self, name: str) -> Iterator[Array]:
        """Rows in float32, about BLOCK_BYTES of stored numbers at a time."""
        return (widen(block) for block in self.raw_blocks(name))

    def whole(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor in float32."""
        return np.concatenate(list(self.blocks(name))) if self[name].shape else next(self.blocks(name))

    def equal(self, a: str, b: str) -> bool:
        """Whether two tensors hold the same numbers."""
        if self[a].shape != self[b].shape:
            return False
        return all(bool((x == y).all()) for x, y in zip(self.blocks(a), self.blocks(b), strict=False))


def widen(block: Array) -> npt.NDArray[np.float32]:
    """float32 copy; uint16 is taken for bfloat16."""
    if block.dtype == np.uint16:
        return (block.astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float32, copy=False)


def canonical(name: str) -> str:
    """`model.language_model.layers.0.mlp.up_proj.weight` and its other spellings -> one name."""
    name = name.removeprefix("model.")
    for old, new in PREFIXES:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def read_index(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file; only its header is read.

    Raises:
        CheckpointError: the file is damaged, or holds numbers in a type that is not a float of 16 or 32 bits.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, HEADER_LIMIT):
                raise ValueError("no header")
            header = json.loads(file.read(length))
        found: dict[str, Stored] = {}
        for raw, entry in header.items():
            if raw == "__metadata__":
                continue
            if 8 + length + entry["data_offsets"][1] > size:
                raise ValueError(f"{raw} lies beyond its end")
            name = canonical(raw)
            if any(part in name for part in IGNORED):
                continue
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: {raw} is stored as {entry['dtype']}; save the student in float32, float16 or bfloat16"
                )
            found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be loaded ({error}); copy it again") from None
    return found
