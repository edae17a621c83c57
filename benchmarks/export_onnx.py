"""Seconds and peak memory of an ONNX export against torch.onnx.export of the same modules, each in its own process.

The student has random weights at a realistic shape: a Qwen2.5-0.5B decoder (24 layers of 896, vocabulary 151,936, tied
head) under a SigLIP-base tower (12 layers of 768, 224 pixels), stored in bfloat16: 581 million parameters. The plain side
loads it in float32, fills the same three modules with their weights and calls torch.onnx.export; for int4 it then runs
ONNX Runtime's MatMulNBitsQuantizer on the files. Ours also compares with PyTorch, which the plain side does not.

    python -m benchmarks.export_onnx --precisions fp32,fp16,int4 --out benchmarks/results/export_onnx.json

optimum-onnx needs an older transformers: name an interpreter that has it with --optimum-python; it exports the text
decoder alone. Seconds are processor seconds, which a shared machine stretches less than the wall clock.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Result, compare, finish, parser

# random weights are chaotic: rounding them to 4 bits gives another function, and the gate rightly says so
GATE_FAILED = (0, 1)


@dataclass(frozen=True)
class Run:
    """One process: wall and processor seconds, peak resident bytes."""

    wall: float
    cpu: float
    peak: int


def build_student(
    directory: Path,
    layers: int = 24,
    tower_layers: int = 12,
    vocabulary: int = 151936,
    vision: dict[str, int] | None = None,
) -> int:
    """Write the random student in bfloat16; returns its number of parameters.

    Args:
        vision: other sizes of the tower.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

    from distill.assemble import END_OF_TEXT, IMAGE, TURN_END, Shape, build_processor, build_tokenizer, save_checkpoint
    from vlm import digits

    tokenizer = build_tokenizer(digits.texts())
    end, pad, image = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT, IMAGE])
    text = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=896,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    sizes = vision or {
        "hidden_size": 768,
        "num_hidden_layers": tower_layers,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 16,
    }
    side, patch = sizes["image_size"], sizes["patch_size"]
    tower = SiglipVisionConfig(vision_use_head=False, **sizes)
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=image,
        projector_hidden_act="gelu_pytorch_tanh",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():  # fresh weights give flat logits, on which every comparison passes
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "language_model.layers" in name:
                parameter.mul_(2.0)
    model.generation_config.eos_token_id = [end, pad]
    model.generation_config.pad_token_id = pad
    processor = build_processor(tokenizer, Shape(image_size=side, patch_size=patch))
    save_checkpoint(model, processor, directory, {"objective": "none", "licence": "Apache-2.0"})
    return sum(p.numel() for p in model.parameters())


def plain(student_directory: Path, out: Path, precision: str) -> None:
    """torch.onnx.export as its manual shows it, on modules that hold all their weights."""
    import torch

    from export.declare import example_inputs
    from export.hold import held_tensors
    from export.precision import parse_precision
    from export.student import Student, read_facts
    from export.to_onnx import LIST_INPUTS, OPSET, Storage, graphs
    from vlm.load import load_model, open_checkpoint

    checkpoint = open_checkpoint(student_directory)
    student = Student(checkpoint, load_model(checkpoint).requires_grad_(False), read_facts(checkpoint))
    floats = "fp16" if precision == "fp16" else "fp32"
    dynamic = torch.export.Dim.DYNAMIC
    out.mkdir(parents=True, exist_ok=True)
    for graph in graphs(student, Storage(parse_precision(floats))):
        module = graph.build().eval()
        for name, item in held_tensors(module).items():
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.as_tensor(item.read()))
        feed: dict[str, Any] = {}
        shapes: dict[str, Any] = {}
        examples = example_inputs(graph.spec, student)
        for port in graph.spec.inputs:
            axes = {i: dynamic for i, d in enumerate(port.dims) if isinstance(d, str)}
            group = next((n for n in LIST_INPUTS if port.name.startswith(f"{n}.")), None)
            if group is None:
                feed[port.name], shapes[port.name] = examples[port.name], axes
            else:
                feed.setdefault(group, []).append(examples[port.name])
                shapes.setdefault(group, []).append(axes)
        with torch.no_grad():
            program = torch.onnx.export(
                module, (), kwargs=feed, dynamic_shapes=shapes, dynamo=True, opset_version=OPSET, verbose=False
            )
        path = out / f"{graph.stem}.onnx"
        program.save(str(path), external_data=True)
        del program, module
        if precision == "int4":
            _quantise_file(path)


def _quantise_file(path: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(str(path)), block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path.with_name(f"{path.stem}_q4.onnx")), use_external_data_format=True)
    path.unlink()


