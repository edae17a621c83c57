"""Teacher caches on disk: parts that are there whole or not at all, and an index of them.

    OUT/cache.json                    fingerprint, options, sizes, measured error (see distill.cache_build)
    OUT/head.safetensors              the teacher's output projection, where hidden states are stored
    OUT/index-IofN.jsonl              one line a part of writer I of N: file, sha256, bytes, samples
    OUT/part-IofN-000000.safetensors  some hundred samples

A part is written under another name, synced and renamed, then its index line is appended; a killed writer leaves at
most a part without a line, which the next run writes anew. Samples are found by the key of their content, so parts of
any number of writers, runs and data sets make one cache.

Shape legend: R = rows of a sample (response, then visual, then candidates), J = its visual tokens, N = its response
positions, C = stored candidates a position, E = teacher hidden.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.cache_codec import PackedRows
from vlm.errors import DataError, UserError
from vlm.files import fsync_path, sha256_file, write_atomic

INFO = "cache.json"
HEAD = "head.safetensors"
FORMAT = "teacher-cache/2"
PART_BYTES = 64 << 20
PACKED = {
    "count": "count_R",
    "negentropy": "negentropy_R",
    "drawn": "drawn_R",
    "draws": "draws_R",
    "low": "low_M",
    "high": "high_M",
    "code": "code_M",
    "logp": "logp_N",
}
# what a part holds of each sample, one after the other
LOOKS = {"look": "look_G", "mass": "mass_G", "semantics": "semantics_E"}
ARRAYS = ("weight", "kept", "candidate", *LOOKS, "hidden", *PACKED)


class Missing(DataError):
    """The cache holds nothing for a sample."""


@dataclass(frozen=True)
class Entry:
    """What the teacher says about one sample.

    Attributes:
        record: number in the data set it was made from.
        weight_J: IVA weight of every visual token, float32; empty where visual rows were not stored.
        kept_J: visual tokens whose distribution is stored, bool.
        candidate_NC: stored candidates of every response position.
        rows: distributions: PackedRows, or hidden_RE.
        look_G, mass_G: the visual tokens the teacher looks at most, and their share of it, float16; empty where LaViT's
            signals were not stored.
        semantics_E: mean of its last hidden states at the image, float16.
    """

    key: bytes
    record: int
    weight_J: Tensor
    kept_J: Tensor
    candidate_NC: Tensor
    rows: PackedRows | Tensor
    look_G: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    mass_G: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float16))
    semantics_E: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float16))

    @property
    def whole(self) -> bool:
        """Whether every visual token that has a weight has its row."""
        return bool((self.kept_J | (self.weight_J == 0)).all())

    def arrays(self) -> dict[str, Tensor]:
        """Everything but the key, flat."""
        rows = self.rows
        packed = {name: getattr(rows, field) for name, field in PACKED.items()} if isinstance(rows, PackedRows) else {}
        return {
            "weight": self.weight_J.float(),
            "kept": self.kept_J.to(torch.uint8),
            "candidate": self.candidate_NC.to(torch.int32).flatten(),
            "look": self.look_G.to(torch.int32),
            "mass": self.mass_G.to(torch.float16),
            "semantics": self.semantics_E.to(torch.float16),
            **({"hidden": rows} if isinstance(rows, Tensor) else packed),
        }

    def size(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.arrays().values())

    def row_sizes(self, response: int) -> tuple[int, int, int]:
        """Bytes of the response rows, the visual rows and the rows after candidates."""
        visual = int(self.kept_J.sum())
        if isinstance(self.rows, Tensor):
            each_R = torch.full((len(self.rows),), self.rows[:1].numel() * self.rows.element_size())
        else:
            token = 4 + (len(self.rows.high_M) > 0)
            each_R = 8 + token * self.rows.count_R.long() + 2 * self.rows.drawn_R.long()
        parts = each_R[:response], each_R[response : response + visual], each_R[response + visual :]
        return int(parts[0].sum()), int(parts[1].sum()), int(parts[2].sum() + 4 * self.candidate_NC.numel())


@dataclass(frozen=True)
class Part:
    """One line of an index; `data` names the data set its record numbers belong to."""

    file: str
    sha256: str
    bytes: int
    samples: int
    data: str


class Writer:
    """Appends entries to a cache as writer `index` of `count`; one process at a time.

    Raises:
        UserError: another process writes the same shard, or the folder cannot be written.
    """

    def __init__(self, folder: Path, index: int, count: int, data: str, samples_a_part: int = 256) -> None:
        self.folder, self.name, self.data, self.samples_a_part = folder, f"{index}of{count}", data, samples_a_part
        self.path = folder / f"index-{self.name}.jsonl"
        self._waiting: list[Entry] = []
        self._bytes = self.written = 0
        try:
            self._file = self.path.open("a+")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); choose another --out") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is writing shard {self.name} of {folder}; wait for it or stop it"
            ) from None
        parts = read_index(self.path)
        # a killed writer may have left a cut line: keep the whole ones
        write_atomic_in_place(self._file, parts)
        known = {part.file for part in parts}
        for pattern in ("part-{}-*.safetensors", ".part-{}-*"):
            for stale in folder.glob(pattern.format(self.name)):
                if stale.name not in known:
                    stale.unlink()
        self._number = max((int(name.split("-")[2].split(".")[0]) + 1 for name in known), default=0)

    def add(self, entry: Entry) -> None:
        self._waiting.append(entry)
        self._bytes += entry.size()
        if len(self._waiting) >= self.samples_a_part or self._bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as one part."""
        if not self._waiting:
            return
        from safetensors.torch import save

        file = f"part-{self.name}-{self._number:06d}.safetensors"
        try:
            write_atomic(self.folder / file, save(_join(self._waiting)))
            size = (self.folder / file).stat().st_size
            line = Part(file, sha256_file(self.folder / file), size, len(self._waiting), self.data)
            self._file.write(json.dumps(vars(line)) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / file} ({error.strerror}); free space and run the same command again"
            ) from error
        self._number += 1
        self.written += size
        self._waiting, self._bytes = [], 0

    def close(self) -> None:
        self._file.close()


