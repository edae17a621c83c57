"""What one export run was asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from vlm.errors import UserError

Target = Literal["onnx", "gguf", "tensorrt"]
TARGETS: tuple[Target, ...] = get_args(Target)
# the first one is what a bare --target writes; gguf without --precision writes all of its list
PRECISIONS: dict[Target, tuple[str, ...]] = {
    "onnx": ("fp32",),
    "gguf": ("f16", "q8_0"),
    "tensorrt": ("fp16", "fp32"),
}


@dataclass(frozen=True)
class ExportOptions:
    """One artefact to write.

    Attributes:
        target: file format family.
        student: Hugging Face LLaVA directory.
        out: artefact directory; replaced as a whole when the export succeeds.
        precision: one of PRECISIONS[target].
        samples: unseen question-image pairs on which greedy tokens are compared with PyTorch.
        dry_run: check the student and estimate sizes, write nothing.
        seed: of the images and random continuations used for parity.
    """

    target: Target
    student: Path
    out: Path
    precision: str
    samples: int = 200
    dry_run: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS[self.target]:
            raise UserError(
                f"precision {self.precision!r} is not available for {self.target}; "
                f"choose from {', '.join(PRECISIONS[self.target])}"
            )
        if self.samples < 0:
            raise UserError(f"--samples {self.samples} is negative; give 0 or more")


def run_name(student: Path) -> str:
    """`runs/NAME/student` -> NAME, any other directory -> its own name."""
    student = student.resolve()
    return student.parent.name if student.name == "student" else student.name


def plan_runs(
    target: str, student: Path, out: Path | None, precision: str | None, samples: int, dry_run: bool, seed: int
) -> list[ExportOptions]:
    """The artefacts one command writes: one, or every precision of a target that has several files to offer."""
    kind = cast(Target, target)
    base = out or Path("artifacts") / f"{run_name(student)}-{kind}"
    if not base.name:
        raise UserError(f"--out {base} is not a folder of its own; name a new one, e.g. artifacts/student")
    if precision is not None or kind != "gguf":
        chosen = precision or PRECISIONS[kind][0]
        # a named precision gets its own default folder, so that it never replaces the plain export
        suffix = "" if out is not None or chosen == PRECISIONS[kind][0] else f"-{chosen}"
        return [ExportOptions(kind, student, _suffixed(base, suffix), chosen, samples, dry_run, seed)]
    return [
        ExportOptions(kind, student, _suffixed(base, f"-{p}" if i else ""), p, samples, dry_run, seed)
        for i, p in enumerate(PRECISIONS[kind])
    ]


def _suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
