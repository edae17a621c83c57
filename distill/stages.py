"""Several training runs in a row: the student of one stage starts the next, one folder holds them all.

OUT/stages.json          what was asked for, written before anything else
OUT/stage-1-NAME/ ...    one ordinary run each, resumable by itself
OUT/student              the last stage's student
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.cli import Request, Stage
from distill.config import TrainConfig
from vlm.console import note
from vlm.errors import UserError
from vlm.files import atomic_dir, read_json, write_atomic
from vlm.load import PROVENANCE

if TYPE_CHECKING:
    from distill.train import TrainResult

PLAN = "stages.json"
# how a student is put together; what starts from a finished one goes back to their defaults
START_FIELDS = ("vision_tower", "llm", "feature_layer", "student_layers")


def placed(stages: Sequence[Stage], out: Path) -> tuple[Stage, ...]:
    """The stages with their folders under `out`, each starting from the student of the one before."""
    found: list[Stage] = []
    for number, stage in enumerate(stages, 1):
        config = stage.config
        if found:
            config = starting_from(config, found[-1].config.out / "student")
        folder = out / f"stage-{number}-{stage.name}"
        found.append(Stage(stage.name, dataclasses.replace(config, out=folder, resume=False)))
    return tuple(found)


def starting_from(config: TrainConfig, student: Path, plain: bool = False) -> TrainConfig:
    """The same training, started from a student directory.

    Args:
        plain: only to load and look at it: no adapters, nothing frozen.
    """
    names = [*START_FIELDS, *(("lora", "lrs", "freeze", "freeze_vision", "projector_lr") if plain else ())]
    fresh = TrainConfig()
    changes: dict[str, Any] = {name: getattr(fresh, name) for name in names}
    return dataclasses.replace(config, **changes, student=str(student), resume=False)


def standing_in(config: TrainConfig, first: TrainConfig) -> TrainConfig:
    """A later stage with the student the first one starts from: its own is not made yet."""
    start: dict[str, Any] = {name: getattr(first, name) for name in ("student", *START_FIELDS)}
    return dataclasses.replace(config, **start)


def start(request: Request, out: Path) -> TrainResult:
    """Train the stages of a request from the beginning.

    Raises:
        UserError: `out` holds a run already, or a stage is wrong; finished stages stay.
        KeyboardInterrupt: stopped by Ctrl-C after writing a checkpoint.
    """
    from distill import processes

    stages = placed(request.stages, out)
    _refuse_what_cannot_train(stages)
    processes.join()
    processes.first(lambda: _write_plan(request, stages, out))
    try:
        return run(stages, out)
    except UserError:
        if not any(stage.config.out.exists() for stage in stages):  # nothing was trained: leave nothing behind
            (out / PLAN).unlink(missing_ok=True)
            _remove_empty(out)
        raise


def _write_plan(request: Request, stages: Sequence[Stage], out: Path) -> None:
    from distill.stored import config_to_json
    from distill.train import CONFIG

    if (out / PLAN).exists() or (out / CONFIG).exists():
        raise UserError(f"{out} already holds a run; add --resume to go on or choose another --out")
    plan = {
        "schema": "distill-stages/1",
        "recipe": request.recipe,
        "stages": [{"name": stage.name, "config": config_to_json(stage.config)} for stage in stages],
    }
    try:
        write_atomic(out / PLAN, json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot make the run folder {out} ({error.strerror}); choose another --out") from None


def read_plan(out: Path) -> tuple[Stage, ...]:
    """The stages a folder was started with, wherever the folder is now.

    Raises:
        CheckpointError: the plan is damaged.
    """
    from distill.stored import config_from_json

    stored = read_json(out / PLAN)["stages"]
    return placed([Stage(entry["name"], config_from_json(entry["config"])) for entry in stored], out)


def run(stages: Sequence[Stage], out: Path) -> TrainResult:
    """Train every stage that is not finished, going on inside the one that was cut short."""
    from distill.train import CONFIG, train

    results = []
    for number, stage in enumerate(stages, 1):
        started = (stage.config.out / CONFIG).is_file()
        note(f"stage {number} of {len(stages)}, {stage.name}: {stage.config.objective}, {stage.config.steps} steps")
        results.append(train(dataclasses.replace(stage.config, resume=started)))
        _wait_for_all()
    student = out / "student"
    if is_main_process() and not (student / PROVENANCE).is_file():
        with atomic_dir(student) as work:
            _link_tree(results[-1].student, work)
    return dataclasses.replace(results[-1], student=student, seconds=round(sum(r.seconds for r in results), 1))


def _refuse_what_cannot_train(stages: Sequence[Stage]) -> None:
    """A mistyped path of the last stage should not come to light after the first has cost days."""
    for stage in stages:
        for name, path in _files(stage.config):
            if not path.exists():
                raise UserError(f"stage {stage.name}: no {name} at {path}; check --{name}")
    for stage in stages:
        config = stage.config
        if config.data is None and config.preset == "none":
            raise UserError(f"stage {stage.name}: no data to train on; pass --data F --images D or --preset digits")
        if config.needs_teacher and (config.teacher, config.teacher_cache, config.preset) == (None, None, "none"):
            raise UserError(
                f"stage {stage.name}: objective {config.objective!r} needs a teacher; pass --teacher DIR or "
                f"--stages.{stage.name}.objective sft"
            )


def _files(config: TrainConfig) -> Iterator[tuple[str, Path]]:
    """(option, file or folder) of everything a stage opens that can be no hub id or pattern and no stage makes."""
    from distill.cache_store import INFO
    from distill.models import is_local
    from distill.optimizers import FILE

    for name in ("data", "images", "eval_data"):
        value = getattr(config, name)
        if isinstance(value, Path) and _is_local(value):
            yield name, value
    if config.teacher is not None and is_local(config.teacher):
        yield "teacher", Path(config.teacher)
    if config.needs_teacher and config.teacher_cache is not None:
        yield "teacher_cache", config.teacher_cache / INFO
    if config.optim_state is not None:
        yield "optim_state", config.optim_state / FILE


def _is_local(path: Path) -> bool:
    """Whether it cannot be anything but one file or folder (`hf:NAME` and patterns of shards are no such)."""
    text = str(path)
    if text.startswith("hf:") or set(text) & set("*?[{"):
        return False
    return path.is_absolute() or bool(path.suffix) or text.startswith(".")


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _wait_for_all() -> None:
    """The next stage reads what process 0 has just written."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _link_tree(source: Path, target: Path) -> None:
    """The same files under a second name where the file system can, copies elsewhere."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        try:
            os.link(path, place)
        except OSError:
            shutil.copy2(path, place)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
