"""Objectives x seeds, fairly: each objective gets the same learning-rate sweep, equal steps, and equal time.

An objective may carry options of its own, `sft:optim=fira;fira.rank=16`: any option of `train` can be compared.

Time is made equal through measured step times (interleaved in one process), not by stopping runs at a wall clock:
on a shared machine the latter would reward whichever run met less noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import presets
from distill.cli import parse_train
from distill.cli_help import WHICH
from distill.config import OBJECTIVES, TrainConfig
from distill.stages import starting_from
from vlm.console import Parser, Progress, natural, note, print_json, table
from vlm.errors import ToolError, UserError
from vlm.files import read_json, write_atomic
from vlm.load import PROVENANCE

SWEEP_SEED = 9001
EQUAL_STEPS, SWEEP_STEPS = 350, 250
# what a comparison decides itself
SET_BY_COMPARE = tuple(
    f"--{name}"
    for name in (
        "preset",
        "objective",
        "steps",
        "lr",
        "seed",
        "out",
        "resume",
        "threads",
        "eval_every",
        "eval_samples",
        "save_every",
    )
)


@dataclass(frozen=True)
class Plan:
    """What to compare; one folder keeps every run, so an interrupted comparison goes on where it stopped."""

    preset: str
    objectives: tuple[str, ...]
    seeds: int
    lrs: tuple[float, ...]
    steps: int
    sweep_steps: int
    jobs: int
    out: Path
    as_json: bool


@dataclass(frozen=True)
class Cell:
    """One objective under one budget."""

    objective: str
    budget: str
    steps: int
    lr: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; one seed has none."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    def shown(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.3f}"
        return f"{self.mean:.3f}{spread} ({self.steps} steps)"


def parse(argv: Sequence[str]) -> Plan:
    parser = Parser(
        prog="python -m distill compare",
        description="Train every objective with every seed at equal steps and at equal time; print mean and spread.",
        epilog=f"{WHICH}\n"
        "Every method is one entry of --objectives: `lavit`, `sft:optim=fira;fira.rank=16`, or with reasonings\n"
        "`sft:format=rationale;tokens.weights=kpod;schedule=kpod` beside `sft:format=rationale`. A method that costs more a\n"
        "step (align-ti, lavit, fira) has to win the column of equal time, too.\n"
        "\n"
        "examples:\n"
        "  python -m distill compare --preset digits --objectives sft,kd,align-ti --seeds 3\n"
        '  python -m distill compare --preset digits --objectives "sft,sft:optim=fira;fira.rank=16" --seeds 3\n'
        "  python -m distill compare --preset digits --objectives sft,lavit --seeds 3\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="digits", choices=sorted(presets.PRESETS))
    parser.add_argument(
        "--objectives",
        default="sft,kd,align-ti",
        help=f"comma-separated, of {', '.join(OBJECTIVES)}; OBJECTIVE:OPTION=VALUE;... sets options of train for one",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1")
    parser.add_argument("--lrs", default="2.5e-4,5e-4,1e-3", help="learning rates every objective is tried with")
    parser.add_argument("--steps", type=natural, default=0, help="steps of the equal-steps budget (default: 350)")
    parser.add_argument("--sweep-steps", type=natural, default=0, help="steps of a sweep run (default: 250)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(list(argv))
    objectives = tuple(dict.fromkeys(name.strip() for name in args.objectives.split(",") if name.strip()))
    for name in objectives:
        variant(args.preset, name)
    folders = {_folder(name): name for name in reversed(objectives)}
    if alike := [name for name in objectives if folders[_folder(name)] != name]:
        raise UserError(
            f"{alike[0]!r} and {folders[_folder(alike[0])]!r} would share their runs: names must differ in more than "
            "punctuation"
        )
    if not objectives or args.seeds < 1 or args.jobs < 1:
        raise UserError("name at least one objective, one seed and one job")
    try:
        lrs = tuple(float(value) for value in args.lrs.split(","))
    except ValueError:
        raise UserError(f"--lrs {args.lrs!r} is not a comma-separated list of numbers, e.g. 1e-3,2e-3") from None
    steps = args.steps or EQUAL_STEPS
    return Plan(
        args.preset,
        objectives,
        args.seeds,
        lrs,
        steps,
        args.sweep_steps or min(steps, SWEEP_STEPS),
        args.jobs,
        args.out,
        args.json,
    )


def variant(preset: str, name: str) -> TrainConfig:
    """The preset's configuration with the objective and options of `OBJECTIVE:OPTION=VALUE;...`.

    Raises:
        UserError: an unknown objective or option, or a value that does not fit.
    """
    objective, _, options = name.partition(":")
    if objective not in OBJECTIVES:
        raise UserError(f"objective {objective!r} is unknown; choose from {', '.join(OBJECTIVES)}")
    words = [f"--{option.strip()}" for option in options.split(";") if option.strip()]
    for word in words:
        if "=" not in word or word.partition("=")[0] in SET_BY_COMPARE:
            raise UserError(f"objective {name!r}: {word[2:]!r} is no OPTION=VALUE that can differ between objectives")
    return parse_train(["--preset", preset, "--objective", objective, *words])[0]


def main(argv: Sequence[str]) -> int:
    plan = parse(argv)
    started = time.monotonic()
    lrs = _sweep(plan)
    seconds = _step_times(plan, lrs)
    slowest = max(seconds.values())
    budgets = {name: max(plan.steps, round(plan.steps * slowest / seconds[name])) for name in plan.objectives}
    wanted = {
        (name, budget, seed): _config(
            plan, f"{_folder(name)}-{steps}steps-lr{lrs[name]:g}-seed{seed}", name, steps, lrs[name], seed
        )
        for name in plan.objectives
        for budget, steps in (("steps", plan.steps), ("time", budgets[name]))
        for seed in range(plan.seeds)
    }
    _run_all(plan, list({config.out: config for config in wanted.values()}.values()), "compare")
    cells = []
    for budget in ("steps", "time"):
        for name in plan.objectives:
            configs = [wanted[name, budget, seed] for seed in range(plan.seeds)]
            scores = tuple(float(_provenance(config)["exact_match"]) for config in configs)
            cells.append(Cell(name, budget, configs[0].steps, lrs[name], scores))
    _print(plan, cells, seconds, time.monotonic() - started)
    return 0


def _folder(name: str) -> str:
    """The name of an objective with options as part of a file name."""
    return re.sub(r"[^A-Za-z0-9+._=-]+", "_", name)


def _config(plan: Plan, folder: str, name: str, steps: int, lr: float, seed: int) -> TrainConfig:
    return dataclasses.replace(
        variant(plan.preset, name),
        steps=steps,
        lr=lr,
        seed=seed,
        out=plan.out / folder,
        threads=1,
        eval_every=steps,
        eval_samples=1000,
        save_every=max(100, steps // 4),
    )


def _sweep(plan: Plan) -> dict[str, float]:
    """Best learning rate of each objective by validation accuracy, on a seed not used afterwards."""
    configs = {(name, lr): _sweep_config(plan, name, lr) for name in plan.objectives for lr in plan.lrs}
    _run_all(plan, list(configs.values()), "learning-rate sweep")
    scores = {key: _validation(config) for key, config in configs.items()}
    best = {name: max(plan.lrs, key=lambda lr: scores[name, lr]) for name in plan.objectives}
    for name in plan.objectives:
        tried = ", ".join(f"{lr:g}: {scores[name, lr]:.3f}" for lr in plan.lrs)
        note(f"{name}: validation exact match by learning rate: {tried}; using {best[name]:g}")
    return best


def _sweep_config(plan: Plan, name: str, lr: float) -> TrainConfig:
    out = f"sweep-{_folder(name)}-{plan.sweep_steps}steps-lr{lr:g}"
    return _config(plan, out, name, plan.sweep_steps, lr, SWEEP_SEED)


def _run_all(plan: Plan, configs: list[TrainConfig], label: str) -> None:
    left = [config for config in configs if not (config.out / "student" / PROVENANCE).is_file()]
    if not left:
        return
    progress = Progress(len(configs), label, every_s=0.0)
    progress.advance(len(configs) - len(left))
    with ThreadPoolExecutor(plan.jobs) as pool:
        for config in pool.map(_run_one, left):
            progress.advance(1, config.out.name)


def _run_one(config: TrainConfig) -> TrainConfig:
    """One run in a process of its own, resumed if it was cut short."""
    from distill.stored import config_to_json
    from distill.train import CONFIG

    if (config.out / CONFIG).is_file():
        options = ["--resume", "--out", str(config.out)]
    else:
        recipe = config.out.parent / f"{config.out.name}.recipe.json"  # JSON is YAML
        write_atomic(recipe, json.dumps(config_to_json(config), indent=1) + "\n")
        options = ["--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "distill", "train", *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ToolError(f"{config.out.name} failed ({reason}); run the same command again to go on")
    if not (config.out / "student" / PROVENANCE).is_file():
        raise ToolError(
            f"{config.out.name} ended without a student; remove {config.out} and run the same command again"
        )
    return config


def _provenance(config: TrainConfig) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((config.out / "student" / PROVENANCE).read_text())
    return value


def _validation(config: TrainConfig) -> float:
    from distill.report import read_metrics
    from distill.trainer import METRICS

    return [float(m["eval_exact_match"]) for m in read_metrics(config.out / METRICS) if "eval_exact_match" in m][-1]


def _step_times(plan: Plan, lrs: dict[str, float], rounds: int = 15) -> dict[str, float]:
    """Seconds of one optimiser step of each objective, interleaved so that noise hits all alike.

    Candidates get fewer as the student gets surer, so this is the mean of a new student's step and of one trained by
    the learning-rate sweep.
    """
    stored = plan.out / "step_seconds.json"
    made_with = {"sweep_steps": plan.sweep_steps, "lrs": lrs}
    if stored.is_file():
        kept = read_json(stored)
        # an earlier version measured the same for what has no options
        early = "made_with" not in kept and not any(":" in name for name in plan.objectives)
        seconds: dict[str, float] = kept if early else kept.get("seconds", {})
        if set(seconds) == set(plan.objectives) and (early or kept.get("made_with") == made_with):
            return seconds
        note("step times were measured for other settings; measuring them again")
    from distill.steptime import measure

    # a student that has to be made first needs a place
    fresh = {
        name: dataclasses.replace(variant(plan.preset, name), threads=1, out=plan.out / f"time-{_folder(name)}")
        for name in plan.objectives
    }
    trained = {
        name: starting_from(config, _sweep_config(plan, name, lrs[name]).out / "student")
        for name, config in fresh.items()
    }
    at_start, at_end = measure(fresh, rounds), measure(trained, rounds)
    seconds = {name: (at_start[name] + at_end[name]) / 2 for name in plan.objectives}
    write_atomic(stored, json.dumps({"made_with": made_with, "seconds": seconds}) + "\n")
    return seconds


def _print(plan: Plan, cells: list[Cell], seconds: dict[str, float], elapsed: float) -> None:
    slowest = max(seconds, key=seconds.__getitem__)
    rows = []
    for name in plan.objectives:
        at = {cell.budget: cell for cell in cells if cell.objective == name}
        rows.append(
            [
                name,
                f"{at['steps'].lr:g}",
                f"{seconds[name] / seconds[slowest]:.2f}",
                *[at[b].shown() for b in ("steps", "time")],
            ]
        )
    header = ["objective", "lr", f"step time / {slowest}", "exact match, equal steps", "exact match, equal time"]
    print(table(header, rows))
    print(f"mean ± standard deviation over {plan.seeds} seeds; learning rates tried: {plan.lrs}; {elapsed:.0f} s")
    if plan.as_json:
        print_json(
            {
                "rows": [
                    {
                        "objective": cell.objective,
                        "budget": cell.budget,
                        "mean": cell.mean,
                        "std": cell.std,
                        "seeds": plan.seeds,
                        "scores": cell.scores,
                        "steps": cell.steps,
                        "lr": cell.lr,
                    }
                    for cell in cells
                ],
                "step_seconds": seconds,
            }
        )
