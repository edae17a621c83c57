"""`python -m distill`: train a student (default), make the digits teacher, compare objectives."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.console import note, print_json, run_command
from vlm.errors import UserError

if TYPE_CHECKING:
    from distill.config import TrainConfig
    from distill.train import TrainResult

USAGE = """usage: python -m distill [train] [options]      train a student (no arguments: --preset digits)
       python -m distill teacher --preset digits   train the teacher of the preset
       python -m distill compare [options]         objectives x seeds at equal steps and at equal time
       python -m distill COMMAND --help            every option

examples:
  python -m distill
  python -m distill train --preset digits --objective sft --seed 1 --out runs/sft
  python -m distill train --config recipe.yaml
  python -m distill train --teacher DIR --student DIR --data train.json --images images/ --steps 2000 --out runs/mine
  python -m distill train --resume --out runs/mine
  python -m distill compare --preset digits --objectives sft,kd,align-ti --seeds 3
"""
COMMANDS = ("train", "teacher", "compare")


def main(argv: Sequence[str]) -> int:
    # spinning OpenMP threads slow a shared machine down several times over (3.2 s against 0.4 s a step was seen)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    command, rest = (argv[0], list(argv[1:])) if argv and not argv[0].startswith("-") else ("train", list(argv))
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}; choose one of {', '.join(COMMANDS)}")
    if command == "compare":
        from distill.compare import main as compare

        return compare(rest)
    return _train(_with_default_preset(argv, rest), teacher=command == "teacher")


def _with_default_preset(argv: Sequence[str], rest: list[str]) -> list[str]:
    """Without a command word, `python -m distill [options]` is the digits preset unless the options say otherwise."""
    chosen = ("--preset", "--config", "--student", "--data", "--resume")
    named = bool(argv) and not argv[0].startswith("-")
    if named or any(word.split("=", 1)[0] in chosen for word in rest):
        return rest
    return ["--preset", "digits", *rest]


def _train(argv: list[str], teacher: bool) -> int:
    config, as_json = parse_teacher(argv) if teacher else parse_train(argv)
    _quiet()
    from distill.train import train

    config = _with_run_directory(config, "teacher" if teacher else config.objective)
    if teacher:
        from distill.make_teacher import teacher_config

        config = teacher_config(config)
    try:
        result = train(config)
    except KeyboardInterrupt:
        note(f"stopped; go on with: python -m distill train --resume --out {config.out}")
        raise
    _print(result, as_json)
    return 0


def parse_train(argv: list[str]) -> tuple[TrainConfig, bool]:
    """Command line, YAML recipe and preset -> TrainConfig; later sources win in the order preset, recipe, options.

    Raises:
        UserError: unknown option or key, or a value of the wrong type.
    """
    import jsonargparse

    from distill import presets
    from distill.config import TrainConfig

    parser = jsonargparse.ArgumentParser(
        prog="python -m distill train",
        description="Train a student. Options with {true,false} may stand alone for true. "
        "Example: python -m distill train --preset digits --objective align-ti",
        exit_on_error=False,
        formatter_class=jsonargparse.DefaultHelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML recipe with the options below as keys")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")
    parser.add_class_arguments(TrainConfig)
    preset = _peek_preset(argv)
    if preset and preset != "none":
        if preset not in presets.PRESETS:
            raise UserError(f"preset {preset!r} is unknown; choose one of {', '.join(presets.PRESETS)}")
        parser.set_defaults(presets.PRESETS[preset])
    try:
        namespace = parser.parse_args(_spell_out_flags(argv, TrainConfig))
        as_json = bool(namespace.pop("json"))
        namespace.pop("config")
        values = parser.instantiate(namespace)
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise UserError(f"{_first_reason(error)}; see `python -m distill train --help`") from None
    config = TrainConfig(**values.as_dict())
    if config.resume:
        _refuse_options_beside_resume(argv)
    return config, as_json


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
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--threads", type=natural, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--out", type=Path, default=NEW_RUN)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    config = TrainConfig(preset="digits", seed=args.seed, threads=args.threads, out=args.out, resume=args.resume)
    return config, args.json


def _refuse_options_beside_resume(argv: list[str]) -> None:
    """A resumed run takes its options from its folder; another value here would be silently ignored."""
    allowed = ("--resume", "--out", "--json")
    for word in argv:
        if word.startswith("--") and word.split("=", 1)[0] not in allowed:
            raise UserError(f"--resume takes its options from OUT/config.json; drop {word.split('=', 1)[0]}")


def _spell_out_flags(argv: list[str], config: type[TrainConfig]) -> list[str]:
    """`--resume` alone means `--resume=true`; the parser itself wants a value for every option."""
    flags = {f"--{field.name}" for field in dataclasses.fields(config) if field.type == "bool"}
    bare = [word in flags and (i + 1 == len(argv) or argv[i + 1].startswith("-")) for i, word in enumerate(argv)]
    return [f"{word}=true" if alone else word for word, alone in zip(argv, bare, strict=True)]


def _peek_preset(argv: list[str]) -> str | None:
    """The preset decides the defaults of all other options, so it is looked up before they are parsed."""
    for index, word in enumerate(argv):
        if word.startswith("--preset="):
            return word.split("=", 1)[1]
        if word == "--preset" and index + 1 < len(argv):
            return argv[index + 1]
    for index, word in enumerate(argv):
        recipe = word.split("=", 1)[1] if word.startswith("--config=") else None
        if word == "--config" and index + 1 < len(argv):
            recipe = argv[index + 1]
        if recipe is not None:
            return _preset_of_recipe(Path(recipe))
    return None


def _preset_of_recipe(recipe: Path) -> str | None:
    import yaml

    try:
        value = yaml.safe_load(recipe.read_text())
    except OSError as error:
        raise UserError(f"recipe {recipe} cannot be read ({error.strerror}); check --config") from None
    except yaml.YAMLError as error:
        raise UserError(f"{recipe} is not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise UserError(f"{recipe} must hold options as `key: value` lines")
    preset = value.get("preset")
    return None if preset in (None, "none") else str(preset)


def _first_reason(error: Exception) -> str:
    """The parser's own words on one line, without its nested validation dump."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2]) if lines else type(error).__name__


def _with_run_directory(config: TrainConfig, name: str) -> TrainConfig:
    from distill.config import NEW_RUN

    if config.out != NEW_RUN:
        return config
    if config.resume:
        raise UserError("--resume needs the run's folder; add --out runs/NAME")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return dataclasses.replace(config, out=Path("runs") / f"{config.preset}-{name}-seed{config.seed}-{stamp}")


def _quiet() -> None:
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _print(result: TrainResult, as_json: bool) -> None:
    if as_json:
        value: dict[str, Any] = result.to_json()
        print_json(value)
        return
    print(f"student: {result.student}")
    if result.exact_match is not None and result.interval is not None:
        low, high = result.interval
        print(f"exact match on unseen data: {result.exact_match:.3f} (95 % {low:.3f} to {high:.3f}, n = {result.n})")
    print(f"seconds: {result.seconds}  objective: {result.objective}  seed: {result.seed}")
    print(f"next: python -m export --target onnx --student {result.student}")


if __name__ == "__main__":
    run_command(main)
