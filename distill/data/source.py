"""A name on the command line -> something with numbered records. No torch."""

from __future__ import annotations

import bisect
import glob
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from distill.data import tables
from distill.data.record import Raw
from distill.data.tar import TarSource
from distill.data.text import TextSource
from vlm.errors import DataError

SUFFIXES = {".json": "text", ".jsonl": "text", ".ndjson": "text", ".parquet": "parquet", ".tar": "tar"}


class Source(Protocol):
    """Numbered records of one container; `where` names one in messages."""

    @property
    def kind(self) -> str: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Raw: ...
    def where(self, index: int) -> str: ...


class Joined:
    """Several files read as one."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts, self.kind = parts, parts[0].kind
        self.files = tuple(file for part in parts for file in part.files)
        self._stops: list[int] = []
        for part in parts:
            self._stops.append((self._stops[-1] if self._stops else 0) + len(part))

    def __len__(self) -> int:
        return self._stops[-1]

    def __getitem__(self, index: int) -> Raw:
        part, local = self._place(index)
        return part[local]

    def where(self, index: int) -> str:
        part, local = self._place(index)
        return part.where(local)

    def _place(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._stops, index)
        return self.parts[number], index - (self._stops[number - 1] if number else 0)


def open_source_of(data: Path) -> Source:
    """A file, a folder or pattern of shards, a saved data set, or `hf:ORG/NAME[:SPLIT]`.

    Raises:
        DataError: nothing there, an unknown kind of file, or damage.
    """
    if str(data).startswith(tables.HUB):
        return tables.open_hub(str(data))
    if data.is_dir() and tables.is_saved(data):
        return tables.open_saved(data)
    files, kind = shards(data)
    if kind == "parquet":
        return tables.open_parquet(files)
    if kind == "tar":
        return TarSource(files)
    parts = [TextSource(file) for file in files]
    return parts[0] if len(parts) == 1 else Joined(parts)


def root_of(data: Path, images: Path | None) -> Path:
    """Folder that image names in records are relative to: --images, else where the data file is.

    Raises:
        DataError: `images` is no folder.
    """
    if images is not None:
        if not images.is_dir():
            raise DataError(f"no folder at {images}; check --images")
        return images
    return data if data.is_dir() else data.parent


def shards(data: Path) -> tuple[list[Path], str]:
    """Files of a name in order, and the kind their endings say; any other ending is looked at as JSON."""
    if data.is_dir():
        found = sorted(path for path in data.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise DataError(f"{data} holds no data files ({', '.join(SUFFIXES)}); name the file or folder with --data")
    elif data.exists() or not (found := _expand(data)):
        found = [data]
    kinds = {SUFFIXES.get(path.suffix.lower(), "text") for path in found}
    if len(kinds) > 1:
        names = ", ".join(sorted({path.suffix for path in found}))
        raise DataError(f"{data} mixes {names} files; name one kind, for example {data / ('*' + found[0].suffix)}")
    return found, kinds.pop()


def _expand(data: Path) -> list[Path]:
    """Files of a pattern: `*`, `?`, `[..]`, and the shard range `{000..012}`."""
    text = str(data)
    ranged = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if ranged:
        low, high = ranged.groups()
        numbers = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
        return [Path(text[: ranged.start()] + number + text[ranged.end() :]) for number in numbers]
    # Path.glob takes no absolute pattern
    return [Path(name) for name in sorted(glob.glob(text))] if glob.has_magic(text) else []  # noqa: PTH207


def stamp(source: Source) -> str:
    """Hash over names, sizes and times of the files: changes when the data set does, without reading it."""
    digest = hashlib.blake2b(digest_size=16)
    for file in source.files:
        stat = file.stat()
        digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    digest.update(str(getattr(source, "fingerprint", "")).encode())
    return digest.hexdigest()
