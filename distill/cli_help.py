"""`--help` of the commands that take the training options: grouped, one line an option, examples first."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from distill.cli import AS_JSON, Extra, build_parser, recipes

# patterns by group, first match wins; what matches none is listed last, so a new option is never hidden
GROUPS = (
    ("what runs", r"preset|out|resume|seed|threads|device|json|blind_samples"),
    ("models", r"(teacher|student|lora|quant)(_.*|\..*)?|vision_tower|llm|feature_layer|projector|freeze.*|train_.*"),
    (
        "data",
        r"data.*|images?(_.*)?|format|on_.*|check_images|samples|augment|.*length.*|pack.*|workers|eval_data|holdout|group_by_length|streaming",
    ),
    ("objective", r"objective|weights\..*"),
    ("distillation terms", r"align\..*"),
    ("training", r"steps|batch_size|accumulate|.*lr|lrs\..*|warmup|weight_decay|max_grad_norm|lr_.*|epochs"),
    ("latent tokens", r"lavit\..*"),
    ("reasoning", r"tokens\..*|schedule|kpod\..*"),
    ("optimiser", r"optim(_.*)?|fira\..*"),
    ("memory and speed", r"bf16|gradient_checkpointing|cache.*|fsdp.*|compile.*|chunk.*|ddp.*"),
    ("measuring and saving", r"eval_.*|save_.*|log_.*|report.*|visual_.*|keep.*|final|early.*"),
)
WHICH = """which objective, which option (figures are the papers' own, with their models and data):
  sft, kd            baselines; always compare with kd given the same time
  align-ti           a teacher of the same tokenizer runs beside or is cached. Six benchmarks, 1B student: 66.65 (kd
                     65.0, sft 64.3), for 1.43 times the GPU hours of kd (arXiv 2602.09483)
  lavit              the student answers well and looks elsewhere. MMVP 67.3 (sft 65.3), BLINK relative depth 78.2
                     (base 61.3); on MMStar plain sft is better, 55.5 against 54.1 (arXiv 2601.10129). Later papers
                     find latent tokens bypassed in similar systems: read the token replacement test that every run
                     ends with
  align-ti+lavit     both, one teacher pass; untested by either paper
  --tokens.weights kpod --schedule kpod
                     data with reasonings. GSM8K, LLaMA-7B: 46.7 (best other 41.6), without weights 42.6, without
                     schedule 43.3 (arXiv 2405.16064); the paper has text only, with images it is our extension.
                     In a small test of ours (docs/kpod.md) weights gained nothing and the schedule cost steps
  --optim fira       the optimiser's state does not fit. C4, LLaMA-1B: perplexity 14.31 (GaLore 15.64, Adam 15.56) at
                     6.98 against 10.40 GB (arXiv 2410.01623); language modelling only
  --lora.r 16        still less memory, fewer weights train
"""
TRAIN_HELP = """usage: python -m distill train [--recipe NAME | --config FILE] [options]

Train a student. Later sources win: preset, recipe, the recipe's stage, options.
Options with {true,false} may stand alone for true; hyphens and underscores are the same.

  --recipe NAME         a recipe that comes with the package: {recipes}
  --config FILE         a YAML recipe: the options below as keys, and `stages:`, a list of `- name: NAME` entries with
                        the options each stage changes; the student of one stage starts the next
  --stages.NAME.KEY V   change an option of one stage

{which}
examples:
  python -m distill train --preset digits --objective align-ti
  python -m distill train --preset digits --objective lavit
  python -m distill train --student DIR --data rationales.jsonl --objective sft --tokens.weights kpod --schedule kpod
  python -m distill train --teacher DIR --student DIR --data train.json --images images/ --steps 2000 --out runs/mine
  python -m distill train --recipe digits-stages --out runs/stages
  python -m distill train --recipe paper --teacher DIR --student DIR --data sft.json --images images/ \\
                          --stages.align-projector.data pretrain.json --out runs/paper
  python -m distill train --resume --out runs/mine
"""
CHECK_HELP = """usage: python -m distill check [the options of train] [--json]

A dry run before money is spent. For every stage: the data in figures, which token is image, instruction or response
and which are trained, the vocabularies, real steps forward and backward at growing batch sizes with their peak memory
and time, what the whole run will need, and whether teacher and student look at the image at all. Nothing is written.
Exit code 0: all checks hold; 1: one failed; 2: bad input.

  --recipe, --config, --stages.NAME.KEY   as of train

examples:
  python -m distill check --preset digits
  python -m distill check --recipe budget-24gb --teacher DIR --student DIR --data train.json --images images/
  python -m distill check --config recipe.yaml --json
"""
PAGES = {"train": TRAIN_HELP, "check": CHECK_HELP}
WIDTH = 118


def page(command: str, extras: tuple[Extra, ...] = (AS_JSON,)) -> str:
    """The whole help text of `train` or `check`."""
    head = PAGES[command].replace("{recipes}", ", ".join(recipes())).replace("{which}", WHICH)
    return head + "".join(_group(title, actions) for title, actions in grouped(command, extras))


def grouped(command: str, extras: tuple[Extra, ...] = (AS_JSON,)) -> list[tuple[str, list[Any]]]:
    """The parser's options by group, every option once."""
    # the parser also offers a file for each nested group; a recipe does that
    actions = [action for action in build_parser(command, extras)._actions if type(action).__name__ == "ActionTypeHint"]
    actions += [a for a in build_parser(command, extras)._actions if a.dest in {extra.name for extra in extras}]
    actions = list({action.dest: action for action in actions}.values())
    found: list[tuple[str, list[Any]]] = []
    for title, pattern in GROUPS:
        chosen = [action for action in actions if re.fullmatch(pattern, action.dest)]
        actions = [action for action in actions if action not in chosen]
        if chosen:
            found.append((title, chosen))
    return [*found, ("more", actions)] if actions else found


def _group(title: str, actions: list[Any]) -> str:
    lines = [f"\n{title}:"]
    for action in actions:
        option = f"  --{action.dest} {_choices(action)}".rstrip()
        text = f"{action.help or ''} {_default(action.default)}".strip()
        folded = textwrap.wrap(text, WIDTH - 36) or [""]
        if len(option) > 34:
            lines.append(option)
            option = ""
        lines.append(f"{option:<36}{folded[0]}".rstrip())
        lines += [" " * 36 + line for line in folded[1:]]
    return "\n".join(lines) + "\n"


def _choices(action: Any) -> str:
    kind = getattr(action, "_typehint", None) or action.type
    if kind is bool:
        return "{true,false}"
    text = str(kind)
    if "Literal[" in text:
        return "{" + ",".join(re.findall(r"'([^']+)'", text)) + "}"
    for word, shown in (("Path", "PATH"), ("tuple", "LIST"), ("list", "LIST"), ("float", "X"), ("int", "N")):
        if word in text:
            return shown
    return "TEXT"


def _default(value: Any) -> str:
    if value is None or value == () or value == "" or value is False:
        return ""
    return f"[{value}]"
