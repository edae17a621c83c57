"""A checked data set as training examples, and its division into training and held-out records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from distill.data.batch import Example
from distill.data.images import open_source
from distill.data.rationale import step_numbers
from distill.data.record import NAMES, Format, Record, parse
from distill.data.source import Source, open_source_of, root_of
from distill.data.survey import BadSample, Look, Survey, conversation, survey
from distill.data.tables import HUB, cache_dir
from vlm import chat, preprocess
from vlm.console import note
from vlm.errors import BadImage, DataError
from vlm.files import write_atomic

OnBadImage = Literal["stop", "skip"]
NAMED = 5
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read.

    Attributes:
        images: folder that image names are relative to; None is the folder of the data.
        format: layout of the records; None detects it.
        on_bad_image: what a missing or damaged image means: refuse the data set, or leave the record out.
        decode: open every image in the check before training; otherwise only see that the files are there.
    """

    images: Path | None = None
    format: Format | None = None
    on_bad_image: OnBadImage = "stop"
    decode: bool = True


@runtime_checkable
class WritesSkipped(Protocol):
    """A data set that may leave records out."""

    def write_skipped(self, folder: Path) -> None: ...


class Records(Dataset):  # type: ignore[type-arg]
    """Training examples of a checked data set, or of some of its records.

    Attributes:
        name: what the data set is called in reports.
        numbers: places in the source of the records held here.
        epoch: seeds the order a sampler gives; set by whoever counts epochs.
    """

    def __init__(
        self,
        source: Source,
        found: Survey,
        root: Path,
        numbers: npt.NDArray[np.int64],
        tokenizer: chat.ChatTokenizer,
        image: preprocess.ImageSpec,
        name: str,
    ) -> None:
        self.source, self.survey, self.root, self.numbers = source, found, root, numbers
        self.tokenizer, self.image = tokenizer, image
        self.name, self.epoch = name, 0

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        record = self.record(index)
        found = conversation(record, self.where(index), self.tokenizer)
        try:
            pixels = tuple(preprocess.pixels(open_source(image), self.image) for image in record.images)
        except BadImage as error:
            raise DataError(f"{self.where(index)}: field 'image': {error}; it was good when training began") from None
        steps = step_numbers(found, record, self.tokenizer) if record.steps else None
        return Example(found.ids, found.spans, pixels, steps)

    def record(self, index: int) -> Record:
        number = int(self.numbers[index])
        return parse(self.source[number], self.source.where(number), self.survey.format, self.root)

    def where(self, index: int) -> str:
        return self.source.where(int(self.numbers[index]))

    def tokens(self, index: int) -> int:
        """Length of a record without opening its images."""
        return int(self.survey.tokens[self.numbers[index]])

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every record, image tokens included."""
        return self.survey.tokens[self.numbers]

    @property
    def content(self) -> npt.NDArray[np.uint64]:
        """Identity of every record's words and images, the same in every format and container."""
        return self.survey.content[self.numbers]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def subset(self, numbers: npt.NDArray[np.int64]) -> Records:
        """The same data set with other records of it."""
        return Records(self.source, self.survey, self.root, numbers, self.tokenizer, self.image, self.name)

    def write_skipped(self, folder: Path) -> None:
        if self.survey.bad:
            write_bad(self.survey.bad, folder / SKIPPED)

    def describe(self) -> dict[str, object]:
        """What a student's provenance says about its data."""
        return {
            "name": self.name,
            "format": self.survey.format,
            "container": self.source.kind,
            "files": len(self.source.files),
            "samples": len(self),
            "skipped": len(self.survey.bad),
            "content_sha256": self.survey.content_sha256(),
        }


def open_records(
    data: Path,
    options: DataOptions,
    tokenizer: chat.ChatTokenizer,
    image: preprocess.ImageSpec,
    context: int | None = None,
) -> Records:
    """Open and check a data set: a JSON or JSON-lines file, parquet or tar shards, a saved data set, or `hf:ORG/NAME`.

    Args:
        context: longest conversation the student takes, in tokens.

    Raises:
        DataError: names the first malformed or too long record; or lists the images that cannot be used and
            `on_bad_image` is stop.
    """
    root = root_of(data, options.images)
    source = open_source_of(data)
    found = survey(source, Look(options.format, root, options.decode), tokenizer)
    if found.bad:
        _report_bad(found, data, options.on_bad_image)
    keep = np.setdiff1d(np.arange(len(source)), np.array([sample.index for sample in found.bad], np.int64))
    name = str(data) if str(data).startswith(HUB) else data.name
    records = Records(source, found, root, keep, tokenizer, image, name)
    if context is not None:
        check_lengths(records, context)
    note(f"data: {summary(records)}")
    return records


