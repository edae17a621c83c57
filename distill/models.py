"""The student a run starts from: a checkpoint, parts put together, fewer layers of another, or the preset's own."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from distill import compose, groups, latents, lora, presets
from distill.assemble import build_model
from distill.config import TrainConfig
from distill.families import FAMILIES
from vlm.errors import CheckpointError, UserError
from vlm.load import Checkpoint, load_model, open_checkpoint

INITIAL = "initial"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def is_local(name: str) -> bool:
    """Whether a name is a local path, mistyped or not; a hub id has one slash and no folder before it that exists."""
    path = Path(name)
    return path.exists() or path.parent.exists() or name.count("/") != 1 or name.startswith((".", "~"))


def local(name: str) -> Path:
    """A local directory, or the snapshot of a hub id (the only case that may use the network).

    Raises:
        CheckpointError: neither.
    """
    if is_local(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a directory nor a reachable hub id ({type(error).__name__})"
        ) from None


def open_model(name: str | Path) -> Checkpoint:
    """A teacher or student of any class that can be distilled, as a directory or hub id."""
    return open_checkpoint(local(str(name)), tuple(FAMILIES))


class CopiedProcessor:
    """The processor files of a checkpoint as they are: some processors cannot be opened without video libraries."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def save_pretrained(self, directory: Path) -> None:
        for name in PROCESSOR_FILES:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, directory / name)


def processor_of(source: Checkpoint) -> Any:
    """What `save_checkpoint` writes beside the weights of a student that started from `source`."""
    if source.config.get("model_type") != "llava":
        return CopiedProcessor(source.directory)
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(source.directory, local_files_only=True)


def open_student(config: TrainConfig, teacher: Checkpoint | None) -> tuple[nn.Module, Checkpoint]:
    """The student's model in training mode, float32, and the checkpoint its processor comes from.

    A student that has to be made first (parts, fewer layers, latent tokens) is written to OUT/initial* and reused on
    resume.

    Raises:
        UserError: nothing says what the student is, or it cannot be opened.
    """
    model, source = _start(config, teacher)
    if not config.has_latents or len(source.tokenizer.spec.latent_token_ids) == config.lavit.latents:
        return model, source
    return _open(latents.extend(model, source, config.lavit.latents, config.out / latents.FOLDER, config.seed))


def _start(config: TrainConfig, teacher: Checkpoint | None) -> tuple[nn.Module, Checkpoint]:
    if config.llm is not None and config.vision_tower is not None:
        parts = compose.Parts(
            local(config.vision_tower), local(config.llm), config.feature_layer, config.student_layers, config.seed
        )
        return _open(compose.assemble(parts, config.out / INITIAL, teacher))
    if config.student:
        source = open_model(config.student)
    elif config.student_layers and teacher is not None:
        source = teacher
    elif config.preset == "digits" and teacher is not None:
        return _digits_student(config, teacher)
    else:
        raise UserError("no student to train; pass --student DIR, --vision_tower DIR --llm DIR, or --preset digits")
    if config.student_layers:
        return _open(compose.shorten(source, config.student_layers, config.out / INITIAL, processor_of(source)))
    return _open(source.directory)


def prepare(config: TrainConfig, student: nn.Module) -> None:
    """Adapters, then the freeze list.

    Raises:
        UserError: an option names nothing in this student.
    """
    if config.lora.r:
        lora.attach(student, config.lora)
    groups.freeze(student, f"{config.freeze},{'vision' if config.freeze_vision else ''}")


def _open(directory: Path) -> tuple[nn.Module, Checkpoint]:
    source = open_model(directory)
    return load_model(source).train(), source


def _digits_student(config: TrainConfig, teacher: Checkpoint) -> tuple[nn.Module, Checkpoint]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher.directory)
    model = build_model(presets.DIGITS_STUDENT, tokenizer, config.seed).train()
    # a LLaVA student starts from a trained tower; projector and decoder are new
    try:
        model.model.vision_tower.load_state_dict(load_model(teacher).model.vision_tower.state_dict())
    except RuntimeError:
        raise CheckpointError(
            f"the preset's student takes over the teacher's tower, and that of {teacher.directory} has other sizes; "
            "pass --student DIR"
        ) from None
    return model, dataclasses.replace(teacher, config=model.config.to_dict(), provenance={})
