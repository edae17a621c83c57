"""The check before training: every record is parsed, tokenised and its images are looked at, once. No torch.

What was found is kept under the cache folder, keyed by the files' sizes and times, so a restart does not look again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill.data.images import Probe, digest, probe
from distill.data.record import Format, Record, detect, parse
from distill.data.source import Source, stamp
from distill.data.tables import cache_dir
from vlm import chat
from vlm.console import Progress
from vlm.errors import DataError, UserError
from vlm.files import write_atomic

CHUNK = 256
DETECT = 64
VERSION = 1
ARRAYS = {"tokens": np.int32, "images": np.int32, "group": np.uint64, "content": np.uint64}


@dataclass(frozen=True)
class BadSample:
    """A record that is well formed but has an image that cannot be used."""

    index: int
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: field 'image': {self.problem}"


@dataclass(frozen=True)
class Survey:
    """What the check found, one entry a record.

    Attributes:
        tokens: length of the tokenised conversation.
        images: number of images.
        group: identity of the first image (of the words where there is none): records that share it must not be
            split between training and held-out data.
        content: identity of words and images together.
    """

    format: Format
    tokens: npt.NDArray[np.int32]
    images: npt.NDArray[np.int32]
    group: npt.NDArray[np.uint64]
    content: npt.NDArray[np.uint64]
    bad: tuple[BadSample, ...]

    def content_sha256(self) -> str:
        """Hash of the whole data set's content, the same in every format and container."""
        return hashlib.sha256(self.content.tobytes()).hexdigest()


@dataclass(frozen=True)
class Look:
    """How a data set is to be read.

    Attributes:
        format: None detects it from the first records.
        root: folder of the image files.
        decode: open every image; otherwise only see that its file is there.
    """

    format: Format | None
    root: Path
    decode: bool


def survey(source: Source, look: Look, tokenizer: chat.ChatTokenizer) -> Survey:
    """Check a data set, or recall the check of an unchanged one.

    Raises:
        DataError: names the first malformed record, its field, the value seen and what to do.
    """
    form = look.format or detect((source[i].value for i in range(min(DETECT, len(source)))), source.where(0))
    file = cache_dir() / f"{_key(source, look, form, tokenizer)}.npz"
    known = _recall(file)
    if known is None:
        arrays = {name: np.zeros(len(source), kind) for name, kind in ARRAYS.items()}
        again: Sequence[int] = range(len(source))
    else:  # images that could not be used may have been repaired meanwhile
        arrays, again = known
    bad = _Check(source, form, look, tokenizer, arrays).run(again)
    found = Survey(form, bad=bad, **arrays)
    if len(again):
        _remember(file, found)
    return found


def conversation(record: Record, where: str, tokenizer: chat.ChatTokenizer) -> chat.Conversation:
    """Token ids and spans of a record.

    Raises:
        DataError: the template or tokenizer refuses it.
    """
    try:
        return tokenizer.conversation(record.messages)
    except UserError as error:
        raise DataError(f"{where}: field '{record.field}': {error}") from None


@dataclass(frozen=True)
class _Check:
    """Looks at records and fills in their entries of a Survey's arrays."""

    source: Source
    form: Format
    look: Look
    tokenizer: chat.ChatTokenizer
    arrays: dict[str, npt.NDArray[Any]]

    def run(self, indices: Sequence[int]) -> tuple[BadSample, ...]:
        bad: list[BadSample] = []
        progress = Progress(len(indices), "checking data")
        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        try:
            for start in range(0, len(indices), CHUNK):
                chunk = indices[start : start + CHUNK]
                waiting = [(index, *self._start(index, pool)) for index in chunk]
                for index, words, probes in waiting:
                    bad += self._finish(index, words, [probe.result() for probe in probes])
                if start + CHUNK < len(indices):
                    progress.advance(len(chunk))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return tuple(bad)

    def _start(self, index: int, pool: ThreadPoolExecutor) -> tuple[bytes, list[Future[Probe]]]:
        """Check one record's words here while its images are decoded on other threads."""
        where = self.source.where(index)
        record = parse(self.source[index], where, self.form, self.look.root)
        self.arrays["tokens"][index] = len(conversation(record, where, self.tokenizer).ids)
        self.arrays["images"][index] = len(record.images)
        words = digest(json.dumps(record.messages).encode())
        return words, [pool.submit(probe, image, self.look.decode) for image in record.images]

    def _finish(self, index: int, words: bytes, probes: Sequence[Probe]) -> list[BadSample]:
        digests = [found.digest for found in probes]
        self.arrays["group"][index] = _number(digests[0] if digests else words)
        self.arrays["content"][index] = _number(digest(words + b"".join(digests)))
        problem = next((found.problem for found in probes if found.problem), None)
        return [BadSample(index, self.source.where(index), problem)] if problem else []


def _key(source: Source, look: Look, form: Format, tokenizer: chat.ChatTokenizer) -> str:
    told = [
        VERSION,
        stamp(source),
        str(look.root.resolve()),
        look.decode,
        form,
        tokenizer.tokens_per_image,
        repr(tokenizer.spec),
        hashlib.blake2b(tokenizer.tokenizer.to_str().encode()).hexdigest(),
    ]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def _remember(file: Path, found: Survey) -> None:
    buffer = BytesIO()
    bad = np.array([sample.index for sample in found.bad], np.int64)
    np.savez(buffer, bad=bad, **{name: getattr(found, name) for name in ARRAYS})
    # a read-only home: the check is merely done again next time
    with contextlib.suppress(OSError):
        write_atomic(file, buffer.getvalue())


def _recall(file: Path) -> tuple[dict[str, npt.NDArray[Any]], list[int]] | None:
    try:
        with np.load(file) as kept:
            return {name: kept[name] for name in ARRAYS}, kept["bad"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")
