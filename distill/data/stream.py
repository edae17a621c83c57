"""A data set larger than the disk: rows come from the hub (or parquet shards) in order and are never all held.

It is asked by number like any other data set, because resuming, sharing out to processes and the checks before training
all speak of sample numbers. Numbers asked for in rising order cost one row each; rows in between are read but their
images are not decoded. Going back starts the stream again, except for the head, which is kept.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from distill.data import tables
from distill.data.batch import Example
from distill.data.images import open_source
from distill.data.record import NAMES, Format, Raw, detect, parse
from distill.data.records import SKIPPED, DataOptions
from distill.data.source import root_of, shards
from distill.data.survey import conversation
from vlm import chat, preprocess
from vlm.console import note
from vlm.errors import BadImage, DataError

HEAD = 256
BUFFER = 1000
DETECT = 16
GIVE_UP = 1000


@dataclass(frozen=True)
class StreamOptions:
    """Order and extent of a stream.

    Attributes:
        samples: how many the run will ask for: the length of the data set as others see it.
        seed: of the shuffling, which mixes shards and rows within a buffer.
        context: longest conversation the student takes, in tokens.
        buffer: rows mixed at a time; 0 keeps the order of the rows.
    """

    samples: int
    seed: int
    context: int
    buffer: int = BUFFER


class Streamed(Dataset):  # type: ignore[type-arg]
    """Samples of a stream by number; after its last row it begins again, mixed anew.

    The first records are checked at once; later ones when they are reached. With `on_bad_image` skip, the next usable
    record takes the place of one that cannot be used, and the loss is listed.

    Raises:
        DataError: names the first record that cannot be used.
    """

    def __init__(
        self,
        data: Path,
        options: DataOptions,
        stream: StreamOptions,
        tokenizer: chat.ChatTokenizer,
        image: preprocess.ImageSpec,
    ) -> None:
        self.data, self.options, self.stream = data, options, stream
        self.tokenizer, self.image = tokenizer, image
        self.root = root_of(data, options.images)
        self.log: Path | None = None
        self.skipped: dict[int, str] = {}
        self._rows = _open(data, stream)
        self._opened: list[Iterator[Any]] = []
        weakref.finalize(self, _close, self._opened)
        self._next, self._epoch, self._epoch_rows = 0, -1, 1
        self._last: tuple[int, Any] = (-1, None)
        self._head: list[Any] = []
        self._head = [self._row(number) for number in range(min(HEAD, stream.samples))]
        self.format: Format = options.format or detect(self._head[:DETECT], self.where(0))
        for number in range(len(self._head)):
            self._usable(number)
        left_out = f", {len(self.skipped)} cannot be used" if self.skipped else ""
        note(
            f"data: {NAMES[self.format]} (stream of {data}), first {len(self._head)} records checked{left_out}; "
            f"the run asks for {stream.samples}"
        )

    def __len__(self) -> int:
        return self.stream.samples

    def __getitem__(self, index: int) -> Example:
        for number in range(index, index + GIVE_UP):
            if (example := self._usable(number)) is not None:
                return example
        raise DataError(f"{self.where(index)}: none of the {GIVE_UP} records from here on can be used; check the data")

    @property
    def at_hand(self) -> int:
        """How many of the first samples cost no reading, in whatever order they are asked for; they are mixed already."""
        return len(self._head)

    def where(self, number: int) -> str:
        return f"{self.data} stream record {number}"

    def describe(self) -> dict[str, object]:
        """What a student's provenance says about its data."""
        return {
            "name": str(self.data),
            "format": self.format,
            "container": "stream",
            "samples": len(self),
            "skipped": len(self.skipped),
            "shuffle_buffer": self.stream.buffer,
        }

    def write_skipped(self, folder: Path) -> None:
        """List what is left out in FOLDER/skipped.jsonl, what was so far and what will be."""
        self.log = folder / SKIPPED
        before, self.skipped = self.skipped, {}
        for number, problem in before.items():
            self._skip(number, problem)

    def _usable(self, number: int) -> Example | None:
        """The record as an example; None where it cannot be used and the options say to go on."""
        where = self.where(number)
        try:
            record = parse(Raw(self._row(number)), where, self.format, self.root)
            found = conversation(record, where, self.tokenizer)
            if len(found.ids) > self.stream.context:
                raise DataError(
                    f"{where}: field '{record.field}': {len(found.ids)} tokens with its images, the student's context "
                    f"is {self.stream.context}"
                )
            pixels = tuple(preprocess.pixels(open_source(image), self.image) for image in record.images)
        except DataError as error:
            problem = str(error)
        except BadImage as error:
            problem = f"{where}: field 'image': {error}"
        else:
            return Example(found.ids, found.spans, pixels)
        if self.options.on_bad_image == "stop":
            raise DataError(f"{problem}; repair it or add --on_bad_image skip")
        self._skip(number, problem)
        return None

    def _skip(self, number: int, problem: str) -> None:
        if number in self.skipped:
            return
        self.skipped[number] = problem
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as f:
                f.write(json.dumps({"record": self.where(number), "index": number, "problem": problem}) + "\n")

    def _row(self, number: int) -> Any:
        if number < len(self._head):
            return self._head[number]
        if number == self._last[0]:
            return self._last[1]
        if number < self._next:
            _close(self._opened)
            self._next, self._epoch, self._epoch_rows = 0, -1, 1
        while self._next <= number:
            try:
                row = next(self._opened[0], None) if self._opened else None
            except Exception as error:  # every file format has errors of its own
                raise DataError(
                    f"{self.data} stream record {self._next}: cannot be read ({type(error).__name__}: {error}); copy it again"
                ) from None
            if row is None:
                self._begin_epoch()
                continue
            self._last = (self._next, row)
            self._next += 1
            self._epoch_rows += 1
        return self._last[1]

    def _begin_epoch(self) -> None:
        if self._epoch_rows == 0:
            raise DataError(f"{self.data} is an empty data set; name one with at least one conversation")
        self._epoch, self._epoch_rows = self._epoch + 1, 0
        self._rows.set_epoch(self._epoch)
        _close(self._opened)
        self._opened.append(iter(self._rows))

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process opens the stream again."""
        return {**self.__dict__, "_opened": [], "_next": 0, "_epoch": -1, "_epoch_rows": 1}


def _open(data: Path, stream: StreamOptions) -> Any:
    if str(data).startswith(tables.HUB):
        rows = tables.load_hub(str(data), streaming=True)
    else:
        files, kind = shards(data)
        if kind != "parquet":
            raise DataError(
                f"streaming {data}: takes hf:ORG/NAME or parquet files; drop --streaming, it is read in place"
            )
        tables.check_parquet(files)
        rows = tables.library().IterableDataset.from_parquet([str(file) for file in files])
    rows = tables.undecoded(rows)
    if not stream.buffer:
        return rows
    # filling the buffer from several shards at a time would wait seconds for its threads at the end of each pass
    return rows.shuffle(seed=stream.seed, buffer_size=stream.buffer, max_buffer_input_shards=1)


def _close(opened: list[Iterator[Any]]) -> None:
    """End reading now: readers still open when the interpreter ends complain about missing modules."""
    for iterator in opened:
        if isinstance(iterator, Generator):
            iterator.close()
    opened.clear()
