"""What every reader produces: items with prompts, pictures and truths, read from disk and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from runtime.api import EncodedImage, Image
from runtime.images import read_image
from vlm.errors import DataError, UserError
from vlm.scoring.choice import lettered

# LLaVA 1.5's two ways to ask for a short answer
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
SHORT_TOKENS = 32
LONG_TOKENS = 512


@dataclass(frozen=True)
class TaskOptions:
    """Where the data is and how much of it to use.

    Attributes:
        data: folder (or file) in the benchmark's own layout; None only for `digits`.
        images: folder of the images where it is not in its usual place.
        split: "" is the benchmark's usual one.
        samples: 0 is all; otherwise so many questions, drawn at random, groups that count together kept whole.
    """

    data: Path | None = None
    images: Path | None = None
    split: str = ""
    samples: int = 0
    seed: int = 0


class Picture(Protocol):
    """One image of an item, read when it is needed."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    def read(self) -> EncodedImage | Image:
        """Raises BadImage where it is missing."""
        ...


@dataclass(frozen=True)
class FilePicture:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self) -> EncodedImage:
        return read_image(self.path)


@dataclass(frozen=True)
class LazyPicture:
    """An image inside a table, or one drawn on demand.

    Attributes:
        key: where it comes from, in full; pictures with the same key are the same.
    """

    key: str
    name: str = field(compare=False)
    load: Callable[[], EncodedImage | Image] = field(repr=False, compare=False)

    def read(self) -> EncodedImage | Image:
        return self.load()


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in its task.
        prompt: as the model is asked, images aside.
        truth: what the scorer needs; plain JSON.
        group: what the table is broken down by; plain JSON.
    """

    id: str
    prompt: str
    pictures: tuple[Picture, ...]
    truth: dict[str, Any]
    group: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A benchmark read from disk.

    Attributes:
        name: key of `vlm.scoring.benchmarks.BENCHMARKS`.
        note: what the reader chose or left out, one line.
        unit: group field whose items are drawn and scored together; "" where each stands alone.
        submission: columns of the file an evaluation server takes, per item; empty where there is none.
    """

    name: str
    items: tuple[Item, ...]
    max_new_tokens: int = SHORT_TOKENS
    note: str = ""
    submission: tuple[dict[str, Any], ...] = ()


Missing = Literal["refuse", "wrong"]


def data_of(options: TaskOptions, task: str) -> Path:
    """The data folder or file.

    Raises:
        UserError: not given, or not there.
    """
    if options.data is None:
        raise UserError(f"task {task} needs its data; add `--data DIR` (see docs/evaluation.md for the layout)")
    if not options.data.exists():
        raise UserError(f"no data at {options.data}; check `--data`")
    return options.data


def find(root: Path, *candidates: str) -> Path | None:
    """The first of some relative paths (wildcards allowed) that exists below `root`."""
    for candidate in candidates:
        if "*" in candidate:
            if found := sorted(root.glob(candidate)):
                return found[0]
        elif (root / candidate).exists():
            return root / candidate
    return None


def nothing_found(task: str, root: Path, *looked_for: str) -> UserError:
    listed = ", ".join(looked_for)
    return UserError(f"{root} has no {task} data: looked for {listed}; point --data at the folder that holds them")


def ask_options(question: str, options: Sequence[str]) -> tuple[str, dict[str, str]]:
    """LLaVA's multiple choice prompt, and the lettered options."""
    letters = lettered(options)
    listed = "".join(f"\n{letter}. {text}" for letter, text in letters.items())
    return f"{question}{listed}{LETTER}", letters


def unique(items: Iterable[Item], source: Path) -> tuple[Item, ...]:
    """Check that ids are unique and that there is at least one item.

    Raises:
        DataError: otherwise.
    """
    found = tuple(items)
    if not found:
        raise DataError(f"{source} holds no question for this task; check --data and --split")
    seen: set[str] = set()
    for item in found:
        if item.id in seen:
            raise DataError(f"{source}: id {item.id!r} occurs twice; every question needs its own")
        seen.add(item.id)
    return found


def draw(task: Task, unit: str, samples: int, seed: int) -> Task:
    """A random subset of about `samples` items, groups (group field `unit`) kept whole, in the file's order."""
    if not 0 < samples < len(task.items):
        return task
    import random

    groups: dict[str, list[int]] = {}
    for place, item in enumerate(task.items):
        groups.setdefault(str(item.group.get(unit, "")) if unit else item.id, []).append(place)
    names = list(groups)
    random.Random(seed).shuffle(names)
    kept: list[int] = []
    for name in names:
        if len(kept) >= samples:
            break
        kept += groups[name]
    kept.sort()
    rows = tuple(task.submission[i] for i in kept) if task.submission else ()
    return Task(task.name, tuple(task.items[i] for i in kept), task.max_new_tokens, task.note, rows)


def fingerprint(items: Sequence[Item], digest_of: Callable[[Picture], str]) -> Iterator[str]:
    """Per item, a digest of everything the answer and the score depend on."""
    for item in items:
        pictures = [digest_of(picture) for picture in item.pictures]
        whole = json.dumps([item.id, item.prompt, item.truth, item.group, pictures], sort_keys=True, ensure_ascii=False)
        yield hashlib.sha256(whole.encode()).hexdigest()
