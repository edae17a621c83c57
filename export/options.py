"""What one export run was asked to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from export import gguf_precision
from export.precision import ALGORITHMS, FLAVOURS, KINDS, PARTS, Algorithm, Flavour, parse_precision
from export.trt_precision import PRESETS, TRT_KINDS, TRT_PARTS, parse_trt_precision
from vlm.errors import UserError

Target = Literal["onnx", "gguf", "tensorrt"]
TARGETS: tuple[Target, ...] = get_args(Target)
# the first one is what a bare --target writes; gguf without --precision writes its first two
PRECISIONS: dict[Target, tuple[str, ...]] = {
    "onnx": tuple(KINDS),
    "gguf": gguf_precision.KINDS,
    "tensorrt": tuple(PRESETS),
}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PAIR = 2
ONLY_FOR: dict[str, tuple[Target, ...]] = {
    "flavour": ("onnx",),
    "awq": ("onnx", "tensorrt"),
    "algorithm": ("onnx", "tensorrt"),
    "calibration": ("onnx", "tensorrt", "gguf"),
    "auto_precision": ("onnx",),
    "ablation": ("onnx",),
    "imatrix": ("gguf",),
    "no_imatrix": ("gguf",),
    "llama_cpp": ("gguf",),
}


@dataclass(frozen=True)
class ExportOptions:
    """One artefact to write.

    Attributes:
        target: file format family.
        student: Hugging Face LLaVA directory.
        out: artefact directory; replaced as a whole when the export succeeds.
        precision: one of PRECISIONS[target]; also with overrides per part, `int4,vision=fp16`.
        samples: unseen question-image pairs on which greedy tokens are compared with PyTorch.
        dry_run: check the student and print files and sizes, write nothing.
        seed: of the images and random continuations used for parity.
        flavour: onnx operators, `ort` or `portable`; None takes what suits the precision.
        algorithm: how 4-bit scales are chosen.
        awq: fold activation-aware scales into the weights before rounding.
        calibration: folder of images; None takes the questions of `data` that are not evaluated, else digits.
        auto_precision: raise the worst part until the gates hold.
        data, images: file of the student's own questions, and the folder its images are in; None takes the digits.
        ablation: measure what each part's precision costs; None does so for students below ABLATION_PARAMETERS.
        imatrix: importance matrix for gguf; None gathers one where it helps.
        no_imatrix: quantise without one.
        llama_cpp: checkout whose own converter writes the files.
    """

    target: Target
    student: Path
    out: Path
    precision: str
    samples: int = 200
    dry_run: bool = False
    seed: int = 0
    flavour: Flavour | None = None
    algorithm: Algorithm = "default"
    awq: bool = False
    calibration: Path | None = None
    auto_precision: bool = False
    ablation: bool | None = None
    imatrix: Path | None = None
    no_imatrix: bool = False
    llama_cpp: Path | None = None
    data: Path | None = None
    images: Path | None = None

    def __post_init__(self) -> None:
        if self.target == "onnx":
            parse_precision(self.precision)
        elif self.target == "tensorrt":
            parse_trt_precision(self.precision)
        elif self.target == "gguf":
            chosen = gguf_precision.parse_gguf(self.precision)
            if chosen.needs_importance and self.no_imatrix:
                raise UserError(f"{chosen.decoder} needs an importance matrix; leave out --no-imatrix")
        elif self.precision not in PRECISIONS[self.target]:
            raise UserError(
                f"precision {self.precision!r} is not available for {self.target}; "
                f"choose from {', '.join(PRECISIONS[self.target])}"
            )
        if self.samples < 0:
            raise UserError(f"--samples {self.samples} is negative; give 0 or more")
        if self.flavour not in (None, *FLAVOURS) or self.algorithm not in ALGORITHMS:
            raise UserError(f"flavour {self.flavour!r} or algorithm {self.algorithm!r} is unknown; see --help")
        for name, targets in ONLY_FOR.items():
            if self.target not in targets and getattr(self, name) not in (None, False, "default"):
                raise UserError(
                    f"--{name.replace('_', '-')} is for --target {' or '.join(targets)}, not {self.target}; leave it out"
                )
        if self.imatrix is not None and (self.no_imatrix or self.calibration is not None):
            raise UserError("--imatrix names a finished importance matrix; leave out --no-imatrix and --calibration")
        if self.imatrix is not None and not self.imatrix.is_file():
            raise UserError(f"--imatrix {self.imatrix} is not a file; leave it out to gather one")
        if self.awq or self.algorithm == "search":
            self._check_four_bits()
        if self.ablation and self.target == "onnx" and not parse_precision(self.precision).quantised:
            raise UserError(f"--ablation shows what rounding each part costs, and {self.precision} rounds none")
        if self.images is not None and self.data is None:
            raise UserError(f"--images {self.images} is the folder of --data, which is missing")
        if self.calibration is not None and not self.calibration.is_dir():
            raise UserError(f"--calibration {self.calibration} is not a folder; name a folder of images")
        if self.calibration is not None and not any(p.suffix.lower() in IMAGES for p in self.calibration.iterdir()):
            raise UserError(f"--calibration {self.calibration} holds no image (png, jpg, webp, bmp)")

    def _check_four_bits(self) -> None:
        if self.target == "tensorrt":
            trt = parse_trt_precision(self.precision)
            kinds = {part: TRT_KINDS[getattr(trt, part)].kind.bits for part in TRT_PARTS}
        else:
            precision = parse_precision(self.precision)
            kinds = {part: KINDS[getattr(precision, part)].bits for part in PARTS}
        option = "--awq" if self.awq else "--algorithm search"
        # a table of embeddings is looked up, not multiplied: there is no norm before it to fold into
        if 4 not in (bits for part, bits in kinds.items() if not self.awq or part != "embed"):
            raise UserError(f"{option} does nothing at --precision {self.precision}; leave it out or choose int4")


def run_name(student: Path) -> str:
    """`runs/NAME/student` -> NAME, any other directory -> its own name."""
    student = student.resolve()
    return student.parent.name if student.name == "student" else student.name


def plan_runs(asked: ExportOptions, out: Path | None, precision: str | None) -> list[ExportOptions]:
    """The artefacts one command writes: one, or every precision of a target that has several files to offer.

    Args:
        asked: the options; its `out` and `precision` are replaced.
        out, precision: as typed, None where they were not.
    """
    base = out or Path("artifacts") / f"{run_name(asked.student)}-{asked.target}"
    if not base.name:
        raise UserError(f"--out {base} is not a folder of its own; name a new one, e.g. artifacts/student")
    offered = PRECISIONS[asked.target]
    if asked.imatrix is not None:  # not when an ExportOptions is made: that of a bare --target has no precision yet
        written = offered[:PAIR] if precision is None else (precision,)
        if not any(gguf_precision.parse_gguf(kind).weighted for kind in written):
            raise UserError(
                f"--imatrix does nothing at {' and '.join(written)}; leave it out or choose a --precision below 8 bits"
            )
    if precision is None and asked.target == "gguf":
        return [
            dataclasses.replace(asked, out=_suffixed(base, f"-{p}" if i else ""), precision=p)
            for i, p in enumerate(offered[:PAIR])
        ]
    chosen = precision or offered[0]
    # a named precision gets its own default folder, so that it never replaces the plain export
    suffix = "" if out is not None or chosen == offered[0] else f"-{chosen.replace(',', '-').replace('=', '-')}"
    return [dataclasses.replace(asked, out=_suffixed(base, suffix), precision=chosen)]


def _suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
