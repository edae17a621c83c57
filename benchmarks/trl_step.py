"""Seconds and memory of a knowledge-distillation step against TRL: same pair of models, same batches, KD only.

TRL runs in an environment of its own. Processes of the sides alternate; each loads the same model directories, takes the
same optimiser steps (AdamW, clipping, float32) on the same token ids and pixels, and its losses must agree.

    python -m venv trl-venv && trl-venv/bin/pip install -r benchmarks/trl_requirements.txt
    python -m benchmarks.trl_step --trl trl-venv/bin/python --out benchmarks/results/trl_step-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import distill_step
from benchmarks.common import Result, compare, finish, parser
from distill.assemble import Shape, build_processor, build_tokenizer
from vlm.console import note, run_command
from vlm.errors import GateFailed, UserError

TOLERANCE = 1e-4
ROOT = Path(__file__).parent.parent


def make_pair(folder: Path, args: argparse.Namespace) -> None:
    """Write `student`, `teacher` and `batches.pt`."""
    processor = build_processor(build_tokenizer(["one two three"]), Shape(image_size=224, patch_size=16))
    for name, seed in (("student", 0), ("teacher", 1)):
        size, layers = getattr(args, name), getattr(args, f"{name}_layers")
        model: Any = distill_step.build(size, layers, args.vocabulary, seed, "cpu", torch.float32)
        if args.vision_layers:
            encoder = model.model.vision_tower.encoder
            encoder.layers = encoder.layers[: args.vision_layers]
            model.config.vision_config.num_hidden_layers = args.vision_layers
        # fresh weights give nearly flat logits, under which any two losses agree
        with torch.no_grad():
            model.lm_head.weight.mul_(4)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    torch.save([make_batch(args, seed) for seed in range(args.steps + args.warmup)], folder / "batches.pt")


def make_batch(args: argparse.Namespace, seed: int) -> dict[str, torch.Tensor]:
    """Samples with one image each; responses of different lengths, padded on the right."""
    random = torch.Generator().manual_seed(seed)
    prompt = distill_step.VISUAL_TOKENS + distill_step.INSTRUCTION_TOKENS
    shape = (args.batch, prompt + args.response)
    image = args.vocabulary - 1
    ids_BT = torch.randint(0, image, shape, generator=random)
    ids_BT[:, 4 : 4 + distill_step.VISUAL_TOKENS] = image
    lengths_B = args.response - torch.arange(args.batch) * args.response // (2 * args.batch)
    mask_BT = (torch.arange(shape[1]) < prompt + lengths_B[:, None]).long()
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    labels_BT[:, :prompt] = -100
    pixels = torch.randn(args.batch, 3, 224, 224, generator=random)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT, "pixel_values": pixels}


def measure(side: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One process's report."""
    ours = side == "ours"
    interpreter = sys.executable if ours else str(args.trl)
    command = [interpreter, "-m", "benchmarks.trl_ours" if ours else "benchmarks.trl_theirs", "--pair", str(folder)]
    command += ["--path", side, "--steps", str(args.steps), "--warmup", str(args.warmup)]
    command += ["--threads", str(args.threads)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GateFailed(f"{side} failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    median = statistics.median(report["seconds"])
    note(f"{side}: {median:.2f} s a step, {report['peak'] / 2**30:.2f} GiB, first loss {report['losses'][0]:.6f}")
    return report


def agree(reports: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Largest relative difference of any step's loss from ours, per side."""
    expected = reports["ours"][0]["losses"]
    return {
        side: max(abs(a - b) / abs(b) for report in found for a, b in zip(report["losses"], expected, strict=True))
        for side, found in reports.items()
    }


def results(reports: dict[str, list[dict[str, Any]]]) -> list[Result]:
    """Ours against every path of TRL: one value a process, medians over its steps."""

    def of(side: str, key: str) -> list[float]:
        return [statistics.median(report[key]) for report in reports[side]]

    def memory(side: str, less: str) -> list[float]:
        return [(report["peak"] - report.get(less, 0)) / 2**30 for report in reports[side]]

    rows = []
    for side in [side for side in reports if side != "ours"]:
        rows.append(compare(f"step time: ours / {side}", of("ours", "seconds"), of(side, "seconds"), "s"))
        clock = "processor_seconds"
        rows.append(compare(f"step time: ours / {side}", of("ours", clock), of(side, clock), "cpu s"))
        rows.append(compare(f"peak memory of the process: ours / {side}", memory("ours", ""), memory(side, ""), "GiB"))
        growth = f"growth of memory since before the first step: ours / {side}"
        rows.append(compare(growth, memory("ours", "before"), memory(side, "before"), "GiB"))
    return rows


def options() -> argparse.ArgumentParser:
    made = parser(__doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--trl", type=Path, required=True, help="python of the environment that TRL is installed in")
    made.add_argument("--paths", nargs="+", default=["gold", "distillation"], choices=["gold", "distillation"])
    made.add_argument("--student", default="0.5B", choices=distill_step.SIZES)
    made.add_argument("--teacher", default="0.5B", choices=distill_step.SIZES)
    made.add_argument("--student-layers", type=int, default=2)
    made.add_argument("--teacher-layers", type=int, default=4)
    made.add_argument("--vision-layers", type=int, default=0, help="of both towers; 0 keeps all 12")
    made.add_argument("--vocabulary", type=int, default=151936)
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--response", type=int, default=64)
    made.add_argument("--steps", type=int, default=5)
    made.add_argument("--warmup", type=int, default=1)
    return made


def main(argv: Sequence[str]) -> int:
    args = options().parse_args(argv)
    if not args.trl.is_file():
        raise UserError(f"--trl {args.trl} is no file; give the python of an environment with trl installed")
    reports: dict[str, list[dict[str, Any]]] = {side: [] for side in ("ours", *args.paths)}
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "trl")}
    with tempfile.TemporaryDirectory() as name:
        make_pair(Path(name), args)
        sides = list(reports)
        for turn in range(args.rounds):
            first = turn % len(sides)
            for side in sides[first:] + sides[:first]:
                reports[side].append(measure(side, Path(name), args))
            # after every round, so that an interrupted run has something to show
            errors = agree(reports)
            versions = {side: found[0]["versions"] for side, found in reports.items()}
            finish(results(reports), settings | {"relative_loss_error": errors, "versions": versions}, args.out)
            if max(errors.values()) > TOLERANCE:
                raise GateFailed(f"losses differ by more than {TOLERANCE} relative: {errors}")
    return 0


if __name__ == "__main__":
    run_command(main)
