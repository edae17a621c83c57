"""Examples -> padded batches, always through vlm.chat and vlm.preprocess."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.batch import Batch
from distill.cache_key import keys_tensor
from vlm import chat, digits, preprocess

SPANS = ("template", "image", "instruction", "response")
_CODES = {name: code for code, name in enumerate(SPANS)}


@dataclass(frozen=True)
class Example:
    """One tokenised conversation; `pixels` has one CHW array per image."""

    ids: tuple[int, ...]
    spans: tuple[str, ...]
    pixels: tuple[preprocess.Pixels, ...]

    @cached_property
    def codes(self) -> npt.NDArray[np.int8]:
        """The spans as numbers, places in SPANS."""
        return np.fromiter(map(_CODES.__getitem__, self.spans), np.int8, len(self.spans))


class Examples(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


class DigitsExamples(Dataset):  # type: ignore[type-arg]
    """The digits stream of one split as training examples."""

    def __init__(
        self,
        split: digits.Split,
        count: int,
        tokenizer: chat.ChatTokenizer,
        image: preprocess.ImageSpec,
        seed: int = 0,
        augment: bool = False,
    ) -> None:
        self.split, self.count, self.seed, self.augment = split, count, seed, augment
        self.tokenizer, self.image = tokenizer, image

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        sample = digits.sample(self.split, index, self.seed, self.augment)
        messages = [chat.user_message(sample.question), {"role": "assistant", "content": sample.answer}]
        conversation = self.tokenizer.conversation(messages)
        return Example(conversation.ids, conversation.spans, (preprocess.pixels(sample.image, self.image),))


@dataclass(frozen=True)
class Collator:
    """Examples -> a dict of tensors the Trainer can move between devices; see `to_batch`.

    Attributes:
        keys: add the samples' content keys, which a teacher read from disk is asked by.
    """

    pad_token_id: int
    pad_left: bool = False
    keys: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(example.ids) for example in examples)
        ids_BT = np.full((len(examples), length), self.pad_token_id, np.int64)
        attention_BT = np.zeros((len(examples), length), np.int64)
        codes_BT = np.full((len(examples), length), -1, np.int8)
        for row, example in enumerate(examples):
            start = length - len(example.ids) if self.pad_left else 0
            stop = start + len(example.ids)
            ids_BT[row, start:stop] = example.ids
            attention_BT[row, start:stop] = 1
            codes_BT[row, start:stop] = example.codes
        arrays = [array for example in examples for array in example.pixels]
        return {
            "input_ids": torch.from_numpy(ids_BT),
            "attention_mask": torch.from_numpy(attention_BT),
            "pixel_values": torch.from_numpy(np.stack(arrays)) if arrays else torch.zeros(0),
            **{name: torch.from_numpy(codes_BT == _CODES[name]) for name in SPANS[1:]},
            **({"keys": keys_tensor(examples)} if self.keys else {}),
        }


def to_batch(tensors: dict[str, Tensor]) -> Batch:
    pixels = tensors["pixel_values"]
    return Batch(
        tensors["input_ids"],
        tensors["attention_mask"],
        tensors["image"],
        tensors["instruction"],
        tensors["response"],
        pixels if pixels.numel() else None,
        key_B4=tensors.get("keys"),
    )


def batches(examples: Examples, indices: Sequence[int], size: int, collate: Collator, device: Any) -> Iterator[Batch]:
    """Batches of the given examples in order, on `device`."""
    for start in range(0, len(indices), size):
        tensors = collate([examples[i] for i in indices[start : start + size]])
        yield to_batch({name: value.to(device) for name, value in tensors.items()})
