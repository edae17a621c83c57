"""Seconds, MB/s and peak memory of a GGUF conversion, beside a plain copy of the same bytes and llama.cpp's own converter.

The student has random weights at a realistic shape: a Qwen2.5-0.5B decoder (24 layers of 896, vocabulary 151,936, tied
head) under a SigLIP-so400m tower (27 layers of 1,152, 384 pixels, 729 visual tokens), stored in bfloat16.

    python -m benchmarks.export_gguf --rounds 3 --llama-cpp ../llama.cpp --out benchmarks/results/export_gguf.json

Every side runs in a process of its own, in turns. llama.cpp's converter refuses a LLaVA checkpoint with a SigLIP tower, so
it is given the decoder alone, laid out as a plain Qwen2 checkpoint beforehand, and compared with our text file alone; the
tensors of both must be equal.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Result, compare, finish, parser
from benchmarks.export_onnx import Run, build_student, measure, parameters

SO400M = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "image_size": 384,
    "patch_size": 14,
}
PIECE = 16 << 20
SIDES = ("pair", "text", "copy", "quantise", "lay-out", "equal")


def side(name: str, student: Path, out: Path) -> None:
    """What one process does."""
    from export import gguf_foreign, to_gguf
    from export.gguf_precision import GgufPrecision
    from export.gguf_quantise import quantise
    from export.gguf_source import Weights
    from export.student import read_facts
    from vlm.load import open_checkpoint

    out.mkdir(parents=True, exist_ok=True)
    if name == "copy":
        for index, source in enumerate(sorted(student.glob("*.safetensors"))):
            with source.open("rb") as reader, (out / f"copy-{index}").open("wb") as writer:
                while piece := reader.read(PIECE):
                    writer.write(piece)
        return
    if name == "equal":  # in a process of its own: a child's peak starts with what its parent had mapped
        (out / "equal").write_text(str(equal_tensors(out / "text.gguf", out.parent / "theirs.gguf")))
        return
    if name == "quantise":
        quantise(out / "text.gguf", out / "text-q4_k_m.gguf", GgufPrecision("q4_k_m"))
        return
    checkpoint = open_checkpoint(student)
    facts, weights = read_facts(checkpoint), Weights(checkpoint.weights)
    if name == "lay-out":
        gguf_foreign.lay_out(checkpoint, weights, out / "decoder")
        return
    origin = to_gguf.origin_of(checkpoint, facts, weights, "benchmark", "benchmark")
    to_gguf.write_text(origin, weights, out / "text.gguf", weights.kind)
    if name == "pair":
        to_gguf.write_mmproj(origin, weights, out / "mmproj.gguf", "f16")


def run_side(name: str, student: Path, out: Path) -> Run:
    command = [sys.executable, "-m", "benchmarks.export_gguf", "--side", name, str(student), str(out)]
    return measure(command, out.parent / "log")


def theirs(checkout: Path, decoder: Path, out: Path) -> Run:
    """llama.cpp's converter on the decoder alone, as its manual shows it."""
    from export.gguf_foreign import DRIVER

    script = checkout / "convert_hf_to_gguf.py"
    command = [sys.executable, "-c", DRIVER, str(checkout), "qwen2", str(script), str(decoder)]
    return measure([*command, "--outfile", str(out), "--outtype", "bf16"], out.parent / "log")


def equal_tensors(ours: Path, other: Path) -> int:
    """How many tensors both files hold, all of them equal.

    Raises:
        RuntimeError: names the first that differs.
    """
    import numpy as np

    from export.gguf_file import read_tensors

    a, b = read_tensors(ours), read_tensors(other)
    if set(a) != set(b):
        raise RuntimeError(f"tensors differ: {sorted(set(a) ^ set(b))[:3]}")
    for name, tensor in a.items():
        if tensor.tensor_type != b[name].tensor_type or not np.array_equal(tensor.data, b[name].data):
            raise RuntimeError(f"{name} differs from llama.cpp's")
    return len(a)


