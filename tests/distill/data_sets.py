"""The same samples written in every supported format and container."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from distill.data import Example, Examples
from vlm import digits


@dataclass(frozen=True)
class Sample:
    """A conversation: an optional system text, then questions (with how many new images) and answers in turns."""

    turns: tuple[tuple[str, int, str], ...]
    images: tuple[Image.Image, ...]
    system: str = ""


def samples(count: int) -> list[Sample]:
    """One image and question, several turns, two images, no image, and a system text, in rotation."""
    found = []
    for index in range(count):
        one, other = digits.sample("train", 2 * index), digits.sample("train", 2 * index + 1)
        kind = index % 5
        first = (one.question, 1, one.answer)
        if kind == 1:
            found.append(Sample((first, ("And what else?", 0, other.answer)), (one.image,)))
        elif kind == 2:
            found.append(Sample(((one.question, 2, one.answer),), (one.image, other.image)))
        elif kind == 3:
            found.append(Sample(((f"What is {index} + 2?", 0, f"{index} + 2"),), ()))
        else:
            found.append(Sample((first,), (one.image,), "Answer in digits." if kind == 4 else ""))
    return found


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_files(found: Sequence[Sample], folder: Path) -> list[list[str]]:
    """Write every image as images/N-K.png and return the names by sample."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = []
    for index, sample in enumerate(found):
        row = [f"images/{index}-{place}.png" for place in range(len(sample.images))]
        for name, image in zip(row, sample.images, strict=True):
            (folder / name).write_bytes(png(image))
        names.append(row)
    return names


def llava(sample: Sample, names: Sequence[str]) -> dict[str, Any]:
    turns = [{"from": "system", "value": sample.system}] if sample.system else []
    for question, images, answer in sample.turns:
        turns.append({"from": "human", "value": "<image>\n" * images + question})
        turns.append({"from": "gpt", "value": answer})
    image = {} if not names else {"image": names[0] if len(names) == 1 else list(names)}
    return {"id": "x", **image, "conversations": turns}


def sharegpt(sample: Sample, names: Sequence[str]) -> dict[str, Any]:
    """Other role names, the system text beside the turns, the mark after the question."""
    turns = []
    for question, images, answer in sample.turns:
        turns.append({"from": "user", "value": question + "<image>" * images})
        turns.append({"from": "assistant", "value": answer})
    return {"conversations": turns, "system": sample.system, "images": list(names)}


def sharegpt_messages(sample: Sample, names: Sequence[str]) -> dict[str, Any]:
    turns = [{"role": "system", "content": sample.system}] if sample.system else []
    for question, images, answer in sample.turns:
        turns.append({"role": "user", "content": "<image>" * images + question})
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns, "images": list(names)}


def messages(sample: Sample, names: Sequence[Any]) -> dict[str, Any]:
    turns = [{"role": "system", "content": [{"type": "text", "text": sample.system}]}] if sample.system else []
    for question, images, answer in sample.turns:
        parts = [{"type": "image", "text": None} for _ in range(images)] + [{"type": "text", "text": question}]
        turns.append({"role": "user", "content": parts})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": turns, "images": list(names)}


def json_list(file: Path, records: Sequence[Any]) -> Path:
    file.write_text(json.dumps(records, indent=1))
    return file


def json_lines(file: Path, records: Sequence[Any]) -> Path:
    file.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))
    return file


def tar_shard(file: Path, records: Sequence[tuple[Any, Sequence[bytes]]], start: int = 0) -> Path:
    with tarfile.open(file, "w") as tar:
        for number, (record, images) in enumerate(records, start):
            _add(tar, f"{number:05}.json", json.dumps(record).encode())
            for place, data in enumerate(images):
                _add(tar, f"{number:05}.{place}.png", data)
    return file


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def table(found: Sequence[Sample]) -> Any:
    """A `datasets.Dataset` with an image column."""
    import datasets

    rows = [messages(sample, [{"bytes": png(image), "path": None} for image in sample.images]) for sample in found]
    features = datasets.Features(
        {
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
            "images": datasets.List(datasets.Image()),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


Writer = Callable[[Path, Sequence[Sample]], Path]


def _with_files(make: Callable[[Sample, Sequence[str]], dict[str, Any]], write: Any, name: str) -> Writer:
    def writer(folder: Path, found: Sequence[Sample]) -> Path:
        names = image_files(found, folder)
        return write(folder / name, [make(sample, row) for sample, row in zip(found, names, strict=True)])

    return writer


def _parquet(folder: Path, found: Sequence[Sample]) -> Path:
    half = len(found) // 2
    for number, part in enumerate((found[:half], found[half:])):
        table(part).to_parquet(folder / f"part-{number}.parquet")
    return folder / "part-*.parquet"


def _webdataset(folder: Path, found: Sequence[Sample]) -> Path:
    half = len(found) // 2
    for number, start in enumerate((0, half)):
        part = found[start : start + half if number == 0 else None]
        rows = [(llava(sample, ()), [png(image) for image in sample.images]) for sample in part]
        tar_shard(folder / f"shard-{number:03}.tar", rows, start)
    return folder / "shard-{000..001}.tar"


def _saved(folder: Path, found: Sequence[Sample]) -> Path:
    table(found).save_to_disk(folder / "saved")
    return folder / "saved"


WRITERS: dict[str, Writer] = {
    "llava json": _with_files(llava, json_list, "llava.json"),
    "llava jsonl": _with_files(llava, json_lines, "llava.jsonl"),
    "sharegpt json": _with_files(sharegpt, json_list, "sharegpt.json"),
    "sharegpt messages jsonl": _with_files(sharegpt_messages, json_lines, "sharegpt.jsonl"),
    "messages json": _with_files(messages, json_list, "messages.json"),
    "messages jsonl": _with_files(messages, json_lines, "messages.jsonl"),
    "messages parquet shards": _parquet,
    "messages saved data set": _saved,
    "llava tar shards": _webdataset,
}


class Permuted:
    """A data set whose images belong to other questions."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        other = self.examples[(index + len(self) // 2) % len(self)]
        return dataclasses.replace(self.examples[index], pixels=other.pixels)
