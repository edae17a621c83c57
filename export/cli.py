"""The `python -m export` command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from export import gguf_precision
from export.options import PRECISIONS, TARGETS, ExportOptions, Target, plan_runs
from export.precision import ALGORITHMS, FLAVOURS, PARTS
from export.trt_precision import TRT_PARTS
from vlm import engine_key
from vlm.console import Parser, natural, note, print_json, table
from vlm.errors import GateFailed, MissingPiece, UserError
from vlm.load import newest_run
from vlm.manifest import check_files, read_manifest

EXAMPLE = """\
examples:
  python -m export --target onnx                     the newest student under runs/
  python -m export --target onnx --precision int4,vision=fp16 --auto-precision
  python -m export --target gguf --precision q4_k_m --student runs/digits/student --out artifacts/board
  python -m export verify artifacts/board            replay the golden sample on this machine
  python -m export build artifacts/digits-tensorrt   TensorRT engines, on the device
"""


def export_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m export",
        description="Turn a student checkpoint into an artefact and measure it against PyTorch.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--student", type=Path, help="checkpoint directory (default: newest finished run)")
    parser.add_argument("--out", type=Path, help="artefact directory (default: artifacts/RUN-TARGET)")
    offered = "; ".join(f"{target}: {', '.join(names)}" for target, names in PRECISIONS.items())
    parser.add_argument(
        "--precision",
        help=f"{offered} (default: the first; gguf the first two); onnx also per part: int4,PART=KIND with {', '.join(PARTS)}; "
        f"tensorrt with {', '.join(TRT_PARTS)}; gguf with {', '.join(gguf_precision.PARTS)}",
    )
    parser.add_argument(
        "--data", type=Path, help="JSON (lines) of the student's own questions: image, question, answer"
    )
    parser.add_argument("--images", type=Path, help="folder of the images of --data (default: that of the file)")
    parser.add_argument("--samples", type=int, default=200, help="unseen samples for the accuracy gate (default 200)")
    parser.add_argument("--seed", type=natural, default=0, help="of the samples drawn (default 0)")
    parser.add_argument("--calibration", type=Path, help="folder of images (default: the rest of --data, or digits)")
    both = parser.add_argument_group("for --target onnx and tensorrt")
    both.add_argument("--algorithm", choices=ALGORITHMS, default="default", help="how 4-bit scales are chosen")
    both.add_argument("--awq", action="store_true", help="fold activation-aware scales into weights before rounding")
    onnx = parser.add_argument_group("only for --target onnx")
    onnx.add_argument("--flavour", choices=FLAVOURS, help="operators (default: ort for quantised decoders)")
    onnx.add_argument("--auto-precision", action="store_true", help="raise the worst part until the gates hold")
    onnx.add_argument(
        "--ablation",
        action=argparse.BooleanOptionalAction,
        help="measure what each part's precision costs (default: for small students)",
    )
    gguf = parser.add_argument_group("only for --target gguf")
    gguf.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix (default: gathered below 8 bits)")
    gguf.add_argument("--no-imatrix", action="store_true", help="quantise without an importance matrix")
    gguf.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help="llama.cpp checkout whose converter writes the files"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the student, print files and sizes, write nothing"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


def artefact_parser(command: str) -> argparse.ArgumentParser:
    text = {
        "verify": "Check hashes and replay the golden sample of an artefact on this machine.",
        "build": "Build the TensorRT engines of an artefact on this device.",
    }[command]
    parser = Parser(
        prog=f"python -m export {command}",
        description=text,
        epilog=f"example:\n  python -m export {command} artifacts/digits-{'onnx' if command == 'verify' else 'tensorrt'}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artefact", type=Path)
    if command == "build":
        from export import build_engine

        build_engine.add_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser


def main(argv: Sequence[str]) -> int:
    """Dispatch; errors leave as `vlm.errors.ToolError`, whose exit code the caller uses."""
    if argv and argv[0] == "verify":
        return run_verify(artefact_parser("verify").parse_args(argv[1:]))
    if argv and argv[0] == "build":
        return run_build(artefact_parser("build").parse_args(argv[1:]))
    if argv and not argv[0].startswith("-"):
        raise UserError(f"unknown command {argv[0]!r}; use verify, build or --target, see `python -m export --help`")
    return run_export(export_parser().parse_args(argv))


def run_export(arguments: argparse.Namespace) -> int:
    student = arguments.student or newest_run()
    asked = ExportOptions(
        target=arguments.target,
        student=student,
        out=arguments.out or Path(),
        precision=PRECISIONS[cast(Target, arguments.target)][0] if arguments.precision is None else arguments.precision,
        samples=arguments.samples,
        dry_run=arguments.dry_run,
        seed=arguments.seed,
        flavour=arguments.flavour,
        algorithm=arguments.algorithm,
        awq=arguments.awq,
        calibration=arguments.calibration,
        auto_precision=arguments.auto_precision,
        ablation=arguments.ablation,
        imatrix=arguments.imatrix,
        no_imatrix=arguments.no_imatrix,
        llama_cpp=arguments.llama_cpp,
        data=arguments.data,
        images=arguments.images,
    )
    runs = plan_runs(asked, arguments.out, arguments.precision)
    _quiet_libraries()
    if arguments.dry_run:
        return _dry_run(runs, arguments.json)
    from export.artefact import export_all, next_step

    results = export_all(runs)
    if arguments.json:
        first, *others = (r.to_json() for r in results)
        print_json({**first, "student": str(student), "also": others})
    else:
        print(f"student {student}")
        print(table(("artefact", "verified", "MB", "s", "logits", "tokens equal"), [_row(r) for r in results]))
    if failed := next_step(results):
        raise failed
    if arguments.target == "tensorrt":
        folder, _ = _build(runs[0].out)
        note(f"engines are in {folder}")
    return 0


def _row(result: Any) -> tuple[str, ...]:
    worst, scores = result.parity["worst"], result.accuracy
    equal = f"{scores['tokens_equal']:.4f} of {scores['n']}" if scores["n"] else "not asked"
    logits = f"{max(worst['prefill'], worst['decode']):.2e}"
    verified = "yes" if result.verified else "NO"
    return str(result.artefact), verified, f"{result.bytes / 1e6:.2f}", f"{result.seconds:.1f}", logits, equal


def _dry_run(runs: list[ExportOptions], as_json: bool) -> int:
    from export.dry_run import estimate

    found = [estimate(run) for run in runs]
    if as_json:
        print_json({**found[0], "verified": False, "also": found[1:]})
    else:
        rows = [(f["artefact"], f["bytes"], f["seconds"], f["peak_rss_bytes"]) for f in found]
        print(table(("artefact", "MB", "about s", "about peak MB"), [_dry_row(*row) for row in rows]))
        for one in found:
            for entry in one.get("files", ()):
                print(f"  {entry['bytes']:>14}  {entry['path']}")
            if "bits_per_weight" in one:
                print(f"  {one['bits_per_weight']:.2f} bits per weight")
            for line, count in one.get("fallbacks", {}).items():
                print(f"  {count} matrices {line}")
    return 0


def _dry_row(artefact: str, size: int, seconds: float, peak: int) -> tuple[str, ...]:
    return artefact, f"{size / 1e6:.2f}", f"{seconds:.0f}", f"{peak / 1e6:.0f}"


def run_verify(arguments: argparse.Namespace) -> int:
    from export.verify import verify

    _quiet_libraries()
    report = verify(arguments.artefact)
    if arguments.json:
        print_json(report)
    else:
        print(f"{arguments.artefact}: {'verified' if report['verified'] else 'NOT verified'}")
        for line in report["failures"]:
            print(f"  {line}")
        print(table(("measured", "value"), [(k, f"{v:.3g}") for k, v in report["measured"].items()]))
    return 0 if report["verified"] else 1


def run_build(arguments: argparse.Namespace) -> int:
    from export import build_engine

    try:
        options = build_engine.options_of(arguments)
    except build_engine.Refused as error:
        raise UserError(str(error)) from None
    folder, built = _build(arguments.artefact, options)
    if arguments.json:
        record = json.loads((folder / engine_key.RECORD).read_text())
        print_json({"artefact": str(arguments.artefact), "engines": str(folder), "built": built, **record})
    else:
        print(folder)
    return 0


def _build(root: Path, options: Any = None) -> tuple[Path, bool]:
    """Build the engines of an artefact for this machine; the folder they are in, and whether they are new.

    Raises:
        MissingPiece: TensorRT or a GPU is missing; says what to run where it is not.
        UserError: not a TensorRT artefact, an option that does not fit, too little memory. GateFailed: TensorRT refused.
    """
    from export import build_engine

    manifest = read_manifest(root)
    if manifest.format != "tensorrt":
        raise UserError(f"{root} is a {manifest.format} artefact; engines are built from --target tensorrt")
    check_files(root, manifest)
    try:
        return build_engine.build(root, options)
    except engine_key.Missing as error:
        note(f"graphs and plan are in {root}")
        raise MissingPiece(
            f"{error}; then copy {root} there and run `python -m export build {root}` "
            f"(or `python {root / 'build_engine.py'}`, which needs nothing else)"
        ) from None
    except build_engine.Refused as error:
        raise UserError(str(error)) from None
    except build_engine.BuildError as error:
        raise GateFailed(str(error)) from error
    except OSError as error:  # a full disk, a folder that cannot be written
        raise UserError(f"{error.filename or root}: {error.strerror}; the same command goes on from there") from None


def _quiet_libraries() -> None:
    """Weight-loading bars and advice of the model library are not this command's progress."""
    import os

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
