"""`python -m distill`: train a student (default), check before training, and the tools around it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.console import note, print_json, run_command
from vlm.errors import UserError

if TYPE_CHECKING:
    from distill.config import TrainConfig
    from distill.train import TrainResult

# command -> module with main(argv), meaning
COMMANDS = {
    "train": ("distill.__main__", "train a student, in one run or in the stages of a recipe"),
    "check": ("distill.check", "dry run: token alignment, memory, time, disk, and whether the images are looked at"),
    "cache": ("distill.cache_command", "run the teacher over the data once; train --teacher_cache reads what it said"),
    "irs": ("distill.irs_command", "which teacher layer's attention follows the instruction (--align.iva_layer)"),
    "report": ("distill.report_html", "write OUT/report.html again, beside other runs if you like"),
    "compare": ("distill.compare", "objectives x seeds at equal steps and at equal time"),
    "teacher": ("distill.__main__", "train the teacher of a preset"),
}
USAGE = """usage: python -m distill [COMMAND] [options]      without a command: train --preset digits

commands (each has --help):
{commands}
examples:
  python -m distill
  python -m distill check --teacher DIR --student DIR --data train.json --images images/
  python -m distill irs --teacher DIR --data train.json --images images/
  python -m distill train --preset digits --objective sft --seed 1 --out runs/sft
  python -m distill train --config recipe.yaml
  python -m distill train --resume --out runs/mine
  python -m distill report runs/mine --compare_to runs/sft runs/kd
  python -m distill compare --preset digits --objectives sft,kd,align-ti --seeds 3
"""


def main(argv: Sequence[str]) -> int:
    # spinning OpenMP threads slow a shared machine down several times over (3.2 s against 0.4 s a step was seen)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if argv and argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    command, rest = (argv[0], list(argv[1:])) if argv and not argv[0].startswith("-") else ("train", list(argv))
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown command {command!r}; {hint}choose one of {', '.join(COMMANDS)}")
    if command == "train":
        return _train(_with_default_preset(argv, rest))
    if command == "teacher":
        return _teacher(rest)
    return int(importlib.import_module(COMMANDS[command][0]).main(rest))


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}\n" for name, (_, meaning) in COMMANDS.items()]
    return USAGE.format(commands="".join(lines))


def _with_default_preset(argv: Sequence[str], rest: list[str]) -> list[str]:
    """Without a command word, `python -m distill [options]` is the digits preset unless the options say otherwise."""
    chosen = ("--preset", "--config", "--recipe", "--student", "--llm", "--data", "--resume")
    named = bool(argv) and not argv[0].startswith("-")
    if named or any(word.split("=", 1)[0] in chosen for word in rest):
        return rest
    return ["--preset", "digits", *rest]


def _train(argv: list[str]) -> int:
    from distill import cli, stages

    if "--help" in argv or "-h" in argv:
        from distill.cli_help import page

        print(page("train"), end="")
        return 0
    request = cli.parse(argv)
    out = cli.run_directory(request)
    quiet()
    resume = request.stages[0].config.resume
    try:
        if resume and (out / stages.PLAN).is_file():
            result = stages.run(stages.read_plan(out), out)
        elif request.staged:
            result = stages.start(request, out)
        else:
            from distill.train import train

            result = train(dataclasses.replace(request.stages[0].config, out=out))
    except KeyboardInterrupt:
        return _stopped("train", out)
    if stages.is_main_process():
        from distill.report_html import finish

        finish(out)
        _print(result, request.extra["json"])
    from distill import processes

    processes.leave()
    return 0


def _stopped(command: str, out: Path) -> int:
    """How to go on after Ctrl-C: before anything was written, with the same words."""
    if not any((out / name).is_file() for name in ("config.json", "stages.json")):
        raise KeyboardInterrupt
    note(f"stopped; go on with: python -m distill {command} --resume --out {shlex.quote(str(out))}")
    return 130


def _teacher(argv: list[str]) -> int:
    config, as_json = parse_teacher(argv)
    quiet()
    from distill.cli import Request, Stage, run_directory
    from distill.make_teacher import teacher_config
    from distill.train import train

    request = Request((Stage("", config),), False, "", {})
    config = dataclasses.replace(config, out=run_directory(request, "teacher"))
    try:
        result = train(teacher_config(config))
    except KeyboardInterrupt:
        return _stopped("teacher", config.out)
    _print(result, as_json)
    return 0


def parse_teacher(argv: list[str]) -> tuple[TrainConfig, bool]:
    """The teacher's recipe is fixed; only where, with which seed and how many threads can be chosen."""
    from distill.config import NEW_RUN, TrainConfig
    from vlm.console import Parser, natural

    parser = Parser(
        prog="python -m distill teacher",
        description="Train the teacher of a preset from scratch.",
        epilog="example: python -m distill teacher --preset digits --out runs/teacher",
    )
    parser.add_argument("--preset", choices=["digits"], default="digits")
    parser.add_argument("--seed", type=natural, default=0, help="initialisation and data order")
    parser.add_argument("--threads", type=natural, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--out", type=Path, default=NEW_RUN, help="run folder; default: a new one under runs/")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    args = parser.parse_args(argv)
    if args.resume and (args.seed or args.threads):
        raise UserError("--resume goes on with the options stored in its folder; drop --seed and --threads")
    config = TrainConfig(preset="digits", seed=args.seed, threads=args.threads, out=args.out, resume=args.resume)
    return config, args.json


def quiet() -> None:
    """Keep the libraries' own chatter off the terminal."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _print(result: TrainResult, as_json: bool) -> None:
    if as_json:
        print_json(result.to_json())
        return
    print(f"student: {result.student}")
    if result.exact_match is not None and result.interval is not None:
        low, high = result.interval
        print(f"exact match on unseen data: {result.exact_match:.3f} (95 % {low:.3f} to {high:.3f}, n = {result.n})")
    print(f"seconds: {result.seconds}  objective: {result.objective}  seed: {result.seed}")
    print(f"next: python -m export --target onnx --student {result.student}")


if __name__ == "__main__":
    run_command(main)
