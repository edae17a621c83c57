"""Records -> examples -> padded batches, always through vlm.chat and vlm.preprocess."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.objective import Batch
from vlm import chat, digits, preprocess
from vlm.errors import DataError

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Example:
    """One tokenised conversation; `pixels` has one CHW array per image."""

    ids: tuple[int, ...]
    spans: tuple[str, ...]
    pixels: tuple[preprocess.Pixels, ...]


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


class LlavaJson(Dataset):  # type: ignore[type-arg]
    """LLaVA-style JSON on disk, checked record by record before training starts.

    Raises:
        DataError: the file is not such a list, is empty, or a record is malformed or lacks its image file.
    """

    def __init__(
        self, file: Path, images: Path | None, tokenizer: chat.ChatTokenizer, image: preprocess.ImageSpec
    ) -> None:
        self.tokenizer, self.image = tokenizer, image
        self.root = images if images is not None else file.parent
        try:
            records = json.loads(file.read_text())
        except FileNotFoundError:
            raise DataError(f"no data set at {file}; check --data") from None
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); name a JSON file with --data") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is not valid JSON ({error}); export it again") from None
        if not isinstance(records, list):
            raise DataError(f"{file} holds a {type(records).__name__}, expected a list of conversations")
        if not records:
            raise DataError(f"{file} is an empty data set; name one with at least one conversation")
        self.records = [self._check(file, i, record) for i, record in enumerate(records)]

    def _check(self, file: Path, index: int, record: Any) -> tuple[list[chat.Message], tuple[Path, ...]]:
        where = f"{file} record {index}"
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise DataError(f"{where}: field 'conversations' is missing or not a list")
        named = record.get("image") or []
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: field 'image' must be a file name or a list of them, got {named!r}")
        paths = tuple(self.root / name for name in names)
        for path in paths:
            if not path.is_file():
                raise DataError(f"{where}: field 'image': no file at {path}; check --images")
        messages = [_message(where, turn) for turn in record["conversations"]]
        marks = sum(part["type"] == "image" for message in messages for part in message["content"])
        if marks != len(paths):
            raise DataError(f"{where}: {marks} {IMAGE_MARK} marks but {len(paths)} images in field 'image'")
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: field 'conversations' must end with an answer from 'gpt'")
        return messages, paths

    def __len__(self) -> int:
        return len(self.records)

    def tokens(self, index: int) -> int:
        """Length of a record without opening its images."""
        return len(self.tokenizer.conversation(self.records[index][0]).ids)

    def __getitem__(self, index: int) -> Example:
        messages, paths = self.records[index]
        conversation = self.tokenizer.conversation(messages)
        pixels = tuple(preprocess.pixels(preprocess.open_image(path), self.image) for path in paths)
        return Example(conversation.ids, conversation.spans, pixels)


def _message(where: str, turn: Any) -> chat.Message:
    if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
        raise DataError(f"{where}: field 'conversations': each turn needs 'from' (human or gpt) and a text 'value'")
    pieces = turn["value"].split(IMAGE_MARK)
    if len(pieces) == 2 and pieces[0].strip():
        # attention is causal: a question before its image could not look at it, so the image goes first as in LLaVA
        pieces = ["", "\n" + " ".join(piece.strip() for piece in pieces if piece.strip())]
    parts: list[dict[str, str]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for piece in pieces[1:]:
        parts.append({"type": "image"})
        parts += [{"type": "text", "text": piece}] if piece else []
    return {"role": ROLES[turn["from"]], "content": parts}


@dataclass(frozen=True)
class Collator:
    """Examples -> a dict of tensors the Trainer can move between devices; see `to_batch`."""

    pad_token_id: int
    pad_left: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(example.ids) for example in examples)
        shape = (len(examples), length)
        ids = torch.full(shape, self.pad_token_id)
        masks = {name: torch.zeros(shape, dtype=torch.bool) for name in ("image", "instruction", "response")}
        attention = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            start = length - len(example.ids) if self.pad_left else 0
            stop = start + len(example.ids)
            ids[row, start:stop] = torch.tensor(example.ids)
            attention[row, start:stop] = 1
            for name, mask in masks.items():
                mask[row, start:stop] = torch.tensor([span == name for span in example.spans])
        arrays = [array for example in examples for array in example.pixels]
        pixels = torch.from_numpy(np.stack(arrays)) if arrays else torch.zeros(0)
        return {"input_ids": ids, "attention_mask": attention, "pixel_values": pixels, **masks}


def to_batch(tensors: dict[str, Tensor]) -> Batch:
    pixels = tensors["pixel_values"]
    return Batch(
        tensors["input_ids"],
        tensors["attention_mask"],
        tensors["image"],
        tensors["instruction"],
        tensors["response"],
        pixels if pixels.numel() else None,
    )


def batches(examples: Examples, indices: Sequence[int], size: int, collate: Collator, device: Any) -> Iterator[Batch]:
    """Batches of the given examples in order, on `device`."""
    for start in range(0, len(indices), size):
        tensors = collate([examples[i] for i in indices[start : start + size]])
        yield to_batch({name: value.to(device) for name, value in tensors.items()})


def check_lengths(examples: LlavaJson, context: int) -> None:
    """Refuse records longer than the student's context instead of cutting them silently.

    Raises:
        DataError: names the first record that does not fit.
    """
    for index in range(len(examples)):
        length = examples.tokens(index)
        if length > context:
            raise DataError(f"record {index} has {length} tokens, the student's context is {context}; shorten it")
