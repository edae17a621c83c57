"""Finished files of an interrupted export, kept beside the artefact under the hash of all that made them.

Writing a graph of a large student takes minutes. Each graph is therefore first published into `.NAME.stages/`; the
artefact gets hard links. A second run of the same command finds what the first one finished, and a successful run
removes the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import load
from vlm.console import note
from vlm.errors import UserError
from vlm.files import atomic_dir, sha256_file, write_atomic

if TYPE_CHECKING:
    from vlm.load import Checkpoint

RECORD = "stage.json"


class Stages:
    """A folder of finished stages; with no folder, every stage is made in place."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def files(
        self,
        name: str,
        key: Any,
        root: Path,
        make: Callable[[Path], Sequence[tuple[Path, str]]],
        fallbacks: dict[str, int] | None = None,
    ) -> list[Any]:
        """`make(folder)` writes files and returns (path, role) pairs; the same pairs under `root`, made or found.

        Args:
            name: of the stage, also part of its folder's name.
            key: JSON value that changes whenever the files would.
            fallbacks: what `make` fills in while it runs; of a stage that is found, what was filled in then.
        """
        if self.folder is None:
            return list(make(root))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        home = self.folder / f"{name}-{digest}"
        if (found := _read(home)) is None:
            for old in self.folder.glob(f"{name}-*"):
                shutil.rmtree(old, ignore_errors=True)
            with atomic_dir(home) as work:
                made = [(path.relative_to(work).as_posix(), role) for path, role in make(work)]
                entries = {path: {"role": role, "sha256": sha256_file(work / path)} for path, role in made}
                found = {"files": entries, "fallbacks": fallbacks or {}}
                write_atomic(work / RECORD, json.dumps(found))
        else:
            note(f"{name}: found finished from an earlier run")
        if fallbacks is not None:
            fallbacks.update(found["fallbacks"])
        files = []
        for relative, entry in found["files"].items():
            target = root / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(home / relative, target)
            files.append((target, entry["role"]))
        return files


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _read(home: Path) -> dict[str, Any] | None:
    """The record of a stage whose files are all as they were written; None otherwise."""
    try:
        record: dict[str, Any] = json.loads((home / RECORD).read_text())
        intact = all(sha256_file(home / path) == entry["sha256"] for path, entry in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if intact else None


def code_sha256(*places: Path) -> str:
    """Of program text, files or whole folders, by default this room's and vlm's: stages of another version are made again."""
    digest = hashlib.sha256()
    for place in places or (Path(__file__).parent, Path(load.__file__).parent):
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            digest.update(path.relative_to(place).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def student_key(checkpoint: Checkpoint) -> list[Any]:
    """Of everything about a student that ends up in a file."""
    read = sorted(
        p for p in checkpoint.directory.iterdir() if p.is_file() and p.suffix in (".json", ".jinja", ".txt", ".model")
    )
    return [checkpoint.weights_sha256(), {path.name: sha256_file(path) for path in read}]


@contextlib.contextmanager
def stages_of(out: Path) -> Iterator[Stages]:
    """Stages beside the artefact `out`, removed when the block ends well and kept otherwise.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = out.resolve().parent / f".{out.name}.stages"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent}: {error.strerror}; choose another folder with --out"
        ) from None
    try:
        yield Stages(folder)
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)
