"""LaViT against plain training where looking at one place pays: the colour of the marked cell of a 6 x 6 grid.

The question carries a guess that is right 60 % of the time, so a student can do fairly well without looking. A teacher is
trained on the same data first. All students start from the same random decoder behind the teacher's tower and take the same
steps on the same samples:

    sft            next-token cross-entropy
    latents        the same with latent tokens, no terms and no gate: what the tokens alone are worth
    lavit          with concept, traj and the gate

Reported on held-out samples: exact match; S_focus, the share of the text's attention to the image that falls on the marked
cell (mean over layers, heads and text tokens behind the image); and the token replacement test.

    python -m benchmarks.lavit_marked_cell --seeds 3 --out benchmarks/results/lavit_marked_cell.json
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

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.common import Result, finish, parser
from distill import access, attention, evaluate, replacement
from distill.assemble import Shape, build_model, build_processor, build_tokenizer, save_checkpoint
from distill.config import LossWeights, TrainConfig
from distill.data import Collator, open_records, to_batch
from distill.data.records import DataOptions
from distill.methods import LavitOptions
from distill.train import train
from vlm.load import load_model, open_checkpoint

GRID, CELL = 6, 8
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (220, 210, 40),
    "purple": (150, 50, 180),
    "orange": (235, 130, 30),
}
SHAPE = Shape(
    image_size=GRID * CELL,
    patch_size=CELL,
    vision_hidden=64,
    vision_layers=1,
    vision_intermediate=128,
    hidden=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    intermediate=128,
    layers=2,
)
SIDES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "latents": {
        "objective": "lavit",
        "weights": LossWeights(concept=0.0, traj=0.0),
        "lavit": LavitOptions(gate="none"),
    },
    "lavit": {"objective": "lavit"},
}


def sample(chance: random.Random, guess_right: float) -> tuple[Image.Image, str, str, int]:
    """(image, question, answer, number of the marked cell)."""
    names = list(COLOURS)
    cells = [chance.choice(names) for _ in range(GRID * GRID)]
    marked = chance.randrange(GRID * GRID)
    picture = np.zeros((GRID * CELL, GRID * CELL, 3), np.uint8)
    for place, name in enumerate(cells):
        top, left = CELL * (place // GRID), CELL * (place % GRID)
        block = picture[top : top + CELL, left : left + CELL]
        block[:] = 255 if place == marked else 0
        block[2:-2, 2:-2] = COLOURS[name]
    answer = cells[marked]
    guess = answer if chance.random() < guess_right else chance.choice([name for name in names if name != answer])
    return Image.fromarray(picture), f"which colour is marked ? maybe {guess}", answer, marked


def write(folder: Path, name: str, count: int, seed: int, guess_right: float = 0.6) -> tuple[Path, list[int]]:
    """A data set in LLaVA's format, and the marked cells."""
    chance = random.Random(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    records, cells = [], []
    for number in range(count):
        image, question, answer, marked = sample(chance, guess_right)
        image.save(folder / name / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        cells.append(marked)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records))
    return path, cells


def start(folder: Path, name: str, seed: int, tower: Path | None) -> Path:
    """A random student, behind the tower of another checkpoint where one is given."""
    where = folder / name
    if where.is_dir():
        return where
    texts = [f"which colour is marked ? maybe {name}" for name in COLOURS] + list(COLOURS)
    tokenizer = build_tokenizer(texts * 4)
    model = build_model(SHAPE, tokenizer, seed)
    if tower is not None:
        model.model.vision_tower.load_state_dict(load_model(open_checkpoint(tower)).model.vision_tower.state_dict())
    save_checkpoint(model, build_processor(tokenizer, SHAPE), where, {"objective": "none"})
    return where


@torch.no_grad()
def focus(
    model: nn.Module, collate: Collator, examples: Any, cells: Sequence[int], latents_too: bool = True, size: int = 50
) -> float:
    """Mean S_focus: attention of the text behind the image to the marked cell, as a share of that to the image.

    Args:
        latents_too: count latent tokens as text.
    """
    shares: list[float] = []
    decoder = access.decoder(model)
    for first in range(0, len(cells), size):
        batch = to_batch(collate([examples[i] for i in range(first, min(first + size, len(cells)))]))
        with attention.AttentionTap(decoder, range(len(decoder.layers))) as tap:
            access.gold_pass(model, batch, keep_cache=False)
            text_BT = attention.after_images(batch.image_BT, batch.attention_mask_BT)
            if batch.latent_BT is not None and not latents_too:
                text_BT = text_BT & ~batch.latent_BT
            score_BT = attention.text_to_vision(tap, text_BT, batch.image_BT, batch.attention_mask_BT)
        for b, row in enumerate(score_BT):
            seen = row[batch.image_BT[b]]
            shares.append(float(seen[cells[first + b]] / seen.sum()))
    return statistics.fmean(shares)


