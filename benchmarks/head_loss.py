"""The chunked head loss against full logits, and against Liger-Kernel's chunked loss where that is installed.

Loss = (mean cross-entropy + mean forward KL) / 2 over R rows, or the KL alone (`--terms kd`), from the hidden states of
two models to the gradients of the student's hidden states and head. "full" holds both models' [R, V] logits, as a training
script with F.cross_entropy and F.kl_div does. "liger" is LigerFusedLinearJSDLoss with beta = 0 (the forward KL), eager and
compiled. Seconds are taken in one process in turns; memory in a process a side, because an allocator that keeps freed
pages would hide what a later side takes.

    python -m benchmarks.head_loss --rounds 5 --out benchmarks/results/head_loss-cpu.json
    python -m benchmarks.head_loss --rows 512 --vocabulary 32000          a quick run
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Result, compare, finish, in_turns, parser, peak_bytes
from distill.access import Head
from distill.head import HeadLoss, Rows
from distill.teacher import DenseTarget
from vlm.console import note, run_command
from vlm.errors import GateFailed, MissingPiece

# the most copies of one [R, V] buffer that the full version holds at once, gradients of the head aside
FULL_BUFFERS = 8
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One problem; hidden_RD and weight_VD are leaves that take gradients."""

    hidden_RD: Tensor
    weight_VD: Tensor
    teacher_RE: Tensor
    teacher_VE: Tensor
    label_R: Tensor
    sft: float
    kd: float

    @staticmethod
    def of(args: argparse.Namespace, rows: int | None = None) -> Case:
        """Random rows whose softmax is as peaked as a trained model's (logits with a deviation of 2)."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        random = torch.Generator().manual_seed(7)
        R, V = rows or args.rows, args.vocabulary

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=random).mul_(scale).to(device, dtype)

        return Case(
            normal(R, args.hidden).requires_grad_(True),
            normal(V, args.hidden, scale=2 * args.hidden**-0.5).requires_grad_(True),
            normal(R, args.teacher_hidden),
            normal(V, args.teacher_hidden, scale=2 * args.teacher_hidden**-0.5),
            torch.randint(0, V, (R,), generator=random).to(device),
            0.5 if args.terms == "sft+kd" else 0.0,
            0.5 if args.terms == "sft+kd" else 1.0,
        )

    def drop_gradients(self) -> None:
        self.hidden_RD.grad = self.weight_VD.grad = None


def full(case: Case) -> Tensor:
    """Both models' logits at once, differentiated by autograd."""
    student_RV = (case.hidden_RD @ case.weight_VD.T).float()
    with torch.no_grad():
        teacher_RV = (case.teacher_RE @ case.teacher_VE.T).float()
    p, q = teacher_RV.log_softmax(-1), student_RV.log_softmax(-1)
    del teacher_RV
    loss = case.kd * F.kl_div(q, p, reduction="batchmean", log_target=True)
    return loss + case.sft * F.cross_entropy(student_RV, case.label_R) if case.sft else loss


def ours(case: Case) -> Tensor:
    rows = len(case.hidden_RD)
    loss = HeadLoss(Head(case.weight_VD), len(case.teacher_VE))
    share_R = torch.full((rows,), 1 / rows, device=case.hidden_RD.device)
    sft_R = case.sft * share_R if case.sft else None
    target = DenseTarget(case.teacher_RE, Head(case.teacher_VE))
    loss.add(Rows(case.hidden_RD, case.label_R, sft_R, target, case.kd * share_R))
    return loss.total()


