"""Webdataset shards: per sample one .json member and its images, found by offset. No torch.

000000001.json 000000001.jpg 000000002.json 000000002.0.png 000000002.1.png ...
"""

from __future__ import annotations

import json
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill.data.images import FileSlice
from distill.data.record import Raw
from vlm.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
BLOCK = 512


class TarSource:
    """Samples of one or several uncompressed tar shards.

    Raises:
        DataError: a shard is missing, damaged or compressed, or a sample lacks its .json member.
    """

    kind = "webdataset"

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        members, firsts, shards = array("q"), array("q"), array("i")
        for number, file in enumerate(self.files):
            _index_shard(file, number, members, firsts, shards)
        firsts.append(len(members) // 2)
        # sample s: members firsts[s] (its json) to firsts[s + 1] (its images), each an offset and a size
        self._members = np.frombuffer(members, dtype=np.int64).reshape(-1, 2)
        self._firsts = np.frombuffer(firsts, dtype=np.int64)
        self._shards = np.frombuffer(shards, dtype=np.int32)
        if len(self) == 0:
            raise DataError(f"{self.files[0]} holds no samples; expected members NAME.json with NAME.jpg or NAME.png")

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Raw:
        file = self.files[self._shards[index]]
        first, stop = int(self._firsts[index]), int(self._firsts[index + 1])
        slices = [
            FileSlice(file, int(offset), int(size), f"{file}:{_member_name(file, int(offset))}")
            for offset, size in self._members[first:stop]
        ]
        try:
            return Raw(json.loads(slices[0].read()), tuple(slices[1:]))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(index)}: field 'json': not valid JSON ({error}); write it again") from None

    def where(self, index: int) -> str:
        shard = int(self._shards[index])
        local = index - int(np.searchsorted(self._shards, shard))
        name = _member_name(self.files[shard], int(self._members[self._firsts[index], 0]))
        return f"{self.files[shard]} record {local} ({name})"


def _index_shard(file: Path, number: int, members: array[int], firsts: array[int], shards: array[int]) -> None:
    group: dict[str, tuple[int, int]] = {}
    key = ""
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if f"{folder}/{stem}" != key:
                    _add_sample(file, number, key, group, members, firsts, shards)
                    key, group = f"{folder}/{stem}", {}
                if member.offset_data + member.size > file.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                group[extension.lower()] = (member.offset_data, member.size)
    except FileNotFoundError:
        raise DataError(f"no shard at {file}; check --data") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        hint = "decompress it first" if _compressed(file) else "write it again"
        raise DataError(f"{file}: record after {key!r}: not a readable tar ({error}); {hint}") from None
    _add_sample(file, number, key, group, members, firsts, shards)


def _add_sample(
    file: Path,
    number: int,
    key: str,
    group: dict[str, tuple[int, int]],
    members: array[int],
    firsts: array[int],
    shards: array[int],
) -> None:
    if not group:
        return
    if "json" not in group:
        local = sum(1 for shard in shards if shard == number)
        found = ", ".join(sorted(group))
        raise DataError(f"{file} record {local} ({key.lstrip('/')}): field 'json': no such member, only {found}")
    firsts.append(len(members) // 2)
    shards.append(number)
    members.extend(group["json"])
    images = [extension for extension in group if extension.rpartition(".")[2] in IMAGES]
    for extension in sorted(images, key=_number):
        members.extend(group[extension])


def _number(extension: str) -> tuple[bool, int]:
    """`2.png` before `10.png`, whatever order an archive is in; names without a number stay in that order, behind."""
    first = extension.partition(".")[0]
    return not first.isdecimal(), int(first) if first.isdecimal() else 0


def _member_name(file: Path, offset: int) -> str:
    """Name of the member whose data starts at `offset`: its header is the block before."""
    with file.open("rb") as f:
        f.seek(offset - BLOCK)
        return tarfile.TarInfo.frombuf(f.read(BLOCK), "utf-8", "surrogateescape").name


def _compressed(file: Path) -> bool:
    try:
        f = file.open("rb")
    except OSError:
        return False
    with f:
        return f.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
