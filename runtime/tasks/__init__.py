"""Readers: a benchmark's files on disk -> items. One function per task; nothing is downloaded, nothing executed."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from runtime.tasks.base import Task, TaskOptions, draw
from vlm.errors import DataError, UserError
from vlm.scoring.benchmarks import BENCHMARKS

# name of the task -> module and function
READERS = {
    "digits": ("others", "digits"),
    "gqa": ("short_answer", "gqa"),
    "scienceqa-img": ("choices", "scienceqa_img"),
    "scienceqa": ("choices", "scienceqa"),
    "textvqa": ("short_answer", "textvqa"),
    "pope": ("short_answer", "pope"),
    "mme": ("short_answer", "mme"),
    "mmbench": ("choices", "mmbench"),
    "mmvp": ("choices", "mmvp"),
    "blink": ("choices", "blink"),
    "vstar": ("choices", "vstar"),
    "mmstar": ("choices", "mmstar"),
    "mme-reasoning": ("others", "mme_reasoning"),
    "av-odyssey": ("choices", "av_odyssey"),
    "json": ("others", "generic"),
}

# these come in one piece
WHOLE = ("mme", "mmvp", "vstar", "mmstar", "mme-reasoning", "av-odyssey", "json")


def read_task(name: str, options: TaskOptions) -> Task:
    """Read a task; with `options.samples` a subset of it.

    Raises:
        UserError: unknown task, or no data of its layout. DataError: a record that cannot be used.
        MissingPiece: the layout needs a package that is not installed.
    """
    if name not in READERS:
        raise UserError(f"unknown task {name!r}; known: {', '.join(READERS)}")
    if options.split and name in WHOLE:
        raise UserError(f"task {name} has no splits, --split is {options.split!r}; leave it out")
    module, function = READERS[name]
    read: Any = getattr(importlib.import_module(f"runtime.tasks.{module}"), function)
    try:
        task: Task = read(options)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise DataError(f"{options.data} is not in the layout of {name} ({cause}); see docs/evaluation.md") from error
    # a place holder for the image would be refused as a special token: the images go first in any case
    items = tuple(dataclasses.replace(i, prompt=i.prompt.replace("<image>", "").strip()) for i in task.items)
    task = dataclasses.replace(task, items=items)
    return draw(task, BENCHMARKS[name].unit, options.samples, options.seed)
