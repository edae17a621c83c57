"""visual_gain of digits students over their first steps: right images, images of other questions, a blind tower.

python -m benchmarks.visual_gain [--steps 150] [--objective align-ti] [--seeds 2]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from distill import presets
from distill import run as run_module
from distill import train as train_module
from tests.distill.data_sets import Permuted


def follow(out: Path, permuted: bool, **changes: Any) -> list[dict[str, Any]]:
    """Train and return the lines of the image checks."""
    original = run_module._data

    def data(*arguments: Any) -> Any:
        found = original(*arguments)
        return dataclasses.replace(found, train=Permuted(found.train)) if permuted else found

    run_module._data = data
    try:
        train_module.train(dataclasses.replace(presets.defaults("digits"), out=out, **changes))
    finally:
        run_module._data = original
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "visual_gain" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--objective", default="sft")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for permuted in (False, True):
                lines = follow(
                    Path(folder) / f"{seed}-{permuted}",
                    permuted,
                    objective=options.objective,
                    seed=seed,
                    steps=options.steps,
                    batch_size=options.batch,
                    eval_every=0,
                    eval_samples=100,
                    visual_every=20,
                    report_to="none",
                    threads=1,
                )
                for line in lines:
                    kept = {name: value for name, value in line.items() if name == "step" or name.startswith("visual")}
                    images = "permuted" if permuted else "right"
                    print(json.dumps({"seed": seed, "images": images, "objective": options.objective, **kept}))
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
