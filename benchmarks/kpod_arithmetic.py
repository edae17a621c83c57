"""KPOD's weights and schedule against plain training on rationales with 60 % filler, at equal tokens seen.

Sums modulo `--modulus`, one step a term ("3 plus 4 gives 2"), every step wrapped in words drawn at random: no model can predict
them and no answer depends on them. As in the paper, students are no strangers to the language: a seed's student was taught sums
of two numbers without such words first. All sides start from it, see the same batches in the same order, and are scored by
decoding: does the answer end with the right conclusion? Reported: steps until `--target` of the held-out questions are right
(median over seeds), and the score at the end.

    python -m benchmarks.kpod_arithmetic --seeds 3 --out benchmarks/results/kpod_arithmetic.json
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Result, finish, parser
from distill.assemble import Shape, build_model, build_processor, build_tokenizer, save_checkpoint
from distill.config import TrainConfig
from distill.data.rationale import CONCLUSION
from distill.methods import KpodOptions, Tokens
from distill.report import read_metrics
from distill.train import train

FILLER = [a + b for a in ("ba", "de", "fi", "go", "lu") for b in ("no", "ri", "ta", "mu", "se", "ko", "va", "pi")]
KNOWN_STEPS = 400
QUIET: dict[str, Any] = {"save_every": 10**6, "visual_every": 0, "report_to": "none", "keep_best": "none", "threads": 1}
SIDES: dict[str, dict[str, Any]] = {
    "unweighted": {},
    "weights": {"tokens": Tokens("kpod")},
    "schedule": {"schedule": "kpod"},
    "weights+schedule": {"tokens": Tokens("kpod"), "schedule": "kpod"},
}


def record(chance: random.Random, terms: int, modulus: int, fillers: int = 4) -> dict[str, Any]:
    """One question of so many terms; of a step's words, 5 say something and twice `fillers` do not."""
    numbers = [chance.randrange(modulus) for _ in range(terms)]
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        said = f"{total} plus {number} gives {(total + number) % modulus}"
        total = (total + number) % modulus
        before, after = ([chance.choice(FILLER) for _ in range(n)] for n in (fillers, fillers))
        steps.append(" ".join([*before, said, *after]))
    return {"question": "sum of " + " ".join(map(str, numbers)), "steps": steps, "answer": total}


def write(folder: Path, name: str, count: int, seed: int, terms: int, modulus: int, fillers: int = 4) -> Path:
    chance = random.Random(seed)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record(chance, terms, modulus, fillers)) + "\n" for _ in range(count)))
    return path


def student(folder: Path, seed: int, terms: int, modulus: int) -> Path:
    """A small decoder with a tokenizer for these words, which can add two numbers."""
    chance = random.Random(1)
    texts = []
    for _ in range(400):
        made = record(chance, terms, modulus)
        texts += [made["question"], "\n".join([*made["steps"], CONCLUSION.format(answer=made["answer"])])]
    tokenizer = build_tokenizer(texts)
    shape = Shape(
        hidden=64,
        heads=4,
        kv_heads=4,
        head_dim=16,
        intermediate=128,
        layers=2,
        vision_layers=1,
        vision_hidden=32,
        vision_intermediate=32,
    )
    where = folder / f"new-{seed}"
    save_checkpoint(
        build_model(shape, tokenizer, seed), build_processor(tokenizer, shape), where, {"objective": "none"}
    )
    known = folder / f"known-{seed}"
    if not (known / "student").exists():
        data = write(folder, f"known-{seed}", 64 * KNOWN_STEPS, 1000 + seed, 2, modulus, fillers=0)
        train(
            TrainConfig(
                student=str(where),
                data=data,
                objective="sft",
                out=known,
                steps=KNOWN_STEPS,
                batch_size=64,
                lr=2e-3,
                warmup=0.05,
                seed=seed,
                **QUIET,
            )
        )
    return known / "student"


