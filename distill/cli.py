"""Command line, recipe and preset -> the stages to train, each a TrainConfig.

Later sources win: preset, recipe, the recipe's stage, options, options of one stage (`--stages.NAME.KEY VALUE`).
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import json
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from distill.cli_flags import spell_out
from distill.config import NEW_RUN, TrainConfig
from vlm.errors import UserError

# what people used to other trainers type
ALIASES = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_steps": "steps",
    "output_dir": "out",
    "output": "out",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "warmup_ratio": "warmup",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "dataset": "data",
    "data_path": "data",
    "image_folder": "images",
    "model": "student",
    "teacher_model": "teacher",
    "student_model": "student",
    "resume_from_checkpoint": "resume",
    "top_k": "align.candidates",
    "k": "align.candidates",
}
# of a recipe, beside the options
RECIPE_KEYS = ("description", "stages")
STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")


@dataclass(frozen=True)
class Stage:
    """One training run of a request; the only stage of a plain run has no name."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        stages: in order, every `config.out` the root folder OUT.
        staged: whether a recipe spelled stages out (each then gets a folder of its own under OUT).
        recipe: name of the recipe, empty without one.
        extra: values of the command's own options.
    """

    stages: tuple[Stage, ...]
    staged: bool
    recipe: str
    extra: dict[str, Any]


@dataclass(frozen=True)
class Extra:
    """An option of a command that is not part of TrainConfig."""

    name: str
    kind: type
    default: Any
    meaning: str


AS_JSON = Extra("json", bool, False, "print the result as one JSON line at the end")


def parse_train(argv: list[str]) -> tuple[TrainConfig, bool]:
    """The configuration of a run without stages, and whether JSON is wanted.

    Raises:
        UserError: unknown option or key, a value of the wrong type, or a recipe with stages.
    """
    request = parse(argv)
    if request.staged:
        raise UserError(f"recipe {request.recipe} has stages; run it with `python -m distill train`")
    return request.stages[0].config, bool(request.extra["json"])


def parse(argv: list[str], command: str = "train", extras: tuple[Extra, ...] = (AS_JSON,)) -> Request:
    """Read a command line that takes the training options and those in `extras`.

    Raises:
        UserError: unknown option or key (the nearest is named) or a value of the wrong type.
    """
    argv = [_hyphens(word) for word in argv]
    recipe, argv = _take_recipe(argv)
    chosen, argv = _take_stage_options(argv)
    known = {*option_names(), *(extra.name for extra in extras)}
    for word in argv:
        if word.startswith("--") and (name := word[2:].split("=", 1)[0]) not in known:
            unknown(f"--{name}", name, known, f"`python -m distill {command} --help`")
    name = recipe.name if recipe else ""
    top, stages = _recipe_words(recipe) if recipe else ([], [])
    if unused := set(chosen) - {stage for stage, _ in stages}:
        have = ", ".join(stage for stage, _ in stages) or "no stages"
        raise UserError(
            f"--stages.{sorted(unused)[0]}: the recipe has {have}; see `python -m distill {command} --help`"
        )
    _refuse_placing(chosen, stages)
    found: list[Stage] = []
    for stage, words in stages or [("", [])]:
        where = f"{recipe} stage {stage}: " if stage else ""
        config, extra = _parse_words([*top, *words, *argv, *chosen.get(stage, [])], command, extras, where)
        found.append(Stage(stage, config))
    if found[0].config.resume:
        _refuse_options_beside_resume([*argv, *(["--config"] if recipe else [])], extras)
    return Request(tuple(found), bool(stages), name, extra)


def _parse_words(
    words: list[str], command: str, extras: tuple[Extra, ...], where: str
) -> tuple[TrainConfig, dict[str, Any]]:
    import jsonargparse

    from distill import presets

    parser = build_parser(command, extras)
    preset = _preset(words)
    if preset and preset != "none":
        if preset not in presets.PRESETS:
            raise UserError(f"{where}preset {preset!r} is unknown; choose one of {', '.join(presets.PRESETS)}")
        parser.set_defaults(presets.PRESETS[preset])
    try:
        namespace = parser.parse_args(spell_out(words, [extra.name for extra in extras if extra.kind is bool]))
        extra = {item.name: namespace.pop(item.name) for item in extras}
        values = parser.instantiate(namespace)
        return TrainConfig(**values.as_dict()), extra
    except UserError as error:
        raise UserError(f"{where}{error.message}") from None
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise UserError(f"{where}{_first_reason(error)}; see `python -m distill {command} --help`") from None


def build_parser(command: str, extras: tuple[Extra, ...] = (AS_JSON,)) -> Any:
    """The jsonargparse parser of TrainConfig and a command's own options."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=f"python -m distill {command}", exit_on_error=False, add_help=False)
    for extra in extras:
        parser.add_argument(f"--{extra.name}", type=extra.kind, default=extra.default, help=extra.meaning)
    parser.add_class_arguments(TrainConfig)
    return parser