def largest_tensor(student: Path) -> int:
    from export.gguf_source import Weights

    return max(stored.bytes for stored in Weights(sorted(student.glob("*.safetensors"))).stored.values())


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--student", type=Path, help="a student made earlier with --keep-student")
    arguments.add_argument("--keep-student", type=Path, help="write the student here and stop")
    arguments.add_argument("--llama-cpp", type=Path, help="checkout whose converter is the other side")
    arguments.add_argument("--no-quantise", dest="quantise", action="store_false", help="leave Q4_K_M out")
    arguments.add_argument("--side", nargs=3, metavar=("SIDE", "STUDENT", "OUT"), help=f"internal: {', '.join(SIDES)}")
    given = arguments.parse_args()
    if given.side:
        side(given.side[0], Path(given.side[1]), Path(given.side[2]))
    elif given.keep_student:
        print(build_student(given.keep_student, vision=SO400M), "parameters")
    else:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
            _compare(given, Path(scratch))


def _compare(given: Any, scratch: Path) -> None:
    student = given.student or scratch / "student"
    if not given.student:
        # by another process: a child's peak starts with what its parent holds
        subprocess.run([sys.executable, "-m", "benchmarks.export_gguf", "--keep-student", str(student)], check=True)
    size = sum(path.stat().st_size for path in student.glob("*.safetensors"))
    runs: dict[str, list[Run]] = {}
    same = quantised = 0
    if given.llama_cpp:
        run_side("lay-out", student, scratch / "plain")
    for _ in range(given.rounds):
        out = scratch / "out"
        runs.setdefault("copy", []).append(run_side("copy", student, out))
        shutil.rmtree(out)
        runs.setdefault("pair", []).append(run_side("pair", student, out))
        if given.quantise and not quantised:  # once: nothing is compared with it
            runs["quantise"] = [run_side("quantise", student, out)]
            quantised = (out / "text-q4_k_m.gguf").stat().st_size
        if given.llama_cpp:
            runs.setdefault("text", []).append(run_side("text", student, out))
            runs.setdefault("theirs", []).append(theirs(given.llama_cpp, scratch / "plain" / "decoder", scratch / "theirs.gguf"))  # fmt: skip
            if not same:
                run_side("equal", student, out)
                same = int((out / "equal").read_text())
        shutil.rmtree(out)
        print({name: vars(found[-1]) for name, found in runs.items()}, file=sys.stderr, flush=True)
    limit = int(1.3 * largest_tensor(student)) + (1 << 30)
    results = [
        compare("wall seconds of text and mmproj against a plain copy", _wall(runs, "pair"), _wall(runs, "copy"), "s"),
        _peak("peak memory of the conversion against 1.3 x the largest tensor + 1 GiB", runs["pair"], limit),
    ]
    if given.llama_cpp:
        results += [
            compare("wall seconds of the text file against llama.cpp's converter", _wall(runs, "text"), _wall(runs, "theirs"), "s"),
            compare("processor seconds, the same", [r.cpu for r in runs["text"]], [r.cpu for r in runs["theirs"]], "s"),
            compare("peak memory, the same", [float(r.peak) for r in runs["text"]], [float(r.peak) for r in runs["theirs"]], "bytes"),
        ]  # fmt: skip
    settings = {
        "parameters": parameters(student),
        "checkpoint_bytes": size,
        "largest_tensor_bytes": largest_tensor(student),
        "conversion_mb_per_s": size / 1e6 / statistics.median(_wall(runs, "pair")),
        "copy_mb_per_s": size / 1e6 / statistics.median(_wall(runs, "copy")),
        "quantise_q4_k_m": {"seconds": _wall(runs, "quantise"), "bytes": quantised} if quantised else None,
        "tensors_equal_to_llama_cpp": same,
        "detail": {name: [vars(run) for run in found] for name, found in runs.items()},
    }
    for name in ("conversion_mb_per_s", "copy_mb_per_s"):
        print(f"{name}: {settings[name]:.0f}")
    finish(results, settings, given.out)


def _wall(runs: dict[str, list[Run]], name: str) -> list[float]:
    return [run.wall for run in runs[name]]


def _peak(name: str, runs: list[Run], limit: int) -> Result:
    peaks = sorted(run.peak for run in runs)
    return Result(name, peaks[-1] / limit, peaks[-1], limit, "bytes", len(runs), (peaks[0] / limit, peaks[-1] / limit))


if __name__ == "__main__":
    main()