def summary(records: Records) -> str:
    """One line: what was detected and how much of it there is."""
    found, kept = records.survey, records.numbers
    images = found.images[kept]
    low, middle, high = (int(v) for v in np.percentile(found.tokens[kept], (0, 50, 100)))
    left_out = f", {len(found.bad)} left out" if found.bad else ""
    repeated = len(kept) - len(np.unique(found.content[kept]))
    again = f", {repeated} repeated" if repeated else ""
    shards = f" in {len(records.source.files)} files" if len(records.source.files) > 1 else ""
    return (
        f"{NAMES[found.format]} ({records.source.kind}{shards}), {len(kept)} records{left_out}{again}, "
        f"{int(images.sum())} images ({int((images == 0).sum())} records without), "
        f"{low} to {high} tokens (median {middle})"
    )


def _report_bad(found: Survey, data: Path, on_bad_image: OnBadImage) -> None:
    """Name the first bad images and write the list of all."""
    count, total = len(found.bad), len(found.tokens)
    first = "; ".join(str(sample) for sample in found.bad[:NAMED])
    text = f"{count} of {total} records have an image that is missing or damaged: {first}"
    if on_bad_image == "skip" and count < total:
        note(f"leaving out {text}{'; ...' if count > NAMED else ''}")
        return
    if count > NAMED:
        listed = cache_dir() / f"{data.name}.bad.jsonl"
        write_bad(found.bad, listed)
        text += f"; all of them in {listed}"
    raise DataError(f"{text}; repair them" + (" or add --on_bad_image skip" if count < total else ""))


def write_bad(bad: Sequence[BadSample], file: Path) -> None:
    """One JSON line a record: {"record", "index", "problem"}."""
    lines = [json.dumps({"record": s.where, "index": s.index, "problem": s.problem}) for s in bad]
    write_atomic(file, "".join(f"{line}\n" for line in lines))


def write_skipped(examples: object, folder: Path) -> None:
    """List what a run leaves out in FOLDER/skipped.jsonl; nothing is written where nothing was left out."""
    if isinstance(examples, WritesSkipped):
        examples.write_skipped(folder)


def hold_out(records: Records, count: int) -> tuple[Records, Records]:
    """Take at least `count` records out of training: (the rest, the held-out ones).

    Which ones depends on their content alone, not on their order or container. Records that share their (first) image,
    or have no image and share their words, stay on one side, so nothing held out was seen in training.

    Raises:
        DataError: nothing would be left to train on.
    """
    groups = records.survey.group[records.numbers]
    unique, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    # `unique` is sorted by hash, which is as good as random and the same for everybody
    taken = int(np.searchsorted(np.cumsum(sizes), count)) + 1
    held = inverse < taken
    if taken >= len(unique):
        raise DataError(
            f"holdout {count}: the {len(records)} records share {len(unique)} different images or texts, "
            "so none would be left for training; lower it or pass --eval_data F"
        )
    return records.subset(records.numbers[~held]), records.subset(records.numbers[held])


def LlavaJson(  # the name callers know
    file: Path, images: Path | None, tokenizer: chat.ChatTokenizer, image: preprocess.ImageSpec
) -> Records:
    """A data set with the default options; see `open_records`."""
    return open_records(file, DataOptions(images), tokenizer, image)


def check_lengths(examples: Records, context: int) -> None:
    """Refuse records longer than the student's context instead of cutting them silently.

    Raises:
        DataError: names the first record that does not fit.
    """
    long = np.flatnonzero(examples.lengths > context)
    if len(long):
        index = int(long[0])
        raise DataError(
            f"{examples.where(index)}: field 'conversations': {examples.tokens(index)} tokens with its images, the "
            f"student's context is {context} ({len(long)} such records); shorten them"
        )