def reached(run: Path, target: float) -> tuple[float, float, list[float]]:
    """(first step at which the target was met, infinite if never; final score; all scores)."""
    scores = [
        (m["step"], float(m["eval_exact_match"]))
        for m in read_metrics(run / "metrics.jsonl")
        if "eval_exact_match" in m
    ]
    first = next((float(step) for step, score in scores if score >= target), float("inf"))
    return first, scores[-1][1], [score for _, score in scores]


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--every", type=int, default=25, help="steps between scores")
    options.add_argument("--target", type=float, default=0.9)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--records", type=int, default=6400)
    options.add_argument("--terms", type=int, default=3)
    options.add_argument("--modulus", type=int, default=5)
    options.add_argument("--held-out", type=int, default=200)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--weigher-steps", type=int, default=200)
    options.add_argument("--sides", default=",".join(SIDES))
    options.add_argument("--folder", type=Path, help="keep the runs here, and go on with those that are there")
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads or 1)
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    kpod = KpodOptions(predictor_rank=0, weigher_steps=args.weigher_steps, weigher_lr=2e-3, predictor_lr=2e-3)
    table: dict[str, Any] = {name: [] for name in args.sides.split(",")}
    for seed in range(args.seeds):
        start = student(folder, seed, args.terms, args.modulus)
        data, held = (
            write(folder, f"{name}-{seed}", n, 2 * seed + k, args.terms, args.modulus)
            for k, (name, n) in enumerate((("train", args.records), ("eval", args.held_out)))
        )
        for name in table:
            config = TrainConfig(
                student=str(start),
                data=data,
                eval_data=held,
                objective="sft",
                out=folder / f"{name}-{seed}",
                steps=args.steps,
                batch_size=args.batch,
                lr=args.lr,
                warmup=0.05,
                seed=seed,
                eval_every=args.every,
                eval_samples=args.held_out,
                log_every=args.every,
                **QUIET,
                **{**SIDES[name], **({"kpod": kpod} if SIDES[name] else {})},
            )
            if not (config.out / "student").exists():
                train(dataclasses.replace(config, resume=(config.out / "config.json").exists()))
            first, last, scores = reached(config.out, args.target)
            table[name].append({"seed": seed, "steps_to_target": first, "final": last, "scores": scores})
            print(f"seed {seed} {name}: {first:g} steps to {args.target}, {last:.3f} at the end", file=sys.stderr)
    return _report(table, args, kpod)


def _report(table: dict[str, Any], args: Any, kpod: KpodOptions) -> int:
    """Print medians and ratios to the unweighted side, and the JSON line."""
    results = []
    for name, rows in table.items():
        firsts, finals = [row["steps_to_target"] for row in rows], [row["final"] for row in rows]
        print(
            f"{name:<18} steps to {args.target}: median {statistics.median(firsts):g} {firsts}; final: median {statistics.median(finals):.3f} {finals}"
        )
    base = [row["steps_to_target"] for row in table["unweighted"]]
    for name in list(table)[1:]:
        ours = [row["steps_to_target"] for row in table[name]]
        # a side that never got there counts with the steps it had
        a, b = ([min(step, float(args.steps)) for step in steps] for steps in (ours, base))
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        results.append(
            Result(
                f"steps to {args.target}: {name} / unweighted",
                statistics.median(a) / statistics.median(b),
                statistics.median(a),
                statistics.median(b),
                "steps",
                args.seeds,
                (ratios[0], ratios[-1]),
            )
        )
    shown = {
        name: [
            {**row, "steps_to_target": row["steps_to_target"] if row["steps_to_target"] != float("inf") else None}
            for row in rows
        ]
        for name, rows in table.items()
    }
    finish(
        results,
        {
            "sides": shown,
            "steps": args.steps,
            "target": args.target,
            "modulus": args.modulus,
            "records": args.records,
            "kpod": dataclasses.asdict(kpod),
        },
        args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
