"""What a run trains on, what it is watched on while training, and what its final figure is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.records import DataOptions, Records, hold_out, open_records
from distill.data.stream import Streamed, StreamOptions
from vlm import chat, preprocess
from vlm.console import note
from vlm.errors import DataError
from vlm.files import sha256_file


@dataclass(frozen=True)
class Split:
    """Records by use, and what provenance says about them."""

    train: Records | Streamed
    validation: Records | None
    test: Records | None
    description: dict[str, Any]


def open_split(
    data: Path,
    eval_data: Path | None,
    holdout: int,
    options: DataOptions,
    tokenizer: chat.ChatTokenizer,
    image: preprocess.ImageSpec,
    context: int,
) -> Split:
    """Open training data and what is held out of it.

    With both `holdout` and `eval_data` the first is the validation set and the second the test set; with one of them it
    serves as both.

    Args:
        holdout: records taken out of the training data; 0 takes none.
        context: longest conversation the student takes, in tokens.

    Raises:
        DataError: one of the data sets cannot be used, or they share records.
    """
    train = open_records(data, options, tokenizer, image, context)
    description = train.describe()
    if data.is_file():
        description["sha256"] = sha256_file(data)
    validation = test = None
    if eval_data is not None:
        test = validation = open_records(eval_data, options, tokenizer, image, context)
        _refuse_shared(train, test, eval_data)
        description["eval"] = test.describe()
    if holdout:
        train, validation = hold_out(train, holdout)
        test = test or validation
        description |= {"samples": len(train), "holdout": len(validation)}
        note(f"data: {len(validation)} records held out for evaluation, {len(train)} left for training")
    return Split(train, validation, test, description)


def open_streaming_split(
    data: Path,
    eval_data: Path | None,
    options: DataOptions,
    stream: StreamOptions,
    tokenizer: chat.ChatTokenizer,
    image: preprocess.ImageSpec,
) -> Split:
    """Training data that is streamed; what is held out comes from a data set of its own.

    Raises:
        DataError: one of the data sets cannot be used.
    """
    train = Streamed(data, options, stream, tokenizer, image)
    test = None
    if eval_data is not None:
        test = open_records(eval_data, options, tokenizer, image, stream.context)
    description = train.describe() | ({"eval": test.describe()} if test else {})
    return Split(train, test, test, description)


def _refuse_shared(train: Records, test: Records, eval_data: Path) -> None:
    """A held-out record that is also trained on would make every figure meaningless; a shared image is only noted."""
    same = np.flatnonzero(np.isin(test.content, train.content))
    if len(same):
        raise DataError(
            f"eval_data {eval_data}: {len(same)} of its {len(test)} records are also in the training data, the first "
            f"is {test.where(int(same[0]))}; remove them from one of the two"
        )
    pictured = test.survey.images[test.numbers] > 0
    shared = np.isin(test.survey.group[test.numbers], train.survey.group[train.numbers]) & pictured
    if shared.any():
        note(f"data: {int(shared.sum())} of {len(test)} evaluation records ask about an image that is also trained on")