def measure(command: list[str], log: Path, allowed: tuple[int, ...] = (0,)) -> Run:
    """Run a command and wait for it.

    Args:
        allowed: exit codes that mean the work was done.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    started = time.perf_counter()
    with log.open("wb") as sink:
        child = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status) not in allowed:
        raise RuntimeError(f"{' '.join(command[:6])} ...: {log.read_text()[-600:]}")
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def ours(student: Path, out: Path, precision: str, log: Path) -> Run:
    return measure(_command(student, out, precision), log, GATE_FAILED)


def _command(student: Path, out: Path, precision: str, *more: str) -> list[str]:
    command = [sys.executable, "-m", "export", "--target", "onnx", "--precision", precision, "--student", str(student)]
    return [*command, "--out", str(out), "--samples", "0", "--no-ablation", "--json", *more]


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.set_defaults(rounds=1)
    arguments.add_argument("--precisions", default="fp32,fp16,int4")
    arguments.add_argument("--plain", default="fp32,fp16,int4", help="precisions of the plain side")
    arguments.add_argument("--student", type=Path, help="a student made earlier with --keep-student")
    arguments.add_argument("--keep-student", type=Path, help="write the student here and stop")
    arguments.add_argument("--keep", type=Path, help="keep our artefacts under this folder")
    arguments.add_argument(
        "--at-most", type=int, default=1000, help="processes to run now; --out goes on from its file"
    )
    arguments.add_argument("--optimum-python", help="interpreter with optimum-onnx")
    arguments.add_argument(
        "--side", nargs=3, metavar=("STUDENT", "OUT", "PRECISION"), help="run the plain side, internal"
    )
    given = arguments.parse_args()
    if given.side:
        plain(Path(given.side[0]), Path(given.side[1]), given.side[2])
    elif given.keep_student:
        print(build_student(given.keep_student), "parameters")
    else:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
            _compare(given, Path(scratch))


def parameters(student: Path) -> int:
    """Stored numbers, from the headers."""
    from safetensors import safe_open

    count = 0
    for path in student.glob("*.safetensors"):
        with safe_open(path, "np") as tensors:
            names = tensors.keys()  # the handle itself cannot be iterated
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return count


def _compare(given: Any, scratch: Path) -> None:
    student = given.student or scratch / "student"
    if not given.student:
        # by another process: a child's peak starts with what its parent holds
        subprocess.run([sys.executable, "-m", "benchmarks.export_onnx", "--keep-student", str(student)], check=True)
    precisions = given.precisions.split(",")
    sides = [
        (side, p) for p in precisions for side in ("ours", "plain") if side == "ours" or p in given.plain.split(",")
    ]
    if given.optimum_python:
        sides.append(("optimum", "fp32"))
    runs: dict[str, list[dict[str, Any]]] = {}
    if given.out and given.out.is_file():
        runs = json.loads(given.out.read_text())["settings"]["runs"]
    waiting = [
        (side, p) for turn in range(given.rounds) for side, p in sides if len(runs.get(f"{side} {p}", ())) <= turn
    ]
    half_bytes = 2 * parameters(student)
    for side, precision in waiting[: given.at_most]:
        made = _run_side(side, precision, given, student, scratch)
        runs.setdefault(f"{side} {precision}", []).append(made)
        print(side, precision, made, file=sys.stderr, flush=True)
        settings = {"parameters": half_bytes // 2, "fp16_weight_bytes": half_bytes, "runs": runs}
        finish(_rows(runs, precisions, half_bytes), settings, given.out)


def _run_side(side: str, precision: str, given: Any, student: Path, scratch: Path) -> dict[str, Any]:
    log, out = scratch / "log", scratch / "out"
    if side == "optimum":
        made: dict[str, Any] = vars(_optimum(given.optimum_python, student, scratch))
    elif side == "plain":
        command = [sys.executable, "-m", "benchmarks.export_onnx", "--side", str(student), str(out), precision]
        made = vars(measure(command, log))
    else:
        out = given.keep / f"ours-{precision}" if given.keep else out
        made = vars(ours(student, out, precision, log))
        made |= {"verified": json.loads((out / "manifest.json").read_text())["verified"]}
        estimate = json.loads(
            subprocess.check_output(_command(student, out, precision, "--dry-run"), text=True).splitlines()[-1]
        )
        made |= {
            "said_peak": estimate["peak_rss_bytes"],
            "said_seconds": estimate["seconds"],
            "said_bytes": estimate["bytes"],
        }
    made["bytes"] = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    if out.parent == scratch:
        shutil.rmtree(out)
    return made


def _rows(runs: dict[str, list[dict[str, Any]]], precisions: list[str], half_bytes: int) -> list[Result]:
    rows = []
    for precision in precisions:
        mine, theirs = runs.get(f"ours {precision}", []), runs.get(f"plain {precision}", [])
        if not mine:
            continue
        peaks = [run["peak"] for run in mine]
        per_byte = [float(half_bytes)] * len(peaks)
        rows.append(compare(f"peak memory of {precision} per byte of fp16 weights", peaks, per_byte, "bytes"))
        rows += _pairs(mine, theirs, f"of {precision} against torch.onnx.export")
    what = "of fp32, all three graphs, against optimum-onnx, text decoder only"
    return rows + _pairs(runs.get("ours fp32", []), runs.get("optimum fp32", []), what)


def _pairs(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], what: str) -> list[Result]:
    n = min(len(mine), len(theirs))
    kinds = (("processor seconds", "cpu", "s"), ("seconds", "wall", "s"), ("peak memory", "peak", "bytes"))
    sides = [(name, [r[key] for r in mine[:n]], [r[key] for r in theirs[:n]], unit) for name, key, unit in kinds]
    return [compare(f"{name} {what}", a, b, unit) for name, a, b, unit in sides if n]


def save_text_decoder(student: Path, directory: Path) -> None:
    """The student's decoder as a plain Qwen2 checkpoint, for tools that know no LLaVA."""
    import torch
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    from vlm.load import load_model, open_checkpoint

    model = load_model(open_checkpoint(student), "bfloat16")
    with torch.device("meta"):
        text = Qwen2ForCausalLM(model.config.text_config)
    text.model, text.lm_head = model.model.language_model, model.lm_head
    text.generation_config = model.generation_config
    text.save_pretrained(directory)
    AutoTokenizer.from_pretrained(student).save_pretrained(directory)


def _optimum(python: str, student: Path, scratch: Path) -> Run:
    """optimum-onnx on the text decoder alone: it has no configuration for LLaVA."""
    save_text_decoder(student, scratch / "text")
    command = [python, "-m", "optimum.exporters.onnx", "--model", str(scratch / "text"), "--dtype", "fp32"]
    options = ["--task", "text-generation-with-past", "--no-post-process"]
    return measure([*command, *options, str(scratch / "out")], scratch / "log")


if __name__ == "__main__":
    main()
