"""Which models a person can choose from: artefacts with a manifest, and the newest trained student."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm import load, manifest
from vlm.console import note
from vlm.errors import CheckpointError, ToolError, UserError

ARTIFACTS = Path("artifacts")
ENGINES = {"onnx": "ONNX Runtime", "gguf": "llama.cpp", "tensorrt": "TensorRT", "torch": "PyTorch"}


@dataclass(frozen=True)
class Entry:
    """One model on offer, described without loading it.

    Attributes:
        format: one of ENGINES; `torch` is a checkpoint, everything else an artefact.
        verified: the manifest's verdict; None for a checkpoint, which is what artefacts are verified against.
    """

    path: Path
    name: str
    format: str
    precision: str
    bytes: int
    verified: bool | None

    @property
    def key(self) -> str:
        return str(self.path)

    @property
    def engine(self) -> str:
        return ENGINES[self.format]

    @property
    def label(self) -> str:
        """What the drop-down shows."""
        warning = "" if self.verified is not False else " (not verified)"
        return f"{self.name} · {self.engine} · {self.precision}{warning}"


def find(artifacts: Path = ARTIFACTS, runs: Path = load.RUNS) -> tuple[Entry, ...]:
    """Every artefact under `artifacts`, then the newest student under `runs`.

    A damaged one is named on stderr and left out: it must not hide those that work.

    Raises:
        UserError: nothing that can be shown.
    """
    paths = sorted(path.parent for path in artifacts.glob(f"**/{manifest.NAME}") if not _hidden(path, artifacts))
    with contextlib.suppress(CheckpointError):  # no student: artefacts alone are fine
        paths.append(load.newest_run(runs))
    entries = []
    for path in paths:
        try:
            entries.append(describe(path))
        except ToolError as error:
            note(f"left out: {error.message}")
    if not entries:
        raise UserError(
            f"no artefact under {artifacts}/ and no finished run under {runs}/; "
            "train a student with `python -m distill`, then `python -m demo`"
        )
    return _with_distinct_names(entries)


def named(paths: Iterable[Path]) -> tuple[Entry, ...]:
    """The models a person listed on the command line, in that order.

    Raises:
        UserError: a path is neither an artefact nor a checkpoint.
    """
    distinct: dict[Path, Path] = {}
    for path in paths:
        distinct.setdefault(path.resolve(), path)
    return _with_distinct_names([describe(path) for path in distinct.values()])


def describe(path: Path) -> Entry:
    """Read what the page says about a model from its manifest or checkpoint files; weights stay on disk.

    Raises:
        UserError: the path holds neither.
    """
    if (path / manifest.NAME).is_file():
        found = manifest.read_manifest(path)
        return Entry(
            path=path,
            name=_name(path),
            format=found.format,
            precision=precision_text(found.precision),
            bytes=sum(entry.bytes for entry in found.files),
            verified=found.verified,
        )
    if (path / "config.json").is_file():
        checkpoint = load.open_checkpoint(path)
        dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
        size = sum(weights.stat().st_size for weights in checkpoint.weights)
        return Entry(path, _name(path), "torch", str(dtype), size, None)
    raise UserError(
        f"{path} is neither an artefact ({manifest.NAME}) nor a checkpoint (config.json); "
        "make one with `python -m export --target onnx`"
    )


def precision_text(precision: dict[str, Any]) -> str:
    """`{"decoder": {"type": "int8"}, "vision_encoder": {"type": "fp16"}}` -> `int8 decoder, fp16 vision encoder`."""
    kinds: dict[str, str] = {}
    for component, value in precision.items():
        kind = value.get("type", value.get("dtype")) if isinstance(value, dict) else value
        if isinstance(kind, str):
            kinds[component] = kind
    distinct = list(dict.fromkeys(kinds.values()))
    if not distinct:
        return "unknown precision"
    if len(distinct) == 1:
        return distinct[0]
    return ", ".join(f"{kind} {component.replace('_', ' ')}" for component, kind in kinds.items())


def size_text(size: int) -> str:
    """Decimal units, as drives and downloads count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _hidden(path: Path, root: Path) -> bool:
    """True inside a folder a killed export left behind (`.NAME.partial-*`)."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _name(path: Path) -> str:
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "student" else resolved.name


def _with_distinct_names(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Two folders of the same name are told apart by their parent's."""
    names = [entry.name for entry in entries]
    return tuple(
        dataclasses.replace(entry, name=f"{entry.path.resolve().parent.name}/{entry.name}")
        if names.count(entry.name) > 1 and entry.path.resolve().name != "student"
        else entry
        for entry in entries
    )