def liger(compiled: bool, chunk: int) -> Callable[[Case], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    def loss(case: Case) -> Tensor:
        module = LigerFusedLinearJSDLoss(case.sft, case.kd, beta=0.0, compiled=compiled, chunk_size=chunk)
        return module(case.hidden_RD, case.weight_VD, case.teacher_RE, case.teacher_VE, case.label_R)

    return loss


def sides(args: argparse.Namespace) -> dict[str, Callable[[Case], Tensor]]:
    found: dict[str, Callable[[Case], Tensor]] = {"ours": ours, "full": full}
    if importlib.util.find_spec("liger_kernel"):
        if args.liger in ("eager", "both"):
            found["liger"] = liger(compiled=False, chunk=args.liger_chunk)
        if args.liger in ("compiled", "both"):
            found["liger, compiled"] = liger(compiled=True, chunk=args.liger_chunk)
    return found


def step(loss: Callable[[Case], Tensor], case: Case) -> Callable[[], float]:
    """Forward and backward from empty gradients; what it returns is the loss."""

    def run() -> float:
        case.drop_gradients()
        value = loss(case)
        value.backward()
        return float(value.detach())

    return run


def timed(call: Callable[[], float], clocks: list[float]) -> Callable[[], None]:
    """The call, keeping its processor seconds: on a shared machine the wall clock counts the others too."""

    def run() -> None:
        started = time.process_time()
        call()
        clocks.append(time.process_time() - started)
        note(f"{len(clocks)}: {clocks[-1]:.1f} processor seconds")

    return run


def differences(case: Case, found: dict[str, Callable[[Case], Tensor]]) -> dict[str, dict[str, float]]:
    """Relative error of the value and of both gradients (2-norm) of every side against the full version."""
    expected = step(found["full"], case)()
    gradients = case.hidden_RD.grad, case.weight_VD.grad
    errors = {}
    for name in [name for name in found if name != "full"]:
        value = step(found[name], case)()
        errors[name] = {"loss": abs(value - expected) / abs(expected)} | {
            key: _distance(leaf.grad, gradient)
            for key, leaf, gradient in zip(
                ("hidden", "weight"), (case.hidden_RD, case.weight_VD), gradients, strict=True
            )
        }
        case.drop_gradients()
    return errors


def _distance(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def memory(args: argparse.Namespace, name: str) -> dict[str, float]:
    """Bytes one step takes at its peak, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.head_loss", *args.given, "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GateFailed(f"measuring the memory of {name!r} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_memory(args: argparse.Namespace, name: str) -> dict[str, float]:
    loss = sides(args)[name]
    # libraries, thread pools and compiled code are there before the call that counts
    warm_up = 2 * args.liger_chunk if "compiled" in name else 64
    step(loss, Case.of(args, rows=min(args.rows, warm_up)))()
    case = Case.of(args)
    peak = peak_bytes(step(loss, case))
    returned = sum(leaf.grad.nbytes for leaf in (case.hidden_RD, case.weight_VD) if leaf.grad is not None)
    return {"peak": peak, "gradients": returned}


def available() -> int:
    """Bytes the machine can still give."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def require_memory(args: argparse.Namespace) -> None:
    leaves = args.vocabulary * (2 * args.hidden + args.teacher_hidden)
    needed = 4 * (args.rows * args.vocabulary * FULL_BUFFERS + 2 * leaves)
    if available() < needed:
        raise MissingPiece(
            f"full logits of {args.rows} rows x {args.vocabulary} tokens need {needed / 2**30:.1f} GiB, "
            f"{available() / 2**30:.1f} GiB are free; try --rows {args.rows // 4}"
        )


def rows_of_memory(args: argparse.Namespace, names: list[str]) -> list[Result]:
    """Peak of every other side against ours, with and without the gradients both must return."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.memory_rounds):
        for name in names:
            taken[name].append(memory(args, name))
            note(f"{name}: {taken[name][-1]['peak'] / 2**20:.0f} MiB at the peak")
    results = []
    for name in [name for name in names if name != "ours"]:
        for label, less in (("peak memory less gradients", True), ("peak memory", False)):
            mine, theirs = (
                [(m["peak"] - less * m["gradients"]) / 2**20 for m in taken[side]] for side in ("ours", name)
            )
            results.append(compare(f"{label}: ours / {name}", mine, theirs, "MiB"))
    return results


def options() -> argparse.ArgumentParser:
    made = parser(__doc__ or "")
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--rows", type=int, default=2048)
    made.add_argument("--vocabulary", type=int, default=151936)
    made.add_argument("--hidden", type=int, default=896)
    made.add_argument("--teacher-hidden", type=int, default=896)
    made.add_argument("--terms", choices=["sft+kd", "kd"], default="sft+kd")
    made.add_argument("--bf16", action="store_true", help="bfloat16 hidden states and heads")
    made.add_argument("--liger", choices=["none", "eager", "compiled", "both"], default="both", help="where installed")
    made.add_argument("--liger-chunk", type=int, default=1024, help="rows a chunk of its loss; 1024 is its default")
    made.add_argument("--memory-rounds", type=int, default=3, help="0 measures none")
    made.add_argument("--memory-of", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str]) -> int:
    args = options().parse_args(argv)
    args.given = list(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(measure_memory(args, args.memory_of)))
        return 0
    require_memory(args)
    found = sides(args)
    results = rows_of_memory(args, list(found)) if args.memory_rounds else []
    case = Case.of(args)
    errors = differences(case, found)
    clocks: dict[str, list[float]] = {name: [] for name in found}
    calls = {name: timed(step(loss, case), clocks[name]) for name, loss in found.items()}
    # every side has run once already, for the differences
    seconds = in_turns(calls, args.rounds, warmup=0)
    for unit, taken in (("s", seconds), ("cpu s", clocks)):
        others = [name for name in found if name != "ours"]
        results += [compare(f"time: ours / {name}", taken["ours"], taken[name], unit) for name in others]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "given", "memory_of")}
    finish(results, settings | {"relative_error": errors, "seconds": seconds, "processor_seconds": clocks}, args.out)
    if not args.bf16 and max(errors["ours"].values()) > TOLERANCE:
        raise GateFailed(f"values or gradients differ from the full version by more than {TOLERANCE}: {errors['ours']}")
    return 0


if __name__ == "__main__":
    run_command(main)
