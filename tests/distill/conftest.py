"""Random teacher and student pairs of every decoder and tower, and a mixed batch with text-only samples."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.data import Collator, Example, to_batch
from distill.objective import Batch
from distill.trainer import DistillTrainer
from tests.tiny import make_student
from vlm import chat, digits, preprocess
from vlm.load import Checkpoint, load_model, open_checkpoint

SIZES = {"hidden": 64, "head_dim": 16, "intermediate": 96, "spread": 2.0}
MODELS = [("qwen2", "siglip"), ("qwen3", "siglip"), ("llama", "siglip"), ("qwen2", "clip"), ("qwen3", "clip")]


@dataclass(frozen=True)
class Pair:
    teacher: nn.Module
    student: nn.Module
    checkpoint: Checkpoint

    def examples(self) -> list[Example]:
        """Three questions about images, one text-only conversation and one with two turns."""
        tokenizer, spec = self.checkpoint.tokenizer, self.checkpoint.image
        found = []
        for index in (0, 3, 5):
            sample = digits.sample("train", index)
            messages = [chat.user_message(sample.question), {"role": "assistant", "content": sample.answer}]
            conversation = tokenizer.conversation(messages)
            pixels = (preprocess.pixels(sample.image, spec),)
            found.append(Example(conversation.ids, conversation.spans, pixels))
            if index == 3:
                messages += [{"role": "user", "content": "And what else?"}, {"role": "assistant", "content": "9 9"}]
                longer = tokenizer.conversation(messages)
                found.append(Example(longer.ids, longer.spans, pixels))
        text = tokenizer.conversation(
            [chat.user_message("What is 1 + 2?", images=0), {"role": "assistant", "content": "1 + 2 = 3"}]
        )
        return [*found, Example(text.ids, text.spans, ())]

    def batch(self, pad_left: bool = False) -> Batch:
        return self.collate(self.examples(), pad_left)

    def collate(self, examples: list[Example], pad_left: bool = False) -> Batch:
        return to_batch(Collator(self.checkpoint.tokenizer.spec.pad_token_id, pad_left)(examples))


@pytest.fixture(scope="session", params=MODELS, ids=["-".join(model) for model in MODELS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), *request.param)


@pytest.fixture(scope="session")
def qwen2_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), "qwen2", "siglip")


def make_pair(folder: Path, decoder: str, tower: str) -> Pair:
    torch.set_num_threads(1)
    sizes = {"decoder": decoder, "tower": tower, "hidden": 64, "head_dim": 16, "intermediate": 96, "spread": 3.0}
    feature = {"feature_layer": -2} if tower == "clip" else {}
    teacher = make_student(folder / "teacher", seed=1, layers=3, **sizes, **feature)
    student = make_student(folder / "student", seed=2, layers=2, **sizes)
    checkpoint = open_checkpoint(student)
    loaded = load_model(open_checkpoint(teacher)).requires_grad_(False)
    return Pair(loaded, load_model(checkpoint), checkpoint)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of two layers and a student of one."""
    folder = tmp_path_factory.mktemp("models")
    make_student(folder / "teacher", seed=1, layers=2, **SIZES)
    make_student(folder / "student", seed=2, layers=1, **SIZES)
    return folder


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Training gets the signal of Ctrl-C when this step begins."""
    original = DistillTrainer.training_step

    def interrupted(self: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", interrupted)
