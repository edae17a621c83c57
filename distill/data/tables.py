"""Parquet files, saved Hugging Face data sets and hub ids, through the `datasets` library. No torch.

The library keeps rows in memory-mapped Arrow files, so a row is read without the ones around it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.record import Raw
from vlm.errors import DataError, MissingPiece

HUB = "hf:"


def cache_dir() -> Path:
    """Folder for what can be made again: Arrow copies of parquet files, results of data checks."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align-edge" / "data"


class TableSource:
    """Rows of a `datasets.Dataset`; image columns stay encoded until training opens them."""

    def __init__(self, table: Any, kind: str, files: Sequence[Path], names: Sequence[str], rows: Sequence[int]) -> None:
        if len(table) == 0:
            raise DataError(f"{names[0]} is an empty data set; name one with at least one conversation")
        self.kind, self.files = kind, tuple(files)
        self.fingerprint = str(table._fingerprint)
        self._table = table.with_format("arrow")  # as stored: casting the image columns would write the data anew
        self._names, self._starts = tuple(names), np.cumsum([0, *rows[:-1]])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Raw:
        return Raw(self._table[int(index)].to_pylist()[0])

    def where(self, index: int) -> str:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._names[part]} record {index - int(self._starts[part])}"


def undecoded(table: Any) -> Any:
    """The same rows of a stream with every image column as {"bytes", "path"} instead of decoded pictures."""
    import datasets

    if table.features is None:
        return table
    plain = {name: _undecoded(feature) for name, feature in table.features.items()}
    return table.cast(datasets.Features(plain)) if plain != dict(table.features) else table


def _undecoded(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(item) for name, item in feature.items()}
    return feature


def library() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingPiece("this data set needs the `datasets` library; pip install 'align-edge[distill]'") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def open_parquet(files: Sequence[Path]) -> TableSource:
    """One or several parquet files with the same columns.

    Raises:
        DataError: a file is missing, damaged, or has other columns than the first.
    """
    datasets = library()
    rows = check_parquet(files)
    try:
        table = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache_dir() / "parquet"))
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{files[0]} (and {len(files) - 1} more) cannot be read ({_first_line(cause)})") from None
    return TableSource(table, "parquet", files, [str(file) for file in files], rows)


def check_parquet(files: Sequence[Path]) -> list[int]:
    """Row counts of parquet files, from their footers.

    Raises:
        DataError: names the first file that is missing, damaged, or has other columns than the first.
    """
    import pyarrow as pa
    from pyarrow import parquet

    counts: list[int] = []
    columns: list[str] = []
    for file in files:
        try:
            footer = parquet.ParquetFile(file)
        except FileNotFoundError:
            raise DataError(f"no data set at {file}; check --data") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file} is not a readable parquet file ({_first_line(error)}); write it again") from None
        names = sorted(footer.schema_arrow.names)
        if columns and names != columns:
            raise DataError(
                f"{file} record 0: fields {names} differ from {columns} in {files[0]}; use one set of fields"
            )
        columns = names
        counts.append(footer.metadata.num_rows)
    return counts


def is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_saved(folder: Path) -> TableSource:
    """A folder written by `save_to_disk`; of a folder with several splits, the one named train.

    Raises:
        DataError: damaged, or no split named train.
    """
    datasets = library()
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if is_saved(path))
        if "train" not in splits:
            raise DataError(f"{folder} holds the splits {', '.join(splits)}; name one: --data {folder}/SPLIT")
        folder = folder / "train"
    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library lets through whatever its readers raise
        raise DataError(f"{folder} is not a readable saved data set ({_first_line(error)}); save it again") from None
    return TableSource(table, "saved data set", (folder / "state.json",), [str(folder)], [len(table)])


def split_hub_name(name: str) -> tuple[str, str]:
    """`hf:ORG/NAME[:SPLIT]` -> hub id and split (default train)."""
    hub_id, _, split = name.removeprefix(HUB).partition(":")
    return hub_id, split or "train"


def load_hub(name: str, streaming: bool) -> Any:
    """The rows of a hub id; the only place where reading data may use the network.

    Raises:
        DataError: no such data set or split, or it cannot be reached.
    """
    datasets = library()
    hub_id, split = split_hub_name(name)
    try:
        return datasets.load_dataset(hub_id, split=split, streaming=streaming)
    except Exception as error:  # hub, network and reader errors of many libraries
        raise DataError(
            f"{HUB}{hub_id} split {split!r} cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "check the name, the split and the network"
        ) from None


def open_hub(name: str) -> TableSource:
    table = load_hub(name, streaming=False)
    hub_id, split = split_hub_name(name)
    return TableSource(table, "HF data set", (), [f"{HUB}{hub_id}[{split}]"], [len(table)])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