def judge(student: Path, held: Path, cells: Sequence[int]) -> dict[str, Any]:
    """Scores of a student on the held-out samples."""
    source = open_checkpoint(student)
    model = load_model(source)
    examples = open_records(held, DataOptions(held.with_suffix("")), source.tokenizer, source.image)
    latents = source.tokenizer.spec.latent_token_ids
    collate = Collator(source.tokenizer.spec.pad_token_id, latents=latents)
    matches = evaluate.greedy_matches(model, examples, len(cells), collate)
    found: dict[str, Any] = {
        "exact_match": sum(matches) / len(matches),
        "focus": focus(model, collate, examples, cells),
    }
    if latents:
        found["focus_without_latents"] = focus(model, collate, examples, cells, latents_too=False)
        report = replacement.measure(model, examples, len(cells), collate)
        found["replacement"] = {drop.kind: [drop.drop, drop.low, drop.high] for drop in report.drops}
        found["load_bearing"] = report.load_bearing
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--teacher-steps", type=int, default=800)
    options.add_argument("--records", type=int, default=3000)
    options.add_argument("--held-out", type=int, default=300)
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument("--sides", default=",".join(SIDES))
    options.add_argument("--folder", type=Path, help="keep the runs here, and go on with those that are there")
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads or 1)
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    data, _ = write(folder, "train", args.records, seed=1)
    held, cells = write(folder, "held", args.held_out, seed=2)
    common: dict[str, Any] = {
        "data": data,
        "images": folder / "train",
        "batch_size": 32,
        "lr": args.lr,
        "warmup": 0.05,
        "save_every": 10**6,
        "visual_every": 0,
        "report_to": "none",
        "threads": args.threads or 1,
        "log_every": 25,
    }
    # the teacher's guess says nothing, so it has to look
    plain, _ = write(folder, "teach", args.records, seed=3, guess_right=1 / len(COLOURS))
    teaching = {**common, "data": plain, "images": folder / "teach", "steps": args.teacher_steps}
    teacher = TrainConfig(
        student=str(start(folder, "teacher-start", 99, None)), objective="sft", out=folder / "teacher", **teaching
    )
    _train(teacher)
    known = judge(teacher.out / "student", held, cells)
    print(f"teacher: {known}", file=sys.stderr, flush=True)
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in args.sides.split(",")}
    for seed in range(args.seeds):
        begun = start(folder, f"start-{seed}", seed, teacher.out / "student")
        for name, rows in table.items():
            config = TrainConfig(
                student=str(begun),
                teacher=str(teacher.out / "student"),
                out=folder / f"{name}-{seed}",
                steps=args.steps,
                seed=seed,
                freeze_vision=True,
                **common,
                **SIDES[name],
            )
            _train(config)
            rows.append({"seed": seed, **judge(config.out / "student", held, cells)})
            print(f"seed {seed} {name}: {rows[-1]}", file=sys.stderr, flush=True)
    for name, rows in table.items():
        shown = {key: [round(row[key], 3) for row in rows] for key in ("exact_match", "focus")}
        medians = {key: statistics.median(values) for key, values in shown.items()}
        print(f"{name:<8} median {medians} over {len(rows)} seeds {shown}")
    results = [
        _result(f"{key}: {name} / sft", [row[key] for row in table[name]], [row[key] for row in table["sft"]])
        for name in list(table)[1:]
        for key in ("focus", "exact_match")
    ]
    finish(results, {"sides": table, "teacher": known, "steps": args.steps, "chance_focus": 1 / GRID**2}, args.out)
    return 0


def _train(config: TrainConfig) -> None:
    if not (config.out / "student").exists():
        train(dataclasses.replace(config, resume=(config.out / "config.json").exists()))


def _result(name: str, ours: list[float], theirs: list[float]) -> Result:
    ratios = sorted(a / max(b, 1e-9) for a, b in zip(ours, theirs, strict=True))
    a, b = statistics.median(ours), statistics.median(theirs)
    return Result(name, a / max(b, 1e-9), a, b, "", len(ours), (ratios[0], ratios[-1]))


if __name__ == "__main__":
    sys.exit(main())
