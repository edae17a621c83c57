"""JSON lists and JSON lines, read one record at a time from a memory-mapped file.

Only where each record starts and ends is held in memory: 16 bytes a record, whatever its length. No torch.
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from distill.data.record import Raw
from vlm.errors import DataError

# strings are skipped as a whole, so that a bracket inside one is not taken for structure
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)
_GAP = re.compile(rb"\s*,\s*\Z")
BOM = b"\xef\xbb\xbf"


class TextSource:
    """Records of one .json or .jsonl file; which of the two it is, the content says.

    Raises:
        DataError: missing, empty, or not JSON.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.files = file, (file,)
        self._map: mmap.mmap | None = None
        try:
            if file.stat().st_size == 0:
                raise DataError(f"{file} is empty; export the data set again")
            head = file.open("rb").read(4096)
        except FileNotFoundError:
            raise DataError(f"no data set at {file}; check --data") from None
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); name a data file with --data") from None
        self.lines = not head.removeprefix(BOM).lstrip().startswith(b"[")
        self.kind = "JSON lines" if self.lines else "JSON list"
        spans = self._index_lines() if self.lines else self._index_list()
        self.spans: npt.NDArray[np.int64] = np.frombuffer(spans, dtype=np.int64).reshape(-1, 2)
        if len(self.spans) == 0:
            raise DataError(f"{file} is an empty data set; name one with at least one conversation")
        if self.lines:
            self._check_first_line()

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Raw:
        start, stop = self.spans[index]
        try:
            return Raw(json.loads(self._bytes()[start:stop]))
        except (ValueError, RecursionError) as error:
            reason = f"line {self._line(start)}: {error}" if self.lines else str(error)
            raise DataError(
                f"{self.where(index)}: the whole record is not valid JSON ({reason}); write it again"
            ) from None

    def where(self, index: int) -> str:
        return f"{self.file} record {index}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            with self.file.open("rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def _line(self, offset: int) -> int:
        return self._bytes()[:offset].count(b"\n") + 1

    def _index_lines(self) -> array[int]:
        data = self._bytes()
        spans = array("q")
        start = len(BOM) if data[: len(BOM)] == BOM else 0
        size = len(data)
        while start < size:
            stop = data.find(b"\n", start)
            stop = size if stop < 0 else stop
            if stop - start > 64 or data[start:stop].strip():  # a short line may be blank
                spans.extend((start, stop))
            start = stop + 1
        return spans

    def _check_first_line(self) -> None:
        """A first line that is no record at all means the file is no JSON lines file: say so instead of a line error."""
        start, stop = self.spans[0]
        first = self._bytes()[start:stop].strip()
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            if not first.startswith(b"{"):
                raise DataError(
                    f"{self.file} is not valid JSON (it starts with {first[:40]!r}); --data takes a JSON list, "
                    "JSON lines, parquet, tar shards or a saved data set"
                ) from None
            self._whole()

    def _whole(self) -> None:
        """One object over several lines: a JSON file, but not of records."""
        try:
            value = json.loads(self._bytes()[:])
        except (ValueError, RecursionError):
            return  # left to the record check, which names the line
        fields = ", ".join(sorted(value)[:5])
        raise DataError(f"{self.file} holds one object ({fields}), expected a list of conversations")

    def _index_list(self) -> array[int]:
        data = self._bytes()
        spans = array("q")
        depth, start, last = 0, 0, 0
        for token in _TOKEN.finditer(data):
            mark = data[token.start()]
            if mark in b"{[":
                depth += 1
                if depth == 2:
                    start = token.start()
                    gap = data[last:start]
                    if gap.strip(b" \t\r\n") not in (b",",) if spans else gap.removeprefix(BOM).strip() != b"[":
                        return self._index_odd_list()
            elif mark in b"}]":
                depth -= 1
                if depth == 1:
                    last = token.end()
                    spans.extend((start, last))
                elif depth == 0:
                    rest = data[last : token.start()].strip() if spans else b""
                    if rest or data[token.end() :].strip() or (not spans and data[:].strip(b"[] \t\r\n" + BOM)):
                        return self._index_odd_list()
                    return spans
            elif depth < 2:  # a text where a record should stand
                return self._index_odd_list()
        return self._index_odd_list()

    def _index_odd_list(self) -> NoReturn:
        """The slow way, to say exactly what is wrong: damaged JSON, or entries that are no objects."""
        try:
            values = json.loads(self._bytes()[:])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.file} is not valid JSON ({error}); export it again") from None
        odd = next((i for i, value in enumerate(values) if not isinstance(value, dict | list)), 0)
        raise DataError(
            f"{self.where(odd)}: field 'conversations': the record is {values[odd]!r}, expected an object with this field"
        )
