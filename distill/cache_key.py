"""The key of a training sample: a hash of what the teacher is shown, so that a cache survives any order or batching."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Content(Protocol):
    """What a key is made of; see distill.data.Example."""

    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def codes(self) -> npt.NDArray[np.int8]: ...
    @property
    def pixels(self) -> Sequence[npt.NDArray[Any]]: ...


def sample_key(sample: Content) -> bytes:
    """SHA-256 of token ids, span codes and preprocessed pixels: 32 bytes."""
    digest = hashlib.sha256(np.asarray(sample.ids, np.int64).tobytes())
    digest.update(sample.codes.tobytes())
    for pixels in sample.pixels:
        digest.update(f"{pixels.dtype.str}{pixels.shape}".encode())
        digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def keys_tensor(samples: Sequence[Content]) -> Tensor:
    """key_B4, int64: keys as a tensor, so that they travel with the other tensors of a batch."""
    return torch.from_numpy(np.frombuffer(b"".join(map(sample_key, samples)), np.int64).reshape(-1, 4).copy())


def keys_bytes(key_B4: Tensor) -> list[bytes]:
    """The inverse of `keys_tensor`."""
    return [row.tobytes() for row in key_B4.cpu().numpy()]
