"""JSON, JSON lines, CSV, TSV and parquet -> rows. Images inside parquet are read one row group at a time, on demand."""

from __future__ import annotations

import base64
import binascii
import csv
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.api import EncodedImage
from runtime.source import need_package
from runtime.tasks.base import LazyPicture, Picture
from vlm.errors import BadImage, DataError, UserError

Row = dict[str, Any]


def read_json(path: Path) -> Any:
    """Raises DataError: not readable, not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); download it again") from None


def json_lines(path: Path) -> list[Row]:
    """One JSON object per line; blank lines are skipped.

    Raises:
        DataError: names the line.
    """
    rows: list[Row] = []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; download it again") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); download it again") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        rows.append(row)
    return rows


def records(path: Path) -> list[Row]:
    """Rows of a .json (a list, or an object of objects), .jsonl, .csv or .tsv file.

    Raises:
        DataError: damaged. UserError: another ending.
    """
    kind = path.suffix.lower()
    if kind == ".jsonl":
        return json_lines(path)
    if kind in (".csv", ".tsv"):
        return separated(path)
    if kind != ".json":
        raise UserError(f"{path} is not .json, .jsonl, .csv, .tsv or .parquet; convert it")
    value = read_json(path)
    if isinstance(value, dict):
        value = value.get("data", value)
    if isinstance(value, dict):
        value = [{"id": key, **row} for key, row in value.items() if isinstance(row, dict)]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{path} holds {type(value).__name__}, expected a list of objects")
    return value


def separated(path: Path) -> list[Row]:
    """Rows of a .csv or .tsv file with a header; empty cells are "".

    Raises:
        DataError: damaged, or without a header.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images are stored in cells
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            rows = [{key.strip(): value or "" for key, value in row.items() if key} for row in reader]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from None
    return rows


def required(row: Row, names: Sequence[str], source: Path, number: int) -> None:
    """Raises DataError if a row lacks a field."""
    for name in names:
        if row.get(name) is None:
            raise DataError(f"{source}, row {number}: no {name!r}; this is not the expected layout")


def base64_picture(text: str, source: Path, place: str) -> Picture:
    """An image stored as base64 text."""
    name = f"{source.name}, {place}"

    def load() -> EncodedImage:
        try:
            return EncodedImage(base64.b64decode(text, validate=True), name)
        except (binascii.Error, ValueError):
            raise BadImage(f"{name} is not base64; download the file again") from None

    return LazyPicture(f"{source}, {place}", name, load)


def parquet_files(root: Path, *patterns: str) -> list[Path]:
    """The files of the first pattern that matches any; `root` itself if it is a parquet file."""
    if root.is_file():
        return [root] if root.suffix == ".parquet" else []
    for pattern in patterns:
        if found := sorted(root.glob(pattern)):
            return found
    return []


@dataclass(frozen=True)
class _Place:
    path: Path
    changed_ns: int
    group: int
    row: int


@functools.lru_cache(maxsize=8)
def _group(path: Path, _changed_ns: int, group: int, column: str) -> list[Any]:
    """Values of a column in a row group; `_changed_ns` is there so that a rewritten file is read again."""
    import pyarrow.parquet

    values: list[Any] = pyarrow.parquet.ParquetFile(path).read_row_group(group, [column]).column(column).to_pylist()
    return values


def parquet_rows(paths: Sequence[Path]) -> Iterator[Row]:
    """Rows of parquet files in order; an image column holds a Picture (None where the cell is empty).

    Raises:
        MissingPiece: pyarrow is not installed. DataError: a file is damaged.
    """
    need_package("pyarrow", "eval")
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        try:
            file, changed_ns = pyarrow.parquet.ParquetFile(path), path.stat().st_mtime_ns
            pictures = [f.name for f in file.schema_arrow if _is_binary(pyarrow, f.type)]
            plain = [name for name in file.schema_arrow.names if name not in pictures]
            for group in range(file.num_row_groups):
                rows = (
                    file.read_row_group(group, plain).to_pylist()
                    if plain
                    else [{}] * file.metadata.row_group(group).num_rows
                )
                filled = {name: _filled(file, group, name) for name in pictures}
                for number, row in enumerate(rows):
                    cells = {
                        name: _cell(_Place(path, changed_ns, group, number), name) if filled[name][number] else None
                        for name in pictures
                    }
                    yield {**row, **cells}
        except (OSError, pyarrow.ArrowException) as error:
            cause = str(error).splitlines()[0]
            raise DataError(f"{path} cannot be read as parquet ({cause}); download it again") from None


def _is_binary(pyarrow: Any, kind: Any) -> bool:
    types = pyarrow.types
    if types.is_struct(kind):
        return any(types.is_binary(f.type) or types.is_large_binary(f.type) for f in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _filled(file: Any, group: int, name: str) -> list[bool]:
    """Which cells of an image column hold something, without reading the images where that can be had."""
    field = file.schema_arrow.field(name).type
    names = [field.field(i).name for i in range(field.num_fields)] if field.num_fields else []
    column = f"{name}.path" if "path" in names else name
    values = file.read_row_group(group, [column]).column(name).to_pylist()
    return [value is not None for value in values]


def _cell(place: _Place, column: str) -> Picture:
    where = f"row group {place.group}, row {place.row}, {column}"
    name = f"{place.path.name}, {where}"

    def load() -> EncodedImage:
        value = _group(place.path, place.changed_ns, place.group, column)[place.row]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise BadImage(f"{name} holds no image bytes; embed the images in the parquet files")
        return EncodedImage(data, name)

    return LazyPicture(f"{place.path}, {where}", name, load)