@functools.cache
def option_names() -> tuple[str, ...]:
    """Dotted names of every field of TrainConfig."""
    return tuple(_names(TrainConfig, ""))


def _names(kind: Any, prefix: str) -> list[str]:
    found: list[str] = []
    for field in dataclasses.fields(kind):
        found.append(prefix + field.name)
        if isinstance(field.default_factory, type) and dataclasses.is_dataclass(field.default_factory):
            found += _names(field.default_factory, f"{prefix}{field.name}.")
    return found


def unknown(shown: str, name: str, known: set[str], where: str) -> NoReturn:
    """Refuse an unknown option or key, naming the one that was probably meant.

    Raises:
        UserError: always.
    """
    last = {option.rsplit(".", 1)[-1]: option for option in sorted(known)} | {option: option for option in known}
    last |= {alias: option for alias, option in ALIASES.items() if option in known}
    near = difflib.get_close_matches(name.rsplit("=")[0], last, n=1, cutoff=0.6)
    if not near and "." in name:
        near = difflib.get_close_matches(name.rsplit(".", 1)[1], last, n=1, cutoff=0.6)
    hint = f"did you mean {'--' if shown.startswith('--') else ''}{last[near[0]]}?" if near else "drop it"
    raise UserError(f"unknown {'option' if shown.startswith('--') else 'key'} {shown}; {hint} ({where} lists them all)")


def _hyphens(word: str) -> str:
    """`--batch-size=4` is `--batch_size=4`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    parts = name[2:].split(".")
    if parts[0] == "stages":  # names of stages may hold hyphens
        parts[2:] = [part.replace("-", "_") for part in parts[2:]]
    else:
        parts = [part.replace("-", "_") for part in parts]
    return "--" + ".".join(parts) + equals + value


def _take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The last value of `--name`, and the other words."""
    rest: list[str] = []
    value: str | None = None
    words = iter(argv)
    for word in words:
        if word == f"--{name}":
            value = next(words, None)
            if value is None:
                raise UserError(f"--{name} needs a value")
        elif word.startswith(f"--{name}="):
            value = word.split("=", 1)[1]
        else:
            rest.append(word)
    return value, rest


def _take_recipe(argv: list[str]) -> tuple[Path | None, list[str]]:
    file, argv = _take_option(argv, "config")
    name, argv = _take_option(argv, "recipe")
    if file is not None and name is not None:
        raise UserError("--config and --recipe both name a recipe; keep one")
    if name is not None:
        return recipe_path(name), argv
    return (Path(file) if file is not None else None), argv


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("distill"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """File of a recipe that comes with the package.

    Raises:
        UserError: there is none of that name.
    """
    found = recipes()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no recipe {name!r}; {hint}there are {', '.join(found)} (--config FILE takes your own)")
    return found[name]


def read_recipe(file: Path) -> dict[str, Any]:
    """A recipe's mapping, keys unchecked.

    Raises:
        UserError: not readable, not YAML, or no mapping.
    """
    import yaml

    try:
        value = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"recipe {file} cannot be read ({error.strerror}); check --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold options as `key: value` lines")
    return value


