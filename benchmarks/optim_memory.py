"""Optimiser state and step time of Fira against AdamW on a decoder of the shape of Qwen2-0.5B.

State bytes are counted over the tensors both optimisers really hold after a step, and compared with the formula (m r +
2 n r + 1 values a matrix). Both update the same parameters with the same random gradients, in turns. A refresh (the
decomposition, every `fira.refresh` steps) is timed apart, exact and randomised, matrix shape by matrix shape, and its share
added to the step.

    python -m benchmarks.optim_memory --rounds 9 --threads 1 --out benchmarks/results/optim_memory-cpu.json
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.common import Result, compare, finish, in_turns, parser
from distill.fira import OVERSAMPLING, Fira, left_vectors, range_finder
from distill.methods import FiraOptions
from distill.optimizers import BETAS, adamw_bytes, low_rank_bytes


def shapes(layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2-0.5B decoder's parameters (tied head)."""
    hidden, key_value, inner = 896, 128, 4864
    found: dict[str, tuple[int, ...]] = {"embed_tokens": (vocabulary, hidden), "norm": (hidden,)}
    for layer in range(layers):
        at = f"layers.{layer}."
        found |= {f"{at}q_proj": (hidden, hidden), f"{at}o_proj": (hidden, hidden)}
        found |= {f"{at}k_proj": (key_value, hidden), f"{at}v_proj": (key_value, hidden)}
        found |= {f"{at}gate_proj": (inner, hidden), f"{at}up_proj": (inner, hidden), f"{at}down_proj": (hidden, inner)}
        found |= {f"{at}q_bias": (hidden,), f"{at}k_bias": (key_value,), f"{at}v_bias": (key_value,)}
        found |= {f"{at}norm_1": (hidden,), f"{at}norm_2": (hidden,)}
    return found


def held(optimizer: torch.optim.Optimizer) -> int:
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


def refresh_seconds(counted: Counter[tuple[int, int]], rank: int, exact: bool) -> float:
    """Seconds all decompositions of one refresh take, the median of three a shape."""
    total = 0.0
    for (short, long), count in counted.items():
        gradient = torch.randn(short, long)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            if exact:
                left_vectors(gradient, rank)
            else:
                range_finder(gradient, min(rank, short - OVERSAMPLING), torch.Generator().manual_seed(0))
            seconds.append(time.perf_counter() - started)
        total += count * statistics.median(seconds)
    return total


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--layers", type=int, default=24)
    options.add_argument("--vocabulary", type=int, default=151_936)
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--refresh", type=int, default=200, help="steps between decompositions")
    args = options.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    settings = FiraOptions(rank=args.rank, refresh=10**9, svd="randomized")
    made = {
        name: nn.Parameter(0.02 * torch.randn(shape)) for name, shape in shapes(args.layers, args.vocabulary).items()
    }
    low = [p for name, p in made.items() if name.startswith("layers") and p.ndim == 2]
    rest = [p for p in made.values() if not any(p is other for other in low)]
    fira = Fira([{"params": low, "rank": args.rank}, {"params": rest}], lr=1e-6, betas=BETAS, settings=settings)
    adamw = torch.optim.AdamW(list(made.values()), lr=1e-6, betas=BETAS, fused=True)
    for p in made.values():
        p.grad = torch.randn_like(p)
    # the first steps make the states (and Fira's projectors); they are not timed
    seconds = in_turns({"fira": lambda: fira.step(), "adamw": lambda: adamw.step()}, args.rounds)
    formula = sum(low_rank_bytes(p, settings) for p in low) + sum(adamw_bytes(p) for p in rest)
    if held(fira) != formula:
        raise SystemExit(f"state takes {held(fira)} bytes, the formula says {formula}")
    counted = Counter((min(p.shape), max(p.shape)) for p in low)
    step = compare("step without refresh: fira / adamw", seconds["fira"], seconds["adamw"], "s")
    results = [
        _bytes("state bytes: fira / adamw", held(fira), held(adamw)),
        _bytes(
            "state bytes of decoder matrices: fira / adamw",
            sum(low_rank_bytes(p, settings) for p in low),
            sum(map(adamw_bytes, low)),
        ),
        step,
    ]
    refresh: dict[str, float] = {}
    for how in ("randomised", "exact"):
        refresh[how] = refresh_seconds(counted, args.rank, how == "exact")
        print(f"one {how} refresh of {sum(counted.values())} matrices takes {refresh[how]:.2f} s", file=sys.stderr)
        ours = step.ours + refresh[how] / args.refresh
        shift = refresh[how] / args.refresh / step.theirs
        results.append(
            Result(
                f"step with 1/{args.refresh} of a refresh ({how}): fira / adamw",
                ours / step.theirs,
                ours,
                step.theirs,
                "s",
                step.n,
                (step.spread[0] + shift, step.spread[1] + shift),
            )
        )
    parameters = sum(p.numel() for p in made.values())
    finish(
        results,
        {
            "rank": args.rank,
            "layers": args.layers,
            "parameters": parameters,
            "formula_bytes": formula,
            "refresh_seconds": refresh,
        },
        args.out,
    )
    return 0


def _bytes(name: str, ours: int, theirs: int) -> Result:
    return Result(name, ours / theirs, ours, theirs, "bytes", 1, (ours / theirs, ours / theirs))


if __name__ == "__main__":
    sys.exit(main())
