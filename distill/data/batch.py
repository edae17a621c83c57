"""Examples -> padded batches, always through vlm.chat and vlm.preprocess."""

from __future__ import annotations

import dataclasses
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
from distill.data.latent import put_in
from vlm import chat, digits, preprocess

SPANS = ("template", "image", "instruction", "response")
_CODES = {name: code for code, name in enumerate(SPANS)}


@dataclass(frozen=True)
class Example:
    """One tokenised conversation.

    Attributes:
        pixels: one CHW array per image.
        steps: per token the step of a reasoning it belongs to, from 1; 0 for none (see distill.data.rationale).
        weights: per token how much it counts in the response terms; None where all count alike.
        number: which record this is, where it has weights.
    """

    ids: tuple[int, ...]
    spans: tuple[str, ...]
    pixels: tuple[preprocess.Pixels, ...]
    steps: npt.NDArray[np.int16] | None = None
    weights: npt.NDArray[np.float32] | None = None
    number: int = 0

    def cut(self, end: int) -> Example:
        """The first `end` tokens, as a prompt: nothing is trained on it."""
        return dataclasses.replace(self, ids=self.ids[:end], spans=self.spans[:end], steps=None, weights=None)

    @cached_property
    def codes(self) -> npt.NDArray[np.int8]:
        """The spans as numbers, places in SPANS."""
        return np.fromiter(map(_CODES.__getitem__, self.spans), np.int8, len(self.spans))


class Examples(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


def at_hand(examples: Examples) -> int:
    """How many of the first samples can be read in any order: all of them, or what a stream keeps."""
    return int(getattr(examples, "at_hand", len(examples)))


class DigitsExamples(Dataset):  # type: ignore[type-arg]
    """The digits stream of one split as training examples.

    Args:
        steps: answers say their reasoning first.
    """

    def __init__(
        self,
        split: digits.Split,
        count: int,
        tokenizer: chat.ChatTokenizer,
        image: preprocess.ImageSpec,
        seed: int = 0,
        augment: bool = False,
        steps: bool = False,
    ) -> None:
        self.split, self.count, self.seed, self.augment, self.steps = split, count, seed, augment, steps
        self.tokenizer, self.image = tokenizer, image

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        sample = digits.sample(self.split, index, self.seed, self.augment)
        if self.steps:
            return self._reasoned(sample)
        messages = [chat.user_message(sample.question), {"role": "assistant", "content": sample.answer}]
        conversation = self.tokenizer.conversation(messages)
        return Example(conversation.ids, conversation.spans, (preprocess.pixels(sample.image, self.image),))

    def _reasoned(self, sample: digits.Sample) -> Example:
        from distill.data.digits_steps import reasoning
        from distill.data.rationale import conversation_of, step_numbers

        record = conversation_of(sample.question, *reasoning(sample), images=1)
        found = self.tokenizer.conversation(record.messages)
        pixels = (preprocess.pixels(sample.image, self.image),)
        return Example(found.ids, found.spans, pixels, step_numbers(found, record, self.tokenizer))


@dataclass(frozen=True)
class Collator:
    """Examples -> a dict of tensors the Trainer can move between devices; see `to_batch`.

    Attributes:
        keys: add the samples' content keys, which a teacher read from disk is asked by.
        latents: a student's latent tokens, put in before every answer; keys are those of the samples without.
    """

    pad_token_id: int
    pad_left: bool = False
    keys: bool = False
    latents: tuple[int, ...] = ()

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        keys = {"keys": keys_tensor(examples)} if self.keys else {}
        if self.latents:
            examples = [put_in(example, self.latents) for example in examples]
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
            **({"latent": torch.from_numpy(np.isin(ids_BT, self.latents))} if self.latents else {}),
            **keys,
            **self._steps_and_weights(examples, length),
        }

    def _steps_and_weights(self, examples: Sequence[Example], length: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if all(example.steps is not None for example in examples):
            found["step"] = self._padded([example.steps for example in examples], length, np.int16)
        if all(example.weights is not None for example in examples):
            found["token_weight"] = self._padded([example.weights for example in examples], length, np.float32)
            found["record"] = torch.tensor([example.number for example in examples])
        return found

    def _padded(self, rows: Sequence[Any], length: int, kind: Any) -> Tensor:
        found_BT = np.zeros((len(rows), length), kind)
        for row, values in enumerate(rows):
            start = length - len(values) if self.pad_left else 0
            found_BT[row, start : start + len(values)] = values
        return torch.from_numpy(found_BT)


def to_batch(tensors: dict[str, Tensor]) -> Batch:
    pixels = tensors["pixel_values"]
    return Batch(
        tensors["input_ids"],
        tensors["attention_mask"],
        tensors["image"],
        tensors["instruction"],
        tensors["response"],
        pixels if pixels.numel() else None,
        token_weight_BT=tensors.get("token_weight"),
        step_BT=tensors.get("step"),
        latent_BT=tensors.get("latent"),
        key_B4=tensors.get("keys"),
    )


def batches(examples: Examples, indices: Sequence[int], size: int, collate: Collator, device: Any) -> Iterator[Batch]:
    """Batches of the given examples in order, on `device`."""
    for start in range(0, len(indices), size):
        tensors = collate([examples[i] for i in indices[start : start + size]])
        yield to_batch({name: value.to(device) for name, value in tensors.items()})
