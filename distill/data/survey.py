"""The check before training: every record is parsed, tokenised and its images are looked at, once. No torch.

What was found is kept under the cache folder, keyed by the files' sizes and times, so a restart does not look again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from distill.data.images import digest, probe
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
    with _one_at_a_time(file):
        known = _recall(file)
        if known is None:
            arrays: dict[str, npt.NDArray[Any]] = {name: np.zeros(len(source), kind) for name, kind in ARRAYS.items()}
            again: Sequence[int] = range(len(source))
        else:  # images that could not be used may have been repaired meanwhile
            arrays, again = known
        bad = _Check(source, form, look, tokenizer).run(again, arrays)
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


Chunk: TypeAlias = tuple[npt.NDArray[np.uint64], list[BadSample]]


@dataclass(frozen=True)
class _Check:
    """Looks at records: parses and tokenises their words, opens their images."""

    source: Source
    form: Format
    look: Look
    tokenizer: chat.ChatTokenizer

    def run(self, indices: Sequence[int], arrays: dict[str, npt.NDArray[Any]]) -> tuple[BadSample, ...]:
        """Look at these records and fill in their entries of a Survey's arrays."""
        chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
        bad: list[BadSample] = []
        progress = Progress(len(indices), "checking data")
        for chunk, (rows, odd) in zip(chunks, self._results(chunks), strict=True):
            for column, name in enumerate(ARRAYS):
                arrays[name][list(chunk)] = rows[:, column]
            bad += odd
            if progress.done + len(chunk) < len(indices):
                progress.advance(len(chunk))
        return tuple(bad)

    def _results(self, chunks: Sequence[Sequence[int]]) -> Iterator[Chunk]:
        """Results in order; more than a few chunks are shared out to processes."""
        workers = min(os.cpu_count() or 1, len(chunks) // 2)
        if workers < 2:
            yield from map(self.chunk, chunks)
            return
        # forked processes inherit the open source and the tokenizer, and load nothing again
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(workers, context, initializer=_adopt, initargs=(self,))
        try:
            yield from pool.map(_chunk, chunks)
        except BrokenProcessPool:
            raise DataError(f"{self.source.where(chunks[0][0])}: a checking process was killed; free memory") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def chunk(self, indices: Sequence[int]) -> Chunk:
        rows = np.zeros((len(indices), len(ARRAYS)), np.uint64)
        bad: list[BadSample] = []
        for row, index in enumerate(indices):
            where = self.source.where(index)
            record = parse(self.source[index], where, self.form, self.look.root)
            tokens = len(conversation(record, where, self.tokenizer).ids)
            words = digest(json.dumps(record.messages).encode())
            probes = [probe(image, self.look.decode) for image in record.images]
            digests = [found.digest for found in probes]
            group, content = digests[0] if digests else words, digest(words + b"".join(digests))
            rows[row] = tokens, len(probes), int.from_bytes(group, "little"), int.from_bytes(content, "little")
            if problem := next((found.problem for found in probes if found.problem), None):
                bad.append(BadSample(index, where, problem))
        return rows, bad


_adopted: list[_Check] = []


def _adopt(check: _Check) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _adopted[:] = [check]


def _chunk(indices: Sequence[int]) -> Chunk:
    return _adopted[0].chunk(indices)


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Processes of one machine that open the same data take turns: the first looks, the others recall."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("w")
    except OSError:  # a read-only home: everybody looks
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