def _recipe_words(file: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Options of the whole recipe, and name and options of each stage, spelled as command line words."""
    value = read_recipe(file)
    top = _words({key: item for key, item in value.items() if key not in RECIPE_KEYS}, str(file))
    if "stages" not in value:
        return top, []
    entries = value["stages"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file}: stages must be a list of `- name: NAME` entries with options")
    stages: list[tuple[str, list[str]]] = []
    for number, entry in enumerate(entries, 1):
        name = str(entry.get("name", ""))
        if not STAGE_NAME.fullmatch(name) or name in dict(stages):
            raise UserError(
                f"{file} stage {number}: name {name!r} must be new, of lower-case letters, digits and hyphens"
            )
        for key in ("resume", "out"):
            if key in entry:
                raise UserError(f"{file} stage {name}: {key} belongs to the whole run; take it out of the stage")
        if number > 1 and entry.get("student"):
            raise UserError(f"{file} stage {name}: it starts from the student of the stage before; drop student")
        options = {key: item for key, item in entry.items() if key not in ("name", "description")}
        stages.append((name, _words(options, f"{file} stage {name}")))
    return top, stages


def _words(options: dict[Any, Any], where: str, prefix: str = "") -> list[str]:
    known = set(option_names())
    groups = {name.rsplit(".", 1)[0] for name in known if "." in name}
    words: list[str] = []
    for key, value in options.items():
        name = f"{prefix}{key}"
        if name not in known:
            unknown(repr(name) + f" in {where}", name, known, "`python -m distill train --help`")
        if name in groups:
            if not isinstance(value, dict):
                raise UserError(f"{where}: {name} must hold `key: value` lines, got {value!r}")
            words += _words(value, where, f"{name}.")
        else:
            try:
                value = ",".join(map(str, value)) if isinstance(value, list) else value
                text = value if isinstance(value, str) else json.dumps(value)
            except (TypeError, ValueError, RecursionError):
                raise UserError(f"{where}: {name}: write {str(value)[:40]!r} in quotes") from None
            words.append(f"--{name}={text}")
    return words


def _take_stage_options(argv: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """`--stages.NAME.KEY VALUE` by stage, and the other words."""
    chosen: dict[str, list[str]] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--stages."):
            rest.append(word)
            continue
        stage, _, option = word.removeprefix("--stages.").partition(".")
        name, equals, value = option.partition("=")
        if name not in option_names():
            unknown(f"--stages.{stage}.{name}", name, set(option_names()), "`python -m distill train --help`")
        if not equals:
            alone = not words or words[0].startswith("--")
            value = "true" if alone else words.pop(0)
        chosen.setdefault(stage, []).append(f"--{name}={value}")
    return chosen, rest


def _refuse_placing(chosen: dict[str, list[str]], stages: list[tuple[str, list[str]]]) -> None:
    """Where a run lies, and what a later stage starts from, is not a stage's to choose."""
    for number, (stage, _) in enumerate(stages):
        for word in chosen.get(stage, []):
            name = word[2:].partition("=")[0]
            if name in ("resume", "out"):
                raise UserError(f"--stages.{stage}.{name}: {name} belongs to the whole run; write --{name}")
            if number and name in ("student", "student_layers", "llm", "vision_tower", "feature_layer"):
                raise UserError(f"--stages.{stage}.{name}: it starts from the student of the stage before; drop {name}")


def _preset(words: list[str]) -> str | None:
    """The preset decides the defaults of all other options, so it is looked up before they are parsed."""
    value, _ = _take_option(words, "preset")
    return None if value in (None, "none") else value


def _refuse_options_beside_resume(argv: list[str], extras: tuple[Extra, ...]) -> None:
    """A resumed run takes its options from its folder; another value here would be silently ignored."""
    allowed = {"--resume", "--out", *(f"--{extra.name}" for extra in extras)}
    for word in argv:
        if word.startswith("--") and word.split("=", 1)[0] not in allowed:
            raise UserError(f"--resume takes its options from OUT/config.json; drop {word.split('=', 1)[0]}")


def _first_reason(error: Exception) -> str:
    """The parser's own words on one line, without its nested validation dump."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2]) if lines else type(error).__name__


def run_directory(request: Request, what: str = "") -> Path:
    """OUT of a request: as told, or a new dated folder under runs/.

    Raises:
        UserError: resuming, or several processes, without --out.
    """
    config = request.stages[0].config
    if config.out != NEW_RUN:
        return config.out
    if config.resume:
        raise UserError("--resume needs the run's folder; add --out runs/NAME")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes need one folder between them; add --out runs/NAME")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    what = what or (Path(request.recipe).stem if request.staged else config.objective)
    return Path("runs") / f"{config.preset}-{what}-seed{config.seed}-{stamp}"
