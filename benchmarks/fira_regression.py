"""Fira against GaLore where the answer has full rank: least squares with a 16 x 24 target, state of rank 2.

Both are the same optimiser here, with and without the residual (`fira.residual none` is GaLore), the same learning rates
are tried for both, and each is reported at its best. A projector that is never refreshed keeps GaLore's whole movement in
two dimensions.

    python -m benchmarks.fira_regression --seeds 5 --out benchmarks/results/fira_regression.json
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.common import Result, finish, parser
from distill.fira import Fira
from distill.methods import FiraOptions

RATES = (0.01, 0.03, 0.1, 0.3)
NEVER = 10**9


def fit(seed: int, lr: float, steps: int, **options: Any) -> tuple[float, int]:
    """(half squared error, rank of the movement) after so many steps from zero at a constant rate, double precision."""
    random = torch.Generator().manual_seed(seed)
    target = torch.randn(16, 24, generator=random, dtype=torch.float64)
    p = nn.Parameter(torch.zeros(16, 24, dtype=torch.float64))
    settings = FiraOptions(rank=2, **options)
    optimizer = Fira([{"params": [p], "rank": 2}], lr=lr, settings=settings)
    for _ in range(steps):
        p.grad = (p - target).detach()
        optimizer.step()
    moved = p.detach()
    return float((moved - target).square().sum() / 2), int(torch.linalg.matrix_rank(moved, atol=1e-6))


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--steps", type=int, default=600)
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads or 1)
    results, table = [], {}
    sides = {
        "fira": {},
        "galore": {"residual": "none"},
        "no limiter": {"limit": 0.0},
        "matrix-level scale": {"scaling": "matrix"},
    }
    for refresh in (NEVER, 50):
        best: dict[str, list[tuple[float, int]]] = {}
        for name, settings in sides.items():
            runs = {
                lr: [fit(seed, lr, args.steps, refresh=refresh, **settings) for seed in range(args.seeds)]
                for lr in RATES
            }
            lr = min(RATES, key=lambda rate: statistics.median(loss for loss, _ in runs[rate]))
            best[name] = runs[lr]
            losses = [loss for loss, _ in runs[lr]]
            shown = "never" if refresh == NEVER else str(refresh)
            table[f"{name}, refresh {shown}"] = {"lr": lr, "loss": losses, "rank": [rank for _, rank in runs[lr]]}
            print(
                f"refresh {shown:>5}  {name:<18} lr {lr:<5} median loss {statistics.median(losses):.3g} "
                f"({min(losses):.3g} to {max(losses):.3g}), rank {sorted({rank for _, rank in runs[lr]})}"
            )
        ours, theirs = ([loss for loss, _ in best[name]] for name in ("fira", "galore"))
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        name = f"loss, refresh {'never' if refresh == NEVER else refresh}: fira / galore"
        medians = statistics.median(ours), statistics.median(theirs)
        results.append(Result(name, medians[0] / medians[1], *medians, "", args.seeds, (ratios[0], ratios[-1])))
    finish(results, {"steps": args.steps, "rates": RATES, "sides": table}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
