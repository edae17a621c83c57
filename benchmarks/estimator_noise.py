"""What the estimators of L_tpa and L_iva add to the noise of a gradient, against the noise of the batch itself.

A digits student trained with KD for a while gets the Align-TI gradient of a dozen batches: the variance between batches
with everything computed, and the variance over repeated draws for the same batch with candidates and visual rows sampled.

    python -m benchmarks.estimator_noise --out benchmarks/results/estimator_noise.json
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import parser, save
from distill import presets
from distill.batch import Batch, Normaliser
from distill.config import Align, TrainConfig
from distill.data import batches
from distill.objective import Objective
from distill.train import load_run, train

SETTINGS = ((1.0, 0), (0.5, 0), (0.25, 0), (0.15, 0), (1.0, 8), (0.25, 8))


def gradient(run: Any, config: TrainConfig, align: Align, batch: Batch, seed: int) -> Tensor:
    """The whole gradient of one batch as one vector."""
    objective = Objective(config.terms, config.weights, align, run.asked(align, 0), run.vocabulary)
    run.student.zero_grad()
    count = len(batch.input_ids_BT)
    loss, _ = objective(run.student, batch, Normaliser.of(batch), [seed * 1000 + row for row in range(count)])
    loss.backward()
    return torch.cat([p.grad.flatten() for p in run.student.parameters() if p.grad is not None])


def variance(vectors: list[Tensor]) -> float:
    """Unbiased, summed over the components."""
    mean = torch.stack(vectors).mean(dim=0)
    return sum(float((vector - mean).square().sum()) for vector in vectors) / (len(vectors) - 1)


def trained(folder: Path, steps: int, batch_size: int, samples: int) -> TrainConfig:
    """A student that has learnt something, and the configuration that goes on with Align-TI."""
    base = dataclasses.replace(
        presets.defaults("digits"),
        steps=steps,
        batch_size=batch_size,
        samples=samples,
        threads=1,
        eval_every=0,
        eval_samples=20,
        visual_every=0,
        report_to="none",
        objective="kd",
        out=folder,
    )
    train(base)
    return dataclasses.replace(base, student=str(folder / "student"), objective="align-ti", out=folder / "unused")


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--steps", type=int, default=120, help="of KD before the gradients are taken")
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--batches", type=int, default=12)
    made.add_argument("--draws", type=int, default=4, help="repeated for a batch")
    args = made.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = trained(Path(folder) / "run", args.steps, args.batch, 2000)
        run = load_run(config)
        run.student.train()
        order = range(args.batch * args.batches)
        found = list(batches(run.data.train, order, args.batch, run.collate(), torch.device("cpu")))
        for sampling in ("multinomial", "distinct"):
            between = 0.0
            for share, visual in SETTINGS:
                align = dataclasses.replace(
                    config.align, tpa_share=share, iva_rows=visual, iva_layer=0, sampling=sampling
                )
                if not between:
                    between = variance([gradient(run, config, align, batch, 0) for batch in found])
                within = [
                    variance([gradient(run, config, align, batch, seed) for seed in range(args.draws)])
                    for batch in found
                ]
                value = sum(within) / len(within) / between
                rows.append({"sampling": sampling, "tpa_share": share, "iva_rows": visual, "of_batch_variance": value})
                print(
                    f"{sampling}, share {share}, visual rows {visual or 'all'}: {value:.3f} of the variance between batches"
                )
    save(rows, {k: v for k, v in vars(args).items() if k != "out"}, args.out)


if __name__ == "__main__":
    main()
