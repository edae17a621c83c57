"""TensorRT artefacts, whatever runs their graphs: embedding table on the host, cache rows appended in place.

A runner executes the two graphs and keeps the cache; everything else (pixels, template, merging images into the
embeddings, cutting long prompts into pieces a profile takes) is here, once.

Shape legend: N = images, C = 3, S = image side, T = visual tokens, L = new tokens, P = past rows (row 0 is reserved and
always masked, so P is never 0), D = hidden, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from runtime.api import Logits, Message, PreparedImage, Prompt
from runtime.options import LoadOptions
from runtime.source import Source, visible
from vlm import preprocess
from vlm.errors import ArtifactError

RESERVED = 1
NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int64": np.dtype(np.int64),
}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
Array = npt.NDArray[Any]


class Runner(Protocol):
    """Executes the graphs of one artefact. `length` counts rows that hold tokens, the reserved one not among them.

    Attributes:
        max_new: rows one call may append. context: rows there is room for.
    """

    max_new: int
    context: int

    def encode(self, pixels_NCSS: Array) -> Array:
        """Visual tokens [N, T, D] in the host's memory, not touched again."""
        ...

    def extend(self, embeds_LD: Array, length: int) -> Logits:
        """Append L <= max_new tokens behind the first `length` ones; logits_V after the last."""
        ...

    def forget(self) -> None:
        """A new conversation begins; what an earlier one left behind must not reach it."""
        ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class DeviceLogits:
    """Logits that stay on the device until somebody looks, and the likeliest token, which is already here.

    Greedy decoding asks for `argmax()` only. Holds until the backend's next call, as all logits do.
    """

    def __init__(self, token: int, fetch: Callable[[], Logits]) -> None:
        self._token, self._fetch, self._values = token, fetch, cast("Logits | None", None)
        self._over = False

    def argmax(self, axis: object = None, out: object = None, **_: object) -> int:
        return self._token

    def end(self) -> None:
        """The device's copy is about to be overwritten."""
        self._over = True

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if self._values is None:
            if self._over:
                raise RuntimeError("these logits were overwritten by the next step; copy them before it")
            self._values = self._fetch()
        return np.array(self._values, dtype=dtype, copy=True if copy is None else copy)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # NumPy asks for other ways in first
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self)[key]

    def __len__(self) -> int:
        return len(np.asarray(self))


def bias_of(new: int, past: int, dtype: Any) -> Array:
    """attention_bias [L, P + L]: 0 where a query may look, the smallest finite number elsewhere."""
    allowed = np.arange(past + new)[None, :] <= np.arange(past, past + new)[:, None]
    allowed[:, :RESERVED] = False
    return np.where(allowed, 0, np.finfo(dtype).min).astype(dtype)


class DeltaBackend:
    """Same steps, caches and timings as every other backend."""

    def __init__(self, source: Source, options: LoadOptions, runner: Runner, name: str) -> None:
        self._source, self._runner = source, runner
        info = source.info(name, options)
        self.info = replace(info, context_length=min(info.context_length, runner.context))
        path = source.path_of("embed_tokens")
        try:
            self._table_VD = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise ArtifactError(f"{path} is not a table of embeddings ({error}); export again") from None
        if self._table_VD.shape[0] < self.info.vocab_size:
            raise ArtifactError(f"{path} has {self._table_VD.shape[0]} rows for {self.info.vocab_size} tokens")
        self._length = 0

    def prepare(self, messages: Sequence[Message], at_hand: Container[str] = frozenset()) -> Prompt:
        return self._source.prompt(messages, preprocess.pixels, at_hand)

    def encode(self, images: Sequence[PreparedImage]) -> list[Any]:
        features_NTD = self._runner.encode(np.stack([image.pixels for image in images]))
        return [embeds_TD.copy() for embeds_TD in features_NTD]  # each may be kept without the others

    def prefill(self, prompt: Prompt, embeds: Sequence[Any], start: int = 0, stop: int | None = None) -> Logits:
        end = len(prompt.ids) if stop is None else stop
        if start == 0:
            self._runner.forget()
        logits_V: Logits | None = None
        for first in range(start, end, self._runner.max_new):
            last = min(first + self._runner.max_new, end)
            embeds_LD = self._table_VD[list(prompt.ids[first:last])]
            for place, rows in visible(prompt, self.info.tokens_per_image, first, last):
                embeds_LD[place] = embeds[rows.image][rows.rows]
            logits_V = self._runner.extend(embeds_LD, first)
        if logits_V is None:
            raise ValueError("nothing to take in")
        self._length = end
        return logits_V

    def step(self, token_id: int) -> Logits:
        logits_V = self._runner.extend(self._table_VD[token_id : token_id + 1], self._length)
        self._length += 1
        return logits_V

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._source.tokenizer.decode(ids)

    def pieces(self) -> Mapping[int, str | bytes] | None:
        """Text of every token by itself, where the tokenizer has one."""
        return self._source.pieces

    def sync(self) -> None:
        self._runner.sync()

    def close(self) -> None:
        self._runner.close()


def ports(io: Mapping[str, Any], graph: str, side: str) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Name -> (type, dimensions) of a graph's inputs or outputs, as the manifest declares them.

    Raises:
        ArtifactError: the declaration is not there.
    """
    try:
        return {name: (dtype, tuple(dims)) for name, dtype, dims in io[graph][side]}
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"the manifest does not declare the {side} of {graph}; export again") from None
