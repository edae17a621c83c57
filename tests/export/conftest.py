"""Tiny random students, exported once per session and shared by all tests of this room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from export import imatrix
from export.artefact import Making
from export.evidence import Evidence, collect
from export.measure import measure
from export.options import ExportOptions
from export.stages import Stages
from export.student import Student, open_student
from tests.memorised import make_memorised
from tests.tiny import make_student
from vlm.load import open_checkpoint
from vlm.manifest import Manifest, read_manifest, write_manifest

SAMPLES = 6
TRAINED = Path(__file__).parents[2] / "distill" / "assets" / "digits-teacher"  # no near ties, as tower "trained"
# what the published checkpoints of a later generation have other than the earlier one, whose classes they use
SAME_CLASS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip2": ("siglip", {"image_size": 64, "patch_size": 16}),
    "qwen2.5": ("qwen2", {"rope_theta": 1e6, "tied": False}),
}
LIMIT = 4


@dataclass(frozen=True)
class Subject:
    """A student with PyTorch's answers."""

    directory: Path
    student: Student
    evidence: Evidence


@dataclass(frozen=True)
class Exported:
    """An artefact on disk; tests copy it before they break it."""

    root: Path
    subject: Subject
    manifest: Manifest

    def copy_to(self, target: Path) -> Path:
        return Path(shutil.copytree(self.root, target))

    def measure_again(self, root: Path, manifest: Manifest | None = None) -> Manifest:
        return measure(self.subject.student.checkpoint, self.subject.evidence, root, manifest or read_manifest(root))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    imatrix.MOST = 16  # images of an importance matrix; 128 outside of tests


@dataclass(frozen=True)
class Opened:
    """A student nobody asked anything yet."""

    directory: Path
    student: Student


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Opened]:
    """Factory: (tower, decoder, further Shape fields) -> opened student, for tests of graphs that run nothing."""
    made: dict[str, Opened] = {}

    def get(tower: str, decoder: str, **sizes: Any) -> Opened:
        key = json.dumps([tower, decoder, sizes], sort_keys=True)
        if key not in made:
            where = tmp_path_factory.mktemp("opened") / f"{tower}-{decoder}"
            directory = make_student(where, tower=tower, decoder=decoder, **sizes)
            made[key] = Opened(directory, open_student(open_checkpoint(directory)))
        return made[key]

    return get


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    """Factory: (tower, decoder, further Shape fields) -> subject, made once per combination.

    With memorised=True the student is briefly trained, so that its first choices have a margin.
    """
    made: dict[str, Subject] = {}

    def get(tower: str, decoder: str, memorised: bool = False, **sizes: Any) -> Subject:
        tower, more = SAME_CLASS.get(tower, (tower, {}))
        decoder, others = SAME_CLASS.get(decoder, (decoder, {}))
        sizes = {**more, **others, **sizes}
        key = json.dumps([tower, decoder, memorised, sizes], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("students") / f"{tower}-{decoder}"
            make = make_memorised if memorised else make_student
            directory = TRAINED if tower == "trained" else make(folder, tower=tower, decoder=decoder, **sizes)
            student = open_student(open_checkpoint(directory))
            made[key] = Subject(directory, student, collect(student, SAMPLES, seed=0, limit=LIMIT))
        return made[key]

    return get


@pytest.fixture(scope="session")
def exported(subjects: Callable[..., Subject], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Factory: (target, precision, tower, decoder, as for `subjects`) -> artefact, measured, made once each."""
    made: dict[str, Exported] = {}

    def get(target: Any, precision: str, tower: str, decoder: str, **sizes: Any) -> Exported:
        key = json.dumps([target, precision, tower, decoder, sizes], sort_keys=True)
        if key not in made:
            subject = subjects(tower, decoder, **sizes)
            root = tmp_path_factory.mktemp("artefacts") / f"{tower}-{decoder}-{target}-{precision}"
            root.mkdir()
            ablation = False if target == "onnx" else None
            run = ExportOptions(target, subject.directory, root, precision, SAMPLES, ablation=ablation)
            manifest = Making(subject.student, subject.evidence, run, root, Stages(None)).finish()
            write_manifest(root, manifest)
            made[key] = Exported(root, subject, manifest)
        return made[key]

    return get