def write_atomic_in_place(file: Any, parts: Sequence[Part]) -> None:
    """Make an index file that is held open (and locked) hold exactly these lines."""
    text = "".join(json.dumps(vars(part)) + "\n" for part in parts)
    file.seek(0)
    if file.read() != text:
        file.truncate(0)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fsync_path(Path(file.name).parent)


def read_index(path: Path) -> list[Part]:
    """The whole lines of an index; a cut last line (a killed writer) is passed over."""
    parts: list[Part] = []
    if not path.is_file():
        return parts
    for line in path.read_text().splitlines():
        try:
            parts.append(Part(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return parts


def _join(entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Tensors of a part: all entries' arrays one after the other, and where each entry's begin."""
    arrays = [entry.arrays() for entry in entries]
    tensors = {
        "key": torch.frombuffer(bytearray(b"".join(entry.key for entry in entries)), dtype=torch.uint8).view(-1, 32),
        "record": torch.tensor([entry.record for entry in entries]),
        "candidates": torch.tensor([entry.candidate_NC.shape[-1] for entry in entries]),
    }
    for name in ARRAYS:
        found = [item[name] for item in arrays if name in item]
        if found:
            lengths = torch.tensor([0, *(len(tensor) for tensor in found)])
            tensors[name], tensors[f"{name}_at"] = torch.cat(found).contiguous(), lengths.cumsum(0)
    return tensors


class Reader:
    """All parts of a cache, looked up by key.

    Raises:
        UserError: no cache there, or a part is missing, cut or altered (it is named).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = read_info(folder)
        self.parts: list[tuple[str, Part]] = []
        for index in sorted(folder.glob("index-*.jsonl")):
            self.parts += [(index.name, part) for part in read_index(index)]
        self._place: dict[bytes, tuple[int, int]] = {}
        self._tables: list[dict[str, Tensor]] = []
        self._checked: set[int] = set()
        for number, (_, part) in enumerate(self.parts):
            tables = self._open(part)
            self._tables.append(tables)
            for slot, key in enumerate(tables["key"]):
                self._place.setdefault(key.numpy().tobytes(), (number, slot))

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._place)

    def records(self, data: str) -> set[int]:
        """Record numbers of a data set that are stored already."""
        tables = (tables for (_, part), tables in zip(self.parts, self._tables, strict=True) if part.data == data)
        return {record for table in tables for record in table["record"].tolist()}

    def size(self) -> int:
        return sum(part.bytes for _, part in self.parts)

    def get(self, key: bytes) -> Entry:
        """What is stored for a sample.

        Raises:
            Missing: nothing. UserError: its part was altered after it was written.
        """
        if key not in self._place:
            self.verify()  # an altered part may have lost it
            raise Missing(f"{self.folder} holds nothing for sample {key.hex()[:16]}")
        number, slot = self._place[key]
        self._verify(number)
        part, tables = self.parts[number][1], self._tables[number]
        slices = {
            name: self._file(part.file).get_slice(name)[
                int(tables[f"{name}_at"][slot]) : int(tables[f"{name}_at"][slot + 1])
            ]
            for name in ARRAYS
            if f"{name}_at" in tables
        }
        candidates = int(tables["candidates"][slot])
        shape = (-1, candidates) if candidates else (0, 0)
        return Entry(
            key=key,
            record=int(tables["record"][slot]),
            weight_J=slices["weight"],
            kept_J=slices["kept"].bool(),
            candidate_NC=slices["candidate"].to(torch.long).reshape(shape),
            **{field: slices[name] for name, field in LOOKS.items() if name in slices},
            rows=slices["hidden"] if "hidden" in slices else PackedRows(**{f: slices[n] for n, f in PACKED.items()}),
        )

    def head(self) -> Tensor:
        """weight_VE of the teacher's output projection.

        Raises:
            UserError: missing or altered.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / HEAD
        try:
            if sha256_file(path) != self.info["head_sha256"]:
                raise UserError(f"{path} was altered after it was written; {_again(self.folder)}")
            return load_file(path)["weight"]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); {_again(self.folder)}") from None

    def verify(self) -> None:
        """Hash every part.

        Raises:
            UserError: one was altered.
        """
        for number in range(len(self.parts)):
            self._verify(number)

    def _verify(self, number: int) -> None:
        if number in self._checked:
            return
        index, part = self.parts[number]
        if sha256_file(self.folder / part.file) != part.sha256:
            raise UserError(
                f"{self.folder / part.file} was altered after it was written; delete its line from {index} and "
                "run `python -m distill cache` as before to make it again"
            )
        self._checked.add(number)

    def _open(self, part: Part) -> dict[str, Tensor]:
        from safetensors import SafetensorError

        path = self.folder / part.file
        size = path.stat().st_size if path.is_file() else -1
        if size != part.bytes:
            found = "is missing" if size < 0 else f"has {size} bytes instead of {part.bytes}"
            raise UserError(f"{path} {found}; copy the cache again, or {_again(self.folder)}")
        try:
            file = self._file(part.file)
            names = [
                name for name in list(file.keys()) if name.endswith("_at") or name in ("key", "record", "candidates")
            ]
            return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); copy the cache again, or {_again(self.folder)}") from None

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a reader lives as long as its run
    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        return safe_open(self.folder / name, framework="pt")


def read_info(folder: Path) -> dict[str, Any]:
    """cache.json of a cache.

    Raises:
        UserError: there is none, or it is of another format.
    """
    path = folder / INFO
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no teacher cache; make one with `python -m distill cache --out {folder}`"
        ) from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_again(folder)}") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}; {_again(folder)}")
    return info


def _again(folder: Path) -> str:
    return f"make it again with `python -m distill cache` and another --out than {folder}"
